"""Does allocating the reward help? The runs behind README.md's numbers, on the embedded model.

    python assets/evidence.py tune            the tuning grid, the same for each method, on a seed of its own
    python assets/evidence.py run             every arm and seed that assets/runs/ lacks, two at a time; stop when you
                                              like, it goes on where it was
    python assets/evidence.py run star-0      the runs named, arm-seed
    python assets/evidence.py grid            a table of the tuning runs
    python assets/evidence.py table           two tables of assets/runs/<task>/: every arm, and every comparison
    python assets/evidence.py curves          learning curves of both tasks, into assets/curves.png
    python assets/evidence.py pictures        the same prompts by each method, of runs/evidence/, as methods-TASK.png
    python assets/evidence.py why             the gradient's signal and the maps' aim, by arm and denoising step

--task says of which task (table: also grey, an earlier model's few). A run leaves assets/runs/<task>/<arm>-<seed>/ with
metrics.jsonl and config.json, which has the git revision. The second judge, which training never sees, is for ocr
Tesseract (Debian package tesseract-ocr), where it is installed, and for geneval a comparison with the renderer's own
pictures, pixel by pixel. --iterations, --batches, --runs, --work and --out are for trying this script without touching
what is there.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
import star  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from scipy.stats import ttest_ind  # noqa: E402

IMAGES = 128  # an iteration
POINTS = [(rate, clip) for rate in ("3.75e-5", "7.5e-5", "1.5e-4") for clip in ("2e-5", "1e-3")] + [
    ("3e-4", "1e-3")
]
GRID = {  # the same number of runs for each method, on seed 100; chosen by the mean training reward
    **{f"tune-{method}-{rate}-{clip}": f"--method {method} --learning-rate {rate} --clip-range {clip}"
       for method in ("flow-grpo", "star") for rate, clip in POINTS},
    **{f"tune-fdfo-{rate}-{churn}": f"--method fdfo --learning-rate {rate} --churn {churn}" for rate, churn in
       [(rate, churn) for rate in ("1.5e-5", "3e-5", "6e-5") for churn in ("0.03", "0.1")] + [("1.2e-4", "0.1")]},
}  # fmt: skip
SMALL = "--prompts-per-iteration 2 --batch-size 16 --iterations 96 --eval-every 16"  # 32 images, four times as often
ARMS = {  # (options beside the tiny model's defaults, number of seeds, hook)
    "flow-grpo-published": ("--method flow-grpo --sde-window 9 --step-weights none", 3, None),
    "flow-grpo-9": ("--method flow-grpo --sde-window 9", 3, None),
    "flow-grpo": ("--method flow-grpo", 5, None),
    "star-9": ("--sde-window 9", 3, None),
    "star": ("", 5, None),
    "star-image": ("--ratio image", 5, None),
    "star-uniform": ("--allocation-strength 0", 3, None),
    "star-shuffled": ("", 3, "shuffled"),
    "star-static": ("", 3, "static"),
    "fdfo": ("--method fdfo", 3, None),
    "star-small": (SMALL, 3, None),
    "star-uniform-small": (f"{SMALL} --allocation-strength 0", 3, None),
}
COMPARED = {  # fixed before the first arm was run: (arm, arm that it is compared with)
    "equal step weights (nine steps)": ("flow-grpo-9", "flow-grpo-published"),
    "four steps, not nine (flow-grpo)": ("flow-grpo", "flow-grpo-9"),
    "four steps, not nine (star)": ("star", "star-9"),
    "star, not flow-grpo (four steps)": ("star", "flow-grpo"),
    "star, not flow-grpo (nine steps)": ("star-9", "flow-grpo-9"),
    "ratio by region, without a map": ("star-uniform", "flow-grpo"),
    "the map alone (ratio by region)": ("star", "star-uniform"),
    "the map alone (ratio of the image)": ("star-image", "flow-grpo"),
    "ratio by region, not of the image": ("star", "star-image"),
    "the map's places, not shuffled": ("star", "star-shuffled"),
    "the map's times, not static": ("star", "star-static"),
    "the map, in small iterations": ("star-small", "star-uniform-small"),
    "fdfo, not flow-grpo": ("fdfo", "flow-grpo"),
}

# --- controls: star.allocation_map, but with the maps in wrong places, or without their steps -------------------------


def shuffled(allocation):
    """Every map [..., P] permuted over space: the same weights in wrong places. The order is a function of the maps, so
    that it does not depend on history and a resumed run draws it again; another one for every step."""
    generator = star.generator("shuffled", allocation.double().square().sum().item())
    order = torch.rand(allocation.shape, generator=generator).argsort(-1)
    return allocation.gather(-1, order)


def static(allocation):
    """Each sample's maps [K, B, P] averaged over the default window's steps: the places, without the temporal part. The
    first steps get the later ones' places, which are better than their own: a control with foresight."""
    return (
        allocation[: star.Settings.sde_window]
        .mean(0, keepdim=True)
        .expand_as(allocation)
        .contiguous()
    )


