"""Make the embedded model of star.py, assets/tiny/, from nothing: a small Stable Diffusion 3 and its reward models.

    python assets/make_tiny.py --out X                all of it into the folder X: about three hours on two CPU cores
    python assets/make_tiny.py --out X --scale 0.01   a smoke test: a hundredth of the steps, two minutes
    python assets/make_tiny.py --parts report         only the report card of what lies in assets/tiny
    python assets/make_tiny.py --parts prompts        write prompts/tiny/ anew

The order; a part that is there is not made again, a part half done goes on where it was:
    vae        AutoencoderKL: 64 px RGB <-> latents [16, 16, 16] of unit variance
    text       two CLIP text encoders over characters, taught to read: letters, classes, colours, counts, relations
    detector   Mask2Former: objects of eight of GenEval's classes             -> rewards/detector
    clip       CLIP: the colour of one object cut out over #999               -> rewards/clip
    pickscore  CLIP: which of two pictures fits a prompt (Bradley-Terry)      -> rewards/pickscore
    denoiser   SD3Transformer2DModel, by flow matching on pictures that are wrong in a known share (FAULTS)
    report     report.json: what all of it can do, measured on scenes and prompts held out

The pictures come from a renderer, which is the truth that all of this is measured against: `correct_scene` makes a
scene for a prompt, `render` its picture, `masks` where each object stands, `detections` the same as a detector tells.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import star  # noqa: E402  (its own reward classes, prompts and evaluation)

# --- scenes: what a picture shows ------------------------------------------------------------------------------------
# A scene is {"background": {...}, "objects": [{"class", "color", "rgb", "box"}], "sign": {"word", "box", ...} or None}.
# Boxes are (left, top, right, bottom) in px, right and bottom exclusive. All randomness comes from one random.Random.

SIDE = 64  # px; latents are 16 x 16, tokens 8 x 8 of 8 x 8 px
CELL = 8  # px: a letter fills one token's cell
CLASSES = ("sports ball", "donut", "kite", "book", "pizza", "clock", "umbrella", "cup")
COLOURS = {
    "red": (214, 38, 38), "orange": (246, 138, 28), "yellow": (250, 216, 40), "green": (44, 158, 66),
    "blue": (42, 88, 214), "purple": (124, 50, 172), "pink": (250, 146, 188), "brown": (122, 74, 38),
    "black": (26, 26, 28), "white": (246, 246, 246),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
DENOISER_STEPS = 15300  # of 32 pictures
GUIDANCE = 1.25  # learned in the last tenth of them: one pass then draws what would take two
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FAULTS = {  # the share of training pictures' parts that are wrong, so that the base model is poor and knows it all
    "letter missing": 0.36,
    "object missing": 0.02,
    "object of another colour": 0.08,
    "object elsewhere": 0.1,  # of those that a relation places
    "one object too many": 0.05,  # of counted ones
}
CLAUSE = rf"\b({'|'.join(NUMBERS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(CLASSES)})(?:e?s)?\b"

def understand(prompt):
    """A prompt's meaning, read from its words: (clauses {class, count, color?, position?}, GenEval's `include`; word).
    In "a kite left of a book" the book is clause 0 and the kite clause 1, placed relative to it, as in GenEval."""
    quoted = re.search(r'"([^"]+)"', prompt)
    text = (
        (prompt[: quoted.start()] + "#" * (quoted.end() - quoted.start()) + prompt[quoted.end() :])
        if quoted
        else prompt
    )
    clauses = []
    for number, colour, name in re.findall(CLAUSE, text):
        clauses.append({"class": name, "count": NUMBERS[number], **({"color": colour} if colour else {})})
    relation = re.search("|".join(RELATIONS), text)
    if relation and len(clauses) == 2:
        clauses = [clauses[1], {**clauses[0], "position": [relation[0], 0]}]
    return clauses, quoted and quoted[1].upper()

def tint(rng, rgb, most=10):
    return tuple(min(255, max(0, channel + rng.randint(-most, most))) for channel in rgb)

def random_background(rng):
    """Two muted colours of middle lightness, so that every object's colour stands out, and their pattern."""

    def muted():
        value, saturation, hue = rng.uniform(0.5, 0.8), rng.uniform(0.05, 0.3), rng.random() * 6
        channel = lambda shift: 1 - saturation * min(max(abs((hue + shift) % 6 - 3) - 1, 0), 1)
        return tuple(round(255 * value * channel(shift)) for shift in (0, 2, 4))

    return {
        "kind": rng.choice(("plain", "ground", "stripes", "spots")), "colours": (muted(), muted()),
        "angle": rng.random(), "place": rng.uniform(0.3, 0.75),
    }  # fmt: skip

def overlap(box, other, gap=0):
    return all(box[i] < other[i + 2] + gap and other[i] < box[i + 2] + gap for i in (0, 1))

