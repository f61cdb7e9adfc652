"""Which maps find what the reward is about? `python assets/evidence.py why` measures it.

One set of rollouts of the embedded model, every candidate map on the same images, no optimizer
step. The signal of a map is the cosine of a batch's gradient (128 images, the first four steps,
weighted by --step-weights equal) to the mean of the *other* batches' gradients with a uniform
map, which are unbiased. It is taken twice:

  raw        of the gradients as they are
  whitened   after both are divided, parameter by parameter, by the root of the other batches'
             mean squared uniform gradient: about what AdamW's update sees

The raw cosine is ruled by the few parameters with the largest gradients, while AdamW gives all
parameters steps of one size: a map can gain in the first and not in the second. The batch itself
is left out of the reference and of the divisor alike: in the divisor, its own noise would shorten
it just where it is large, a uniform map's gradient more than any other's.

The candidates are chosen on the batches of the *selection* and measured again on those of the
*confirmation*. Every cosine is a row of assets/runs/why-TASK-STAGE.csv; the tables are made from
these rows.
"""

import contextlib
import csv
import functools
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import star

# --- where things are in a picture, without any network ------------------------------------------


@functools.cache
def sprites():
    """Every class in every colour, as the renderer draws it: (names, pictures, masks)."""
    import make_tiny as tiny

    names = []
    pictures = []
    masks = []
    for name in tiny.CLASSES:
        for colour, rgb in tiny.COLOURS.items():
            ground = {"kind": "plain", "colours": ((128,) * 3,) * 2, "angle": 0, "place": 0}
            one = {"class": name, "color": colour, "rgb": rgb, "box": (0, 0, 16, 16)}
            picture = tiny.render({"background": ground, "objects": [one], "sign": None})[:16, :16]
            names.append((name, colour))
            pictures.append(torch.from_numpy(picture))
            masks.append(torch.from_numpy(tiny.layers(name, 16)[0][..., 0]))
    return names, torch.stack(pictures).permute(0, 3, 1, 2) / 255, torch.stack(masks)[:, None]


def pixel_rule(image, most=0.12):
    """Detections {class: [(box, 1, colour), ...]} of an image [3, 64, 64] uint8, by no network.

    An object is where the picture differs from a sprite by less than `most`, on average over the
    sprite's pixels. The closest are taken first, and none within 12 px of a closer one. Of 120
    rendered scenes, half of them spoilt, it gives the right verdict on all, and through the noisy
    VAE on all.
    """
    names, pictures, masks = sprites()
    windows = (image.float() / 255).unfold(1, 16, 4).unfold(2, 16, 4)
    windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)  # [169, 3, 16, 16]
    apart = ((windows[:, None] - pictures).abs() * masks).sum((2, 3, 4))
    apart = apart / (3 * masks.sum((1, 2, 3)))  # [169, S]
    found = {}
    taken = []
    for place in apart.amin(1).argsort().tolist():
        top, left = (4 * part for part in divmod(place, 13))
        free = all(max(abs(top - y), abs(left - x)) >= 12 for y, x in taken)
        if apart[place].min() < most and free:
            name, colour = names[apart[place].argmin()]
            taken.append((top, left))
            box = (left, top, left + 16, top + 16)
            found.setdefault(name, []).append(star.Detection(box, 1.0, colour))
    return found


def kinds_of_tokens(images, task):
    """Masks [B, P] over the 8 x 8 px tokens of images [B, 3, h, w] uint8, the last one of the rest.

    ocr: letters on the sign, blank sign, the rest (only signs are that bright).
    geneval: objects by the pixel rule, the rest.
    """
    if task == "geneval":
        drawn = torch.zeros(len(images), 1, *images.shape[-2:])
        for canvas, image in zip(drawn, images, strict=True):
            for objects in pixel_rule(image).values():
                for one in objects:
                    left, top, right, bottom = one.box
                    canvas[:, top:bottom, left:right] = 1
        objects = F.avg_pool2d(drawn, 8).flatten(1) > 0.5
        return objects, ~objects
    grey = images.float().mean(1, keepdim=True) / 255
    mean = F.avg_pool2d(grey, 8).flatten(1)
    high = F.max_pool2d(grey, 8).flatten(1)
    blank = mean > 0.86
    letter = (high > 0.86) & (mean > 0.35) & (mean < 0.86)
    return letter, blank, ~letter & ~blank


