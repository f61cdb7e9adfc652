"""Does allocating the reward help? The arms of README.md's table, one command for every number.

    python assets/evidence.py run             train every arm and seed that is not in assets/runs/ yet, two at a time;
                                              stop it when you like, it goes on where it was
    python assets/evidence.py run star-0      the same, for the runs named
    python assets/evidence.py table           table and learning curves (assets/curves.png) from assets/runs/
    python assets/evidence.py pictures        the same words by each method (assets/methods.png), from runs/evidence/
    python assets/evidence.py why             the gradient's signal and the maps' aim, by arm and denoising step

The second judge, which training never sees, is Tesseract (Debian package tesseract-ocr).
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import star  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

RUNS = ROOT / "assets/runs"
COMMON = "--task ocr --model tiny --iterations 24 --eval-every 4"  # 24 x 128 images
ARMS = {  # the tiny model's defaults: --step-weights equal, --learning-rate 1.5e-4, star's --clip-range 1e-3 (by token)
    "flow-grpo-none": ("--method flow-grpo --step-weights none", 3),  # as published
    "flow-grpo": ("--method flow-grpo", 5),
    "flow-grpo-clip-3e-4": ("--method flow-grpo --clip-range 3e-4", 3),
    "flow-grpo-clip-1e-3": ("--method flow-grpo --clip-range 1e-3", 3),
    "flow-grpo-lr-3e-4": ("--method flow-grpo --clip-range 3e-4 --learning-rate 3e-4", 3),
    "star-uniform": ("--allocation uniform", 3),
    "star": ("--method star", 5),
    "star-shuffled": ("--allocation shuffled", 3),
    "star-static": ("--allocation static", 3),
    "star-strength-0.5": ("--allocation-strength 0.5", 3),
    "star-strength-0.25": ("--allocation-strength 0.25", 3),
    "star-lr-3e-4": ("--learning-rate 3e-4", 3),
    "star-uniform-none": ("--allocation uniform --step-weights none", 3),
    "star-none": ("--step-weights none", 3),
    "fdfo": ("--method fdfo", 3),
    "fdfo-attention": ("--method fdfo --allocation attention", 3),
}


# --- run --------------------------------------------------------------------------------------------------------------


def run(names):
    """Seed by seed over all arms, so that an interrupted evening still compares every arm."""
    RUNS.mkdir(exist_ok=True)
    todo = [(arm, seed) for seed in range(5) for arm, (_, seeds) in ARMS.items() if seed < seeds]
    todo = [(arm, seed) for arm, seed in todo if not names or f"{arm}-{seed}" in names]
    todo = [(arm, seed) for arm, seed in todo if not (RUNS / f"{arm}-{seed}.jsonl").exists()]
    if todo:  # the base model first: all arms start from the same one
        settings = star.parse_settings(["--model", "tiny"])
        star.load_policy(settings, star.OCRReward(), "cpu")
        if not (RUNS / "base.json").exists():
            (RUNS / "base.json").write_text(json.dumps(second_judge(None)))
    with ThreadPoolExecutor(2) as pool:
        for name in pool.map(train_one, todo):
            print(f"{name} done", flush=True)


def train_one(job):
    arm, seed = job
    name = f"{arm}-{seed}"
    out = ROOT / "runs/evidence" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    how = [*COMMON.split(), *ARMS[arm][0].split(), "--seed", str(seed), *["--resume"][: out.exists()]]
    with open(out.parent / f"{name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two runs on two cores beat one on both
        command = [sys.executable, "star.py", *how, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= second_judge(out)
    (RUNS / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def test_images(out):
    """(prompts, images, rewards) of the test words by a run's trained model; by the base model without one."""
    settings, reward = star.parse_settings(["--model", "tiny"]), star.OCRReward()
    policy, _ = star.load_policy(settings, reward, "cpu")
    if out:
        star.restore_transformer(policy.transformer, out)
    prompts = star.load_prompts(settings.test_prompts, "ocr")
    return prompts, *star.evaluate(policy, prompts, reward, settings)[:2]


def second_judge(out):
    """Exact-match and character error rate of the test images under Tesseract."""
    prompts, images, _ = test_images(out)
    targets = [star.normalise_text(prompt.text[slice(*star.quoted_span(prompt.text))]) for prompt in prompts]
    read = [star.normalise_text(tesseract(image)) for image in images]
    errors = [min(star.edit_distance(got, target) / len(target), 1) for got, target in zip(read, targets)]
    exact = sum(got == target for got, target in zip(read, targets)) / len(read)
    return {"tesseract_exact": exact, "tesseract_error_rate": sum(errors) / len(errors)}