def place(rng, size, taken, allowed=lambda box: True, lattice=CELL):
    """A free box for a square of that size, or None where a hundred tries find none. By multiples of 8 px, as letters:
    an object of 16 px then fills two by two tokens, and its latents are the same wherever it stands."""
    for _ in range(100):
        left, top = (rng.randint(0, (SIDE - size) // lattice) * lattice for _ in range(2))
        box = (left, top, left + size, top + size)
        if allowed(box) and not any(overlap(box, other) for other in taken):
            return box

def relation_between(box, other):
    """The relation that a person would name, or None for a diagonal."""
    x, y = ((box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1))
    if abs(x) > 1.5 * abs(y):
        return "left of" if x < 0 else "right of"
    if abs(y) > 1.5 * abs(x):
        return "above" if y < 0 else "below"
    return None

def random_object(rng, name, colour, taken, allowed=lambda box: True, sizes=(2 * CELL,), lattice=CELL):
    box = place(rng, rng.choice(sizes), taken, allowed, lattice)
    return box and {"class": name, "color": colour, "rgb": tint(rng, COLOURS[colour]), "box": box}

def random_sign(rng, word, taken=()):
    """A sign whose letters fill token cells: at most 34 x 10 px, a twelfth of the picture."""
    while True:
        left, top = rng.randrange(SIDE // CELL - len(word) + 1) * CELL, rng.randrange(SIDE // CELL) * CELL
        box = (left, top, left + CELL * len(word), top + CELL)
        if not any(overlap(box, other) for other in taken):
            paper, ink = rng.choice(
                (((250, 248, 240), (20, 20, 30)), ((255, 240, 190), (60, 30, 10)), ((235, 245, 255), (10, 30, 90)))
            )
            return {"word": word, "box": box, "paper": paper, "ink": ink}

def correct_scene(rng, clauses=(), word=None):
    """A random scene that shows what the clauses (GenEval's `include`) and the word ask for, and nothing else."""
    while True:
        scene = {"background": random_background(rng), "objects": [], "sign": None}
        if word:
            scene["sign"] = random_sign(rng, word)
        taken = [scene["sign"]["box"]] if word else []
        groups = []
        for clause in clauses:
            relation, index = clause.get("position", (None, None))
            allowed = (
                (lambda box: all(relation_between(box, o["box"]) == relation for o in groups[index]))
                if relation
                else (lambda box: True)
            )
            groups.append([])
            for _ in range(clause["count"]):
                one = random_object(
                    rng, clause["class"], clause.get("color") or rng.choice(list(COLOURS)), taken, allowed
                )
                if one:
                    groups[-1].append(one)
                    taken.append(one["box"])
        if all(len(group) == clause["count"] for group, clause in zip(groups, clauses)):
            scene["objects"] = sum(groups, [])
            return scene

def spoil(rng, scene, clauses, faults=FAULTS):
    """The same scene with faults, each with its share's probability. Letters left out are blanks in the word."""
    objects, taken = [], [one["box"] for one in scene["objects"]] + ([scene["sign"]["box"]] if scene["sign"] else [])
    owners = [clause for clause in clauses for _ in range(clause["count"])]
    for one, clause in zip(scene["objects"], owners):
        if rng.random() < faults["object missing"]:
            continue
        if "color" in clause and rng.random() < faults["object of another colour"]:
            colour = rng.choice([colour for colour in COLOURS if colour != one["color"]])
            one = {**one, "color": colour, "rgb": tint(rng, COLOURS[colour])}
        if "position" in clause and rng.random() < faults["object elsewhere"]:
            wrong = lambda box: relation_between(box, scene["objects"][0]["box"]) != clause["position"][0]
            one = {**one, "box": place(rng, one["box"][2] - one["box"][0], taken, wrong) or one["box"]}
        objects.append(one)
        taken.append(one["box"])
    counted = [one for one, clause in zip(scene["objects"], owners) if clause["count"] > 1]
    if counted and rng.random() < faults["one object too many"]:
        more = random_object(rng, counted[0]["class"], counted[0]["color"], taken)
        objects += [more] if more else []
    sign = scene["sign"]
    if sign:
        word = "".join(" " if rng.random() < faults["letter missing"] else letter for letter in sign["word"])
        sign = {**sign, "word": word}
    return {**scene, "objects": objects, "sign": sign}

# --- pictures: what a scene looks like -------------------------------------------------------------------------------

@functools.cache
def glyphs():
    """{letter: [8, 8] in [0, 1]}: the capitals of Pillow's built-in font, each squeezed into one token's cell."""
    font, drawn = ImageFont.load_default(size=40), {" ": np.zeros((CELL, CELL))}
    for letter in LETTERS:
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((32, 32), letter, fill=255, font=font, anchor="mm", stroke_width=2)
        ink = canvas.crop(canvas.getbbox())
        width = max(1, round(ink.width * min((CELL - 1) / ink.width, (CELL - 1) / 28)))  # never stretched, I stays thin
        glyph = Image.new("L", (CELL, CELL))
        glyph.paste(ink.resize((width, CELL - 1), Image.LANCZOS), ((CELL - width) // 2, 0))
        drawn[letter] = np.asarray(glyph) / 255
    return drawn

CRUST, TAIL = (0.02, 0.04, 0.98, 0.04, 0.94, 0.22, 0.06, 0.22), (0.5, 0.8, 0.34, 0.87, 0.58, 0.93, 0.44, 1)
SHAPES = {  # what is drawn in which layer, in units of the object's box; lines belong to the body
    "sports ball": [  # a basketball
        ("body", "disk", (0.5, 0.5, 0.5)), ("lines", "ring", (0.5, 0.5, 0.5)), ("lines", "line", (0.5, 0, 0.5, 1)),
        ("lines", "line", (0, 0.5, 1, 0.5)), ("lines", "ring", (-0.18, 0.5, 0.42)),
        ("lines", "ring", (1.18, 0.5, 0.42)),
    ],
    "donut": [
        ("body", "disk", (0.5, 0.5, 0.5)), ("lines", "ring", (0.5, 0.5, 0.5)), ("lines", "disk", (0.5, 0.5, 0.24)),
        ("body", "hole", (0.5, 0.5, 0.17)), ("lines", "hole", (0.5, 0.5, 0.17)),
        *(("accents", "line", (x - 0.03, y - 0.04, x + 0.03, y + 0.04)) for x, y in (
            (0.5 + 0.36 * math.cos(turn * 1.05), 0.5 + 0.36 * math.sin(turn * 1.05)) for turn in range(6))),
    ],
    "kite": [
        ("body", "area", (0.5, 0, 0.98, 0.36, 0.5, 0.8, 0.02, 0.36)),
        ("lines", "edge", (0.5, 0, 0.98, 0.36, 0.5, 0.8, 0.02, 0.36)), ("lines", "line", (0.5, 0, 0.5, 0.8)),
        ("lines", "line", (0.02, 0.36, 0.98, 0.36)), ("lines", "line", TAIL),
    ],
    "book": [
        ("body", "area", (0.1, 0.02, 0.9, 0.02, 0.9, 0.98, 0.1, 0.98)),
        ("lines", "edge", (0.1, 0.02, 0.9, 0.02, 0.9, 0.98, 0.1, 0.98)),
        ("lines", "area", (0.1, 0.02, 0.24, 0.02, 0.24, 0.98, 0.1, 0.98)),
        ("accents", "area", (0.26, 0.82, 0.88, 0.82, 0.88, 0.92, 0.26, 0.92)),
        ("accents", "line", (0.38, 0.26, 0.76, 0.26)), ("accents", "line", (0.38, 0.4, 0.76, 0.4)),
    ],
    "pizza": [
        ("body", "area", (0.02, 0.14, 0.98, 0.14, 0.5, 1)), ("lines", "edge", (0.02, 0.14, 0.98, 0.14, 0.5, 1)),
        ("lines", "area", CRUST), ("lines", "disk", (0.35, 0.38, 0.085)), ("lines", "disk", (0.64, 0.42, 0.085)),
        ("lines", "disk", (0.49, 0.66, 0.085)),
    ],
    "clock": [  # an alarm clock: two bells, two feet
        ("body", "disk", (0.24, 0.16, 0.16)), ("body", "disk", (0.76, 0.16, 0.16)),
        ("lines", "ring", (0.24, 0.16, 0.16)), ("lines", "ring", (0.76, 0.16, 0.16)),
        ("lines", "line", (0.24, 0.84, 0.14, 1)), ("lines", "line", (0.76, 0.84, 0.86, 1)),
        ("body", "disk", (0.5, 0.56, 0.42)), ("lines", "disk", (0.5, 0.56, 0.42)), ("lines", "face", (0.5, 0.56, 0.42)),
        ("accents", "line", (0.5, 0.28, 0.5, 0.56, 0.7, 0.66)),
    ],
    "umbrella": [
        ("body", "dome", (0, 0.02, 1, 1.02)), ("lines", "dome edge", (0, 0.02, 1, 1.02)),
        ("lines", "line", (0.5, 0.06, 0.34, 0.52)), ("lines", "line", (0.5, 0.06, 0.66, 0.52)),
        ("lines", "line", (0.5, 0.5, 0.5, 0.94, 0.34, 0.94, 0.32, 0.84)),
    ],
    "cup": [
        ("lines", "disk", (0.72, 0.46, 0.26)), ("lines", "hole", (0.72, 0.46, 0.12)),
        ("body", "area", (0.04, 0.12, 0.7, 0.12, 0.62, 0.96, 0.12, 0.96)),
        ("lines", "no area", (0.04, 0.12, 0.7, 0.12, 0.62, 0.96, 0.12, 0.96)),
        ("lines", "edge", (0.04, 0.12, 0.7, 0.12, 0.62, 0.96, 0.12, 0.96)),
        ("accents", "area", (0.1, 0.15, 0.64, 0.15, 0.63, 0.25, 0.11, 0.25)),
    ],
}  # fmt: skip

def stroke(draw, kind, points, unit, width=8):
    """One mark on a Pillow drawing eight times too large, whose lines are `width` wide: one px in the end."""
    if kind in ("disk", "ring", "hole", "face"):
        x, y, r = points
        points = (x - r, y - r, x + r, y + r)
        if kind == "face":  # what a ring leaves free
            inset = width / (unit + 1)
            points = (points[0] + inset, points[1] + inset, points[2] - inset, points[3] - inset)
    points = [point * unit for point in points]
    fill, edge = {"fill": 255}, {"outline": 255, "width": width}
    match kind:
        case "disk":
            draw.ellipse(points, **fill)
        case "hole" | "face":
            draw.ellipse(points, fill=0)
        case "ring":
            draw.ellipse(points, **edge)
        case "area":
            draw.polygon(points, **fill)
        case "no area":
            draw.polygon(points, fill=0)
        case "edge":
            draw.polygon(points, **edge)
        case "line":
            draw.line(points, width=width + 2, joint="curve", **fill)
        case "dome":
            draw.pieslice(points, 180, 360, **fill)
        case "dome edge":
            draw.pieslice(points, 180, 360, **edge)

@functools.cache
def layers(name, size):
    """(body, lines, accents), each [size, size, 1] in [0, 1]."""
    sheets = {layer: Image.new("L", (size * 8, size * 8)) for layer in ("body", "lines", "accents")}
    for layer, kind, points in SHAPES[name]:
        stroke(ImageDraw.Draw(sheets[layer]), kind, points, size * 8 - 1)
    body, lines, accents = (np.asarray(sheet.reduce(8), np.float32)[..., None] / 255 for sheet in sheets.values())
    lines = np.minimum(lines, body) if name == "sports ball" else lines  # its arcs end where the ball does
    return np.maximum(body, lines), lines, np.minimum(accents, np.maximum(body, lines))

@functools.cache
def background_axes():
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    return np.meshgrid(axis, axis)

def render_background(background):
    x, y = background_axes()
    turn = 2 * math.pi * background["angle"]
    slope = ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)) + 0.5
    mix = {
        "plain": lambda: slope,
        "ground": lambda: np.clip((y - background["place"]) * SIDE / 2 + 0.5, 0, 1) * 0.8 + 0.2 * slope,
        "stripes": lambda: 0.5 + 0.25 * np.sin(slope * 2 * math.pi * 5),
        "spots": lambda: 0.5 + 0.3 * np.sin(x * 2 * math.pi * 4) * np.sin((y + background["place"]) * 2 * math.pi * 4),
    }[background["kind"]]()[..., None]
    one, other = (np.array(colour, np.float32) for colour in background["colours"])
    return one * (1 - mix) + other * mix

def render(scene):
    """A scene's picture, [64, 64, 3] uint8."""
    image = render_background(scene["background"])
    for one in scene["objects"]:
        left, top, right, bottom = one["box"]
        body, lines, accents = layers(one["class"], right - left)
        rgb = np.array(one["rgb"], np.float32)
        dark = {"black": (125, 125, 130), "white": (105, 105, 110)}.get(one["color"], tuple(rgb * 0.45))
        light = (170, 172, 180) if one["color"] == "white" else (250, 250, 250)
        paint = rgb * (1 - lines) + np.array(dark, np.float32) * lines
        paint = paint * (1 - accents) + np.array(light, np.float32) * accents
        strength = body * one.get("strength", 1)  # below 1: half there, as a denoiser may leave it
        image[top:bottom, left:right] = image[top:bottom, left:right] * (1 - strength) + paint * strength
    sign = scene["sign"]
    if sign:
        left, top, right, bottom = sign["box"]
        image[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = sign["ink"]
        ink = np.concatenate([glyphs()[letter] for letter in sign["word"]], 1)[..., None]
        image[top:bottom, left:right] = np.array(sign["paper"]) * (1 - ink) + np.array(sign["ink"]) * ink
    return image.round().astype(np.uint8)

def masks(scene):
    """Where each object stands, [objects, 64, 64] bool; an object drawn later hides what is under it."""
    found = np.zeros((len(scene["objects"]), SIDE, SIDE), bool)
    for mask, one in zip(found, scene["objects"]):
        left, top, right, bottom = one["box"]
        body = layers(one["class"], right - left)[0][..., 0] > 0.5
        found[:, top:bottom, left:right] &= ~body
        mask[top:bottom, left:right] = body
    return found

def detections(scene):
    """The scene as a faultless detector would report it, in star.geneval_scores's form."""
    found = {}
    for one, mask in zip(scene["objects"], masks(scene)):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found.setdefault(one["class"], []).append((box, 1.0, one["color"]))
    return found

def to_tensor(images):
    """Pictures -> [B, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

# --- training ---------------------------------------------------------------------------------------------------------

def train(
    part, module, loss_of, steps, rate, work, matrix_rate=None, matrices=lambda name: True, average=0.0, save_every=200
):
    """Minimise loss_of(step, random.Random) over the module's parameters: Muon on the matrices that `matrices` names if
    matrix_rate is given, AdamW on the rest; linear warm-up, cosine to a fiftieth. A step's randomness is a function of
    its number. The state is saved as it goes; a later call goes on from there. average: the decay of a running mean of
    the weights, which is what the module holds in the end."""
    module.train()
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    chosen = [p for name, p in named if matrix_rate and p.ndim == 2 and matrices(name)]
    rest = [p for _, p in named if all(p is not other for other in chosen)]
    optimizers = [torch.optim.AdamW(rest, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))]
    if chosen:
        optimizers.append(torch.optim.Muon(chosen, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    state, first = work / f"{part}.safetensors", 0
    mean = {k: t.detach().clone() for k, t in module.state_dict().items()} if average else {}
    if state.exists():
        tensors = load_file(state)
        first = int(tensors.pop("step"))
        module.load_state_dict({k[7:]: t for k, t in tensors.items() if k.startswith("module.")})
        mean = {k: tensors.get(f"mean.{k}", tensors[f"module.{k}"]) for k in mean}
        for n, optimizer in enumerate(optimizers):
            found = {}
            for k, t in tensors.items():
                kind, *where = k.split(".", 2)
                if kind == f"optimizer{n}":
                    found.setdefault(int(where[0]), {})[where[1]] = t
            optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=part, mininterval=10)
    smooth = None
    for step in bar:
        scale = min(1, (step + 1) / max(1, min(200, steps // 10))) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        for optimizer, peak in zip(optimizers, (rate, matrix_rate)):
            optimizer.param_groups[0]["lr"] = peak * scale
        rng = random.Random(f"{ARGS.seed} {part} {step}")
        torch.manual_seed(rng.getrandbits(60))
        loss, *facts = loss_of(step, rng)
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for k, t in module.state_dict().items() if average else ():
            mean[k].lerp_(t, 1 - average) if t.is_floating_point() else mean[k].copy_(t)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {smooth:.4f} {' '.join(facts)}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            tensors = {f"module.{k}": t for k, t in module.state_dict().items()} | {
                f"mean.{k}": t for k, t in mean.items()
            }
            for n, optimizer in enumerate(optimizers):
                for i, values in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer{n}.{i}.{k}": torch.as_tensor(v) for k, v in values.items()}
            tensors = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
            save_file({**tensors, "step": torch.tensor(step + 1)}, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)
    if average:
        module.load_state_dict(mean)
    module.eval().requires_grad_(False)

def scaled(steps):
    return max(2, round(steps * ARGS.scale))

# --- prompts ----------------------------------------------------------------------------------------------------------

WORDS = """
ACE ACT ADD AGE AID AIM AIR ALL AND ANT ARC ARM ART ASH ASK BAG BAT BAY BED BEE BET BIB BIG BIN BOW BOX BOY BUD BUG BUN
BUS BUY CAB CAN CAP CAR CAT COT COW CRY CUB CUP CUT DAD DAY DEW DIG DIM DIP DOE DOG DOT DRY DUO EAR EAT EEL EGG ELF ELK
ELM END EYE FAN FAR FEW FIG FIN FIR FIT FIX FLY FOG FOR FOX FRY FUN FUR GAP GEM GET GNU GUM GYM HAT HAY HEN HER HIP HOP
HOT HOW HUB HUE HUG HUM HUT ICE ICY INK INN ION IVY JAM JAR JAW JAY JET JIG JOB JOG JOY JUG KEY KID KIN KIT KOI LAB LAW
LAY LEG LID LIP LOG LOT LOW MAN MAP MAT MAY MEN MIX MOM MOP MUD MUG NAP NET NEW NOD NOT NOW NUT OAK OAT ODD OFF OIL OLD
ONE ORB OUR OUT OWL OWN PAD PAL PAN PAW PAY PEA PEN PET PIE PIN PIT POD POP POT PUP PUT RAG RAM RAY RED RIB ROW RUG RUN
SAW SEA SEE SET SEW SHY SIP SIX SKI SKY SLY SON SPA SUM SUN TAG TAN TAP TEA TEN THE TIE TIN TOE TOP TOW TOY TUB TUG TWO
USE VAN VET VEX VOW WAG WAX WAY WEB WET WHO WHY WIG WIN WIT WOK WOW YAK YAM YES YET YOU ZAP ZIP ZOO
ABLE ACRE AREA ARMY ATOM AUNT AWAY BABY BACK BAKE BALL BAND BANK BARN BATH BEAN BEAR BELL BEND BIKE BIRD BLUE BOAT BOLD
BONE BOOK BOWL BULB BUSH CAGE CAKE CALM CAMP CARD CART CAVE CHEF CITY CLAY CLUB COAL COAT COIN COLD COOK CORN COZY CREW
CROW CUBE DARK DATE DAWN DEER DESK DICE DISH DIVE DOOR DOVE DRUM DUCK DUNE DUST EAST EASY EDGE EXIT FACT FAIR FARM FAST
FERN FILM FIRE FISH FIVE FLAG FLOW FOAM FOLK FOOT FORK FROG FUEL GATE GIFT GLAD GLUE GOAT GOLD GOLF GOOD GRID GULF HALF
HAND HARP HAWK HERB HERO HILL HOLD HOME HOOK HOPE HORN IDEA IRIS IRON JADE JAZZ JOIN JUMP JUNE JURY KEEP KELP KIND KING
KIWI KNOT LAKE LAMB LAMP LAND LARK LAVA LEAF LIME LION LOCK LOFT LOOP LUCK LYNX MAIL MAIN MAZE MEAL MELT MILK MINT
MOON MOSS MOTH MUSE NAVY NEST NINE NOON NORM NOTE OATH OBOE ONYX OPAL OPEN OVAL OVEN PACK PAGE PALM PARK PATH PEAR PINE
PLUM POEM POND PONY PORT PUMA QUAY QUIZ RAFT RAIL RAIN READ REEF RICE RING ROAD ROCK ROOF ROSE RUBY SAGE SAIL SALT SAND
SEED SHIP SHOP SILK SING SLOW SNOW SOAP SOFA SOIL SONG SOUP STAR STEP SURF SWAN TAIL TAXI TEAM TENT TIDE TILE TIME TOAD
TOWN TREE TUBE TUNA VASE VERB VEST VIEW VINE WALK WALL WARM WAVE WEST WIND WING WISE WOLF WOOD WOOL WORD WREN YARD YARN
YEAR YOGA ZERO ZINC ZONE ZOOM
"""
WORDS = list(dict.fromkeys(WORDS.split()))
NOUNS = "sign wall card note flag door page board".split()
WORDINGS = (  # of ocr
    'a {} that says "{}"', 'a {} that reads "{}"', 'a {} saying "{}"', 'the word "{1}" on a {0}', '"{1}" on a {0}',
    'a {} with the word "{}"',
)  # fmt: skip
SCENES = '{} and a sign that says "{}"', 'a sign that says "{1}" and {0}', '{} and the word "{}"', '{} with a sign "{}"'
SIZES = {  # of the geneval files
    "single_object": (4, 4), "two_object": (40, 8), "counting": (32, 8), "colors": (70, 9), "position": (120, 10),
    "color_attr": (120, 9),
}  # fmt: skip

def phrase(name, count=1, colour=None):
    words = f"{colour} {name}" if colour else name
    if count > 1:
        return f"{['two', 'three', 'four'][count - 2]} {words}s"
    return ("an " if words[0] in "aeiou" else "a ") + words

def geneval_prompt(rng, tag):
    """One of GenEval's prompts with its metadata, of the classes that the embedded model knows."""
    name, other = rng.sample(CLASSES, 2)
    colour, another = rng.sample(list(COLOURS), 2)
    more = {}
    if tag in ("single_object", "colors"):
        include = [{"class": name, "count": 1}]
    elif tag == "counting":
        count = rng.randint(2, 4)
        include, more = [{"class": name, "count": count}], {"exclude": [{"class": name, "count": count + 1}]}
    else:
        include = [{"class": name, "count": 1}, {"class": other, "count": 1}]
    if tag in ("colors", "color_attr"):
        for clause, paint in zip(include, (colour, another)):
            clause["color"] = paint
    told = [phrase(clause["class"], clause["count"], clause.get("color")) for clause in include]
    words = " and ".join(told)
    if tag == "position":
        include[1]["position"] = [rng.choice(RELATIONS), 0]
        words = f"{told[1]} {include[1]['position'][0]} {told[0]}"
    exactly = "exactly " if tag == "counting" and rng.random() < 0.5 else ""
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {exactly}{words}"}

def geneval_key(metadata):
    """Equal for prompts that ask for the same: whatever the order, and left of or right of seen from the other side."""
    first, *second = metadata["include"]
    relation = second[0].get("position", [""])[0] if second else ""
    clauses = [(clause["class"], clause["count"], clause.get("color", "")) for clause in metadata["include"]]
    if relation in ("right of", "below"):
        return metadata["tag"], {"right of": "left of", "below": "above"}[relation], (clauses[1], clauses[0])
    return metadata["tag"], relation, tuple(clauses if relation else sorted(clauses))

def scene_key(prompt):
    """Equal for pickscore prompts with the same objects, whatever the sign says."""
    return tuple(
        sorted((clause["class"], clause["count"], clause.get("color", "")) for clause in understand(prompt)[0])
    )

def ocr_prompt(rng, word):
    return rng.choice(WORDINGS).format(rng.choice(NOUNS), word)

def scene_prompt(rng, word):
    """One of pickscore's prompts: one to four objects, most with their colour, and mostly a sign."""
    names, colours = (
        rng.sample(CLASSES, 2),
        [rng.choice(list(COLOURS)) if rng.random() < 0.8 else None for _ in range(2)],
    )
    if rng.random() < 0.5:
        things = phrase(names[0], rng.choice((1, 1, 2, 3)), colours[0])
        if word is None:
            things = phrase(names[0], rng.choice((2, 3, 4)), colours[0])
    else:
        things = f"{phrase(names[0], 1, colours[0])} and {phrase(names[1], 1, colours[1])}"
    return rng.choice(SCENES).format(things, word) if word else f"a picture of {things}"

def make_prompts(seed=0):
    """{task: (train, test)}: lines for ocr and pickscore, dicts for geneval. Disjoint: no word of a test sign and no
    combination of class, count, colour and relation of a test prompt occurs in training. The words no part of the model
    has seen, the combinations no reward model; the denoiser has."""
    rng = random.Random(f"{seed} prompts")
    words = rng.sample(WORDS, len(WORDS))
    test, train = [], []
    for letter in "ZXJVKFBGPHMWCYLDIUNSROTAEQ":  # every letter is tested, the rare ones first
        if not any(letter in word for word in test):
            test.append(next(word for word in words if letter in word))
    test += [word for word in words if word not in test][: 64 - len(test)]
    train = [word for word in words if word not in test]
    geneval, taken = ([], []), set()
    for part in (1, 0):
        for tag, sizes in SIZES.items():
            lines = []
            for _ in range(20000):
                metadata = geneval_prompt(rng, tag)
                key = geneval_key(metadata), metadata["prompt"] if part == 0 else ""
                if len(lines) < sizes[part] and key not in taken and (geneval_key(metadata), "") not in taken:
                    lines.append(metadata)
                    taken.add(key)
            geneval[part].extend(lines)
    scenes = [], []
    for part, (source, size) in ((1, (test, 64)), (0, (train, 480))):
        source = iter(source + rng.sample(source, len(source)))
        while len(scenes[part]) < size:
            line = scene_prompt(rng, next(source) if rng.random() < 0.75 else None)
            if scene_key(line) not in map(scene_key, scenes[1]) and line not in scenes[0]:
                scenes[part].append(line)
    return {
        "ocr": ([ocr_prompt(rng, word) for word in train], [ocr_prompt(rng, word) for word in test]),
        "geneval": tuple(rng.sample(lines, len(lines)) for lines in geneval), "pickscore": scenes,
    }  # fmt: skip

def prompt_file(task, part):
    return ROOT / "prompts/tiny" / task / (f"{part}.jsonl" if task == "geneval" else f"{part}.txt")

def write_prompts(seed=0):
    for task, parts in make_prompts(seed).items():
        for part, lines in zip(("train", "test"), parts):
            path = prompt_file(task, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{json.dumps(line) if task == 'geneval' else line}\n" for line in lines))

def read_prompts(task, part="test"):
    lines = prompt_file(task, part).read_text().splitlines()
    return [json.loads(line) for line in lines] if task == "geneval" else lines

class Held:
    """What no training picture may be of: the test prompts' words and combinations (the denoiser's: the words)."""

    def __init__(self):
        self.words = {understand(line)[1] for task in ("ocr", "pickscore") for line in read_prompts(task)} - {None}
        self.scenes = {geneval_key(metadata) for metadata in read_prompts("geneval")}
        self.objects = {scene_key(line) for line in read_prompts("pickscore")}

def random_word(rng, held):
    """Random letters half of the time, so that every letter is learned at every place."""
    while True:
        word = rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices(LETTERS, k=rng.choice((3, 4))))
        if word not in held.words:
            return word

def random_prompt(rng, held, task=None):
    """A prompt that is not held out, of the task or of any."""
    task = task or rng.choice(("ocr", "geneval", "pickscore"))
    if task == "ocr":
        return ocr_prompt(rng, random_word(rng, held))
    while True:
        if task == "geneval":
            metadata = geneval_prompt(rng, rng.choice([*SIZES, "position", "counting"]))  # the hardest to learn
            if geneval_key(metadata) not in held.scenes:
                return metadata["prompt"]
        line = scene_prompt(rng, random_word(rng, held) if rng.random() < 0.75 else None)
        if task == "pickscore" and scene_key(line) not in held.objects:
            return line

def any_scene(rng, held):
    """A scene of any of the three tasks, with faults half of the time."""
    clauses, word = understand(random_prompt(rng, held))
    scene = correct_scene(rng, clauses, word)
    return spoil(rng, scene, clauses) if rng.random() < 0.5 else scene

def busy_scene(rng, held):
    """Five objects or so, and a sign half of the time: much to learn to draw in little space."""
    scene = correct_scene(rng, [], random_word(rng, held) if rng.random() < 0.5 else None)
    taken = [scene["sign"]["box"]] if scene["sign"] else []
    for _ in range(7):
        one = random_object(
            rng, rng.choice(CLASSES), rng.choice(list(COLOURS)), taken, sizes=(16, 16, 17, 18), lattice=4
        )
        if one:
            scene["objects"].append(one)
            taken.append(one["box"])
    return scene

# --- vae --------------------------------------------------------------------------------------------------------------

def make_vae(out, work):
    """L1 and L2 distance, and a KL term strong enough that the decoder bears some noise on its latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
        sample_size=SIDE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    held = Held()

    def loss_of(step, rng):
        scenes = [busy_scene(rng, held) for _ in range(13)] + [any_scene(rng, held) for _ in range(3)]
        images = to_tensor([render(scene) for scene in scenes]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        distance = error.abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return distance + 2 * error.square().mean() + 2e-4 * kl, f"L1 {distance.item():.4f} KL {kl.item():.2f}"

    train("vae", vae, loss_of, scaled(3400), 3e-3, work)
    rng = random.Random(f"{ARGS.seed} latents")
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(to_tensor([render(any_scene(rng, held)) for _ in range(64)])).latent_dist.sample()
                for _ in range(8)
            ]
        )
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out / "vae")

def load_vae(out):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False).to(memory_format=torch.channels_last)

@torch.no_grad()
def encode(vae, images):
    return (vae.encode(images).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor

@torch.no_grad()
def decode(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)

def as_drawn(vae, images, most=0.35):
    """Pictures as the denoiser might leave them: through the VAE, with some noise on the latents."""
    latents = encode(vae, images)
    return decode(vae, latents + torch.rand(len(images), 1, 1, 1) * most * torch.randn_like(latents))

# --- text encoders ----------------------------------------------------------------------------------------------------

TEXT_LENGTH, TEXT_WIDTH = 64, 96  # one token a character, spaces aside

def character_tokenizer():
    """CLIP's tokenizer over single characters (lower-cased, as CLIP's): nothing to merge, nothing to download."""
    import string

    import transformers

    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = list(characters) + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TEXT_LENGTH
    )

def text_config(tokenizer, width, layers_, projection):
    return dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=projection,
        num_hidden_layers=layers_, num_attention_heads=width // 32, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

def wake(text_model):
    """From CLIP's own 0.02, reading would take many times as long to learn."""
    torch.nn.init.normal_(text_model.embeddings.token_embedding.weight)
    torch.nn.init.normal_(text_model.embeddings.position_embedding.weight)

TOKEN_QUESTIONS = {  # what a token must know, and how many answers there are
    "place in the word": 5, "letter": 26, "which clause": 3, "class": len(CLASSES), "colour": len(COLOURS) + 1,
    "count": 4, "relation": 5,
}  # fmt: skip
PROMPT_QUESTIONS = (  # what the pooled feature must know
    [(f"letter {i}", 27) for i in range(4)] + [("relation", 5)]
    + [("class 0", len(CLASSES) + 1), ("colour 0", len(COLOURS) + 1), ("count 0", 5)]
    + [("class 1", len(CLASSES) + 1), ("colour 1", len(COLOURS) + 1), ("count 1", 5)]
)  # fmt: skip

def token_answers(prompt, offsets):
    """[tokens, questions]: -100 where a question is not asked. CLIP reads from the left: what a token cannot know yet,
    it is not asked."""
    answers = np.full((len(offsets), len(TOKEN_QUESTIONS)), -100)
    answers[:, 0], answers[:, 2] = 4, 2  # in no word, in no clause
    quoted = re.search(r'"([^"]+)"', prompt)
    relation = re.search("|".join(RELATIONS), prompt)
    colours = list(COLOURS)
    clauses = list(
        re.finditer(
            CLAUSE, prompt[: quoted.start()] + "#" * len(quoted[0]) + prompt[quoted.end() :] if quoted else prompt
        )
    )
    for token, (a, b) in enumerate(offsets):
        if a == b:
            continue
        if quoted and quoted.start(1) <= a < quoted.end(1):
            answers[token, :2] = a - quoted.start(1), LETTERS.index(prompt[a].upper())
        for n, clause in enumerate(clauses):
            number, colour, name = clause.groups()
            if clause.start() <= a < clause.end():
                answers[token, 2] = n
                if colour and clause.start(2) + 2 <= a:
                    answers[token, 4] = colours.index(colour)
                if a >= clause.start(3) + 2:
                    answers[token, 3] = CLASSES.index(name)
                    answers[token, 4] = colours.index(colour) if colour else len(colours)
                    answers[token, 5] = NUMBERS[number] - 1
                    answers[token, 6] = RELATIONS.index(relation[0]) if relation and n == 1 else 4
    return answers

def prompt_answers(prompt):
    clauses, word = understand(prompt)
    if clauses and "position" in clauses[-1]:
        clauses = clauses[::-1]  # in the order of the words
    relation = next((RELATIONS.index(c["position"][0]) for c in clauses if "position" in c), 4)
    answers = [LETTERS.index(letter) if letter != " " else 26 for letter in (word or "").ljust(4)] + [relation]
    for clause in (clauses + [{}, {}])[:2]:
        colour = list(COLOURS).index(clause["color"]) if clause.get("color") else len(COLOURS)
        answers += [CLASSES.index(clause["class"]) if clause else len(CLASSES), colour, clause.get("count", 0)]
    return answers

def make_text(out, work):
    """Teach two text encoders to read, as SD3's were: every token learns what it is part of (TOKEN_QUESTIONS), the
    pooled feature what the prompt says. The linear heads that ask are thrown away."""
    import transformers

    tokenizer, held = character_tokenizer(), Held()
    config = transformers.CLIPTextConfig(**text_config(tokenizer, TEXT_WIDTH, 3, TEXT_WIDTH))
    encoders = torch.nn.ModuleList(transformers.CLIPTextModelWithProjection(config) for _ in range(2))
    for encoder in encoders:
        wake(encoder.text_model)
    heads = torch.nn.ModuleList(
        torch.nn.Linear(TEXT_WIDTH, sum(sizes)) for _ in encoders
        for sizes in (list(TOKEN_QUESTIONS.values()), [n for _, n in PROMPT_QUESTIONS])
    )  # fmt: skip

    def asked(logits, sizes, answers):
        losses = [
            F.cross_entropy(part, answers[:, i])
            for i, part in enumerate(logits.split(sizes, 1))
            if (answers[:, i] >= 0).any()
        ]
        right = torch.stack(
            [
                (part.argmax(1) == answers[:, i])[answers[:, i] >= 0].float().mean()
                for i, part in enumerate(logits.split(sizes, 1))
                if (answers[:, i] >= 0).any()
            ]
        )
        return torch.stack(losses).sum(), right.mean().item()

    def loss_of(step, rng):
        prompts = [random_prompt(rng, held) for _ in range(48)]
        batch = tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt", return_offsets_mapping=True
        )
        tokens = torch.from_numpy(
            np.concatenate([token_answers(p, o) for p, o in zip(prompts, batch.offset_mapping.tolist())])
        )
        whole = torch.tensor([prompt_answers(prompt) for prompt in prompts])
        loss, facts = 0, []
        for n, encoder in enumerate(encoders):
            output = encoder(batch.input_ids, output_hidden_states=True)
            for head, feature, sizes, answers in (
                (heads[2 * n], output.hidden_states[-2].flatten(0, 1), list(TOKEN_QUESTIONS.values()), tokens),
                (heads[2 * n + 1], output.text_embeds, [size for _, size in PROMPT_QUESTIONS], whole),
            ):  # fmt: skip
                more, right = asked(head(feature), sizes, answers)
                loss, facts = loss + more, facts + [f"{right:.3f}"]
        return loss, *facts

    both = torch.nn.ModuleList([encoders, heads])
    train(
        "text",
        both,
        loss_of,
        scaled(700),
        3e-3,
        work,
        matrix_rate=3e-3,
        matrices=lambda name: name.startswith("0.") and "embed" not in name,
    )
    for n, encoder in enumerate(encoders):
        suffix = "_2" if n else ""
        encoder.save_pretrained(out / f"text_encoder{suffix}")
        tokenizer.save_pretrained(out / f"tokenizer{suffix}")

# --- denoiser ---------------------------------------------------------------------------------------------------------

def make_denoiser(out, work):
    """Flow matching on spoilt pictures of all three tasks' prompts; one prompt in ten is empty, for guidance."""
    import diffusers
    import transformers

    size, held, vae = SIDE // 4, Held(), load_vae(out)
    held.scenes, held.objects = set(), set()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=size, pos_embed_max_size=size // 2, patch_size=2, in_channels=16, out_channels=16, num_layers=4,
        num_attention_heads=4, attention_head_dim=32, caption_projection_dim=128, joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH, qk_norm="rms_norm",
    )  # fmt: skip
    load = lambda name, kind: getattr(transformers, kind).from_pretrained(out / name)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=load("text_encoder", "CLIPTextModelWithProjection"), tokenizer=load("tokenizer", "CLIPTokenizer"),
        text_encoder_2=load("text_encoder_2", "CLIPTextModelWithProjection"),
        tokenizer_2=load("tokenizer_2", "CLIPTokenizer"), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    steps = scaled(DENOISER_STEPS)

    def loss_of(step, rng):
        tasks = ("ocr", "geneval", "geneval", "geneval", "pickscore")
        prompts = [random_prompt(rng, held, rng.choice(tasks)) for _ in range(32)]
        scenes = [(correct_scene(rng, *understand(prompt)), understand(prompt)[0]) for prompt in prompts]
        data = encode(vae, to_tensor([render(spoil(rng, scene, clauses)) for scene, clauses in scenes]))
        prompts = [prompt if rng.random() > 0.1 else "" for prompt in prompts]
        # Plain diffusers puts zeros where T5's tokens would stand, 256 by default: some batches have them too, late on.
        late = step > 0.9 * steps
        zeros = rng.choice((0, 0, 0, 0, 0, 0, 32, 256)) if late else 0
        with torch.no_grad():
            embeddings, _, pooled, _ = pipe.encode_prompt(
                [*prompts, ""], None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=zeros
            )
        noise = torch.randn_like(data)
        sigma = torch.sigmoid(torch.randn(len(data), 1, 1, 1))  # logit-normal, as SD3's, ...
        sigma = 4 * sigma / (1 + 3 * sigma)  # ... shifted up: what stands where is decided while noise is high
        noisy, timestep, target = (1 - sigma) * data + sigma * noise, sigma.flatten() * 1000, noise - data
        prediction = transformer(noisy, embeddings[:-1], pooled[:-1], timestep, return_dict=False)[0]
        if late:  # Guidance, learned: without any it draws as it would with GUIDANCE (as in arXiv 2502.12154).
            with torch.no_grad():
                empty = embeddings[-1:].expand(len(data), -1, -1), pooled[-1:].expand(len(data), -1)
                blind = transformer(noisy, *empty, timestep, return_dict=False)[0]
                target = target + (1 - 1 / GUIDANCE) * (prediction - blind)
        return (F.mse_loss(prediction, target),)

    matrices = lambda name: name.startswith("transformer_blocks") and "norm" not in name
    train("denoiser", transformer, loss_of, steps, 1.5e-3, work, matrix_rate=4.5e-3, matrices=matrices, average=0.998)
    vae.to(memory_format=torch.contiguous_format).register_to_config(_name_or_path="vae")  # not this machine's path
    pipe.save_pretrained(out)

# --- detector ---------------------------------------------------------------------------------------------------------

QUERIES = 16  # each begins with a place of its own, on a grid of 4 x 4

def detector_scene(rng, held):
    """Up to seven objects, of one class half of the time, some half there; as the denoiser may draw them, or worse."""
    scene = {"background": random_background(rng), "objects": [], "sign": None}
    if rng.random() < 0.15:
        scene["sign"] = random_sign(rng, random_word(rng, held))
    taken = [scene["sign"]["box"]] if scene["sign"] else []
    name = rng.choice(CLASSES) if rng.random() < 0.5 else None
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7))):
        close = [box for box in taken if rng.random() < 0.8]  # a few overlap
        one = random_object(
            rng, name or rng.choice(CLASSES), rng.choice(list(COLOURS)), close, sizes=range(15, 20), lattice=1
        )
        if one:
            scene["objects"].append(one)
            taken.append(one["box"])
    return scene