HOOKS = {"shuffled": shuffled, "static": static}


def run_hooked(hook, arguments):
    """star.py's own command line, with a control in place of the map."""
    plain = star.allocation_map
    star.allocation_map = lambda attention, strength: HOOKS[hook](plain(attention, strength))
    sys.argv = ["star.py", *arguments]
    star.main()


# --- run --------------------------------------------------------------------------------------------------------------


def run(given):
    """Seed by seed over all arms, so that an interrupted evening still compares every arm."""
    if given.task == "ocr" and not shutil.which("tesseract"):
        sys.exit("Tesseract, the second judge, is missing: apt-get install tesseract-ocr")
    arms = {
        arm: seeds
        for arm, (how, seeds, _) in ARMS.items()
        if given.task == "ocr" or SMALL not in how
    }
    jobs = [(arm, seed) for seed in range(5) for arm, seeds in arms.items() if seed < seeds]
    start(jobs, given)
    base = results(given) / "base.json"
    if not given.names and not base.exists():
        base.write_text(json.dumps(second_judge(None, given.task)))


def tune(given):
    """One run for every point of the grid."""
    start([(arm, 100) for arm in GRID], given)


def start(jobs, given):
    unknown = set(given.names) - {f"{arm}-{seed}" for arm, seed in jobs}
    if unknown:
        sys.exit(f"no such run: {', '.join(sorted(unknown))}")
    jobs = [(arm, seed) for arm, seed in jobs if not given.names or f"{arm}-{seed}" in given.names]
    jobs = [
        (arm, seed)
        for arm, seed in jobs
        if not (results(given) / f"{arm}-{seed}/metrics.jsonl").exists()
    ]
    from diffusers import StableDiffusion3Pipeline  # noqa: F401  (two threads at once may not import it lazily)

    with ThreadPoolExecutor(2) as pool:  # two runs on two cores, a thread each, beat one on both
        for name in pool.map(lambda job: train(*job, given), jobs):
            print(f"{name} done", flush=True)


def results(given):
    return given.runs / given.task


def train(arm, seed, given):
    name, (options, _, hook) = f"{arm}-{seed}", ARMS.get(arm) or (GRID[arm], 1, None)
    out = given.work / given.task / name
    out.parent.mkdir(parents=True, exist_ok=True)
    how = f"--task {given.task} --model tiny --eval-every 4 --seed {seed}"
    options += f" --iterations {given.iterations}" if given.iterations else ""
    arguments = [
        *how.split(),
        *options.split(),
        *["--resume"] * (out / "config.json").exists(),
        "--out",
        str(out),
    ]
    start = [__file__, "hooked", hook] if hook else ["star.py"]
    with open(out.parent / f"{name}.log", "a") as log:
        revision = out.parent / f"{name}.revision"  # of the code that began it
        if not revision.exists():
            command = "git describe --always --dirty --abbrev=40 --exclude *".split()
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            revision.write_text(found.stdout.strip())
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *start, *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= second_judge(out, given.task)
    config = json.loads((out / "config.json").read_text()) | {
        "revision": revision.read_text(),
        "arm": arm,
    }
    config["hook"] = hook
    for path in ("out", "train_prompts", "test_prompts", "reward_model"):  # nothing of this machine
        config["settings"][path] = config["settings"][path] and os.path.relpath(
            config["settings"][path], ROOT
        )
    folder = results(given) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def test_images(transformer, task, count=None):
    """(prompts, images) as star.py evaluates, geneval's in fours; without a transformer, by the embedded model's."""
    chosen = ["--transformer", str(transformer)] if transformer else []
    settings = star.parse_settings(["--task", task, "--model", "tiny", *chosen])
    policy, copies = star.load_policy(settings, "cpu"), 4 if task == "geneval" and not count else 1
    prompts = star.load_prompts(settings.test_prompts, task)[:count]
    samples = star.sample(
        policy, prompts, copies, settings, star.EVALUATION, policy.sigmas(settings.eval_steps)
    )
    images = torch.cat([images for _, images in samples])
    return [prompt for prompt in prompts for _ in range(copies)], images