def tesseract(image):
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        star.to_picture(image, 384).save(file.name)
        command = f"tesseract {file.name} - --psm 6 -c tessedit_char_whitelist={star.LETTERS}"
        environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
        return subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=True).stdout


# --- table and picture ------------------------------------------------------------------------------------------------


def load():
    found = {}
    for path in sorted(RUNS.glob("*.jsonl")):
        arm, seed = path.stem.rsplit("-", 1)
        found.setdefault(arm, {})[int(seed)] = [json.loads(line) for line in path.read_text().splitlines()]
    return {arm: found[arm] for arm in ARMS if arm in found}


def curve(lines):
    return {line["iteration"]: line["eval_reward"] for line in lines if "eval_reward" in line}


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table():
    found = load()
    goals = [statistics.mean(lines[-1]["eval_reward"] for lines in found[arm].values()) for arm in BASELINES]
    goals.insert(1, 0.75)
    print(
        "| arm | n | test reward | over flow-grpo | exact | Tesseract exact | Tesseract CER "
        f"| {' | '.join(f'images to {goal:.3f}' for goal in goals)} | s an iteration | GB |"
    )
    print("|---" * 12 + "|")
    first, base = found["flow-grpo"][0][0], json.loads((RUNS / "base.json").read_text())
    judged = f"{base['tesseract_exact']:.3f} | {base['tesseract_error_rate']:.3f}"
    print(f"| before training | | {first['eval_reward']:.3f} | | {first['eval_exact']:.3f} | {judged} | | | | | |")
    reference = [lines[-1]["eval_reward"] for lines in found["flow-grpo"].values()]
    for arm, runs in found.items():
        runs = list(runs.values())
        phases = ("seconds_sampling", "seconds_reward", "seconds_update")
        seconds = [sum(line[phase] for phase in phases) for lines in runs for line in lines[1:]]
        final = [lines[-1]["eval_reward"] for lines in runs]
        columns = [
            spread(final),
            "" if arm == "flow-grpo" else difference(final, reference),
            spread([lines[-1]["eval_exact"] for lines in runs]),
            spread([lines[-1]["tesseract_exact"] for lines in runs]),
            spread([lines[-1]["tesseract_error_rate"] for lines in runs]),
            *(reached(runs, goal) for goal in goals),
            f"{statistics.median(seconds):.1f}",
            f"{max(line['peak_memory_gb'] for lines in runs for line in lines[1:]):.2f}",
        ]
        print(f"| {LABELS.get(arm, arm)} | {len(runs)} | {' | '.join(columns)} |")
    panels = [[arm for arm in group if arm in found] for group in PANELS]
    drawn = [curves_panel({arm: found[arm] for arm in panel}) for panel in panels]
    sheet = Image.new("RGB", (drawn[0].width, sum(panel.height for panel in drawn)))
    for number, panel in enumerate(drawn):
        sheet.paste(panel, (0, number * panel.height))
    sheet.save(ROOT / "assets/curves.png")


LABELS = {
    "flow-grpo-none": "flow-grpo, as published",
    "star-none": "star, unweighted",
    "star-uniform-none": "star-uniform, unweighted",
}
BASELINES = ("flow-grpo-none", "flow-grpo")  # whose final mean is a goal; between them, a fixed reward


def difference(final, reference):
    """Difference of the means and its standard error, where both have more than one seed."""
    apart = statistics.mean(final) - statistics.mean(reference)
    if min(len(final), len(reference)) < 2:
        return f"{apart:+.3f}"
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (final, reference)))
    return f"{apart:+.3f} (SE {error:.3f})"


def reached(runs, goal, images=128):
    """Images until the test reward first reaches the goal, between evaluations on a straight line: mean and standard
    deviation over the seeds that got there, and how many did not."""
    found = []
    for lines in runs:
        points = list(curve(lines).items())
        for (before, low), (after, high) in zip(points, points[1:]):
            if high >= goal:
                found.append(images * (before + (after - before) * (goal - low) / (high - low)))
                break
    if not found:
        return "never"
    missed = f"{len(runs) - len(found)} of {len(runs)} never" * (len(found) < len(runs))
    sd = f" ± {statistics.stdev(found):.0f}" if len(found) > 1 else ""
    return ", ".join(filter(None, [f"{statistics.mean(found):.0f}{sd}", missed]))


PANELS = (
    ("flow-grpo", "star", "star-uniform", "star-shuffled", "star-static", "fdfo", "fdfo-attention"),
    (
        "flow-grpo", "flow-grpo-clip-3e-4", "flow-grpo-clip-1e-3", "flow-grpo-lr-3e-4", "flow-grpo-none",
        "star", "star-lr-3e-4", "star-strength-0.5", "star-strength-0.25", "star-uniform-none", "star-none",
    ),
)  # fmt: skip
COLOURS = "#000000 #d62728 #1f77b4 #2ca02c #ff7f0e #9467bd #8c564b #7f7f7f #e377c2 #17becf #bcbd22".split()