def make_detector(out, work):
    """Mask2Former, small. What makes it learn from nothing in half an hour: every object is matched to a query by place
    at first, and only later also by what the queries say; and masks are compared whole, not by points."""
    import transformers
    from scipy.optimize import linear_sum_assignment

    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=2 * SIDE, patch_size=4, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), window_size=4,
            drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=128, dim_feedforward=256,
        encoder_layers=1, decoder_layers=4, num_attention_heads=4, num_queries=QUERIES, output_auxiliary_logits=True,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    anchors = (np.stack(np.divmod(np.arange(QUERIES), 4)[::-1], 1) + 0.5) * SIDE / 4  # x, y of every query's place
    vae = load_vae(out) if (out / "vae").exists() else None
    steps, held = scaled(3200), Held()

    def loss_of(step, rng):
        scenes = [detector_scene(rng, held) for _ in range(16)]
        images = to_tensor([render(scene) for scene in scenes])
        if vae is not None:
            images[:4] = as_drawn(vae, images[:4])
        images = images + torch.rand(len(images), 1, 1, 1) * 0.1 * torch.randn_like(images)
        output = model(pixel_values=F.interpolate(images, scale_factor=2, mode="bilinear", antialias=False))
        truths = [
            F.avg_pool2d(torch.from_numpy(masks(scene))[None].float(), 2)[0].gt(0.49).float()
            if scene["objects"]
            else None
            for scene in scenes
        ]
        layers_ = [
            *(
                {"masks_queries_logits": a["masks_queries_logits"], "class_queries_logits": a["class_queries_logits"]}
                for a in output.auxiliary_logits
            ),
            output,
        ]
        ramp = min(1, max(0, step / steps - 0.25) / 0.25)  # from matching by place alone to matching by what is said
        labels = torch.full((len(scenes), QUERIES), len(CLASSES))
        rows, queries, wanted = [], [], []
        said, drawn = output.class_queries_logits.detach().softmax(-1), output.masks_queries_logits.detach().sigmoid()
        for row, (scene, truth) in enumerate(zip(scenes, truths)):
            if truth is None:
                continue
            names = [CLASSES.index(one["class"]) for one in scene["objects"]]
            centres = np.array(
                [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one["box"] for one in scene["objects"])]
            )
            cost = np.linalg.norm(anchors[:, None] - centres, axis=-1) / 16
            if ramp:
                both = torch.einsum("qhw,nhw->qn", drawn[row], truth)
                dice = 2 * both / (drawn[row].sum((1, 2))[:, None] + truth.sum((1, 2)) + 1)
                cost = cost - ramp * (2 * said[row][:, names] + 3 * dice).numpy()
            for query, n in zip(*linear_sum_assignment(cost)):
                labels[row, query] = names[n]
                rows.append(row), queries.append(query), wanted.append(truth[n])
        wanted, loss = torch.stack(wanted), 0
        weight = torch.ones(len(CLASSES) + 1)
        weight[-1] = 0.5
        for n, layer in enumerate(layers_):
            logits = layer["masks_queries_logits"][rows, queries]
            mask = logits.sigmoid()
            dice = 1 - (2 * (mask * wanted).sum((1, 2)) + 1) / (mask.sum((1, 2)) + wanted.sum((1, 2)) + 1)
            cross = F.binary_cross_entropy_with_logits(logits, wanted) * 4
            classes = F.cross_entropy(layer["class_queries_logits"].flatten(0, 1), labels.flatten(), weight=weight)
            loss = loss + (2 * classes + 2 * cross + 2 * dice.mean()) * (1 if n == len(layers_) - 1 else 0.4)
        named = layer["class_queries_logits"].argmax(-1) == labels
        return (
            loss,
            f"class {classes.item():.3f} dice {dice.mean().item():.3f} right {named.all(1).float().mean().item():.2f}",
        )

    matrices = lambda name: not re.search("embed|position|predictor|queries|sampling", name)
    train("detector", model, loss_of, steps, 1.5e-3, work, matrix_rate=3e-3, matrices=matrices)
    processor = transformers.Mask2FormerImageProcessorPil(
        size={"height": 2 * SIDE, "width": 2 * SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, ignore_index=255
    )
    save_reward(model, processor, out / "rewards/detector")

# --- clip: the colour of one object -----------------------------------------------------------------------------------

def small_clip(tokenizer, side, width, layers_, text_width, text_layers, projection):
    import transformers

    config = transformers.CLIPConfig(
        text_config=text_config(tokenizer, text_width, text_layers, projection), projection_dim=projection,
        vision_config=dict(
            image_size=side, patch_size=CELL, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers_,
            num_attention_heads=width // 32, projection_dim=projection,
        ),
    )  # fmt: skip
    clip = transformers.CLIPModel(config)
    wake(clip.text_model)
    size = {"height": side, "width": side}
    pictures = transformers.CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return clip, transformers.CLIPProcessor(pictures, tokenizer)

def cut_out(rng, image, mask):
    """An object as star.py cuts it out: over #999, cropped to its mask, whose edge may be a little off."""
    soft = torch.from_numpy(mask)[None, None].float()
    if rng.random() < 0.7:  # the detector's masks have half the resolution
        soft = F.interpolate(F.avg_pool2d(soft, 2), scale_factor=2, mode="bilinear")
    loose = soft[0, 0] > rng.uniform(0.25, 0.75)
    loose = loose.roll((rng.choice((-1, 0, 0, 1)), rng.choice((-1, 0, 0, 1))), (0, 1)).numpy()
    loose = loose if loose.any() else mask
    rows, columns = loose.any(1).nonzero()[0], loose.any(0).nonzero()[0]
    alone = np.where(loose[..., None], image, 0x99)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Image.fromarray(alone.astype(np.uint8))

def make_clip(out, work):
    """Which of ten colours: the softmax over the phrases that star.py's GenEval reward compares with."""
    tokenizer, held, vae = character_tokenizer(), Held(), load_vae(out)
    clip, processor = small_clip(tokenizer, 32, 64, 2, 64, 2, 64)
    texts = [
        form.format(colour, name) for name in CLASSES for colour in COLOURS
        for form in ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")
    ]  # fmt: skip
    texts = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def loss_of(step, rng):
        scenes = [detector_scene(rng, held) for _ in range(24)]
        images = to_tensor([render(scene) for scene in scenes])
        images[:12] = as_drawn(vae, images[:12])
        pictures = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        crops, names, colours = [], [], []
        for scene, picture in zip(scenes, pictures):
            for one, mask in zip(scene["objects"], masks(scene)):
                if mask.sum() > 40:
                    crops.append(cut_out(rng, picture, mask))
                    names.append(CLASSES.index(one["class"]))
                    colours.append(list(COLOURS).index(one["color"]))
        output = clip(**processor(images=crops, return_tensors="pt"), **texts)
        classifier = F.normalize(output.text_embeds.unflatten(0, (len(CLASSES), len(COLOURS), 3)).mean(2), dim=-1)
        logits = clip.logit_scale.exp() * torch.einsum("nd,ncd->nc", output.image_embeds, classifier[names])
        colours = torch.tensor(colours)
        return F.cross_entropy(logits, colours), f"right {(logits.argmax(1) == colours).float().mean().item():.3f}"

    train("clip", clip, loss_of, scaled(400), 2e-3, work)
    save_reward(clip, processor, out / "rewards/clip")

def save_reward(model, processor, folder):
    """Half precision on disk: half the size, and no verdict changes."""
    model.half().save_pretrained(folder)
    model.float()
    processor.save_pretrained(folder)

# --- pickscore: which picture fits the prompt better ------------------------------------------------------------------

MORE_FAULTS = ("letter", "letter", "missing", "colour", "class", "extra", "no sign")

def one_fault(rng, scene):
    """The same scene with one thing wrong (more); None if this kind of fault has nothing to befall."""
    kind, objects, sign = rng.choice(MORE_FAULTS), list(scene["objects"]), scene["sign"]
    n = rng.randrange(len(objects)) if objects else None
    if kind == "letter" and sign:
        places = [i for i, letter in enumerate(sign["word"]) if letter != " "]
        if not places:
            return None
        i = rng.choice(places)
        letter = rng.choice([" ", " ", rng.choice([other for other in LETTERS if other != sign["word"][i]])])
        return {**scene, "sign": {**sign, "word": sign["word"][:i] + letter + sign["word"][i + 1 :]}}
    if kind == "no sign" and sign and rng.random() < 0.5:
        return {**scene, "sign": None}
    if n is None or kind in ("letter", "no sign"):
        return None
    if kind == "missing":
        objects.pop(n)
    elif kind == "colour":
        colour = rng.choice([colour for colour in COLOURS if colour != objects[n]["color"]])
        objects[n] = {**objects[n], "color": colour, "rgb": tint(rng, COLOURS[colour])}
    elif kind == "class":
        objects[n] = {**objects[n], "class": rng.choice([name for name in CLASSES if name != objects[n]["class"]])}
    else:
        taken = [one["box"] for one in objects] + ([sign["box"]] if sign else [])
        more = random_object(rng, objects[n]["class"], objects[n]["color"], taken)
        if more is None or len(objects) > 4:
            return None
        objects.append(more)
    return {**scene, "objects": objects}

def smear(rng, image):
    """A picture [3, 64, 64] spoilt: blurred, noisy, or with a patch of it gone."""
    kind = rng.choice(("blur", "noise", "patch"))
    if kind == "blur":
        small = F.interpolate(image[None], scale_factor=rng.choice((0.5, 0.375, 0.25)), mode="bilinear", antialias=True)
        return F.interpolate(small, size=SIDE, mode="bilinear")[0]
    if kind == "noise":
        return (image + rng.uniform(0.15, 0.5) * torch.randn_like(image)).clamp(-1, 1)
    image, size = image.clone(), rng.randint(20, 36)
    x, y = rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)
    patch = image[:, y : y + size, x : x + size]
    image[:, y : y + size, x : x + size] = patch.mean((1, 2), keepdim=True) + rng.uniform(0, 0.3) * torch.randn_like(
        patch
    )
    return image.clamp(-1, 1)

