"""Does allocating the reward help? The runs behind README.md's numbers, on the embedded model.

    python assets/evidence.py tune        the tuning grid, the same for each method, on a seed of
                                          its own
    python assets/evidence.py run         every arm and seed that assets/runs/ lacks; stop when
                                          you like, it goes on where it was
    python assets/evidence.py run star-0  the runs named, arm-seed, in this order
    python assets/evidence.py grid        a table of the tuning runs
    python assets/evidence.py table       of assets/runs/<task>/: every arm, every comparison
    python assets/evidence.py curves      learning curves of both tasks, into assets/curves.png
    python assets/evidence.py pictures    the same prompts by each method, of runs/evidence/, as
                                          methods-TASK.png
    python assets/evidence.py first       README's first picture, of runs/evidence/
    python assets/evidence.py exercises   the commands of EXERCISES.md that are not measured yet
    python assets/evidence.py preserve    how much changed off the sign at equal reward, of
                                          runs/evidence/
    python assets/evidence.py cost        a star iteration's extra time over flow-grpo's
    python assets/evidence.py why         the signal of every candidate map before training
                                          (why.py), --stage selection, confirmation or control
    python assets/evidence.py signal      the confirmed maps' signal as assets/signal.png

--task says of which task (table: also grey, an earlier model's few). A run leaves
assets/runs/<task>/<arm>-<seed>/ with metrics.jsonl and config.json, which has the git revision.
The second judge, which training never sees, is for ocr Tesseract (Debian package tesseract-ocr),
and for geneval a comparison with the renderer's own pictures, pixel by pixel. --iterations,
--batches, --runs, --work and --out are for trying this script without touching what is there.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import ttest_rel
from why import STAGES, pixel_rule, region, signal, standard_error, why

import star

IMAGES = 128  # an iteration

# The same number of tuning runs for each method, on seed 100; chosen by the mean training reward.
POINTS = [(rate, clip) for rate in ("3.75e-5", "7.5e-5", "1.5e-4") for clip in ("2e-5", "1e-3")]
POINTS.append(("3e-4", "1e-3"))
CHURNS = [(rate, churn) for rate in ("1.5e-5", "3e-5", "6e-5") for churn in ("0.03", "0.1")]
CHURNS.append(("1.2e-4", "0.1"))
GRID = {}
for method in ("flow-grpo", "star"):
    for rate, clip in POINTS:
        options = f"--method {method} --learning-rate {rate} --clip-range {clip}"
        GRID[f"tune-{method}-{rate}-{clip}"] = options
for rate, churn in CHURNS:
    options = f"--method fdfo --learning-rate {rate} --churn {churn}"
    GRID[f"tune-fdfo-{rate}-{churn}"] = options

OWN = "--attention-blocks 3 --attention-hops 0 --attention-steps own"
NO_HOP = "--attention-blocks 3 --attention-hops 0"
ARMS = {  # options beside the tiny model's defaults, number of seeds, hook
    "star": ("", 10, None),
    "flow-grpo": ("--method flow-grpo", 10, None),
    "star-block-2": ("--attention-blocks 2", 5, None),  # ocr's default, for geneval's runs
    "star-own": (OWN, 10, None),
    "star-region": ("", 10, "region"),
    "star-undivided": ("", 10, "undivided"),
    "star-better": (NO_HOP, 3, "better"),
    "star-shuffled": ("", 5, "shuffled"),
    "star-uniform": ("--allocation-strength 0", 3, None),
    "star-image": ("--ratio image", 3, None),
    "flow-grpo-published": ("--method flow-grpo --sde-window 9 --step-weights none", 3, None),
    "fdfo": ("--method fdfo", 6, None),
}
REDNESS = {}  # the same with another reward, whose numbers are in no table of ocr's
for method in ("star", "flow-grpo", "fdfo"):
    options = f"--method {method} --iterations 12 --eval-every 2"
    REDNESS[f"redness-{method}"] = (options, 3, "redness")
COMPARED = {  # fixed before the first arm was run: an arm, and the arm that it is compared with
    "star, not flow-grpo": ("star", "flow-grpo"),
    "one hop, later steps, block 2: not the step's own map of block 3": ("star", "star-own"),
    "the step's own map, not flow-grpo": ("star-own", "flow-grpo"),
    # Added later, when one run of block 2 was there.
    "block 3, not block 2": ("star", "star-block-2"),
    "the true region, not flow-grpo": ("star-region", "flow-grpo"),
    "star, not the true region": ("star", "star-region"),
    "maps divided by their root mean square, not undivided": ("star", "star-undivided"),
    "maps where A >= 0 alone, not flow-grpo": ("star-better", "flow-grpo"),
    "the map's places, not shuffled": ("star", "star-shuffled"),
    "the map alone (ratio by region)": ("star", "star-uniform"),
    "the map alone (ratio of the image)": ("star-image", "flow-grpo"),
    "four steps of equal weight (flow-grpo)": ("flow-grpo", "flow-grpo-published"),
    "fdfo, not flow-grpo": ("fdfo", "flow-grpo"),
}

# --- controls: star.py as it is, but for one function ---------------------------------------------


def use_shuffled():
    """Every map permuted over space: the same weights in wrong places, others for every step.

    The order is a function of the maps, not of history, so that a resumed run draws it again.
    """
    plain = star.allocation_map

    def shuffled(attention, strength):
        allocation = plain(attention, strength)
        total = allocation.double().square().sum().item()
        generator = star.generator("shuffled", total)
        order = torch.rand(allocation.shape, generator=generator).argsort(-1)
        return allocation.gather(-1, order)

    star.allocation_map = shuffled


def use_region():
    """The true region of the final image in place of the attention, for all its steps."""
    plain = star.sample

    def sample(policy, encoded, rows, settings, *others, **named):
        rollout, images = plain(policy, encoded, rows, settings, *others, **named)
        if rollout.attention is not None:
            place = region(images, settings.task).to(rollout.attention.device)
            rollout.attention = place.expand_as(rollout.attention)
        return rollout, images

    star.sample = sample


def use_better():
    """The maps where A >= 0, uniform ones on images that are worse than their group."""
    plain = star.objective

    def objective(new, old, rollout, steps, settings):
        kept = rollout.advantages[:, None] >= 0
        rollout.allocation = rollout.allocation.where(kept, 1.0)
        return plain(new, old, rollout, steps, settings)

    star.objective = objective


def use_undivided():
    """Maps that are not divided by their root mean square: a sharp one has a large gradient."""
    star.map_norm = lambda allocation: torch.ones_like(allocation[..., 0])


def use_redness():
    """README's reward of one's own, which nothing but colour satisfies: a stress test."""

    def redness(images, prompts):
        red = (images[:, 0].float() - images[:, 1:].float().mean(1)).mean((1, 2)) / 255
        return torch.stack([red, red], dim=1)

    star.make_reward = lambda settings: redness


def keep_evaluated():
    """Keep the transformer of every evaluation as evaluated/<iteration>, for `preserve`."""
    plain = star.save_transformer

    def save(path, transformer):
        plain(path, transformer)
        iteration = len(read_lines(path.parent / "metrics.jsonl"))  # its first line is of 0
        shutil.copytree(path, path.parent / f"evaluated/{iteration}", dirs_exist_ok=True)

    star.save_transformer = save


HOOKS = {
    "none": lambda: None,
    "shuffled": use_shuffled,
    "region": use_region,
    "better": use_better,
    "undivided": use_undivided,
    "redness": use_redness,
}


def run_hooked(hook, arguments):
    """star.py's own command line, with a control in it."""
    keep_evaluated()
    HOOKS[hook]()
    sys.argv = ["star.py", *arguments]
    star.main()


