"""star.py: reinforcement learning for text-to-image flow models, each region and step with its share of the reward.

STAR (SpatioTemporal Adaptive Reward Allocation, arXiv 2606.17979) takes the usual group-relative advantage of an image
and applies it more strongly where the model's own text-image attention finds the prompt's core content, with a map for
every denoising step of every rollout. In five steps, each a function below:

  1. Roll out groups of images with an SDE sampler; each step is a Gaussian action.    sde_mean_std, token_log_prob
  2. On the way, read the attention of every region to the core of the prompt.         core_spans, capture_attention
  3. Make it an allocation map of mean 1, for every step and rollout.                  allocation_map
  4. Compare each image's reward with its group's.                                     group_advantages
  5. Update through a clipped objective resolved in space.                             star_objective

flow_grpo_objective is the scalar baseline (arXiv 2505.05470); churn_step, fdfo_direction and fdfo_objective are a
second method (FDFO, Finite Difference Flow Optimization, arXiv 2603.12893). Only the abstract of STAR's paper is public
to us: where it is silent a comment says what we chose and why, and README.md has the list.

  python star.py --task ocr                       SD3.5 Medium with a CUDA GPU, else an embedded tiny model
  python star.py --task ocr --method flow-grpo    the baseline; or --method fdfo
  python star.py --resume                         go on with the last run after any interruption
  python star.py --help                           every setting
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import string
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SD35 = "stabilityai/stable-diffusion-3.5-medium"
RANDOM = "RANDOM WEIGHTS, NOT A RESULT: "  # before every line of --model random that could pass for one

# ======================================================================================================================
# Notation: these names, everywhere.
#
#   x_t    latents        [B, C, H, W]   noisy latents, x_t = (1 - sigma) x_0 + sigma n; C = 16, H = W = 64 at 512 px
#   sigma  sigma          float          flow time: 1 = noise, 0 = data
#   v      velocity       [B, C, H, W]   n - x_0 as the model predicts it, after classifier-free guidance (CFG)
#   P      tokens         int            image tokens, one 2x2 latent patch each, row-major: P = H/2 * W/2
#   N      text tokens    int            joint text sequence: the CLIP positions, then the T5 positions
#   S      attention      [B, P]         probability mass that an image token's query puts on core text tokens
#   M      allocation     [B, P]         allocation map: >= 0, mean over P exactly 1
#   A      advantages     [B]            group-relative advantage
#   l_p    log_prob       [B, P]         per-token mean of the Gaussian log-density of the step taken
#   rho_p  ratio          [B, P]         exp(l_p - l_p_old)
# ======================================================================================================================

# ---------------------------------------------------------------------------------------------------------------------
# 0. The policy: one stochastic denoising step is one action, drawn from a Gaussian whose density we can write down.
# ---------------------------------------------------------------------------------------------------------------------


def sde_mean_std(latents, velocity, sigma, sigma_next, sigma_max, noise_level):
    """Mean and standard deviation of the next latents under Flow-GRPO's SDE (arXiv 2505.05470).

        std_dev = a sqrt(sigma / (1 - sigma))             at sigma = 1 the denominator uses 1 - sigma_max
        mean    = x (1 + std_dev^2 / (2 sigma) dt) + v (1 + std_dev^2 (1 - sigma) / (2 sigma)) dt
        std     = std_dev sqrt(-dt),                      dt = sigma_next - sigma < 0

    latents, velocity [B, C, H, W] of any float type; sigma > sigma_next floats in [0, 1]; sigma_max is sigmas[1], the
    largest sigma below 1; noise_level is a. Returns (mean [B, C, H, W] fp32, std float, in latent units).
    a = 0 is exactly the Euler step of diffusers' FlowMatchEulerDiscreteScheduler. Raises ValueError unless sigma falls.
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"a step must go down in sigma, within [0, 1]: got {sigma} -> {sigma_next}")
    dt = sigma_next - sigma
    std_dev = noise_level * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    drift = std_dev**2 / (2 * sigma)
    mean = latents.float() * (1 + drift * dt) + velocity.float() * ((1 + drift * (1 - sigma)) * dt)
    return mean, std_dev * math.sqrt(-dt)


def token_log_prob(next_latents, mean, std, patch_size=2):
    """l_p: log N(next_latents; mean, std^2), averaged over the C x patch x patch numbers of each image token.

    next_latents, mean [B, C, H, W]; std > 0 float. Returns [B, P] fp32 in nats per latent number, P row-major.
    A mean and not a sum, as in Flow-GRPO: mean_p l_p is its image-level log-probability exactly.
    """
    if std <= 0:
        raise ValueError("a deterministic step (std = 0) has no density")
    log_density = (
        -((next_latents.float() - mean.float()) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    )
    return F.avg_pool2d(log_density.mean(1, keepdim=True), patch_size).flatten(1)  # [B, 1, H, W] -> [B, P]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Where does the model itself look for the prompt's core content? Text-image attention, captured on the way.
#    The paper is silent on which attention it reads. We take SD3's joint attention, image queries on text keys,
#    softmax over the whole joint key set, heads averaged, in the block(s) that localise best (--attention-blocks).
# ---------------------------------------------------------------------------------------------------------------------


class CaptureProcessor:
    """An attention processor that calls the original one, then reads S beside it: the output stays the original's."""

    def __init__(self, processor, core_mask, captured):
        self.processor, self.core_mask, self.captured = processor, core_mask, captured

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        output = self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        self.captured.append(core_attention(attn, hidden_states, encoder_hidden_states, self.core_mask))
        return output


@torch.no_grad()
def core_attention(attn, image_states, text_states, core_mask):
    """S: the share of each image token's attention that goes to the core text tokens, averaged over heads.

    S = softmax(Q_image [K_image; K_text]^T / sqrt(d)) 1_core: attention applied to *values that are the indicator of
    the core tokens*, so one more scaled_dot_product_attention gives it exactly; the [P, P + N] matrix is never formed.

    attn: diffusers Attention of an SD3 block; image_states [B', P, D], text_states [B', N, D]: its inputs;
    core_mask [B, N] bool. With CFG, B' = 2B and the conditional half comes last. Returns [B, P] fp32 in [0, 1].
    """
    batch = len(core_mask)
    image_states, text_states = image_states[-batch:], text_states[-batch:]

    def heads(linear, norm, states):  # [B, L, D] -> [B, heads, L, head_dim], after SD3.5's RMS norm of q and k
        states = linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return states if norm is None else norm(states)

    query = heads(attn.to_q, attn.norm_q, image_states)
    key = torch.cat(  # SD3 puts the image tokens first, then the text tokens
        [heads(attn.to_k, attn.norm_k, image_states), heads(attn.add_k_proj, attn.norm_added_k, text_states)], dim=2
    )
    indicator = F.pad(core_mask.to(key.dtype), (image_states.shape[1], 0))  # [B, P + N]
    value = indicator[:, None, :, None].expand_as(key).contiguous()
    return F.scaled_dot_product_attention(query, key, value)[..., 0].float().mean(1)  # any channel is S


@contextlib.contextmanager
def capture_attention(transformer, core_mask, blocks):
    """Within this context every forward of a diffusers SD3Transformer2DModel leaves S in the list it yields.

    core_mask [B, N] bool; blocks: indices of joint blocks. Each forward appends one [B, P] a block, in block order.
    The model's output is bitwise what it is without capture; processors are restored on exit, also after an exception.
    SD3.5's second attention (attn2) sees no text and is left alone.
    """
    attentions = [transformer.transformer_blocks[block].attn for block in blocks]
    originals = [attn.processor for attn in attentions]
    captured = []
    try:
        for attn in attentions:
            attn.set_processor(CaptureProcessor(attn.processor, core_mask, captured))
        yield captured
    finally:
        for attn, original in zip(attentions, originals):
            attn.set_processor(original)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The prompt's core content, as character spans, then as text tokens.
#    The paper says "core content" and no more. We take: ocr, the quoted text; geneval, the objects, colours, counts and
#    relations that the prompt's own metadata names; pickscore, every word that is not a function word.
# ---------------------------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset(
    "a an the and or but of in on at by to from with without into onto over under as for is are was were be been being "
    "it its this that these those there their his her they he she who which while has have had very".split()
)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}


def quoted_span(prompt):
    """(start, end) of the characters between the first pair of ASCII double quotes. ValueError if there are none."""
    start = prompt.find('"') + 1
    end = prompt.find('"', start)
    if start == 0 or end == -1 or not prompt[start:end].strip():
        raise ValueError('no text between double quotes; write it as: a sign that says "HELLO"')
    return start, end


def core_spans(prompt, task, metadata=None):
    """Character spans [(start, end), ...] of the prompt's core content, sorted and disjoint (end exclusive).

    task: "ocr", "geneval" (metadata: the prompt's own line, with `include`) or "pickscore".
    Raises ValueError for an unknown task, an ocr prompt without quoted text, geneval without metadata.
    """
    if task == "ocr":
        return [quoted_span(prompt)]
    if task == "pickscore":
        return content_spans(prompt)
    if task != "geneval":
        raise ValueError(f"unknown task {task!r}: one of ocr, geneval, pickscore")
    if not metadata or not metadata.get("include"):
        raise ValueError("a geneval prompt needs its metadata, with `include`")
    phrases = []
    for clause in metadata["include"]:
        phrases += [re.escape(clause["class"]) + "(?:e?s)?"]  # GenEval's plurals: apples, buses, knifes
        phrases += [re.escape(clause["color"])] if clause.get("color") else []
        phrases += [re.escape(clause["position"][0])] if clause.get("position") else []
        count = clause.get("count", 1)
        phrases += [str(count), NUMBER_WORDS.get(count, str(count))] if count > 1 else []
    found = re.finditer(rf"\b(?:{'|'.join(sorted(phrases, key=len, reverse=True))})\b", prompt, re.IGNORECASE)
    return [match.span() for match in found] or content_spans(prompt)


def content_spans(prompt):
    """Spans of all words but function words; of the whole prompt where nothing else is left."""
    words = [match.span() for match in re.finditer(r"\w+(?:['’-]\w+)*", prompt)]
    return [(a, b) for a, b in words if prompt[a:b].lower() not in STOP_WORDS] or words or [(0, len(prompt))]


def token_mask(spans, offsets):
    """Which tokens overlap the spans. offsets: one (start, end) of characters a token, as fast tokenizers give them;
    special and padding tokens are empty (start == end) and never core. Returns a list of bool."""
    return [any(start < b and a < end for a, b in spans) and start < end for start, end in offsets]


# ---------------------------------------------------------------------------------------------------------------------
# 3. From attention to an allocation map of mean 1, one for every denoising step of every rollout.
# ---------------------------------------------------------------------------------------------------------------------


def allocation_map(attention, strength):
    """M = (1 - lambda) + lambda S / mean_P(S): how strongly each region receives the advantage.

    attention [..., P] >= 0; strength lambda in [0, 1], 0 = uniform. Returns [..., P] fp32, detached, >= 0, of mean 1
    over P (so learning rate, clip range and KL weight keep Flow-GRPO's units). No attention at all gives the uniform
    map. Raises ValueError for a strength out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"allocation strength must lie in [0, 1], got {strength}")
    attention = attention.detach().float()
    mean = attention.mean(-1, keepdim=True)
    relative = torch.where(mean == 0, torch.ones_like(mean), attention / mean)  # a NaN stays one, to be noticed
    return (1 - strength) + strength * relative


def arrange_allocation(attention, arm, strength, generators, trained):
    """The maps of one arm: attention (STAR) or one of its controls. attention [T, B, P] -> allocation [T, B, P].

    uniform: M = 1. shuffled: every map permuted over space by its sample's generator: the same weights in the wrong
    places. static: each sample's maps averaged over its first `trained` steps: the places, without the temporal part.
    """
    allocation = allocation_map(attention, strength)
    if arm == "uniform":
        return torch.ones_like(allocation)
    if arm == "static":
        return allocation[:trained].mean(0, keepdim=True).expand_as(allocation)
    if arm == "shuffled":
        steps, _, tokens = allocation.shape
        order = torch.stack(
            [torch.stack([torch.randperm(tokens, generator=g) for g in generators]) for _ in range(steps)]
        )
        return allocation.gather(-1, order.to(allocation.device))
    return allocation


# ---------------------------------------------------------------------------------------------------------------------
# 4. Group-relative advantages, as Flow-GRPO computes them.
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards, group_size):
    """A_i = (r_i - mean of its group) / (std of the whole batch + 1e-4), clamped to [-5, 5].

    rewards [B], groups contiguous: rows 0..group_size-1 are the first prompt's. Returns [B] fp32.
    A group of equal rewards gives exactly 0. Raises ValueError if B does not divide or a reward is not finite.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not a finite number")
    groups = rewards.double().view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards become exact zeros before the mean can round
    centred = groups - groups.mean(1, keepdim=True)
    std = rewards.double().std(correction=0)  # over the whole batch: Flow-GRPO's global std
    return (centred / (std + 1e-4)).clamp(-5, 5).flatten().float()


# ---------------------------------------------------------------------------------------------------------------------
# 5. The spatially resolved clipped objective, and the scalar baseline it reduces to.
# ---------------------------------------------------------------------------------------------------------------------


def clipped_objective(log_ratio, advantages, clip_range):
    """PPO's -min(rho A, clip(rho, 1 - eps, 1 + eps) A), elementwise, and the statistics of rho. Shapes broadcast."""
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return loss.mean(), ratio_stats(log_ratio, clip_range)


@torch.no_grad()
def ratio_stats(log_ratio, clip_range):
    """How far the policy has moved from the one that sampled: statistics of rho over whatever log_ratio's shape is."""
    ratio = log_ratio.exp()
    return {
        "ratio": ratio.mean(),
        "ratio_deviation": (ratio - 1).abs().max(),
        "clip_high": (ratio > 1 + clip_range).float().mean(),
        "clip_low": (ratio < 1 - clip_range).float().mean(),
        "log_ratio": log_ratio.abs().mean(),
        "approximate_kl": 0.5 * (log_ratio**2).mean(),
    }


def allocation_stats(allocation):
    """How concentrated the maps [B, P] are: entropy (1 = uniform, 0 = one token), maximum, share of the top tenth."""
    tokens = allocation.shape[-1]
    share = allocation / tokens  # a distribution over the image
    return {
        "allocation_entropy": -torch.special.xlogy(share, share).sum(-1).mean() / math.log(max(tokens, 2)),
        "allocation_max": allocation.amax(-1).mean(),
        "allocation_top10": share.topk(max(1, round(tokens / 10)), dim=-1).values.sum(-1).mean(),
    }


def star_objective(log_prob, old_log_prob, advantages, allocation, clip_range):
    """STAR's spatially resolved clipped objective: every region p has its own ratio and its own share of the advantage.

        A_p = M_p A,    eps_p = eps sqrt(P)
        L   = -mean_p min( rho_p A_p, clip(rho_p, 1 - eps_p, 1 + eps_p) A_p )

    log_prob, old_log_prob, allocation [B, P]; advantages [B]; clip_range is eps, the image-level one (Flow-GRPO: 1e-4).
    The mean over a region has P times fewer terms than the mean over the image, so its log-ratio spreads sqrt(P) times
    wider, and the clip range widens with it (ours; the paper's abstract does not say). Gradient flows through log_prob
    alone; at theta = theta_old and M = 1 it is flow_grpo_objective's exactly. Returns (loss scalar, stats).
    """
    allocation = allocation.detach()
    token_clip_range = clip_range * math.sqrt(log_prob.shape[-1])
    loss, stats = clipped_objective(
        log_prob - old_log_prob.detach(), allocation * advantages[:, None], token_clip_range
    )
    return loss, stats | allocation_stats(allocation)