def wrongs(scene, clauses, word):
    """How many things in a scene are not as the prompt has them: letters, numbers of objects, their colours. (A second
    fault can make up for the first, and a colour that the prompt does not name is none.)"""
    shown = scene["sign"]["word"] if scene["sign"] else ""
    found = sum(a != b for a, b in zip((word or "").ljust(4), shown.ljust(4))) + (bool(word) and not scene["sign"])
    for name in CLASSES:
        objects = [one for one in scene["objects"] if one["class"] == name]
        asked = [clause for clause in clauses if clause["class"] == name]
        found += abs(len(objects) - sum(clause["count"] for clause in asked))
        colours = {clause.get("color") for clause in asked}
        found += sum(one["color"] not in colours for one in objects) if colours and None not in colours else 0
    return found

def preference(rng, prompt):
    """(the scene preferred, the other scene, whether the other is spoilt as a picture instead): of one prompt. The one
    preferred may have faults too, but the other has one more. On the same ground half of the time."""
    clauses, word = understand(prompt)
    better = correct_scene(rng, clauses, word)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        better = one_fault(rng, better) or better
    if not better["objects"] and not better["sign"]:  # nothing is left that could be wrong
        better = correct_scene(rng, clauses, word)
    if rng.random() < 0.25:
        return better, better, True
    for _ in range(100):
        worse = one_fault(rng, better)
        if worse and wrongs(worse, clauses, word) > wrongs(better, clauses, word):
            break
    else:  # it has one thing wrong, and no second would make it worse
        return better, better, True
    if rng.random() < 0.5:  # elsewhere, on another ground
        fresh = lambda one, taken: random_object(rng, one["class"], one["color"], taken) or one
        sign = worse["sign"] and {**random_sign(rng, "X" * len(worse["sign"]["word"])), "word": worse["sign"]["word"]}
        objects, taken = [], [sign["box"]] if sign else []
        for one in worse["objects"]:
            objects.append(fresh(one, taken))
            taken.append(objects[-1]["box"])
        worse = {"background": random_background(rng), "objects": objects, "sign": sign}
    return better, worse, False