# --- run ------------------------------------------------------------------------------------------


def run(given):
    """Seed by seed over all arms, so that an interrupted evening still compares every arm."""
    if given.task == "ocr" and not shutil.which("tesseract"):
        sys.exit("Tesseract, the second judge, is missing: apt-get install tesseract-ocr")
    most = max(seeds for _, seeds, _ in ARMS.values())
    jobs = []
    for seed in range(most):
        jobs += [(arm, seed) for arm, (_, seeds, _) in ARMS.items() if seed < seeds]
    if given.task == "ocr":
        jobs += [(arm, seed) for arm, (_, seeds, _) in REDNESS.items() for seed in range(seeds)]
    start(jobs, given)
    base = results(given) / "base.json"
    if not base.exists():
        base.write_text(json.dumps(second_judge(None, given.task)))


def tune(given):
    """One run for every point of the grid."""
    start([(arm, 100) for arm in GRID], given)


def start(jobs, given):
    known = {f"{arm}-{seed}": (arm, seed) for arm, seed in jobs}
    unknown = [name for name in given.names if name not in known]
    if unknown:
        sys.exit(f"no such run: {', '.join(unknown)}")
    todo = []
    for name in given.names or known:
        if not (results(given) / name / "metrics.jsonl").exists():
            todo.append(known[name])
    # Two threads at once may not import it lazily.
    from diffusers import StableDiffusion3Pipeline  # noqa: F401  (here, before the threads)

    # Two runs on two cores, a thread each, beat one on both.
    with ThreadPoolExecutor(given.jobs) as pool:
        for name in pool.map(lambda job: train(*job, given), todo):
            print(f"{name} done", flush=True)


