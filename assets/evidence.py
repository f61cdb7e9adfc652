"""Does allocating the reward help? The arms of README.md's table, one command for every number.

    python assets/evidence.py run             train every arm and seed that is not in assets/runs/ yet, two at a time;
                                              stop it when you like, it goes on where it was
    python assets/evidence.py run star-0      the same, for the runs named
    python assets/evidence.py table           table and learning curves (assets/curves.png) from assets/runs/
    python assets/evidence.py why             the gradient's signal and the maps' aim, by arm and denoising step

The second judge, which training never sees, is Tesseract (Debian package tesseract-ocr).
"""

import dataclasses
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
import numpy as np  # noqa: E402
import star  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

RUNS = ROOT / "assets/runs"
COMMON = "--task ocr --model tiny --iterations 24 --eval-every 4"  # 24 x 128 images
ARMS = {  # the embedded model's default is --step-weights equal
    "flow-grpo": ("--method flow-grpo", 5),
    "star": ("--method star", 5),
    "star-uniform": ("--allocation uniform", 3),
    "star-shuffled": ("--allocation shuffled", 3),
    "star-static": ("--allocation static", 3),
    "star-strength-0.5": ("--allocation-strength 0.5", 3),
    "star-strength-0.25": ("--allocation-strength 0.25", 3),
    "flow-grpo-none": ("--method flow-grpo --step-weights none", 3),
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


def second_judge(out):
    """Exact-match and character error rate of the test images under Tesseract."""
    settings, reward = star.parse_settings(["--model", "tiny"]), star.OCRReward()
    policy, _ = star.load_policy(settings, reward, "cpu")
    star.restore_transformer(policy.transformer, out)
    prompts = star.load_prompts(settings.test_prompts, "ocr")
    images = star.evaluate(policy, prompts, reward, settings)[0]
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
    found, images = load(), 128
    goal = statistics.mean(lines[-1]["eval_reward"] for lines in found["flow-grpo"].values())
    print(f"images to {goal:.3f}: until the test reward first reaches flow-grpo's final mean\n")
    print(
        "| arm | n | test reward | rollout reward, last 4 | exact | Tesseract exact | Tesseract CER | images to goal "
        "| s an iteration |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for arm, runs in found.items():
        runs = list(runs.values())
        reached = [next((it * images for it, r in curve(lines).items() if r >= goal), None) for lines in runs]
        phases = ("seconds_sampling", "seconds_reward", "seconds_update")
        seconds = [sum(line[phase] for phase in phases) for lines in runs for line in lines[1:]]
        columns = [
            spread([lines[-1]["eval_reward"] for lines in runs]),
            spread([statistics.mean(line["reward"] for line in lines[-4:]) for lines in runs]),
            spread([lines[-1]["eval_exact"] for lines in runs]),
            spread([lines[-1]["tesseract_exact"] for lines in runs]),
            spread([lines[-1]["tesseract_error_rate"] for lines in runs]),
            ", ".join(str(r) if r else "not reached" for r in reached),
            f"{statistics.median(seconds):.1f}",
        ]
        print(f"| {arm} | {len(runs)} | {' | '.join(columns)} |")
    draw_curves(found, ROOT / "assets/curves.png")


def draw_curves(found, path, width=900, height=520):
    """Mean test reward over images seen, one line an arm, the standard error as a bar."""
    colours = [
        "#000000",
        "#d62728",
        "#1f77b4",
        "#2ca02c",
        "#ff7f0e",
        "#9467bd",
        "#8c564b",
        "#7f7f7f",
        "#e377c2",
        "#17becf",
        "#bcbd22",
    ]
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    curves = {arm: [curve(lines) for lines in runs.values()] for arm, runs in found.items()}
    values = [v for runs in curves.values() for c in runs for v in c.values()]
    low, high = math.floor(min(values) * 20) / 20, math.ceil(max(values) * 20) / 20
    last = max(it for runs in curves.values() for c in runs for it in c)
    x = lambda iteration: 60 + iteration / last * (width - 300)
    y = lambda value: height - 50 - (value - low) / (high - low) * (height - 80)
    for tick in range(round(low * 20), round(high * 20) + 1):
        draw.line([(60, y(tick / 20)), (width - 240, y(tick / 20))], fill="#dddddd")
        draw.text((16, y(tick / 20) - 8), f"{tick / 20:.2f}", fill="black", font=font)
    for iteration in curves[next(iter(curves))][0]:
        draw.text((x(iteration) - 14, height - 44), str(iteration * 128), fill="black", font=font)
    draw.text((width / 2 - 160, height - 22), "images seen (test reward, mean over seeds)", fill="black", font=font)
    for index, (arm, runs) in enumerate(curves.items()):
        means = {it: statistics.mean(c[it] for c in runs) for it in runs[0]}
        colour = colours[index % len(colours)]
        draw.line([(x(it), y(v)) for it, v in means.items()], fill=colour, width=3)
        for it in means if len(runs) > 1 else ():
            error = statistics.stdev(c[it] for c in runs) / math.sqrt(len(runs))
            draw.line([(x(it), y(means[it] - error)), (x(it), y(means[it] + error))], fill=colour)
        draw.line([(width - 225, 40 + index * 22), (width - 195, 40 + index * 22)], fill=colour, width=3)
        draw.text((width - 188, 32 + index * 22), f"{arm} (n = {len(runs)})", fill="black", font=font)
    sheet.save(path)


# --- why --------------------------------------------------------------------------------------------------------------


def why(batches=8):
    """One set of rollouts (training prompts, base model), every arm's gradient on it, by denoising step.

    Signal: cosine of a batch's gradient (128 images) to the sum of the other batches' gradients, mean and standard
    error over batches. Aim: share of M on the tokens of the word the OCR engine found, over these tokens' share of the
    image (1 = no better than uniform), over images that were read at all.
    """
    settings, reward = star.parse_settings(["--model", "tiny"]), star.OCRReward()
    policy, _ = star.load_policy(settings, reward, "cpu")
    prompts, sigmas = star.load_prompts(settings.train_prompts, "ocr"), policy.sigmas(settings.sampling_steps)
    arms = {
        "flow-grpo": dict(method="flow-grpo", allocation="uniform"),
        "star": {},
        "star-uniform": dict(allocation="uniform"),
        "star-shuffled": dict(allocation="shuffled"), "star-static": dict(allocation="static"),
        "star-strength-0.5": dict(allocation_strength=0.5),
    }  # fmt: skip
    trained = settings.sampling_steps - 1
    parameters = list(policy.transformer.parameters())
    gradients = {arm: torch.zeros(batches, trained, sum(p.numel() for p in parameters)) for arm in arms}
    aims = []
    for batch in range(batches):
        chosen = star.pick_prompts(prompts, settings, 1000 + batch)
        trajectories, images, pending = star.sample_groups(
            policy, chosen, settings.group_size, settings, (settings.seed, 1000 + batch), sigmas, settings.noise_level,
            reward=reward, blocks=settings.blocks,
        )  # fmt: skip
        images, rewards, _ = star.gather_rewards(images, pending, len(images), settings)
        advantages = star.group_advantages(rewards, settings.group_size).split(settings.batch_size)
        inside = torch.stack([text_tokens(reward, image) for image in images]).split(settings.batch_size)
        for trajectory, advantage, cells in zip(trajectories, advantages, inside):
            trajectory.advantages = advantage
            found = cells.any(-1)
            share = (trajectory.attention / trajectory.attention.sum(-1, keepdim=True) * cells).sum(-1)
            aims.append((share / cells.float().mean(-1))[:, found])
        for arm, changes in arms.items():
            changed = dataclasses.replace(settings, **changes)
            for trajectory in trajectories:
                generators = [torch.Generator().manual_seed(g.initial_seed()) for g in trajectory.generators]
                trajectory.allocation = star.arrange_allocation(
                    trajectory.attention, changed.allocation, changed.allocation_strength, generators, trained
                )
            for i in range(trained):
                for p in parameters:
                    p.grad = None
                for trajectory in trajectories:
                    velocity = star.predict_velocity(
                        policy.transformer, trajectory.latents[i], sigmas[i], trajectory.text(), settings.guidance
                    )
                    star.policy_loss(changed, trajectory, i, velocity, sigmas, 2)[0].backward()
                gradients[arm][batch, i] = torch.cat([p.grad.flatten() for p in parameters])
        print(f"batch {batch + 1} of {batches}", file=sys.stderr, flush=True)
    weights = torch.tensor(star.step_weights(sigmas, settings.noise_level, "equal"))
    print("| | " + " | ".join(f"sigma {s:.2f}" for s in sigmas[:trained]) + " | all, none | all, equal |")
    print("|---" * (trained + 3) + "|")
    for arm, g in gradients.items():
        columns = [signal(g[:, i]) for i in range(trained)] + [signal(g.sum(1)), signal((g * weights[:, None]).sum(1))]
        print(f"| {arm} | " + " | ".join(columns) + " |")
    norms = gradients["flow-grpo"].norm(dim=-1).mean(0)
    print("| norm, flow-grpo, first = 1 | " + " | ".join(f"{n:.1f}" for n in (norms / norms[0]).tolist()) + " | | |")
    aim = torch.cat(aims, dim=1)
    print("| aim of M | " + " | ".join(f"{a:.2f}" for a in aim[:trained].mean(1).tolist()) + " | | |")
    print(f"\n{batches} batches of 128 images; aim over {aim.shape[1]} images that were read")


def signal(gradients):
    total = gradients.sum(0)
    cosines = [torch.cosine_similarity(g, total - g, dim=0).item() for g in gradients]
    return f"{statistics.mean(cosines):.3f} ± {statistics.stdev(cosines) / math.sqrt(len(cosines)):.3f}"


def text_tokens(reward, image):
    """[P] bool: the image tokens whose centre lies in a box that the OCR detector found."""
    if not reward.read(image):  # (which also makes this thread's engine)
        return torch.zeros((image.shape[-1] // 8) ** 2, dtype=torch.bool)
    enlarged = 4
    boxes = reward.local.engine(np.asarray(star.to_picture(image, image.shape[-1] * enlarged))).boxes / enlarged
    centres = (torch.arange(image.shape[-1] // 8) + 0.5) * 8
    inside = torch.zeros(len(centres), len(centres), dtype=torch.bool)
    for (left, top), (right, bottom) in zip(boxes.min(1).tolist(), boxes.max(1).tolist()):  # corners [n, 4, 2]
        inside |= ((centres > top) & (centres < bottom))[:, None] & ((centres > left) & (centres < right))
    return inside.flatten()


if __name__ == "__main__":
    commands = {"run": lambda: run(sys.argv[2:]), "table": table, "why": why}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