def flow_grpo_objective(log_prob, old_log_prob, advantages, clip_range):
    """Flow-GRPO's objective (arXiv 2505.05470): one ratio exp(mean_p(l_p - l_p_old)) and one advantage an image.

    log_prob, old_log_prob [B, P]; advantages [B]. Returns (loss scalar, stats).
    """
    return clipped_objective((log_prob - old_log_prob.detach()).mean(-1), advantages, clip_range)


def kl_to_reference(mean, reference_mean, std, dt):
    """KL of the step from the reference policy's: mean of (mean - reference_mean)^2 / (2 std_dev^2), Flow-GRPO's form.

    mean, reference_mean [B, C, H, W]; std and dt as of sde_mean_std. std_dev = std / sqrt(-dt) leaves sqrt(-dt) out, as
    Flow-GRPO does, so that its weights (0.04 ocr and geneval, 0.01 pickscore) carry over. Returns a scalar.
    """
    return ((mean - reference_mean.detach()) ** 2).mean() * (-dt) / (2 * std**2)


def step_weights(sigmas, noise_level, mode):
    """How loud each trained step speaks: "none", all 1 (Flow-GRPO); "equal", std / |d mean / d velocity|, of mean 1.

    The gradient with respect to the velocity goes as |d mean / d velocity| / std, which at 10 steps grows 26-fold from
    the first step to the ninth; "equal" undoes that, and loudness() does the same for the maps (ours, off by default
    for SD3.5).
    sigmas: the sampler's grid, T + 1 floats from 1 to 0. Returns T - 1 floats: the last step is never trained.
    """
    trained = len(sigmas) - 2
    if mode == "none":
        return [1.0] * trained
    zero, one = torch.zeros(()), torch.ones(())
    weights = []
    for sigma, sigma_next in zip(sigmas[:trained], sigmas[1:]):
        gain, std = sde_mean_std(zero, one, sigma, sigma_next, sigmas[1], noise_level)  # the mean is linear in v
        weights.append(std / abs(gain.item()))
    return [weight * trained / sum(weights) for weight in weights]


# ---------------------------------------------------------------------------------------------------------------------
# The second method: FDFO, Finite Difference Flow Optimization (arXiv 2603.12893). Here the whole sampling run is one
# action. Two trajectories share their noise but for a little ("churn"), and the velocity is pulled toward the better
# image of the pair. STAR's map fits on it too: --method fdfo --allocation attention (ours, in neither paper).
# ---------------------------------------------------------------------------------------------------------------------


def churn_step(latents, velocity, sigma, sigma_next, churn, noise):
    """One Euler step that overshoots to r < s = sigma_next and is noised back to exactly s.

        r = s / (1 + g (1 - s)),    y = x + (r - sigma) v,    x' = (y + r sqrt((1 + g)^2 - 1) eps) / (1 + g r)

    latents, velocity, noise (eps, N(0, I)) [B, C, H, W]; churn is g >= 0. Returns [B, C, H, W] fp32. g = 0 is the Euler
    step exactly, and so is the last one (s = 0). From sigma = s = 1 it mixes a share of eps into pure noise: the start
    of one branch. Raises ValueError for a negative g or a sigma that goes up.
    """
    if churn < 0:
        raise ValueError(f"churn must be 0 or more, got {churn}")
    if not 0 <= sigma_next <= sigma <= 1:
        raise ValueError(f"a step must not go up in sigma, within [0, 1]: got {sigma} -> {sigma_next}")
    low = sigma_next / (1 + churn * (1 - sigma_next))
    overshot = latents.float() + (low - sigma) * velocity.float()
    return (overshot + low * math.sqrt((1 + churn) ** 2 - 1) * noise) / (1 + churn * low)


def fdfo_direction(final_latents, rewards):
    """In a pair, which way is the better image, and by how much better is it?

        dR = r - mean of the pair,    delta = x_0 - mean of the pair,    d = delta / (<delta^2> + 1e-6)

    final_latents [2K, C, H, W], interleaved a0 b0 a1 b1 ...; rewards [2K]; < > is the mean over C, H, W. Returns
    (reward_difference dR [2K] fp32, raw: no std, no clip; direction d [2K, C, H, W] fp32). dR d is the same in both
    branches, and on average the reward's gradient. ValueError for an odd number or a reward that is not finite.
    """
    if len(rewards) % 2 or len(final_latents) != len(rewards):
        raise ValueError(f"{len(final_latents)} latents and {len(rewards)} rewards do not make pairs")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not a finite number")

    def from_pair_mean(values):  # half the difference, with opposite signs: exactly 0 for a tie
        first, second = values[0::2], values[1::2]
        half = (first - second) / 2
        return torch.stack([half, -half], dim=1).flatten(0, 1)

    delta = from_pair_mean(final_latents.float())
    scale = delta.square().mean((1, 2, 3), keepdim=True) + 1e-6
    return from_pair_mean(rewards.double()).float(), delta / scale