def preference_pictures(rng, vae, prompts):
    """(images [B, 3, 64, 64] preferred, the others, the scenes preferred, the others)."""
    better, worse, smeared = zip(*(preference(rng, prompt) for prompt in prompts))
    pictures = [to_tensor([render(scene) for scene in scenes]) for scenes in (better, worse)]
    drawn = len(prompts) // 4  # both of a pair come through the VAE, or neither
    pictures = [torch.cat([as_drawn(vae, part[:drawn], 0.2), part[drawn:]]) for part in pictures]
    pictures[1] = torch.stack([smear(rng, image) if bad else image for image, bad in zip(pictures[1], smeared)])
    return pictures[0], pictures[1], better, worse

CONTENT = [27] * 4 + [6] * len(CLASSES) + [len(COLOURS)] * len(CLASSES)  # letters, each class's number and colour

def content(objects, word):
    """What a picture or a prompt shows, as answers to CONTENT; -100 where it does not say."""
    letters = [LETTERS.index(letter) if letter != " " else 26 for letter in (word or "").ljust(4)]
    counts = [min(5, sum(one.get("count", 1) for one in objects if one["class"] == name)) for name in CLASSES]
    colours = [
        next((list(COLOURS).index(one["color"]) for one in objects if one["class"] == name and one.get("color")), -100)
        for name in CLASSES
    ]
    return letters + counts + colours