def curves_panel(found, width=960, height=460, low=0.45, high=0.95):
    """Mean test reward over images seen, one line an arm, the standard error as a bar."""
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    curves = {arm: [curve(lines) for lines in runs.values()] for arm, runs in found.items()}
    last = max(it for runs in curves.values() for c in runs for it in c)
    x = lambda iteration: 60 + iteration / last * (width - 330)
    y = lambda value: height - 50 - (value - low) / (high - low) * (height - 80)
    for tick in range(round(low * 20), round(high * 20) + 1):
        draw.line([(60, y(tick / 20)), (width - 270, y(tick / 20))], fill="#dddddd")
        draw.text((16, y(tick / 20) - 8), f"{tick / 20:.2f}", fill="black", font=font)
    for iteration in curves[next(iter(curves))][0]:
        draw.text((x(iteration) - 14, height - 44), str(iteration * 128), fill="black", font=font)
    draw.text((width / 2 - 160, height - 22), "images seen (test reward, mean over seeds)", fill="black", font=font)
    for index, ((arm, runs), colour) in enumerate(zip(curves.items(), COLOURS)):
        means = {it: statistics.mean(c[it] for c in runs) for it in runs[0]}
        draw.line([(x(it), y(v)) for it, v in means.items()], fill=colour, width=3)
        for it in means if len(runs) > 1 else ():
            error = statistics.stdev(c[it] for c in runs) / math.sqrt(len(runs))
            draw.line([(x(it), y(means[it] - error)), (x(it), y(means[it] + error))], fill=colour)
        draw.line([(width - 255, 40 + index * 22), (width - 225, 40 + index * 22)], fill=colour, width=3)
        draw.text((width - 218, 32 + index * 22), f"{LABELS.get(arm, arm)} (n = {len(runs)})", fill="black", font=font)
    return sheet


def pictures(count=8):
    images, captions = [], []
    for arm in ("base", "flow-grpo", "star", "fdfo", "fdfo-attention"):
        prompts, drawn, rewards = test_images(None if arm == "base" else ROOT / f"runs/evidence/{arm}-0")
        images.append(drawn[:count])
        captions += [f"{arm}: {reward:.2f} {prompt.text}" for prompt, reward in zip(prompts[:count], rewards.tolist())]
    star.save_grid(ROOT / "assets/methods.png", torch.cat(images), captions, columns=count)


# --- why --------------------------------------------------------------------------------------------------------------


WHY = {  # block, arm, strength: one set of rollouts, each of these maps on it
    "uniform (= flow-grpo)": (3, "uniform", 1.0),
    "block 0": (0, "attention", 1.0),
    "block 1": (1, "attention", 1.0),
    "block 2": (2, "attention", 1.0),
    "block 3": (3, "attention", 1.0),
    "block 3, strength 0.5": (3, "attention", 0.5),
    "block 3, strength 0.25": (3, "attention", 0.25),
    "block 3, static": (3, "static", 1.0),
    "block 3, shuffled": (3, "shuffled", 1.0),
}