def results(given):
    return given.runs / given.task


def train(arm, seed, given):
    """One run under --work, resumed where there is one; then its results under --runs."""
    name = f"{arm}-{seed}"
    if arm in GRID:
        options = GRID[arm]
        hook = None
    else:
        options, _, hook = (ARMS | REDNESS)[arm]
    out = given.work / given.task / name
    out.parent.mkdir(parents=True, exist_ok=True)
    revision = out.parent / f"{name}.revision"  # of the code that began it
    if not revision.exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        revision.write_text(found.stdout.strip())
    command = [sys.executable, __file__, "hooked", hook or "none"]
    command += ["--task", given.task, "--model", "tiny", "--eval-every", "4"]
    command += ["--seed", str(seed), "--out", str(out), *options.split()]
    if given.iterations:
        command += ["--iterations", str(given.iterations)]
    if (out / "config.json").exists():
        command.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out.parent / f"{name}.log", "a") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    keep_results(arm, seed, hook, given)
    return name


def keep_results(arm, seed, hook, given):
    """A finished run's metrics and settings, from --work to --runs."""
    name = f"{arm}-{seed}"
    out = given.work / given.task / name
    revision = (out.parent / f"{name}.revision").read_text()
    lines = read_lines(out / "metrics.jsonl")
    lines[-1] |= second_judge(out, given.task)
    config = json.loads((out / "config.json").read_text())
    config |= {"revision": revision, "arm": arm, "hook": hook}
    config["settings"]["out"] = f"runs/evidence/{given.task}/{name}"  # nothing of this machine
    folder = results(given) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    star.write_aside(folder / "metrics.jsonl", lambda part: part.write_text(text))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images(transformer, task, count=None):
    """(prompts, images) as star.py evaluates; without a transformer, by the embedded model's.

    geneval has four images a prompt, but not where only the first `count` prompts are asked for.
    """
    chosen = ["--transformer", str(transformer)] if transformer else []
    settings = star.parse_settings(["--task", task, "--model", "tiny", *chosen])
    policy = star.load_policy(settings, "cpu")
    copies = 4 if task == "geneval" and not count else 1
    prompts = star.load_prompts(settings.test_prompts, task)[:count]
    _, images = draw_all(policy, prompts, copies, settings)
    return [prompt for prompt in prompts for _ in range(copies)], images


def draw_all(policy, prompts, copies, settings, capture=False):
    """(rollouts, images [rows, 3, h, w]) as star.evaluate draws them."""
    encoded = policy.encode(prompts)
    sigmas = policy.sigmas(settings.eval_steps)
    key = star.EVALUATION_KEY
    rollouts = []
    images = []
    for rows in star.microbatches(len(prompts) * copies, settings):
        given = (policy, encoded, rows, settings, sigmas, key, 0, capture, copies)
        rollout, drawn = star.sample(*given)
        rollouts.append(rollout)
        images.append(drawn)
    return rollouts, torch.cat(images)


def second_judge(transformer, task):
    """ocr: exact matches and character error rate under Tesseract.

    geneval: by the renderer's pixels the score, and of the objects that a prompt asks for how many
    an image lacks and how many it has beyond their number.
    """
    prompts, images = test_images(transformer, task)
    if task == "geneval":
        tags = {}
        missing = 0
        extra = 0
        for prompt, image in zip(prompts, images, strict=True):
            found = pixel_rule(image)
            verdict = star.geneval_scores(prompt.metadata, found)[1]
            tags.setdefault(prompt.metadata["tag"], []).append(verdict)
            for clause in prompt.metadata["include"]:
                beyond = len(found.get(clause["class"], [])) - clause["count"]
                missing += max(0, -beyond)
                extra += max(0, beyond)
        return {
            "pixel_rule_score": statistics.mean(map(statistics.mean, tags.values())),
            "objects_missing": missing / len(images),
            "objects_extra": extra / len(images),
        }
    errors = []
    exact = []
    for prompt, image in zip(prompts, images, strict=True):
        start, end = star.quoted_span(prompt.text)
        target = star.normalise_text(prompt.text[start:end])
        got = star.normalise_text("".join(tesseract(image).split()))
        errors.append(min(star.edit_distance(got, target) / len(target), 1))
        exact.append(got == target)
    return {
        "tesseract_exact": statistics.mean(exact),
        "tesseract_error_rate": statistics.mean(errors),
    }


