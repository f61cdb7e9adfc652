"""star.py: reinforcement learning for text-to-image flow models, with credit by region.

STAR (SpatioTemporal Adaptive Reward Allocation, arXiv 2606.17979) takes the usual group-relative
advantage of an image and applies it more strongly where the model's own text-image attention finds
the prompt's core content, with a map for every trained denoising step of every rollout. It has five
steps, each one or two functions below, and train_iteration takes them in this order:

  1. Sample groups of images; each of the first K steps is       sde_mean_std, token_log_prob
     an SDE's, a Gaussian action, the rest are Euler's.
  2. On the way, read the attention of every region to the       core_spans, capture_attention
     core of the prompt.
  3. Make it an allocation map of mean 1, for every trained      hindsight, allocation_map
     step of every rollout.
  4. Compare each image's reward with its group's.               group_advantages
  5. Update through a clipped objective resolved in space.       star_objective

flow_grpo_objective is the scalar baseline (Flow-GRPO, arXiv 2505.05470); churn_step, fdfo_direction
and fdfo_objective are a second method (FDFO, arXiv 2603.12893). STAR is written from its paper's
abstract alone: words "in quotes" are the abstract's, and where it is silent a comment says what we
chose and why. README.md has the list, the results, and what a run costs.

  python star.py --task ocr                       SD3.5 Medium with a CUDA GPU (counted: 61 hours of
                                                  an H200); without one a tiny embedded model (four
                                                  minutes of two cores, reward 0.42 to 0.74)
  python star.py --task ocr --method flow-grpo    the baseline, star without maps (as published:
                                                  --sde-window 9 --step-weights none); or fdfo
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
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from hashlib import blake2b
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

# ==================================================================================================
# Notation: these names, everywhere, of one step. (A Rollout has a step as its first dimension;
# fdfo's images may each be at another step, and sigma is then [B].)
#
#   x_t    latents        [B, C, H, W]  noisy latents, x_t = (1 - sigma) x_0 + sigma n
#   sigma  sigma          float         flow time: 1 = noise, 0 = data
#   v      velocity       [B, C, H, W]  n - x_0 as the model predicts it, after guidance (CFG)
#   T      sampling_steps int           denoising steps of a rollout
#   K      trained_steps  int           the first K of them are noisy and train (--sde-window; fdfo:
#                                       all T)
#   P      tokens         int           image tokens, a 2x2 latent patch each, row-major; a *region*
#                                       is one image token
#   N      text tokens    int           the joint text sequence: positions that both CLIPs share,
#                                       then T5's
#   S      attention      [B, P]        share of an image token's attention that the core text
#                                       tokens get, then carried on by --attention-hops
#   M      allocation     [B, P]        allocation map: >= 0, mean over P exactly 1
#   A      advantages     [B]           group-relative advantage
#   l_p    log_prob       [B, P]        per-token mean of the Gaussian log-density of the step taken
#   rho_p  ratio          [B, P]        exp(l_p - l_p_old): new density over old, per latent number
#                                       (a geometric mean); --ratio, and star_objective's
#                                       argument `ratio`, say whether the region's or the image's
#
# One step of SD3.5 Medium at 512 px, in shapes:
#
#   x_t [B, 16, 64, 64] -> 32 x 32 patches -> P = 1024 image tokens; prompt -> N = 77 + 128 tokens
#   attention of block 9: image queries on 1024 + 205 keys, summed over the core text columns -> S
#   one hop through the image's own attention, mean from this step to the last -> M [B, 1024]
#   v [B, 16, 64, 64] -> Gaussian of the next latents -> its log-density, mean over each patch's
#   16 x 2 x 2 numbers -> l_p [B, 1024];   reward of the final image -> A [B]
#   loss: the step's weight times the mean over 1024 regions of
#   -min(rho_p M_p A / m, clip(rho_p) M_p A / m), with m the map's root mean square

# --------------------------------------------------------------------------------------------------
# 1. The policy: one stochastic denoising step is one action, drawn from a Gaussian whose density we
# can write down.
#
# The flow's sampler is an ODE, dx = v dsigma: nothing is drawn, no density is there to reinforce.
# Flow-GRPO's way out: x = (1 - sigma) x_0 + sigma n and the model's v = E[n - x_0 | x] give
# E[n | x] = x + (1 - sigma) v, and hence the score
#     grad log p(x) = -E[n | x] / sigma = -(x + (1 - sigma) v) / sigma.
# Let tau = 1 - sigma run forward, as sampling does: dx = -v dtau. Noise s dw blurs the marginals p:
# dp/dtau gains (s^2 / 2) Laplace p = div(p (s^2 / 2) grad log p). A drift of just that velocity,
# (s^2 / 2) grad log p, takes the gain back. So dx = (-v + (s^2 / 2) grad log p) dtau + s dw has the
# same marginals for any s, and with dtau = -dsigma it is
#     dx = (v - (s^2 / 2) grad log p) dsigma + s dw
#        = (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + s dw,  s = a sqrt(sigma / (1 - sigma))
# with dw of variance dtau. (A guided v is used as if it were the true one, as in Flow-GRPO.) One
# Euler-Maruyama step of it is sde_mean_std. At sigma = 1 that s would be infinite: there its
# denominator is 1 - sigma_max instead, where sigma_max (Flow-GRPO's name) is the largest sigma
# below 1, that of the second step. So the first step is about as noisy as the second.


def sde_mean_std(latents, velocity, sigma, sigma_next, sigma_max, noise_level):
    """Return mean and standard deviation of the next latents under Flow-GRPO's SDE (2505.05470).

        s    = a sqrt(sigma / (1 - sigma))            at sigma = 1 the denominator is 1 - sigma_max
        mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std  = s sqrt(-dt),                           dt = sigma_next - sigma < 0

    latents, velocity [B, C, H, W] of any float type; sigma > sigma_next floats in [0, 1]; sigma_max
    is sigmas[1], the largest sigma below 1; noise_level is a. Returns (mean [B, C, H, W] fp32, std
    float, in latent units). a = 0 is exactly the Euler step of diffusers'
    FlowMatchEulerDiscreteScheduler. Raises ValueError unless sigma falls.
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(
            f"a step must go down in sigma, within [0, 1]: got {sigma} -> {sigma_next}"
        )
    dt = sigma_next - sigma
    below_one = sigma_max if sigma == 1 else sigma
    diffusion = noise_level * math.sqrt(sigma / (1 - below_one))
    pull = diffusion**2 / (2 * sigma)  # toward where the density is higher
    mean = latents.float() * (1 + pull * dt) + velocity.float() * ((1 + pull * (1 - sigma)) * dt)
    return mean, diffusion * math.sqrt(-dt)


def token_log_prob(next_latents, mean, std, patch_size=2):
    """Return l_p: log N(next_latents; mean, std^2), averaged over the numbers of each image token.

    next_latents, mean [B, C, H, W]; std > 0 float. Returns [B, P] fp32 in nats per latent number,
    each the mean over C x patch_size x patch_size numbers, P row-major. It is a mean and not a sum,
    as in Flow-GRPO: mean_p l_p is its image-level log-probability exactly. Raises ValueError for
    std <= 0.
    """
    if std <= 0:
        raise ValueError("a deterministic step (std = 0) has no density")
    exponent = (next_latents.float() - mean.float()) ** 2 / (2 * std**2)
    log_density = -exponent - math.log(std * math.sqrt(2 * math.pi))
    # [B, C, H, W] -> [B, 1, H, W] -> [B, 1, H / 2, W / 2] -> [B, P]
    return F.avg_pool2d(log_density.mean(1, keepdim=True), patch_size).flatten(1)


def step_weights(sigmas, noise_level, window):
    """Return --step-weights equal: each trained step's weight std / |d mean / d v|, of mean 1.

    With x' a number of the next latents, its log-density's gradient with respect to its velocity is
        d l / d v = (x' - mean) / std^2  d mean / d v
                  = [(x' - mean) / std]  (d mean / d v) / std,
    and at theta = theta_old the bracket is a draw from N(0, 1), equally large at every step. What
    is left, |d mean / d v| / std = (1 / a + a / 2) sqrt((1 - sigma) (-dt) / sigma), or at the first
    step, whose denominator is another, sqrt((1 - sigma_max) (-dt)) / a, grows 3.3-fold over the
    first four of ten steps and 26-fold over nine: the last would weigh most, whatever they have to
    say. The weight takes it out. (Ours; TempFlow-GRPO and GRPO-Guard reweight for the same reason.)
    sigmas: the sampler's grid, T + 1 floats from 1 to 0, of which `window` steps are trained.
    Returns a list of `window` floats.
    """
    weights = []
    for sigma, sigma_next in pairwise(sigmas[: window + 1]):
        # The mean is linear in v: its value at x = 0 and v = 1 is its derivative.
        gain, std = sde_mean_std(
            torch.zeros(1), torch.ones(1), sigma, sigma_next, sigmas[1], noise_level
        )
        weights.append(std / abs(gain.item()))
    return [weight * window / sum(weights) for weight in weights]


# --------------------------------------------------------------------------------------------------
# 2. Where does the model itself look for the prompt's core content? "Text-image attention",
# captured on the way.
#
# The abstract does not say which attention. We take SD3's joint attention, image queries on text
# keys, heads averaged, in the block that localises best (--attention-blocks). The softmax runs over
# *all* keys, image and text: so S is a probability, the share of an image token's attention that
# the core gets, and can be compared between tokens. Softmax over the text keys alone would be large
# even where a token hardly looks at the text.
#
# Attention to the text marks what is *drawn*: the letters of a word, not the blank places of its
# sign where letters are missing, and that is where the reward is lost. So S takes a hop through the
# image's own attention (--attention-hops), which carries it from the letters to what belongs with
# them. (Ours; DiffSegmenter and iSeg complete attention maps in the same way.)


@torch.no_grad()
def core_attention(attn, image_query, image_key, text_key, core_mask, hops=0):
    """Return S: the share of each image token's attention that the core text tokens get.

        S  = mean over heads of softmax(Q_image [K_image; K_text]^T / sqrt(d)) 1_core
        S <- mean over heads of softmax(Q_image K_image^T / sqrt(d)) S                   in each hop

    1_core is 1 at the core text tokens and 0 elsewhere: so S is attention to *values that are the
    indicator of the core tokens*, one more scaled_dot_product_attention, and the [P, P + N] matrix
    is never formed. Every channel of the value is the indicator, so any channel of the output is S.
    A hop has S as its value.

    attn: diffusers Attention of an SD3 block; image_query, image_key, text_key: what its
    query_and_key_layers gave; core_mask [B, N] bool. With CFG, B' = 2B and the conditional half
    comes last. Returns [B, P] fp32 in [0, 1].
    """

    def by_head(states):  # [B', heads, L, d] or [B', L, D] -> [B, heads, L, d]
        states = states[-len(core_mask) :]
        if states.dim() == 3:
            states = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return states

    def attend(query, key, value):  # value [B, L], the same in all heads and channels -> [B, P]
        value = value.to(key.dtype)[:, None, :, None].expand_as(key).contiguous()
        return F.scaled_dot_product_attention(query, key, value)[..., 0].float().mean(1)

    query = by_head(image_query)
    image_key = by_head(image_key)
    text_key = by_head(text_key)
    indicator = F.pad(core_mask, (image_key.shape[2], 0))  # [B, P + N], image tokens first
    attention = attend(query, torch.cat([image_key, text_key], dim=2), indicator)
    for _ in range(hops):
        attention = attend(query, image_key, attention)
    return attention


def query_and_key_layers(attn):
    """Return the modules of an SD3 block's attention that give image queries, image and text keys.

    In SD3.5 they are its RMS norms, [B', heads, L, d]; SD3 has none, so its projections,
    [B', L, D].
    """
    if attn.norm_q is None:
        return attn.to_q, attn.to_k, attn.add_k_proj
    return attn.norm_q, attn.norm_k, attn.norm_added_k


@contextlib.contextmanager
def capture_attention(transformer, core_mask, blocks, hops=0):
    """Within this context every forward of an SD3Transformer2DModel leaves S in the list it yields.

    core_mask [B, N] bool; blocks: indices of joint blocks. Each forward appends one [B, P] per
    block, in order, after `hops` hops. Hooks read the queries and keys that the attention has
    computed anyway, so the output is bitwise what it is without; they are removed on exit, also
    after an exception. SD3.5's second attention (attn2) sees no text and is left alone.
    """
    captured = []
    kept = {}  # a layer: what it gave last

    def keep(layer, _, output):
        kept[layer] = output

    def read(attn, *_):
        states = (kept.pop(layer) for layer in query_and_key_layers(attn))
        captured.append(core_attention(attn, *states, core_mask, hops))

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            attn = transformer.transformer_blocks[block].attn
            for layer in query_and_key_layers(attn):
                hooks.enter_context(layer.register_forward_hook(keep))
            hooks.enter_context(attn.register_forward_hook(read))
        yield captured