def second_judge(transformer, task):
    """ocr: exact matches and character error rate under Tesseract. geneval: the score by the renderer's pixels."""
    if task == "geneval":
        prompts, images = test_images(transformer, task)
        tags = {}
        for prompt, image in zip(prompts, images):
            verdict = star.geneval_scores(prompt.metadata, pixel_rule(image))[1]
            tags.setdefault(prompt.metadata["tag"], []).append(verdict)
        return {"pixel_rule_score": statistics.mean(map(statistics.mean, tags.values()))}
    if task != "ocr" or not shutil.which("tesseract"):
        return {}
    prompts, images = test_images(transformer, task)
    targets = [
        star.normalise_text(prompt.text[slice(*star.quoted_span(prompt.text))])
        for prompt in prompts
    ]
    read = [star.normalise_text(tesseract(image)) for image in images]
    errors = [
        min(star.edit_distance(got, target) / len(target), 1) for got, target in zip(read, targets)
    ]
    exact = sum(got == target for got, target in zip(read, targets)) / len(read)
    return {"tesseract_exact": exact, "tesseract_error_rate": sum(errors) / len(errors)}


@functools.cache
def sprites():
    """Every class in every colour, as the renderer draws it: (names, pictures [S, 3, 16, 16] and masks in [0, 1])."""
    import make_tiny as tiny

    names, pictures, masks = [], [], []
    for name in tiny.CLASSES:
        for colour, rgb in tiny.COLOURS.items():
            ground = {"kind": "plain", "colours": ((128,) * 3,) * 2, "angle": 0, "place": 0}
            one = {"class": name, "color": colour, "rgb": rgb, "box": (0, 0, 16, 16)}
            names.append((name, colour))
            picture = tiny.render({"background": ground, "objects": [one], "sign": None})[:16, :16]
            pictures.append(torch.from_numpy(picture))
            masks.append(torch.from_numpy(tiny.layers(name, 16)[0][..., 0]))
    return names, torch.stack(pictures).permute(0, 3, 1, 2) / 255, torch.stack(masks)[:, None]


def pixel_rule(image, most=0.12):
    """Detections {class: [(box, 1, colour), ...]} of an image [3, 64, 64] uint8 without any network: where the picture
    differs by less than `most`, on average over a sprite's pixels, from that sprite; the closest first, none within 12
    px of a closer one. Of 120 rendered scenes, half of them spoilt, it gives the right verdict on all, and through the
    noisy VAE on all."""
    names, pictures, masks = sprites()
    windows = (
        (image.float() / 255).unfold(1, 16, 4).unfold(2, 16, 4).permute(1, 2, 0, 3, 4).flatten(0, 1)
    )  # [169, ...]
    apart = ((windows[:, None] - pictures).abs() * masks).sum((2, 3, 4)) / (
        3 * masks.sum((1, 2, 3))
    )  # [169, S]
    found, taken = {}, []
    for place in apart.amin(1).argsort().tolist():
        top, left = (4 * part for part in divmod(place, 13))
        if apart[place].min() < most and all(
            max(abs(top - y), abs(left - x)) >= 12 for y, x in taken
        ):
            name, colour = names[apart[place].argmin()]
            taken.append((top, left))
            found.setdefault(name, []).append(((left, top, left + 16, top + 16), 1.0, colour))
    return found