def tesseract(image):
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        star.to_picture(image).resize((384, 384), Image.BICUBIC).save(file.name)
        command = f"tesseract {file.name} - --psm 6 -c tessedit_char_whitelist={letters}".split()
        environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


# --- table ----------------------------------------------------------------------------------------


def load(given):
    """{arm: {seed: lines of metrics.jsonl}}, in the order of ARMS, other arms after them."""
    found = {arm: {} for arm in ARMS}
    for path in sorted(results(given).glob("*/metrics.jsonl")):
        arm, seed = path.parent.name.rsplit("-", 1)
        if not arm.startswith(("tune-", "redness-")):
            lines = read_lines(path)
            scores = [line["eval_score"] for line in lines[1:] if "eval_score" in line]
            if scores:
                lines[-1]["mean_score"] = statistics.mean(scores)
            found.setdefault(arm, {})[int(seed)] = lines
    found = {arm: runs for arm, runs in found.items() if runs}
    if not found:
        sys.exit(f"no runs in {results(given)}")
    return found


def curve(lines):
    return {line["iteration"]: line["eval_reward"] for line in lines if "eval_reward" in line}


def area(lines):
    """The primary measure: the mean test reward over all evaluations after the first."""
    return statistics.mean([value for step, value in curve(lines).items() if step > 0])


def last_value(name):
    return lambda lines: lines[-1].get(name)


def spread(values):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def paired(measure, runs, others):
    """[(a run's value, the other's of the same seed), ...] of the seeds that have both."""
    pairs = [(measure(runs[seed]), measure(others[seed])) for seed in runs if seed in others]
    return [pair for pair in pairs if None not in pair]


def difference(measure, runs, others):
    """Seed by seed: the mean difference and its standard error."""
    pairs = paired(measure, runs, others)
    if not pairs:
        return ""
    apart = [value - other for value, other in pairs]
    text = f"{statistics.mean(apart):+.3f}"
    if len(apart) > 1:
        text += f" (SE {standard_error(apart):.3f})"
    return text


def probability(measure, runs, others):
    """The paired t test's p."""
    pairs = paired(measure, runs, others)
    if len(pairs) < 2:
        return ""
    return f"{max(ttest_rel(*zip(*pairs, strict=True)).pvalue, 0.001):.3f}"


MEASURES = {  # after the mean: heading and column
    "ocr": {
        "final": "eval_reward",
        "exact": "eval_exact",
        "Tesseract exact": "tesseract_exact",
        "Tesseract CER": "tesseract_error_rate",
    },
    "geneval": {
        "final": "eval_reward",
        "mean score": "mean_score",
        "final score": "eval_score",
        "pixel rule's score": "pixel_rule_score",
        "missing": "objects_missing",
        "extra": "objects_extra",
    },
}


