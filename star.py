"""star.py: reinforcement learning for text-to-image flow models, each region and step with its share of the reward.

STAR (SpatioTemporal Adaptive Reward Allocation, arXiv 2606.17979) takes the usual group-relative advantage of an image
and applies it more strongly where the model's own text-image attention finds the prompt's core content, with a map for
every denoising step of every rollout. Five steps, each a function below, and a loop that calls them: train_iteration.

  1. Sample groups of images with an SDE; each of its steps is a Gaussian action.      sde_mean_std, token_log_prob
  2. On the way, read the attention of every region to the core of the prompt.         core_spans, capture_attention
  3. Make it an allocation map of mean 1, for every step and rollout.                  allocation_map
  4. Compare each image's reward with its group's.                                     group_advantages
  5. Update through a clipped objective resolved in space.                             star_objective

flow_grpo_objective is the scalar baseline (Flow-GRPO, arXiv 2505.05470); churn_step, fdfo_direction and fdfo_objective
are a second method (FDFO, arXiv 2603.12893). STAR is written from its paper's abstract alone: words "in quotes" are the
abstract's, and where it is silent a comment says what we chose and why. README.md has the list.

  python star.py --task ocr                       SD3.5 Medium with a CUDA GPU, else an embedded tiny model
  python star.py --task ocr --method flow-grpo    the baseline; or --method fdfo
  python star.py --resume                         go on with the last run after any interruption
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ======================================================================================================================
# Notation: these names, everywhere.
#
#   x_t    latents        [B, C, H, W]   noisy latents, x_t = (1 - sigma) x_0 + sigma n
#   sigma  sigma          float          flow time: 1 = noise, 0 = data
#   v      velocity       [B, C, H, W]   n - x_0 as the model predicts it, after classifier-free guidance (CFG)
#   P      tokens         int            image tokens, a 2x2 latent patch each, row-major; a *region* is one image token
#   N      text tokens    int            joint text sequence: the CLIP positions, then the T5 positions
#   S      attention      [B, P]         probability mass that an image token's query puts on core text tokens
#   M      allocation     [B, P]         allocation map: >= 0, mean over P exactly 1
#   A      advantages     [B]            group-relative advantage
#   l_p    log_prob       [B, P]         per-token mean of the Gaussian log-density of the step taken
#   rho_p  ratio          [B, P]         of the step's density, new over old: --ratio says of what
#
# One step of SD3.5 Medium at 512 px, in shapes:
#
#   x_t [B, 16, 64, 64] -> 32 x 32 patches -> P = 1024 image tokens;   prompt -> N = 77 + 128 text tokens
#   attention of block 9: image queries on 1024 + 205 keys, summed over the core text columns -> S, then M [B, 1024]
#   v [B, 16, 64, 64] -> Gaussian of the next latents -> log-density, mean over a patch's 16 x 2 x 2 -> l_p [B, 1024]
#   reward of the final image -> A [B];   loss: mean over 1024 regions of -min(rho_p M_p A, clip(rho_p) M_p A)

# ---------------------------------------------------------------------------------------------------------------------
# 1. The policy: one stochastic denoising step is one action, drawn from a Gaussian whose density we can write down.
#
# The flow's sampler is an ODE, dx = v dsigma: nothing is drawn, so there is no density to reinforce. Flow-GRPO's way
# out: x = (1 - sigma) x_0 + sigma n and v = n - x_0 give E[n | x] = x + (1 - sigma) v, hence the score
#     grad log p(x) = -E[n | x] / sigma = -(x + (1 - sigma) v) / sigma.
# Adding noise of any strength s, and the drift -(s^2 / 2) grad log p that makes up for it, leaves all marginals p(x):
#     dx = (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + s dw,       s = a sqrt(sigma / (1 - sigma))
# One Euler-Maruyama step of it is sde_mean_std. s is infinite at sigma = 1, so the first step takes 1 - sigma_max, the
# largest sigma below 1, in its denominator.

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
    log_density = -((next_latents.float() - mean.float()) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))
    return F.avg_pool2d(log_density.mean(1, keepdim=True), patch_size).flatten(1)  # [B, 1, H, W] -> [B, P]

def step_weights(sigmas, noise_level, window):
    """--step-weights equal: the weight of each trained step's loss, std / |d mean / d velocity|, of mean 1.

    The gradient with respect to the velocity goes as the inverse, which over Flow-GRPO's nine steps grows 26-fold: the
    last ones would dominate every update, whatever they have to say (ours; TempFlow-GRPO and GRPO-Guard reweight for
    the same reason). sigmas: the sampler's grid, T + 1 floats from 1 to 0, of which `window` steps are trained.
    """
    pairs, zero, one = pairwise(sigmas[: window + 1]), torch.zeros(1), torch.ones(1)
    steps = [sde_mean_std(zero, one, *pair, sigmas[1], noise_level) for pair in pairs]
    weights = [std / abs(gain.item()) for gain, std in steps]  # the mean is linear in v
    return [weight * window / sum(weights) for weight in weights]

# ---------------------------------------------------------------------------------------------------------------------
# 2. Where does the model itself look for the prompt's core content? "Text-image attention", captured on the way.
#
# The abstract does not say which attention. We take SD3's joint attention, image queries on text keys, heads averaged,
# in the block that localises best (--attention-blocks). The softmax runs over *all* keys, image and text: so S is a
# probability, the share of an image token's attention that the core gets, and can be compared between tokens. Softmax
# over the text keys alone would be large even where a token hardly looks at the text.

@torch.no_grad()
def core_attention(attn, image_states, text_states, core_mask, hops=0):
    """S: the share of each image token's attention that goes to the core text tokens, averaged over heads.

        S = softmax(Q_image [K_image; K_text]^T / sqrt(d)) 1_core

    is attention to *values that are the indicator of the core tokens*: one more scaled_dot_product_attention, and the
    [P, P + N] matrix is never formed. Every channel of the value is the indicator, so any channel of the output is S.

    attn: diffusers Attention of an SD3 block; image_states [B', P, D], text_states [B', N, D]: its inputs;
    core_mask [B, N] bool. With CFG, B' = 2B and the conditional half comes last. Returns [B, P] fp32 in [0, 1].

    A hop carries S on through the image's own attention: S' = softmax(Q_image K_image^T / sqrt(d)) S, heads averaged.
    Text attention marks what is drawn; its surroundings, where something may be missing, attend to it and are found so.
    """
    image_states, text_states = image_states[-len(core_mask) :], text_states[-len(core_mask) :]

    def heads(linear, norm, states):  # [B, L, D] -> [B, heads, L, head_dim], after SD3.5's RMS norm of q and k
        states = linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return states if norm is None else norm(states)

    query = heads(attn.to_q, attn.norm_q, image_states)
    image_key = heads(attn.to_k, attn.norm_k, image_states)
    key = torch.cat([image_key, heads(attn.add_k_proj, attn.norm_added_k, text_states)], dim=2)  # image tokens first
    indicator = F.pad(core_mask.to(key.dtype), (image_states.shape[1], 0))  # [B, P + N]
    value = indicator[:, None, :, None].expand_as(key).contiguous()
    share = F.scaled_dot_product_attention(query, key, value)[..., 0].float().mean(1)  # [B, heads, P] -> [B, P]
    for _ in range(hops):
        value = share.to(key.dtype)[:, None, :, None].expand_as(query).contiguous()
        share = F.scaled_dot_product_attention(query, image_key, value)[..., 0].float().mean(1)
    return share

@contextlib.contextmanager
def capture_attention(transformer, core_mask, blocks, hops=0):
    """Within this context every forward of a diffusers SD3Transformer2DModel leaves S in the list it yields.

    core_mask [B, N] bool; blocks: indices of joint blocks. Each forward appends one [B, P] a block, in order. Hooks
    read what the attention is given, so the output is bitwise what it is without; they are removed on exit, also after
    an exception. SD3.5's second attention (attn2) sees no text and is left alone.
    """
    captured = []

    def read(attn, _, states):
        image_states, text_states = states["hidden_states"], states["encoder_hidden_states"]
        captured.append(core_attention(attn, image_states, text_states, core_mask, hops))

    hooks = [transformer.transformer_blocks[b].attn.register_forward_pre_hook(read, with_kwargs=True) for b in blocks]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()

# "The core content that the user truly cares about in the prompt" is all the abstract says. We take what the reward
# looks at: ocr, the quoted text; geneval, the objects, colours, counts and relations that the prompt's own metadata
# names; pickscore, every word that is not a function word.

STOP_WORDS = frozenset(
    "a an the and or but of in on at by to from with without into onto over under as for is are was were be been being "
    "it its this that these those there their his her they he she who which while has have had very".split()
)
NUMBER_WORDS = "zero one two three four five six seven eight nine".split()

def quoted_span(prompt):
    """(start, end) of the characters between the first pair of ASCII double quotes. ValueError if there are none."""
    start = prompt.find('"') + 1
    end = prompt.find('"', start)
    if start == 0 or end == -1 or not prompt[start:end].strip():
        raise ValueError('no text between double quotes; write it as: a sign that says "HELLO"')
    return start, end

def content_spans(prompt):
    """Spans of all words but function words; of those too where nothing else is left."""
    words = [match.span() for match in re.finditer(r"\w+(?:['’-]\w+)*", prompt)]
    return [(a, b) for a, b in words if prompt[a:b].lower() not in STOP_WORDS] or words

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
        count = clause.get("count", 1)
        names = [clause.get("color"), *clause.get("position", ())[:1]]
        names += [str(count), *NUMBER_WORDS[count : count + 1]] if count > 1 else []
        phrases += [re.escape(name) for name in names if name]
        phrases.append(re.escape(clause["class"]) + "(?:e?s)?")  # GenEval's plurals: apples, buses, knifes
    found = re.finditer(rf"\b(?:{'|'.join(sorted(phrases, key=len, reverse=True))})\b", prompt, re.IGNORECASE)
    return [match.span() for match in found] or content_spans(prompt)

def token_mask(spans, offsets):
    """Which tokens overlap the spans. offsets: one (start, end) of characters a token, as fast tokenizers give them;
    special and padding tokens are empty (start == end) and never core. Returns a list of bool."""
    return [any(start < b and a < end for a, b in spans) and start < end for start, end in offsets]

# ---------------------------------------------------------------------------------------------------------------------
# 3. From attention to "spatial allocation maps that dynamically vary across denoising steps and rollouts".
#
# Which step's attention makes a step's map? The abstract does not say. A step's own S is vague in the first steps, where
# most of the reward is decided; so we take the mean of S over the steps from each one on (hindsight): where the content
# ended up, still another map for every step and rollout. Such a map also depends on where the step's own noise led, so
# M_p grad l_p is not zero on average, and would push without any reward; advantages that sum to zero over a group
# cancel that. Hence maps on all images, the bad ones too.
#
# What is temporal in it? M has mean 1 at every step, so a map moves credit over space only; which region it favours
# follows the step, from a vague guess in noise to the very letters. Credit moves over *time* by --step-weights and by
# --sde-window, which trains the first steps alone: there the composition is decided, and there is the signal.

def hindsight(attention):
    """At each step t the mean of S over the steps t..T-1: where the content ended up. [T, ..., P] -> [T, ..., P].

    The first steps' own S is still vague, while much of the reward is decided there; and when the update comes, all
    steps are known.
    """
    steps = torch.arange(1, len(attention) + 1, device=attention.device).view(-1, *[1] * (attention.ndim - 1))
    return (attention.flip(0).cumsum(0) / steps).flip(0)

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

def map_norm(allocation):
    """Root mean square of each map [..., P] -> [...], 1 for a uniform one. A concentrated map makes a step's gradient
    larger by about this, and maps concentrate as sigma falls: --step-weights equal divides by it, image by image."""
    return allocation.square().mean(-1).sqrt()

# ---------------------------------------------------------------------------------------------------------------------
# 4. "The same group-relative advantage", as Flow-GRPO computes it.

def group_advantages(rewards, group_size):
    """A_i = (r_i - mean of its group) / (std of the whole batch + 1e-4), clamped to [-5, 5].

    rewards [B], groups contiguous: rows 0..group_size-1 are the first prompt's. Returns [B] fp32.
    A missing reward (NaN) has advantage 0 and counts for neither mean nor std; a group of equal rewards gives
    exactly 0. Raises ValueError if B does not divide into groups.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = rewards.double().view(-1, group_size)
    kept = groups.isfinite()
    std = groups[kept].std(correction=0)  # over the whole batch: Flow-GRPO's global std
    centred = groups - groups.where(kept, -math.inf).amax(1, keepdim=True)  # equal rewards become exact zeros
    centred = centred - centred.where(kept, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    return (centred / (std + 1e-4)).clamp(-5, 5).where(kept, 0).flatten().float()

# ---------------------------------------------------------------------------------------------------------------------
# 5. The "spatially resolved policy objective", and the scalar baseline it reduces to.
#
# At theta = theta_old every ratio is 1 and nothing is clipped, so the gradient of an image's loss is
#     -sum_p M_p A grad l_p / P.
# That line is all of STAR: Flow-GRPO's has A alone (--step-weights equal scales it, by w_t / rms M). What follows
# bounds how far one sampling round may carry it. As M >= 0, the sign of M_p A is the image's own, so PPO's pessimistic
# min clips each region on the side that A says, and M only scales it. The clip range meets what --ratio says:
#   region  rho_p = exp(l_p - l_p_old), each region's own. A mean over 64 numbers spreads wider than one over 64 P, so
#           the range is widened by sqrt(P): right for independent regions, generous where they drift together.
#           (The default; BoxFlow-GRPO, arXiv 2606.06113, takes it with the range as it is.)
#   image   rho_p = sg(r) exp(l_p - sg(l_p)), r = exp(mean_p(l_p - l_p_old)), sg: no gradient. Flow-GRPO's ratio in
#           value, in Flow-GRPO's clip range, with a gradient for each region: -sum_p M_p A r grad l_p / P where the
#           image is not clipped, 0 where it is; M = 1 *is* Flow-GRPO. (DenseFlow-GRPO's form.)

@torch.no_grad()
def ratio_stats(log_ratio, clip_range):
    """How far the policy has moved from the one that sampled: statistics of rho over whatever log_ratio's shape is."""
    ratio = log_ratio.exp()
    return {
        "ratio": ratio.mean(),
        "ratio_deviation": (ratio - 1).abs().max(),
        "clip_high": (ratio > 1 + clip_range).float().mean(),
        "clip_low": (ratio < 1 - clip_range).float().mean(),
        "approximate_kl": 0.5 * (log_ratio**2).mean(),
    }

def clipped_objective(log_ratio, advantages, clip_range):
    """The mean of PPO's -min(rho A, clip(rho, 1 - eps, 1 + eps) A), and statistics of rho. Shapes broadcast."""
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return loss.mean(), ratio_stats(log_ratio, clip_range)

def star_objective(log_prob, old_log_prob, advantages, allocation, clip_range, ratio="region"):
    """STAR's spatially resolved clipped objective: every region has its own share of the advantage.

        L = -mean_p min( rho_p M_p A, clip(rho_p, 1 - eps_p, 1 + eps_p) M_p A )
        ratio="region":  rho_p = exp(l_p - l_p_old),                                     eps_p = eps sqrt(P)
        ratio="image":   rho_p = sg(r) exp(l_p - sg(l_p)),  r = exp(mean_p(l_p - l_p_old)),  eps_p = eps

    log_prob, old_log_prob, allocation [B, P]; advantages [B]; clip_range is eps, the image-level one (Flow-GRPO: 1e-4).
    Gradient flows through log_prob alone. Returns (loss scalar, stats: of rho, and how concentrated the maps are: their
    entropy, 1 = uniform and 0 = one region, their maximum, the share of their top tenth). ValueError for another ratio.
    """
    if ratio not in ("region", "image"):
        raise ValueError(f"ratio must be region or image, got {ratio!r}")
    log_ratio, tokens, allocation = log_prob - old_log_prob.detach(), log_prob.shape[-1], allocation.detach()
    if ratio == "image":  # the image's in value, the region's own in gradient
        log_ratio = log_ratio - log_ratio.detach() + log_ratio.detach().mean(-1, keepdim=True)
    else:
        clip_range = clip_range * math.sqrt(tokens)
    loss, stats = clipped_objective(log_ratio, allocation * advantages[:, None], clip_range)  # M A
    share = allocation / allocation.sum(-1, keepdim=True)  # a distribution over the image
    stats["allocation_entropy"] = -torch.special.xlogy(share, share).sum(-1).mean() / math.log(tokens)
    stats["allocation_max"] = allocation.amax(-1).mean()
    stats["allocation_top10"] = share.topk(max(1, round(tokens / 10)), dim=-1).values.sum(-1).mean()
    return loss, stats

def flow_grpo_objective(log_prob, old_log_prob, advantages, clip_range):
    """Flow-GRPO's objective (arXiv 2505.05470): one ratio exp(mean_p(l_p - l_p_old)) and one advantage an image.

    log_prob, old_log_prob [B, P]; advantages [B]. Returns (loss scalar, stats).
    """
    return clipped_objective((log_prob - old_log_prob.detach()).mean(-1), advantages, clip_range)

def kl_to_reference(mean, reference_mean, std, dt):
    """KL of the step from the reference policy's: mean of (mean - reference_mean)^2 / (2 std_dev^2), Flow-GRPO's form.

    mean, reference_mean [B, C, H, W]; std and dt as of sde_mean_std. std_dev = std / sqrt(-dt) leaves sqrt(-dt) out, as
    Flow-GRPO does, so that its weights (0.04 ocr and geneval, 0.01 pickscore) carry over, up to the step's. A scalar.
    """
    return ((mean - reference_mean.detach()) ** 2).mean() * (-dt) / (2 * std**2)

# ---------------------------------------------------------------------------------------------------------------------
# The second method: FDFO, Finite Difference Flow Optimization (arXiv 2603.12893). The whole sampling run is one action:
# two trajectories share their noise but for a little ("churn"), and the velocity is pulled toward the better image.

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
    branches, and on average the reward's gradient. A pair that lacks a reward (NaN) is a tie, which pulls nowhere.
    ValueError for an odd number.
    """
    if len(rewards) % 2 or len(rewards) != len(final_latents):
        raise ValueError(f"{len(rewards)} rewards do not make pairs")

    def from_pair_mean(values):  # half the difference, with opposite signs: exactly 0 for a tie
        half = (values[0::2] - values[1::2]) / 2
        return torch.stack([half, -half], dim=1).flatten(0, 1)

    delta = from_pair_mean(final_latents.float())
    difference = from_pair_mean(rewards.double()).float()
    direction = delta / (delta.square().mean((1, 2, 3), keepdim=True) + 1e-6)
    return difference.where(difference.isfinite(), 0), direction

def fdfo_objective(velocity, old_velocity, reward_difference, direction, clip_range):
    """FDFO's objective of one step: pull v toward v_old - d where dR > 0, away from it where dR < 0, and not too far.

        dv  = v - v_old,    rho = exp(-<dv (dv + 2 d)>)       i.e. exp(-<(v - v*)^2> + <d^2>) with v* = v_old - d
        L   = mean_B( -dR rho + |dR| / (2 eps) (rho - 1)^2 )  whose optimum is rho = 1 + eps sign(dR)

    velocity, old_velocity, direction [B, C, H, W]; reward_difference [B]; clip_range is eps (0.03); < > the mean over
    C, H, W. Gradient flows through velocity alone. Returns (loss scalar, stats).
    """
    difference = velocity.float() - old_velocity.detach().float()
    log_ratio = -(difference * (difference + 2 * direction)).mean((1, 2, 3))
    ratio = log_ratio.exp()
    penalty = reward_difference.abs() / (2 * clip_range) * (ratio - 1) ** 2
    return (penalty - reward_difference * ratio).mean(), ratio_stats(log_ratio, clip_range)

# ======================================================================================================================
# The loop: sample, reward, compare, allocate, update. Its parts stand below it.

def train_iteration(policy, reference, optimizer, prompts, reward, settings, iteration):
    """One iteration of STAR (or Flow-GRPO, or FDFO) on some prompts, as many as groups. reference: the frozen starting
    model, or None without KL. Returns one line of metrics.jsonl."""
    key, sigmas, began = (settings.seed, iteration), policy.sigmas(settings.sampling_steps), time.perf_counter()
    star, trained = settings.method == "star", settings.trained_steps
    # 1, 2. Sample groups of images (fdfo: pairs); read the attention to the prompt's core on the way.
    captured = settings.captured_steps if star else 0
    samples = sample(policy, prompts, settings.group_size, settings, key, sigmas, trained, captured)
    # Reward every final image, one microbatch while the next is sampled.
    rollouts, _, scores = reward_all(samples, prompts, settings.group_size, reward, settings)
    rewards, sampled = scores[:, 0], time.perf_counter()
    # 4. Compare each image with its group (fdfo: with its twin).
    advantages = group_advantages(rewards, settings.group_size)
    for rollout in rollouts:
        rollout.advantages = advantages[rollout.rows].to(policy.device)
        if settings.fdfo:
            pairs = rewards[rollout.rows].to(policy.device)
            rollout.advantages, rollout.direction = fdfo_direction(rollout.latents[-1], pairs)
        # 3. Allocate: every step of every rollout has a map of its own, of mean 1.
        if star:
            rollout.allocation = step_maps(rollout.attention, settings)[:trained]
    # 5. Update: one pass over the rollouts, in a few optimizer steps.
    weights = step_weights(sigmas, settings.noise_level, trained) if settings.step_weights == "equal" else [1] * trained
    rounds, skipped = deal(rollouts, settings, key)
    share = len(rollouts) * trained / settings.optimizer_steps  # microbatch-steps in an optimizer step
    history, deviations, norms = [], [0.0], []
    for number, work in enumerate(rounds):
        for rollout, steps in work:
            taken, mean, std = act(policy.transformer, rollout, steps, sigmas, settings)  # l_p [B, P]; fdfo: v
            if number == 0:  # theta = theta_old, so l_p is l_p_old, and the ratio exactly 1
                deviations.append(float(objective(taken.detach(), rollout, steps, settings)[1]["ratio_deviation"]))
                rollout.old[steps, rollout.each] = taken.detach()
            loss, stats = objective(taken, rollout, steps, settings)
            if reference is not None:
                with torch.no_grad():
                    reference_mean = act(reference, rollout, steps, sigmas, settings)[1]
                i = int(steps[0])
                kl = kl_to_reference(mean, reference_mean, std, sigmas[i + 1] - sigmas[i])
                loss, stats["kl"] = loss + settings.kl * kl, kl.detach()
            (loss * weights[steps[0]] / share).backward()
            history.append({name: float(value) for name, value in stats.items()})
        if number == 0 and (max(deviations) > 0 or not work):  # the sampler's kernels gave another l_p, which must not
            for rollout, steps in sum(rounds[1:], []):  # pass for a ratio: the later rounds' old side is taken anew
                rollout.old[steps, rollout.each] = act(policy.transformer, rollout, steps, sigmas, settings)[0].detach()
        norms.append(optimizer.step())
    metrics = summary(rewards, history, deviations, skipped, norms, optimizer)
    metrics |= {"seconds_sampling": sampled - began, "seconds_update": time.perf_counter() - sampled}
    return {"iteration": iteration, **metrics}

def step_maps(attention, settings):
    """M of every captured step: S [T, B, P] -> [T, B, P]."""
    if settings.attention_steps == "later":
        attention = hindsight(attention)
    return allocation_map(attention, settings.allocation_strength)

@torch.no_grad()
def sample(policy, prompts, copies, settings, key, sigmas, noisy=0, captured=0):
    """Sample `copies` images of every prompt: a generator of (rollout, images [B, 3, h, w] uint8), by microbatch. A
    rollout is what the update needs to take the same forward passes again, on the same rows.

    key: what the noise depends on besides (prompt, copy): (seed, iteration). The first `noisy` steps are stochastic and
    may be trained on, the rest Euler's; of the first `captured` the attention to the core is read. In training the
    images are dealt to microbatches in random order, so that every optimizer step sees all prompts.
    """
    embeddings, pooled = policy.encode([prompt.text for prompt in prompts] + [""])  # [K + 1, ...]: every prompt once
    masks = policy.core_mask(prompts) if captured else embeddings.new_zeros(len(prompts), 0)
    churn = (settings.churn or 0.1 / settings.sampling_steps) if settings.fdfo and noisy else None
    draw = functools.partial(sample_noise, key, noisy=noisy, shape=policy.latent_shape, churn=churn)
    for rows in microbatches(len(prompts) * copies, settings, key if noisy else None):
        slots, noise = rows // copies, torch.stack([draw(*divmod(row, copies)) for row in rows.tolist()])
        index = torch.cat([torch.full_like(slots, len(prompts)), slots]) if settings.guidance > 1 else slots
        text = lambda index=index: (embeddings[index], pooled[index])
        latents, old, attention = denoise(
            policy.transformer, text(), masks[slots], noise.to(policy.device), sigmas, settings, captured, churn
        )
        rollout = SimpleNamespace(
            rows=rows,  # [B]: which of the iteration's images these are
            text=text,  # () -> (embeddings [B or 2B, N, D], pooled [B or 2B, D]); with CFG the empty half first
            latents=torch.stack(latents[: max(noisy, captured) + 1]),  # [K + 1, B, C, H, W] fp32
            old=torch.stack(old) if noisy else None,  # [K, B, P], l_p under the policy that sampled; fdfo: its v
            attention=torch.stack(attention) if captured else None,  # [K, B, P], S
            each=torch.arange(len(rows)),  # [B]: beside each image's own step [B], the index into what is kept by step
        )
        yield rollout, policy.decode(latents[-1])

def microbatches(count, settings, key=None):
    """Which rows this process takes together: a list of [B]. With a key the images (fdfo: pairs) come in random order,
    a function of the key and never of the batch size; under torchrun the microbatches are dealt to the processes."""
    rows = torch.arange(count)
    if key is not None:
        rows = rows.view(-1, 2 if settings.fdfo else 1)
        rows = rows[torch.randperm(len(rows), generator=generator(*key, "order"))].flatten()
    rank, processes = process_rank()
    return rows.split(settings.batch_size)[rank::processes]

def generator(*key):
    """A CPU generator that is a function of its key (seed, iteration, prompt's place, copy) alone, not of history: its
    noise depends neither on the batches nor on what was drawn before, and a resume needs no state."""
    digest = blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

def sample_noise(key, prompt, copy, noisy, shape, churn=None):
    """One trajectory's noise [1 + noisy, *shape]: its start, then each stochastic step's. With churn, copies 2k and
    2k + 1 of a prompt start from the same noise but for FDFO's first re-noising."""
    noise = torch.randn(1 + noisy, *shape, generator=generator(*key, prompt, copy))
    if churn:
        shared = torch.randn(shape, generator=generator(*key, prompt, "pair", copy // 2))
        noise[0] = churn_step(shared, torch.zeros(shape), 1.0, 1.0, churn, noise[0])
    return noise

def predict_velocity(transformer, latents, sigma, text, guidance):
    """v [B, C, H, W] fp32; sigma [B]. guidance g > 1: v = v_empty + g (v_prompt - v_empty), halves of one batch."""
    repeats = 2 if guidance > 1 else 1
    hidden, timestep = latents.to(transformer.dtype), (sigma * 1000).to(latents.device)
    velocity = transformer(
        hidden_states=torch.cat([hidden] * repeats), encoder_hidden_states=text[0], pooled_projections=text[1],
        timestep=timestep.repeat(repeats), return_dict=False,
    )[0].float()  # fmt: skip
    if guidance > 1:
        empty, prompt = velocity.chunk(2)
        velocity = empty + guidance * (prompt - empty)
    return velocity

def denoise(transformer, text, core_mask, noise, sigmas, settings, captured, churn):
    """From pure noise to an image in latent space: (latents: T + 1 of [B, C, H, W], old: l_p [B, P] of each stochastic
    step, fdfo: v; attention: S [B, P] of each captured step, averaged over blocks). noise [B, 1 + noisy, C, H, W]."""
    latents, old, attention = [noise[:, 0]], [], []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        blocks = settings.blocks if i < captured else ()
        with capture_attention(transformer, core_mask, blocks, settings.attention_hops) as maps:
            velocity = predict_velocity(
                transformer, latents[-1], torch.full((len(noise),), sigma), text, settings.guidance
            )
        attention += [torch.stack(maps).mean(0)] if maps else []
        noisy = i + 1 < noise.shape[1]
        if noisy and churn:
            latents.append(churn_step(latents[-1], velocity, sigma, sigma_next, churn, noise[:, i + 1]))
            old.append(velocity)
        else:
            noise_level = settings.noise_level * noisy  # 0: the Euler step
            mean, std = sde_mean_std(latents[-1], velocity, sigma, sigma_next, sigmas[1], noise_level)
            latents.append(mean + std * noise[:, i + 1] if noisy else mean)
            old += [token_log_prob(latents[-1], mean, std, transformer.config.patch_size)] if noisy else []
    return latents, old, attention

def deal(rollouts, settings, key):
    """Which (rollout, each image's denoising step [B]) goes into which optimizer step: (a list of lists, how many
    rollouts were left out). star and flow-grpo take whole trajectories one after the other; fdfo some steps of every
    trajectory, in an order of each image's own, so that every optimizer step sees all images and all noise levels."""
    rounds, skipped, trained = [[] for _ in range(settings.optimizer_steps)], 0, settings.trained_steps
    for index, rollout in enumerate(rollouts):
        if settings.kl == 0 and not rollout.advantages.any():  # the gradient is exactly zero; only whole microbatches
            skipped += 1  # are left out, or the kernels would be others than the sampler's
        elif settings.fdfo:
            orders = [torch.randperm(trained, generator=generator(*key, "deal", row)) for row in rollout.rows.tolist()]
            for place, steps in enumerate(torch.stack(orders, dim=1)):
                rounds[place * len(rounds) // trained].append((rollout, steps))
        else:
            steps = [torch.full_like(rollout.rows, i) for i in range(trained)]
            rounds[index * len(rounds) // len(rollouts)] += [(rollout, step) for step in steps]
    return rounds, skipped

def act(transformer, rollout, steps, sigmas, settings):
    """A step of the rollout again, under the transformer as it is now: (l_p [B, P] of the step that was taken, mean and
    std of its Gaussian). fdfo's steps have no density: (v, None, None)."""
    latents, sigma, i = rollout.latents[steps, rollout.each], torch.tensor(sigmas)[steps], int(steps[0])
    velocity = predict_velocity(transformer, latents, sigma, rollout.text(), settings.guidance)
    if settings.fdfo:
        return velocity, None, None
    mean, std = sde_mean_std(latents, velocity, sigmas[i], sigmas[i + 1], sigmas[1], settings.noise_level)
    return token_log_prob(rollout.latents[i + 1], mean, std, transformer.config.patch_size), mean, std

def objective(taken, rollout, steps, settings):
    """The method's objective of what act() gives: (loss, stats)."""
    old, advantages = rollout.old[steps, rollout.each], rollout.advantages
    if settings.fdfo:
        return fdfo_objective(taken, old, advantages, rollout.direction, settings.clip_range)
    if settings.method == "flow-grpo":
        return flow_grpo_objective(taken, old, advantages, settings.clip_range)
    allocation = rollout.allocation[steps, rollout.each]
    if settings.step_weights == "equal":
        advantages = advantages / map_norm(allocation)
    return star_objective(taken, old, advantages, allocation, settings.clip_range, settings.ratio)

def summary(rewards, history, deviations, skipped, norms, optimizer):
    """Columns of metrics.jsonl, over all processes; README.md explains them. RunStopped without any update."""
    parts = gather((history, max(deviations), skipped))
    history, deviation = sum((part[0] for part in parts), []), max(part[1] for part in parts)
    columns = {name: torch.tensor([stats[name] for stats in history]) for name in (history[0] if history else ())}
    finite, taken = rewards[rewards.isfinite()], [norm for norm in norms if math.isfinite(norm)]
    if not taken:
        raise RunStopped("no gradient was finite; lower --learning-rate")
    norm, parameters = sum(taken) / len(taken), sum(parameter.numel() for parameter in optimizer.parameters)
    return {
        "reward": finite.mean().item(),
        **{name: column.nan_to_num().mean().item() for name, column in columns.items()},
        "ratio_deviation": deviation, "gradient_norm": norm, "gradient_rms": norm / math.sqrt(parameters),
        "dropped": len(rewards) - len(finite), "skipped": sum(part[2] for part in parts),
        "steps_skipped": len(norms) - len(taken),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9  # without CUDA 0
    }  # fmt: skip

# ======================================================================================================================
# Settings. A field's default is SD3.5 Medium's; PRESETS has what task, model and method change. `--help` shows both.

SD35 = "stabilityai/stable-diffusion-3.5-medium"
ROOT = Path(__file__).resolve().parent
TINY = ROOT / "assets/tiny"
GRPO = "star flow-grpo"

def setting(default, help, low=-math.inf, high=math.inf, only=None, free=False):
    """A field: smallest and largest value that can be meant, the methods that alone have it, may resume change it?"""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, only=only, free=free))

@dataclasses.dataclass
class Settings:
    task: Literal["ocr", "geneval", "pickscore"] = setting("ocr", "what is rewarded: text, objects, or being liked")
    model: str = setting("", f"tiny (embedded), or an SD3 / SD3.5 id or folder; by default {SD35} with CUDA, else tiny")
    method: Literal["star", "flow-grpo", "fdfo"] = setting("star", "an advantage by region, by image, or FDFO's pairs")
    transformer: str = setting("", "start from a run's folder, or its transformer/; --iterations 0: only score it")
    reward_model: str = setting("", "local copy of the reward's CLIP; geneval: of detector/ and clip/", free=True)
    # STAR: the abstract gives no number, so these are ours.
    allocation_strength: float = setting(1.0, "lambda: 0 uniform maps, 1 the attention's alone", 0, 1, "star")
    attention_blocks: str = setting("9", "joint blocks to read, e.g. 9 or 8,9,10")  # Seg4Diff: 9 of 24 localises best
    attention_hops: int = setting(1, "times that the image's own attention carries the map on", 0, 2, "star")
    attention_steps: Literal["own", "later"] = setting("later", "a step's own map, or the mean from it on", only="star")
    ratio: Literal["region", "image"] = setting("region", "clip each region's ratio, or the image's", only="star")
    step_weights: Literal["none", "equal"] = setting("equal", "equal: all steps and maps count alike", only=GRPO)
    sde_window: int = setting(4, "noise and training in the first K steps, Euler's after (Flow-GRPO: 9)", 1, only=GRPO)
    # Flow-GRPO's recipe for SD3.5 Medium, but where a comment says otherwise.
    iterations: int = setting(1000, "rounds of sampling and updating; 0: only evaluate", 0, free=True)  # ours
    prompts_per_iteration: int = setting(16, "groups an iteration", 1)  # ours: Flow-GRPO's 48 are for 24 GPUs
    group_size: int = setting(24, "images a prompt, compared with each other", 2)  # 12 and 6 collapsed on PickScore
    batch_size: int = setting(2, "images a forward pass, in sampling and update; memory goes with it", 1, free=True)
    optimizer_steps: int = setting(2, "optimizer steps an iteration, in one pass over the images", 1)
    learning_rate: float = setting(1e-5, "AdamW's, constant; every parameter trains", 1e-12, 1)  # its LoRA: 3e-4
    clip_range: float = setting(1e-4, "eps of an image-level ratio; star's regions have eps sqrt(P)", 1e-12, 1e3)
    kl: float = setting(0.04, "weight of the KL to the starting model; 0 keeps no reference copy", 0, 1e6, GRPO)
    guidance: float = setting(4.5, "classifier-free guidance, in sampling, update and evaluation; 1 = off", 1, 100)
    sampling_steps: int = setting(10, "denoising steps of a rollout", 3)
    noise_level: float = setting(0.7, "a of the SDE: how much a step explores", 1e-3, 2, GRPO)
    churn: float = setting(0.0, "g: share of fresh noise a step; 0: 0.1 / steps", 0, 1, "fdfo")
    eval_every: int = setting(50, "iterations between evaluations on the test prompts", 1, free=True)  # ours
    eval_steps: int = setting(40, "denoising steps of evaluation's deterministic sampler", 1)
    resolution: int = setting(512, "pixels a side", 16)
    t5_length: int = setting(128, "text positions for T5; 0 leaves T5 out", 0)
    # How it is run: ours.
    dtype: Literal["bf16", "fp32"] = setting("bf16", "the weights of forward and backward; the optimizer's are fp32")
    gradient_checkpointing: bool = setting(False, "a third more arithmetic, a tenth of the activations", free=True)
    optimizer_device: Literal["cuda", "cpu"] = setting("cuda", "of masters and moments; cpu: 24 GB cards", free=True)
    train_prompts: str = setting("", "file, one prompt a line (geneval: JSON lines); Flow-GRPO's files work")
    test_prompts: str = setting("", "file, likewise; evaluated in order")
    seed: int = setting(0, "of everything random in the run")
    out: str = setting("", "the run's folder; by default runs/<task>-<model>-<method>-<time>", free=True)
    save_every: int = setting(5, "iterations between checkpoints, besides the first and the last", 1, free=True)
    resume: bool = setting(False, "go on with the run in --out, or the one saved last, as it was set", free=True)

    @property
    def blocks(self):
        return tuple(map(int, self.attention_blocks.split(",")))

    @property
    def fdfo(self):
        return self.method == "fdfo"

    @property
    def captured_steps(self):
        return self.sampling_steps if self.attention_steps == "later" else self.trained_steps

    @property
    def trained_steps(self):
        return self.sampling_steps if self.fdfo else self.sde_window

FIELDS = {entry.name: entry for entry in dataclasses.fields(Settings)}
PRESETS = {  # merged in this order: task, model, method, model with task, model with method; then what you say
    "pickscore": dict(kl=0.01),  # Flow-GRPO
    "tiny": dict(  # ours; rates, clip range (it clips next to nothing) and churn are of assets/evidence.py's tuning
        attention_blocks="2", iterations=24, prompts_per_iteration=8, group_size=16, batch_size=32,
        learning_rate=1.5e-4, clip_range=1e-3, kl=0.0, guidance=1.0, eval_every=8, eval_steps=10, resolution=64,
        t5_length=0, dtype="fp32"
    ),
    "fdfo": dict(optimizer_steps=4, clip_range=0.03, step_weights="none", kl=0.0, guidance=1.0),  # FDFO
    "tiny geneval": dict(iterations=12, reward_model=f"{TINY}/rewards"),  # its detector/ and clip/
    "tiny pickscore": dict(reward_model=f"{TINY}/rewards/pickscore"),
    "tiny fdfo": dict(learning_rate=6e-5, churn=0.1),  # at churn 0.01 most pairs tie
}  # fmt: skip

class BadInput(Exception):
    """Something the user can mend: printed as one line, exit status 2."""

class RunStopped(Exception):
    """The run cannot go on: printed as one line, exit status 1."""

def need(condition, message):
    if not condition:
        raise BadInput(message)

def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"

def flag(name):
    return f"--{name.replace('_', '-')}"

def parse_settings(arguments=None):
    """The command line, made from Settings; every value checked before any long work. BadInput for what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, kind in get_type_hints(Settings).items():
        others = [f"; {preset}: {values[name]}" for preset, values in PRESETS.items() if name in values]
        text = f"{FIELDS[name].metadata['help']} [{FIELDS[name].default}{''.join(others)}]".removesuffix(" []")
        options = {"choices": get_args(kind)} if get_args(kind) else {"type": kind}
        options = {"action": "store_true"} if kind is bool else options
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=textwrap.fill(text, 90), **options)

    parser.error = lambda message: need(False, f"{message}; --help explains every setting")
    given = vars(parser.parse_args(arguments))
    given = resumed(given) if given.get("resume") else given
    if not given.get("model"):
        given["model"] = SD35 if torch.cuda.is_available() else "tiny"
        print(f"note: --model {given['model']} (with a CUDA device SD3.5 Medium, else tiny, which downloads nothing)")
    settings = Settings(**given)
    model = settings.model
    for name in (settings.task, model, settings.method, f"{model} {settings.task}", f"{model} {settings.method}"):
        settings = dataclasses.replace(settings, **PRESETS.get(name, {}) | given)
    folder = ROOT / "prompts" / ("tiny" if model == "tiny" else "") / settings.task
    settings.train_prompts = settings.train_prompts or str(next(folder.glob("train.*")))
    settings.test_prompts = settings.test_prompts or str(next(folder.glob("test.*")))
    run = f"{settings.task}-{Path(settings.model).name}-{settings.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings.out = settings.out or f"runs/{run}"
    check_settings(settings, given)
    return settings

def resumed(given):
    """The settings of the run that --resume goes on with, and of those given now the ones that may differ."""
    found = sorted(Path("runs").glob("*/checkpoints"), key=lambda path: path.stat().st_mtime)
    need("out" in given or found, "--resume: there is no run with a checkpoint under runs/; name its folder with --out")
    out = Path(given.get("out") or found[-1].parent)
    try:
        saved = json.loads((out / "config.json").read_text())["settings"]
        Settings(**saved)
    except Exception as error:  # no file, no JSON, other settings
        raise BadInput(f"--resume: there is no run in {out} ({one_line(error)})") from error
    other = [name for name in given if not FIELDS[name].metadata["free"] and given[name] != saved[name]]
    need(not other, f"--resume would make another run of {out}: {', '.join(map(flag, other))} may not change")
    return saved | given | {"out": str(out)}

def check_settings(settings, given):
    """BadInput for a value, or a combination of them, that cannot be meant and would go wrong late or unnoticed."""
    fdfo, window, steps, out = settings.fdfo, settings.sde_window, settings.sampling_steps, Path(settings.out)
    for name, entry in FIELDS.items():
        value, (_, low, high, only, _) = getattr(settings, name), entry.metadata.values()
        fits = not isinstance(value, (int, float)) or low <= value <= high
        need(fits, f"{flag(name)} {value}: must lie in [{low}, {high}]")
        stray = only and name in given and settings.method not in only and not settings.resume
        need(not stray, f"{flag(name)} belongs to --method {only}, not to {settings.method}")
    shares = (1 if fdfo else settings.optimizer_steps) * process_rank()[1]  # fdfo deals out single denoising steps
    images, whole = settings.prompts_per_iteration * settings.group_size, settings.batch_size * shares
    for condition, message in (
        (fdfo or window < steps, f"--sde-window {window}: must lie in [1, {steps - 1}]; the last step never trains"),
        (settings.resolution % 16 == 0, f"--resolution {settings.resolution}: must be a multiple of 16"),
        (re.fullmatch(r"\d+(,\d+)*", settings.attention_blocks), "--attention-blocks: write it as 9 or 8,9"),
        (not fdfo or settings.group_size % 2 == settings.batch_size % 2 == 0,
         "--group-size and --batch-size must be even: fdfo compares pairs of images"),
        (not fdfo or settings.optimizer_steps <= steps, "--optimizer-steps may be at most --sampling-steps with fdfo"),
        (settings.task != "ocr" or not settings.reward_model, "--reward-model: the ocr reward takes none"),
        (settings.iterations == 0 or images % whole == 0,
         f"{images} images an iteration do not split into {shares} shares (optimizer steps x processes) of whole "
         f"batches of {settings.batch_size}; change --batch-size"),
        (settings.resume or process_rank()[0] > 0 or not (out / "config.json").exists(),
         f"--out {out} holds another run; name a new folder, or go on with it: --resume"),
    ):  # fmt: skip
        need(condition, message)

# ======================================================================================================================
# Plumbing: the model, rewards, pictures, the optimizer, the run's folder, processes.

class Prompt(NamedTuple):
    text: str
    metadata: dict | None = None  # geneval's line

class Policy:
    """The model from text to pixels, around a diffusers StableDiffusion3Pipeline: SD3.5 or the embedded one alike."""

    def __init__(self, pipe, settings, device):
        self.pipe, self.settings, self.device = pipe, settings, torch.device(device)
        self.transformer, self.vae = pipe.transformer.to(device).eval(), pipe.vae.to(device)
        self.encoders = torch.nn.ModuleList(filter(None, (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)))
        depth, config, scale = len(self.transformer.transformer_blocks), self.transformer.config, pipe.vae_scale_factor
        largest = config.pos_embed_max_size * config.patch_size * scale
        need(max(settings.blocks) < depth, f"--attention-blocks {settings.attention_blocks}: there are 0..{depth - 1}")
        need(settings.resolution <= largest, f"--resolution {settings.resolution}: the model knows up to {largest} px")
        self.latent_shape = (config.in_channels, settings.resolution // scale, settings.resolution // scale)

    @torch.no_grad()
    def encode(self, texts):
        """(embeddings [K, N, D], pooled [K, D]): CLIP's positions, then T5's (zeros where there is no T5). The text
        encoders are on the device only while they encode."""
        self.encoders.to(self.device)
        how = dict(device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.settings.t5_length)
        parts = [self.pipe.encode_prompt(texts[i : i + 64], None, None, **how) for i in range(0, len(texts), 64)]
        self.encoders.to("cpu")
        return tuple(torch.cat([part[i] for part in parts]).to(self.transformer.dtype) for i in (0, 2))

    def core_mask(self, prompts):
        """[K, N] bool: the core content's positions in the joint text sequence, CLIP's first, then T5's. Never empty:
        where truncation has cut the core content off, the content tokens that are left stand in, with a warning."""
        has_t5, masks = self.pipe.text_encoder_3 is not None, []
        segments = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]
        segments += [(self.pipe.tokenizer_3, self.settings.t5_length)] * has_t5
        for text, metadata in prompts:
            offsets = []
            for tokenizer, length in segments:
                padded = dict(padding="max_length", max_length=length, truncation=True)
                offsets += tokenizer(text, **padded, return_offsets_mapping=True)["offset_mapping"]
            wanted = core_spans(text, self.settings.task, metadata), content_spans(text), [(0, len(text))]
            found = [token_mask(spans, offsets) for spans in wanted]
            if not any(found[0]):
                warnings.warn("some prompts are cut off before their core content: all their words stand in for it")
            masks.append(next(filter(any, found)))
        padding = 0 if has_t5 else self.settings.t5_length  # zeros stand where T5 would
        return F.pad(torch.tensor(masks, device=self.device), (0, padding))

    @torch.no_grad()
    def decode(self, latents):
        """Latents [B, C, H, W] -> images [B, 3, h, w] uint8 on the CPU. The VAE computes in fp32, as Flow-GRPO's."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def sigmas(self, steps):
        """The scheduler's own grid: T + 1 floats from 1 to 0."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()

def check_embedded(task, prompts):
    """BadInput for a missing or damaged file, which not all loaders notice; a note on words it was not trained on."""
    sums = TINY / "SHA256SUMS"
    for line in sums.read_text().splitlines() if sums.is_file() else [f"none {sums}"]:
        digest, name = line.split()
        path = TINY / name
        whole = path.is_file() and sha256(path.read_bytes()).hexdigest() == digest
        need(whole, f"--model tiny: {path} is missing or damaged; `git checkout assets/tiny` brings it back")
    words = lambda prompts: set(re.findall(r"\b[a-z]+\b", " ".join(prompt.text for prompt in prompts)))
    strange = words(prompts) - words(load_prompts(next(ROOT.glob(f"prompts/tiny/{task}/train.*")), task))
    if strange:
        print("note: the embedded model was not trained on these words:", *sorted(strange))

def load_policy(settings, device):
    """SD3 / SD3.5 from the hub or a local folder, of which the embedded model is one. BadInput, in one line, for
    whatever stands in the way. safetensors only: nothing is unpickled, and no code from the hub is run."""
    from diffusers import StableDiffusion3Pipeline

    model, start = str(TINY) if settings.model == "tiny" else settings.model, Path(settings.transformer)
    start = start / "transformer" if (start / "transformer").is_dir() else start
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.dtype], "vae": torch.float32}
    parts = {} if settings.t5_length else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        weights = load_file(start / "diffusion_pytorch_model.safetensors") if settings.transformer else None
        pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, use_safetensors=True, **parts)
        if weights:
            pipe.transformer.load_state_dict(weights)
    except Exception as error:  # whatever a loader says of what is not there, not whole or not what it should be
        what = f"--model {settings.model}" + f" --transformer {settings.transformer}" * bool(settings.transformer)
        remedy = f"SD3.5 is gated: if need be accept its licence at https://huggingface.co/{SD35}, then `hf auth login`"
        raise BadInput(f"{what}: {one_line(error)} ({remedy})") from error
    if settings.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    return Policy(pipe, settings, device)

# --- prompts and rewards: reward(images [B, 3, h, w] uint8, prompts: B of Prompt) -> [B, 2] ---------------------------
# An image's first number is what training raises, the second is reported beside it: ocr, is the word all that was read?
# geneval, the benchmark's verdict; pickscore, the undivided score. NaN says that there is none.

GENEVAL_TAGS = "single_object two_object counting colors position color_attr".split()
GENEVAL_COLOURS = "red orange yellow green blue purple pink brown black white".split()
GENEVAL_RELATIONS = "left of,right of,above,below".split(",")

@functools.cache
def geneval_classes():
    """{name: GenEval's name} of COCO's 80 classes, by GenEval's own names and by those that detectors use."""
    lines = [line.split(", ") for line in (ROOT / "prompts/geneval/classes.txt").read_text().splitlines()]
    return {name: names[0] for names in lines for name in names}

def load_prompts(path, task):
    """Flow-GRPO's formats: one prompt a line (ocr, pickscore), JSON lines with the metadata (geneval)."""
    prompts, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                metadata = check_geneval(json.loads(line)) if task == "geneval" else None
                prompts.append(Prompt(metadata["prompt"] if metadata else line.strip(), metadata))
                core_spans(prompts[-1].text, task, metadata)
    except Exception as error:  # whatever is wrong with a file or a line
        raise BadInput(f"prompt file {path}{f', line {number}' * (number > 0)}: {one_line(error)}") from error
    need(prompts, f"prompt file {path} holds no prompts")
    return prompts

def check_geneval(line):
    """GenEval's metadata of one prompt, as it is; whatever is wrong with it raises."""
    known = {*geneval_classes().values(), *GENEVAL_COLOURS, *GENEVAL_RELATIONS}
    for place, clause in enumerate([*line["include"], *line.get("exclude", [])]):
        relation, index = clause.get("position", ("above", -1))  # of an earlier clause
        named = {clause["class"], clause.get("color", "red"), relation, line["include"][index]["class"]}
        if named - known or line["tag"] not in GENEVAL_TAGS or clause["count"] < 1 or index >= place:
            raise ValueError(f"not GenEval's: {line['tag']}, {clause}")
    return line

FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)}  # the many-language recogniser reads Ａ for A at times

def normalise_text(text):
    """As Flow-GRPO's OCR reward compares: no spaces, lower case; full-width letters, which its engine lacks, as ASCII."""
    return text.translate(FULL_WIDTH).replace(" ", "").lower()

def edit_distance(a, b):
    """Levenshtein: insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]

def ocr_score(recognised, target):
    """(Flow-GRPO's OCR reward in [0, 1], is it the very text?). The reward is 1 if the target is part of what was read,
    else 1 - edit distance / length of the target, at least 0. Both sides normalised."""
    recognised, target = normalise_text(recognised), normalise_text(target)
    distance = 0 if target in recognised else min(edit_distance(recognised, target), len(target))
    return 1 - distance / len(target), recognised == target

class OCRReward:
    """PP-OCR's detector and recogniser; rapidocr's wheel carries the models."""

    def __init__(self):
        import onnxruntime  # noqa: F401  (what rapidocr runs on, and imports only when it first reads)
        import rapidocr

        self.engine_class, self.local = rapidocr.RapidOCR, threading.local()  # an engine a thread: they keep state

    def read(self, image):
        """All text in an image [3, h, w] uint8, boxes joined."""
        picture = to_picture(image)
        side = max(picture.size)
        if side < 192:  # the detector wants letters of more than a few pixels
            picture = picture.resize([192 * length // side for length in picture.size], Image.BICUBIC)
        if not hasattr(self.local, "engine"):
            self.local.engine = self.engine_class(params={
                "Global.use_cls": False, "Global.log_level": "error", "Global.text_score": 0,  # else 0.5: any reading counts
                "Det.limit_type": "max", "Det.limit_side_len": max(96, side),  # else it enlarges the side to 736
                "Rec.rec_img_shape": [3, 48, 160],  # the narrowest line it pads to; wider text is read at its width
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            })  # fmt: skip
        return "".join(self.local.engine(picture).txts or ())

    def __call__(self, images, prompts):
        targets = [prompt.text[slice(*quoted_span(prompt.text))] for prompt in prompts]
        return torch.tensor([ocr_score(self.read(image), target) for image, target in zip(images, targets)])

def relations(box, other):
    """The words that hold for a box (left, top, right, bottom) relative to another, by GenEval's rule: along that axis
    the centres lie apart by more than half their distance, after a tenth of both boxes' extents is taken off."""
    x, y = ((box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1))  # y points down
    slack_x, slack_y = (0.1 * (box[i + 2] - box[i] + other[i + 2] - other[i]) for i in (0, 1))
    shifts = (-x - slack_x, x - slack_x, -y - slack_y, y - slack_y)
    return {word for word, shift in zip(GENEVAL_RELATIONS, shifts) if shift > math.hypot(x, y) / 2}

def all_placed(relation, objects, others):
    held = [relations(one[0], other[0]) for one in objects for other in others]
    return bool(held) and all(relation in words for words in held)

def geneval_scores(metadata, detections):
    """(training reward in [0, 1], the benchmark's verdict) of one image.

    metadata: the prompt's line; detections: {class: [(box, confidence, colour or None), ...]}. What counts as there:
    confidence above 0.3 (counting: 0.9), the 16 surest of a class. Reward: the mean over `include` of 1 - |wanted -
    found| / wanted, at least 0 each, of the clause's colour, and 0 where its relation does not hold between the surest
    objects of the two classes (Flow-GRPO's neither stops at 0 nor gives 0 for a wrong place). Verdict (GenEval, arXiv
    2310.11513): at least as many objects as wanted, the surest of them of the right colour and in the right place; and
    none of `exclude` in the number given there.
    """
    threshold, found, scores, groups = 0.9 if metadata["tag"] == "counting" else 0.3, {}, [], []
    for name, objects in detections.items():
        found[name] = sorted((one for one in objects if one[1] > threshold), key=lambda one: -one[1])[:16]
    for clause in metadata["include"]:
        objects, wanted, colour = found.get(clause["class"], []), clause["count"], clause.get("color")
        fitting, surest = [one for one in objects if colour in (None, one[2])], objects[:wanted]
        score = max(0.0, 1 - abs(wanted - len(fitting)) / wanted)
        right = len(surest) == wanted and all(colour in (None, one[2]) for one in surest)
        if "position" in clause:  # it must hold between each object and each other, and there must be some
            relation, index = clause["position"]
            target = metadata["include"][index]
            score *= all_placed(relation, fitting[:wanted], found.get(target["class"], [])[: target["count"]])
            right = right and all_placed(relation, surest, groups[index])
        scores.append(score)
        groups.append(surest if right else [])  # the clause's objects, if they satisfy it
    excluded = any(len(found.get(c["class"], [])) >= c["count"] for c in metadata.get("exclude", ()))
    return sum(scores) / len(scores), all(groups) and not excluded

def load_reward_model(device, model_class, processor_class, source, processor_source=None):
    """(model, processor) in fp32 through transformers' loaders, from the hub or a folder. safetensors only, and no
    code from the hub is run. BadInput, in one line, for whatever stands in the way."""
    import transformers

    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        missing = {name for name, _ in model.named_parameters()} & set(info["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise ValueError(f"it is no {model_class}: {len(missing)} weights are missing")
        processor = getattr(transformers, processor_class).from_pretrained(processor_source or source)
    except Exception as error:  # as above
        remedy = "`hf download` fetches what the hub has, and --reward-model takes a local copy"
        raise BadInput(f"the reward model {source} cannot be loaded: {one_line(error)} ({remedy})") from error
    return model.to(device).eval().requires_grad_(False), processor

def clip_output(clip, images, texts):
    model, processor = clip
    how = dict(padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings)
    return model(**processor(images=images, text=texts, return_tensors="pt", **how).to(model.device))

class GenEvalReward:
    """Objects, their number, colour and place, as GenEval sees them: Mask2Former finds them, CLIP names their colour.
    The networks are the benchmark's; here they are transformers' copies, not mmdet's and open_clip's."""

    def __init__(self, folder, device):
        detector = f"{folder}/detector" if folder else "facebook/mask2former-swin-small-coco-instance"
        clip = f"{folder}/clip" if folder else "openai/clip-vit-large-patch14"
        classes = "Mask2FormerForUniversalSegmentation", "AutoImageProcessor"
        self.detector, self.prepare = load_reward_model(device, *classes, detector)
        self.clip = load_reward_model(device, "CLIPModel", "CLIPProcessor", clip)
        self.names = {i: geneval_classes().get(name) for i, name in self.detector.config.id2label.items()}
        need(any(self.names.values()), f"--reward-model {folder}: its detector knows none of GenEval's classes")
        coco = len(self.names) == 80  # the benchmark's 800 px, where transformers' processor has 384
        self.size = {"size": {"shortest_edge": 800, "longest_edge": 1333}} if coco else {}

    @torch.no_grad()
    def __call__(self, images, prompts):
        inputs = self.prepare(images=list(images), return_tensors="pt", **self.size).to(self.detector.device)
        how = dict(threshold=0.3, target_sizes=[images.shape[-2:]] * len(images), return_binary_maps=True)
        results = self.prepare.post_process_instance_segmentation(self.detector(**inputs), **how)
        scores = []
        for image, (_, metadata), result in zip(images, prompts, results):
            painted = {clause["class"] for clause in metadata["include"] if "color" in clause}
            detections = {}  # class: [(box, confidence, colour), ...]
            for segment, mask in zip(result["segments_info"], result["segmentation"].bool().cpu()):
                name, inside = self.names[segment["label_id"]], mask.nonzero().flip(1)  # (x, y) of every pixel
                box = (*inside.amin(0).tolist(), *(inside.amax(0) + 1).tolist())
                colour = self.colour(image, name, box, mask) if name in painted else None
                detections.setdefault(name, []).append((box, segment["score"], colour))
            scores.append(geneval_scores(metadata, detections))
        return torch.tensor(scores)

    def colour(self, image, name, box, mask):
        """The colour of an object, by CLIP from its crop, with #999 for all that is not in its mask."""
        left, top, right, bottom = box
        crop = to_picture(torch.where(mask, image, 0x99)[:, top:bottom, left:right])
        phrases = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
        texts = [phrase.format(colour) for colour in GENEVAL_COLOURS for phrase in phrases]
        output = clip_output(self.clip, [crop], texts)
        classifier = output.text_embeds.unflatten(0, (len(GENEVAL_COLOURS), -1)).mean(1)  # over phrases
        return GENEVAL_COLOURS[int((output.image_embeds @ F.normalize(classifier, dim=-1).T).argmax())]

def pickscore_reward(folder, device):
    """PickScore (arXiv 2305.01569), exp(logit_scale) cos(image, text), divided by 26 for training as Flow-GRPO does."""
    hubs = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    clip = load_reward_model(device, "CLIPModel", "CLIPProcessor", *([folder] if folder else hubs))

    @torch.no_grad()
    def reward(images, prompts):
        output = clip_output(clip, list(images), [prompt.text for prompt in prompts])
        score = output.logits_per_image.diagonal().cpu()
        return torch.stack([score / 26, score], dim=1)

    return reward

def make_reward(settings, device):
    """The task's reward. One of your own is a function of the same form: return it here."""
    if settings.task == "ocr":
        return OCRReward()
    return {"geneval": GenEvalReward, "pickscore": pickscore_reward}[settings.task](settings.reward_model, device)

def reward_all(samples, prompts, copies, reward, settings):
    """Reward sample()'s images in threads beside it, one at a time, so that one that fails costs only itself. Returns
    (rollouts, {row: image [3, h, w]} of this process's among the first 32 rows, scores [K * copies, 2] of all).
    RunStopped when more than a fifth of the rewards are missing (not finite)."""
    rollouts, shown, pending, why = [], {}, {}, "not a finite number"
    with ThreadPoolExecutor(min(16, os.cpu_count()) if settings.task == "ocr" else 1) as executor:
        for rollout, images in samples:
            rollouts.append(rollout)
            for row, image in zip(rollout.rows.tolist(), images):
                pending[row] = executor.submit(reward, image[None], [prompts[row // copies]])
                shown |= {row: image} if row < 32 else {}
            if not torch.cuda.is_initialized():  # on a CPU the two would only be in each other's way
                wait(pending.values())
    scores = torch.full((len(prompts) * copies, 2), math.nan)
    for row, future in pending.items():
        try:
            scores[row] = torch.as_tensor(future.result())[0]
        except Exception as error:  # whatever a reward may raise
            why = one_line(error)
    for part in gather(scores):
        scores = part.where(part.isfinite(), scores)
    missing = int((~scores[:, 0].isfinite()).sum())
    if missing > len(scores) / 5:
        raise RunStopped(f"the reward failed for {missing} of {len(scores)} images: {why}")
    if missing:
        tqdm.write(f"warning: the reward failed for {missing} of {len(scores)} images: {why}; left out")
    return rollouts, shown, scores

EVALUATION = ("evaluation",)  # the key of evaluation's noise: the same images' worth of luck every time, in every run

def evaluate(policy, prompts, reward, settings):
    """Images of the test prompts, one each (geneval: four, as the benchmark): deterministic sampler, fixed seeds.
    Returns (columns of metrics.jsonl, cells for save_sheet). Papers print eval_score, for ocr eval_reward."""
    copies = 4 if settings.task == "geneval" else 1
    samples = sample(policy, prompts, copies, settings, EVALUATION, policy.sigmas(settings.eval_steps))
    _, shown, scores = reward_all(samples, prompts, copies, reward, settings)
    value, score, shares = *scores.nanmean(0).tolist(), {}
    for tag in GENEVAL_TAGS if settings.task == "geneval" else ():
        own = [row for row in range(len(scores)) if prompts[row // copies].metadata["tag"] == tag]
        shares |= {f"eval_{tag}": scores[own, 1].nanmean().item()} if own else {}
    score = sum(shares.values()) / len(shares) if shares else score  # over tags, not images: GenEval's overall score
    cells = [(shown[row], f"{scores[row, 0]:.2f}  {prompts[row // copies].text}") for row in sorted(shown)]
    return {"eval_reward": value, "eval_exact" if settings.task == "ocr" else "eval_score": score, **shares}, cells

# --- pictures ---------------------------------------------------------------------------------------------------------

def to_picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())

def save_sheet(path, cells, columns=8, side=192):
    """A PNG of cells (image [3, h, w] uint8, caption of up to three lines), row by row."""
    from diffusers.utils import make_image_grid

    pictures, font = [], ImageFont.load_default(size=13)
    for image, caption in cells:
        picture = to_picture(image).resize((side, side), Image.BICUBIC)
        pictures.append(ImageOps.expand(picture, (4, 4, 4, 54), "white"))
        text = textwrap.fill(caption, side // 7, max_lines=3, placeholder="...")
        ImageDraw.Draw(pictures[-1]).text((4, side + 6), text, "black", font)
    pictures += [Image.new("RGB", pictures[0].size, "white")] * (-len(pictures) % columns)
    make_image_grid(pictures, len(pictures) // columns, columns).save(path)

def heat(image, allocation):
    """An image [3, h, w] uint8 under its map [P]: as bright as M is large, full where it is largest."""
    level = (allocation / allocation.max()).sqrt().unflatten(0, (1, 1, math.isqrt(len(allocation)), -1))
    return (image * F.interpolate(level, size=image.shape[-2:])[0]).to(torch.uint8)

def save_maps(path, policy, prompts, settings):
    """For a few prompts, the image being formed (the guess of x_0 at every step) and, under it, the same beneath its
    allocation map. Deterministic sampler, fixed seeds."""
    sigmas, settings = policy.sigmas(settings.sampling_steps), dataclasses.replace(settings, batch_size=len(prompts))
    ((rollout, _),) = sample(policy, prompts, 1, settings, EVALUATION, sigmas, captured=settings.sampling_steps)
    maps, guesses, cells = step_maps(rollout.attention, settings).cpu(), [], []
    for (now, after), (sigma, sigma_next) in zip(pairwise(rollout.latents), pairwise(sigmas)):
        guesses.append(policy.decode(now - sigma * (after - now) / (sigma_next - sigma)))  # x_t - sigma v
    for row, prompt in enumerate(prompts):
        cells += [(guess[row], f"sigma {sigma:.2f}") for guess, sigma in zip(guesses, sigmas)]
        cells += [(heat(guess[row], maps[i, row]), prompt.text * (i == 0)) for i, guess in enumerate(guesses)]
    save_sheet(path, cells, columns=len(guesses), side=128)

# --- the optimizer ----------------------------------------------------------------------------------------------------

class MasterAdamW:
    """LoRA-free bf16 training: every weight trains, and none loses its update to bf16's eight bits.

    The model's own weights (bf16 or fp32) do the forward and backward, autograd adds gradients up in fp32, and fp32
    master weights and AdamW moments do the update, whose result is copied back. With only a few optimizer steps in an
    iteration of hundreds of images, masters and moments may live in host memory (device "cpu"). Under torchrun the
    gradient is the mean over the processes, all of which take the same step.
    """

    def __init__(self, parameters, learning_rate, device=None):
        self.parameters = list(parameters)
        self.masters = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]
        # fused: no temporaries the size of the model, and several times faster in host memory. eps: with mean
        # log-densities a gradient's RMS is 1e-9 to 1e-8 a parameter, and the usual 1e-8 would eat most of the step.
        how = dict(lr=learning_rate, weight_decay=1e-4, eps=1e-15, fused=True)
        self.optimizer = torch.optim.AdamW(self.masters or [torch.zeros(0)], **how)
        for parameter in self.parameters:  # nothing of an earlier training may leak into the first step
            parameter.grad, parameter.grad_dtype = None, torch.float32

    @torch.no_grad()
    def step(self, max_norm=1.0):
        """Clip the gradient to max_norm; one AdamW step unless it is 0 or not finite. Returns the unclipped norm."""
        for parameter in self.parameters:
            if parameter.grad is None:  # all microbatches of this process were left out
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            if process_rank()[1] > 1:
                dist.all_reduce(parameter.grad.div_(process_rank()[1]))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        for parameter, master in zip(self.parameters, self.masters):
            master.grad, parameter.grad = parameter.grad.to(master.device), None
        if 0 < norm < math.inf:
            self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter, master in zip(self.parameters, self.masters):
            parameter.copy_(master)
        return norm

    def state(self):
        """{kind.number: tensor}, all that an exact resume needs: the model's weights are the rounded masters."""
        states = [{"master": master.contiguous(), **self.optimizer.state[master]} for master in self.masters]
        return {f"{kind}.{i}": value for i, state in enumerate(states) for kind, value in state.items()}

    @torch.no_grad()
    def load(self, file):
        """Take up a state() again from an open safetensors file, tensor by tensor: there is never a second copy."""
        self.optimizer.state.clear()
        for name in file.keys():
            kind, index = name.split(".")
            master = self.masters[int(index)]
            if kind == "master":
                self.parameters[int(index)].copy_(master.copy_(file.get_tensor(name)))
            else:
                self.optimizer.state[master][kind] = file.get_tensor(name).to(master.device, copy=True)

# --- the run's folder: safetensors, JSON, PNG -------------------------------------------------------------------------

def write_aside(path, write):
    """Write under another name, flush to the disk, rename: whoever reads `path` finds the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

class RunFolder:
    """What a run leaves behind. Only the first process writes, and a full disk is a warning, not the end."""

    def __init__(self, settings, optimizer):
        self.path, self.tensorboard = Path(settings.out), None
        self.done, self.metrics = load_checkpoint(self.path, optimizer) if settings.resume else (-1, "")
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "rapidocr")}
        config = json.dumps({"settings": dataclasses.asdict(settings), "versions": versions}, indent=1)
        self.write("config.json", write_aside, lambda part: part.write_text(config))
        with contextlib.suppress(ImportError):  # a luxury, never needed
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.path, purge_step=self.done + 1) if process_rank()[0] == 0 else None

    def write(self, name, write, *arguments):
        """write(path of `name`, *arguments), unless that fails."""
        if process_rank()[0] == 0:
            try:
                write(self.path / name, *arguments)
            except (OSError, SafetensorError) as error:
                tqdm.write(f"warning: {name} was not written: {error}; what was there before stays, the run goes on")

    def log(self, metrics):
        self.metrics += json.dumps(metrics) + "\n"
        self.write("metrics.jsonl", write_aside, lambda part: part.write_text(self.metrics))
        for name, value in metrics.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, metrics["iteration"])

def checkpoints(folder):
    """{iterations done: path} of a run's checkpoints, the newest first. What is half-written has no such name."""
    return {int(path.stem): path for path in sorted(folder.glob("checkpoints/[0-9]*.safetensors"), reverse=True)}

def save_checkpoint(folder, done, optimizer, metrics):
    """<folder>/<iterations done>.safetensors: masters, moments, and metrics.jsonl so far in its header. When it stands,
    all go but it and the one before: also later ones, which did not load, or the run had been resumed from there."""
    folder.mkdir(exist_ok=True)
    target = folder / f"{done:06d}.safetensors"
    write_aside(target, lambda part: save_file(optimizer.state(), part, {"metrics": metrics}))
    found = checkpoints(folder.parent)
    for number in found.keys() - [number for number in found if number <= done][:2]:
        found[number].unlink()

def load_checkpoint(folder, optimizer):
    """The newest checkpoint that loads, into optimizer and model: (iterations done, metrics), (-1, "") where there is
    none yet. One that does not load is named, and the one before is tried; BadInput if none does."""
    found = checkpoints(folder)
    for done, path in found.items():
        try:
            with safe_open(path, "pt") as file:
                optimizer.load(file)
                print(f"resumed from {path}: {done} iterations are done")
                return done, file.metadata()["metrics"]
        except Exception as error:  # whatever a damaged file makes of itself
            print(f"warning: the checkpoint {path} does not load: {one_line(error)}")
    need(not found, f"--resume: no checkpoint in {folder} loads")
    return -1, ""

def save_transformer(path, transformer):
    part = path.with_name("transformer.part")
    transformer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)

# --- several processes, started by torchrun: microbatches are dealt, gradients averaged, the first process writes -----

def process_rank():
    """(this process's number, how many share the work); (0, 1) for a process on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def gather(value):
    """[value of process 0, of process 1, ...] in every process."""
    values = [value] * process_rank()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

# --- the run ----------------------------------------------------------------------------------------------------------

def pick_prompts(prompts, settings, iteration):
    """The iteration's prompts: every epoch deals all prompts in an order of its own, a function of (seed, epoch)."""
    first = (iteration - 1) * settings.prompts_per_iteration
    places = [divmod(place, len(prompts)) for place in range(first, first + settings.prompts_per_iteration)]
    order = lambda epoch: torch.randperm(len(prompts), generator=generator(settings.seed, "epoch", epoch))
    return [prompts[order(epoch)[place]] for epoch, place in places]

def train(settings):
    """From two prompt files to a trained model and a table of what it gained. Returns the exit status."""
    cuda = settings.model != "tiny" and torch.cuda.is_available()  # tiny is made for the CPU
    device, out = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu", Path(settings.out)
    prompts = [load_prompts(path, settings.task) for path in (settings.train_prompts, settings.test_prompts)]
    if settings.model == "tiny":
        check_embedded(settings.task, sum(prompts, []))
    reward = make_reward(settings, device)  # before the big model: what is missing is said at once
    policy, lock = load_policy(settings, device), FileLock(out / "lock")
    try:
        if process_rank()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)  # it dies with the process
    except OSError as error:  # filelock's Timeout is one
        raise BadInput(f"--out {out}: {one_line(error)} (is another process at work there?)") from error
    try:
        return train_policy(policy, *prompts, reward, settings)
    except (RunStopped, torch.OutOfMemoryError) as error:
        advice = "; --optimizer-device cpu, --gradient-checkpointing or a smaller --batch-size takes less memory"
        advice = advice * isinstance(error, torch.OutOfMemoryError)
        raise RunStopped(f"{one_line(error)}; --resume goes on from {out}/checkpoints{advice}") from error
    finally:
        lock.release()

def train_policy(policy, train_prompts, test_prompts, reward, settings):
    """Iterations until the last one or a signal, with evaluations and checkpoints on the way."""
    transformer, last, signals = policy.transformer, settings.iterations, []
    reference = copy.deepcopy(transformer).requires_grad_(False) if settings.kl > 0 and last > 0 else None
    trained = transformer.parameters() if last > 0 or settings.resume else ()
    optimizer = MasterAdamW(trained, settings.learning_rate, "cpu" if settings.optimizer_device == "cpu" else None)
    run = RunFolder(settings, optimizer)

    def test(name, iteration):
        numbers, cells = evaluate(policy, test_prompts, reward, settings)
        run.write(f"test_{name}.png", save_sheet, cells)
        tqdm.write(f"iteration {iteration:4d}  " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
        return numbers

    if run.done < 0:
        run.write("maps_before.png", save_maps, policy, test_prompts[:4], settings)
        run.log({"iteration": 0, **test("before", 0)})
        run.write("checkpoints", save_checkpoint, 0, optimizer, run.metrics)
    lines = [json.loads(line) for line in run.metrics.splitlines()]
    before, *_, after = [line for line in [*lines, *lines] if "eval_reward" in line]
    todo, name = range(max(run.done, 0) + 1, last + 1), f"{settings.method} {settings.task}"
    bar = tqdm(todo, name, total=last, initial=todo.start - 1, disable=process_rank()[0] > 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: signals.append(n) or os.write(2, b"\nfinishing this iteration\n"))
    for iteration in bar:
        prompts = pick_prompts(train_prompts, settings, iteration)
        metrics = train_iteration(policy, reference, optimizer, prompts, reward, settings, iteration)
        if iteration % settings.eval_every == 0 or iteration == last:
            after = test("after", iteration)
            metrics |= after
            run.write("transformer", save_transformer, transformer)
        run.log(metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", test=f"{after['eval_reward']:.3f}")
        stop = max(gather(max(signals, default=0)))
        if stop or iteration % settings.save_every == 0 or iteration == last:
            run.write("checkpoints", save_checkpoint, iteration, optimizer, run.metrics)
        if stop and iteration < last:
            bar.close()
            print(f"stopped after iteration {iteration}; go on with --resume --out {run.path}")
            return 128 + stop
    run.write("maps_after.png", save_maps, policy, test_prompts[:4], settings)
    print(f"\n{f'{len(test_prompts)} test prompts':18s}   before   after")
    for name in [name for name in before if name.startswith("eval_")]:
        print(f"{name:18s}  {before[name]:7.3f} {after[name]:7.3f}")
    print(f"\npictures, metrics and the trained transformer are in {run.path}")
    return 0

def main():
    if dist.is_torchelastic_launched():
        dist.init_process_group()
        sys.stdout = sys.stdout if process_rank()[0] == 0 else open(os.devnull, "w")  # the first process prints
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that torchvision, unneeded here, is missing
    try:
        sys.exit(train(parse_settings()))
    except (BadInput, RunStopped) as error:
        word, status = ("error", 2) if isinstance(error, BadInput) else ("stopped", 1)
        print(f"star.py: {word}: {error}", file=sys.stderr)
        sys.exit(status)

if __name__ == "__main__":
    main()