# "The core content that the user truly cares about in the prompt" is all the abstract says. We take
# what the reward looks at: ocr, the quoted text; geneval, the objects, colours, counts and
# relations that the prompt's own metadata names; pickscore, every word but function words.

STOP_WORDS = frozenset(
    "a an the and or but of in on at by to from with without into onto over under as for is are "
    "was were be been being it its this that these those there their his her they he she who which "
    "while has have had very".split()
)
NUMBER_WORDS = "zero one two three four five six seven eight nine".split()


def quoted_span(prompt):
    """Return (start, end) of the characters between the first pair of ASCII double quotes.

    Raises ValueError if there are none.
    """
    found = re.search('"([^"]*)"', prompt)
    if not found or not found[1].strip():
        raise ValueError('no text between double quotes; write it as: a sign that says "HELLO"')
    return found.span(1)


def content_spans(prompt):
    """Return the spans of all words but function words; of those too where nothing else is left."""
    words = [match.span() for match in re.finditer(r"\w+(?:['’-]\w+)*", prompt)]
    content = [(start, end) for start, end in words if prompt[start:end].lower() not in STOP_WORDS]
    return content or words


def core_spans(prompt, task, metadata=None):
    """Return character spans [(start, end), ...] of the prompt's core content.

    task: "ocr", "geneval" (metadata: the prompt's own line, with `include`) or "pickscore". The
    spans are sorted and disjoint, their ends exclusive. Raises ValueError for an unknown task, an
    ocr prompt without quoted text, geneval without metadata.
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
        phrases.append(re.escape(clause["class"]) + "(?:e?s)?")  # plurals: apples, buses, knifes
        if clause.get("color"):
            phrases.append(re.escape(clause["color"]))
        if clause.get("position"):
            phrases.append(re.escape(clause["position"][0]))
        count = clause.get("count", 1)
        if count > 1:
            phrases.append(str(count))
            if count < len(NUMBER_WORDS):
                phrases.append(NUMBER_WORDS[count])
    phrases.sort(key=len, reverse=True)  # "dining table" before "table"
    found = re.finditer(rf"\b(?:{'|'.join(phrases)})\b", prompt, re.IGNORECASE)
    return [match.span() for match in found] or content_spans(prompt)


def token_mask(spans, offsets):
    """Return which tokens overlap the spans, as a list of bool.

    offsets: one (start, end) of characters a token, as fast tokenizers give them; special and
    padding tokens are empty (start == end) and never core.
    """
    mask = []
    for start, end in offsets:
        overlaps = any(start < b and a < end for a, b in spans)
        mask.append(overlaps and start < end)
    return mask


# --------------------------------------------------------------------------------------------------
# 3. From attention to "spatial allocation maps that dynamically vary across denoising steps and
# rollouts".
#
# Which step's attention? When the update comes the whole rollout is known, also what became of it.
# In the first steps attention is vague, and there most of the reward is decided; in the last it is
# sharp. So the map of step t takes the mean over the steps from t to the last: it still varies with
# the step, and knows where the content ended up (--attention-steps later; own: the step's alone).
# With 4 of 10 steps trained, though, its maps share seven summands: they vary more by rollout.
#
# Later steps depend on the noise of step t, so M_p grad l_p is no longer zero on average, as PPO's
# gradient is for any constant advantage. Advantages that sum to zero cancel that, if all images
# have maps. Maps on the better images alone (as arXiv 2510.13554 has it for language models) push
# harder, but do so too when advantages are dealt at random: toward what is drawn, whatever the
# reward says. The model that we trained so collapsed.
#
# M has mean 1 at every step, so a map moves credit over space only. (--step-weights equal then
# divides A by the map's root mean square m, so that a concentrated map gets no larger a gradient.)
# Credit moves over *time* by that m, by the step weights and by --sde-window, which trains the
# first steps alone: there the composition is decided, and there we found the signal.


def hindsight(attention):
    """Return, for each step, the mean of the attention from that step to the last (ours).

    attention [T, ..., P] of all T steps of a rollout. Returns [T, ..., P] fp32; the last step's is
    its own.
    """
    return torch.stack([attention[step:].float().mean(0) for step in range(len(attention))])


def allocation_map(attention, strength):
    """Return M = (1 - lambda) + lambda S / mean_P(S): each region's share of the advantage.

    attention [..., P] >= 0; strength lambda in [0, 1], 0 = uniform. Returns [..., P] fp32,
    detached, >= 0, of mean 1 over P (so learning rate, clip range and KL weight keep Flow-GRPO's
    units, but for map_norm). No attention at all gives the uniform map. Raises ValueError for
    another strength.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"allocation strength must lie in [0, 1], got {strength}")
    attention = attention.detach().float()
    mean = attention.mean(-1, keepdim=True)
    # Where the mean is 0 there is no attention. A NaN stays one, to be noticed.
    relative = torch.where(mean == 0, 1.0, attention / mean)
    return (1 - strength) + strength * relative


def map_norm(allocation):
    """Return m, the root mean square of each map [..., P] -> [...], 1 for a uniform one.

    If the regions' gradients were independent, a map would make a step's gradient larger by this,
    and maps concentrate as sigma falls: --step-weights equal divides by it, image by image.
    """
    return allocation.square().mean(-1).sqrt()


# --------------------------------------------------------------------------------------------------
# 4. "The same group-relative advantage", as Flow-GRPO computes it.


def group_advantages(rewards, group_size):
    """Return A_i = (r_i - mean of its group) / (std of all rewards + 1e-4), within [-5, 5].

    rewards [B], here of all the iteration's images, groups contiguous: rows 0..group_size-1 are the
    first prompt's. Returns [B] fp32. A missing reward (NaN) has advantage 0 and counts for neither
    mean nor std; a group of equal rewards gives exactly 0. Raises ValueError if B does not divide
    into groups.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = rewards.float().double().view(-1, group_size)
    kept = groups.isfinite()
    std = groups[kept].std(correction=0)  # over all: Flow-GRPO's global std
    # In double precision the mean of equal floats is exact, and so are their zeros.
    centred = groups - groups.where(kept, math.nan).nanmean(1, keepdim=True)
    return (centred / (std + 1e-4)).clamp(-5, 5).where(kept, 0).flatten().float()


# --------------------------------------------------------------------------------------------------
# 5. The "spatially resolved policy objective", and the scalar baseline.
#
# At theta = theta_old every ratio is 1, nothing is clipped, and the gradient of an image's loss is
#     -w_t sum_p (M_p / m) A grad l_p / P,
# with the step's weight w_t and the map's norm m of --step-weights equal (none: both are 1). M / m
# is all that STAR adds: flow-grpo has the same w_t and A alone. What follows bounds how far one
# sampling round may carry it. As M >= 0, the sign of M_p A is the image's own, so PPO's pessimistic
# min clips each region on the side that A says, and M only scales it. What is clipped is --ratio's
# choice:
#   region  rho_p = exp(l_p - l_p_old), each region's own. l_p is a mean over 64 numbers, the
#           image's over 64 P. The variance of a mean of n independent numbers goes as 1 / n, so
#           l_p - l_p_old spreads sqrt(P) times wider, and eps is widened by that: right for
#           independent regions, generous where they drift together. (The default; BoxFlow-GRPO,
#           arXiv 2606.06113, takes it with eps as it is.)
#   image   rho_p = sg(rho) exp(l_p - sg(l_p)), rho = exp(mean_p(l_p - l_p_old)), sg: no gradient.
#           Flow-GRPO's ratio in value, in Flow-GRPO's clip range, with a gradient for each region:
#           -sum_p M_p A rho grad l_p / P where the image is not clipped, 0 where it is; M = 1 *is*
#           Flow-GRPO. (DenseFlow-GRPO's form.)


@torch.no_grad()
def ratio_stats(log_ratio, clip_range):
    """Return statistics of rho (any shape): how far the policy moved from the one that sampled.

    clip_high and clip_low are the shares of rho above and below the range, whatever the sign of A:
    PPO clips those above where A > 0 and those below where A < 0. approximate_kl is Flow-GRPO's;
    as l is a mean over n numbers it is their KL / n^2, so compare it only at the same --ratio.
    """
    ratio = log_ratio.exp()
    return {
        "ratio": ratio.mean(),
        "ratio_deviation": (ratio - 1).abs().max(),
        "clip_high": (ratio > 1 + clip_range).float().mean(),
        "clip_low": (ratio < 1 - clip_range).float().mean(),
        "approximate_kl": 0.5 * (log_ratio**2).mean(),
    }


def clipped_objective(log_ratio, advantages, clip_range):
    """Return the mean of PPO's -min(rho A, clip(rho, 1 - eps, 1 + eps) A), and statistics of rho.

    The shapes of log_ratio and advantages broadcast.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    return loss.mean(), ratio_stats(log_ratio, clip_range)


def star_objective(log_prob, old_log_prob, advantages, allocation, clip_range, ratio="region"):
    """Return STAR's spatially resolved clipped objective, and statistics.

        L = -mean_p min( rho_p M_p A, clip(rho_p, 1 - eps_p, 1 + eps_p) M_p A )
        ratio="region":  rho_p = exp(l_p - l_p_old),               eps_p = eps sqrt(P)
        ratio="image":   rho_p = sg(rho) exp(l_p - sg(l_p)),       eps_p = eps
                         rho   = exp(mean_p(l_p - l_p_old)),       sg: no gradient

    log_prob, old_log_prob, allocation [B, P]; advantages [B]; clip_range is eps, the image-level
    one (Flow-GRPO: 1e-4). Gradient flows through log_prob alone. Returns (loss scalar, stats: of
    rho, and the maps' entropy, 1 = uniform, 0 = one region). Raises ValueError for another ratio.
    """
    if ratio not in ("region", "image"):
        raise ValueError(f"ratio must be region or image, got {ratio!r}")
    tokens = log_prob.shape[-1]
    allocation = allocation.detach()
    log_ratio = log_prob - old_log_prob.detach()
    if ratio == "image":  # the image's in value, the region's own in gradient
        image_log_ratio = log_ratio.detach().mean(-1, keepdim=True)
        log_ratio = log_ratio - log_ratio.detach() + image_log_ratio
    else:
        clip_range = clip_range * math.sqrt(tokens)
    loss, stats = clipped_objective(log_ratio, allocation * advantages[:, None], clip_range)
    share = allocation / allocation.sum(-1, keepdim=True)  # a distribution over the image
    entropy = torch.special.entr(share).sum(-1).mean()
    stats["allocation_entropy"] = entropy / math.log(tokens)
    return loss, stats


def flow_grpo_objective(log_prob, old_log_prob, advantages, clip_range):
    """Return Flow-GRPO's objective (arXiv 2505.05470): one ratio and one advantage an image.

    The ratio is exp(mean_p(l_p - l_p_old)). log_prob, old_log_prob [B, P]; advantages [B]. Returns
    (loss scalar, stats).
    """
    image_log_ratio = (log_prob - old_log_prob.detach()).mean(-1)
    return clipped_objective(image_log_ratio, advantages, clip_range)


def kl_to_reference(mean, reference_mean, std, dt):
    """Return the step's KL from the reference policy's, per latent number and times -dt, a scalar.

    It is the mean of (mean - reference_mean)^2 / (2 s^2), s = std / sqrt(-dt). mean, reference_mean
    [B, C, H, W]; std and dt as of sde_mean_std. Flow-GRPO divides by s^2 and not by std^2, so its
    weights (0.04 ocr and geneval, 0.01 pickscore) carry over; train_iteration multiplies the KL by
    the step's weight like the rest of its loss.
    """
    return ((mean - reference_mean.detach()) ** 2).mean() * (-dt) / (2 * std**2)


# --------------------------------------------------------------------------------------------------
# The second method: FDFO, Finite Difference Flow Optimization (arXiv 2603.12893). The whole
# sampling run is one action: two trajectories share their noise but for a little, the churn, and
# the velocity is pulled toward the better image.


def churn_step(latents, velocity, sigma, sigma_next, churn, noise):
    """Return one Euler step that overshoots to low <= sigma_next and is noised back to sigma_next.

        low = sigma_next / (1 + g (1 - sigma_next))
        y   = x + (low - sigma) v
        x'  = (y + low sqrt((1 + g)^2 - 1) n) / (1 + g low)

    y holds noise low and signal 1 - low; the division makes the noise sigma_next and the signal
    1 - sigma_next. latents, velocity, noise (n, N(0, I)) [B, C, H, W]; churn is g >= 0. Returns
    [B, C, H, W] fp32. g = 0 is the Euler step exactly, and so is the last one (sigma_next = 0).
    From sigma = sigma_next = 1 it mixes a share of n into pure noise: the start of one branch.
    Raises ValueError for a negative g or a sigma that goes up.
    """
    if churn < 0:
        raise ValueError(f"churn must be 0 or more, got {churn}")
    if not 0 <= sigma_next <= sigma <= 1:
        raise ValueError(
            f"a step must not go up in sigma, within [0, 1]: got {sigma} -> {sigma_next}"
        )
    low = sigma_next / (1 + churn * (1 - sigma_next))
    overshot = latents.float() + (low - sigma) * velocity.float()
    return (overshot + low * math.sqrt((1 + churn) ** 2 - 1) * noise) / (1 + churn * low)