def fdfo_objective(velocity, old_velocity, reward_difference, direction, clip_range, allocation=None):
    """FDFO's objective of one step: pull v toward v_old - d where dR > 0, away from it where dR < 0, and not too far.

        dv  = v - v_old,    rho = exp(-<dv (dv + 2 d)>)       i.e. exp(-<(v - v*)^2> + <d^2>) with v* = v_old - d
        L   = mean_B( -dR rho + |dR| / (2 eps) (rho - 1)^2 )  whose optimum is rho = 1 + eps sign(dR)

    velocity, old_velocity, direction [B, C, H, W]; reward_difference [B]; clip_range is eps (0.03); < > the mean over
    C, H, W. allocation [B, P] of mean 1 makes < > the M-weighted mean, every token's weight on its whole latent patch;
    M = 1 is plain FDFO bitwise. Gradient flows through velocity alone. Returns (loss scalar, stats).
    """
    difference = velocity.float() - old_velocity.detach().float()
    product = difference * (difference + 2 * direction)
    if allocation is not None:
        height, width = velocity.shape[-2:]
        patch = math.isqrt(height * width // allocation.shape[-1])
        maps = allocation.detach().view(-1, 1, height // patch, width // patch)
        product = product * maps.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    log_ratio = -product.mean((1, 2, 3))
    ratio = log_ratio.exp()
    penalty = reward_difference.abs() / (2 * clip_range) * (ratio - 1) ** 2
    stats = ratio_stats(log_ratio, clip_range)
    if allocation is not None:
        stats |= allocation_stats(allocation)
    return (penalty - reward_difference * ratio).mean(), stats


# ======================================================================================================================
# Settings: one dataclass, and the command line is made from it. `None` means: by model, see PRESETS.
# ======================================================================================================================


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    task: str = setting(
        "ocr", "what the reward measures: ocr, is the quoted text readable? geneval, are the objects there, in number, "
        "colour and place? pickscore, would people like it? (the last two: SD3 / SD3.5 only)"
    )  # fmt: skip
    model: str | None = setting(
        None, "tiny (embedded, downloads nothing), an SD3 / SD3.5 id on the hub or a local folder, or random (SD3.5 "
        "Medium's architecture with random weights, to measure speed and memory); default: "
        "stabilityai/stable-diffusion-3.5-medium with a CUDA device, else tiny"
    )  # fmt: skip
    method: str = setting(
        "star", "star (an advantage for every region), flow-grpo (one scalar for the whole image) or fdfo (paired "
        "trajectories, pulled toward the better image)"
    )  # fmt: skip
    allocation: str | None = setting(
        None, "maps of star and fdfo: attention (star's default), uniform (all 1; fdfo's default), or a control: "
        "shuffled (over space), static (over steps)"
    )  # fmt: skip
    reward_model: str | None = setting(
        None, "a local copy of the reward's weights. geneval: a folder with detector/ (Mask2Former) and clip/ in it; "
        "pickscore: a folder or hub id with model and processor; ocr needs none. Default: from the hub"
    )  # fmt: skip
    evaluate: str | None = setting(
        None, "do not train: score this saved model (a run's folder, or its transformer/) on the test prompts"
    )
    allocation_strength: float = setting(1.0, "lambda: 0 uniform, 1 the attention map alone (paper silent; ours)")
    attention_blocks: str | None = setting(
        None, "joint blocks to read, e.g. 9 or 8,9,10 (SD3.5: 9, Seg4Diff's finding; tiny: its last)"
    )
    step_weights: str | None = setting(
        None, "none (Flow-GRPO; SD3.5's default) or equal: every denoising step speaks equally loud (tiny's default)"
    )
    iterations: int | None = setting(None, "rounds of sampling and updating")
    prompts_per_iteration: int | None = setting(None, "groups an iteration")
    group_size: int | None = setting(None, "images a prompt, compared with each other; at least 2 (Flow-GRPO: 24)")
    batch_size: int | None = setting(None, "images a forward pass, in sampling and update alike; memory goes with it")
    optimizer_steps: int | None = setting(None, "optimizer steps an iteration, one pass over the images")
    learning_rate: float | None = setting(None, "AdamW's, constant; all weights train (no LoRA)")
    clip_range: float | None = setting(None, "eps of an image-level ratio; star's regions have eps sqrt(P)")
    kl: float | None = setting(None, "weight of the KL to the starting model; 0 keeps no reference copy")
    guidance: float | None = setting(None, "classifier-free guidance, in sampling, update and evaluation; 1 = off")
    sampling_steps: int | None = setting(
        None, "denoising steps of a rollout; star and flow-grpo train all but the last (10: Flow-GRPO)"
    )
    noise_level: float = setting(0.7, "a of the SDE sampler: how much each step explores (Flow-GRPO: 0.7)")
    churn: float | None = setting(
        None,
        "fdfo only: g, the share of fresh noise a step in which the two of a pair differ; default 0.1 / steps "
        "(tiny: 0.1)",
    )
    eval_every: int | None = setting(None, "iterations between evaluations on the test prompts")
    eval_steps: int | None = setting(None, "denoising steps of the deterministic sampler in evaluation")
    resolution: int | None = setting(None, "pixels a side")
    t5_length: int | None = setting(None, "text positions for T5 (Flow-GRPO: 128); 0 leaves T5 out")
    gradient_checkpointing: str = setting(
        "auto",
        "on, off or auto (on where memory asks for it): by count, a third more arithmetic in the update, a tenth of "
        "its activations",
    )
    compile: bool = setting(
        False, "compile the transformer's blocks (diffusers' regional compilation; CUDA). Off until it is measured"
    )
    optimizer_device: str = setting("auto", "cuda, cpu (host memory) or auto: where master weights and moments live")
    dtype: str | None = setting(None, "bf16 or fp32: the weights of forward and backward; the optimizer's are fp32")
    train_prompts: str | None = setting(None, "file, one prompt a line (geneval: JSON lines); Flow-GRPO's files work")
    test_prompts: str | None = setting(None, "file, likewise; evaluated in order")
    seed: int = setting(0, "of everything random in the run")
    out: str | None = setting(None, "the run's folder, new or empty; default runs/<task>-<model>-<method>-<time>")
    save_every: int = setting(5, "iterations between checkpoints; there is also one at the start and at the end")
    keep: int = setting(2, "checkpoints to keep, the newest; one holds 12 bytes a parameter")
    resume: bool = setting(
        False, "go on from the newest whole checkpoint, with the run's own settings: of --out, else of the run under "
        "runs/ that was saved last"
    )  # fmt: skip

    @property
    def blocks(self):
        return tuple(int(block) for block in self.attention_blocks.split(","))

    @property
    def mark(self):
        return RANDOM if self.model == "random" else ""


METHODS = {  # stands above the model's preset; STAR's abstract names the attention only: the rest is Flow-GRPO's
    "star": dict(allocation="attention", optimizer_steps=2, clip_range=1e-4),
    "flow-grpo": dict(allocation="uniform", optimizer_steps=2, clip_range=1e-4),  # Flow-GRPO
    "fdfo": dict(  # FDFO
        allocation="uniform", optimizer_steps=4, clip_range=0.03, step_weights="none", kl=0.0, guidance=1.0,
    ),
}  # fmt: skip
PRESETS = {
    "tiny": dict(  # all ours, from a few runs of some minutes on two cores
        attention_blocks="3", step_weights="equal", iterations=45, prompts_per_iteration=8, group_size=16,
        batch_size=32, learning_rate=1.5e-4, kl=0.0, guidance=1.0, sampling_steps=10, eval_every=10, eval_steps=10,
        resolution=48, t5_length=0, dtype="fp32", train_prompts="prompts/tiny/train.txt",
        test_prompts="prompts/tiny/test.txt",
    ),
    "sd3": dict(
        attention_blocks="9",  # Seg4Diff (arXiv 2509.18096): block 9 of 24 localises best in SD3 and SD3.5
        step_weights="none",  # Flow-GRPO
        iterations=1000,  # ours: stop when you like
        prompts_per_iteration=16,  # ours: Flow-GRPO's 48 are for 24 GPUs; below 1.5 s an image, under ten minutes
        group_size=24,  # Flow-GRPO; 12 and 6 collapsed on PickScore
        batch_size=2,  # ours: with guidance four sequences, 13 GB of activations (1 GB with checkpointing)
        learning_rate=1e-5,  # full-parameter users of Flow-GRPO; its own 3e-4 is for LoRA; 5e-6 is safer
        kl=0.04,  # Flow-GRPO, for ocr and geneval; pickscore see below
        guidance=4.5,  # Flow-GRPO
        sampling_steps=10,  # Flow-GRPO
        eval_every=50,  # ours
        eval_steps=40,  # Flow-GRPO
        resolution=512,  # Flow-GRPO
        t5_length=128,  # Flow-GRPO
        dtype="bf16",  # ours: Flow-GRPO takes fp16 with LoRA
        train_prompts="prompts/{task}/train.{suffix}",
        test_prompts="prompts/{task}/test.{suffix}",
    ),
}  # fmt: skip
PICKSCORE_KL = 0.01  # Flow-GRPO
TINY_METHODS = {  # ours, from the rollout rewards of a few short runs
    "star": dict(clip_range=1e-3),  # 1e-4 clips a quarter of the tokens after one step, and what is left pulls back
    "fdfo": dict(learning_rate=3e-5, churn=0.1),  # 1.5e-4 unlearns; with churn 0.01 most pairs read the same
}


def preset_help():
    lines = ["defaults that depend on the model:", f"  {'':24s}{'tiny':26s}SD3 / SD3.5"]
    sd3 = PRESETS["sd3"] | {"kl": f"{PRESETS['sd3']['kl']} (pickscore {PICKSCORE_KL})"}
    lines += [f"  {name:24s}{value!s:26s}{sd3[name]}" for name, value in PRESETS["tiny"].items()]
    lines += ["", "defaults that depend on the method, and stand above the model's:"]
    methods = METHODS | {f"tiny {name}": values for name, values in TINY_METHODS.items()}
    lines += [f"  {name:12s}" + "  ".join(f"{k}={v}" for k, v in values.items()) for name, values in methods.items()]
    return "\n".join(lines)


CHOICES = {
    "task": ("ocr", "geneval", "pickscore"),
    "method": ("star", "flow-grpo", "fdfo"),
    "allocation": ("attention", "uniform", "shuffled", "static"),
    "step_weights": ("none", "equal"),
    "gradient_checkpointing": ("auto", "on", "off"),
    "optimizer_device": ("auto", "cuda", "cpu"),
    "dtype": ("bf16", "fp32"),
}


# ======================================================================================================================
# The trainer: roll out groups of images, reward them, update. The method ends above; this is how it is run.
# ======================================================================================================================


@dataclass
class Trajectory:
    """One microbatch of rollouts: what the update needs to take the same forward passes again, on the same rows."""

    text: Callable  # () -> (embeddings [B or 2B, N, D], pooled [B or 2B, D]); with CFG the empty prompt's half first
    latents: torch.Tensor  # [T + 1, B, C, H, W] fp32, from pure noise to the final latents
    log_prob: torch.Tensor | None  # [T, B, P] under the policy that sampled them; None without the SDE's noise
    velocity: torch.Tensor | None  # [T, B, C, H, W], fdfo's v_old; None for the others
    attention: torch.Tensor | None  # [T, B, P], S; None where it was not asked for
    generators: list  # one a sample, in the state after its noise
    allocation: torch.Tensor | None = None  # [T, B, P], M
    advantages: torch.Tensor | None = None  # [B], A; fdfo: dR
    direction: torch.Tensor | None = None  # [B, C, H, W], fdfo's d
    rows: torch.Tensor | None = None  # [B]: which of the iteration's images these are


def predict_velocity(transformer, latents, sigma, text, guidance):
    """v [B, C, H, W] fp32. guidance g > 1: v = v_empty + g (v_prompt - v_empty), both halves in one batch of 2B."""
    embeddings, pooled = text
    inputs = torch.cat([latents, latents]) if guidance > 1 else latents
    velocity = transformer(
        hidden_states=inputs.to(transformer.dtype),
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        timestep=torch.full((len(inputs),), sigma * 1000, device=inputs.device),
        return_dict=False,
    )[0].float()
    if guidance > 1:
        empty, prompt = velocity.chunk(2)
        velocity = empty + guidance * (prompt - empty)
    return velocity


def sample_generator(*key):
    """A CPU generator that is a function of its key (seed, iteration, prompt, sample) alone, never of history: its
    noise depends neither on how work is split into batches nor on what was drawn before."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def rollout(transformer, text, core_mask, noise, sigmas, noise_level, churn, guidance, blocks=(), keep=True):
    """Sample one microbatch from pure noise to images in latent space.

    noise [B, T + 1, C, H, W]: the start, then each step's; churn > 0 takes FDFO's steps, else the SDE's, of which
    noise_level 0 is the deterministic sampler of evaluation, for which the start is enough; blocks: where to capture
    attention, none for no capture; keep=False: only the final latents. Returns (latents, log_prob, velocity,
    attention), as Trajectory describes them.
    """
    latents, log_probs, velocities, attention = [noise[:, 0]], [], [], []
    with capture_attention(transformer, core_mask, blocks) as captured:
        for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
            velocity = predict_velocity(transformer, latents[-1], sigma, text, guidance)
            if churn > 0:
                step = churn_step(latents[-1], velocity, sigma, sigma_next, churn, noise[:, i + 1])
                velocities.append(velocity)
            else:
                mean, std = sde_mean_std(latents[-1], velocity, sigma, sigma_next, sigmas[1], noise_level)
                step = mean + std * noise[:, i + 1] if std > 0 else mean
                if std > 0:
                    log_probs.append(token_log_prob(step, mean, std, transformer.config.patch_size))
            latents = (latents if keep else []) + [step]
            if blocks:
                attention.append(torch.stack(captured).mean(0))  # over blocks -> [B, P]
                captured.clear()
    stacks = (torch.stack(steps) if steps else None for steps in (log_probs, velocities, attention))
    return torch.stack(latents), *stacks


def sample_noise(key, prompt, sample, draws, shape, churn=0.0):
    """One trajectory's noise [draws, C, H, W] (its start, then each step's) and its generator in the state after it.

    With churn, samples 2k and 2k + 1 of a prompt start from the same noise but for FDFO's first re-noising.
    """
    generator = sample_generator(*key, prompt, sample)
    noise = torch.randn(draws, *shape, generator=generator)
    if churn > 0:
        shared = torch.randn(shape, generator=sample_generator(*key, prompt, "pair", sample // 2))
        noise[0] = churn_step(shared, torch.zeros(shape), 1.0, 1.0, churn, noise[0])
    return noise, generator


def spread_text(text, empty, slots):
    """The features of a microbatch, from those of the prompts [K, ...]: made when needed, for T5's are large."""
    text = tuple(features[slots] for features in text)
    return text if empty is None else tuple(torch.cat([e.expand_as(t), t]) for e, t in zip(empty, text))


def sample_groups(
    policy, prompts, copies, settings, key, sigmas, noise_level, churn=0.0, reward=None, blocks=(), keep=True
):
    """Roll out `copies` images of every prompt; rewards are computed in other threads (on a GPU, while it samples on).

    prompts: list of Prompt, K of them. key: what the noise depends on besides (prompt, sample): (seed, iteration).
    keep=False: no trajectories, only images, as evaluation wants it.
    Returns (trajectories, images [K * copies, 3, h, w] uint8, futures of their rewards), rows of a prompt together;
    under torchrun the microbatches are dealt to the processes, and these are the rows dealt to this one.
    """
    embeddings, pooled = policy.encode([prompt.text for prompt in prompts])  # [K, ...]: every prompt once
    empty = policy.empty_prompt if settings.guidance > 1 else None
    masks = policy.core_mask(prompts)
    trajectories, jobs, pending = [], [], []
    images = [torch.empty(0, 3, settings.resolution, settings.resolution, dtype=torch.uint8)]  # if none are dealt here
    draws = len(sigmas) if noise_level > 0 or churn > 0 else 1  # the start, and every step's noise where there is any
    for rows in dealt_rows(len(prompts) * copies, settings.batch_size):
        slots = rows // copies
        noise, generators = zip(*[
            sample_noise(key, row // copies, row % copies, draws, policy.latent_shape, churn)
            for row in rows.tolist()
        ])  # fmt: skip
        noise = torch.stack(noise).to(policy.device)
        text = functools.partial(spread_text, (embeddings, pooled), empty, slots)
        steps = rollout(
            policy.transformer, text(), masks[slots], noise, sigmas, noise_level, churn, settings.guidance, blocks, keep
        )
        if keep:
            trajectories.append(Trajectory(text, *steps, generators, rows=rows))
        images.append(policy.decode(steps[0][-1]))
        jobs.append((images[-1], [prompts[slot] for slot in slots]))
        if reward is not None and policy.device.type != "cpu":  # the GPU samples on while the CPU reads
            pending += reward.submit(*jobs.pop())
    if reward is not None:  # on the CPU alone the two would only be in each other's way
        pending += [future for job in jobs for future in reward.submit(*job)]
    return trajectories, torch.cat(images), pending


def policy_loss(settings, trajectory, i, velocity, sigmas, patch_size):
    """The objective of one microbatch at step i: (loss, stats, mean, std); fdfo's steps have no density to speak of."""
    advantages = trajectory.advantages
    allocation = None if trajectory.allocation is None else trajectory.allocation[i]
    if settings.method == "fdfo":
        old = trajectory.velocity[i]
        loss, stats = fdfo_objective(velocity, old, advantages, trajectory.direction, settings.clip_range, allocation)
        return loss, stats, None, None
    mean, std = sde_mean_std(trajectory.latents[i], velocity, sigmas[i], sigmas[i + 1], sigmas[1], settings.noise_level)
    log_prob = token_log_prob(trajectory.latents[i + 1], mean, std, patch_size)
    if settings.method == "flow-grpo":
        loss, stats = flow_grpo_objective(log_prob, trajectory.log_prob[i], advantages, settings.clip_range)
    else:
        loss, stats = star_objective(log_prob, trajectory.log_prob[i], advantages, allocation, settings.clip_range)
    return loss, stats, mean, std


def deal(trajectories, trained, settings, key):
    """Which (microbatch, denoising step) goes into which optimizer step of the iteration: a list of lists.

    star and flow-grpo take whole trajectories, one after the other, as Flow-GRPO does; fdfo takes some steps of every
    trajectory, by a shuffle of its own for each, so that every optimizer step sees all prompts and all noise levels.
    """
    rounds = [[] for _ in range(settings.optimizer_steps)]
    for index, trajectory in enumerate(trajectories):
        if settings.method == "fdfo":
            number = int(trajectory.rows[0]) // settings.batch_size  # among all processes' microbatches
            order = torch.randperm(trained, generator=sample_generator(*key, "update", number)).tolist()
            chosen = [(place * len(rounds) // trained + number) % len(rounds) for place in order]
        else:
            chosen = [index * len(rounds) // len(trajectories)] * trained
        for i in range(trained):
            rounds[chosen[i]].append((trajectory, i))
    return rounds


def loudness(trajectory, i, settings):
    """A map of mean 1 that is concentrated on few tokens makes a step's gradient larger by its root mean square, and
    maps concentrate as sigma falls. --step-weights equal takes that out too; M = 1 has loudness 1."""
    if settings.step_weights == "none" or trajectory.allocation is None:
        return 1.0
    return trajectory.allocation[i].square().mean().sqrt().item()


@torch.no_grad()
def renew_old(settings, trajectory, i, velocity, sigmas, patch_size):
    """With --compile, rollout and update may be other kernels, and their difference would pass for a ratio. So before
    anything has changed, the old side is taken anew from the update's own forward. Returns the mean |log-ratio| that
    this takes away (fdfo: 0)."""
    if settings.method == "fdfo":
        trajectory.velocity[i] = velocity
        return 0.0
    mean, std = sde_mean_std(trajectory.latents[i], velocity, sigmas[i], sigmas[i + 1], sigmas[1], settings.noise_level)
    log_prob = token_log_prob(trajectory.latents[i + 1], mean, std, patch_size)
    gap = (log_prob - trajectory.log_prob[i]).abs().mean().item()
    trajectory.log_prob[i] = log_prob
    return gap


def update(policy, reference, optimizer, trajectories, sigmas, settings, key=()):
    """One pass over the rollouts in `optimizer_steps` optimizer steps, over the denoising steps that are trained: for
    fdfo all of them, for star and flow-grpo steps 0..T-2 (never the last).

    Every forward repeats one of the rollout's: same rows, same batch, same kernels, so before the first optimizer step
    the ratio is exactly 1. Returns statistics averaged over all microbatches and steps; ratio_deviation is the largest
    |ratio - 1| before the first optimizer step, which must be 0. A step of a loss or gradient not finite is skipped.
    """
    transformer = policy.transformer
    weights = step_weights(sigmas, settings.noise_level, settings.step_weights)
    weights += [1.0] * (settings.method == "fdfo")  # its last step too
    share = len(trajectories) * len(weights) / settings.optimizer_steps  # forwards in an optimizer step
    history, first_deviation, norms, gaps = [], 0.0, [], []
    # Without advantages the gradient is exactly zero. Only whole microbatches are skipped, or the kernels would differ.
    idle = {id(trajectory) for trajectory in trajectories if settings.kl == 0 and not trajectory.advantages.any()}
    rounds = deal(trajectories, len(weights), settings, key)
    rounds = [[(trajectory, i) for trajectory, i in work if id(trajectory) not in idle] for work in rounds]
    forward = lambda trajectory, i: predict_velocity(
        transformer, trajectory.latents[i], sigmas[i], trajectory.text(), settings.guidance
    )
    patch_size = transformer.config.patch_size
    if settings.compile:  # of what is used after the first optimizer step; the rest on the way
        for trajectory, i in sum(rounds[1:], []):
            gaps.append(renew_old(settings, trajectory, i, forward(trajectory, i), sigmas, patch_size))
    for work in rounds:
        for trajectory, i in work:
            latents, sigma, velocity = trajectory.latents[i], sigmas[i], forward(trajectory, i)
            if settings.compile and not norms:
                gaps.append(renew_old(settings, trajectory, i, velocity, sigmas, patch_size))
            loss, stats, mean, std = policy_loss(settings, trajectory, i, velocity, sigmas, patch_size)
            if reference is not None:
                with torch.no_grad():
                    old = predict_velocity(reference, latents, sigma, trajectory.text(), settings.guidance)
                    reference_mean, _ = sde_mean_std(
                        latents, old, sigma, sigmas[i + 1], sigmas[1], settings.noise_level
                    )
                kl = kl_to_reference(mean, reference_mean, std, sigmas[i + 1] - sigma)
                loss, stats["kl"] = loss + settings.kl * kl, kl.detach()
            finite = loss.detach() * 0 + 1  # 1, or NaN where the loss is not finite: then the gradient is not, too
            weight = weights[i] / loudness(trajectory, i, settings)
            (loss * finite * weight / share).backward()
            history.append({name: float(value) for name, value in stats.items()})
            if not norms:
                first_deviation = max(first_deviation, history[-1]["ratio_deviation"])
                gaps += [] if settings.compile else [history[-1]["log_ratio"]]
        norms.append(optimizer.step())
    parts = gather([history, len(idle), first_deviation, gaps])
    history, gaps = ([item for part in parts for item in part[place]] for place in (0, 3))
    skipped, first_deviation = sum(part[1] for part in parts), max(part[2] for part in parts)
    averages = {name: sum(h[name] for h in history) / len(history) for name in (history[0] if history else ())}
    if first_deviation > 0:
        print(
            f"{settings.mark}note: the ratio was off 1 by {first_deviation:.1e} before the first step: rollout and "
            "update differ"
        )
    taken = [norm for norm in norms if math.isfinite(norm)]
    averages |= {"ratio_deviation": first_deviation, "skipped": skipped, "steps_skipped": len(norms) - len(taken)}
    averages["rollout_gap"] = sum(gaps) / max(len(gaps), 1)
    return averages | {"gradient_norm": sum(taken) / len(taken) if taken else math.nan}


class MasterAdamW:
    """LoRA-free bf16 training: every weight trains, and none loses its update to bf16's eight bits.

    The model's own weights (bf16 or fp32) do the forward and backward; fp32 master weights, fp32 gradient accumulators
    and fp32 AdamW moments do the update, whose result is copied back. Each gradient is added to its accumulator and
    freed as soon as backward has made it, so gradients never exist twice. With only a few optimizer steps in an
    iteration of hundreds of images, masters and moments may live in host memory (device "cpu"); accumulators do not.
    Under torchrun the gradient is the mean over the processes, all of which take the same step.
    """

    failures = 0  # steps in a row whose gradient was not finite

    def __init__(self, parameters, learning_rate, device=None):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]
        self.gradients = [None] * len(self.parameters)  # fp32, where the parameters are
        self.optimizer = torch.optim.AdamW(  # Flow-GRPO's settings; foreach would hold a third moment for a moment
            self.masters, lr=learning_rate, weight_decay=1e-4, foreach=False
        )
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None  # nothing of an earlier training may leak into the first step
            parameter.register_post_accumulate_grad_hook(functools.partial(self.accumulate, index))

    def accumulate(self, index, parameter):
        gradient, parameter.grad = parameter.grad, None
        if self.gradients[index] is None:
            self.gradients[index] = gradient.float()
        else:
            self.gradients[index] += gradient

    @torch.no_grad()
    def step(self, max_norm=1.0):
        """Clip the accumulated gradient to max_norm, take one AdamW step, copy back. Returns the unclipped norm; if it
        is not finite, no step was taken. RunStopped after five of those in a row."""
        average_gradients(self.gradients, self.parameters)
        present = [gradient for gradient in self.gradients if gradient is not None]
        norm = float(torch.nn.utils.get_total_norm(present)) if present else 0.0
        self.failures = 0 if math.isfinite(norm) else self.failures + 1
        if self.failures >= 5:
            raise RunStopped("the loss or gradient was not finite in 5 steps in a row; lower --learning-rate")
        for index, master in enumerate(self.masters):
            gradient, self.gradients[index] = self.gradients[index], None
            if gradient is not None and self.failures == 0:
                master.grad = gradient.mul_(min(1.0, max_norm / (norm + 1e-6))).to(master.device)
        if self.failures == 0:
            self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter, master in zip(self.parameters, self.masters):
            parameter.copy_(master)
        return norm

    def state(self):
        """{kind: {parameter's number: tensor}}, all that an exact resume needs: the weights are the rounded masters."""
        kinds = {"master": {str(i): master.detach().contiguous() for i, master in enumerate(self.masters)}}
        for i, moments in self.optimizer.state_dict()["state"].items():
            for kind, value in moments.items():
                kinds.setdefault(kind, {})[str(i)] = value.contiguous()
        return kinds

    @torch.no_grad()
    def load_state(self, kinds):
        """Take up a state() again: all of it, or ValueError or LookupError."""
        moments = {}
        for kind, tensors in kinds.items():
            for i, tensor in tensors.items():
                if tensor.shape not in (self.masters[int(i)].shape, ()):
                    raise ValueError(f"{kind} {i} has the wrong shape")
                moments.setdefault(int(i), {})[kind] = tensor.clone()  # load_file maps the file, which may go
        for i, (parameter, master) in enumerate(zip(self.parameters, self.masters)):
            parameter.copy_(master.copy_(moments[i].pop("master")))
        moments = {i: state for i, state in moments.items() if state}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


# ======================================================================================================================
# Plumbing: models, prompts, rewards, pictures, files, the command line.
# ======================================================================================================================

ROOT = Path(__file__).resolve().parent


class BadInput(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


def need(condition, message, error=BadInput):
    if not condition:
        raise error(message)


class RunStopped(Exception):
    """The run cannot go on: printed as one line with the newest checkpoint's name, exit status 1."""


class Prompt(NamedTuple):
    text: str
    metadata: dict | None = None  # geneval's line


class Policy:
    """The model from text to pixels, around a diffusers StableDiffusion3Pipeline: SD3.5 or the embedded one alike."""

    def __init__(self, pipe, settings, device):
        depth = len(pipe.transformer.transformer_blocks)
        if max(settings.blocks) >= depth:
            raise BadInput(f"--attention-blocks {settings.attention_blocks}: the model's blocks are 0..{depth - 1}")
        self.pipe, self.settings, self.device = pipe, settings, torch.device(device)
        self.transformer = pipe.transformer.to(device).eval()
        self.encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if e is not None]
        for module in (pipe.vae.to(device), *self.encoders):
            module.requires_grad_(False)
        scale = pipe.vae_scale_factor
        size = settings.resolution // scale
        self.latent_shape = (self.transformer.config.in_channels, size, size)
        largest = self.transformer.config.pos_embed_max_size * self.transformer.config.patch_size
        if size > largest:
            raise BadInput(f"--resolution {settings.resolution}: the model knows places up to {largest * scale} px")
        self.noted = False  # that a prompt's core content was lost to truncation: said once

    def embed(self, texts):
        """(embeddings [K, N, D], pooled [K, D]): CLIP's positions, then T5's (zeros where there is no T5)."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.settings.t5_length,
        )  # fmt: skip
        return embeddings.to(self.transformer.dtype), pooled.to(self.transformer.dtype)

    @torch.no_grad()
    def encode(self, texts):
        """embed(), with the text encoders on the device only while they encode."""
        for encoder in self.encoders:
            encoder.to(self.device)
        parts = [self.embed(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        if self.device.type != "cpu":
            for encoder in self.encoders:
                encoder.to("cpu")
        return tuple(torch.cat(part) for part in zip(*parts))

    @functools.cached_property
    def empty_prompt(self):
        return self.encode([""])

    def core_mask(self, prompts):
        """[K, N] bool: the core content's positions in the joint text sequence, CLIP's first, then T5's. Never empty:
        where truncation has cut the core content off, the content tokens that are left stand in, with a note once."""
        segments = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]
        if self.pipe.text_encoder_3 is not None:
            segments += [(self.pipe.tokenizer_3, self.settings.t5_length)]
        rows = []
        for prompt in prompts:
            offsets = []
            for tokenizer, length in segments:
                encoding = tokenizer(
                    prompt.text, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
                )
                offsets += encoding["offset_mapping"]
            row = token_mask(core_spans(prompt.text, self.settings.task, prompt.metadata), offsets)
            if not any(row):
                row = token_mask(content_spans(prompt.text), offsets)
                row = row if any(row) else token_mask([(0, len(prompt.text))], offsets)
                if not self.noted:
                    print(
                        f"note: {prompt.text[:60]!r}... is cut off before its core content: all words stand in for it"
                    )
                self.noted = True
            rows.append(row)
        masks = torch.tensor(rows, device=self.device)
        if self.pipe.text_encoder_3 is None:  # the zeros that stand where T5's positions would
            masks = F.pad(masks, (0, self.settings.t5_length))
        return masks

    @torch.no_grad()
    def decode(self, latents):
        """Latents [B, C, H, W] -> images [B, 3, h, w] uint8 on the CPU."""
        vae = self.pipe.vae
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).cpu()

    def sigmas(self, steps):
        """The scheduler's own grid: T + 1 floats from 1 to 0."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()


def load_policy(settings, reward, device):
    """SD3 / SD3.5 from the hub or a local folder, its architecture with random weights, or the embedded tiny model.
    Resolves the settings that say "auto", before anything big is loaded."""
    if settings.model == "tiny":
        settings.gradient_checkpointing = settings.gradient_checkpointing.replace("auto", "off")
        settings.optimizer_device = "cpu"
        make_folder(cache_folder())
        with locked(cache_folder() / "lock", wait=True):  # one process pre-trains it, the others find it
            return tiny_policy(settings, reward, device)
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    try:
        if settings.model == "random":
            config = SD35_MEDIUM
        else:
            found = StableDiffusion3Pipeline.load_config(settings.model).get("_class_name", "nameless model")
            if found != "StableDiffusion3Pipeline":
                raise BadInput(f"--model {settings.model} holds a {found}; star.py trains StableDiffusion3Pipeline")
            config = SD3Transformer2DModel.load_config(settings.model, subfolder="transformer")
        plan_memory(settings, config, device)
        if settings.model == "random":
            policy = RandomPolicy(random_pipeline(settings, device), settings, device)
        else:
            without_t5 = {} if settings.t5_length else {"text_encoder_3": None, "tokenizer_3": None}
            pipe = StableDiffusion3Pipeline.from_pretrained(
                settings.model, dtype=DTYPES[settings.dtype], use_safetensors=True, **without_t5
            )
            policy = Policy(pipe, settings, device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # not there, not whole, not what it should be
        raise BadInput(f"--model {settings.model}: {why_not_loaded(settings.model, error)}") from error
    if settings.gradient_checkpointing == "on":
        policy.transformer.enable_gradient_checkpointing()
    if settings.compile:
        compile_blocks(policy.transformer)
    return policy, None


def why_not_loaded(model, error):
    """One line for what a loader raised: the loaders' own first line hides that a model is gated, or the hub away."""
    reasons, cause = set(), error
    while cause is not None:
        reasons |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if Path(model).is_dir():
        return str(error).strip().splitlines()[0]
    if "GatedRepoError" in reasons:
        why = "no access to its weights"
    elif reasons & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
        why = "not in the local cache, and the hub cannot be reached"
    else:
        why = str(error).strip().splitlines()[0]
    return (
        f"{why} (SD3.5 is gated: accept its licence at https://huggingface.co/{SD35}, then run `hf auth login`; "
        "--model tiny needs nothing)"
    )


def compile_blocks(transformer):
    """diffusers' regional compilation: a graph for each kind of block and each way of calling it (batch, gradient,
    attention captured). Those are 13 in a run; after 8 torch would go on uncompiled."""
    torch._dynamo.config.recompile_limit = 64
    transformer._repeated_blocks = ["JointTransformerBlock"]  # diffusers names none for SD3
    transformer.compile_repeated_blocks()


def frozen_copy(transformer, settings):
    """The KL term's reference: the model as it is now."""
    reference = copy.deepcopy(transformer).requires_grad_(False)
    if settings.compile:  # a copy is not compiled
        compile_blocks(reference)
    return reference


def plan_memory(settings, config, device):
    """Settle --optimizer-device and --gradient-checkpointing by the memory there is; BadInput where nothing fits."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        parameters = sum(p.numel() for p in SD3Transformer2DModel.from_config(config).parameters())
    cuda = torch.device(device).type == "cuda"
    host = math.inf if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    capacity = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else host
    if settings.evaluate:  # no gradients, no optimizer
        settings.gradient_checkpointing, settings.optimizer_device = "off", "cpu"
    options = [  # the fastest first
        dataclasses.replace(settings, optimizer_device=optimizer, gradient_checkpointing=checkpointing)
        for optimizer in (("cuda", "cpu") if cuda else ("cpu",))
        for checkpointing in ("off", "on")
        if settings.optimizer_device in ("auto", optimizer)
        and settings.gradient_checkpointing in ("auto", checkpointing)
    ]
    if not options:
        raise BadInput("--optimizer-device cuda: there is no CUDA device")
    for option in options:
        needed, in_host = memory_needed(option, config, parameters, cuda)
        if needed <= capacity and in_host <= host:
            settings.optimizer_device = option.optimizer_device
            settings.gradient_checkpointing = option.gradient_checkpointing
            if cuda and not settings.evaluate:
                how = f"--optimizer-device {option.optimizer_device}"
                how += f" --gradient-checkpointing {option.gradient_checkpointing}"
                print(f"{settings.mark}about {needed:.0f} of {capacity:.0f} GB of GPU memory expected ({how})")
            return
    if needed <= capacity:
        raise BadInput(
            f"about {in_host:.0f} GB of host memory needed, {host:.0f} GB there: for the text encoders and, with the "
            "optimizer on the CPU, masters and moments; --t5-length 0 leaves out the largest encoder"
        )
    smallest = dataclasses.replace(
        settings, batch_size=1, kl=0.0, guidance=1.0, t5_length=0, resolution=256, optimizer_device="cpu",
        gradient_checkpointing="on",
    )  # fmt: skip
    least = memory_needed(smallest, config, parameters, cuda)[0]
    free, others = lighter(option)
    advice = f"try {', '.join(free + others)}" if least <= capacity else f"{least:.0f} GB with every option against it"
    raise BadInput(f"about {needed:.0f} GB of {'GPU ' * cuda}memory needed, {capacity:.0f} GB there; {advice}")


def memory_needed(settings, config, parameters, cuda):
    """(GB on the device that computes, GB in the host besides), estimated before anything is loaded.

    Bytes a parameter: 2 bf16 weight, 4 fp32 gradient, 12 fp32 master and moments, 2 bf16 KL reference. Activations of
    SD3's blocks: 58 bytes x width x tokens a block, and 28 x width x image tokens more where it has a second attention,
    counted from what autograd keeps of a bf16 forward (fp32: twice that); with checkpointing only each block's inputs
    stay, and one block's activations. Before there are gradients and activations, the text encoders have their turn.
    4 GB for CUDA, decoding and the captured attention, and 4 GB for a reward's networks, are a guess.
    """
    size = 2 if settings.dtype == "bf16" else 4  # bytes a number
    encoders = (5.5e9 if settings.t5_length else 0.8e9) * size
    if settings.model == "random" or config["joint_attention_dim"] < 4096:  # none, or not SD3's own: a miniature
        encoders = 0
    others = 4e9 * cuda + 4e9 * (settings.task != "ocr" and settings.model != "random")
    standing = parameters * size + others
    if settings.evaluate:
        return (standing + encoders) / 1e9, encoders * cuda / 1e9
    in_host = settings.optimizer_device == "cpu" and cuda  # masters and moments
    standing += parameters * (size * (settings.kl > 0) + 12 * (not in_host))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    image = (settings.resolution // 8 // config["patch_size"]) ** 2
    tokens = image + 77 + settings.t5_length
    blocks, duals = config["num_layers"], len(config.get("dual_attention_layers", ()))
    activations = settings.batch_size * (2 if settings.guidance > 1 else 1) * width * size / 2
    if settings.gradient_checkpointing == "on":
        activations *= 2 * tokens * blocks + 58 * tokens + 28 * image
    else:
        activations *= 58 * tokens * blocks + 28 * image * duals
    images = settings.prompts_per_iteration * settings.group_size  # their trajectories stay until the update
    trajectory = (settings.sampling_steps + 1) * 16 * (settings.resolution // 8) ** 2 * 4  # fp32 latents
    rollouts = images * trajectory * (2 if settings.method == "fdfo" else 1)  # fdfo's velocities
    host = 16 * parameters * in_host + encoders * cuda  # 16: 12, and the gradients on their way
    host *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (standing + max(encoders, 4 * parameters + activations + rollouts)) / 1e9, host / 1e9


def lighter(settings):
    """What would take less GPU memory and is not in use yet: ([options that --resume lets change], [the others])."""
    batch = 2 if settings.method == "fdfo" else 1
    free = {
        "--optimizer-device cpu": settings.optimizer_device == "cuda",
        "--gradient-checkpointing on": settings.gradient_checkpointing == "off" and not settings.evaluate,
        f"--batch-size {batch}": settings.batch_size > batch,
    }
    others = {
        "--kl 0": settings.kl > 0 and not settings.evaluate,
        "--guidance 1": settings.guidance > 1,
        "--t5-length 0": settings.t5_length > 0,
        "a smaller --resolution": settings.resolution > 256,
    }
    return tuple([way for way, helps in ways.items() if helps] for ways in (free, others))


# --- random weights: what a real model costs, where its weights cannot be had -----------------------------------------

SD35_MEDIUM = dict(  # its transformer's published configuration: 2.243e9 parameters
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
    attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
SD35_VAE = dict(
    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip


def random_pipeline(settings, device):
    from diffusers import (
        AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline,
    )  # fmt: skip

    torch.manual_seed(settings.seed)
    with torch.device(device):  # made where it is used: no copy in host memory
        transformer = SD3Transformer2DModel(**SD35_MEDIUM).to(DTYPES[settings.dtype])
        vae = AutoencoderKL(**SD35_VAE).to(DTYPES[settings.dtype])
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


class RandomPolicy(Policy):
    """No text encoders: features of the right shapes, a function of the text; any eight tokens are the core."""

    def encode(self, texts):
        config, length = self.transformer.config, 77 + self.settings.t5_length
        generators = [sample_generator("text", text) for text in texts]
        embeddings = torch.stack([torch.randn(length, config.joint_attention_dim, generator=g) for g in generators])
        pooled = torch.stack([torch.randn(config.pooled_projection_dim, generator=g) for g in generators])
        return tuple(t.to(self.device, self.transformer.dtype) for t in (embeddings, pooled))

    def core_mask(self, prompts):
        mask = torch.zeros(len(prompts), 77 + self.settings.t5_length, dtype=torch.bool, device=self.device)
        mask[:, 4:12] = True
        return mask


class BrightnessReward:
    """What stands for the reward where the images mean nothing: their mean, in [0, 1]."""

    def submit(self, images, prompts):
        pending = []
        for image in images:
            score = GenEvalScore(image.float().mean().item() / 255)
            score.correct = False
            pending.append(Future())
            pending[-1].set_result(score)
        return pending


def saved_transformer(path):
    """The folder of --evaluate's SD3 transformer: `path` itself, or transformer/ within a run. BadInput otherwise."""
    folder = Path(path)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not folder.is_dir():
        raise BadInput(f"--evaluate {path}: no such folder")
    config = folder / "config.json"
    found = (read_json(config) if config.is_file() else {}).get("_class_name", "no model")
    if found != "SD3Transformer2DModel":
        raise BadInput(f"--evaluate {path}: wanted a saved SD3Transformer2DModel, found {found}")
    return folder


def restore_transformer(transformer, path):
    """Give the transformer the weights that --evaluate names; BadInput unless they are just its own, in name and shape.
    safetensors only: nothing is unpickled."""
    state = {}
    try:
        for file in sorted(saved_transformer(path).glob("*.safetensors")):
            state |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--evaluate {path}: {file.name} is damaged ({error})") from error
    own = transformer.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise BadInput(
            f"--evaluate {path}: does not fit --model; {len(wrong)} weights are missing, too many or of another shape, "
            f"such as {min(wrong)}"
        )
    transformer.load_state_dict(state)


# --- the embedded model: a small SD3 that learns to write -------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TINY = {  # the recipe of the embedded model: change anything here and it is pre-trained anew
    "image": 48,  # px, grey; latents are its 4x4 pixel blocks: 16 channels of 12x12, hence 36 tokens of 8x8 px
    "letters": 3,
    "glyph": 8,  # px: every letter fills one token
    "text_length": 24,
    "text_width": 64,
    "layers": 4,  # of the transformer
    "heads": 4,
    "head_dim": 32,
    "reading_steps": 250,
    "reading_batch": 128,
    "reading_rate": 3e-3,
    "missing": 0.45,  # of the letters in the pictures: the base learns every letter, and to leave some out
    "steps": 1100,
    "batch": 32,
    "rate": 1.5e-3,
    "matrix_rate": 4.5e-3,
    "judge_after": 500,
    "judge_every": 200,
    "stop_reward": 0.6,  # on training words: the base is to be a poor speller
    "seed": 0,
}


class PixelVAE(torch.nn.Module):
    """Stands where SD3's VAE stands: grey images [B, 1, h, w] <-> latents [B, 16, h/4, w/4]. Nothing is learned."""

    config = SimpleNamespace(  # scaled to about unit variance, as SD3's latents are: unscaled, letters drown in noise
        scaling_factor=2.5, shift_factor=-0.4, block_out_channels=(1, 1, 1), latent_channels=16
    )  # fmt: skip
    dtype = torch.float32

    def encode(self, images):
        return F.pixel_unshuffle(images, 4)

    def decode(self, latents, return_dict=False):
        return (F.pixel_shuffle(latents, 4),)


def tiny_pipeline():
    """The untrained parts: character-level CLIP tokenizer and two small CLIP encoders, SD3 transformer, no T5."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = list(characters) + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TINY["text_length"]
    )
    width = TINY["text_width"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TINY["text_length"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    size = TINY["image"] // 4
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=size, pos_embed_max_size=size // 2, patch_size=2,
        in_channels=16, out_channels=16,
        num_layers=TINY["layers"], num_attention_heads=TINY["heads"], attention_head_dim=TINY["head_dim"],
        caption_projection_dim=TINY["heads"] * TINY["head_dim"], joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width, qk_norm="rms_norm",
    )  # fmt: skip
    encoders = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    for encoder in encoders:  # from CLIP's own 0.02, reading would take many times as long to learn
        torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
        torch.nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=PixelVAE(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@functools.cache
def glyphs():
    """{letter: [8, 8] in [0, 1]}: the capitals of Pillow's built-in font, each squeezed into one token's cell."""
    cell, font = TINY["glyph"], ImageFont.load_default(size=40)
    drawn = {" ": torch.zeros(cell, cell)}
    for letter in LETTERS:
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((32, 32), letter, fill=255, font=font, anchor="mm", stroke_width=2)
        ink = canvas.crop(canvas.getbbox())
        width = max(1, round(ink.width * min((cell - 1) / ink.width, (cell - 1) / 28)))  # never stretched, I stays thin
        glyph = Image.new("L", (cell, cell))
        glyph.paste(ink.resize((width, cell - 1), Image.LANCZOS), ((cell - width) // 2, 0))
        drawn[letter] = torch.from_numpy(np.array(glyph)) / 255
    return drawn


def render_words(words, generator):
    """Words -> grey images [B, 1, 48, 48] in [-1, 1]: dark letters on a bright sign, which stands at a random place of
    the letter grid (6 rows x 2 columns) before a random soft gradient. The sign fills a twelfth of the image."""
    size, cell, count = TINY["image"], TINY["glyph"], len(words)
    axis = torch.linspace(-0.5, 0.5, size)
    one, other, turn = torch.rand(3, count, 1, 1, generator=generator)
    slope = (2 * math.pi * turn).cos() * axis + (2 * math.pi * turn).sin() * axis[:, None]
    images = (one + other) / 4 + (one - other) / 2 * slope
    width = cell * TINY["letters"]
    rows = torch.randint(size // cell, (count,), generator=generator) * cell
    columns = torch.randint(size // width, (count,), generator=generator) * width
    for image, word, top, left in zip(images, words, rows, columns):
        image[top : top + cell, left : left + width] = 1 - torch.cat([glyphs()[letter] for letter in word], dim=1)
    return images[:, None] * 2 - 1


def teach_reading(pipe, draw_prompts):
    """Pre-train the text encoders, as SD3's were: every token learns to tell whether and where it stands in the quoted
    word and which letter it is, and the pooled feature to spell the word. The linear heads that ask are thrown away."""
    letters, width = TINY["letters"], TINY["text_width"]
    encoders = [pipe.text_encoder.requires_grad_(True), pipe.text_encoder_2.requires_grad_(True)]
    places, names, spellers = (
        torch.nn.ModuleList(torch.nn.Linear(width, size) for _ in encoders) for size in (letters + 1, 26, 26 * letters)
    )
    parameters = [p for module in (*encoders, places, names, spellers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TINY["reading_rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY["reading_rate"], total_steps=TINY["reading_steps"])
    for _ in tqdm(range(TINY["reading_steps"]), desc="teaching the text encoders to read"):
        prompts, words = draw_prompts(TINY["reading_batch"])
        batch = pipe.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt", return_offsets_mapping=True
        )
        spelling = torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])  # [B, letters]
        place = torch.full(batch.input_ids.shape, letters)  # "not in the word"
        name = torch.full(batch.input_ids.shape, -100)  # asked of the word's letters only
        for row, prompt in enumerate(prompts):
            start, end = quoted_span(prompt)
            for position, (a, b) in enumerate(batch.offset_mapping[row].tolist()):
                if start <= a < b <= end:
                    place[row, position] = a - start
                    name[row, position] = spelling[row, a - start]
        loss = 0
        for encoder, which_place, which_name, speller in zip(encoders, places, names, spellers):
            output = encoder(batch.input_ids, output_hidden_states=True)
            states = output.hidden_states[-2]  # what SD3 reads of CLIP
            loss = loss + F.cross_entropy(which_place(states).flatten(0, 1), place.flatten())
            loss = loss + F.cross_entropy(which_name(states).flatten(0, 1), name.flatten())
            loss = loss + F.cross_entropy(speller(output.text_embeds).view(-1, 26), spelling.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for encoder in encoders:
        encoder.requires_grad_(False)


def pretrain_tiny(policy, templates, held_out, reward, settings):
    """Flow matching on words rendered on the spot, until a fair part of the letters can be read. Returns its record.

    templates: prompts whose quoted word is replaced by random letters, never by a held-out (test) word.
    """
    pipe, transformer, draw = policy.pipe, policy.transformer, random.Random(TINY["seed"])
    vae = pipe.vae.config
    generator = torch.Generator().manual_seed(TINY["seed"])

    def draw_prompts(count):
        words = []
        while len(words) < count:
            word = "".join(draw.choices(LETTERS, k=TINY["letters"]))
            words += [word] if word not in held_out else []
        prompts = [draw.choice(templates) for _ in words]
        spans = [quoted_span(prompt) for prompt in prompts]
        return [prompt[:a] + word + prompt[b:] for prompt, word, (a, b) in zip(prompts, words, spans)], words

    teach_reading(pipe, draw_prompts)
    named = transformer.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("transformer_blocks") and "norm" not in name]
    others = [p for p in transformer.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [  # Muon on the blocks' matrices learns to spell in half the steps that AdamW takes
        torch.optim.Muon(matrices, lr=TINY["matrix_rate"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=TINY["rate"], weight_decay=0.01, betas=(0.9, 0.99)),
    ]
    curve = lambda step: min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / TINY["steps"]))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, curve) for optimizer in optimizers]
    judged = [Prompt(text) for text in draw_prompts(64)[0]]
    score, bar = 0.0, tqdm(range(1, TINY["steps"] + 1), desc="pre-training the embedded model")
    for step in bar:
        prompts, words = draw_prompts(TINY["batch"])
        prompts = [prompt if draw.random() > 0.1 else "" for prompt in prompts]  # one in ten without: for CFG
        with torch.no_grad():
            embeddings, pooled = policy.embed(prompts)
        worn = ["".join(" " if draw.random() < TINY["missing"] else letter for letter in word) for word in words]
        data = (pipe.vae.encode(render_words(worn, generator)) - vae.shift_factor) * vae.scaling_factor
        noise = torch.randn(data.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(data), 1, 1, 1, generator=generator))  # logit-normal, as SD3's, ...
        sigma = 6 * sigma / (1 + 5 * sigma)  # ... shifted up: where the sign stands is decided while noise is high
        prediction = transformer(
            hidden_states=(1 - sigma) * data + sigma * noise, encoder_hidden_states=embeddings,
            pooled_projections=pooled, timestep=sigma.flatten() * 1000, return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(prediction, noise - data)
        transformer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        if step >= TINY["judge_after"] and step % TINY["judge_every"] == 0:
            score = evaluate(policy, judged, reward, settings)[1].mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", ocr_reward=f"{score:.2f}")
            if score >= TINY["stop_reward"]:
                break
    bar.close()
    return {"steps": step, "train_reward": score, "seconds": round(bar.format_dict["elapsed"], 1)}


def tiny_policy(settings, reward, device):
    """The embedded model from the cache; pre-trained first where the cache has none, or a damaged one."""
    torch.manual_seed(TINY["seed"])
    policy = Policy(tiny_pipeline(), settings, device)
    modules = {"transformer": policy.transformer, "clip_1": policy.encoders[0], "clip_2": policy.encoders[1]}
    templates = [prompt.text for prompt in load_prompts(ROOT / "prompts/tiny/train.txt", "ocr")]
    tests = [prompt.text for prompt in load_prompts(ROOT / "prompts/tiny/test.txt", "ocr")]
    held_out = sorted({text[slice(*quoted_span(text))].upper() for text in tests})
    sources = [
        inspect.getsource(f) for f in (tiny_pipeline, glyphs, render_words, teach_reading, pretrain_tiny, PixelVAE)
    ]
    key = hashlib.sha256(json.dumps([TINY, templates, held_out, sources]).encode()).hexdigest()[:16]
    weights = cache_folder() / f"tiny-{key}.safetensors"
    record = weights.with_suffix(".json")
    if record.exists() and weights.exists():
        facts = read_json(record)
        if facts.get("sha256") == hashlib.sha256(weights.read_bytes()).hexdigest():
            tensors = load_file(weights)
            for name, module in modules.items():
                module.load_state_dict({k[len(name) + 1 :]: t for k, t in tensors.items() if k.split(".")[0] == name})
            return cast(policy, settings), facts
        print(f"note: the cached embedded model {weights} is damaged; pre-training it again")
    make_folder(weights.parent)
    plain = dataclasses.replace(settings, guidance=1.0, eval_steps=10, batch_size=64)  # the base is the same for all
    facts = pretrain_tiny(policy, templates, held_out, reward, plain)
    tensors = {f"{name}.{k}": t.contiguous() for name, m in modules.items() for k, t in m.state_dict().items()}
    try:
        write_aside(weights, lambda path: save_file(tensors, path))
        facts["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        write_aside(record, lambda path: path.write_text(json.dumps(facts, indent=1)))
    except (OSError, SafetensorError) as error:
        print(f"note: the embedded model cannot be cached in {weights.parent} ({error}); the run goes on without")
        facts["sha256"] = "not cached"
    return cast(policy, settings), facts


def cast(policy, settings):
    """The embedded model is pre-trained in fp32; --dtype bf16 trains it from a rounded copy."""
    if settings.dtype == "bf16":
        policy.transformer.to(torch.bfloat16)
    return policy


def read_json(path):
    """The object in a JSON file, or an empty one if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}") from error


def write_aside(path, write):
    """Write under another name, then rename: whoever reads `path` finds the old file or the new one, never half."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(aside)
    flush(aside)
    os.replace(aside, path)


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "star.py"


# --- prompts and rewards ----------------------------------------------------------------------------------------------


def load_prompts(path, task):
    """Flow-GRPO's formats: one prompt a line (ocr, pickscore), JSON lines with the metadata (geneval)."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"prompt file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"prompt file {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            metadata = check_geneval(json.loads(line)) if task == "geneval" else None
            prompts.append(Prompt(metadata["prompt"] if metadata else line.strip(), metadata))
            core_spans(prompts[-1].text, task, metadata)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"prompt file {path}, line {number}: {error}") from error
    if not prompts:
        raise BadInput(f"prompt file {path} holds no prompts")
    return prompts


GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_CLASSES = (  # GenEval's names of COCO's 80 classes, in COCO's order
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
DETECTOR_NAMES = {  # what detectors call a class, where GenEval calls it otherwise (the last six: COCO's older names)
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip


def check_geneval(metadata):
    """GenEval's metadata of one prompt, as it is, or a ValueError that says what is wrong with it."""
    want = functools.partial(need, error=ValueError)
    known = lambda name, value, choices: want(value in choices, f"unknown {name} {value!r}: not one of GenEval's")
    want(
        isinstance(metadata, dict) and isinstance(metadata.get("prompt"), str), "a JSON object with `prompt` is needed"
    )
    want(metadata.get("include"), "a geneval prompt needs its metadata, with `include`")
    known("tag", metadata.get("tag"), GENEVAL_TAGS)
    for part in ("include", "exclude"):
        clauses = metadata.get(part, [])
        want(isinstance(clauses, list) and all(isinstance(c, dict) for c in clauses), f"`{part}` is a list of objects")
        for index, clause in enumerate(clauses):
            strange = clause.keys() - {"class", "count", "color", "position"}
            want(not strange, f"unknown key {min(strange, default='')!r} in `{part}`")
            known("class", clause.get("class"), GENEVAL_CLASSES)
            want(type(clause.get("count")) is int and clause["count"] >= 1, "`count` is a number, at least 1")
            known("color", clause.get("color", "red"), GENEVAL_COLOURS)
            if "position" in clause:
                place = clause["position"]
                want(isinstance(place, list) and len(place) == 2, "`position` is [relation, index of a clause]")
                known("relation", place[0], GENEVAL_RELATIONS)
                want(place[1] in range(index), "`position` names an earlier clause by its index")
    return metadata


def normalise_text(text):
    """As the OCR reward compares: NFKC (engines read full-width letters now and then), no white space, lower case."""
    return "".join(unicodedata.normalize("NFKC", text).split()).lower()


def edit_distance(a, b):
    """Levenshtein: insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def ocr_score(recognised, target):
    """Flow-GRPO's OCR reward in [0, 1]: 1 if the target is part of what was read, else 1 - edit distance / length of
    the target, at least 0. ValueError for an empty target."""
    recognised, target = normalise_text(recognised), normalise_text(target)
    if not target:
        raise ValueError("the target text is empty")
    distance = 0 if target in recognised else min(edit_distance(recognised, target), len(target))
    return 1 - distance / len(target)


class OCRReward:
    """PP-OCR's detector and recogniser (rapidocr's wheel carries the models), in as many threads as there are cores."""

    def __init__(self):
        try:
            import onnxruntime  # noqa: F401  (what rapidocr runs on, and imports only when it first reads)
            import rapidocr
        except ImportError as error:
            raise BadInput(f"the ocr reward needs {error.name}: pip install -r requirements.txt") from error
        self.engine_class = rapidocr.RapidOCR
        self.local = threading.local()  # an engine a thread: the class keeps state while it reads
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count()))

    def read(self, image):
        """All text in an image [3, h, w] uint8, boxes joined."""
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        side = max(picture.size)
        if side < 192:  # the detector wants letters of more than a few pixels
            picture = picture.resize([192 * length // side for length in picture.size], Image.BICUBIC)
        if not hasattr(self.local, "engine"):
            self.local.engine = self.engine_class(params={
                "Global.use_cls": False, "Global.log_level": "error",
                "Det.limit_type": "max", "Det.limit_side_len": max(96, side),  # else it enlarges the side to 736
                "Rec.rec_img_shape": [3, 48, 160],  # the narrowest line it pads to; wider text is read at its width
                "EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            })  # fmt: skip
        return "".join(self.local.engine(np.asarray(picture)).txts or ())

    def score(self, image, prompt):
        return ocr_score(self.read(image), prompt.text[slice(*quoted_span(prompt.text))])

    def submit(self, images, prompts):
        """One future of a score in [0, 1] for every image, in order."""
        return [self.pool.submit(self.score, image, prompt) for image, prompt in zip(images, prompts)]


def confident(detections, tag):
    """What GenEval counts as there: score above 0.3 (counting: 0.9), the 16 surest of a class, surest first.

    detections: {class: [(box, score, ...), ...]}, box = (left, top, right, bottom) in pixels. Returns the same, fewer.
    """
    threshold = 0.9 if tag == "counting" else 0.3
    surest = lambda found: sorted(found, key=lambda one: -one[1])[:16]
    return {name: surest([one for one in found if one[1] > threshold]) for name, found in detections.items()}


def mask_box(mask):
    """(left, top, right, bottom) in pixels around a mask [h, w] bool that is not empty; right and bottom exclusive."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def relations(box, other):
    """The words that hold for a box relative to another, by GenEval's rule: along that axis the centres lie apart by
    more than half their distance, after a tenth of both boxes' extents is taken off."""
    x, y = ((box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1))  # y points down
    slack_x, slack_y = (0.1 * (box[i + 2] - box[i] + other[i + 2] - other[i]) for i in (0, 1))
    shifts = (-x - slack_x, x - slack_x, -y - slack_y, y - slack_y)
    return {word for word, shift in zip(GENEVAL_RELATIONS, shifts) if shift > math.hypot(x, y) / 2}


def all_placed(relation, objects, others):
    """Does the relation hold between each of the objects and each of the others? Not if there are none."""
    return bool(objects and others) and all(relation in relations(a[0], b[0]) for a in objects for b in others)


def geneval_reward(metadata, detections):
    """The training reward in [0, 1]: the mean over `include` of 1 - |wanted - found| / wanted, at least 0 each.

    A clause with a colour finds the objects of that colour only; where a clause's relation does not hold between the
    surest objects of the two classes, it scores 0. (Flow-GRPO's neither stops at 0 nor gives 0 for a wrong place.)
    metadata: the prompt's line; detections: {class: [(box, score, colour or None), ...]}.
    """
    found, scores = confident(detections, metadata["tag"]), []
    for clause in metadata["include"]:
        objects, wanted = found.get(clause["class"], []), clause["count"]
        if "color" in clause:
            objects = [one for one in objects if one[2] == clause["color"]]
        score = max(0.0, 1 - abs(wanted - len(objects)) / wanted)
        if "position" in clause:
            relation, index = clause["position"]
            target = metadata["include"][index]
            others = found.get(target["class"], [])[: target["count"]]
            score *= all_placed(relation, objects[:wanted], others)
        scores.append(score)
    return sum(scores) / len(scores)


def geneval_correct(metadata, detections):
    """The benchmark's verdict (GenEval, arXiv 2310.11513): at least as many objects as wanted, and the surest of them
    of the right colour and in the right place; and none of `exclude` in the number given there. Arguments as above."""
    found, groups = confident(detections, metadata["tag"]), []  # groups: a clause's objects if they satisfy it
    for clause in metadata["include"]:
        objects = found.get(clause["class"], [])[: clause["count"]]
        right = len(objects) == clause["count"]
        if "color" in clause:
            right = right and all(one[2] == clause["color"] for one in objects)
        if "position" in clause:
            relation, index = clause["position"]
            right = right and all_placed(relation, objects, groups[index])
        groups.append(objects if right else [])
    return all(groups) and all(len(found.get(c["class"], [])) < c["count"] for c in metadata.get("exclude", ()))


PICKSCORE_SCALE = 26  # Flow-GRPO's training reward is PickScore / 26


def pick_score(image, text, logit_scale):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text). image, text [B, D] embeddings. Returns [B]."""
    return logit_scale.exp() * F.cosine_similarity(image, text)


def load_reward_model(model_class, processor_class, hub, folder, device, processor_hub=None):
    """(model, processor) in fp32 through transformers' loaders, from the hub or from a local folder if one is given.
    safetensors only, and no code from the hub is run. BadInput, in one line, for whatever stands in the way."""
    import transformers

    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            folder or hub, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        missing = {name for name, _ in model.named_parameters()} & set(info["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise ValueError(f"it is no {model_class}: {len(missing)} weights are missing")
        processor = getattr(transformers, processor_class).from_pretrained(folder or processor_hub or hub)
    except Exception as error:  # whatever a loader says of what is not there, not whole or not what it should be
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        wanted = " and the processor of ".join(filter(None, (hub, processor_hub)))
        raise BadInput(
            f"the reward model {folder or hub} cannot be loaded: {reason} (wanted: {wanted}; `hf download` fetches "
            "them, and --reward-model takes a local copy)"
        ) from error
    return model.to(device).eval().requires_grad_(False), processor


class ModelReward:
    """A reward that neural networks compute, a batch at a time, in a thread beside the sampler's."""

    def __init__(self, folder, device):
        self.folder, self.device, self.pool = folder, device, ThreadPoolExecutor(1)
        # On a GPU a queue of its own: every number read back would otherwise wait for all that the sampler has queued.
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self.load()

    def submit(self, images, prompts):
        """One future of a score for every image [B, 3, h, w] uint8, in order."""
        batch = self.pool.submit(self.judge, images, prompts)
        return [self.pool.submit(lambda i=i: batch.result()[i]) for i in range(len(images))]  # the thread keeps order

    def judge(self, images, prompts):
        with torch.cuda.stream(self.stream):
            scores = self.scores(images, prompts)
        if len(scores) != len(images):
            raise ValueError(f"the reward gave {len(scores)} scores for {len(images)} images")
        return scores


DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # px, the benchmark's; transformers' processor has 384


class GenEvalScore(float):
    """The training reward of an image, which also knows whether the benchmark calls the image `correct`."""


class GenEvalReward(ModelReward):
    """Objects, their number, colour and place, as GenEval sees them: Mask2Former finds them, CLIP names their colour.
    The networks are the benchmark's; here they are transformers' copies, not mmdet's and open_clip's."""

    def load(self):
        self.detector, self.prepare = load_reward_model(
            "Mask2FormerForUniversalSegmentation", "AutoImageProcessor",
            "facebook/mask2former-swin-small-coco-instance", self.folder and f"{self.folder}/detector", self.device,
        )  # fmt: skip
        self.clip, self.processor = load_reward_model(
            "CLIPModel", "CLIPProcessor", "openai/clip-vit-large-patch14", self.folder and f"{self.folder}/clip",
            self.device,
        )  # fmt: skip
        self.names = {i: DETECTOR_NAMES.get(name, name) for i, name in self.detector.config.id2label.items()}
        unknown = set(GENEVAL_CLASSES) - set(self.names.values())
        if unknown:
            raise BadInput(
                f"--reward-model {self.folder or 'from the hub'}: its detector does not know the class {min(unknown)!r}"
            )

    @torch.no_grad()
    def scores(self, images, prompts):
        inputs = self.prepare(images=list(images), size=DETECTOR_SIZE, return_tensors="pt").to(self.detector.device)
        results = self.prepare.post_process_instance_segmentation(
            self.detector(**inputs), threshold=0.3, target_sizes=[images.shape[-2:]] * len(images),
            return_binary_maps=True,
        )  # fmt: skip
        scores = []
        for image, prompt, result in zip(images, prompts, results):
            masks = {}  # class: [(box, score, mask [h, w] bool)]
            for segment, mask in zip(result["segments_info"], result["segmentation"]):
                mask = mask.bool().cpu()
                masks.setdefault(self.names[segment["label_id"]], []).append((mask_box(mask), segment["score"], mask))
            painted = {clause["class"] for clause in prompt.metadata["include"] if "color" in clause}
            detections = {}
            for name, found in confident(masks, prompt.metadata["tag"]).items():
                colours = self.colours(image, name, found) if found and name in painted else [None] * len(found)
                detections[name] = [(box, sure, colour) for (box, sure, _), colour in zip(found, colours)]
            scores.append(GenEvalScore(geneval_reward(prompt.metadata, detections)))
            scores[-1].correct = geneval_correct(prompt.metadata, detections)
        return scores

    def colours(self, image, name, found):
        """The colour of each object [(box, score, mask)], by CLIP from its crop, with #999 for all that is not it."""
        crops = []
        for (left, top, right, bottom), _, mask in found:
            alone = torch.where(mask, image, 0x99)[:, top:bottom, left:right]
            crops.append(Image.fromarray(alone.permute(1, 2, 0).numpy()))
        phrases = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
        texts = [phrase.format(colour) for colour in GENEVAL_COLOURS for phrase in phrases]
        output = clip_output(self.clip, self.processor, crops, texts)
        classifier = output.text_embeds.unflatten(0, (len(GENEVAL_COLOURS), -1)).mean(1)  # over phrases
        similarity = output.image_embeds @ F.normalize(classifier, dim=-1).T  # [objects, colours]
        return [GENEVAL_COLOURS[i] for i in similarity.argmax(1)]


class PickScoreReward(ModelReward):
    """PickScore / 26, as Flow-GRPO trains on it."""

    def load(self):
        self.clip, self.processor = load_reward_model(
            "CLIPModel", "CLIPProcessor", "yuvalkirstain/PickScore_v1", self.folder, self.device,
            processor_hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        )  # fmt: skip

    @torch.no_grad()
    def scores(self, images, prompts):
        output = clip_output(self.clip, self.processor, list(images), [prompt.text for prompt in prompts])
        return (pick_score(output.image_embeds, output.text_embeds, self.clip.logit_scale) / PICKSCORE_SCALE).tolist()


def clip_output(clip, processor, images, texts):
    length = clip.config.text_config.max_position_embeddings
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
    return clip(**inputs.to(clip.device))


def make_reward(settings, device):
    """The task's reward: .submit(images [B, 3, h, w] uint8, prompts) -> one future of a number an image, in order."""
    if settings.model == "random":
        return BrightnessReward()
    if settings.task == "geneval":
        return GenEvalReward(settings.reward_model, device)
    if settings.task == "pickscore":
        return PickScoreReward(settings.reward_model, device)
    return OCRReward()


# --- pictures ---------------------------------------------------------------------------------------------------------


def to_picture(image, side):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return picture.resize((side, side), Image.NEAREST if picture.width < side else Image.LANCZOS)


def save_grid(path, images, captions, columns=8, side=144):
    """A grid of pictures [B, 3, h, w] uint8 with a caption of up to three lines under each."""
    rows = math.ceil(len(images) / columns)
    width, height = side + 8, side + 58
    sheet = Image.new("RGB", (columns * width + 8, rows * height + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, (image, caption) in enumerate(zip(images, captions)):
        x, y = 8 + index % columns * width, 8 + index // columns * height
        sheet.paste(to_picture(image, side), (x, y))
        lines = textwrap.wrap(caption, 22, max_lines=3, placeholder="...")
        draw.text((x, y + side + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    sheet.save(path)


def save_records(path, images, records, mark="", most=32):
    """A grid of evaluation's first images, each under its reward and prompt."""
    save_grid(path, images[:most], [f"{mark}{record['reward']:.2f}  {record['prompt']}" for record in records])


def heat(image, allocation, side):
    """An image [3, h, w] uint8 under its map [P]: dark where M is small, through red and yellow to white at its max."""
    tokens = math.isqrt(len(allocation))
    level = (allocation / allocation.max()).view(1, tokens, tokens)
    colours = torch.cat([level * 3, level * 3 - 1, level * 3 - 2]).clamp(0, 1)  # black, red, yellow, white
    colours = F.interpolate(colours[None], size=image.shape[-2:], mode="nearest")[0]
    return to_picture((image * 0.4 + colours * 255 * 0.6).to(torch.uint8), side)


@torch.no_grad()
def save_strips(path, policy, prompts, settings, side=96):
    """For a few fixed samples, the image being formed (the model's guess of x_0 at every step) and, under it, the same
    with its allocation map as heat. Deterministic sampler, fixed seeds."""
    sigmas = policy.sigmas(settings.sampling_steps)
    settings = dataclasses.replace(settings, batch_size=len(prompts))
    trajectory = sample_groups(policy, prompts, 1, settings, EVALUATION, sigmas, 0.0, blocks=settings.blocks)[0][0]
    allocation = allocation_map(trajectory.attention, settings.allocation_strength).cpu()
    sheet = Image.new("RGB", (8 + len(sigmas[1:]) * (side + 4), 24 + len(prompts) * (2 * side + 40)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, sigma in enumerate(sigmas[:-1]):
        now, after = trajectory.latents[i], trajectory.latents[i + 1]
        guess = policy.decode(now - sigma * (after - now) / (sigmas[i + 1] - sigma))  # x_t - sigma v
        draw.text((8 + i * (side + 4), 4), f"sigma {sigma:.2f}", fill="black", font=font)
        for row, prompt in enumerate(prompts):
            x, y = 8 + i * (side + 4), 24 + row * (2 * side + 40)
            if i == 0:
                draw.text((x, y), settings.mark + prompt.text[:120], fill="black", font=font)
            sheet.paste(to_picture(guess[row], side), (x, y + 20))
            sheet.paste(heat(guess[row], allocation[i, row], side), (x, y + 24 + side))
    sheet.save(path)


# --- the run ----------------------------------------------------------------------------------------------------------

EVALUATION = ("evaluation",)  # the key of evaluation's noise: the same images' worth of luck every time, in every run


def evaluate(policy, prompts, reward, settings):
    """Images of the test prompts, one each, four for geneval: deterministic sampler, fixed seeds.

    Returns (images [B, 3, h, w] uint8, rewards [B], records: a dict an image, for report and evaluation.json); a reward
    that failed is NaN.
    """
    copies = 4 if settings.task == "geneval" else 1  # as the benchmark does
    sigmas = policy.sigmas(settings.eval_steps)
    _, images, pending = sample_groups(
        policy, prompts, copies, settings, EVALUATION, sigmas, 0.0, reward=reward, keep=False
    )
    images, rewards, verdicts = gather_rewards(images, pending, len(prompts) * copies, settings)
    records = []
    for row, (value, correct) in enumerate(zip(rewards.tolist(), verdicts)):
        prompt = prompts[row // copies]
        records.append({"prompt": prompt.text, "reward": value})
        if settings.task == "geneval":
            records[-1] |= {"tag": prompt.metadata["tag"], "correct": correct}
    return images, rewards, records


def report(task, records):
    """What an evaluation's records say, as columns of metrics.jsonl. eval_score is the number papers print."""
    records = [record for record in records if math.isfinite(record["reward"])]
    mean = lambda values: sum(values) / len(values)
    numbers = {"eval_reward": mean([record["reward"] for record in records])}
    if task == "ocr":
        numbers["eval_exact"] = mean([record["reward"] == 1 for record in records])
    if task == "pickscore":
        numbers["eval_score"] = numbers["eval_reward"] * PICKSCORE_SCALE
    if task == "geneval":
        tags = [tag for tag in GENEVAL_TAGS if any(record["tag"] == tag for record in records)]
        accuracy = {tag: mean([record["correct"] for record in records if record["tag"] == tag]) for tag in tags}
        numbers["eval_score"] = mean(accuracy.values())  # over tags, not over images: the benchmark's overall score
        numbers |= {f"eval_{tag}": share for tag, share in accuracy.items()}
    return numbers


def print_table(settings, prompts, columns):
    """columns: {heading: report}, such as before and after."""
    mark = settings.mark
    print(f"\n{mark}{f'{len(prompts)} test prompts':18s}  " + " ".join(f"{heading:>7s}" for heading in columns))
    for name in [name for name in next(iter(columns.values())) if name.startswith("eval_")]:
        label = f"{settings.task} reward" if name == "eval_reward" else name.removeprefix("eval_")
        print(f"{mark}{label:18s}  " + " ".join(f"{numbers[name]:7.3f}" for numbers in columns.values()))


def gather_rewards(images, pending, count, settings):
    """Wait for the reward futures, and bring together what the processes have: (images [count, 3, h, w], rewards
    [count], verdicts: a list of the benchmark's yes or no where the reward has one, else of None).

    A reward that raises or is not finite is NaN here, with a warning; RunStopped when more than a fifth are.
    """
    rows = [row for part in dealt_rows(count, settings.batch_size) for row in part.tolist()]
    if len(pending) != len(rows):
        raise BadInput(f"the reward gave {len(pending)} numbers for {len(rows)} images")
    values, verdicts, faults = [], [], []
    for row, future in zip(rows, pending):
        try:
            score = future.result()
            value, verdict = float(score), getattr(score, "correct", None)
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a reward model may raise
            value, verdict = math.nan, None
            faults.append(f"image {row}: {type(error).__name__}: {error}")
        values.append(value)
        verdicts.append(verdict)
    rewards, answers, whole = torch.empty(count), [None] * count, images.new_zeros(count, *images.shape[1:])
    whole[rows] = images
    if process_rank()[1] > 1:
        dist.all_reduce(whole)  # an image is zero in all processes but its own
    parts = gather([rows, values, verdicts, faults])
    for rows, values, verdicts, _ in parts:
        for row, value, verdict in zip(rows, values, verdicts):
            rewards[row], answers[row] = value, verdict
    faults = [fault for part in parts for fault in part[3]]
    if faults:
        tell = f"the reward failed for {len(faults)} of {count} images, first for {faults[0]}"
        if len(faults) > count / 5:
            raise RunStopped(tell)
        tqdm.write(f"warning: {tell}; left out")
    return whole, rewards, answers


def advantages_of_the_rest(rewards, group_size):
    """group_advantages where rewards may be missing (NaN). Those images have advantage 0 and count neither for their
    group's mean nor for the batch's std; nor does any image of a group with fewer than two rewards."""
    kept = torch.isfinite(rewards).view(-1, group_size)
    kept &= kept.sum(1, keepdim=True) >= 2
    if kept.all():
        return group_advantages(rewards, group_size)
    groups = rewards.double().view(-1, group_size)
    groups = (groups - groups.gather(1, kept.int().argmax(1, keepdim=True))).where(kept, 0)  # minus the first kept
    mean = groups.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    std = rewards.double()[kept.flatten()].std(correction=0)
    return ((groups - mean) / (std + 1e-4)).clamp(-5, 5).where(kept, 0).flatten().float()


def ties_for_the_missing(rewards):
    """fdfo's rewards [2K] where some may be missing (NaN): such a pair becomes a tie, which pulls nowhere."""
    pairs = rewards.view(-1, 2)
    return pairs.where(torch.isfinite(pairs).all(1, keepdim=True), 0).flatten()


def pick_prompts(prompts, settings, iteration):
    """The iteration's prompts: every epoch deals all prompts in an order of its own, a function of (seed, epoch)."""
    first = iteration * settings.prompts_per_iteration
    chosen = []
    for position in range(first, first + settings.prompts_per_iteration):
        epoch, place = divmod(position, len(prompts))
        order = torch.randperm(len(prompts), generator=sample_generator(settings.seed, "epoch", epoch))
        chosen.append(prompts[order[place]])
    return chosen


def train_iteration(policy, reference, optimizer, prompts, reward, settings, iteration):
    """One iteration of STAR (or Flow-GRPO, or FDFO): sample, reward, compare, allocate, update. Returns (metrics,
    images, rewards)."""
    clock, key = [time.perf_counter()], (settings.seed, iteration)
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    sigmas, fdfo = policy.sigmas(settings.sampling_steps), settings.method == "fdfo"
    maps = settings.method == "star" or fdfo and settings.allocation != "uniform"  # star's uniform takes the same path
    blocks = settings.blocks if maps else ()
    # 1. Roll out groups of images with the SDE sampler (fdfo: in pairs), reading the attention on the way.
    trajectories, images, pending = sample_groups(
        policy, prompts, settings.group_size, settings, key, sigmas, settings.noise_level,
        settings.churn if fdfo else 0.0, reward, blocks,
    )  # fmt: skip
    clock.append(time.perf_counter())
    # 2. Reward the final images.
    images, rewards, _ = gather_rewards(images, pending, len(prompts) * settings.group_size, settings)
    clock.append(time.perf_counter())
    # 3. Compare each image with its group (fdfo: with its twin).
    advantages = None if fdfo else advantages_of_the_rest(rewards, settings.group_size)
    for trajectory in trajectories:
        if fdfo:
            pairs = ties_for_the_missing(rewards[trajectory.rows]).to(policy.device)
            trajectory.advantages, trajectory.direction = fdfo_direction(trajectory.latents[-1], pairs)
        else:
            trajectory.advantages = advantages[trajectory.rows].to(policy.device)
        # 4. Allocate: every step of every rollout has a map of its own.
        if blocks:
            trajectory.allocation = arrange_allocation(
                trajectory.attention, settings.allocation, settings.allocation_strength, trajectory.generators,
                trained=settings.sampling_steps - (not fdfo),
            )  # fmt: skip
    # 5. Update through the clipped objective.
    stats = update(policy, reference, optimizer, trajectories, sigmas, settings, key)
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in zip(clock, clock[1:])]
    finite = rewards[torch.isfinite(rewards)]
    metrics = {
        "iteration": iteration, "reward": finite.mean().item(), "reward_std": finite.std(correction=0).item(),
        "dropped": len(rewards) - len(finite), **stats,
        "seconds_sampling": seconds[0], "seconds_reward": seconds[1], "seconds_update": seconds[2],
        "images_per_second": len(images) / sum(seconds), "peak_memory_gb": peak_memory_gb(policy.device),
    }  # fmt: skip
    return metrics, images, rewards


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # has no getrusage
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# --- several processes, started by torchrun ---------------------------------------------------------------------------


def launched():
    """(this process's number, how many there are), as torchrun announces them; (0, 1) without it."""
    announced = dist.is_available() and dist.is_torchelastic_launched()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if announced else (0, 1)


def join_processes(device):
    """Under torchrun, meet the other processes; until then each one is on its own."""
    if launched()[1] > 1:
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")


def process_rank():
    """(this process's number, how many share the work); (0, 1) for a process on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def dealt_rows(count, batch_size):
    """The microbatches of an iteration's images that are this process's: a list of row numbers [B]."""
    rank, processes = process_rank()
    return torch.arange(count).split(batch_size)[rank::processes]


def gather(value):
    """[value of process 0, of process 1, ...] in every process. The value travels as JSON: floats arrive exactly."""
    processes = process_rank()[1]
    if processes == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(processes)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    parts = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in range(processes)]
    dist.all_gather(parts, F.pad(data, (0, len(parts[0]) - len(data))))
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes)]


def average_gradients(gradients, parameters):
    """Every gradient becomes its mean over the processes; a process that skipped all its microbatches counts as 0."""
    processes = process_rank()[1]
    if processes == 1:
        return
    present = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.uint8)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    for index, parameter in enumerate(parameters):
        if present[index]:
            if gradients[index] is None:
                gradients[index] = torch.zeros_like(parameter, dtype=torch.float32)
            dist.all_reduce(gradients[index])
            gradients[index] /= processes


# --- checkpoints: safetensors and JSON, nothing else ------------------------------------------------------------------

FREE_ON_RESUME = {  # these may differ: the mathematics stays the same
    "compile", "out", "resume", "evaluate", "save_every", "keep", "iterations", "eval_every", "optimizer_device",
    "gradient_checkpointing", "reward_model", "batch_size",
}  # fmt: skip


def fixed_settings(settings, train_prompts, test_prompts, facts, transformer):
    """What a resumed run must have in common with the checkpoint: the other settings, prompt files by their content."""
    fixed = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_ON_RESUME}
    return fixed | {
        "train_prompts": f"{len(train_prompts)} prompts, {digest(train_prompts)[:8]}",
        "test_prompts": f"{len(test_prompts)} prompts, {digest(test_prompts)[:8]}",
        "parameters": digest([name for name, _ in transformer.named_parameters()])[:8],
        "embedded_model": facts and facts["sha256"][:8],
    }


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_digest(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            sha256.update(block)
    return sha256.hexdigest()


def checkpoints(folder):
    """{iterations done: path} of a run's checkpoints, the newest first. What is half-written has no such name."""
    found = {int(path.name): path for path in folder.glob("checkpoints/*") if path.name.isdecimal()}
    return dict(sorted(found.items(), reverse=True))


def save_checkpoint(folder, iteration, optimizer, fixed, metrics, keep):
    """checkpoints/<iterations done>/: masters, moments and metrics.jsonl so far, and checkpoint.json with the next
    iteration, the settings and the sha256 of every file. Older ones are pruned when it stands."""
    target, aside = folder / f"checkpoints/{iteration:06d}", folder / "checkpoints/new.part"
    aside.mkdir(parents=True)
    for kind, tensors in optimizer.state().items():
        save_file(tensors, aside / f"{kind}.safetensors")
    (aside / "metrics.jsonl").write_text(metrics)
    record = {"next_iteration": iteration + 1, "failures": optimizer.failures, "settings": fixed}
    record["files"] = {path.name: file_digest(path) for path in sorted(aside.iterdir())}
    (aside / "checkpoint.json").write_text(json.dumps(record | {"checksum": digest(record)}, indent=1))
    swap_folder(aside, target)
    kept = [done for done in checkpoints(folder) if done <= iteration][:keep]
    for done, path in checkpoints(folder).items():
        if done not in kept:  # old, or of later iterations, but torn: else the run had been resumed from there
            shutil.rmtree(path.replace(path.with_suffix(".part")))


def read_checkpoint(path):
    """(record, {kind: tensors}, metrics); whatever is torn or altered raises. No name in the record leads elsewhere."""
    record = read_json(path / "checkpoint.json")
    if record.pop("checksum", None) != digest(record):
        raise ValueError("checkpoint.json is torn or altered")
    for name, expected in record["files"].items():
        if not re.fullmatch(r"\w+\.(safetensors|jsonl)", name):
            raise ValueError(f"{name!r} is no file of a checkpoint")
        if file_digest(path / name) != expected:
            raise ValueError(f"{name} is torn or altered")
    kinds = {name[:-12]: load_file(path / name) for name in record["files"] if name.endswith(".safetensors")}
    return record, kinds, (path / "metrics.jsonl").read_text()


def load_checkpoint(folder, optimizer, fixed):
    """The newest whole checkpoint into the optimizer and its model: (next iteration, metrics so far), or (0, "") where
    the run has none yet. One that is not whole is named, and the one before is tried. BadInput if none is, or if the
    settings are not those of the run."""
    for path in checkpoints(folder).values():
        try:
            record, kinds, metrics = read_checkpoint(path)
            saved = record["settings"]
            names = (saved | fixed).keys() - FREE_ON_RESUME
            differing = [name for name in sorted(names) if saved.get(name) != fixed.get(name)]
            if differing:
                lines = [f"{name} was {saved.get(name)}, is {fixed.get(name)}" for name in differing]
                raise BadInput(f"--resume would make another run of {folder}: {'; '.join(lines)}")
            optimizer.load_state(kinds)
            optimizer.failures = int(record["failures"])
            print(f"resumed from {path}: {record['next_iteration'] - 1} iterations are done")
            return record["next_iteration"], metrics
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            print(f"warning: the checkpoint {path} is not whole: {error}")
    if checkpoints(folder):
        raise BadInput(f"--resume: no checkpoint in {folder} is whole")
    print(f"note: there is no checkpoint in {folder} yet, so the run starts at iteration 1")
    return 0, ""


def flush(path):
    """Wait until a file or folder is on the disk, safe from a power cut."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def swap_folder(aside, target):
    """Give the folder written aside its name; what had that name goes only then."""
    for path in (*aside.iterdir(), aside):
        flush(path)
    if target.exists():
        target.replace(target.with_suffix(".old.part"))
    aside.replace(target)
    flush(target.parent)
    shutil.rmtree(target.with_suffix(".old.part"), ignore_errors=True)


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock that dies with the process: wait for it, or BadInput if another process has it."""
    try:
        import fcntl

        file = open(path, "a")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise BadInput(f"another process is at work in {path.parent}") from error
    except (ImportError, OSError):  # Windows, and file systems without locks
        file = contextlib.nullcontext()
    with file:
        yield


@contextlib.contextmanager
def finish_on_signal():
    """Within, SIGINT and SIGTERM are only noted, in the dict it yields; another one quits at once, unless it comes
    within a second: torchrun passes on the Ctrl-C that has already arrived."""
    noted = {}

    def note(number, _):
        if noted and time.monotonic() - min(noted.values()) > 1:
            os._exit(128 + number)
        noted.setdefault(number, time.monotonic())
        os.write(2, b"\nfinishing this iteration, then saving; once more to quit at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the run's folder -------------------------------------------------------------------------------------------------


def guarded(write):
    """A method of RunFolder that writes: only the first process does, and a full disk is a warning, not the end."""

    @functools.wraps(write)
    def guard(run, *arguments):
        if process_rank()[0] > 0:
            return
        try:
            write(run, *arguments)
            run.unwritten.discard(write.__name__)
        except (OSError, SafetensorError) as error:
            run.unwritten.add(write.__name__)
            with contextlib.suppress(OSError):
                run.sweep()
            tqdm.write(f"warning: {write.__name__} failed: {error}; what was there before stays, and the run goes on")

    return guard


class RunFolder:
    """What a run leaves behind: config.json, metrics.jsonl, pictures, checkpoints, the trained transformer."""

    def __init__(self, settings, facts, fixed, optimizer):
        self.path, self.settings, self.fixed = Path(settings.out), settings, fixed
        self.next_iteration, self.metrics, self.unwritten, self.tensorboard = 0, "", set(), None
        if settings.resume:
            self.next_iteration, self.metrics = load_checkpoint(self.path, optimizer, fixed)
            if len(set(gather(self.next_iteration))) > 1:
                raise BadInput(f"--resume: the processes do not find the same checkpoints in {self.path}")
        if process_rank()[0] > 0:
            return
        config = provenance(settings, facts)
        try:
            self.sweep()
            write_aside(self.path / "config.json", lambda aside: aside.write_text(json.dumps(config, indent=1)))
            write_aside(self.path / "metrics.jsonl", lambda aside: aside.write_text(self.metrics))
        except OSError as error:
            raise BadInput(f"cannot write in {self.path}: {error.strerror}") from error
        with contextlib.suppress(ImportError, OSError):  # a luxury, never needed
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.path, purge_step=self.next_iteration)

    def sweep(self):
        """Remove what an interrupted or failed write has left."""
        for path in (*self.path.glob("*.part"), *self.path.glob("checkpoints/*.part")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def log(self, metrics):
        metrics = metrics | ({"random_weights": True} if self.settings.mark else {})
        odd = {name: None for name, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
        self.metrics += json.dumps(metrics | odd) + "\n"  # JSON has no NaN
        self.save_metrics(metrics)

    @guarded
    def save_metrics(self, metrics):
        write_aside(self.path / "metrics.jsonl", lambda aside: aside.write_text(self.metrics))
        if self.tensorboard:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, metrics["iteration"])

    @guarded
    def save_pictures(self, name, images, records):
        save_records(self.path / f"{name}.png", images, records, self.settings.mark)

    @guarded
    def save_maps(self, name, policy, prompts):
        save_strips(self.path / f"{name}.png", policy, prompts, self.settings)

    @guarded
    def save_transformer(self, transformer):
        transformer.save_pretrained(self.path / "transformer.part")
        swap_folder(self.path / "transformer.part", self.path / "transformer")

    @guarded
    def save(self, iteration, optimizer):
        save_checkpoint(self.path, iteration, optimizer, self.fixed, self.metrics, self.settings.keep)


def provenance(settings, facts):
    """What a result came from: every setting, package versions, how the embedded model was pre-trained."""
    return {"settings": dataclasses.asdict(settings), "versions": versions(), "embedded_model": facts}


def versions():
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    for package in ("torch", "diffusers", "transformers", "safetensors", "rapidocr", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def choose_device(settings):
    if settings.model == "tiny" or not torch.cuda.is_available():  # tiny is made for the CPU
        return "cpu"
    number = int(os.environ["LOCAL_RANK"]) if launched()[1] > 1 else 0
    if number >= torch.cuda.device_count():
        raise BadInput(f"torchrun: more processes than the {torch.cuda.device_count()} GPUs; lower --nproc-per-node")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def train(settings):
    """From two prompt files to a trained model and a table of what it gained. Returns the exit status."""
    device = choose_device(settings)
    train_prompts = load_prompts(settings.train_prompts, settings.task)
    test_prompts = load_prompts(settings.test_prompts, settings.task)
    reward = make_reward(settings, device)  # before the big model: what is missing is said at once
    out = Path(settings.out)
    make_folder(out)
    try:
        with locked(out / "lock") if launched()[0] == 0 else contextlib.nullcontext():
            return train_policy(train_prompts, test_prompts, reward, settings, device)
    except BadInput:
        if not settings.resume and {path.name for path in out.iterdir()} == {"lock"}:  # nothing came of it
            shutil.rmtree(out, ignore_errors=True)
        raise


def train_policy(train_prompts, test_prompts, reward, settings, device):
    """The whole run, in a folder that no other process touches; from its newest checkpoint if --resume asks for it."""
    policy, facts = load_policy(settings, reward, device)
    join_processes(device)
    reference = frozen_copy(policy.transformer, settings) if settings.kl > 0 else None
    optimizer = MasterAdamW(
        policy.transformer.parameters(), settings.learning_rate, "cpu" if settings.optimizer_device == "cpu" else None
    )
    fixed = fixed_settings(settings, train_prompts, test_prompts, facts, policy.transformer)
    run = RunFolder(settings, facts, fixed, optimizer)

    def judge(name, iteration):
        images, _, records = evaluate(policy, test_prompts, reward, settings)
        run.save_pictures(f"test_{name}", images, records)
        result = report(settings.task, records)
        numbers = "  ".join(f"{column.removeprefix('eval_')} {value:.3f}" for column, value in result.items())
        tqdm.write(f"{settings.mark}iteration {iteration:4d}  test {numbers}")
        return result

    if run.next_iteration == 0:
        run.save_maps("maps_before", policy, test_prompts[:4])
        run.log({"iteration": 0, **judge("before", 0)})
        run.save(0, optimizer)
    lines = [json.loads(line) for line in run.metrics.splitlines()]
    before, *_, after = [line for line in [*lines, *lines] if "eval_reward" in line]
    bar = tqdm(
        range(max(1, run.next_iteration), settings.iterations + 1),
        desc=f"{settings.mark}{settings.method} {settings.task}",
        initial=max(1, run.next_iteration) - 1, total=settings.iterations, unit="it", disable=process_rank()[0] > 0,
    )  # fmt: skip
    with finish_on_signal() as signals:
        for iteration in bar:
            prompts = pick_prompts(train_prompts, settings, iteration - 1)
            metrics, images, rewards = train_iteration(
                policy, reference, optimizer, prompts, reward, settings, iteration
            )
            if iteration % settings.eval_every == 0 or iteration == settings.iterations:
                after = judge("after", iteration)
                rows = [prompt.text for prompt in prompts for _ in range(settings.group_size)]
                records = [{"prompt": text, "reward": value} for text, value in zip(rows, rewards.tolist())]
                run.save_pictures("train_latest", images, records)
                metrics |= after
                run.save_transformer(policy.transformer)
            run.log(metrics)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", test=f"{after['eval_reward']:.3f}")
            stop = max(gather(max(signals, default=0)))
            if stop or iteration % settings.save_every == 0 or iteration == settings.iterations:
                run.save(iteration, optimizer)
            if stop and iteration < settings.iterations:
                bar.close()
                print(f"stopped after iteration {iteration}; go on with --resume --out {run.path}")
                return 128 + stop
    run.save_maps("maps_after", policy, test_prompts[:4])
    print_table(settings, test_prompts, {"before": before, "after": after})
    print(f"\npictures, metrics and the trained transformer are in {run.path}")
    if run.unwritten:
        raise RunStopped(f"the last time, {', '.join(sorted(run.unwritten))} failed, so {run.path} is not up to date")
    return 0


def evaluate_saved(settings):
    """--evaluate: a saved transformer in its model's pipeline, scored as training scores it, without training. Returns
    the exit status."""
    device = choose_device(settings)
    prompts = load_prompts(settings.test_prompts, settings.task)
    reward = make_reward(settings, device)
    out = Path(settings.out)
    make_folder(out)
    policy, facts = load_policy(settings, reward, device)
    restore_transformer(policy.transformer, settings.evaluate)
    join_processes(device)
    images, _, records = evaluate(policy, prompts, reward, settings)
    if process_rank()[0] == 0:
        numbers = report(settings.task, records)
        rows = [{k: None if v != v else v for k, v in record.items()} for record in records]  # JSON has no NaN
        numbers |= {"random_weights": True} if settings.mark else {}
        result = json.dumps({"result": numbers, **provenance(settings, facts), "images": rows}, indent=1)
        print_table(settings, prompts, {"score": numbers})
        try:
            write_aside(out / "evaluation.json", lambda aside: aside.write_text(result))
            save_records(out / "evaluation.png", images, records, settings.mark)
        except OSError as error:
            raise BadInput(f"--out {out}: the result cannot be written: {error.strerror}") from error
        print(f"\nevery image's reward and a picture of the first ones are in {out}")
    return 0


def parse_settings(arguments=None):
    """The command line, made from Settings; every value checked before any long work. BadInput for what is wrong."""
    import transformers

    transformers.logging.set_verbosity_error()  # torchvision is missing, it would say, which nothing here needs

    def error(message):
        raise BadInput(f"{message}; --help explains every setting")

    parser = transformers.HfArgumentParser(
        Settings, description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter, epilog=preset_help()
    )
    parser.error = error
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.resume or settings.evaluate:  # the run's own settings stand before the arguments, which win
        out = settings.out if settings.evaluate else settings.out or newest_run()
        run = saved_transformer(settings.evaluate).parent if settings.evaluate else Path(out)
        known = {field.name for field in dataclasses.fields(Settings)} - {"out", "resume", "evaluate"}
        saved = {name: value for name, value in saved_settings(run).items() if name in known and value is not None}
        for other_task in (set(), {"task", "train_prompts", "test_prompts", "reward_model", "kl"}):
            own = [f"--{name}={value}" for name, value in saved.items() if name not in other_task]
            settings = Settings(**vars(parser.parse_args([*own, *arguments, *([f"--out={out}"] if out else [])])))
            if settings.task == saved.get("task", settings.task):
                break  # else the run is to be judged by another task, with that one's prompts and reward
    cuda = torch.cuda.is_available()
    if settings.model is None:
        settings.model = SD35 if cuda else "tiny"
        if not cuda:
            print("note: no CUDA device, so this is the embedded tiny model (--model tiny); nothing is downloaded")
    preset = PRESETS["tiny" if settings.model == "tiny" else "sd3"]
    if settings.task == "pickscore":
        preset = preset | {"kl": PICKSCORE_KL}
    preset = preset | METHODS.get(settings.method, {})
    if settings.model == "tiny":
        preset = preset | TINY_METHODS.get(settings.method, {})
    for name, value in preset.items():
        if getattr(settings, name) is None:
            if isinstance(value, str):
                value = value.format(task=settings.task, suffix="jsonl" if settings.task == "geneval" else "txt")
            setattr(settings, name, str(ROOT / value) if name.endswith("prompts") else value)
    if settings.method == "fdfo" and settings.churn is None:
        settings.churn = 0.1 / max(settings.sampling_steps, 1)
    if settings.out is None:
        if launched()[1] > 1:
            raise BadInput("--out: under torchrun, name the run's folder, so that all processes mean the same one")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        what = "evaluate" if settings.evaluate else settings.method
        settings.out = f"runs/{settings.task}-{Path(settings.model).name}-{what}-{stamp}"
    check_settings(settings)
    return settings


def saved_settings(run):
    """The settings in a run's config.json; none where there is no such file, or another one."""
    with contextlib.suppress(OSError):
        saved = read_json(run / "config.json").get("settings")
        return saved if isinstance(saved, dict) else {}
    return {}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The epilog as it is written, and a default behind every setting that has one for all models and methods."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def newest_run():
    """The run under runs/ that was saved last."""
    found = sorted(Path("runs").glob("*/checkpoints"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BadInput("--resume: there is no run with a checkpoint under runs/; name its folder with --out")
    return found[-1].parent


def check_settings(settings):
    """BadInput for a value, or a combination of them, that cannot be meant."""
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        need(value in choices, f"--{name.replace('_', '-')} {value}: choose one of {', '.join(choices)}")
    tiny = settings.model == "tiny"
    need(
        not tiny or settings.task == "ocr", f"--task {settings.task}: the tiny model only writes words; use --task ocr"
    )
    need(settings.task != "ocr" or settings.reward_model is None, "--reward-model: the ocr reward takes none")
    if settings.evaluate is not None:
        saved_transformer(settings.evaluate)
    for name in (
        "iterations", "prompts_per_iteration", "batch_size", "optimizer_steps", "eval_every", "eval_steps",
        "save_every", "keep",
    ):  # fmt: skip
        need(getattr(settings, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
    need(settings.group_size >= 2, "--group-size must be at least 2: an image is compared with the rest of its group")
    need(settings.sampling_steps >= 3, "--sampling-steps must be at least 3")
    need(0 <= settings.allocation_strength <= 1, "--allocation-strength must lie in [0, 1]")
    need(0 < settings.noise_level <= 2, "--noise-level must lie in (0, 2]: without noise there is nothing to compare")
    for name in ("learning_rate", "clip_range"):
        need(0 < getattr(settings, name) < math.inf, f"--{name.replace('_', '-')} must be a positive number")
    need(0 <= settings.kl < math.inf, "--kl must be 0 or more")
    need(1 <= settings.guidance < math.inf, "--guidance must be at least 1, which is off")
    need(
        settings.method != "flow-grpo" or (settings.allocation, settings.allocation_strength) == ("uniform", 1.0),
        "--allocation and --allocation-strength belong to --method star and fdfo; flow-grpo has no maps",
    )
    fdfo = settings.method == "fdfo"
    need(fdfo or settings.churn is None, "--churn belongs to --method fdfo")
    if fdfo:
        check_fdfo(settings)
    images = settings.prompts_per_iteration * settings.group_size
    rank, processes = launched()
    shares = (1 if fdfo else settings.optimizer_steps) * processes  # fdfo deals out single denoising steps
    need(
        settings.evaluate or images % (settings.batch_size * shares) == 0,
        f"{settings.prompts_per_iteration} prompts x {settings.group_size} images = {images} do not split into "
        f"{settings.optimizer_steps} optimizer steps of whole batches of {settings.batch_size} in each of {processes} "
        "processes; change --batch-size",
    )
    need(
        not tiny or settings.resolution == TINY["image"],
        f"--resolution: the tiny model draws {TINY['image']} px images",
    )
    need(settings.resolution >= 16 and settings.resolution % 16 == 0, "--resolution must be a multiple of 16")
    need(settings.t5_length >= 0, "--t5-length must be 0 or more")
    need(not tiny or not settings.compile, "--compile: the tiny model runs on the CPU, where it does not pay")
    need(not tiny or settings.t5_length == 0, "--t5-length: the tiny model has no T5")
    blocks = settings.attention_blocks.split(",")
    need(
        all(b.isdecimal() for b in blocks),
        f"--attention-blocks {settings.attention_blocks}: write it as 9 or 8,9",
    )
    out = Path(settings.out)
    need(
        rank > 0 or settings.resume or not out.exists() or out.is_dir() and {p.name for p in out.iterdir()} <= {"lock"},
        f"--out {out} holds another run; name a new folder, or go on with it: --resume",
    )


def check_fdfo(settings):
    need(0 < settings.churn <= 1, "--churn must lie in (0, 1]: without it the two of a pair are the same image")
    for name in ("group_size", "batch_size"):
        need(
            getattr(settings, name) % 2 == 0,
            f"--{name.replace('_', '-')} must be even: fdfo compares the two images of a pair",
        )
    need(
        settings.optimizer_steps <= settings.sampling_steps,
        "--optimizer-steps may be at most --sampling-steps with --method fdfo: each takes a share of the steps",
    )
    need(settings.kl == 0, "--kl must be 0 with --method fdfo: its steps have no density to compare")
    need(
        settings.step_weights == "none",
        "--step-weights must be none with --method fdfo: its steps speak equally loud already",
    )


def main():
    if launched()[0] > 0:  # the first process prints
        sys.stdout = open(os.devnull, "w")
    try:
        settings = parse_settings()
        status = evaluate_saved(settings) if settings.evaluate else train(settings)
        if process_rank()[1] > 1:
            dist.destroy_process_group()
        if status:
            sys.exit(status)
    except BadInput as error:
        print(f"star.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        newest = next(iter(checkpoints(Path(settings.out)).values()), "none")
        print(f"star.py: stopped: {error}; the newest checkpoint: {newest}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        newest = next(iter(checkpoints(Path(settings.out)).values()), None)
        free, others = lighter(settings)
        advice = [f"--resume --out {settings.out} goes on from {newest}"] if newest else []
        advice += [f"try {', '.join(free)}"] if free else []
        advice += [f"a new run may take {', '.join(others)}"] if others else []
        what = str(error).splitlines()[0][:200]
        print(f"star.py: stopped: out of GPU memory ({what}); {'; '.join(advice)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