def table(given):
    found = load(given)
    names = MEASURES.get(given.task, MEASURES["ocr"])
    measures = [area, *map(last_value, names.values())]
    heading("arm", "n", "mean", *names, "clipped", "s for 128 images")
    base = results(given) / "base.json"
    if base.exists():
        first = next(iter(next(iter(found.values())).values()))[0]
        first |= json.loads(base.read_text())
        row("before", "", "", *(spread([first.get(name)]) for name in names.values()), "", "")
    for arm, runs in found.items():
        trained = [line for lines in runs.values() for line in lines[1:]]
        columns = [spread([measure(lines) for lines in runs.values()]) for measure in measures]
        seconds = [line["seconds_sampling"] + line["seconds_update"] for line in trained]
        row(arm, len(runs), *columns, clipped(trained), f"{statistics.median(seconds):.1f}")
    print()
    heading("difference, seed by seed", "n", "mean", "its p", *names)
    for change, (arm, without) in COMPARED.items():
        if arm in found and without in found:
            arms = (found[arm], found[without])
            mean, *others = (difference(measure, *arms) for measure in measures)
            row(change, len(paired(area, *arms)), mean, probability(area, *arms), *others)
    print()
    some_run = next(iter(next(iter(found.values())).values()))
    steps = [step for step in curve(some_run) if step > 0]
    heading("the test reward's difference after ... images", *(IMAGES * step for step in steps))
    for change, (arm, without) in COMPARED.items():
        shared = found.get(arm, {}).keys() & found.get(without, {}).keys()
        if len(shared) >= 3:
            row(change, *(apart_at(step, found[arm], found[without], shared) for step in steps))
    print()
    seeds = range(max(map(max, found.values())) + 1)
    heading("mean, seed by seed", *seeds)
    for arm, runs in found.items():
        cells = {seed: f"{area(lines):.3f}" for seed, lines in runs.items()}
        row(arm, *(cells.get(seed, "") for seed in seeds))


def apart_at(step, runs, others, seeds):
    apart = [curve(runs[seed])[step] - curve(others[seed])[step] for seed in seeds]
    return f"{statistics.mean(apart):+.3f} ± {standard_error(apart):.3f}"


def heading(*names):
    row(*names)
    print("|---" * len(names) + "|")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |")


def clipped(lines):
    share = statistics.mean(line["clip_high"] + line["clip_low"] for line in lines)
    return f"{share:.1%}"


def grid(given):
    """The tuning runs: mean training reward, by which the settings are chosen, and test reward."""
    names = ("learning rate", "clip range (fdfo: churn)", "training reward", "test reward")
    heading("method", *names, "clipped")
    for arm in GRID:
        path = results(given) / f"{arm}-100/metrics.jsonl"
        if path.exists():
            lines = read_lines(path)
            reward = statistics.mean(line["reward"] for line in lines[1:])
            pattern = r"tune-([a-z-]+)-(\d.*)-(0\.\d+|\d+e-\d+)"
            point = re.fullmatch(pattern, arm).groups()
            row(*point, f"{reward:.3f}", f"{area(lines):.3f}", clipped(lines[1:]))


# --- preserve: what else has changed when a reward is reached -------------------------------------


def preserve(given):
    """Measure and compare how far each method's pictures moved off the starting model's.

    Of the runs in --work that kept the transformers of their evaluations. Every value goes into
    --runs/preserve.csv, which later calls only add to and compare.
    """
    path = given.runs / "preserve.csv"
    measured = {}
    if path.exists():
        with open(path) as file:
            for line in csv.DictReader(file):
                measured[line["arm"], int(line["seed"]), int(line["iteration"])] = line
    base = test_images(None, "ocr")[1]
    elsewhere = pixels_off_the_sign(base)
    arms = ("star", "flow-grpo", "fdfo", *REDNESS)
    for folder in sorted((given.work / "ocr").glob("*/evaluated/*")):
        arm, seed = folder.parent.parent.name.rsplit("-", 1)
        run = (arm, int(seed), int(folder.name))
        if arm in arms and run not in measured:
            change = (test_images(folder, "ocr")[1] - base.float()).abs().mean(1) / 255
            metrics = read_lines(folder.parent.parent / "metrics.jsonl")
            line = dict(zip(("arm", "seed", "iteration"), run, strict=True))
            line["reward"] = curve(metrics)[run[2]]
            line["outside"] = change[elsewhere].mean().item()
            line["sign"] = change[~elsewhere].mean().item()
            line["before"] = curve(metrics)[0]
            measured[run] = line
            print(*line.values(), flush=True)
    with open(path, "w") as file:
        writer = csv.DictWriter(file, next(iter(measured.values())))
        writer.writeheader()
        writer.writerows(measured[run] for run in sorted(measured))
    compare_preserved(measured, ("star", "flow-grpo", "fdfo"))
    compare_preserved(measured, tuple(REDNESS))


def pixels_off_the_sign(images):
    """Return [B, h, w] bool: where pictures of the starting model do not have their sign."""
    rest = 1 - region(images, "ocr")
    side = math.isqrt(rest.shape[1])
    scale = images.shape[-1] // side
    return rest.view(-1, side, side).repeat_interleave(scale, 1).repeat_interleave(scale, 2) > 0