def fdfo_direction(final_latents, rewards):
    """Return, for each image of a pair, by how much it is the better one and which way it lies.

        dR    = r - mean of the pair
        delta = x_0 - mean of the pair
        d     = delta / (<delta^2> + 1e-6)

    final_latents [B, C, H, W], interleaved a0 b0 a1 b1 ...; rewards [B]; < > is the mean over
    C, H, W. Returns (reward_difference dR [B] fp32, half the pair's difference: no std, no clip;
    direction d [B, C, H, W] fp32). dR d is the same in both branches, and on average, for small
    differences, the reward's gradient. A pair that lacks a reward (NaN) is a tie, which pulls
    nowhere. Raises ValueError for an odd number.
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
    """Return FDFO's objective of one step: pull v toward the better image, and not too far.

        dv  = v - v_old
        rho = exp(-<dv (dv + 2 d)>)       = exp(-<(v - v*)^2> + <d^2>) with v* = v_old - d
        L   = mean_B( -dR rho + |dR| / (2 eps) (rho - 1)^2 ),  at its best at rho = 1 + eps sign(dR)

    v* has a minus because x_0 = x - sigma v: to bring x_0 up along d, v goes down. This rho is no
    ratio of densities: it is 1 at v_old and grows as v comes nearer to v*.

    velocity, old_velocity, direction [B, C, H, W]; reward_difference [B]; clip_range is eps (0.03);
    < > the mean over C, H, W. Gradient flows through velocity alone. Returns (loss scalar, stats).
    """
    change = velocity.float() - old_velocity.detach().float()
    log_ratio = -(change * (change + 2 * direction)).mean((1, 2, 3))
    ratio = log_ratio.exp()
    penalty = reward_difference.abs() / (2 * clip_range) * (ratio - 1) ** 2
    return (penalty - reward_difference * ratio).mean(), ratio_stats(log_ratio, clip_range)


# ==================================================================================================
# The loop: sample, reward, allocate, compare, update. Its parts stand below it.


def train_iteration(policy, reference, optimizer, prompts, reward, settings, iteration):
    """Run one iteration of STAR (or Flow-GRPO, or FDFO) on some prompts, a group of images each.

    reference: the frozen starting model, or None without KL. Returns one line of metrics.jsonl.
    """
    key = (settings.seed, iteration)
    sigmas = policy.sigmas(settings.sampling_steps)
    capture = settings.method == "star"
    began = time.perf_counter()

    # Steps 1 and 2. Sample groups of images (fdfo: pairs), one microbatch after the other, and read
    # the attention to the prompt's core on the way. Threads reward what is sampled meanwhile.
    rollouts = []
    encoded = policy.encode(prompts)  # also finds the core tokens
    with RewardQueue(reward, prompts, settings.group_size, policy.device) as queue:
        for rows in microbatches(len(prompts) * settings.group_size, settings, key):
            rollout, images = sample(
                policy, encoded, rows, settings, sigmas, key, settings.trained_steps, capture
            )
            rollouts.append(rollout)
            queue.add(rows, images)
        rewards = queue.scores()[:, 0]  # column 1 is only reported
    sampled = time.perf_counter()

    # Step 3. Allocate: every trained step of every rollout gets a map of its own, of mean 1.
    allocate(rollouts, settings)

    # Step 4. Compare each image's reward with its group's (fdfo: with its twin's).
    compare(rollouts, rewards, settings)

    # Step 5. Update the policy in one pass over the rollouts, in a few optimizer steps. Before the
    # first one theta = theta_old, so its old side is taken from the same forward pass and its ratio
    # is exactly 1. The later ones use what sampling recorded; sampling_gaps: how far that is off.
    weights = loss_weights(sigmas, settings)
    history = []
    gradient_norms = []
    sampling_gaps = []
    for update, step_batch in enumerate(assign_to_optimizer_steps(rollouts, settings, key)):
        for rollout, steps in step_batch:
            i = int(steps[0])  # all images' step; fdfo's differ, and its weights are all 1
            new, mean, std = replay_step(policy.transformer, rollout, steps, sigmas, settings)
            old = rollout.sampled(steps)
            if update == 0:
                sampling_gaps.append(gap_to_sampling(new.detach(), old, rollout, steps, settings))
                old = new.detach()
            loss, stats = objective(new, old, rollout, steps, settings)
            if reference is not None:
                _, reference_mean, _ = replay_step(reference, rollout, steps, sigmas, settings)
                kl = kl_to_reference(mean, reference_mean, std, sigmas[i + 1] - sigmas[i])
                loss = loss + settings.kl * kl
                stats["kl"] = kl.detach()
            (loss * weights[i] / len(step_batch)).backward()
            history.append({name: float(value) for name, value in stats.items()})
        gradient_norms.append(optimizer.step())
    return {
        "iteration": iteration,
        **summary(rewards, history, sampling_gaps, gradient_norms),
        "seconds_sampling": sampled - began,
        "seconds_update": time.perf_counter() - sampled,
    }


class EncodedPrompts(NamedTuple):
    """G prompts as the transformer takes them; the empty prompt of guidance is the last."""

    embeddings: Tensor  # [G + 1, N, D]
    pooled: Tensor  # [G + 1, D']
    core_mask: Tensor  # [G, N] bool: the prompt's core content


@dataclasses.dataclass
class Rollout:
    """A microbatch of B sampled images: all that the update needs to take their steps again.

    Of the T denoising steps the first K are noisy and may be trained. What a method has no use for
    is None. Where no step is noisy, `latents` has all T + 1.
    """

    rows: Tensor  # [B]: which of the iteration's images these are
    encoded: EncodedPrompts  # of the iteration's prompts, shared by all its rollouts
    text_rows: Tensor  # [B]: each image's prompt in `encoded`; with CFG [2B], the empty ones first
    latents: Tensor | None = None  # [K + 1, B, C, H, W] fp32: x_t, before and after each noisy step
    log_prob: Tensor | None = None  # [K, B, P]: l_p under the policy that sampled
    velocity: Tensor | None = None  # [K, B, C, H, W]: v of the policy that sampled; fdfo
    attention: Tensor | None = None  # [T, B, P]: S of every step; star
    allocation: Tensor | None = None  # [K, B, P]: M; star
    advantages: Tensor | None = None  # [B]: A
    reward_difference: Tensor | None = None  # [B]: dR; fdfo
    direction: Tensor | None = None  # [B, C, H, W]: d; fdfo

    def text(self):
        """Return the transformer's text inputs (embeddings [B or 2B, N, D], pooled)."""
        return self.encoded.embeddings[self.text_rows], self.encoded.pooled[self.text_rows]

    def sampled(self, steps):
        """Return what the sampling policy gave at each image's step: l_p [B, P]; fdfo: its v."""
        kept = self.velocity if self.log_prob is None else self.log_prob
        return at_steps(kept, steps)


def at_steps(values, steps):
    """Return values [K, B, ...] at each image's own step [B] -> [B, ...]."""
    return values[steps, torch.arange(len(steps))]


def microbatches(count, settings, key=None):
    """Return which rows this process takes together: a list of [B].

    With a key the images (fdfo: pairs) come in random order, so that every optimizer step sees all
    prompts; the order is a function of the key, never of the batch size. Under torchrun the
    microbatches are dealt to the processes.
    """
    rows = torch.arange(count)
    if key is not None:
        together = 2 if settings.fdfo else 1
        rows = rows.view(-1, together)
        rows = rows[torch.randperm(len(rows), generator=generator(*key, "order"))].flatten()
    rank, processes = process_rank()
    return rows.split(settings.batch_size)[rank::processes]


@torch.no_grad()
def sample(policy, encoded, rows, settings, sigmas, key, noisy_steps=0, capture=False, copies=0):
    """Sample one microbatch; return (Rollout, images [B, 3, h, w] uint8 on the CPU).

    Image `row` is copy row % copies of prompt row // copies (copies: by default the group's). Its
    noise is a function of these two and of key, (seed, iteration). The first noisy_steps steps are
    noisy and may train, the others are Euler's; `capture` reads the attention at every step.
    """
    copies = copies or settings.group_size
    transformer = policy.transformer
    prompt_rows = rows // copies
    core_mask = encoded.core_mask[prompt_rows]
    text_rows = prompt_rows
    if settings.guidance > 1:
        empty = torch.full_like(prompt_rows, len(encoded.core_mask))
        text_rows = torch.cat([empty, prompt_rows])
    churn = 0.0
    if settings.fdfo and noisy_steps:
        churn = settings.churn or 0.1 / settings.sampling_steps
    noise = []
    for row in rows.tolist():
        place = divmod(row, copies)  # the prompt's row, and which of its copies
        noise.append(sample_noise(key, *place, noisy_steps, policy.latent_shape, churn))
    noise = torch.stack(noise).to(policy.device)  # [B, 1 + noisy_steps, C, H, W]

    rollout = Rollout(rows, encoded, text_rows)
    trajectory = [noise[:, 0]]
    recorded = []  # what rollout.sampled gives: each noisy step's log-density, or fdfo's velocity
    attention = []
    blocks = settings.blocks if capture else ()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        latents = trajectory[-1]
        with capture_attention(transformer, core_mask, blocks, settings.attention_hops) as found:
            sigma_of_each = torch.full(rows.shape, sigma)
            velocity = predict_velocity(
                transformer, latents, sigma_of_each, rollout.text(), settings.guidance
            )
        if found:
            attention.append(torch.stack(found).mean(0))  # over the blocks
        if i >= noisy_steps:
            latents, _ = sde_mean_std(latents, velocity, sigma, sigma_next, sigmas[1], 0.0)
        elif settings.fdfo:
            latents = churn_step(latents, velocity, sigma, sigma_next, churn, noise[:, i + 1])
            recorded.append(velocity)
        else:
            mean, std = sde_mean_std(
                latents, velocity, sigma, sigma_next, sigmas[1], settings.noise_level
            )
            latents = mean + std * noise[:, i + 1]
            recorded.append(token_log_prob(latents, mean, std, transformer.config.patch_size))
        trajectory.append(latents)

    kept_steps = noisy_steps or len(sigmas) - 1
    rollout.latents = torch.stack(trajectory[: kept_steps + 1])
    if attention:
        rollout.attention = torch.stack(attention)
    if recorded and settings.fdfo:
        rollout.velocity = torch.stack(recorded)
    elif recorded:
        rollout.log_prob = torch.stack(recorded)
    return rollout, policy.decode(latents)


def generator(*key):
    """Return a CPU generator that is a function of its key alone, not of history.

    The key is (seed, iteration, prompt's place, copy) or the like. So an image's noise depends
    neither on the batches nor on what was drawn before, and a resume needs no state.
    """
    digest = blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits


def sample_noise(key, prompt_row, copy_number, noisy_steps, shape, churn=0.0):
    """Return one trajectory's noise [1 + noisy_steps, *shape]: its start, then each noisy step's.

    With churn, copies 2k and 2k + 1 of a prompt start from the same noise but for FDFO's first
    re-noising.
    """
    noise = torch.randn(1 + noisy_steps, *shape, generator=generator(*key, prompt_row, copy_number))
    if churn:
        pair = generator(*key, prompt_row, "pair", copy_number // 2)
        shared = torch.randn(shape, generator=pair)
        noise[0] = churn_step(shared, torch.zeros(shape), 1.0, 1.0, churn, noise[0])
    return noise


def predict_velocity(transformer, latents, sigma, text, guidance):
    """Return v [B, C, H, W] fp32. sigma [B]; text: a Rollout's text().

    With guidance above 1, v = v_empty + guidance (v_prompt - v_empty), from the two halves of one
    batch.
    """
    embeddings, pooled = text
    hidden = latents.to(transformer.dtype)
    timestep = (sigma * 1000).to(latents.device)
    if guidance > 1:
        hidden = torch.cat([hidden, hidden])
        timestep = torch.cat([timestep, timestep])
    velocity = transformer(
        hidden_states=hidden,
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        timestep=timestep,
        return_dict=False,
    )[0].float()
    if guidance > 1:
        empty, prompt = velocity.chunk(2)
        velocity = empty + guidance * (prompt - empty)
    return velocity


def allocate(rollouts, settings):
    """Give every rollout the maps of its trained steps. Only star has maps."""
    if settings.method != "star":
        return
    for rollout in rollouts:
        rollout.allocation = step_maps(rollout.attention, settings)[: settings.trained_steps]


def step_maps(attention, settings):
    """Return the maps [T, B, P] of a rollout's attention [T, B, P], as the settings say."""
    if settings.attention_steps == "later":
        attention = hindsight(attention)
    return allocation_map(attention, settings.allocation_strength)


def compare(rollouts, rewards, settings):
    """Give every rollout its images' advantages (fdfo: reward differences and directions).

    rewards [rows]: of all the iteration's images.
    """
    advantages = group_advantages(rewards, settings.group_size)
    for rollout in rollouts:
        device = rollout.latents.device
        if settings.fdfo:
            pair_rewards = rewards[rollout.rows].to(device)
            # All of fdfo's steps train (K = T), so its last latents are x_0.
            difference, direction = fdfo_direction(rollout.latents[-1], pair_rewards)
            rollout.reward_difference = difference
            rollout.direction = direction
        else:
            rollout.advantages = advantages[rollout.rows].to(device)


def loss_weights(sigmas, settings):
    """Return each trained step's weight in the loss, a list of K floats."""
    if settings.step_weights == "equal":
        return step_weights(sigmas, settings.noise_level, settings.trained_steps)
    return [1.0] * settings.trained_steps


def assign_to_optimizer_steps(rollouts, settings, key):
    """Return for each optimizer step a list of (rollout, each image's denoising step [B]).

    star and flow-grpo take whole trajectories one after the other; fdfo some steps of every
    trajectory, in an order of each image's own, so that every optimizer step sees all images and
    all noise levels.
    """
    trained = settings.trained_steps
    optimizer_steps = [[] for _ in range(settings.optimizer_steps)]
    for index, rollout in enumerate(rollouts):
        if settings.fdfo:
            orders = []
            for row in rollout.rows.tolist():
                orders.append(torch.randperm(trained, generator=generator(*key, "deal", row)))
            for place, steps in enumerate(torch.stack(orders, dim=1)):
                assigned = optimizer_steps[place * len(optimizer_steps) // trained]
                assigned.append((rollout, steps))
        else:
            assigned = optimizer_steps[index * len(optimizer_steps) // len(rollouts)]
            for i in range(trained):
                assigned.append((rollout, torch.full_like(rollout.rows, i)))
    return optimizer_steps


def replay_step(transformer, rollout, steps, sigmas, settings):
    """Take a step of the rollout again, under the transformer as it is now.

    steps [B]: each image's denoising step, one for all except with fdfo. Returns (l_p [B, P] of the
    step that was taken, mean and std of its Gaussian); fdfo's steps have no density: (v, None,
    None).
    """
    latents = at_steps(rollout.latents, steps)
    sigma = torch.tensor(sigmas)[steps]
    velocity = predict_velocity(transformer, latents, sigma, rollout.text(), settings.guidance)
    if settings.fdfo:
        return velocity, None, None
    i = int(steps[0])
    mean, std = sde_mean_std(
        latents, velocity, sigmas[i], sigmas[i + 1], sigmas[1], settings.noise_level
    )
    log_prob = token_log_prob(rollout.latents[i + 1], mean, std, transformer.config.patch_size)
    return log_prob, mean, std


def objective(new, old, rollout, steps, settings):
    """Return the method's (loss, stats). new, old: l_p [B, P] of the step; fdfo: v."""
    if settings.fdfo:
        return fdfo_objective(
            new, old, rollout.reward_difference, rollout.direction, settings.clip_range
        )
    advantages = rollout.advantages
    if settings.method == "flow-grpo":
        return flow_grpo_objective(new, old, advantages, settings.clip_range)
    allocation = at_steps(rollout.allocation, steps)
    if settings.step_weights == "equal":
        advantages = advantages / map_norm(allocation)
    return star_objective(new, old, advantages, allocation, settings.clip_range, settings.ratio)


def gap_to_sampling(new, old, rollout, steps, settings):
    """Return the largest abs(rho - 1) before any optimizer step, where it ought to be 0.

    It warns if that lies outside the clip range.
    """
    _, stats = objective(new, old, rollout, steps, settings)
    if stats["clip_high"] + stats["clip_low"] > 0:
        warnings.warn(
            "before any optimizer step, ratios of update and sampling lie outside the clip range "
            "(ratio_deviation in metrics.jsonl); later ratios carry that error",
            stacklevel=2,
        )
    return float(stats["ratio_deviation"])


def summary(rewards, history, sampling_gaps, gradient_norms):
    """Return columns of metrics.jsonl, over all processes; README.md explains them.

    They are means over all updates, the first of which has rho = 1; ratio_deviation alone is the
    gap to sampling before that. Raises RunStopped if no optimizer step was taken.
    """
    all_history = []
    all_gaps = []
    for other_history, other_gaps in gather((history, sampling_gaps)):
        all_history += other_history
        all_gaps += other_gaps
    columns = {}
    for name in all_history[0]:
        columns[name] = sum(stats[name] for stats in all_history) / len(all_history)
    finite_rewards = rewards[rewards.isfinite()]
    finite_norms = [norm for norm in gradient_norms if math.isfinite(norm)]
    if not finite_norms:
        raise RunStopped("no gradient was finite; lower --learning-rate")
    return {
        "reward": finite_rewards.mean().item(),
        **columns,
        "ratio_deviation": max(all_gaps),
        "gradient_norm": sum(finite_norms) / len(finite_norms),
        "dropped": len(rewards) - len(finite_rewards),
        "steps_skipped": len(gradient_norms) - len(finite_norms),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,  # without CUDA 0
    }


# ==================================================================================================
# Settings. A field's default is SD3.5 Medium's. PRESETS has what task and method change, and a
# model folder may carry layers of its own in star.json, as the embedded one does. --help shows all.

SD35 = "stabilityai/stable-diffusion-3.5-medium"
EMBEDDED = "tiny"  # a folder under assets/
ROOT = Path(__file__).resolve().parent
GRPO = ("star", "flow-grpo")  # the methods whose steps have a density


def setting(default, help, low=-math.inf, high=math.inf, methods=(), may_change_on_resume=False):
    """Make a field of Settings: its default, help, the range of what can be meant, and
    the methods that alone have it (none: all)."""
    details = {"help": help, "low": low, "high": high, "methods": methods}
    details["may_change_on_resume"] = may_change_on_resume
    return dataclasses.field(default=default, metadata=details)


free_setting = functools.partial(setting, may_change_on_resume=True)


@dataclasses.dataclass
class Settings:
    task: Literal["ocr", "geneval", "pickscore"] = setting(
        "ocr", "what is rewarded: text, objects, or being liked"
    )
    model: str = setting(
        "", f"an SD3 or SD3.5 id or folder, or tiny, the embedded one [with CUDA {SD35}, else tiny]"
    )
    method: Literal["star", "flow-grpo", "fdfo"] = setting(
        "star", "an advantage by region, by image, or FDFO's pairs"
    )
    transformer: str = setting(
        "", "start from a run's folder, or its transformer/; --iterations 0: only score it"
    )
    reward_model: str = free_setting(
        "", "local copy of the reward's CLIP; geneval: a folder with detector/ and clip/"
    )

    # STAR. The abstract gives no number, so these are ours.
    allocation_strength: float = setting(
        1.0, "lambda: 0 gives uniform maps, 1 the attention's alone", 0, 1, ("star",)
    )
    # Seg4Diff (2509.18096): of SD3.5's blocks 0 to 23, block 9 localises best. Not star's alone:
    # maps_before.png and maps_after.png are drawn with every method.
    attention_blocks: str = setting("9", "joint blocks to read, e.g. 9 or 8,9,10")
    attention_steps: Literal["own", "later"] = setting(
        "later",
        "own: a step's map is of its attention; later: of the mean from it to the last step",
        methods=("star",),
    )
    attention_hops: int = setting(
        1, "times a map is spread through the image's own attention", 0, 2, ("star",)
    )
    ratio: Literal["region", "image"] = setting(
        "region", "clip each region's ratio, or the image's", methods=("star",)
    )
    step_weights: Literal["none", "equal"] = setting(
        "equal",
        "equal: divide out each step's gradient size, and each map's root mean square",
        methods=GRPO,
    )
    # The signal is in the first steps, where composition is decided. Flow-GRPO trains 9.
    sde_window: int = setting(
        4, "K: the first K steps are noisy and train, the rest are Euler's", 1, methods=GRPO
    )

    # Flow-GRPO's recipe for SD3.5 Medium, except where a comment says otherwise.
    iterations: int = free_setting(1000, "rounds of sampling and updating; 0: only evaluate", 0)
    # Ours: Flow-GRPO's 48 groups are for 24 GPUs.
    prompts_per_iteration: int = setting(16, "groups an iteration", 1)
    # Flow-GRPO: groups of 12 and 6 collapsed on PickScore.
    group_size: int = setting(24, "images a prompt, compared with each other", 2)
    # An 80 GB card holds 4 with room; 2 takes half as long again.
    batch_size: int = free_setting(
        4, "images a forward pass, in sampling and update; memory goes with it", 1
    )
    optimizer_steps: int = setting(
        2, "optimizer steps an iteration, in one pass over the images", 1
    )
    # Flow-GRPO trains a LoRA at 3e-4; here every parameter trains.
    learning_rate: float = setting(1e-5, "AdamW's, constant", 1e-12, 1)
    clip_range: float = setting(
        1e-4, "eps of an image-level ratio; star's regions have eps sqrt(P)", 1e-12, 1e3
    )
    kl: float = setting(
        0.04, "weight of the KL to the starting model; 0 keeps no reference copy", 0, 1e6, GRPO
    )
    guidance: float = setting(
        4.5, "classifier-free guidance, in sampling, update and evaluation; 1: off", 1, 100
    )
    sampling_steps: int = setting(10, "denoising steps of a rollout", 3)
    noise_level: float = setting(0.7, "a of the SDE: how much a step explores", 1e-3, 2, GRPO)
    churn: float = setting(0.0, "g of churn_step; 0: 0.1 / steps", 0, 1, ("fdfo",))
    eval_every: int = free_setting(50, "iterations between evaluations on the test prompts", 1)
    eval_steps: int = setting(40, "denoising steps of evaluation's deterministic sampler", 1)
    # Ours: all of GenEval's 2,212 images at every evaluation would take a fifth of the run.
    eval_prompts: int = setting(
        0, "test prompts of the evaluations between first and last, evenly by tag; 0: all", 0
    )
    resolution: int = setting(512, "pixels a side", 16)
    t5_length: int = setting(128, "text positions for T5; 0 leaves T5 out", 0)

    # How it is run: ours.
    device: Literal["cuda", "cpu"] = free_setting("cuda", "cuda: a GPU if there is one")
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "the weights of forward and backward; the optimizer's are fp32"
    )
    gradient_checkpointing: bool = free_setting(
        False, "a third more arithmetic, a tenth of the activations"
    )
    optimizer_device: Literal["cuda", "cpu"] = free_setting(
        "cuda", "where masters and moments live; cpu, with --gradient-checkpointing: 24 GB cards"
    )
    train_prompts: str = setting(
        "prompts/ocr/train.txt",
        "file, one prompt a line (geneval: JSON lines); Flow-GRPO's files work",
    )
    test_prompts: str = setting("prompts/ocr/test.txt", "file, likewise; evaluated in order")
    seed: int = setting(0, "of everything random in the run")
    out: str = free_setting("", "the run's folder [runs/<task>-<model>-<method>-<time>]")
    save_every: int = free_setting(
        5, "iterations between checkpoints, besides the first and the last", 1
    )
    resume: bool = free_setting(
        False, "go on with the run in --out, or the one saved last, as it was set"
    )

    @property
    def blocks(self):
        return tuple(int(block) for block in self.attention_blocks.split(","))

    @property
    def fdfo(self):
        return self.method == "fdfo"

    @property
    def trained_steps(self):
        return self.sampling_steps if self.fdfo else self.sde_window


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
KINDS = get_type_hints(Settings)  # {name: its type}
FILES = ("train_prompts", "test_prompts", "transformer", "reward_model")  # settings that name files
NO_DEFAULTS = ("task", "method", "model", "transformer", "out", "resume")  # not for a star.json

# Later layers win: the task's, the model folder's for all and for the task, the method's, the
# folder's for the method, and last what the command line says.
PRESETS = {
    "all": {},
    "task": {
        "geneval": {
            "eval_prompts": 60,
            "train_prompts": "prompts/geneval/train.jsonl",
            "test_prompts": "prompts/geneval/test.jsonl",
        },
        "pickscore": {
            "kl": 0.01,  # Flow-GRPO
            "train_prompts": "prompts/pickscore/train.txt",
            "test_prompts": "prompts/pickscore/test.txt",
        },
    },
    "method": {
        "fdfo": {  # FDFO
            "optimizer_steps": 4,
            "clip_range": 0.03,
            "step_weights": "none",
            "kl": 0.0,
            "guidance": 1.0,
        }
    },
}


class BadInput(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


class RunStopped(Exception):
    """The run cannot go on: printed as one line, with an exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def need(condition, message):
    """Raise BadInput with the message unless the condition holds."""
    if not condition:
        raise BadInput(message)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"


def flag(name):
    return f"--{name.replace('_', '-')}"


def model_path(model):
    """Return where a model is: an embedded one's folder under assets/, else as it was named."""
    embedded = ROOT / "assets" / model
    if (embedded / "model_index.json").is_file():
        return str(embedded)
    return model


def model_defaults(model):
    """Return the layers of defaults that a model folder carries in star.json, like PRESETS.

    Files that it names are relative to the folder. BadInput for anything that is not a setting.
    """
    path = Path(model_path(model)) / "star.json"
    layers = {"all": {}, "task": {}, "method": {}}
    if not path.is_file():
        return layers
    try:
        layers |= json.loads(path.read_text())
        need(layers.keys() == PRESETS.keys(), f"has other layers than {', '.join(PRESETS)}")
        for layer in ("task", "method"):
            for name in layers[layer]:
                need(name in get_args(KINDS[layer]), f"{name} is no {layer}")
        for values in (layers["all"], *layers["task"].values(), *layers["method"].values()):
            for name, value in values.items():
                need(name in FIELDS, f"{name} is no setting")
                need(name not in NO_DEFAULTS, f"{name} is not the model's to set")
                check_value(name, value)
                if name in FILES:
                    values[name] = movable(str((path.parent / value).resolve()))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # no JSON, or not of this shape
        raise BadInput(f"{path}: {one_line(error)}") from error
    return layers


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help explains every setting")


def make_parser():
    """Make the command line's parser from Settings, with the defaults in the help."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "Defaults are SD3.5 Medium's; a model's own are in its folder's star.json."
    layers = PRESETS["task"] | PRESETS["method"]
    for name, kind in KINDS.items():
        default = str(FIELDS[name].default)
        for layer, values in layers.items():
            if name in values:
                default += f"; {layer}: {values[name]}"
        help = FIELDS[name].metadata["help"]
        if default:
            help += f" [{default}]"
        options = {"type": kind}
        if kind is bool:
            options = {"action": "store_true"}
        elif name in FILES:
            options = {"type": movable}
        elif get_args(kind):
            options = {"choices": get_args(kind)}
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=help, **options)
    return parser


def parse_settings(arguments=None):
    """Return the Settings of a command line, every value checked before any long work.

    Raises BadInput for what is wrong.
    """
    given = vars(make_parser().parse_args(arguments))
    if given.get("resume"):
        given = resumed(given)
    if not given.get("model"):
        given["model"] = SD35 if torch.cuda.is_available() else EMBEDDED
        print(
            f"note: --model {given['model']} (SD3.5 Medium with a CUDA GPU, else the embedded one)"
        )
    task = given.get("task", Settings.task)
    method = given.get("method", Settings.method)
    own = model_defaults(given["model"])
    values = PRESETS["task"].get(task, {}) | own["all"] | own["task"].get(task, {})
    values |= PRESETS["method"].get(method, {}) | own["method"].get(method, {}) | given
    settings = Settings(**values)
    if not settings.out:
        run = f"{settings.task}-{Path(settings.model).name}-{settings.method}"
        settings.out = f"runs/{run}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_settings(settings, given)
    return settings


def movable(path):
    """Return a path so that it outlives a move of the checkout: what lies in it relative to it.

    `ROOT / path` opens it. What is no path here (an id of the hub, say) stays as it is.
    """
    for whole in (Path(path).resolve(), ROOT / path):
        if path and whole.exists():
            return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
    return path


def transformer_file(settings):
    folder = ROOT / settings.transformer
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    return folder / "diffusion_pytorch_model.safetensors"


def file_digests(settings):
    """Return {path: digest} of the files that decide what the run is, for a resume to compare."""
    paths = [settings.train_prompts, settings.test_prompts]
    if settings.transformer:
        paths.append(movable(str(transformer_file(settings))))
    digests = {}
    for path in paths:
        size = (ROOT / path).stat().st_size
        # Mapped, not read: a transformer has gigabytes.
        content = torch.from_file(str(ROOT / path), size=size, dtype=torch.uint8)
        digests[path] = blake2b(content.numpy(), digest_size=16).hexdigest()
    return digests


def resumed(given):
    """Return the settings of the run that --resume goes on with, and those given now."""
    out = Path(given.get("out", ""))
    if "out" not in given:
        saved = max(Path("runs").glob("*/checkpoints"), key=os.path.getmtime, default=None)
        need(saved, "--resume: no run with a checkpoint under runs/; name its folder with --out")
        out = saved.parent
    try:
        config = json.loads((out / "config.json").read_text())
        settings = config["settings"]
        digests = config["files"]
        Settings(**settings)  # a TypeError for what is not a setting
    except Exception as error:  # no file, no JSON, other settings
        raise BadInput(f"--resume: there is no run in {out} ({one_line(error)})") from error
    changed = []
    for name, value in given.items():
        if value != settings[name] and not FIELDS[name].metadata["may_change_on_resume"]:
            changed.append(flag(name))
    need(
        not changed,
        f"--resume would make another run of {out}: {', '.join(changed)} may not change",
    )
    try:
        digests_now = file_digests(Settings(**settings))
    except (OSError, RuntimeError) as error:  # a file is gone, or empty
        raise BadInput(f"--resume: {one_line(error)}") from error
    for path, digest in digests.items():
        need(digests_now.get(path) == digest, f"--resume: {path} changed since {out} began with it")
    return settings | given | {"out": str(out)}


def check_value(name, value):
    """Raise BadInput unless the value is one that the setting can have."""
    kind = KINDS[name]
    choices = get_args(kind)
    if choices:
        need(value in choices, f"{flag(name)} {value}: one of {', '.join(choices)}")
        return
    kinds = (int, float) if kind is float else kind
    need(isinstance(value, kinds), f"{flag(name)} {value}: must be {kind.__name__}")
    if kind in (int, float):
        low = FIELDS[name].metadata["low"]
        high = FIELDS[name].metadata["high"]
        need(low <= value <= high, f"{flag(name)} {value}: must lie in [{low}, {high}]")


def check_settings(settings, given):
    """Raise BadInput for a value, or a combination, that would go wrong late or unnoticed."""
    for name, field in FIELDS.items():
        check_value(name, getattr(settings, name))
        methods = field.metadata["methods"]
        if name in given and methods and not settings.resume:
            need(
                settings.method in methods,
                f"{flag(name)} is of --method {' and '.join(methods)}, not of {settings.method}",
            )

    window = settings.sde_window
    steps = settings.sampling_steps
    need(
        settings.fdfo or window < steps,
        f"--sde-window {window}: must lie in [1, {steps - 1}]; the last step never trains",
    )
    need(
        settings.resolution % 16 == 0,
        f"--resolution {settings.resolution}: must be a multiple of 16",
    )
    need(
        re.fullmatch(r"\d+(,\d+)*", settings.attention_blocks),
        "--attention-blocks: write it as 9 or 8,9",
    )
    need(
        settings.task != "ocr" or not settings.reward_model,
        "--reward-model: the ocr reward takes none",
    )
    need(
        not settings.fdfo or (settings.group_size % 2 == 0 and settings.batch_size % 2 == 0),
        "--group-size and --batch-size must be even: fdfo compares pairs of images",
    )
    need(not settings.fdfo or settings.kl == 0, f"--kl {settings.kl}: fdfo's steps have no density")
    need(
        not settings.fdfo or settings.optimizer_steps <= steps,
        "--optimizer-steps may be at most --sampling-steps with fdfo",
    )
    # fdfo deals out single denoising steps to its optimizer steps, the others whole microbatches.
    shares = process_rank()[1]
    if not settings.fdfo:
        shares *= settings.optimizer_steps
    images = settings.prompts_per_iteration * settings.group_size
    need(
        settings.iterations == 0 or images % (settings.batch_size * shares) == 0,
        f"{images} images an iteration do not split into {shares} shares (optimizer steps x "
        f"processes) of whole batches of {settings.batch_size}; change --batch-size",
    )
    if not settings.resume and process_rank()[0] == 0:
        need_free_folder(Path(settings.out))


def need_free_folder(out):
    """Raise BadInput for a folder in which a new run would overwrite something, or cannot write."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    need(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"--out {out}: {existing} is no folder to write in",
    )
    names = "config.json metrics.jsonl checkpoints transformer".split()
    names += "maps_before.png maps_after.png test_before.png test_after.png".split()
    taken = [name for name in names if (out / name).exists()]
    need(
        not taken,
        f"--out {out} holds another run ({', '.join(taken)}); name a new folder, or --resume it",
    )


# ==================================================================================================
# Plumbing: the model, rewards, pictures, the optimizer, the run's folder, processes.


class Prompt(NamedTuple):
    text: str
    metadata: dict | None = None  # geneval's line


class Policy:
    """The model from text to pixels, around a StableDiffusion3Pipeline of any size."""

    def __init__(self, pipe, settings, device):
        import accelerate

        self.pipe = pipe
        self.settings = settings
        self.device = torch.device(device)
        self.transformer = pipe.transformer.to(device).eval()  # sampler and update must agree
        self.vae = pipe.vae.to(device)
        config = self.transformer.config
        side = settings.resolution // pipe.vae_scale_factor
        self.latent_shape = (config.in_channels, side, side)
        # Each text encoder is on the device only while it encodes: these hooks bring it there and
        # send the one before it away.
        self.last_encoder = None
        for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if encoder is not None:
                _, self.last_encoder = accelerate.cpu_offload_with_hook(
                    encoder, self.device, self.last_encoder
                )

    @torch.no_grad()
    def encode(self, prompts):
        """Return EncodedPrompts: CLIP's positions, then T5's (zeros where there is no T5)."""
        texts = [prompt.text for prompt in prompts] + [""]
        embeddings = []
        pooled = []
        for start in range(0, len(texts), 64):
            encoded = self.pipe.encode_prompt(
                texts[start : start + 64],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.settings.t5_length,
            )
            self.last_encoder.offload()
            embeddings.append(encoded[0].to(self.transformer.dtype))
            pooled.append(encoded[2].to(self.transformer.dtype))
        return EncodedPrompts(torch.cat(embeddings), torch.cat(pooled), self.core_mask(prompts))

    def core_mask(self, prompts):
        """Return [G, N] bool: the core content's positions in the joint text sequence.

        CLIP's come first, then T5's. No row is empty: where truncation has cut the core content
        off, the content tokens that are left stand in, with a warning.
        """
        segments = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]  # both CLIPs'
        has_t5 = self.pipe.text_encoder_3 is not None
        if has_t5:
            segments.append((self.pipe.tokenizer_3, self.settings.t5_length))
        masks = []
        for text, metadata in prompts:
            offsets = []
            for tokenizer, length in segments:
                tokens = tokenizer(
                    text,
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_offsets_mapping=True,
                )
                offsets += tokens["offset_mapping"]
            mask = token_mask(core_spans(text, self.settings.task, metadata), offsets)
            if not any(mask):
                warnings.warn(
                    "some prompts are cut off before their core content: "
                    "all their words stand in for it",
                    stacklevel=2,
                )
                mask = token_mask(content_spans(text), offsets)
            if not any(mask):
                mask = token_mask([(0, len(text))], offsets)
            masks.append(mask)
        mask = torch.tensor(masks, device=self.device)
        if not has_t5:
            mask = F.pad(mask, (0, self.settings.t5_length))  # zeros stand where T5 would
        return mask

    @torch.no_grad()
    def decode(self, latents):
        """Return images [B, 3, h, w] uint8 on the CPU. The VAE computes in fp32, as Flow-GRPO's."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def sigmas(self, steps):
        """Return the scheduler's own grid: T + 1 floats from 1 to 0."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.tolist()


@contextlib.contextmanager
def load_errors(what, path=""):
    """Turn whatever a loader says of what is not there, not whole or another into BadInput."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what}: {one_line(error)}{load_remedy(path, error)}") from error


def check_model(settings):
    """Raise BadInput for settings that the model cannot meet, by its configuration alone."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    path = model_path(settings.model)
    need(
        Path(path).is_dir() or path.count("/") == 1,
        f"--model {path}: neither a folder nor the hub's owner/name",
    )
    with load_errors(f"--model {settings.model}", path):
        config = SD3Transformer2DModel.load_config(path, subfolder="transformer")
        vae_config = AutoencoderKL.load_config(path, subfolder="vae")
    depth = config["num_layers"]
    need(
        max(settings.blocks) < depth,
        f"--attention-blocks {settings.attention_blocks}: the model has 0..{depth - 1}",
    )
    vae_scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    largest = config["pos_embed_max_size"] * config["patch_size"] * vae_scale
    need(
        settings.resolution <= largest,
        f"--resolution {settings.resolution}: the model knows up to {largest} px",
    )


def load_policy(settings, device):
    """Load SD3 or SD3.5 from the hub or a local folder, of which the embedded model is one.

    Raises BadInput, in one line, for whatever stands in the way. safetensors only: nothing is
    unpickled, and no code from the hub is run.
    """
    from diffusers import StableDiffusion3Pipeline

    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    parts = {}
    if settings.t5_length == 0:
        parts = {"text_encoder_3": None, "tokenizer_3": None}
    weights = None
    if settings.transformer:
        with load_errors(f"--transformer {settings.transformer}"):
            weights = load_file(transformer_file(settings))
    path = model_path(settings.model)
    with load_errors(f"--model {settings.model}", path):
        pipe = StableDiffusion3Pipeline.from_pretrained(
            path, dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True, **parts
        )
        check_vocabulary(pipe.tokenizer, pipe.text_encoder.config)
        check_vocabulary(pipe.tokenizer_2, pipe.text_encoder_2.config)
    if settings.transformer:
        with load_errors(f"--transformer {settings.transformer}"):
            pipe.transformer.load_state_dict(weights)
    if settings.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    return Policy(pipe, settings, device)


def check_vocabulary(tokenizer, config):
    """Raise ValueError where transformers made up a tokenizer for one whose file is missing."""
    if len(tokenizer) < config.vocab_size / 2:
        raise ValueError(f"a tokenizer of {len(tokenizer)} words: its tokenizer.json is missing")


def load_remedy(path, error):
    """Return what to do about a model that did not load, where that is known, else nothing."""
    from huggingface_hub.errors import GatedRepoError

    if Path(path).is_relative_to(ROOT / "assets"):
        return f" (`git checkout {Path(path).relative_to(ROOT)}` brings back what ships)"
    while error is not None:
        if isinstance(error, GatedRepoError):
            return f" (accept its licence at https://huggingface.co/{path}, then `hf auth login`)"
        error = error.__cause__ or error.__context__
    return ""


# --- prompts and rewards --------------------------------------------------------------------------
# A reward is reward(images [B, 3, h, w] uint8, prompts: B of Prompt) -> [B, 2]. An image's first
# number is what training raises, the second is reported beside it: ocr, is the word all that was
# read? geneval, the benchmark's verdict; pickscore, the undivided score. NaN says there is none.

GENEVAL_TAGS = "single_object two_object counting colors position color_attr".split()
GENEVAL_COLOURS = "red orange yellow green blue purple pink brown black white".split()
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")


@functools.cache
def geneval_classes():
    """Return {name: GenEval's name} of COCO's 80 classes, by all names that detectors use."""
    names = {}
    for line in (ROOT / "prompts/geneval/classes.txt").read_text().splitlines():
        synonyms = line.split(", ")
        names |= dict.fromkeys(synonyms, synonyms[0])
    return names


def load_prompts(path, task):
    """Load Flow-GRPO's formats: one prompt a line; geneval: JSON lines with the metadata.

    Raises BadInput that names the file and the line.
    """
    prompts = []
    where = f"prompt file {path}"
    try:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        for line_number, line in enumerate(lines, 1):
            where = f"prompt file {path}, line {line_number}"
            if not line.strip():
                continue
            prompt = Prompt(line.strip())
            if task == "geneval":
                metadata = check_geneval(json.loads(line))
                prompt = Prompt(metadata["prompt"], metadata)
            core_spans(prompt.text, task, prompt.metadata)
            prompts.append(prompt)
    except Exception as error:  # whatever is wrong with a file or a line
        raise BadInput(f"{where}: {one_line(error)}") from error
    need(prompts, f"prompt file {path} holds no prompts")
    return prompts


def check_geneval(line):
    """Return GenEval's metadata of one prompt, as it is; whatever is wrong with it raises."""
    known = {*geneval_classes().values(), *GENEVAL_COLOURS, *GENEVAL_RELATIONS}
    for place, clause in enumerate([*line["include"], *line.get("exclude", [])]):
        relation, index = clause.get("position", ("above", -1))  # of an earlier clause
        named = {clause["class"], clause.get("color", "red"), relation}
        named.add(line["include"][index]["class"])
        right = named <= known and line["tag"] in GENEVAL_TAGS
        if not right or clause["count"] < 1 or index >= place:
            raise ValueError(f"not GenEval's: {line['tag']}, {clause}")
    return line


def merge_repeated(prompts):
    """Return the prompts, each once: geneval files may repeat one as often as it is to be drawn."""
    distinct = list({prompt.text: prompt for prompt in prompts}.values())
    if len(distinct) < len(prompts):
        print(
            f"note: {len(prompts)} test prompts, {len(distinct)} of them distinct: "
            "each of those is scored once, on four images"
        )
    return distinct


def stratified_subset(prompts, count):
    """Return `count` prompts (0: all), spread evenly over the file, geneval's over each tag."""
    if not 0 < count < len(prompts):
        return prompts
    by_tag = range(len(prompts))
    if prompts[0].metadata:
        by_tag = sorted(by_tag, key=lambda i: GENEVAL_TAGS.index(prompts[i].metadata["tag"]))
    chosen = sorted(by_tag[i * len(prompts) // count] for i in range(count))
    return [prompts[i] for i in chosen]


def note_strange_words(settings, prompts):
    """Print a note on words that a model with train prompts of its own was not trained on."""
    defaults = model_defaults(settings.model)["task"].get(settings.task, {})
    if "train_prompts" not in defaults:
        return

    def words(prompts):
        return set(re.findall(r"\b[a-z]+\b", " ".join(prompt.text for prompt in prompts)))

    known = load_prompts(defaults["train_prompts"], settings.task)
    strange = words(prompts) - words(known)
    if strange:
        print(f"note: --model {settings.model} was not trained on these words:", *sorted(strange))


def normalise_text(text):
    """Normalise as Flow-GRPO's OCR reward does: no spaces, lower case.

    The many-language recogniser reads a full-width letter for a plain one at times: NFKC mends it.
    """
    return unicodedata.normalize("NFKC", text).replace(" ", "").lower()


def edit_distance(a, b):
    """Return Levenshtein's: insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


def ocr_score(recognised, target):
    """Return (Flow-GRPO's OCR reward in [0, 1], is it the very text?).

    The reward is 1 if the target is part of what was read, else 1 - edit distance / length of the
    target, at least 0. Both sides are normalised.
    """
    recognised = normalise_text(recognised)
    target = normalise_text(target)
    if target in recognised:
        return 1.0, recognised == target
    return max(0.0, 1 - edit_distance(recognised, target) / len(target)), False


class OCRReward:
    """PP-OCR's detector and recogniser; rapidocr's wheel carries the models."""

    def __init__(self):
        import onnxruntime  # noqa: F401  (what rapidocr runs on, imported only when it first reads)
        import rapidocr

        self.engine_class = rapidocr.RapidOCR
        self.local = threading.local()  # an engine a thread: they keep state

    def read(self, image):
        """Return all text in an image [3, h, w] uint8, boxes joined."""
        picture = to_picture(image)
        side = max(picture.size)
        if side < 192:  # the detector wants letters of more than a few pixels
            picture = ImageOps.contain(picture, (192, 192))  # bicubic
        if not hasattr(self.local, "engine"):
            parameters = {
                "Global.use_cls": False,
                "Global.log_level": "error",
                "Global.text_score": 0,  # else 0.5: any reading counts, as in Flow-GRPO
                "Det.limit_type": "max",  # else it enlarges the side to 736
                "Det.limit_side_len": max(96, side),
                "Rec.rec_img_shape": [3, 48, 160],  # the narrowest line; wider text at its width
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
            self.local.engine = self.engine_class(params=parameters)
        return "".join(self.local.engine(picture).txts or ())

    def __call__(self, images, prompts):
        scores = []
        for image, prompt in zip(images, prompts):
            start, end = quoted_span(prompt.text)
            scores.append(ocr_score(self.read(image), prompt.text[start:end]))
        return torch.tensor(scores)


class Detection(NamedTuple):
    """An object that the detector found."""

    box: tuple  # (left, top, right, bottom) in pixels
    confidence: float
    colour: str | None = None  # one of GENEVAL_COLOURS; None where nobody asked


def relations(box, other):
    """Return the words that hold for a box (left, top, right, bottom) relative to another.

    GenEval's rule: along that axis the centres lie apart by more than half their distance, after a
    tenth of both boxes' extents is taken off.
    """
    left, top, right, bottom = box
    other_left, other_top, other_right, other_bottom = other
    x = (left + right - other_left - other_right) / 2
    y = (top + bottom - other_top - other_bottom) / 2  # y points down
    slack_x = 0.1 * (right - left + other_right - other_left)
    slack_y = 0.1 * (bottom - top + other_bottom - other_top)
    shifts = (-x - slack_x, x - slack_x, -y - slack_y, y - slack_y)
    least = math.hypot(x, y) / 2
    return {word for word, shift in zip(GENEVAL_RELATIONS, shifts) if shift > least}


def all_placed(relation, objects, others):
    """Return whether the relation holds between each object and each other, and there are some."""
    pairs = product(objects, others)
    held = [relation in relations(first.box, second.box) for first, second in pairs]
    return bool(held) and all(held)


def count_colour(objects, colour):
    return sum(detection.colour == colour for detection in objects)


def geneval_scores(metadata, detections):
    """Return (training reward in [0, 1], the benchmark's verdict) of one image.

    metadata: the prompt's line; detections: {class: [Detection, ...]}. As in GenEval only what the
    detector is surer of than 0.3 (counting: 0.9) counts, and of a class the 16 surest.
    """
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    found = {}
    for name, objects in detections.items():
        sure = [detection for detection in objects if detection.confidence > threshold]
        found[name] = sorted(sure, key=lambda detection: detection.confidence, reverse=True)[:16]
    return geneval_reward(metadata, found), geneval_verdict(metadata, found)


def geneval_reward(metadata, found):
    """Return Flow-GRPO's training reward: the mean over the terms of all clauses of `include`.

    Each clause has a term for the number of its objects, of whatever colour:
    1 - |wanted - found| / wanted. A clause that names a colour or a place has a second term, 0 if
    the number is wrong. If it is right, the colour's term is the share of the objects that have
    it, and the place's is 1 if the relation holds between each of the clause's objects and each of
    the earlier clause's, 0 if that clause is itself not satisfied. A wrong place gives two terms,
    0 and 1, as in Flow-GRPO's server; a clause with both gets its place's term only if its colours
    are right. The one difference from the server is that the number's term is at least 0.
    """
    terms = []
    satisfying = []  # of every clause its objects if they are as it says, else none
    for clause in metadata["include"]:
        objects = found.get(clause["class"], [])
        wanted = clause["count"]
        terms.append(max(0.0, 1 - abs(wanted - len(objects)) / wanted))
        satisfied = len(objects) == wanted
        if not satisfied and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if satisfied and "color" in clause:
            terms.append(count_colour(objects, clause["color"]) / wanted)
            satisfied = terms[-1] == 1
        if satisfied and "position" in clause:
            relation, index = clause["position"]
            satisfied = all_placed(relation, objects, satisfying[index])
            if not satisfied:
                terms.append(0.0)
            if satisfying[index]:  # also beside that 0, as in Flow-GRPO's server
                terms.append(1.0)
        satisfying.append(objects if satisfied else [])
    return sum(terms) / len(terms)


def geneval_verdict(metadata, found):
    """Return GenEval's verdict (arXiv 2310.11513).

    Of every clause of `include` there are at least as many objects as wanted, and the surest of
    them have the right colour and place; no class of `exclude` reaches the number given there.
    """
    satisfying = []
    for clause in metadata["include"]:
        wanted = clause["count"]
        surest = found.get(clause["class"], [])[:wanted]
        satisfied = len(surest) == wanted
        if "color" in clause:
            satisfied = satisfied and count_colour(surest, clause["color"]) == wanted
        if "position" in clause:
            relation, index = clause["position"]
            satisfied = satisfied and all_placed(relation, surest, satisfying[index])
        satisfying.append(surest if satisfied else [])
    for clause in metadata.get("exclude", ()):
        if len(found.get(clause["class"], [])) >= clause["count"]:
            return False
    return all(satisfying)


def load_reward_model(model_class, processor_class, source, processor_source=None):
    """Return (model, processor) in fp32, from the hub or a folder, through transformers.

    safetensors only, and no code from the hub is run. Raises BadInput, in one line, for whatever
    stands in the way.
    """
    import transformers

    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        parameters = {name for name, _ in model.named_parameters()}
        missing = parameters & set(info["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise ValueError(f"it is no {model_class}: {len(missing)} weights are missing")
        processor_class = getattr(transformers, processor_class)
        processor = processor_class.from_pretrained(processor_source or source)
        if model_class == "CLIPModel":
            check_vocabulary(processor.tokenizer, model.config.text_config)
    except Exception as error:  # what a loader says of what is not there, not whole or another
        remedy = "`hf download` fetches what the hub has, and --reward-model takes a local copy"
        raise BadInput(
            f"the reward model {source} cannot be loaded: {one_line(error)} ({remedy})"
        ) from error
    return model.eval().requires_grad_(False), processor


def clip_output(clip, processor, images, texts):
    """Return a CLIPModel's output for images [3, h, w] and texts."""
    inputs = processor(
        images=images,
        text=texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=clip.config.text_config.max_position_embeddings,
    )
    return clip(**inputs.to(clip.device))


class GenEvalReward(torch.nn.Module):
    """Objects, their number, colour and place, as GenEval sees them.

    Mask2Former finds them, CLIP names their colour. The networks are the benchmark's; here they are
    transformers' copies, not mmdet's and open_clip's. folder: a local copy, with detector/ and
    clip/, else the hub.
    """

    def __init__(self, folder=""):
        super().__init__()
        detector = "facebook/mask2former-swin-small-coco-instance"
        clip = "openai/clip-vit-large-patch14"
        if folder:
            detector = f"{folder}/detector"
            clip = f"{folder}/clip"
        self.detector, self.prepare = load_reward_model(
            "Mask2FormerForUniversalSegmentation", "AutoImageProcessor", detector
        )
        self.clip, self.processor = load_reward_model("CLIPModel", "CLIPProcessor", clip)
        self.names = {}
        for label, name in self.detector.config.id2label.items():
            self.names[label] = geneval_classes().get(name)
        known = any(self.names.values())
        need(known, f"--reward-model {folder}: its detector knows none of GenEval's classes")
        self.size = {}
        if len(self.names) == 80:  # COCO: the benchmark's 800 px, where the processor has 384
            self.size = {"size": {"shortest_edge": 800, "longest_edge": 1333}}

    @torch.no_grad()
    def forward(self, images, prompts):
        inputs = self.prepare(images=list(images), return_tensors="pt", **self.size)
        results = self.prepare.post_process_instance_segmentation(
            self.detector(**inputs.to(self.detector.device)),
            threshold=0.3,
            target_sizes=[images.shape[-2:]] * len(images),
            return_binary_maps=True,
        )
        scores = []
        for image, prompt, result in zip(images, prompts, results):
            include = prompt.metadata["include"]
            painted = {clause["class"] for clause in include if "color" in clause}
            detections = {}
            for segment, mask in zip(result["segments_info"], result["segmentation"].bool().cpu()):
                name = self.names[segment["label_id"]]
                inside = mask.nonzero().flip(1)  # (x, y) of every pixel
                box = (*inside.amin(0).tolist(), *(inside.amax(0) + 1).tolist())
                colour = None
                if name in painted:
                    colour = self.colour(image, name, box, mask)
                detection = Detection(box, segment["score"], colour)
                detections.setdefault(name, []).append(detection)
            scores.append(geneval_scores(prompt.metadata, detections))
        return torch.tensor(scores)

    def colour(self, image, name, box, mask):
        """Name an object's colour by CLIP, from its crop, with #999 for all outside its mask."""
        left, top, right, bottom = box
        crop = to_picture(torch.where(mask, image, 0x99)[:, top:bottom, left:right])
        texts = []
        for colour in GENEVAL_COLOURS:
            texts.append(f"a photo of a {colour} {name}")
            texts.append(f"a photo of a {colour}-colored {name}")
            texts.append(f"a photo of a {colour} object")
        output = clip_output(self.clip, self.processor, [crop], texts)
        classifier = output.text_embeds.unflatten(0, (len(GENEVAL_COLOURS), -1)).mean(1)
        similarity = output.image_embeds @ F.normalize(classifier, dim=-1).T
        return GENEVAL_COLOURS[int(similarity.argmax())]


class PickScoreReward(torch.nn.Module):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text).

    For training it is divided by 26, as Flow-GRPO does. folder: a local copy, else the hub.
    """

    def __init__(self, folder=""):
        super().__init__()
        model = folder or "yuvalkirstain/PickScore_v1"
        processor = folder or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        self.clip, self.processor = load_reward_model(
            "CLIPModel", "CLIPProcessor", model, processor
        )

    @torch.no_grad()
    def forward(self, images, prompts):
        texts = [prompt.text for prompt in prompts]
        output = clip_output(self.clip, self.processor, list(images), texts)
        score = output.logits_per_image.diagonal().cpu()
        return torch.stack([score / 26, score], dim=1)


def make_reward(settings):
    """Make the task's reward. One of your own is a function of the same form: return it here."""
    folder = settings.reward_model
    if folder and (ROOT / folder).exists():
        folder = str(ROOT / folder)
    if settings.task == "ocr":
        return OCRReward()
    if settings.task == "geneval":
        return GenEvalReward(folder)
    return PickScoreReward(folder)


class RewardQueue:
    """Rewards images in threads beside the sampler, each alone: one that fails costs only itself.

    Used as a context. On leaving it, what nobody waits for any more is dropped. A reward that is a
    torch module is on the device only within.
    """

    def __init__(self, reward, prompts, copies, device):
        self.reward = reward
        self.prompts = prompts
        self.copies = copies
        self.device = device
        self.pending = {}  # row: the future of its score
        workers = 1
        if isinstance(reward, OCRReward):  # it computes on the CPU, on one core an image
            workers = min(16, os.cpu_count())
        self.executor = ThreadPoolExecutor(workers)

    def __enter__(self):
        if isinstance(self.reward, torch.nn.Module):
            self.reward.to(self.device)
        return self

    def __exit__(self, *error):
        self.executor.shutdown(cancel_futures=True)
        if isinstance(self.reward, torch.nn.Module):
            self.reward.to("cpu")

    def score_one(self, image, prompt):
        score = torch.as_tensor(self.reward(image[None], [prompt]))
        if score.shape != (1, 2):
            raise ValueError(
                f"a reward of B images must be [B, 2], not {list(score.shape)} at B = 1"
            )
        return score[0]

    def add(self, rows, images):
        """Queue the images [B, 3, h, w] of rows [B]: row r is of prompt r // copies."""
        for row, image in zip(rows.tolist(), images):
            prompt = self.prompts[row // self.copies]
            self.pending[row] = self.executor.submit(self.score_one, image, prompt)
        if self.device.type == "cpu":  # sampler and reward would only be in each other's way
            wait(self.pending.values())

    def scores(self):
        """Return [rows, 2] of all processes, NaN where the reward failed or was not finite.

        Raises RunStopped when more than a fifth is missing.
        """
        scores = torch.full((len(self.prompts) * self.copies, 2), math.nan)
        why = "not a finite number"
        for row, future in self.pending.items():
            try:
                scores[row] = future.result()
            except Exception as error:  # whatever a reward may raise
                why = one_line(error)
        scores = of_all_processes(scores)
        missing = int((~scores[:, 0].isfinite()).sum())
        message = f"the reward failed for {missing} of {len(scores)} images: {why}"
        if missing > len(scores) / 5:
            raise RunStopped(message)
        if missing:
            tqdm.write(f"warning: {message}; left out")
        return scores


def of_all_processes(values):
    """Return values [rows, ...], which are NaN where another process has the row, complete."""
    for part in gather(values):
        values = part.where(part.isfinite(), values)
    return values


def scene_statistics(images):
    """Return two plain statistics of images [B, 3, h, w] uint8, to see what a reward does to them.

    Edge density: the mean absolute difference of neighbouring pixels, 0 for a blank image and 1 for
    a black and white chessboard. Colour entropy: of the image's histogram over 4 x 4 x 4 bins of
    RGB, 0 for one colour and 1 if all bins are equally full. [B, 2] fp32.
    """
    pixels = images.float() / 255
    across = pixels.diff(dim=-1).abs().mean((1, 2, 3))
    down = pixels.diff(dim=-2).abs().mean((1, 2, 3))
    red, green, blue = (images // 64).long().unbind(1)
    bins = F.one_hot(16 * red + 4 * green + blue, 64).float().mean((1, 2))  # [B, 64]
    entropy = torch.special.entr(bins).sum(1) / math.log(64)
    return torch.stack([(across + down) / 2, entropy], dim=1)


# The key of evaluation's noise: the same luck every time and in every run, for the same prompts in
# the same places.
EVALUATION_KEY = ("evaluation",)


def evaluate(policy, prompts, reward, settings):
    """Draw the test prompts (geneval: four images each, as the benchmark) and score them.

    Deterministic sampler, fixed seeds. Returns (columns of metrics.jsonl, cells for save_sheet).
    Papers print eval_score, for ocr eval_reward; scene_statistics stand beside them.
    """
    copies = 4 if settings.task == "geneval" else 1
    sigmas = policy.sigmas(settings.eval_steps)
    encoded = policy.encode(prompts)
    shown = {}
    statistics = torch.full((len(prompts) * copies, 2), math.nan)
    with RewardQueue(reward, prompts, copies, policy.device) as queue:
        for rows in microbatches(len(prompts) * copies, settings):
            _, images = sample(
                policy, encoded, rows, settings, sigmas, EVALUATION_KEY, copies=copies
            )
            queue.add(rows, images)
            statistics[rows] = scene_statistics(images)
            for row, image in zip(rows.tolist(), images):
                if row < 32:
                    shown[row] = image
        scores = queue.scores()
    reward_mean, score_mean = scores.nanmean(0).tolist()
    columns = {"eval_reward": reward_mean}
    if settings.task == "ocr":
        columns["eval_exact"] = score_mean
    else:
        columns["eval_score"] = score_mean
    if settings.task == "geneval":
        tags = [prompt.metadata["tag"] for prompt in prompts for _ in range(copies)]
        by_tag = {}
        for tag in sorted(set(tags), key=GENEVAL_TAGS.index):
            tagged = torch.tensor([image_tag == tag for image_tag in tags])
            by_tag[f"eval_{tag}"] = scores[tagged, 1].nanmean().item()
        columns["eval_score"] = sum(by_tag.values()) / len(by_tag)  # over tags: GenEval's overall
        columns |= by_tag
    edges, colours = of_all_processes(statistics).mean(0).tolist()
    columns["eval_edges"] = edges
    columns["eval_colours"] = colours
    cells = []
    for row in sorted(shown):
        cells.append((shown[row], f"{scores[row, 0]:.2f}  {prompts[row // copies].text}"))
    return columns, cells


# --- pictures -------------------------------------------------------------------------------------


def to_picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def save_sheet(path, cells, columns=8, side=192):
    """Save a PNG of cells (image [3, h, w] uint8, caption of up to three lines), row by row."""
    from diffusers.utils import make_image_grid

    font = ImageFont.load_default(size=13)
    pictures = []
    for image, caption in cells:
        picture = to_picture(image).resize((side, side), Image.BICUBIC)
        picture = ImageOps.expand(picture, (4, 4, 4, 54), "white")
        text = textwrap.fill(caption, side // 7, max_lines=3, placeholder="...")
        ImageDraw.Draw(picture).text((4, side + 6), text, "black", font)
        pictures.append(picture)
    while len(pictures) % columns:
        pictures.append(Image.new("RGB", pictures[0].size, "white"))
    make_image_grid(pictures, len(pictures) // columns, columns).save(path)


def heat(image, allocation):
    """Return an image [3, h, w] uint8 darkened by its map [P], by the root of M / its maximum."""
    side = math.isqrt(len(allocation))
    level = (allocation / allocation.max()).sqrt().view(1, 1, side, side)
    return (image * F.interpolate(level, size=image.shape[-2:])[0]).to(torch.uint8)


def save_maps(path, policy, prompts, settings):
    """Save how a few prompts' images form, and under each its allocation map.

    What is shown at a step is the guess of x_0, from the deterministic sampler at fixed seeds.
    """
    sigmas = policy.sigmas(settings.sampling_steps)
    rollout, _ = sample(
        policy,
        policy.encode(prompts),
        torch.arange(len(prompts)),
        settings,
        sigmas,
        EVALUATION_KEY,
        capture=True,
        copies=1,
    )
    maps = step_maps(rollout.attention, settings).cpu()
    guesses = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = (rollout.latents[i + 1] - rollout.latents[i]) / (sigma_next - sigma)
        guesses.append(policy.decode(rollout.latents[i] - sigma * velocity))
    cells = []
    for row, prompt in enumerate(prompts):
        for guess, sigma in zip(guesses, sigmas):
            cells.append((guess[row], f"sigma {sigma:.2f}"))
        for i, guess in enumerate(guesses):
            cells.append((heat(guess[row], maps[i, row]), prompt.text if i == 0 else ""))
    save_sheet(path, cells, columns=len(guesses), side=128)


# --- the optimizer --------------------------------------------------------------------------------


class MasterAdamW:
    """LoRA-free bf16 training: every weight trains, and none loses its update to bf16's eight bits.

    The model's own weights (bf16 or fp32) do the forward and backward, autograd adds gradients up
    in fp32, and fp32 master weights and AdamW moments do the update, whose result is copied back.
    With only a few optimizer steps in an iteration of hundreds of images, masters and moments may
    live in host memory (device "cpu"). Under torchrun the gradient is the mean over the processes,
    all of which take the same step.
    """

    def __init__(self, parameters, learning_rate, device=None):
        self.parameters = list(parameters)
        self.masters = []
        for parameter in self.parameters:
            master = parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            self.masters.append(master)
            # Nothing of an earlier training may leak into the first step.
            parameter.grad = None
            parameter.grad_dtype = torch.float32  # torch's own attribute: what autograd adds up in
        self.optimizer = torch.optim.AdamW(
            self.masters or [torch.zeros(0)],  # scoring alone has none, and AdamW wants one
            lr=learning_rate,
            weight_decay=1e-4,  # Flow-GRPO's, as is the norm at which gradients are clipped
            # With mean log-densities a full-parameter gradient is small, 1e-6 to 1e-5 a parameter
            # here and less in a large model; the usual eps of 1e-8 would eat much of the step.
            eps=1e-15,
            # No temporaries the size of the model, and several times faster in host memory.
            fused=True,
        )

    @torch.no_grad()
    def step(self, max_norm=1.0):
        """Clip the gradient to max_norm and take one AdamW step unless it is 0 or not finite.

        Returns the norm before clipping.
        """
        processes = process_rank()[1]
        for parameter in self.parameters:
            if parameter.grad is None:  # the parameter had no part in any loss
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            if processes > 1:
                dist.all_reduce(parameter.grad.div_(processes))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        # One parameter after the other (AdamW passes over those without a gradient), so that with
        # the optimizer in host memory there is only ever one gradient there.
        for parameter, master in zip(self.parameters, self.masters):
            if 0 < norm < math.inf:
                master.grad = parameter.grad.to(master.device)
                self.optimizer.step()
                master.grad = None
                parameter.copy_(master)
            parameter.grad = None
        return norm

    def state(self):
        """Return {kind.number: tensor}, all that an exact resume needs.

        The model's own weights are the rounded masters.
        """
        state = {}
        for i, master in enumerate(self.masters):
            state[f"master.{i}"] = master.contiguous()
            for kind, value in self.optimizer.state[master].items():
                state[f"{kind}.{i}"] = value
        return state

    @torch.no_grad()
    def load(self, file):
        """Take up a state() again from an open safetensors file, tensor by tensor."""
        self.optimizer.state.clear()
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
            kind, index = name.split(".")
            master = self.masters[int(index)]
            if kind == "master":
                self.parameters[int(index)].copy_(master.copy_(file.get_tensor(name)))
            else:
                value = file.get_tensor(name).to(master.device, copy=True)
                self.optimizer.state[master][kind] = value


# --- the run's folder: safetensors, JSON, PNG -----------------------------------------------------


def write_aside(path, write):
    """Write under another name, flush, rename: a reader finds the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class RunFolder:
    """What a run leaves behind. Only the first process writes, and a full disk is a warning."""

    def __init__(self, settings, optimizer):
        self.path = Path(settings.out)
        self.done = -1  # iterations; -1 is before the first evaluation
        self.metrics = ""  # metrics.jsonl so far
        if settings.resume:
            self.done, self.metrics = load_checkpoint(self.path, optimizer)
        versions = {}
        for name in ("torch", "diffusers", "rapidocr"):
            versions[name] = importlib.metadata.version(name)
        config = {
            "settings": dataclasses.asdict(settings),
            "files": file_digests(settings),
            "versions": versions,
        }
        text = json.dumps(config, indent=1)
        self.write("config.json", write_aside, lambda part: part.write_text(text))
        self.tensorboard = None
        if process_rank()[0] == 0:
            with contextlib.suppress(ImportError):  # a luxury, never needed
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.path, purge_step=self.done + 1)

    def write(self, name, write, *arguments):
        """Call write(path of `name`, *arguments); if that fails the run goes on with a warning."""
        if process_rank()[0] > 0:
            return
        try:
            write(self.path / name, *arguments)
        except (OSError, SafetensorError) as error:
            tqdm.write(
                f"warning: {name} was not written: {error}; "
                "what was there before stays, the run goes on"
            )

    def evaluations(self):
        """Return the lines of metrics.jsonl so far that have an evaluation."""
        lines = [json.loads(line) for line in self.metrics.splitlines()]
        return [line for line in lines if "eval_reward" in line]

    def log(self, metrics):
        self.metrics += json.dumps(metrics) + "\n"
        self.write("metrics.jsonl", write_aside, lambda part: part.write_text(self.metrics))
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, metrics["iteration"])


def checkpoints(folder):
    """Return {iterations done: path} of a run's checkpoints, the newest first.

    What is half-written has no such name.
    """
    paths = sorted(folder.glob("checkpoints/[0-9]*.safetensors"), reverse=True)
    return {int(path.stem): path for path in paths}


def save_checkpoint(folder, done, optimizer, metrics):
    """Save <folder>/<iterations done>.safetensors: masters, moments, and metrics.jsonl so far.

    Then delete all others but the one before. Later ones were damaged, or the run had been resumed
    from there.
    """
    folder.mkdir(exist_ok=True)
    state = optimizer.state()
    write_aside(folder / f"{done:06d}.safetensors", lambda part: stream(part, state, metrics))
    found = checkpoints(folder.parent)
    kept = [iterations for iterations in found if iterations <= done][:2]
    for iterations in found.keys() - kept:
        found[iterations].unlink()


def stream(path, tensors, metrics):
    """Write fp32 tensors as safetensors, one after the other, with the metrics in the header.

    safetensors' save_file would first copy all of them from the GPU: 27 GB for SD3.5 Medium. The
    format: the header's length in 8 bytes, the header in JSON, the tensors' bytes.
    """
    header = {"__metadata__": {"metrics": metrics}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().numpy())


def load_checkpoint(folder, optimizer):
    """Take up the newest checkpoint that loads; return (iterations done, metrics).

    They are (-1, "") where there is no checkpoint yet. One that does not load is named, and the one
    before is tried. Raises BadInput if none does.
    """
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


# --- several processes, started by torchrun: the first one writes ---------------------------------


def process_rank():
    """Return (this process's number, how many share the work); (0, 1) for one on its own."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value):
    """Return [value of process 0, of process 1, ...] in every process."""
    values = [value] * process_rank()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# --- the run --------------------------------------------------------------------------------------


def pick_prompts(prompts, settings, iteration):
    """Return the iteration's prompts. Every epoch deals all prompts in an order of its own, a
    function of (seed, epoch)."""
    first = (iteration - 1) * settings.prompts_per_iteration
    picked = []
    for place in range(first, first + settings.prompts_per_iteration):
        epoch, index = divmod(place, len(prompts))
        order = torch.randperm(len(prompts), generator=generator(settings.seed, "epoch", epoch))
        picked.append(prompts[order[index]])
    return picked


class StopSignal:
    """Ctrl-C and SIGTERM: in training the first lets the iteration finish and be saved.

    A second one, or one before training, ends the run at once, by KeyboardInterrupt(number).
    """

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self.training = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.number or not self.training:
            raise KeyboardInterrupt(number)
        self.number = number
        os.write(2, b"\nfinishing this iteration; once more ends it at once\n")


def train(settings):
    """Go from two prompt files to a trained model and a table of what it gained.

    Returns the exit status.
    """
    stop = StopSignal()
    device = "cpu"
    if settings.device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    train_prompts = load_prompts(settings.train_prompts, settings.task)
    test_prompts = load_prompts(settings.test_prompts, settings.task)
    if settings.task == "geneval":
        test_prompts = merge_repeated(test_prompts)
    note_strange_words(settings, train_prompts + test_prompts)
    check_model(settings)
    reward = make_reward(settings)  # before the big model: what is missing is said at once
    policy = load_policy(settings, device)
    out = Path(settings.out)
    lock = FileLock(out / "lock")
    try:
        if process_rank()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)  # it dies with the process
    except OSError as error:  # filelock's Timeout is one
        raise BadInput(
            f"--out {out}: {one_line(error)} (is another process at work there?)"
        ) from error
    try:
        return train_policy(policy, train_prompts, test_prompts, reward, settings, stop)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        remedy = "nothing is done yet: the same command starts again"
        if (out / "config.json").exists():
            remedy = f"--resume --out {out} goes on"
        raise RunStopped(f"interrupted; {remedy}", 128 + number) from error
    except torch.OutOfMemoryError as error:
        raise RunStopped(
            f"{one_line(error)}; --resume goes on from {out}/checkpoints; --optimizer-device cpu, "
            "--gradient-checkpointing or a smaller --batch-size takes less memory"
        ) from error
    except RunStopped as error:
        raise RunStopped(f"{error}; --resume goes on from {out}/checkpoints") from error
    finally:
        lock.release()


def train_policy(policy, train_prompts, test_prompts, reward, settings, stop):
    """Iterate until the last one or a signal, with evaluations and checkpoints on the way."""
    transformer = policy.transformer
    last = settings.iterations
    reference = None
    if settings.kl > 0 and last > 0:
        # Frozen for autograd; before a resume loads its checkpoint, so it is the starting model's.
        reference = copy.deepcopy(transformer).requires_grad_(False)
    parameters = transformer.parameters() if last > 0 or settings.resume else ()
    optimizer_device = "cpu" if settings.optimizer_device == "cpu" else None
    optimizer = MasterAdamW(parameters, settings.learning_rate, optimizer_device)
    run = RunFolder(settings, optimizer)
    print_plan(settings, optimizer)

    def test(name, iteration, prompts):
        columns, cells = evaluate(policy, prompts, reward, settings)
        run.write(f"test_{name}.png", save_sheet, cells)
        shown = "  ".join(f"{column} {value:.3f}" for column, value in columns.items())
        tqdm.write(f"iteration {iteration:4d}  {shown}")
        return columns

    if run.done < 0:
        columns = test("before", 0, test_prompts)
        run.write("maps_before.png", save_maps, policy, test_prompts[:4], settings)
        run.log({"iteration": 0, **columns})
        run.write("checkpoints", save_checkpoint, 0, optimizer, run.metrics)
    evaluations = run.evaluations()

    todo = range(max(run.done, 0) + 1, last + 1)
    title = f"{settings.method} {settings.task}"
    quiet = process_rank()[0] > 0
    bar = tqdm(todo, title, total=last, initial=todo.start - 1, disable=quiet)
    stop.training = True
    for iteration in bar:
        prompts = pick_prompts(train_prompts, settings, iteration)
        metrics = train_iteration(
            policy, reference, optimizer, prompts, reward, settings, iteration
        )
        if iteration % settings.eval_every == 0 or iteration == last:
            tested = test_prompts
            if iteration < last:
                tested = stratified_subset(test_prompts, settings.eval_prompts)
            metrics |= test("after", iteration, tested)
            evaluations.append(metrics)
            run.write("transformer", save_transformer, transformer)
        run.log(metrics)
        bar.set_postfix(
            reward=f"{metrics['reward']:.3f}", test=f"{evaluations[-1]['eval_reward']:.3f}"
        )
        stopped_by = max(gather(stop.number))
        if stopped_by or iteration % settings.save_every == 0 or iteration == last:
            run.write("checkpoints", save_checkpoint, iteration, optimizer, run.metrics)
        if stopped_by and iteration < last:
            bar.close()
            print(f"stopped after iteration {iteration}; go on with --resume --out {run.path}")
            return 128 + stopped_by
    stop.training = False
    run.write("maps_after.png", save_maps, policy, test_prompts[:4], settings)
    print_gain(evaluations[0], evaluations[-1], len(test_prompts), run.path)
    return 0


def print_plan(settings, optimizer):
    """Print what the run will do and take."""
    images = settings.prompts_per_iteration * settings.group_size
    parameters = sum(parameter.numel() for parameter in optimizer.parameters)
    if settings.iterations:
        print(
            f"{settings.iterations} iterations of {images} images (prompts "
            f"{settings.prompts_per_iteration} x group {settings.group_size}) and "
            f"{settings.optimizer_steps} optimizer steps; "
            f"{parameters / 1e6:.1f} million parameters train"
        )
        print(
            f"checkpoints of {12 * parameters / 1e9:.2f} GB, the last two kept, "
            f"every {settings.save_every} iterations in {settings.out}/checkpoints"
        )


def print_gain(before, after, count, folder):
    """Print the table of the first and the last evaluation, and where the rest is."""
    title = f"{count} test prompts"
    print(f"\n{title:18s}   before   after")
    for name in before:
        if name.startswith("eval_"):
            print(f"{name:18s}  {before[name]:7.3f} {after[name]:7.3f}")
    print(f"\npictures, metrics and the trained transformer are in {folder}")


def main():
    if dist.is_torchelastic_launched():
        dist.init_process_group()
        if process_rank()[0] > 0:  # the first process prints
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
    # transformers would warn that torchvision, unneeded here, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers gives this to the hub's library, which no longer wants it.
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")
    try:
        sys.exit(train(parse_settings()))
    except BadInput as error:
        print(f"star.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"star.py: stopped: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("star.py: stopped: interrupted before training", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