def region(images, task):
    """[B, P]: 1 where the final image truly has its content (ocr: the sign with its blanks)."""
    return (~kinds_of_tokens(images, task)[-1]).float()


# --- the candidates ------------------------------------------------------------------------------


@dataclass
class Readings:
    """What is read from a batch at all T sampling steps, and the true region of its images."""

    attention: dict  # {(block, hops): [T, B, P]}
    by_token: torch.Tensor | None  # [C, T, B, P]: block 3, one hop, by core token
    present: torch.Tensor | None  # [C, 1, B, 1]: 1 where a prompt has so many
    region: torch.Tensor | None  # [1, B, P]


TRAINED = 4  # the steps that train by default


def own(attention):
    return attention[:TRAINED]


def last(attention):
    return attention[-1:].expand(TRAINED, -1, -1)


def later(attention):
    return star.hindsight(attention)[:TRAINED]


def clipped(attention, most):
    """The map of S / mean, at most `most`, of mean 1 again."""
    return normal(normal(attention).clamp(max=most))


def normal(attention):
    return star.allocation_map(attention, 1.0)


def token_by_token(readings):
    """The mean of one normalised map for each core token."""
    maps = torch.stack([normal(later(attention)) for attention in readings.by_token])
    return (maps * readings.present).sum(0) / readings.present.sum(0)


def ones(readings):
    return torch.ones_like(own(readings.attention[3, 0]))


TODAY = "own step, no hop"
BEST = "later steps, one hop"
BY_TOKEN = "later steps, one hop, token by token"
TRUE = "the true region"
MAPS = {
    "uniform": ones,
    TODAY: lambda r: normal(own(r.attention[3, 0])),
    "own step, one hop": lambda r: normal(own(r.attention[3, 1])),
    "last step, one hop": lambda r: normal(last(r.attention[3, 1])),
    "later steps, no hop": lambda r: normal(later(r.attention[3, 0])),
    BEST: lambda r: normal(later(r.attention[3, 1])),
    "later steps, one hop, at most 3": lambda r: clipped(later(r.attention[3, 1]), 3),
    "later steps, one hop, at most 1.5": lambda r: clipped(later(r.attention[3, 1]), 1.5),
    "own and last step, no hop, at most 3": lambda r: clipped(
        own(r.attention[3, 0]) + last(r.attention[3, 0]), 3
    ),
    "later steps, two hops": lambda r: normal(later(r.attention[3, 2])),
    "later steps, one hop, block 2": lambda r: normal(later(r.attention[2, 1])),
    BY_TOKEN: token_by_token,
    TRUE: lambda r: normal(r.region.expand(TRAINED, -1, -1)),
}
UNDIVIDED = [TODAY, BEST, TRUE]  # also measured without the division by each map's root mean square
SUFFIX = ", not divided by its rms"
SELECTION = [*MAPS, *(name + SUFFIX for name in UNDIVIDED)]
CONFIRMATION = [
    "uniform",
    TODAY,
    BEST,
    "later steps, one hop, block 2",
    "later steps, no hop",
    TRUE,
    BEST + SUFFIX,
]
SHUFFLED = ", advantages shuffled"
CONTROL = [
    "uniform",
    "uniform" + SHUFFLED,
    TODAY + SHUFFLED,
    "later steps, no hop" + SHUFFLED,
    "later steps, one hop, block 2" + SHUFFLED,
]
STAGES = {  # name: (key of the first batch, number of batches, maps)
    "selection": (1000, 8, SELECTION),
    "confirmation": (2000, 16, CONFIRMATION),
    "control": (2000, 8, CONTROL),
}


# --- gradients: all that is used of star.py's rollouts is rows, latents, text and attention ------