def compare_preserved(measured, arms):
    """Print the change off and on the sign at the reward that every run reaches, seed by seed."""
    runs = {}  # arm: seed: [(reward, outside, sign), ...] in the order of iterations
    for (arm, seed, _), line in sorted(measured.items()):
        if arm in arms:
            start = [(float(line["before"]), 0.0, 0.0)]
            point = tuple(float(line[name]) for name in ("reward", "outside", "sign"))
            runs.setdefault(arm, {}).setdefault(seed, start).append(point)
    if not runs:
        return
    every = [points for seeds in runs.values() for points in seeds.values()]
    level = min(max(points)[0] for points in every)
    print()
    heading(
        f"at reward {level:.3f}", "n", "change off the sign", "on it", "off it, not flow-grpo's"
    )
    changes = {}
    for arm, seeds in runs.items():
        changes[arm] = {seed: crossing(points, level) for seed, points in seeds.items()}
    baseline = next(changes[arm] for arm in changes if arm.endswith("flow-grpo"))
    for arm, seeds in changes.items():
        outside, sign = zip(*seeds.values(), strict=True)
        row(
            arm,
            len(seeds),
            spread(outside),
            spread(sign),
            difference(lambda change: change[0], seeds, baseline) if seeds is not baseline else "",
        )


def crossing(points, level):
    """Return (outside, sign) where the reward first reaches the level, linear between points."""
    for before, after in itertools.pairwise(points):
        if after[0] >= level:
            share = (level - before[0]) / (after[0] - before[0])
            return tuple(before[i] + share * (after[i] - before[i]) for i in (1, 2))
    raise ValueError(f"no point reaches {level}")


# --- exercises ------------------------------------------------------------------------------------

EXERCISES = ROOT / "assets/EXERCISES.md"
COLUMNS = "reward gradient_norm approximate_kl clip_high clip_low allocation_entropy".split()
EVALUATED = ("eval_reward", "eval_exact", "eval_edges", "eval_colours")


def read_exercises():
    """Return [(title, star.py as the exercise changes it, [its arguments, ...]), ...]."""
    found = []
    for part in EXERCISES.read_text().split("\n## "):
        title = part.splitlines()[0].lstrip("# ")
        source = (ROOT / "star.py").read_text()
        for diff in re.findall(r"```diff\n(.*?)```", part, re.DOTALL):
            source = changed(source, diff)
        commands = re.findall(r"^python star\.py (.*)$", part, re.MULTILINE)
        if commands:
            found.append((title, source, [command.split() for command in commands]))
    return found


def changed(source, diff):
    """Return the source with a diff's lines in it. Raises ValueError if they are not there once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] or line for line in lines if line[0] != "+")
    after = "".join(line[1:] or line for line in lines if line[0] != "-")
    if source.count(before) != 1:
        raise ValueError(f"{source.count(before)} times in star.py:\n{before}")
    return source.replace(before, after)


def exercises(given):
    """Run what runs/exercises.csv lacks of EXERCISES.md, and print the page's table."""
    path = given.runs / "exercises.csv"
    lines = {}
    if path.exists():
        with open(path) as file:
            lines = {(line["exercise"], line["arguments"]): line for line in csv.DictReader(file)}
    heading("", "change", *EVALUATED, *COLUMNS)
    for title, source, commands in read_exercises():
        for arguments in commands:
            key = (title, " ".join(arguments))
            if key not in lines:
                named = {"exercise": key[0], "arguments": key[1]}
                lines[key] = named | do_exercise(source, arguments)
                with open(path, "w") as file:
                    writer = csv.DictWriter(file, lines[key])
                    writer.writeheader()
                    writer.writerows(lines.values())
            row(*exercise_row(lines[key], source))


def exercise_row(line, source):
    """The cells of one command: the exercise's number, what is changed, its measures."""
    number = re.match(r"\d*", line["exercise"])[0]
    change = line["arguments"].removeprefix("--task ocr --iterations 12").strip()
    if source != (ROOT / "star.py").read_text():
        change = f"star.py {change}".strip()
    cells = [number, change]
    for name in (*EVALUATED, *COLUMNS):
        cells.append(f"{float(line[name]):.3g}" if line[name] != "" else "")
    return cells