def make_pickscore(out, work):
    """Bradley-Terry on pairs of pictures of one prompt. Heads that pictures and prompts share ask both towers what they
    show, and are thrown away; so the towers learn to see and to read long before preferences alone would teach them."""
    import transformers

    held, vae = Held(), load_vae(out)
    tokenizer = character_tokenizer()
    clip, processor = small_clip(tokenizer, SIDE, 128, 4, TEXT_WIDTH, 3, 128)
    reader = transformers.CLIPTextModelWithProjection.from_pretrained(out / "text_encoder")
    clip.text_model.load_state_dict(reader.text_model.state_dict())
    both = torch.nn.ModuleList([clip, torch.nn.Linear(128, sum(CONTENT))])

    def asked(features, answers):
        parts = both[1](8 * features).split(CONTENT, 1)
        answers = torch.tensor(answers)
        losses = [F.cross_entropy(part, answers[:, i]) for i, part in enumerate(parts) if (answers[:, i] >= 0).any()]
        return torch.stack(losses).mean()

    def loss_of(step, rng):
        prompts = [
            random_prompt(rng, held, rng.choice(("pickscore", "pickscore", "pickscore", "ocr"))) for _ in range(16)
        ]
        good, bad, better, worse = preference_pictures(rng, vae, prompts)
        text = tokenizer(prompts, padding=True, return_tensors="pt")
        output = clip(pixel_values=torch.cat([good, bad]), input_ids=text.input_ids, attention_mask=text.attention_mask)
        pictures, words = output.image_embeds, output.text_embeds
        scale = clip.logit_scale.exp().clamp(max=100)
        scores = scale * (pictures * words.repeat(2, 1)).sum(1)
        margin = scores[: len(prompts)] - scores[len(prompts) :]
        logits = scale * words @ pictures[: len(prompts)].T
        same = torch.arange(len(prompts))
        contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        read = asked(words, [content(*understand(prompt)) for prompt in prompts])
        seen = asked(
            pictures, [content(scene["objects"], scene["sign"] and scene["sign"]["word"]) for scene in better + worse]
        )
        loss = -F.logsigmoid(margin).mean() + 0.2 * contrast + read + seen
        return (
            loss,
            f"right {(margin > 0).float().mean().item():.2f}",
            f"read {read.item():.3f} seen {seen.item():.3f}",
        )

    train(
        "pickscore", both, loss_of, scaled(5000), 1.5e-3, work, matrix_rate=3e-3, matrices=lambda name: "layers" in name
    )
    save_reward(clip, processor, out / "rewards/pickscore")