def tesseract(image):
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        star.to_picture(image).resize((384, 384), Image.BICUBIC).save(file.name)
        command = (
            f"tesseract {file.name} - --psm 6 -c tessedit_char_whitelist=ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        )
        environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
        return subprocess.run(
            command.split(), env=environment, capture_output=True, text=True, check=True
        ).stdout


# --- table ------------------------------------------------------------------------------------------------------------


def load(given):
    """{arm: [lines of metrics.jsonl, ...], one a seed}, in the order of ARMS, other arms after them."""
    found = {}
    for path in sorted(results(given).glob("*/metrics.jsonl")):
        arm = path.parent.name.rsplit("-", 1)[0]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not arm.startswith("tune-"):
            found.setdefault(arm, []).append(lines)
    if not found:
        sys.exit(f"no runs in {results(given)}")
    order = [*ARMS, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def curve(lines):
    return {line["iteration"]: line["eval_reward"] for line in lines if "eval_reward" in line}


def area(lines):
    """The primary measure: the mean test reward over all evaluations after the first."""
    return statistics.mean([value for iteration, value in curve(lines).items() if iteration > 0])


def spread(values):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def difference(values, reference):
    """Difference of the means, its standard error and Welch's p, where both have several seeds and not all alike."""
    apart = statistics.mean(values) - statistics.mean(reference)
    if min(len(values), len(reference)) < 2:
        return f"{apart:+.3f}"
    error = math.hypot(standard_error(values), standard_error(reference))
    if not error:
        return f"{apart:+.3f}"
    p = ttest_ind(values, reference, equal_var=False).pvalue
    return f"{apart:+.3f} (SE {error:.3f}, p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"


SCORES = {  # beside the mean: {heading: column}
    "ocr": {"final": "eval_reward", "exact": "eval_exact", "Tesseract exact": "tesseract_exact",
            "Tesseract CER": "tesseract_error_rate"},
    "geneval": {"final": "eval_reward", "final score": "eval_score", "pixel rule's score": "pixel_rule_score"},
}  # fmt: skip


def table(given):
    found, scores = load(given), SCORES.get(given.task, SCORES["ocr"])
    heading("arm", "n", "mean", *scores, "clipped", "s for 128 images")
    base = results(given) / "base.json"
    if base.exists():
        first = next(iter(found.values()))[0][0] | json.loads(base.read_text())
        print("| before | | |", *(f"{first[name]:.3f} |" for name in scores.values()), "| |")
    for arm, runs in found.items():
        last, trained = (
            [lines[-1] for lines in runs],
            [line for lines in runs for line in lines[1:]],
        )
        columns = [spread([line.get(name) for line in last]) for name in scores.values()]
        clipped = statistics.mean(line["clip_high"] + line["clip_low"] for line in trained)
        seconds = statistics.median(
            line["seconds_sampling"] + line["seconds_update"] for line in trained
        )
        seconds *= 4 if arm.endswith("small") else 1  # for as many images as the others'
        columns = [
            spread([area(lines) for lines in runs]),
            *columns,
            f"{clipped:.1%}",
            f"{seconds:.1f}",
        ]
        print(f"| {arm} | {len(runs)} | {' | '.join(columns)} |")
    print()
    heading("difference", "mean", *scores)
    for change, (arm, without) in COMPARED.items():
        if arm in found and without in found:
            pair = found[arm], found[without]
            columns = [difference(*([area(lines) for lines in runs] for runs in pair))]
            for name in scores.values():
                values = [[lines[-1][name] for lines in runs if name in lines[-1]] for runs in pair]
                columns.append(difference(*values) if all(values) else "")
            print(f"| {change} | {' | '.join(columns)} |")


def heading(*names):
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")


def grid(given):
    """The tuning runs: mean training reward, by which the settings are chosen, and for the record mean test reward."""
    heading(
        "method",
        "learning rate",
        "clip range (fdfo: churn)",
        "training reward",
        "test reward",
        "clipped",
    )
    for arm in GRID:
        path = results(given) / f"{arm}-100/metrics.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            reward = statistics.mean(line["reward"] for line in lines[1:])
            clipped = statistics.mean(line["clip_high"] + line["clip_low"] for line in lines[1:])
            name, rate, other = re.fullmatch(
                r"tune-([a-z-]+)-(\d.*)-(0\.\d+|\d+e-\d+)", arm
            ).groups()
            print(
                f"| {name} | {rate} | {other} | {reward:.3f} | {area(lines):.3f} | {clipped:.1%} |"
            )


# --- pictures ---------------------------------------------------------------------------------------------------------

SHOWN = {"flow-grpo-published": "#000000", "flow-grpo": "#9467bd", "star": "#d62728", "star-shuffled": "#2ca02c",
         "fdfo": "#1f77b4"}  # fmt: skip


def curves(given, width=1200, height=620, top=60, bottom=170):
    """Test reward over images seen, a panel a task, a band an arm: mean and standard error of its seeds."""
    tasks = [task for task in ("ocr", "geneval") if (given.runs / task).is_dir()] or ["ocr"]
    sheet, side = Image.new("RGB", (width, height), "white"), width // len(tasks)
    draw, font = ImageDraw.Draw(sheet, "RGBA"), ImageFont.load_default(size=26)
    for panel, given.task in enumerate(tasks):
        bands = {
            arm: band([curve(lines) for lines in runs])
            for arm, runs in load(given).items()
            if arm in SHOWN
        }
        low = (
            math.floor(
                10 * min(mean - error for points in bands.values() for _, mean, error in points)
            )
            / 10
        )
        high = (
            math.ceil(
                10 * max(mean + error for points in bands.values() for _, mean, error in points)
            )
            / 10
        )
        last, left = max(points[-1][0] for points in bands.values()), panel * side + 80
        x = lambda iteration: left + iteration / last * (side - 120)
        y = lambda value: height - bottom - (value - low) / (high - low) * (height - bottom - top)
        draw.text((left, 14), f"{given.task}: test reward", fill="black", font=font)
        step = 0.1 if high - low > 0.2 else 0.02
        for tick in range(round((high - low) / step) + 1):
            value = low + tick * step
            draw.line([(left, y(value)), (x(last), y(value))], fill="#dddddd", width=2)
            draw.text((left - 12, y(value)), f"{value:.2f}", fill="black", font=font, anchor="rm")
        for iteration in range(0, last + 1, max(last // 3, 1)):
            place = (x(iteration), height - bottom + 8)
            draw.text(place, f"{iteration * IMAGES}", fill="black", font=font, anchor="ma")
        for arm, points in bands.items():
            edge = [(x(it), y(mean + error)) for it, mean, error in points]
            edge += [(x(it), y(mean - error)) for it, mean, error in reversed(points)]
            draw.polygon(edge, fill=SHOWN[arm] + "40")
        for arm, points in bands.items():  # lines over every band
            draw.line([(x(it), y(mean)) for it, mean, _ in points], fill=SHOWN[arm], width=5)
    draw.text((width // 2, height - 116), "images seen", fill="black", font=font, anchor="ma")
    for index, (arm, colour) in enumerate(SHOWN.items()):
        place = (40 + index % 3 * 390, height - 78 + index // 3 * 36)
        draw.line([(place[0], place[1] + 16), (place[0] + 44, place[1] + 16)], fill=colour, width=8)
        draw.text((place[0] + 56, place[1]), arm, fill="black", font=font)
    sheet.save(given.out or ROOT / "assets/curves.png")


def band(runs):
    """[(iteration, mean, standard error), ...] of the seeds' curves"""
    points = [(iteration, [run[iteration] for run in runs]) for iteration in runs[0]]
    return [
        (iteration, statistics.mean(values), standard_error(values)) for iteration, values in points
    ]


def pictures(given, count=8):
    """The first test prompts by the embedded model and by the runs of seed 0."""
    cells, reward = (
        [],
        star.make_reward(star.parse_settings(["--task", given.task, "--model", "tiny"]), "cpu"),
    )
    for arm in ("base", *SHOWN):
        folder = given.work / given.task / f"{arm}-0"
        if arm == "base" or (folder / "transformer").exists():
            prompts, images = test_images(None if arm == "base" else folder, given.task, count)
            rewards = reward(images, prompts)[:, 0].tolist()
            captions = [
                f"{arm}: {reward:.2f} {prompt.text}" for prompt, reward in zip(prompts, rewards)
            ]
            cells += zip(images, captions)
    out = given.out or ROOT / f"assets/methods-{given.task}.png"
    star.save_sheet(out, cells, columns=count, side=144)


# --- why --------------------------------------------------------------------------------------------------------------

WHY = {  # block, strength, hook: one set of rollouts, each of these maps on it
    "uniform (Flow-GRPO's gradient)": (3, 0.0, None),
    "block 0": (0, 1.0, None),
    "block 1": (1, 1.0, None),
    "block 2": (2, 1.0, None),
    "block 3 (the default)": (3, 1.0, None),
    "block 3, strength 0.5": (3, 0.5, None),
    "block 3, strength 0.25": (3, 0.25, None),
    "block 3, static": (3, 1.0, "static"),
    "block 3, shuffled": (3, 1.0, "shuffled"),
}

CORE = (
    "uniform (Flow-GRPO's gradient)",
    "block 3 (the default)",
    "block 3, shuffled",
)  # all that --core looks at


def why(given):
    """Which maps carry more signal an image, at the embedded model, on training prompts? By denoising step.

    Signal: cosine of a batch's gradient (128 images) to the sum over the other batches of the *uniform* gradient, which
    is unbiased; mean and standard error over batches. All nine steps have noise here, so that they can be compared;
    "first 4" and "all" are over steps, weighted by --step-weights equal, as a map is by its own norm; the last row's
    norms are unweighted. Aim: mean M on the tokens of what is drawn (ocr: letters, blanks of the sign; geneval:
    objects), elsewhere, and the share of M that is not elsewhere. The references share batches, so the cosines'
    standard errors are too small; differences are taken batch by batch.
    --core N takes only prompts of N letters or objects, and fewer maps.
    """
    settings = star.parse_settings(["--task", given.task, *"--model tiny --sde-window 9".split()])
    policy, reward = star.load_policy(settings, "cpu"), star.make_reward(settings, "cpu")
    prompts, sigmas = (
        star.load_prompts(settings.train_prompts, given.task),
        policy.sigmas(settings.sampling_steps),
    )
    prompts = [prompt for prompt in prompts if given.core in (None, core_size(prompt))]
    trained, size = settings.trained_steps, sum(p.numel() for p in policy.transformer.parameters())
    arms = {arm: WHY[arm] for arm in (CORE if given.core else WHY)}
    store = lambda: torch.zeros(
        given.batches, trained, size, dtype=torch.bfloat16
    )  # half the memory, the same cosines
    gradients, aims = {arm: store() for arm in arms}, {block: [] for block, *_ in arms.values()}
    for batch in range(given.batches):
        chosen, key = (
            star.pick_prompts(prompts, settings, 1000 + batch),
            (settings.seed, 1000 + batch),
        )
        rolled = {}  # by block: the same images every time, with that block's attention
        for block in aims:
            how = dataclasses.replace(settings, attention_blocks=str(block))
            rolled[block] = list(
                star.sample(policy, chosen, how.group_size, how, key, sigmas, trained, trained)
            )
        rollouts, _, scores = star.reward_all(
            rolled[3], chosen, settings.group_size, reward, settings
        )
        advantages = star.group_advantages(scores[:, 0], settings.group_size)
        for block in aims:
            aims[block].append(aim(rolled[block], given.task))
        for number, rollout in enumerate(rollouts):
            rollout.advantages = advantages[rollout.rows]
            maps = {
                arm: make_map(rolled[block][number][0], *how) for arm, (block, *how) in arms.items()
            }
            for i in range(trained):
                found = gradients_of(policy.transformer, rollout, i, maps, sigmas, settings)
                for arm, gradient in found.items():
                    gradients[arm][batch, i] += gradient / len(rollouts)
        print(f"batch {batch + 1} of {given.batches}", file=sys.stderr, flush=True)
    print_signal(
        gradients, torch.tensor(star.step_weights(sigmas, settings.noise_level, trained)), sigmas
    )
    print_aim(aims, sigmas)


def core_size(prompt):
    """How many letters or objects a prompt asks for."""
    if prompt.metadata:
        return sum(clause["count"] for clause in prompt.metadata["include"])
    start, end = star.quoted_span(prompt.text)
    return end - start


def make_map(rollout, strength, hook):
    allocation = star.allocation_map(rollout.attention, strength)
    return HOOKS[hook](allocation) if hook else allocation


def gradients_of(transformer, rollout, i, maps, sigmas, settings):
    """{arm: the objective's gradient [size] at step i of a microbatch}"""
    steps, parameters, found = torch.full_like(rollout.rows, i), list(transformer.parameters()), {}
    taken = star.act(transformer, rollout, steps, sigmas, settings)[0]
    rollout.old[i] = taken.detach()
    for arm, allocation in maps.items():
        rollout.allocation = allocation
        loss = star.objective(taken, rollout, steps, settings)[0]
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        found[arm] = torch.cat([part.flatten() for part in parts])
    return found


def print_signal(gradients, weights, sigmas):
    trained, plain, window = len(weights), next(iter(gradients.values())), star.Settings.sde_window
    heading("maps", *(f"{sigma:.2f}" for sigma in sigmas[:trained]), f"first {window}", "all")
    views = [
        lambda g, i=i: g[:, i].float() for i in range(trained)
    ]  # [batches, size] of one step, ...
    for steps in (window, trained):  # ... and of several
        part = weights[:steps, None]
        views.append(
            lambda g, part=part: torch.stack(
                [(one[: len(part)].float() * part).sum(0) for one in g]
            )
        )
    cosines = {
        arm: [signal(view(g), view(plain)) for view in views] for arm, g in gradients.items()
    }
    uniform = next(iter(cosines.values()))
    for arm, found in cosines.items():
        print(f"| {arm} | " + " | ".join(map(mean_error, found)) + " |")
    for arm, found in list(cosines.items())[1:]:
        apart = [[one - other for one, other in zip(*pair)] for pair in zip(found, uniform)]
        print(f"| {arm}, less uniform's | " + " | ".join(map(mean_error, apart)) + " |")
    norms = torch.stack([view(plain).norm(dim=1).mean() for view in views[:trained]])
    print(
        "| norm, uniform, first = 1 | "
        + " | ".join(f"{n:.1f}" for n in norms / norms[0])
        + " | | |"
    )


def signal(gradients, plain):
    """Each batch's cosine to the sum of the others' uniform gradients."""
    total = plain.sum(0)
    return [
        torch.cosine_similarity(g, total - own, dim=0).item() for g, own in zip(gradients, plain)
    ]


def mean_error(values):
    return f"{statistics.mean(values):.3f} ± {standard_error(values):.3f}"


def aim(rolled, task):
    """By step: mean M on each kind of token, the last one elsewhere, and the share of M on all kinds but that."""
    kinds = cells(torch.cat([images for _, images in rolled]), task)
    maps = star.allocation_map(
        torch.cat([rollout.attention for rollout, _ in rolled], dim=1), 1.0
    )  # [K, B, P]
    return [
        [*(m[kind].mean().item() for kind in kinds), 1 - (m[kinds[-1]].sum() / m.sum()).item()]
        for m in maps
    ]


def cells(images, task):
    """Masks [B, P] over the 8 x 8 px tokens of images [B, 3, h, w] uint8. ocr: letters on the sign, blank sign, the
    rest (only signs are that bright). geneval: objects by the pixel rule, the rest."""
    if task == "geneval":
        drawn = torch.zeros(len(images), 1, *images.shape[-2:])
        for canvas, image in zip(drawn, images):
            for left, top, right, bottom in (
                one[0] for found in pixel_rule(image).values() for one in found
            ):
                canvas[:, top:bottom, left:right] = 1
        objects = F.avg_pool2d(drawn, 8).flatten(1) > 0.5
        return objects, ~objects
    grey = images.float().mean(1, keepdim=True) / 255
    mean, high = F.avg_pool2d(grey, 8).flatten(1), F.max_pool2d(grey, 8).flatten(1)
    blank, letter = mean > 0.86, (high > 0.86) & (mean > 0.35) & (mean < 0.86)
    return letter, blank, ~letter & ~blank


def print_aim(aims, sigmas):
    print()
    columns = (f"{sigma:.2f}" for sigma in sigmas[: len(aims[3][0])])
    heading("mean M on each kind of token / elsewhere, share not elsewhere", *columns)
    for block, found in aims.items():
        mean = torch.tensor(found).mean(0).tolist()
        rows = [" / ".join(f"{m:.1f}" for m in row[:-1]) + f", {row[-1]:.0%}" for row in mean]
        print(f"| block {block} | " + " | ".join(rows) + " |")


def main():
    if sys.argv[1:2] == ["hooked"]:
        return run_hooked(sys.argv[2], sys.argv[3:])
    commands = {
        command.__name__: command for command in (tune, run, grid, table, curves, pictures, why)
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    parser.add_argument("names", nargs="*", help="tune, run: which, as arm-seed")
    parser.add_argument("--task", default="ocr", help="[ocr]")
    parser.add_argument("--iterations", type=int, help="of every run [the embedded model's]")
    parser.add_argument(
        "--batches", type=int, default=8, help="why: of 128 images, at least two [8]"
    )
    parser.add_argument("--core", type=int, help="why: only prompts of so many letters or objects")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "assets/runs", help="where results go [assets/runs]"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/evidence", help="where runs work [runs/evidence]"
    )
    parser.add_argument("--out", type=Path, help="curves, pictures: the file to write")
    given = parser.parse_args()
    given.work = given.work.resolve()
    commands[given.command](given)


if __name__ == "__main__":
    main()