def do_exercise(source, arguments):
    """Run a changed star.py; return the columns of its metrics: evaluated at the end, means of
    training, and the first and last reward in training."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "star.py").write_text(source)
        for name in ("assets", "prompts"):
            (place / name).symlink_to(ROOT / name)
        command = [sys.executable, "star.py", *arguments, "--model", "tiny", "--out", "run"]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
        first, *trained = read_lines(place / "run/metrics.jsonl")
    columns = {"before": first["eval_reward"]}
    columns |= {name: trained[-1][name] for name in EVALUATED}
    for name in COLUMNS:
        values = [line[name] for line in trained if name in line]
        columns[name] = statistics.mean(values) if values else ""
    columns["first_reward"] = trained[0]["reward"]
    columns["last_reward"] = trained[-1]["reward"]
    return columns


# --- pictures -------------------------------------------------------------------------------------

SHOWN = {
    "flow-grpo-published": "#000000",
    "flow-grpo": "#9467bd",
    "star": "#d62728",
    "star-own": "#ff7f0e",
    "star-region": "#2ca02c",
    "fdfo": "#1f77b4",
}
WIDTH = 1200
HEIGHT = 620
TOP = 60
BOTTOM = 170


def curves(given):
    """Test reward over images seen, a panel a task: mean and error of arms with three seeds."""
    panels = {}
    for given.task in ("ocr", "geneval"):
        bands = {}
        for arm, runs in load(given).items():
            if arm in SHOWN and len(runs) >= 3:
                bands[arm] = band(runs.values())
        if bands:
            panels[given.task] = bands
    if not panels:
        sys.exit("no arm has three seeds yet")
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet, "RGBA")
    font = ImageFont.load_default(size=26)
    side = WIDTH // len(panels)
    shown = set()
    for place, (task, bands) in enumerate(panels.items()):
        shown |= bands.keys()
        draw_panel(draw, font, bands, task, place * side + 80, side - 120)
    draw.text((WIDTH // 2, HEIGHT - 116), "images seen", fill="black", font=font, anchor="ma")
    for index, arm in enumerate(arm for arm in SHOWN if arm in shown):
        left = 40 + index % 3 * 390
        top = HEIGHT - 78 + index // 3 * 36
        draw.line([(left, top + 16), (left + 44, top + 16)], fill=SHOWN[arm], width=8)
        draw.text((left + 56, top), arm, fill="black", font=font)
    sheet.save(given.out or ROOT / "assets/curves.png")


def draw_panel(draw, font, bands, task, left, width):
    points = [point for band in bands.values() for point in band]
    low = math.floor(10 * min(mean - error for _, mean, error in points)) / 10
    high = math.ceil(10 * max(mean + error for _, mean, error in points)) / 10
    last = max(iteration for iteration, _, _ in points)
    bottom = HEIGHT - BOTTOM

    def place(iteration, value):
        share = (value - low) / (high - low)
        return left + iteration / last * width, bottom - share * (bottom - TOP)

    draw.text((left, 14), f"{task}: test reward", fill="black", font=font)
    step = 0.1 if high - low > 0.2 else 0.02
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        draw.line([place(0, value), place(last, value)], fill="#dddddd", width=2)
        x, y = place(0, value)
        draw.text((x - 12, y), f"{value:.2f}", fill="black", font=font, anchor="rm")
    for iteration in range(0, last + 1, max(last // 3, 1)):
        x, y = place(iteration, low)
        draw.text((x, y + 8), f"{iteration * IMAGES}", fill="black", font=font, anchor="ma")
    for arm, band in bands.items():
        edge = [place(iteration, mean + error) for iteration, mean, error in band]
        edge += [place(iteration, mean - error) for iteration, mean, error in reversed(band)]
        draw.polygon(edge, fill=SHOWN[arm] + "40")
    for arm, band in bands.items():  # lines over every band
        line = [place(iteration, mean) for iteration, mean, _ in band]
        draw.line(line, fill=SHOWN[arm], width=5)


def band(runs):
    """[(iteration, mean, standard error), ...] of the seeds' curves"""
    found = [curve(lines) for lines in runs]
    points = [(iteration, [values[iteration] for values in found]) for iteration in found[0]]
    return [(step, statistics.mean(values), standard_error(values)) for step, values in points]