# --- report card ------------------------------------------------------------------------------------------------------

def pixels(images):
    """Pictures in [-1, 1] as rewards take them."""
    return ((images + 1) * 127.5).round().byte()

def timed(reward, images, prompts):
    """(scores [B, 2], seconds for 128 images)."""
    start = time.time()
    scores = torch.cat([reward(images[i : i + 32], prompts[i : i + 32]) for i in range(0, len(images), 32)])
    return scores, round((time.time() - start) / len(images) * 128, 2)

def judge_vae(out, rewards, n):
    """How well pictures survive the VAE, and what the OCR engine reads of right ones, before and after it."""
    prompts = read_prompts("ocr")[:n]
    images, vae = to_tensor([render(correct_scene(RNG, *understand(line))) for line in prompts]), load_vae(out)
    back = decode(vae, encode(vae, images))
    yield "VAE", {"n": len(images), "PSNR": -10 * math.log10(((back - images) / 2).square().mean().item())}
    for name, pictures in (("rendered", images), ("through the VAE", back)):
        scores, seconds = timed(rewards["ocr"], pixels(pictures), [star.Prompt(line) for line in prompts])
        yield (
            f"OCR engine on right words, {name}",
            {"n": len(images), "reward": scores[:, 0].mean().item(), "s / 128": seconds},
        )