def sample_batch(policy, reward, prompts, number, names, settings):
    """128 images: (latents [K + 1, B, C, H, W], text, advantages [B], readings), as sampled."""
    sigmas = policy.sigmas(settings.sampling_steps)
    chosen = star.pick_prompts(prompts, settings, number)
    copies = settings.group_size
    key = (settings.seed, number)
    encoded = policy.encode(chosen)
    rollouts = []
    images = []
    with star.RewardQueue(reward, chosen, copies, policy.device) as queue:
        for rows in star.microbatches(len(chosen) * copies, settings, key):
            rollout, drawn = star.sample(policy, encoded, rows, settings, sigmas, key, TRAINED)
            rollouts.append(rollout)
            images.append(drawn)
            queue.add(rows, drawn)
        scores = queue.scores()
    advantages = star.group_advantages(scores[:, 0], copies)
    rows = torch.cat([rollout.rows for rollout in rollouts])
    latents = torch.cat([rollout.latents for rollout in rollouts], dim=1)
    texts = [rollout.text() for rollout in rollouts]
    text = [torch.cat(parts) for parts in zip(*texts, strict=True)]
    images = torch.cat(images)
    mask = encoded.core_mask[rows // copies]
    tokens = token_masks(mask) if BY_TOKEN in names else []
    readings = read(policy.transformer, latents, text, mask, tokens, sigmas)
    readings.region = region(images, settings.task)[None]
    return latents, text, advantages[rows], readings


@torch.no_grad()
def read(transformer, latents, text, mask, tokens, sigmas):
    """The Readings of all steps, by the sampler's forward passes: from the latents [K + 1, ...] of
    the noisy steps, and by Euler's steps after them."""
    with contextlib.ExitStack() as contexts:

        def captured(block, hops, mask):
            """The list to which every forward pass adds its S [B, P]."""
            capture = star.capture_attention(transformer, mask, (block,), hops)
            return contexts.enter_context(capture)

        found = {key: captured(*key, mask) for key in ((2, 1), (3, 0), (3, 1), (3, 2))}
        of_tokens = [captured(3, 1, token) for token in tokens]
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            if i < len(latents):
                now = latents[i]
            times = torch.full((len(now),), sigma)
            velocity = star.predict_velocity(transformer, now, times, text, 1.0)
            now = now + (sigma_next - sigma) * velocity
    by_token = None
    present = None
    if tokens:
        by_token = torch.stack([torch.stack(steps) for steps in of_tokens])
        present = torch.stack([token.any(1).float() for token in tokens])[:, None, :, None]
    attention = {name: torch.stack(steps) for name, steps in found.items()}
    return Readings(attention, by_token, present, None)


def token_masks(mask):
    """Masks [B, N] of each row's first, second, ... core token; empty where it has not so many."""
    order = mask.cumsum(1) * mask
    return [order == count for count in range(1, int(mask.sum(1).max()) + 1)]


def shuffled(sampled, number):
    """The batch with its advantages dealt to other images: what a map does without any reward."""
    latents, text, advantages, readings = sampled
    order = torch.randperm(len(advantages), generator=star.generator("why", number))
    return latents, text, advantages[order], readings


def gradients(policy, sampled, names, settings):
    """{map: (gradient [size] of the images with A >= 0, of those with A < 0)}, bf16.

    Before the first optimizer step every ratio is 1, so an image's gradient is that of
    -sum_p M_p A l_p / P, whatever the ratio and the clip range (star.py, section 5). Images with
    A = 0 add nothing and are left out.
    """
    latents, text, advantages, readings = sampled
    maps = {name: weights_of(name, readings) for name in names}
    found = {name: [] for name in names}
    for kept in (advantages > 0, advantages < 0):
        totals = {name: 0.0 for name in names}
        for rows in kept.nonzero()[:, 0].split(settings.batch_size):
            for step in range(TRAINED):
                log_prob = taken_again(policy, latents, text, rows, step, settings)
                for name, weights in maps.items():
                    share = weights[step, rows] * advantages[rows, None]
                    loss = -(share * log_prob).sum() / advantages.numel() / share.shape[1]
                    totals[name] = totals[name] + flat_gradient(loss, policy.transformer)
        for name in names:
            found[name].append(totals[name].bfloat16())
    return found


def weights_of(name, readings):
    """A map [K, B, P], divided by its root mean square as --step-weights equal does."""
    allocation = MAPS[name.removesuffix(SUFFIX).removesuffix(SHUFFLED)](readings)
    if not name.endswith(SUFFIX):
        allocation = allocation / allocation.square().mean(-1, keepdim=True).sqrt()
    return allocation


def taken_again(policy, latents, text, rows, step, settings):
    """l_p [rows, P] of a step that was taken, times the step's weight, with its graph."""
    sigmas = policy.sigmas(settings.sampling_steps)
    weight = star.step_weights(sigmas, settings.noise_level, TRAINED)[step]
    now = latents[step, rows]
    sigma = torch.full((len(rows),), sigmas[step])
    own_text = [part[rows] for part in text]
    velocity = star.predict_velocity(policy.transformer, now, sigma, own_text, 1.0)
    pair = (sigmas[step], sigmas[step + 1])
    mean, std = star.sde_mean_std(now, velocity, *pair, sigmas[1], settings.noise_level)
    return weight * star.token_log_prob(latents[step + 1, rows], mean, std)


def flat_gradient(loss, transformer):
    parameters = list(transformer.parameters())
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# --- the command ---------------------------------------------------------------------------------


def why(given):
    """Gradients of every batch that --work lacks, then the cosines, as rows and as tables."""
    first, count, names = STAGES[given.stage]
    count = given.batches or count
    settings = star.parse_settings(["--task", given.task, "--model", "tiny"])
    policy = star.load_policy(settings, "cpu")
    reward = star.make_reward(settings)
    prompts = star.load_prompts(settings.train_prompts, given.task)
    folder = given.work / "why" / given.task
    folder.mkdir(parents=True, exist_ok=True)
    batches = []
    for number in range(first, first + count):
        path = folder / f"{number}.safetensors"
        known = load_gradients(path)
        missing = [name for name in names if name not in known]
        if missing:
            sampled = sample_batch(policy, reward, prompts, number, missing, settings)
            blind = [name for name in missing if name.endswith(SHUFFLED)]
            told = [name for name in missing if name not in blind]
            if told:
                known |= gradients(policy, sampled, told, settings)
            if blind:
                known |= gradients(policy, shuffled(sampled, number), blind, settings)
            star.write_aside(path, lambda part, known=known: save_gradients(known, part))
            print(f"batch {number - first + 1} of {count}", file=sys.stderr, flush=True)
        batches.append({name: known[name] for name in names})
    rows = cosines(batches, names)
    table = given.runs / f"why-{given.task}-{given.stage}.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["map", "batch", "geometry", "images", "cosine"])
        writer.writerows([name, first + batch, *rest] for name, batch, *rest in rows)
    print_tables(table)


def save_gradients(known, path):
    """{map: (gradient of the images with A >= 0, of those with A < 0)}"""
    tensors = {}
    for name, parts in known.items():
        for sign, part in zip("+-", parts, strict=True):
            tensors[f"{sign}{name}"] = part
    save_file(tensors, path)


def load_gradients(path):
    if not path.exists():
        return {}
    tensors = load_file(path)
    names = [name[1:] for name in tensors if name.startswith("+")]
    return {name: [tensors[f"+{name}"], tensors[f"-{name}"]] for name in names}


GEOMETRIES = ("raw", "whitened")
# The map on all images; on those with A >= 0, a uniform one on the others; of some images alone.
IMAGES = ("all", "A >= 0", "A > 0 alone", "A < 0 alone")


def cosines(batches, names):
    """Rows (map, batch, geometry, images, cosine)."""
    uniform = torch.stack([sum(part.float() for part in batch["uniform"]) for batch in batches])
    rows = []
    for number, batch in enumerate(batches):
        others = torch.cat([uniform[:number], uniform[number + 1 :]])
        reference = others.mean(0)
        root = others.square().mean(0).sqrt()
        # A parameter without any gradient counts in neither.
        inverse = torch.where(root > 0, 1 / root, 0.0)
        for name in names:
            positive, negative = (part.float() for part in batch[name])
            other = "uniform" + SHUFFLED * name.endswith(SHUFFLED)
            mixed = positive + batch[other][1].float()
            parts = (positive + negative, mixed, positive, negative)
            for kind, gradient in zip(IMAGES, parts, strict=True):
                for geometry, divisor in zip(GEOMETRIES, (torch.ones(()), inverse), strict=True):
                    cosine = F.cosine_similarity(gradient * divisor, reference * divisor, dim=0)
                    rows.append((name, number, geometry, kind, f"{cosine.item():.6f}"))
    return rows


def print_tables(path):
    """Mean and standard error over batches; then the difference to uniform, batch by batch."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["map"] for row in rows))
    columns = [(geometry, images) for images in IMAGES for geometry in GEOMETRIES]
    values = {}
    for row in rows:
        values.setdefault((row["map"], row["geometry"], row["images"]), []).append(
            float(row["cosine"])
        )
    print("| map | " + " | ".join(f"{geometry}, {images}" for geometry, images in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        print(
            f"| {name} | "
            + " | ".join(mean_error(values[name, *column]) for column in columns)
            + " |"
        )
    for name in names[1:]:
        apart = []
        for column in columns:
            pairs = zip(values[name, *column], values["uniform", *column], strict=True)
            apart.append(mean_error([one - other for one, other in pairs], sign="+"))
        print(f"| {name}, less uniform's | " + " | ".join(apart) + " |")


def mean_error(values, sign=""):
    return f"{statistics.mean(values):{sign}.3f} ± {standard_error(values):.3f}"


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


# --- the figure -----------------------------------------------------------------------------------


def signal(given):
    """assets/signal.png: raw and whitened cosine of the confirmed maps, with standard errors."""
    from PIL import Image, ImageDraw, ImageFont

    with open(given.runs / f"why-{given.task}-confirmation.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["images"] == "all"]
    names = list(dict.fromkeys(row["map"] for row in rows if not row["map"].endswith(SUFFIX)))
    font = ImageFont.load_default(size=22)
    row_height = 64
    left = 420
    scale = 4200  # pixels a unit of cosine
    bottom = 70 + row_height * len(names)
    sheet = Image.new("RGB", (1080, bottom + 76), "white")
    draw = ImageDraw.Draw(sheet)
    for tick in (0, 0.05, 0.1, 0.15):
        x = left + scale * tick
        draw.line((x, 60, x, bottom), fill="#dddddd", width=2)
        draw.text((x, bottom + 6), f"{tick:g}", fill="black", font=font, anchor="ma")
    text = "cosine to the reward's gradient, by other batches"
    draw.text((left, bottom + 40), text, fill="black", font=font)
    colours = {"raw": "#9bb3c9", "whitened": "#1f5f99"}
    for place, (geometry, colour) in enumerate(colours.items()):
        x = left + 220 * place
        draw.rectangle((x, 24, x + 30, 44), fill=colour)
        draw.text((x + 40, 20), geometry, fill="black", font=font)
    for number, name in enumerate(names):
        top = 70 + row_height * number
        draw.text((left - 14, top + 26), name, fill="black", font=font, anchor="rm")
        for place, (geometry, colour) in enumerate(colours.items()):
            values = []
            for row in rows:
                if row["map"] == name and row["geometry"] == geometry:
                    values.append(float(row["cosine"]))
            end = left + scale * statistics.mean(values)
            error = scale * standard_error(values)
            y = top + 4 + 24 * place
            draw.rectangle((left, y, end, y + 20), fill=colour)
            draw.line((end - error, y + 10, end + error, y + 10), fill="black", width=3)
    sheet.save(given.out or ROOT / "assets/signal.png")