def why(batches=8):
    """Which maps carry more signal an image, at the base model, on training prompts? By denoising step.

    Signal: cosine of a batch's gradient (128 images) to the sum over the other batches of the *uniform* gradient, which
    is unbiased; mean and standard error over batches. Noise: variance of a batch's gradient, as a multiple of the
    uniform one's, each map's loudness taken out as --step-weights equal does. Aim: mean M on the tokens of the letters
    drawn, on the blank tokens of the sign (letters left out), and elsewhere; and the share of M on the sign.
    """
    settings, reward = star.parse_settings(["--model", "tiny"]), star.OCRReward()
    policy, _ = star.load_policy(settings, reward, "cpu")
    prompts, sigmas = star.load_prompts(settings.train_prompts, "ocr"), policy.sigmas(settings.sampling_steps)
    trained, parameters = settings.sampling_steps - 1, list(policy.transformer.parameters())
    size = sum(p.numel() for p in parameters)
    gradients = {arm: torch.zeros(batches, trained, size) for arm in WHY}
    unweighted = {arm: torch.zeros(batches, size) for arm in WHY}
    aims = {block: [] for block in range(4)}
    for batch in range(batches):
        chosen, key = star.pick_prompts(prompts, settings, 1000 + batch), (settings.seed, 1000 + batch)
        rolled = [
            star.sample_groups(
                policy, chosen, settings.group_size, settings, key, sigmas, settings.noise_level, blocks=(block,)
            )
            for block in range(4)
        ]  # the same images every time
        trajectories, images, _ = rolled[0]
        futures = reward.submit(images, [prompt for prompt in chosen for _ in range(settings.group_size)])
        _, rewards, _ = star.gather_rewards(images, futures, len(images), settings)
        advantages = star.group_advantages(rewards, settings.group_size).split(settings.batch_size)
        kinds = cells(images)
        for block in range(4):
            maps = star.allocation_map(torch.cat([t.attention for t in rolled[block][0]], dim=1), 1.0)  # [T, B, P]
            means = [[maps[i][kind].mean().item() for kind in kinds] for i in range(trained)]
            shares = [maps[i][kinds[0] | kinds[1]].sum().item() / maps[i].sum().item() for i in range(trained)]
            aims[block].append([[*row, share] for row, share in zip(means, shares)])
        for number, (trajectory, advantage) in enumerate(zip(trajectories, advantages)):
            trajectory.advantages = advantage
            allocations = {}
            for arm, (block, how, strength) in WHY.items():
                generators = [torch.Generator().manual_seed(g.initial_seed()) for g in trajectory.generators]
                attention = rolled[block][0][number].attention
                allocations[arm] = star.arrange_allocation(attention, how, strength, generators, trained)
            for i in range(trained):
                velocity = star.predict_velocity(
                    policy.transformer, trajectory.latents[i], sigmas[i], trajectory.text(), settings.guidance
                )
                for arm, allocation in allocations.items():
                    trajectory.allocation = allocation
                    loss = star.policy_loss(settings, trajectory, i, velocity, sigmas, 2)[0]
                    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]
                    found = torch.cat([g.flatten() for g in found])
                    unweighted[arm][batch] += found
                    gradients[arm][batch, i] += found / star.loudness(trajectory, i, settings)
        print(f"batch {batch + 1} of {batches}", file=sys.stderr, flush=True)
    weights = torch.tensor(star.step_weights(sigmas, settings.noise_level, "equal"))[:, None]
    print("| maps | " + " | ".join(f"{s:.2f}" for s in sigmas[:trained]) + " | all, none | all, equal |")
    print("|---" * (trained + 3) + "|")
    plain = gradients["uniform (= flow-grpo)"]
    for arm, g in gradients.items():
        columns = [signal(g[:, i], plain[:, i]) for i in range(trained)]
        columns.append(signal(unweighted[arm], unweighted["uniform (= flow-grpo)"]))
        columns.append(signal((g * weights).sum(1), (plain * weights).sum(1)))
        print(f"| {arm} | " + " | ".join(columns) + " |")
    for arm, g in gradients.items():
        noise = [(g[:, i].var(0).sum() / plain[:, i].var(0).sum()).item() for i in range(trained)]
        noise.append(((g * weights).sum(1).var(0).sum() / (plain * weights).sum(1).var(0).sum()).item())
        *steps, whole = (f"{value:.2f}" for value in noise)
        print(f"| {arm}, variance over uniform's | " + " | ".join(steps) + f" | | {whole} |")
    norms = plain.norm(dim=-1).mean(0)
    print("| norm, uniform, first = 1 | " + " | ".join(f"{n:.1f}" for n in (norms / norms[0]).tolist()) + " | | |")
    heading = " | ".join(f"{s:.2f}" for s in sigmas[:trained])
    print(f"\n| mean M on letters / blanks / elsewhere, share on the sign | {heading} |")
    print("|---" * (trained + 1) + "|")
    for block, found in aims.items():
        mean = torch.tensor(found).mean(0).tolist()
        cell = lambda row: " / ".join(f"{m:.1f}" for m in row[:3]) + f", {row[3]:.0%}"
        print(f"| block {block} | " + " | ".join(map(cell, mean)) + " |")
    print(f"\n{batches} batches of 128 images")


def signal(gradients, plain):
    total = plain.sum(0)
    cosines = [torch.cosine_similarity(g, total - own, dim=0).item() for g, own in zip(gradients, plain)]
    return f"{statistics.mean(cosines):.3f} ± {statistics.stdev(cosines) / math.sqrt(len(cosines)):.3f}"


def cells(images):
    """Masks [B, P] over the 8 x 8 px tokens of images [B, 3, h, w] uint8: letters on the sign, blank sign, the rest."""
    grey = images[:, :1].float() / 255
    mean, high = F.avg_pool2d(grey, 8).flatten(1), F.max_pool2d(grey, 8).flatten(1)
    blank, letter = mean > 0.93, (high > 0.85) & (mean > 0.4) & (mean < 0.9)
    return letter, blank, ~letter & ~blank


if __name__ == "__main__":
    commands = {"run": lambda: run(sys.argv[2:]), "table": table, "pictures": pictures, "why": why}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