def judge_detector(out, rewards, n):
    """GenEval's verdict against the renderer's truth, on test prompts and others, half of the scenes spoilt."""
    lines = [RNG.choice(read_prompts("geneval")) for _ in range(n // 2)]
    lines += [geneval_prompt(RNG, RNG.choice(list(SIZES))) for _ in range(n - len(lines))]
    scenes = [correct_scene(RNG, line["include"]) for line in lines]
    scenes = [
        spoil(RNG, scene, line["include"]) if i % 2 else scene for i, (scene, line) in enumerate(zip(scenes, lines))
    ]
    truth = torch.tensor([star.geneval_scores(line, detections(scene))[1] for line, scene in zip(lines, scenes)])
    images, vae = to_tensor([render(scene) for scene in scenes]), load_vae(out)
    drawn = torch.cat([as_drawn(vae, part, 0.2) for part in images.split(64)])
    for name, pictures in (("rendered", images), ("through the noisy VAE", drawn)):
        scores, seconds = timed(
            rewards["geneval"], pixels(pictures), [star.Prompt(line["prompt"], line) for line in lines]
        )
        right = (scores[:, 1] == truth).float().mean().item()
        yield (
            f"GenEval's verdict, {name}",
            {"n": n, "right": right, "true": truth.float().mean().item(), "s / 128": seconds},
        )

def judge_colour(out, rewards, n):
    """The colour of single objects that the detector found, every class in every colour."""
    clauses = [{"class": name, "count": 1, "color": colour} for name in CLASSES for colour in COLOURS] * max(1, n // 80)
    images = to_tensor([render(correct_scene(RNG, [clause])) for clause in clauses])
    images, named = pixels(torch.cat([as_drawn(load_vae(out), part, 0.2) for part in images.split(64)])), []
    for keys in (("class", "count"), ("class", "count", "color")):
        asked = [{"tag": "colors", "include": [{key: clause[key] for key in keys}]} for clause in clauses]
        named.append(timed(rewards["geneval"], images, [star.Prompt("", line) for line in asked])[0][:, 1].bool())
    yield (
        "CLIP's colour of what was found",
        {"n": int(named[0].sum()), "right": named[1][named[0]].float().mean().item()},
    )

def judge_preference(out, rewards, n):
    """How often the better of two pictures of a held-out prompt has the higher score."""
    lines = [RNG.choice(read_prompts("pickscore")) for _ in range(n)]
    good, bad, *_ = preference_pictures(RNG, load_vae(out), lines)
    (better, seconds), (worse, _) = (
        timed(rewards["pickscore"], pixels(part), list(map(star.Prompt, lines))) for part in (good, bad)
    )
    right = (better[:, 0] > worse[:, 0]).float().mean().item()
    yield (
        "preference",
        {"n": n, "right": right, "s / 128": seconds, "score of the better": better[:, 1].mean().item()},
    )

def judge_base(out, rewards, n):
    """The model's own pictures of the test prompts, scored as star.py does before training."""
    for task, reward in rewards.items():
        settings = star.parse_settings(["--model", "tiny", "--task", task, "--out", str(out / "none")])
        policy, prompts, start = (
            star.load_policy(settings, "cpu"),
            star.load_prompts(settings.test_prompts, task)[:n],
            time.time(),
        )
        yield (
            f"base, {task}",
            {**star.evaluate(policy, prompts, reward, settings)[0], "s": round(time.time() - start, 1)},
        )

def make_report(out, work):
    n, card = max(8, round(300 * min(1, ARGS.scale))), {"seed": ARGS.seed, "scale": ARGS.scale}
    rewards = {"ocr": star.OCRReward(), "geneval": star.GenEvalReward(out / "rewards", "cpu"),
               "pickscore": star.pickscore_reward(out / "rewards/pickscore", "cpu")}  # fmt: skip
    with torch.no_grad():
        for judge in (judge_vae, judge_detector, judge_colour, judge_preference, judge_base):
            for name, facts in judge(out, rewards, n):
                card[name] = {key: round(value, 4) for key, value in facts.items()}
                print(f"{name}: {', '.join(f'{key} {value}' for key, value in card[name].items())}")
    sizes = {
        str(path.relative_to(out).parent): path.stat().st_size / 1e6 for path in sorted(out.rglob("*.safetensors"))
    }
    card["MB"] = {"all": round(sum(sizes.values()), 2), **{name: round(size, 2) for name, size in sizes.items()}}
    print("MB:", card["MB"])
    (out / "report.json").write_text(json.dumps(card, indent=1))

def write_sums(out):
    """SHA256SUMS, by which star.py sees that a file is missing or damaged."""
    files = sorted(
        path for path in out.rglob("*") if path.suffix in (".json", ".safetensors") and path.name != "report.json"
    )
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}\n" for path in files]
    (out / "SHA256SUMS").write_text("".join(lines))

# --- the command ------------------------------------------------------------------------------------------------------

PARTS = {  # what makes each part, and the folder that is there once it is made
    "vae": (make_vae, "vae"),
    "text": (make_text, "tokenizer_2"),
    "detector": (make_detector, "rewards/detector"),
    "clip": (make_clip, "rewards/clip"),
    "pickscore": (make_pickscore, "rewards/pickscore"),
    "denoiser": (make_denoiser, "transformer"),
    "report": (make_report, None),
}

def main():
    global ARGS, RNG
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/tiny")
    parser.add_argument("--work", type=Path, help="where unfinished training is kept (default: OUT.work)")
    parser.add_argument(
        "--parts", nargs="+", choices=["prompts", *PARTS], help="make these only, even if they are there"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of steps")
    parser.add_argument("--seed", type=int, default=0)
    ARGS = parser.parse_args()
    RNG, star.TINY = random.Random(f"{ARGS.seed} report"), ARGS.out
    work = ARGS.work or ARGS.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    for part in ARGS.parts or PARTS:
        torch.manual_seed(ARGS.seed)
        if part == "prompts":  # they lie in the repository: only by name
            write_prompts()
            continue
        make, folder = PARTS[part]
        if ARGS.parts or not folder or not (ARGS.out / folder).exists():
            make(ARGS.out, work)
            write_sums(ARGS.out)

if __name__ == "__main__":
    main()