def pictures(given, count=8):
    """The first test prompts by the embedded model and by the runs of seed 0."""
    settings = star.parse_settings(["--task", given.task, "--model", "tiny"])
    reward = star.make_reward(settings)
    cells = []
    for arm in ("base", *SHOWN):
        folder = given.work / given.task / f"{arm}-0"
        if arm == "base" or (folder / "transformer").exists():
            start = folder if arm != "base" else None
            prompts, images = test_images(start, given.task, count)
            rewards = reward(images, prompts)[:, 0].tolist()
            for prompt, image, value in zip(prompts, images, rewards, strict=True):
                cells.append((image, f"{arm}: {value:.2f} {prompt.text}"))
    out = given.out or ROOT / f"assets/methods-{given.task}.png"
    star.save_sheet(out, cells, columns=count, side=144)


def cost(given, pairs=12):
    """How much longer a star iteration takes than a flow-grpo one, without the reward.

    Processor seconds of one thread, the two in turn, after one pair that does not count.
    """
    torch.set_num_threads(1)
    settings = {}
    for method in ("star", "flow-grpo"):
        arguments = ["--task", given.task, "--model", "tiny", "--method", method]
        settings[method] = star.parse_settings([*arguments, "--out", str(given.work / "none")])
    policy = star.load_policy(settings["star"], "cpu")
    prompts = star.load_prompts(settings["star"].train_prompts, given.task)[:8]
    optimizer = star.MasterAdamW(policy.transformer.parameters(), 1e-12)

    def brightness(images, prompts):
        mean = images.float().mean((1, 2, 3))
        return torch.stack([mean, mean], dim=1)

    extra = []
    for number in range(pairs + 1):
        seconds = {}
        for method in sorted(settings, reverse=number % 2 == 0):
            began = time.process_time()
            star.train_iteration(
                policy, None, optimizer, prompts, brightness, settings[method], 1 + number
            )
            seconds[method] = time.process_time() - began
        if number > 0:
            extra.append(seconds["star"] / seconds["flow-grpo"] - 1)
            print(f"{extra[-1]:+.1%}", flush=True)
    print(f"mean {statistics.mean(extra):+.1%}, standard error {standard_error(extra):.1%}")


def first(given, count=4):
    """README's first picture: prompts of two tasks before and after training, and the maps.

    A column a prompt. The lowest row is the trained model's image under the allocation map of its
    first trained step. Of the runs of star, seed 0, in --work.
    """
    rows = [[], [], []]
    for task in ("ocr", "geneval"):
        folder = given.work / task / "star-0"
        for row, start in ((0, []), (1, ["--transformer", str(folder)])):
            settings = star.parse_settings(["--task", task, "--model", "tiny", *start])
            policy = star.load_policy(settings, "cpu")
            prompts = star.load_prompts(settings.test_prompts, task)[:count]
            rollouts, images = draw_all(policy, prompts, 1, settings, capture=True)
            for image, prompt in zip(images, prompts, strict=True):
                rows[row].append((image, prompt.text if row == 0 else ""))
        maps = star.step_maps(rollouts[0].attention, settings)[0]
        for image, allocation in zip(images, maps, strict=True):
            rows[2].append((star.heat(image, allocation), ""))
    cells = rows[0] + rows[1] + rows[2]
    star.save_sheet(given.out or ROOT / "assets/first.png", cells, columns=2 * count, side=120)


def main():
    if sys.argv[1:2] == ["hooked"]:
        return run_hooked(sys.argv[2], sys.argv[3:])
    commands = {
        one.__name__: one
        for one in (
            tune,
            run,
            grid,
            table,
            preserve,
            exercises,
            curves,
            pictures,
            first,
            cost,
            why,
            signal,
        )
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=commands)
    add("names", nargs="*", help="tune, run: which, as arm-seed")
    add("--task", default="ocr", help="[ocr]")
    add("--jobs", type=int, default=2, help="tune, run: how many at a time, of one thread each [2]")
    add("--iterations", type=int, help="of every run [the embedded model's]")
    add("--stage", choices=STAGES, default="selection", help="why: which batches [selection]")
    add("--batches", type=int, help="why: of 128 images, at least three [8, confirmation 16]")
    add("--runs", type=Path, default=ROOT / "assets/runs", help="for results [assets/runs]")
    add("--work", type=Path, default=ROOT / "runs/evidence", help="to work in [runs/evidence]")
    add("--out", type=Path, help="curves, pictures: the file to write")
    given = parser.parse_intermixed_args()
    given.work = given.work.resolve()
    given.runs = given.runs.resolve()
    commands[given.command](given)


if __name__ == "__main__":
    main()
