"""What star.py claims, checked: the mathematics against independent formulae, then the program as a user runs it.

`python -m pytest` runs everything on a CPU in a few minutes, with nothing downloaded. Two commands are for by hand:

    python test_star.py cost [star.py's arguments]    seconds of star and flow-grpo, of a short and the full SDE window
    python test_star.py kill 100                      kill runs at random moments; resumed, they must end bitwise alike
"""

import copy
import dataclasses
import functools
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

import star

if sys.argv[1:2] != ["cost"]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are a CPU's: sums bit for bit, two processes, forks
ROOT = Path(star.__file__).parent
SIGMAS = [1.0, 0.9601293, 0.9133490, 0.8576923, 0.7903683, 0.7072785, 0.6021506, 0.4648760, 0.2780488, 0.0089286, 0.0]
STDS = [0.700000, 0.742964, 0.536152, 0.445897, 0.391794, 0.352797, 0.319070, 0.282007, 0.225360, 0.006278]
PROMPTS = [star.Prompt('a sign that says "CAT"'), star.Prompt('a wall that says "DOG"')]

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def fail(error):
    raise error

# --- 1. the policy ----------------------------------------------------------------------------------------------------

def test_import_needs_neither_diffusers_nor_transformers():
    code = "import star, sys; assert not {'diffusers', 'transformers', 'rapidocr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

def euler(steps=10):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler

def test_sigma_grid_and_std_table():
    assert euler().sigmas.tolist() == pytest.approx(SIGMAS, abs=1e-6)
    zero = torch.zeros(1, 1, 2, 2)
    stds = [star.sde_mean_std(zero, zero, *pair, SIGMAS[1], 0.7)[1] for pair in pairwise(SIGMAS)]
    assert stds == pytest.approx(STDS, abs=2e-6)

def test_without_noise_both_steps_are_the_euler_step_of_diffusers_bitwise():
    scheduler, latents, noise = euler(), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=99)
    sigmas = scheduler.sigmas.tolist()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = randn(2, 4, 8, 8, seed=i + 1)
        mean, std = star.sde_mean_std(latents, velocity, sigmas[i], sigmas[i + 1], sigmas[1], 0.0)
        churned = star.churn_step(latents, velocity, sigmas[i], sigmas[i + 1], 0.01 * (i == 9), noise)  # last: no noise
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        assert std == 0 and torch.equal(mean, latents) and torch.equal(churned, latents)
    assert not torch.equal(star.churn_step(latents, velocity, 0.8, 0.7, 0.01, noise), latents + (0.7 - 0.8) * velocity)
    for step, *bad in ((star.sde_mean_std, 0.3, 0.5, 0.9, 0.7), (star.churn_step, 0.5, 0.6, 0.01, noise),
                       (star.churn_step, 0.6, 0.5, -0.01, noise)):  # fmt: skip
        with pytest.raises(ValueError):
            step(latents, velocity, *bad)

def test_token_log_prob_is_the_gaussian_log_density_averaged_per_token():
    mean, std, x = randn(3, 16, 4, 6), 0.37, randn(3, 16, 4, 6, seed=1)
    reference = torch.distributions.Normal(mean, std).log_prob(x)
    patches = [reference[:, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]  # row-major
    log_prob = star.token_log_prob(x, mean, std)
    torch.testing.assert_close(log_prob, torch.stack([patch.mean((1, 2, 3)) for patch in patches], dim=1))
    torch.testing.assert_close(log_prob.mean(1), reference.mean((1, 2, 3)))  # Flow-GRPO's image-level value
    with pytest.raises(ValueError, match="std"):
        star.token_log_prob(x, mean, 0.0)

def test_marginal_of_a_gaussian_is_kept_as_steps_grow():
    """Data N(0, s^2): the exact velocity is linear in x, and the SDE must end with the data's spread, at any noise."""
    spread, noise, errors = 0.5, torch.Generator().manual_seed(0), []
    for steps in (10, 40, 160):
        sigmas = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, steps + 1).tolist()]
        x = torch.randn(200_000, generator=noise)
        for sigma, after in pairwise(sigmas):
            variance = ((1 - sigma) * spread) ** 2 + sigma**2
            velocity = (sigma - (1 - sigma) * spread**2) / variance * x  # E[n - x_0 | x_t = x]
            mean, std = star.sde_mean_std(x, velocity, sigma, after, sigmas[1], 0.7)
            x = mean + std * torch.randn(len(x), generator=noise)
        errors.append(abs(x.std().item() - spread))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01

def test_step_weights():
    full = star.step_weights(SIGMAS, 0.7, 9)
    assert [round(weight, 2) for weight in full] == [2.95, 2.14, 1.30, 0.89, 0.64, 0.45, 0.31, 0.20, 0.11]
    assert [round(weight, 2) for weight in star.step_weights(SIGMAS, 0.7, 4)] == [1.62, 1.18, 0.71, 0.49]
    velocity, norms = torch.zeros(1, 1, 2, 2, requires_grad=True), []
    for weight, pair in zip(full, pairwise(SIGMAS)):  # |d log p / d velocity|, one std away, is the same at every step
        mean, std = star.sde_mean_std(torch.zeros(1, 1, 2, 2), velocity, *pair, SIGMAS[1], 0.7)
        log_prob = star.token_log_prob(mean.detach() + std, mean, std)
        norms.append(weight * torch.autograd.grad(log_prob.sum(), velocity)[0].norm().item())
    assert sum(full) == pytest.approx(9) and norms == pytest.approx([norms[0]] * 9, rel=1e-4)

# --- 2. attention and the core of the prompt --------------------------------------------------------------------------

def sd3_transformer(**changes):
    """A small random SD3 transformer with SD3.5's parts: RMS-normed queries and keys, a dual-attention block."""
    from diffusers import SD3Transformer2DModel

    config = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
                  attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
                  pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")  # fmt: skip
    torch.manual_seed(0)
    return SD3Transformer2DModel(**config | changes).eval()

def sd3_forward(transformer, height=8, width=8):
    """Two images under guidance: four rows, the conditional half last, of seven text tokens."""
    inputs = [tensor.to(transformer.dtype) for tensor in (randn(4, 4, height, width), randn(4, 7, 12), randn(4, 10))]
    with torch.no_grad():
        return transformer(*inputs, timestep=torch.full((4,), 700.0), return_dict=False)[0]

CORE_MASK = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)

@pytest.mark.parametrize("height, width, qk_norm", [(8, 8, "rms_norm"), (4, 8, "rms_norm"), (8, 8, None)])
def test_captured_attention_is_the_explicit_softmax_of_the_conditional_half(height, width, qk_norm):
    transformer, states = sd3_transformer(qk_norm=qk_norm), {}
    for block in (0, 2):
        keep = lambda _, arguments, given, block=block: states.update({block: given})
        transformer.transformer_blocks[block].attn.register_forward_pre_hook(keep, with_kwargs=True)
    with star.capture_attention(transformer, CORE_MASK, (0, 2)) as captured:
        sd3_forward(transformer, height, width)
    assert len(captured) == 2
    norm = lambda module, x: x if module is None else module(x)
    for block, attention in zip((0, 2), captured):
        attn, image, text = transformer.transformer_blocks[block].attn, *list(states[block].values())[:2]
        for b in range(2):
            total = torch.zeros(height * width // 4)
            for head in (slice(0, 8), slice(8, 16)):
                query = norm(attn.norm_q, attn.to_q(image[2 + b])[:, head])
                key = torch.cat([norm(attn.norm_k, attn.to_k(image[2 + b])[:, head]),
                                 norm(attn.norm_added_k, attn.add_k_proj(text[2 + b])[:, head])])  # fmt: skip
                weights = torch.softmax(query @ key.T / math.sqrt(8), dim=-1)
                total += weights[:, len(query) :][:, CORE_MASK[b]].sum(1) / 2
            torch.testing.assert_close(attention[b], total.detach(), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("hops", [0, 1, 2])
def test_a_hop_is_the_images_own_softmax_times_the_attention(hops):
    transformer, states = sd3_transformer(), {}
    attn = transformer.transformer_blocks[1].attn
    attn.register_forward_pre_hook(lambda _, arguments, given: states.update(given), with_kwargs=True)
    sd3_forward(transformer)
    image, text = states["hidden_states"], states["encoder_hidden_states"]
    found = star.core_attention(attn, image, text, CORE_MASK, hops)
    expected = star.core_attention(attn, image, text, CORE_MASK)  # [B, P]
    for _ in range(hops):
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            query = attn.norm_q(attn.to_q(image[2:])[..., head])
            key = attn.norm_k(attn.to_k(image[2:])[..., head])
            weights = torch.softmax(query @ key.mT / math.sqrt(8), dim=-1)  # over image tokens alone
            heads.append((weights @ expected[..., None])[..., 0])
        expected = torch.stack(heads).mean(0).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_leaves_the_output_bitwise_alone_and_cleans_up(dtype):
    transformer = sd3_transformer().to(dtype)
    plain = sd3_forward(transformer)
    with star.capture_attention(transformer, CORE_MASK, (0, 1, 2)) as captured:
        assert torch.equal(sd3_forward(transformer), plain)
    assert len(captured) == 3 and all(0 < s.min() and s.max() < 1 for s in captured)
    with pytest.raises(RuntimeError, match="midway"), star.capture_attention(transformer, CORE_MASK, (1,)) as more:
        raise RuntimeError("midway")
    assert torch.equal(sd3_forward(transformer), plain) and len(captured) == 3 and not more

def words_of(prompt, spans):
    assert spans == sorted(spans) and all(b <= c for (_, b), (c, _) in pairwise(spans))
    return [prompt[a:b] for a, b in spans]

def test_core_spans_of_ocr_and_pickscore_prompts():
    cases = {
        'a sign that says "CAT"': ["CAT"],
        'say "cat" to the cat, then "dog"': ["cat"],  # a repeated word: only the quoted one; the first pair of quotes
        'a café with "Crème brûlée" outside': ["Crème brûlée"],
        'curly “no” and "yes it\'s" straight': ["yes it's"],
    }
    for prompt, expected in cases.items():
        assert words_of(prompt, star.core_spans(prompt, "ocr")) == expected
    for prompt in ("no quotes", 'one " only', 'empty "" target', 'blank "  " target', "“curly”"):
        with pytest.raises(ValueError, match="double quotes"):
            star.core_spans(prompt, "ocr")
    prompt = "A portrait of the old sailor's dog, in oil"
    assert words_of(prompt, star.core_spans(prompt, "pickscore")) == ["portrait", "old", "sailor's", "dog", "oil"]
    assert star.core_spans("of the", "pickscore")  # nothing but function words: they stand in, never empty

def test_core_spans_of_geneval_prompts():
    clause = lambda name, count=1, **more: {"class": name, "count": count, **more}
    for prompt, include, expected in [
        ("a photo of three buses", [clause("bus", 3)], "three buses"),
        ("a photo of a red apple", [clause("apple", color="red")], "red apple"),
        ("a photo of a dog right of a teddy bear", [clause("teddy bear"), clause("dog", position=["right of", 0])],
         "dog right of teddy bear"),
        ("a photo of an orange orange", [clause("orange", color="orange")], "orange orange"),
        ("a photo of 12 apples", [clause("apple", 12)], "12 apples"),
        ("a photo of a cart", [clause("car")], "photo cart"),  # not a whole word: all content words stand in
    ]:  # fmt: skip
        assert " ".join(words_of(prompt, star.core_spans(prompt, "geneval", {"include": include}))) == expected
    for task, message in (("geneval", "metadata"), ("aesthetics", "unknown task")):
        with pytest.raises(ValueError, match=message):
            star.core_spans("a photo of a dog", task)

def clip_tokenizer():
    """CLIP's tokenizer class over single characters, with nothing to download."""
    import transformers

    characters = [chr(code) for code in range(33, 127) if not 65 <= code <= 90]
    pieces = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=24)

def t5_tokenizer():
    """A T5 tokenizer of a hand-made vocabulary: whole words, and pieces for the rest."""
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁sign", "▁that", "▁says", "▁", '"', "C", "A", "T", "CA", "▁on", "▁it"]
    return transformers.T5TokenizerFast(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)

def test_core_mask_covers_clip_and_t5_and_falls_back_when_truncated():
    policy, clip, t5 = star.Policy.__new__(star.Policy), clip_tokenizer(), t5_tokenizer()
    policy.pipe = SimpleNamespace(tokenizer=clip, tokenizer_max_length=24, text_encoder_3=object(), tokenizer_3=t5)
    policy.settings, policy.device = SimpleNamespace(task="ocr", t5_length=12), "cpu"
    (mask,), found = policy.core_mask(PROMPTS[:1]), []
    for tokenizer, part in ((clip, mask[:24]), (t5, mask[24:])):  # no special token, no padding
        ids = tokenizer(PROMPTS[0].text)["input_ids"]
        found += tokenizer.convert_ids_to_tokens([ids[i] for i in part.nonzero().flatten()])
    assert len(mask) == 24 + 12 and found == ["c", "a", "t</w>", "CA", "T"]
    with pytest.warns(UserWarning, match="cut off before their core"):
        mask = policy.core_mask([star.Prompt(f'{"a very long sentence " * 3} that only in the end says "CAT"')])
    assert mask.any() and not mask.all()
    policy.pipe.text_encoder_3 = None  # zeros stand in the text sequence where T5 would
    assert not policy.core_mask(PROMPTS[:1])[:, 24:].any()

# --- 3. and 4. allocation maps, advantages ----------------------------------------------------------------------------

def test_allocation_map_has_mean_1_and_follows_the_attention():
    attention, corner = rand(3, 2, 36) ** 4, torch.zeros(1, 36)
    for strength in (0.0, 0.25, 1.0):
        allocation = star.allocation_map(attention, strength)
        torch.testing.assert_close(allocation.mean(-1), torch.ones(3, 2))
        torch.testing.assert_close(allocation, (1 - strength) + strength * attention / attention.mean(-1, keepdim=True))
    corner[0, [0, 1, 6, 7]] = 0.2
    allocation = star.allocation_map(corner, 1.0)
    assert allocation[0, [0, 1, 6, 7]].tolist() == pytest.approx([9.0] * 4) and allocation.sum() == pytest.approx(36)
    assert star.map_norm(allocation).item() == pytest.approx(3)  # the root of 4 x 9^2 / 36
    assert torch.equal(star.allocation_map(torch.zeros(2, 9), 1.0), torch.ones(2, 9))  # no attention: uniform
    assert star.allocation_map(torch.tensor([[math.nan, 1.0]]), 1.0).isnan().all()  # shown, not hidden
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength"):
            star.allocation_map(attention, strength)

def test_hindsight_is_the_mean_from_each_step_on():
    attention = torch.tensor([[[1.0, 4.0]], [[2.0, 2.0]], [[6.0, 0.0]]])  # three steps of one image
    assert star.hindsight(attention).tolist() == [[[3.0, 2.0]], [[4.0, 1.0]], [[6.0, 0.0]]]

def test_group_advantages():
    rewards = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.8])
    expected = (rewards - torch.tensor([0.5] * 3 + [0.4] * 3)) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(star.group_advantages(rewards, 3), expected)
    swapped = star.group_advantages(rewards[[2, 0, 1, 3, 4, 5]], 3)  # permuting a group permutes its advantages
    torch.testing.assert_close(swapped, expected[[2, 0, 1, 3, 4, 5]])
    shifted = star.group_advantages(rewards + torch.tensor([0.0] * 3 + [7.0] * 3), 3)  # groups meet only in the std
    torch.testing.assert_close(shifted[:3] / shifted[0], expected[:3] / expected[0])
    assert star.group_advantages(torch.eye(64)[0], 64)[0] == 5  # clamped
    with pytest.raises(ValueError, match="groups"):
        star.group_advantages(rewards, 4)

def test_equal_or_missing_rewards_give_exactly_nothing():
    assert not star.group_advantages(torch.full((24,), 2 / 3), 12).any()
    mixed = torch.cat([torch.full((7,), 0.1), torch.linspace(0, 1, 7)])
    assert not star.group_advantages(mixed, 7)[:7].any()
    nan = math.nan
    rest = star.group_advantages(torch.tensor([0.1, nan, 0.9, 0.3, 0.2, 0.2, nan, 0.2, nan, nan, 0.7, nan]), 4)
    std = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.2, 0.2, 0.7], dtype=torch.float64).std(correction=0).item() + 1e-4
    by_hand = [(value - 1.3 / 3) / std for value in (0.1, 0.9, 0.3)]
    assert rest.tolist() == pytest.approx([by_hand[0], 0, *by_hand[1:], *[0] * 8], abs=1e-6)
    assert not rest[4:].any()  # equal rewards, a group of one
    assert not star.group_advantages(torch.tensor([nan] * 4 + [0.5] * 4), 4).any()

# --- 5. objectives ----------------------------------------------------------------------------------------------------

def value_and_gradient(objective, log_prob, *arguments):
    log_prob = log_prob.clone().requires_grad_()
    loss, stats = objective(log_prob, *arguments)
    loss.backward()
    return loss.detach(), log_prob.grad, stats

@pytest.mark.parametrize("ratio", ["region", "image"])
def test_on_policy_gradient_is_the_allocated_advantage(ratio):
    old, advantages = randn(4, 36), torch.tensor([1.0, -2.0, 0.5, 0.0])
    allocation = star.allocation_map(rand(4, 36), 0.8)
    _, gradient, stats = value_and_gradient(star.star_objective, old, old, advantages, allocation, 1e-4, ratio)
    torch.testing.assert_close(gradient, -allocation * advantages[:, None] / (4 * 36))
    assert stats["ratio"] == 1 and stats["ratio_deviation"] == stats["clip_high"] == stats["clip_low"] == 0
    _, uniform, _ = value_and_gradient(star.star_objective, old, old, advantages, torch.ones(4, 36), 1e-4, ratio)
    _, scalar, _ = value_and_gradient(star.flow_grpo_objective, old, old, advantages, 1e-4)
    torch.testing.assert_close(uniform, scalar, rtol=1e-6, atol=0)  # M = 1: Flow-GRPO's

@pytest.mark.parametrize("spread, clip_range", [(1e-3, 1e-4), (0.5, 0.1), (0.5, 1e3)])
def test_image_ratio_with_a_uniform_map_is_flow_grpo_off_policy_too(spread, clip_range):
    old = randn(16, 36)
    log_prob, advantages = old + spread * randn(16, 36, seed=1), randn(16, seed=2)
    theirs = value_and_gradient(star.flow_grpo_objective, log_prob, old, advantages, clip_range)
    ours = value_and_gradient(star.star_objective, log_prob, old, advantages, torch.ones(16, 36), clip_range, "image")
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close([ours[2][n] for n in theirs[2]], [*theirs[2].values()], rtol=1e-5, atol=1e-8)
    clipped = (theirs[1] == 0).all(1)
    assert torch.equal(clipped, (ours[1] == 0).all(1)) and (clipped.any() and not clipped.all() or clip_range == 1e3)

def test_image_ratios_gradient_is_the_map_times_the_images_ratio():
    """sum_p M_p A r grad l_p / P where the image is not clipped, and 0 where it is."""
    old, advantages = randn(3, 16), torch.tensor([1.0, -1.0, 2.0])
    log_prob = old + 0.3 * randn(3, 16, seed=1) + torch.tensor([[0.0], [0.0], [1.0]])  # the third: far up, and A > 0
    allocation = star.allocation_map(rand(3, 16), 1.0)
    _, gradient, stats = value_and_gradient(star.star_objective, log_prob, old, advantages, allocation, 0.5, "image")
    ratio = (log_prob - old).mean(1, keepdim=True).exp()
    assert 0.5 < ratio[:2].min() and ratio[:2].max() < 1.5 < ratio[2]
    torch.testing.assert_close(gradient[:2], (-allocation * advantages[:, None] * ratio / (3 * 16))[:2])
    assert not gradient[2].any() and stats["clip_high"].item() == pytest.approx(1 / 3)
    torch.testing.assert_close(stats["ratio"], ratio.mean())
    with pytest.raises(ValueError, match="region or image"):
        star.star_objective(log_prob, old, advantages, allocation, 0.5, "token")

def test_region_ratio_against_a_loop():
    log_prob, old = 1e-3 * randn(3, 16), torch.zeros(3, 16)
    allocation, advantages = star.allocation_map(randn(3, 16, seed=1).abs(), 1.0), torch.tensor([1.0, -1.0, 2.0])
    eps, total, high = 1e-4 * math.sqrt(16), 0.0, 0
    for b in range(3):
        for p in range(16):
            ratio, share = math.exp(log_prob[b, p]), (allocation[b, p] * advantages[b]).item()
            total -= min(ratio * share, min(max(ratio, 1 - eps), 1 + eps) * share) / (3 * 16)
            high += ratio > 1 + eps
    given = log_prob, old, advantages, allocation, 1e-4, "region"
    loss, gradient, stats = value_and_gradient(star.star_objective, *given)
    assert loss.item() == pytest.approx(total, rel=1e-5) and stats["clip_high"].item() == pytest.approx(high / 48)
    far = log_prob * advantages[:, None].sign() > math.log1p(eps) + 1e-6  # where the advantage asks to go: no further
    assert far.any() and torch.equal(gradient == 0, far)
    assert stats["allocation_max"].item() == pytest.approx(allocation.amax(1).mean().item())
    top = allocation.sort(1).values[:, -2:].sum(1) / 16  # a tenth of 16 regions is two
    assert stats["allocation_top10"].item() == pytest.approx(top.mean().item())
    uniform = star.star_objective(log_prob, old, advantages, torch.ones(3, 16), 1e-4, "region")[1]
    assert uniform["allocation_entropy"].item() == pytest.approx(1) and stats["allocation_entropy"] < 1

def test_kl_is_flow_grpos_and_pulls_back():
    sigma, after, latents = SIGMAS[3], SIGMAS[4], randn(2, 4, 8, 8)
    velocity = randn(2, 4, 8, 8, seed=1).requires_grad_()
    mean, std = star.sde_mean_std(latents, velocity, sigma, after, SIGMAS[1], 0.7)
    reference, _ = star.sde_mean_std(latents, velocity.detach() + 0.1, sigma, after, SIGMAS[1], 0.7)
    kl = star.kl_to_reference(mean, reference, std, after - sigma)
    std_dev = 0.7 * math.sqrt(sigma / (1 - sigma))
    torch.testing.assert_close(kl, ((mean - reference) ** 2 / (2 * std_dev**2)).mean())
    kl.backward()
    gain = (1 + std_dev**2 * (1 - sigma) / (2 * sigma)) * (after - sigma)
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, -0.1 * gain**2 / std_dev**2 / velocity.numel()))

def test_equal_step_weights_take_out_the_maps_own_norm_image_by_image():
    """The gradient with respect to the velocity, of independent tokens, has the map's root mean square as its norm."""
    settings, velocity = star.parse_settings(["--model", "tiny"]), torch.zeros(2, 16, 12, 12, requires_grad=True)
    maps = star.allocation_map(torch.stack([torch.ones(36), rand(36) ** 8]), 1.0)[None]  # a flat one, a peaked one
    mean, std = star.sde_mean_std(torch.zeros(2, 16, 12, 12), velocity, 0.8, 0.7, 0.96, 0.7)
    log_prob, norms = star.token_log_prob(mean.detach() + std, mean, std), []  # every number one std away
    given = dict(old=log_prob[None].detach(), advantages=torch.ones(2), allocation=maps, each=torch.arange(2))
    for weighting in ("none", "equal"):
        chosen = dataclasses.replace(settings, step_weights=weighting)
        loss, _ = star.objective(log_prob, SimpleNamespace(**given), torch.tensor([0, 0]), chosen)
        norms += torch.autograd.grad(loss, velocity, retain_graph=True)[0].flatten(1).norm(dim=1).tolist()
    assert maps.max() > 3 and norms[2:] == pytest.approx([norms[0]] * 2, rel=1e-5)
    assert norms[1] / norms[0] == pytest.approx(star.map_norm(maps)[0, 1].item(), rel=1e-5)

# --- FDFO -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("churn", [0.01, 0.5])
def test_a_gaussians_marginal_is_kept_by_the_churn_step(churn):
    """Data N(0, s^2): x at sigma has variance (1 - sigma)^2 s^2 + sigma^2 and the exact flow only rescales it."""
    variance = lambda sigma: (1 - sigma) ** 2 * 0.25 + sigma**2
    latents = star.churn_step(randn(50_000), torch.zeros(50_000), 1.0, 1.0, churn, randn(50_000, seed=1))
    assert latents.std().item() == pytest.approx(1, rel=0.01)
    for i, (sigma, after) in enumerate(pairwise(SIGMAS)):
        low = after / (1 + churn * (1 - after))  # where the step goes before it is noised back
        velocity = latents * (math.sqrt(variance(low) / variance(sigma)) - 1) / (low - sigma)
        latents = star.churn_step(latents, velocity, sigma, after, churn, randn(50_000, seed=2 + i))
        assert latents.std().item() == pytest.approx(math.sqrt(variance(after)), rel=0.015)

def test_fdfo_direction_is_the_same_pull_in_both_branches_and_nothing_for_a_tie():
    final, rewards = randn(6, 4, 4, 4), torch.tensor([0.9, 0.4, 0.2, 0.2, 0.0, 1.0])
    difference, direction = star.fdfo_direction(final, rewards)
    torch.testing.assert_close(difference, torch.tensor([0.25, -0.25, 0.0, 0.0, -0.5, 0.5]))
    delta = (final[0] - final[1]) / 2
    torch.testing.assert_close(direction[0], delta / (delta.square().mean() + 1e-6))
    pull = difference[:, None, None, None] * direction
    assert torch.equal(pull[0::2], pull[1::2]) and not pull[2:4].any() and pull[0].any()
    assert not star.fdfo_direction(torch.ones(2, 4, 4, 4), rewards[:2])[1].any()  # two images alike: no way to go
    lacking, _ = star.fdfo_direction(final, torch.tensor([0.9, 0.4, math.nan, 0.2, math.nan, math.nan]))
    torch.testing.assert_close(lacking, torch.tensor([0.25, -0.25, 0, 0, 0, 0]))  # a pair that lacks a reward is a tie
    for latents, bad in [(final[:5], rewards[:5]), (final, rewards[:4])]:
        with pytest.raises(ValueError, match="pairs"):
            star.fdfo_direction(latents, bad)

def test_on_a_linear_reward_fdfos_mean_direction_is_the_gradient():
    gradient = randn(4, 4, 4)
    for size in (0.01, 1.0):  # whatever the size of the perturbation; <delta^2> is an estimate, which costs 64 / 66
        final = torch.ones(4, 4, 4) + size * randn(40_000, 4, 4, 4, seed=1)
        difference, direction = star.fdfo_direction(final, (final * gradient).sum((1, 2, 3)))
        mean = (difference[:, None, None, None] * direction).mean(0)
        assert ((mean - gradient).norm() / gradient.norm()).item() < 0.1

def test_fdfo_objective_starts_at_ratio_1_with_the_exact_gradient():
    old, direction, difference = randn(3, 4, 4, 4), randn(3, 4, 4, 4, seed=1), torch.tensor([0.5, -0.25, 0.0])
    velocity = old.clone().requires_grad_()
    loss, stats = star.fdfo_objective(velocity, old, difference, direction, 0.03)
    assert stats["ratio"] == 1 and stats["ratio_deviation"] == 0
    (gradient,) = torch.autograd.grad(loss * 3, velocity)  # the loss is a mean over the batch
    torch.testing.assert_close(gradient, difference[:, None, None, None] * (2 / 64) * direction)
    velocity = old + 0.1 * randn(3, 4, 4, 4, seed=2)  # and elsewhere it is the definition: v* = v_old - d
    expected = direction.square().mean((1, 2, 3)) - (velocity - (old - direction)).square().mean((1, 2, 3))
    _, stats = star.fdfo_objective(velocity, old, difference, direction, 0.03)
    torch.testing.assert_close(stats["ratio"], expected.exp().mean())

@pytest.mark.parametrize("difference", [0.5, -0.5])
def test_fdfo_objective_is_least_where_the_ratio_is_1_plus_or_minus_eps(difference):
    old, direction, best, found = randn(1, 4, 4, 4), randn(1, 4, 4, 4, seed=1), 1 + math.copysign(0.03, difference), []
    way = 1 - math.sqrt(1 - math.log(best) / direction.square().mean().item())  # at v - c d, ln rho = (2c - c^2) <d^2>
    for c in (way, way + 0.003, way - 0.003, 0.0):
        velocity = (old - c * direction).requires_grad_()
        loss, stats = star.fdfo_objective(velocity, old, torch.tensor([difference]), direction, 0.03)
        found.append((loss.item(), stats["ratio"].item(), torch.autograd.grad(loss, velocity)[0].abs().max()))
    assert min(found) == found[0] and found[0][1] == pytest.approx(best, rel=1e-5) and found[0][2] < 1e-4

def test_the_two_of_a_pair_share_their_noise_but_for_a_little():
    noise = lambda prompt, copy, churn=0.01: star.sample_noise((0, 1), prompt, copy, 6, (16, 12, 12), churn)
    correlation = lambda a, b: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    assert correlation(noise(0, 0)[0], noise(0, 1)[0]) == pytest.approx(1 / 1.01**2, abs=0.003)
    assert abs(correlation(noise(0, 1)[0], noise(0, 2)[0])) < 0.08  # of different pairs
    assert abs(correlation(noise(0, 0)[0], noise(1, 0)[0])) < 0.08  # of different prompts
    assert abs(correlation(noise(0, 0)[1:], noise(0, 1)[1:])) < 0.04  # every later step: fresh for each branch
    assert torch.equal(noise(0, 0), noise(0, 0)) and torch.equal(noise(0, 0)[1:], noise(0, 0, churn=None)[1:])

# --- the loop ---------------------------------------------------------------------------------------------------------

def save_sd3(path):
    """A whole Stable Diffusion 3 in miniature with random weights: two CLIPs, T5, a VAE of 2 x 2 pixels a latent."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, **special,
    )  # fmt: skip
    t5_config = transformers.T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=1.5305, shift_factor=0.0609,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(in_channels=16, out_channels=16, joint_attention_dim=32, pooled_projection_dim=32),
        text_encoder=transformers.CLIPTextModelWithProjection(clip), tokenizer=tokenizer, vae=vae, scheduler=euler(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip), tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5_config), tokenizer_3=t5,
    ).save_pretrained(path)  # fmt: skip

def brightness(images, prompts):
    """A reward of one's own, of the form that star.make_reward returns; it differs from image to image."""
    value = images.float().mean((1, 2, 3)) / 255
    return torch.stack([value, value], dim=1)

def small(folder, arguments=""):
    """star.py's arguments for a miniature run (six iterations take two seconds), with the miniature made if need be."""
    if not (folder / "sd3").exists():
        save_sd3(folder / "sd3")
        (folder / "train.txt").write_text("".join(f'a sign that says "{word}"\n' for word in ("CAT", "DOG", "A", "IT")))
        (folder / "test.txt").write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))
    return [
        *f"--model {folder}/sd3 --train-prompts {folder}/train.txt --test-prompts {folder}/test.txt".split(),
        *"--resolution 16 --t5-length 0 --guidance 1 --dtype fp32 --attention-blocks 1 --sampling-steps 4".split(),
        *"--prompts-per-iteration 2 --group-size 4 --batch-size 2 --eval-steps 3 --eval-every 2 --iterations 6".split(),
        *([] if "fdfo" in arguments else ["--kl", "0", "--sde-window", "3"]), "--save-every", "2", *arguments.split(),
    ]  # fmt: skip

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")

@pytest.fixture(autouse=True)
def calm():
    """One thread, so that nothing depends on how many cores there are; a run's signal handlers go with it."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)

@pytest.fixture
def mini(base):
    """mini(arguments): the miniature, (policy, settings)."""

    def load(arguments=""):
        settings = star.parse_settings([*small(base, arguments), "--out", str(base / "none")])
        return star.load_policy(settings, "cpu"), settings

    return load

def iterate(policy, settings, reference=None, rate=1e-3, prompts=PROMPTS, reward=brightness, device=None):
    optimizer = star.MasterAdamW(policy.transformer.parameters(), rate, device)
    return star.train_iteration(policy, reference, optimizer, prompts, reward, settings, 1)

def give_scores(monkeypatch, rewards):
    """The images' rewards are these, row by row, whatever the pictures."""
    scores = torch.stack([rewards, rewards], dim=1)
    monkeypatch.setattr(star, "reward_all", lambda samples, *_: ([rollout for rollout, _ in samples], {}, scores))

def test_after_the_sde_window_the_steps_are_eulers_and_only_the_windows_are_kept(mini, monkeypatch):
    policy, settings = mini("--sampling-steps 10 --sde-window 4 --optimizer-steps 1 --batch-size 8")
    monkeypatch.setattr(policy, "decode", lambda latents: latents)
    ((rollout, final),) = star.sample(policy, PROMPTS, 4, settings, (0, 1), policy.sigmas(10), 4, 4)
    tokens = policy.latent_shape[1] * policy.latent_shape[2] // 4
    assert rollout.latents.shape == (5, 8, *policy.latent_shape)
    assert rollout.old.shape == rollout.attention.shape == (4, 8, tokens)
    scheduler, latents = euler(), rollout.latents[-1]
    for sigma, timestep in zip(SIGMAS[4:], scheduler.timesteps[4:]):
        with torch.no_grad():
            velocity = star.predict_velocity(policy.transformer, latents, torch.full((8,), sigma), rollout.text(), 1.0)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, final, rtol=1e-4, atol=1e-4)
    mean = star.act(policy.transformer, rollout, torch.full((8,), 3), SIGMAS, settings)[1]
    assert (rollout.latents[4] - mean).std().item() == pytest.approx(STDS[3], rel=0.1)  # noisy

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", ["1", "4.5"])
@pytest.mark.parametrize("method", ["star", "flow-grpo", "fdfo"])
def test_ratio_is_exactly_1_on_policy(mini, dtype, guidance, method):
    policy, settings = mini(f"--method {method} --dtype {dtype} --guidance {guidance}")
    before = [p.detach().clone() for p in policy.transformer.parameters()]
    metrics = iterate(policy, settings)
    assert metrics["ratio_deviation"] == 0 and metrics["gradient_norm"] > 0 and metrics["skipped"] == 0
    assert metrics["ratio"] != 1  # after the first optimizer step
    changed = [not torch.equal(a, b) for a, b in zip(before, policy.transformer.parameters())]
    assert sum(changed) > 0.8 * len(changed)  # all of the model trains: no LoRA
    count = sum(p.numel() for p in before)
    assert metrics["gradient_rms"] == pytest.approx(metrics["gradient_norm"] / math.sqrt(count))

@pytest.mark.parametrize("method", ["star", "flow-grpo", "fdfo"])
def test_other_kernels_in_the_update_do_not_pass_for_a_ratio(mini, monkeypatch, method):
    """A model that rounds otherwise where gradients are wanted, as other attention kernels do: the gap is logged, but
    the ratio is exactly 1 in the first optimizer step, and in the second too as long as no weight has changed."""
    (policy, settings), exact = mini(f"--method {method}"), star.predict_velocity
    rounded = lambda *arguments: exact(*arguments) * (1.001 if torch.is_grad_enabled() else 1)
    monkeypatch.setattr(star, "predict_velocity", rounded)
    start = copy.deepcopy(policy.transformer)
    moved = iterate(policy, settings)
    assert moved["ratio_deviation"] > 0 and moved["ratio"] != 1  # the second step's is the update's, as it should be
    policy.transformer, norms = start, []
    monkeypatch.setattr(star.MasterAdamW, "step", lambda self: norms.append(1.0) or 1.0)  # a step to nowhere
    still = iterate(policy, settings)
    assert len(norms) == settings.optimizer_steps and still["ratio_deviation"] == moved["ratio_deviation"]
    assert still["ratio"] == 1 and still["approximate_kl"] == still["clip_high"] == still["clip_low"] == 0

@pytest.mark.parametrize("arguments", ["", "--ratio image", "--method flow-grpo", "--method fdfo"])
def test_the_gradient_does_not_depend_on_the_batch_size(mini, monkeypatch, arguments):
    """4 prompts x 16 images: the first optimizer step's gradient at batches of 32, 16, 8 and 4."""
    policy, settings = mini(f"{arguments} --group-size 16 --prompts-per-iteration 4 --batch-size 32")
    give_scores(monkeypatch, rand(64))
    start, step, seen, found = policy.transformer, star.MasterAdamW.step, [], []
    flat = lambda optimizer: torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None])
    monkeypatch.setattr(star.MasterAdamW, "step", lambda self: (seen.append(flat(self)), step(self))[1])
    for batch in (32, 16, 8, 4):
        policy.transformer = copy.deepcopy(start).double()  # so that rounding does not hide a difference
        seen.clear()
        iterate(policy, dataclasses.replace(settings, batch_size=batch), prompts=[*PROMPTS, *PROMPTS[::-1]])
        found.append(seen[0])
    assert max(((gradient - found[0]).norm() / found[0].norm()).item() for gradient in found[1:]) < 1e-5

def test_images_are_shuffled_by_the_iterations_key_and_their_noise_is_their_own(mini):
    policy, settings = mini()
    order = lambda key, **changes: torch.cat(star.microbatches(32, dataclasses.replace(settings, **changes), key))
    assert sorted(order((0, 1)).tolist()) == list(range(32)) == order(None).tolist() != order((0, 1)).tolist()
    assert torch.equal(order((0, 1)), order((0, 1), batch_size=16)) and not torch.equal(order((0, 1)), order((0, 2)))
    pairs = order((0, 1), method="fdfo").view(-1, 2)
    assert torch.equal(pairs[:, 0] + 1, pairs[:, 1]) and not (pairs[:, 0] % 2).any()
    keys = [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0), (1, 1, 0, 0)]
    assert len({star.generator(*key).initial_seed() for key in keys}) == 5
    judge = lambda **changes: star.evaluate(policy, PROMPTS, brightness, dataclasses.replace(settings, **changes))[0]
    assert judge() == judge(seed=7, sde_window=1, method="flow-grpo") and judge() != judge(eval_steps=4)

def test_fdfo_deals_every_image_every_step_once_and_all_images_into_every_optimizer_step():
    settings = star.parse_settings(["--model", "tiny", "--method", "fdfo"])

    def dealt(batch, key=(0, 1)):  # of every optimizer step: [(image, denoising step), ...]
        rollouts = [SimpleNamespace(rows=rows, advantages=torch.ones(batch)) for rows in torch.arange(32).split(batch)]
        pairs = lambda work: sorted(pair for r, steps in work for pair in zip(r.rows.tolist(), steps.tolist()))
        return [pairs(work) for work in star.deal(rollouts, settings, key)[0]]

    rounds = dealt(8)
    assert sorted(sum(rounds, [])) == [(row, step) for row in range(32) for step in range(10)]
    assert all({row for row, _ in work} == set(range(32)) and len({step for _, step in work}) == 10 for work in rounds)
    assert rounds == dealt(2) == dealt(32) != dealt(8, key=(0, 2))  # image by image, whatever the batch

def test_whole_trajectories_are_dealt_and_microbatches_without_advantage_are_left_out():
    settings = star.parse_settings(["--model", "tiny"])
    rollouts = [SimpleNamespace(rows=torch.arange(4) + 4 * n, advantages=torch.ones(4) * (n != 1)) for n in range(4)]
    rounds, skipped = star.deal(rollouts, settings, (0, 1))
    order = [[(int(r.rows[0]), set(steps.tolist())) for r, steps in work] for work in rounds]
    whole = lambda *firsts: [(first, {step}) for first in firsts for step in range(settings.sde_window)]
    assert order == [whole(0), whole(8, 12)] and skipped == 1
    assert star.deal(rollouts, dataclasses.replace(settings, kl=0.01), (0, 1))[1] == 0  # the KL pulls on all

def test_kl_is_zero_at_the_reference_and_holds_the_model_back(mini, monkeypatch):
    policy, settings = mini("--kl 0.04 --optimizer-steps 1")
    give_scores(monkeypatch, torch.full((8,), 0.5))
    reference = copy.deepcopy(policy.transformer).requires_grad_(False)
    metrics = iterate(policy, settings, reference)
    assert metrics["kl"] == 0 and metrics["skipped"] == 0 and metrics["gradient_norm"] == 0
    with torch.no_grad():
        policy.transformer.proj_out.weight.add_(0.01)
    before, after = (iterate(policy, settings, reference, rate=1e-4) for _ in range(2))
    assert before["kl"] > after["kl"] > 0 and before["gradient_norm"] > 0

@pytest.mark.parametrize("arguments", ["", "--ratio image", "--method flow-grpo", "--method fdfo --churn 0.3"])
def test_every_method_learns_to_make_images_brighter_or_darker(mini, arguments):
    """A random model, four iterations on the images' brightness, and on its opposite, judged on the same noise: the two
    come apart by more than half the spread between images."""
    ends = []
    for sign in (1, -1):
        policy, settings = mini(f"{arguments} --group-size 8 --batch-size 8 --clip-range 0.5")
        optimizer = star.MasterAdamW(policy.transformer.parameters(), 1e-2)
        reward = lambda images, prompts: sign * brightness(images, prompts)
        for number in range(1, 5):
            metrics = star.train_iteration(policy, None, optimizer, PROMPTS, reward, settings, number)
        _, cells = star.evaluate(policy, PROMPTS * 8, brightness, settings)
        ends.append(torch.stack([image.float().mean() for image, _ in cells]))
    assert ends[0].mean() > ends[1].mean() + 0.5 * ends[1].std()
    assert ("allocation_entropy" in metrics) == (settings.method == "star")

# --- the optimizer ----------------------------------------------------------------------------------------------------

def test_the_optimizer_starts_clean_and_adds_bf16_gradients_up_in_fp32():
    """A thousand gradients of 2^-9 after one of 1: bf16 would lose every one of them."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 5.0)  # of an earlier training
    optimizer = star.MasterAdamW([weight], 1e-3)
    for gradient in [1.0] + [2.0**-9] * 1000:
        (weight * gradient).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [1 + 1000 / 512] * 4
    assert optimizer.step() == pytest.approx(2 * (1 + 1000 / 512)) and weight.grad is None

def test_the_usual_epsilon_freezes_a_model_of_tiny_gradients_and_ours_does_not():
    """Ten steps on gradients whose RMS is 1e-9, as a full-parameter model has them with mean log-densities: torch's own
    epsilon of 1e-8 leaves less than a tenth of the way that AdamW is meant to go."""
    ways = []
    for changes in ({}, {"eps": 1e-8}):
        weight = torch.nn.Parameter(torch.zeros(1000))
        optimizer = star.MasterAdamW([weight], 1e-3)
        optimizer.optimizer.param_groups[0].update(changes)
        for step in range(10):
            (weight * 1e-9 * (1 + 0.1 * randn(1000, seed=step))).sum().backward()
            optimizer.step()
        ways.append(-weight.mean().item() / (10 * 1e-3))
    assert ways[0] == pytest.approx(1, abs=0.05) and ways[1] < 0.1

def test_bf16_training_with_master_weights_tracks_fp32():
    """Fifty AdamW steps at lr 1e-6 of a transformer: in bf16 with fp32 masters it follows an fp32 run (measured: 2.1 %
    of the way off), in bf16 alone it all but stands still (99.8 % off; 0.5 % of the weights have moved)."""
    base = sd3_transformer(num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64).bfloat16()
    models = {"fp32": copy.deepcopy(base).float(), "master": copy.deepcopy(base), "naive": copy.deepcopy(base)}
    optimizers = {name: star.MasterAdamW(models[name].parameters(), 1e-6) for name in ("fp32", "master")}
    optimizers["naive"] = torch.optim.AdamW(models["naive"].parameters(), lr=1e-6, weight_decay=1e-4, eps=1e-15)
    for step in range(50):
        noise, target = randn(2, 4, 4, 8, 8, seed=step)
        features = randn(4, 6, 12, seed=1000 + step), randn(4, 10, seed=2000 + step)
        for name, model in models.items():
            text = tuple(tensor.to(model.dtype) for tensor in features)
            velocity = star.predict_velocity(model, noise, torch.full((4,), 0.5), text, 1.0)
            (velocity - target).square().mean().backward()
            optimizers[name].step()
        optimizers["naive"].zero_grad()
    flat = lambda tensors: torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    start, masters = flat(base.parameters()), flat(optimizers["master"].masters)
    way = flat(optimizers["fp32"].masters) - start
    error = lambda end: ((end - start - way).norm() / way.norm()).item()
    assert error(masters) < 0.05 and error(flat(models["naive"].parameters())) > 0.95
    assert torch.equal(flat(models["master"].parameters()), masters.bfloat16().float())

# --- rewards ----------------------------------------------------------------------------------------------------------

def test_edit_distance_and_ocr_score():
    pairs = (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))
    assert [star.edit_distance(*pair) for pair in pairs] == [3, 3, 0, 2]
    assert star.ocr_score("the CAT sat", "cat") == (1, False)  # Flow-GRPO's reward: a substring will do; exact: not
    assert star.ocr_score("C A T", "cat") == (1, True)  # white space and case do not count
    assert star.ocr_score("ＣＡＴ", "CAT") == (1, True)  # full-width letters, as the engine now and then reads
    assert star.ocr_score("CAR", "CAT") == (pytest.approx(2 / 3), False)
    assert star.ocr_score("", "CAT") == (0, False) and star.ocr_score("completely different", "CAT") == (0, False)

def test_the_ocr_engine_reads_a_sign_and_a_second_word_is_not_exact():
    images = []
    for text in ("CAT", "CAT\nDOG", "SUN", ""):
        picture = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(picture).text((20, 20), text, fill="black", font=ImageFont.load_default(size=48))
        images.append(torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(160, 160, 3).permute(2, 0, 1))
    scores = star.make_reward(star.Settings(task="ocr"), "cpu")(torch.stack(images), PROMPTS[:1] * 4)
    assert scores.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]

def box(left, top, size=10):
    return (left, top, left + size, top + size)

def geneval(tag, *include, **more):
    clauses = [dict(zip(("class", "count"), clause[:2]), **clause[2]) for clause in include]
    return {"tag": tag, "include": clauses, **more}

DOG, TWO_DOGS = ("dog", 1, {}), ("dog", 2, {})
RED_DOG, BLUE_CAT = ("dog", 1, {"color": "red"}), ("cat", 1, {"color": "blue"})
TWO_RED_DOGS = ("dog", 2, {"color": "red"})
CAT_LEFT = ("cat", 1, {"position": ["left of", 0]})  # ... of the dog
COUNT_TWO = geneval("counting", TWO_DOGS, exclude=[{"class": "dog", "count": 3}])

@pytest.mark.parametrize(
    "metadata, found, reward, correct",
    [  # found: (class, left, colour, score)
        (geneval("single_object", DOG), [("dog", 0, None, 0.3)], 0, False),  # not surer than 0.3
        (geneval("single_object", DOG), [("dog", 0, None, 0.5)] * 2, 0, True),  # one too many: the benchmark allows it
        (COUNT_TWO, [("dog", 0, None, 0.95)] * 3, 0.5, False),  # excluded by the benchmark
        (COUNT_TWO, [("dog", 0, None, 0.95)] * 5, 0, False),  # never below 0
        (COUNT_TWO, [("dog", 0, None, 0.95), ("dog", 9, None, 0.9)], 0.5, False),  # counting wants more than 0.9
        (geneval("counting", ("dog", 16, {})), [("dog", 0, None, 0.95)] * 20, 1, True),  # 16 objects at most
        (geneval("colors", RED_DOG), [("dog", 0, "blue", 0.6), ("dog", 9, "red", 0.5)], 1, False),  # the surest is blue
        (geneval("colors", TWO_RED_DOGS), [("dog", 0, "red", 0.5), ("dog", 0, "blue", 0.5)], 0.5, False),
        (geneval("color_attr", RED_DOG, BLUE_CAT), [("dog", 0, "red", 0.5), ("cat", 0, "blue", 0.5)], 1, True),
        (geneval("position", DOG, CAT_LEFT), [("dog", 40, None, 0.5), ("cat", 0, None, 0.5)], 1, True),
        (geneval("position", DOG, CAT_LEFT), [("dog", 0, None, 0.5), ("cat", 40, None, 0.5)], 0.5, False),
        (geneval("position", DOG, CAT_LEFT), [("cat", 0, None, 0.5)], 0, False),  # of no dog
        (geneval("position", DOG, CAT_LEFT), [("dog", 40, None, 0.5)], 0.5, False),
    ],
)  # fmt: skip
def test_geneval_reward_and_verdict(metadata, found, reward, correct):
    detections = {}
    for name, left, colour, score in found:
        detections.setdefault(name, []).append((box(left, 0), score, colour))
    assert star.geneval_scores(metadata, detections) == (pytest.approx(reward), correct)

def test_geneval_relations():
    left, above, both = {"left of"}, {"above"}, {"left of", "above"}
    # two boxes of 10 px: 2 px of the offset are taken off, and the rest must be more than half the distance
    for x, y, words in [(40, 0, left), (0, 40, above), (40, 40, both), (0, 0, set()), (-40, 0, {"right of"}),
                        (0, -40, {"below"}), (4, 0, set()), (4.1, 0, left), (30, 40, both), (20, 40, above)]:
        assert star.relations(box(50, 50), box(50 + x, 50 + y)) == words

def small_reward(task, folder=None):
    """The embedded model's reward, or that of another folder."""
    where = ["--reward-model", str(folder)] if folder else []
    return star.make_reward(star.parse_settings(["--model", "tiny", "--task", task, *where]), "cpu")

def test_reward_models_that_are_not_what_they_should_be(tmp_path):
    """With a weight left out, cut off, of other classes, another model, missing: one line each."""
    copied = shutil.copytree(star.TINY / "rewards", tmp_path / "copy")
    weights, config = copied / "clip/model.safetensors", copied / "detector/config.json"
    settings, content = json.loads(config.read_text()), weights.read_bytes()
    part = {name: tensor for name, tensor in load_file(weights).items() if name != "visual_projection.weight"}
    relabel = lambda *names: config.write_text(json.dumps(settings | {"id2label": dict(enumerate(names))}))
    relabel("tvmonitor", *["wolf"] * 7)
    assert small_reward("geneval", copied).names == {0: "tv"} | dict.fromkeys(range(1, 8))  # by GenEval's names
    for damage, message in (
        (lambda: save_file(part, weights, {"format": "pt"}), "it is no CLIPModel: 1 weights are missing"),
        (lambda: os.truncate(weights, 1000), "clip cannot be loaded"),
        (lambda: weights.write_bytes(content) and relabel(*["wolf"] * 8), "knows none of"),
        (lambda: shutil.rmtree(copied / "detector"), "detector cannot be loaded.*hf download"),
    ):
        damage()
        with pytest.raises(star.BadInput, match=f"^[^\n]*{message}[^\n]*$"):
            small_reward("geneval", copied)
    with pytest.raises(star.BadInput, match="^the reward model .*detector cannot be loaded: [^\n]*$"):
        small_reward("pickscore", star.TINY / "rewards/detector")

def test_a_missing_reward_costs_its_image_and_many_stop_the_run(capsys):
    """One raises, one is NaN: 2 of 10 are left out with the cause; a third is more than a fifth, and ends the run."""
    why, settings = {1: KeyError("no box"), 7: None}, star.parse_settings(["--model", "tiny"])
    samples = [(SimpleNamespace(rows=part), part) for part in torch.arange(10).split(5)]

    def reward(images, prompts):
        row = int(images[0])
        return fail(why[row]) if why.get(row) else torch.tensor([[math.nan if row in why else row / 10, 1.0]])

    rollouts, shown, scores = star.reward_all(iter(samples), PROMPTS, 5, reward, settings)
    assert len(rollouts) == 2 and len(shown) == 10 and scores[9, 0].item() == pytest.approx(0.9)
    assert scores[:, 0].isnan().nonzero().flatten().tolist() == [1, 7]
    assert "failed for 2 of 10 images: KeyError: 'no box'" in capsys.readouterr().out
    why[8] = OSError("engine gone")
    with pytest.raises(star.RunStopped, match="failed for 3 of 10 images: OSError: engine gone"):
        star.reward_all(iter(samples), PROMPTS, 5, reward, settings)

@pytest.mark.parametrize("task, scores, tags, columns", [
    ("ocr", [[1.0, 1.0], [0.5, 0.0], [math.nan, math.nan]], "---", {"reward": 0.75, "exact": 0.5}),
    ("geneval", [[0.5, right] for right in (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0)], ["counting", "counting", "colors"],
     {"reward": 0.5, "score": (0.125 + 0.75) / 2, "counting": 0.125, "colors": 0.75}),  # the mean over tags
])  # fmt: skip
def test_evaluations_columns_by_task(mini, monkeypatch, task, scores, tags, columns):
    """A missing reward is left out; GenEval's score is a mean over tags, each image of four counting in its own."""
    policy, settings = mini()
    monkeypatch.setattr(star, "reward_all", lambda *_: ([], dict.fromkeys(range(len(scores))), torch.tensor(scores)))
    prompts = [star.Prompt("", {"tag": tag}) for tag in tags]
    numbers, _ = star.evaluate(policy, prompts, None, dataclasses.replace(settings, task=task))
    assert numbers == {f"eval_{name}": value for name, value in columns.items()}

# --- prompts, settings, README ----------------------------------------------------------------------------------------

def test_shipped_prompts_load_and_train_and_test_are_disjoint():
    folders = {str(path.parent.relative_to(ROOT / "prompts")): path.parent for path in ROOT.glob("prompts/**/train.*")}
    assert folders.keys() == {top + task for top in ("", "tiny/") for task in ("ocr", "geneval", "pickscore")}
    for folder in folders.values():
        suffix = "jsonl" if folder.name == "geneval" else "txt"
        splits = [star.load_prompts(folder / f"{split}.{suffix}", folder.name) for split in ("train", "test")]
        train, test = ({prompt.text for prompt in prompts} for prompts in splits)
        assert not train & test
        if folder.name == "ocr":
            words = lambda texts: {star.normalise_text(text[slice(*star.quoted_span(text))]) for text in texts}
            assert not words(train) & words(test)
    subprocess.run([sys.executable, ROOT / "prompts/make_prompts.py", "--check"], check=True)  # writes what is shipped

DOG_LINE = {"tag": "position", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}

@pytest.mark.parametrize(
    "content, task, message",
    [
        (None, "ocr", "No such file"),
        (b"", "ocr", "holds no prompts"),
        (b'a "CAT"\n\xff\xfe\n', "ocr", "utf-8"),
        (b'a "CAT"\nno quotes\n', "ocr", "line 2.*double quotes"),
        *((json.dumps(DOG_LINE | bad).encode(), "geneval", f"line 1: .*{message}") for bad, message in [
            ({"include": []}, ""),
            ({"include": [{"class": "remote", "count": 1}]}, "'remote'"),
            ({"include": [{"class": "dog", "count": 1, "color": "grey"}]}, "'grey'"),
            ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "'near'"),
            ({"include": [{"class": "dog", "count": 1, "position": ["above", 2]}]}, ""),
            ({"exclude": [{"class": "wolf", "count": 1}]}, "'wolf'"),
        ]),
    ],
)  # fmt: skip
def test_bad_prompt_files(tmp_path, content, task, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(star.BadInput, match=f"prompts.txt.*{message}") as error:
        star.load_prompts(path, task)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task poetry", "--task: invalid choice: 'poetry'"),
        ("--sde-window 0", "--sde-window 0: must lie in [1, "),
        ("--sde-window 10", "--sde-window 10: must lie in [1, 9]"),
        ("--ratio other", "--ratio: invalid choice: 'other'"),
        ("--method flow-grpo --ratio image", "--ratio belongs to --method "),
        ("--method fdfo --ratio region", "--ratio belongs to --method "),
        ("--method fdfo --sde-window 4", "--sde-window belongs to --method "),
        ("--churn 0.01", "--churn belongs to --method "),
        ("--method fdfo --group-size 3 --batch-size 8", "must be even"),
        ("--method fdfo --optimizer-steps 11", "--optimizer-steps may be at most --sampling-steps"),
        ("--batch-size 48", "do not split into 2 shares"),
        ("--no-such-flag 3", "unrecognized arguments: --no-such-flag 3"),
        ("--attention-blocks 99", "--attention-blocks 99: there are 0.."),
        ("--resolution 4096", "--resolution 4096: the model knows up to"),
        ("--model no/such/folder", "--model no/such/folder: "),
        ("--train-prompts missing.txt", "prompt file missing.txt: "),
        ("--reward-model clip", "--reward-model: the ocr reward takes none"),
        ("--task pickscore --model sd3 --reward-model {used}", "cannot be loaded"),
        ("--out /dev/null/run", "--out /dev/null/run: "),
        ("--out {used}", "holds another run"),
        ("--resume --out {used}", "--resume: there is no run in "),
        ("--resume --out no/such/run", "--resume: there is no run in no/such/run"),
    ],
)
def test_bad_settings_end_with_one_line_and_status_2_before_any_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(star, "train_policy", lambda *_: pytest.fail("work had begun"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: fail(OSError("offline")))
    (tmp_path / "used").mkdir()
    (tmp_path / "used/config.json").write_text("{}")
    arguments = arguments.format(used=tmp_path / "used").split()
    arguments += [] if "--model" in arguments or "--resume" in arguments else ["--model", "tiny"]
    arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["star.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        star.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("star.py: error: ") and message in last

def test_the_commands_help_names_every_setting():
    told = subprocess.run([sys.executable, "star.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert {star.flag(name) for name in star.FIELDS} <= set(re.findall(r"--[a-z0-9-]+", told.stdout))

def test_every_setting_is_read():
    source = (ROOT / "star.py").read_text()
    properties = source.split("    @property", 1)[1].split("\nFIELDS", 1)[0]
    for name in star.FIELDS:
        read = re.search(rf"\bsettings\.{name}\b", source) or re.search(rf"self\.{name}\b", properties)
        assert read, f"{star.flag(name)} is never read"

def test_the_readme_names_only_flags_and_functions_that_exist_and_its_reward_works(mini):
    readme = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", readme))
    torchruns = {"--nproc-per-node", "--shutdown-timeout"}
    assert flags and flags <= {star.flag(name) for name in star.FIELDS} | {"--help"} | torchruns
    section = lambda title: readme.split(f"\n## {title}")[1].split("\n## ")[0]
    steps = re.findall(r"^\d\. .*?  +([a-z_]+(?:, [a-z_]+)*)$", section("The method in five steps"), re.MULTILINE)
    names = set(", ".join(steps).split(", "))  # each step names its functions
    for title in ("The method in five steps", "FDFO", "Change it"):
        names |= set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", section(title)))
    assert len(steps) == 5 and all(callable(getattr(star, name, None)) for name in names), names
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    printed = {"torch": torch}
    exec(block, printed)
    metrics = iterate(*mini(), reward=printed[re.search(r"^def (\w+)\(images, prompts\)", block, re.MULTILINE)[1]])
    assert metrics["gradient_norm"] > 0 and metrics["dropped"] == 0

# --- the program ------------------------------------------------------------------------------------------------------

@pytest.fixture
def short(base, tmp_path, monkeypatch):
    """short(arguments, name): a miniature run in the folder `name`, for brightness or `reward`: (status, folder)."""
    monkeypatch.setattr(star.os, "cpu_count", lambda: 1)  # rewards one after another

    def run(arguments="", name="run", reward=brightness):
        monkeypatch.setattr(star, "make_reward", lambda *_: reward)
        given = arguments.split() if "--resume" in arguments else small(base, arguments)
        return star.train(star.parse_settings([*given, "--out", str(tmp_path / name)])), tmp_path / name

    return run

def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def digest(path):
    """Of the tensors of a safetensors file, not of its header."""
    content = path.read_bytes()
    return sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()

def outcome(out):
    """All of a run that must be equal bit for bit: metrics (not the clock's), last checkpoint, trained transformer."""
    lines = [{k: v for k, v in line.items() if not k.startswith(("seconds", "peak"))} for line in metrics_of(out)]
    newest = next(iter(star.checkpoints(out).values()))
    return lines, newest.name, digest(newest), digest(out / "transformer/diffusion_pytorch_model.safetensors")

def faulty(faults):
    """brightness, but at its n-th call (two test prompts, then eight images an iteration) faults[n]() speaks first."""
    calls = iter(range(1, 10**9))
    return lambda images, prompts: (faults.get(next(calls), int)(), brightness(images, prompts))[1]

@pytest.mark.parametrize("task", ["ocr", "geneval", "pickscore"])
def test_the_embedded_model_trains_end_to_end(tmp_path, capsys, task):
    """As a newcomer starts it, but with few prompts (geneval: one of each tag), one of which it has never drawn."""
    (source,), prompts = ROOT.glob(f"prompts/tiny/{task}/test.*"), tmp_path / "prompts"
    lines, horse = source.read_text().splitlines()[:2], 'a horse that says "CAT"'
    if task == "geneval":
        lines = [re.search(rf'.*"tag": "{tag}".*', source.read_text())[0] for tag in star.GENEVAL_TAGS]
        horse = '{"tag": "counting", "include": [{"class": "horse", "count": 1}], "prompt": "a photo of a horse"}'
    prompts.write_text("\n".join([*lines, horse]))
    settings = star.parse_settings([
        *f"--model tiny --task {task} --iterations 2 --prompts-per-iteration 2 --group-size 8 --batch-size 8".split(),
        *f"--eval-every 1 --test-prompts {prompts} --out {tmp_path}/run".split(),
    ])  # fmt: skip
    assert star.train(settings) == 0
    printed, out, readme = capsys.readouterr().out, tmp_path / "run", (ROOT / "README.md").read_text()
    assert "was not trained on these words: horse\n" in printed and "before   after" in printed and str(out) in printed
    assert json.loads((out / "config.json").read_text())["settings"] == dataclasses.asdict(settings)
    lines = metrics_of(out)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(line["ratio_deviation"] == line["dropped"] == 0 < line["seconds_update"] for line in lines[1:])
    tags = [f"eval_{tag}" for tag in star.GENEVAL_TAGS if task == "geneval"]
    columns = ["eval_reward", "eval_exact" if task == "ocr" else "eval_score", *tags]
    assert [name for name in lines[2] if name.startswith("eval")] == columns
    assert task != "pickscore" or lines[2]["eval_score"] == pytest.approx(26 * lines[2]["eval_reward"]) != 0
    explained = lambda column: f"`{column}`" in readme or f"`_{column.rsplit('_', 1)[1]}`" in readme or column in tags
    assert all(explained(column) for column in lines[1]), "a logged column is not explained in the README"
    for name in ("test_before", "test_after", "maps_before", "maps_after"):
        picture = Image.open(out / f"{name}.png")
        assert picture.width > 100 and len(picture.convert("L").getcolors(256)) > 20, f"{name} shows nothing"

def test_the_embedded_model_opens_offline_with_plain_diffusers_and_samples_alike(monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.setattr(socket.socket, "connect", lambda *_: fail(OSError("offline")))
    settings = star.parse_settings(["--model", "tiny"])
    none = {name: None for name in ("text_encoder_3", "tokenizer_3")}
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/tiny", **none)
    policy = star.load_policy(settings, "cpu")
    noise, (text, pooled) = randn(2, *policy.latent_shape), policy.encode([prompt.text for prompt in PROMPTS])
    how = dict(latents=noise, num_inference_steps=10, guidance_scale=1.0, output_type="latent")
    how |= {side: policy.latent_shape[1] * pipe.vae_scale_factor for side in ("height", "width")}
    theirs = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, **how).images
    given = policy.transformer, (text, pooled), None, noise[:, None], policy.sigmas(10), settings, 0, None
    with torch.no_grad():
        torch.testing.assert_close(star.denoise(*given)[0][-1], theirs, rtol=1e-4, atol=1e-4)
    drawn = pipe('a sign that says "CAT"', num_inference_steps=2, guidance_scale=1.0).images[0]  # by its own defaults
    assert drawn.size == (64, 64) and len(drawn.getcolors(4096)) > 100

def test_a_missing_or_damaged_file_of_the_embedded_model_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Whichever file: gone, cut in half, one byte of it changed."""
    settings, model = star.parse_settings(["--model", "tiny", "--out", str(tmp_path / "run")]), tmp_path / "tiny"
    shutil.copytree(star.TINY, model)
    monkeypatch.setattr(star, "TINY", model)
    monkeypatch.setattr(star, "make_reward", lambda *_: pytest.fail("nothing was noticed"))
    (model / "report.json").unlink()
    files = [path for path in model.rglob("*") if path.suffix in (".json", ".safetensors")]
    for path in files:
        content, half = path.read_bytes(), path.stat().st_size // 2
        changed = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        for damage in (path.unlink, lambda: path.write_bytes(content[:half]), lambda: path.write_bytes(changed)):
            damage()
            with pytest.raises(star.BadInput, match=f"^--model tiny: .*{path.name} is .*git checkout assets/tiny"):
                star.train(settings)
        path.write_bytes(content)
    star.check_embedded("ocr", PROMPTS)
    shutil.rmtree(model)
    with pytest.raises(star.BadInput, match="SHA256SUMS is missing .*git checkout"):
        star.train(settings)
    assert len(files) > 25 and not (tmp_path / "run").exists()

def recipe():
    """assets/make_tiny.py, whose renderer is the truth."""
    sys.path.append(str(ROOT / "assets"))
    import make_tiny

    make_tiny.RNG = random.Random("test")
    torch.manual_seed(0)
    return make_tiny

def test_the_small_reward_models_agree_with_the_renderer():
    """On fifty scenes (colours: eighty), as the recipe's own report card, which has 0.99, 1.00 and 0.98 on 300."""
    tiny, found = recipe(), {}
    rewards = {task: small_reward(task) for task in ("geneval", "pickscore")}
    for judge in (tiny.judge_detector, tiny.judge_colour, tiny.judge_preference):
        found |= {name: facts["right"] for name, facts in judge(star.TINY, rewards, 50)}
    verdict, drawn, colour, preference = found.values()
    assert min(verdict, drawn) >= 0.94 and colour >= 0.97 and preference >= 0.94, found

def test_the_recipe_writes_the_shipped_prompts_and_makes_a_whole_model_at_a_hundredth(tmp_path, monkeypatch):
    tiny = recipe()
    for task, parts in tiny.make_prompts().items():
        assert [tiny.read_prompts(task, part) for part in ("train", "test")] == [*map(list, parts)], task
    command = [sys.executable, ROOT / "assets/make_tiny.py", "--scale", "0.01", "--out", tmp_path / "tiny"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(star, "TINY", tmp_path / "tiny")
    star.check_embedded("ocr", PROMPTS)
    card = json.loads((tmp_path / "tiny/report.json").read_text())
    assert {"base, ocr", "base, geneval", "base, pickscore", "preference"} <= card.keys() and card["MB"]["all"] < 24
    lists = lambda folder: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert lists(tmp_path / "tiny") == lists(ROOT / "assets/tiny")

def test_a_trained_transformer_is_scored_as_training_scored_it(base, short, tmp_path):
    _, out = short("--iterations 2")
    for number, path in enumerate((out, out / "transformer")):
        assert short(f"--transformer {path} --iterations 0", f"score-{number}")[0] == 0
        (line,) = metrics_of(tmp_path / f"score-{number}")
        assert line["eval_reward"] == metrics_of(out)[-1]["eval_reward"] != metrics_of(out)[0]["eval_reward"]
    sd3_transformer().save_pretrained(out / "transformer")
    with pytest.raises(star.BadInput, match="--transformer.*size mismatch"):
        short(f"--transformer {out} --iterations 0", "x")

def test_pickled_weights_are_never_opened_and_the_hubs_refusal_is_one_line(base, tmp_path, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    shutil.copytree(small(base)[1], tmp_path / "sd3")
    weights = tmp_path / "sd3/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(star.BadInput, match="safetensors"):
        star.load_policy(star.parse_settings([*small(base), "--model", str(tmp_path / "sd3")]), "cpu")
    refused = lambda *_, **__: fail(OSError("you must be authenticated\nand more lines"))
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refused)
    with pytest.raises(star.BadInput, match=f"^--model {star.SD35}: .*authenticated .*accept its licence[^\n]*$"):
        star.load_policy(star.parse_settings(["--model", star.SD35]), "cpu")

# --- a run that cannot be lost: resume, faults, several processes -----------------------------------------------------

SD35_LIKE = "--dtype bf16 --guidance 4.5 --t5-length 16 --kl 0.04 --optimizer-device cpu --gradient-checkpointing"

@pytest.mark.parametrize("arguments", ["", SD35_LIKE, "--method flow-grpo", "--method fdfo --dtype bf16"])
def test_a_stopped_and_resumed_run_is_bitwise_the_run_that_never_stopped(short, capsys, arguments):
    """SIGTERM in the third of six iterations: it is finished, saved, and the way to go on is said."""
    status, straight = short(arguments, "straight")
    assert status == 0 and [line["iteration"] for line in metrics_of(straight)] == list(range(7))
    assert all(line["ratio_deviation"] == 0 and line["gradient_norm"] > 0 for line in metrics_of(straight)[1:])
    status, out = short(arguments, "run", faulty({23: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    assert status == 128 + signal.SIGTERM and f"go on with --resume --out {out}" in capsys.readouterr().out
    assert list(star.checkpoints(out)) == [3, 2]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "rew')  # torn by a power cut
    assert short("--resume")[0] == 0 and outcome(out) == outcome(straight)  # with the run's own settings
    assert capsys.readouterr().out.count("before   after") == 1

@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_runs_killed_at_random_moments_end_bitwise_as_the_run_that_was_not(tmp_path):
    """Ten SIGKILLs at random moments, at least one each in sampling, update and saving."""
    command = [sys.executable, __file__, "kill", "10", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["kills"] >= 10 and all(report[moment] > 0 for moment in MOMENTS[1:])

def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(short, tmp_path, capsys):
    """Cut short, empty, of another model, without its record: the run goes on from the second iteration to the same
    end. Without any it starts at the first; with none that loads it does not start."""
    straight, newest = outcome(short("--iterations 4")[1]), "checkpoints/000004.safetensors"
    other = {"master.0": torch.zeros(3, 7)}
    cut = lambda length: lambda path: os.truncate(path, length)
    replaced = lambda path: save_file(other, path), lambda path: save_file(load_file(path), path)
    for number, damage in enumerate((cut(1000), cut(0), *replaced)):
        shutil.copytree(tmp_path / "run", tmp_path / f"torn-{number}")
        damage(tmp_path / f"torn-{number}" / newest)
        assert outcome(short("--resume", f"torn-{number}")[1]) == straight
        printed = capsys.readouterr().out
        assert f"{newest} does not load: " in printed and "000002.safetensors: 2 iterations are done" in printed
    for path in star.checkpoints(tmp_path / "run").values():
        os.truncate(path, 100)
    with pytest.raises(star.BadInput, match="no checkpoint in .* loads"):
        short("--resume")
    shutil.rmtree(tmp_path / "run/checkpoints")  # killed before the first one stood
    assert outcome(short("--resume")[1]) == straight

def test_what_may_differ_on_resume_and_which_run_it_takes(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(star.BadInput, match="no run with a checkpoint under runs/"):
        star.parse_settings(["--resume"])
    for name in ("b", "a"):
        short("--iterations 2", f"runs/{name}")
    assert star.parse_settings(["--resume"]).out == "runs/a" and star.parse_settings(["--resume"]).sampling_steps == 4
    with pytest.raises(star.BadInput) as error:
        short("--resume --seed 1 --learning-rate 1e-3 --iterations 9", "runs/a")
    assert "--seed, --learning-rate may not change" in str(error.value)
    _, out = short("--resume --iterations 3 --batch-size 4 --eval-every 3 --save-every 1", "runs/a")
    assert [line["iteration"] for line in metrics_of(out)] == [0, 1, 2, 3] and list(star.checkpoints(out)) == [3, 2]

def test_a_gradient_that_is_not_finite_is_no_step(short, monkeypatch):
    """NaN in the third iteration's first gradient: no weight moves. In both of the fourth's: the run stops."""
    step, calls = star.MasterAdamW.step, iter(range(10**9))

    def spoilt(self):
        if next(calls) in (4, 6, 7):
            self.parameters[0].grad.fill_(math.nan)
        before = [master.clone() for master in self.masters]
        norm = step(self)
        assert math.isfinite(norm) != all(torch.equal(a, b) for a, b in zip(before, self.masters))
        return norm

    monkeypatch.setattr(star.MasterAdamW, "step", spoilt)
    with pytest.raises(star.RunStopped, match="no gradient was finite.*/run/checkpoints"):
        short("--eval-every 9")
    assert next(calls) == 8

def test_running_out_of_gpu_memory_ends_with_what_to_change(base, short, tmp_path, monkeypatch, capsys):
    """In the third iteration. What was saved is there, and goes on with a batch that fits."""
    whole, error = star.train_iteration, torch.OutOfMemoryError("CUDA out of memory\nmore")
    with monkeypatch.context() as context:
        context.setattr(star, "train_iteration", lambda *given: fail(error) if given[-1] == 3 else whole(*given))
        context.setattr(star, "make_reward", lambda *_: brightness)
        context.setattr(sys, "argv", ["star.py", *small(base), "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stop:
            star.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("star.py: stopped: OutOfMemoryError: CUDA out of memory more; ")
    assert "run/checkpoints" in line and "--resume" in line and "--batch-size" in line
    assert len(metrics_of(short("--resume --batch-size 1")[1])) == 7

@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_a_full_disk_costs_a_checkpoint_but_not_the_run(short, monkeypatch, capsys):
    """A limit on the size of files stands for it: the system itself refuses, in the middle of a write. The older
    checkpoints stay until a new one stands."""
    import resource

    free, save, seen = resource.getrlimit(resource.RLIMIT_FSIZE), star.save_checkpoint, []

    def full_at_4(folder, done, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if done == 4 else free[0], free[1]))
        try:
            save(folder, done, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
            seen.append(list(star.checkpoints(folder.parent)))

    monkeypatch.setattr(star, "save_checkpoint", full_at_4)
    status, out = short()
    assert status == 0 and "warning: checkpoints was not written: " in capsys.readouterr().out
    assert seen == [[0], [2, 0], [2, 0], [6, 2]] and not list(out.glob("**/*.part"))

def test_a_second_process_on_the_same_folder_is_refused_and_no_pickle_is_written_or_read(short):
    _, out = short("--iterations 1")
    with FileLock(out / "lock"), pytest.raises(star.BadInput, match="is another process at work there"):
        short("--resume --iterations 2")
    assert short("--resume --iterations 2")[0] == 0
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert suffixes == {".json", ".jsonl", ".png", ".safetensors", ""}  # "": the lock
    source = (ROOT / "star.py").read_text()
    for word in ("pickle", "torch.save", "torch.load", "weights_only", "remote_code", "eval(", "exec("):
        assert not re.search(rf"(?<![\w.]){re.escape(word)}", source), word

def process(fate, *arguments):
    """One of torchrun's processes; with the fate "die" the second kills itself in the third iteration."""
    whole, die = star.train_iteration, (fate, os.environ["RANK"]) == ("die", "1")
    star.make_reward = lambda *_: brightness
    star.train_iteration = lambda *given: os.kill(os.getpid(), 9) if die and given[-1] == 3 else whole(*given)
    sys.argv = ["star.py", *arguments]
    star.main()

@pytest.mark.parametrize("method", ["star", "fdfo"])
def test_two_processes_do_what_one_does_and_die_together(base, short, tmp_path, method):
    """The second of two processes dies in the third iteration, and the first with it; resumed, they end where a single
    one does, but for the order in which the gradient is added up."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split(), __file__, "process"]
    run = lambda *given: subprocess.run([*command, *given], capture_output=True, text=True)
    arguments, two = f"--method {method} --iterations 3 --save-every 1 --eval-every 3", tmp_path / "two"
    given, (_, one) = [*small(base, arguments), "--out", str(two)], short(arguments, "one")
    if method == "star":
        assert run("die", *given).returncode != 0 and list(star.checkpoints(two)) == [2, 1]
        given = ["--resume", "--out", str(two)]
    live, ours = run("live", *given), metrics_of(one)
    assert live.returncode == 0 and live.stdout.count("before   after") == 1, live.stderr
    theirs = metrics_of(two)
    assert (ours[0]["eval_reward"], ours[1]["reward"]) == (theirs[0]["eval_reward"], theirs[1]["reward"])
    for line, other in zip(ours[1:], theirs[1:], strict=True):
        assert line.keys() == other.keys() and other["ratio_deviation"] == 0
        assert other["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-3)
    state = lambda out, done: load_file(star.checkpoints(out)[done]).items()
    masters = lambda *given: torch.cat([tensor.flatten() for name, tensor in state(*given) if "master" in name])
    start, end, other = masters(one, 2), masters(one, 3), masters(two, 3)
    assert 0 < ((other - end).norm() / (end - start).norm()).item() < 1e-3

# --- the cost of STAR, measured: python test_star.py cost -------------------------------------------------------------

SD35_MEDIUM = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
    attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
SD35_VAE = dict(
    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip

class RandomPolicy(star.Policy):
    """--model random: SD3.5 Medium in full size with random weights, and random text features that follow the text."""

    def __init__(self, settings, device):
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        with torch.device(device):
            transformer, vae = SD3Transformer2DModel(**SD35_MEDIUM), AutoencoderKL(**SD35_VAE)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.to({"bf16": torch.bfloat16, "fp32": torch.float32}[settings.dtype])
        parts = dict(transformer=transformer, vae=vae, vae_scale_factor=8, scheduler=euler())
        parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
        super().__init__(SimpleNamespace(**parts), settings, device)

    def encode(self, texts):
        config, length = self.transformer.config, 77 + self.settings.t5_length
        shapes = (length, config.joint_attention_dim), (config.pooled_projection_dim,)
        draw = lambda shape: torch.stack([torch.randn(shape, generator=star.generator(text)) for text in texts])
        return tuple(draw(shape).to(self.device, self.transformer.dtype) for shape in shapes)

    def core_mask(self, prompts):  # any eight tokens
        return (torch.arange(77 + self.settings.t5_length, device=self.device) < 8).expand(len(prompts), -1)

def measure_cost(*arguments, rounds=5):
    """Iterations of star, of flow-grpo, and of star with all steps but the last in the window, in turn on the same
    prompts: seconds an image, peak memory, how far sampler and update disagree, the gradient's root mean square."""
    settings = star.parse_settings([*(arguments or ("--model", "tiny")), "--out", "runs/cost"])
    arms = {"star": settings, "flow-grpo": dataclasses.replace(settings, method="flow-grpo"),
            "full": dataclasses.replace(settings, sde_window=settings.sampling_steps - 1)}  # fmt: skip
    device = "cuda" if torch.cuda.is_available() and settings.model != "tiny" else "cpu"
    policy = (RandomPolicy if settings.model == "random" else star.load_policy)(settings, device)
    prompts, median = star.load_prompts(settings.train_prompts, settings.task), statistics.median
    reference = copy.deepcopy(policy.transformer).requires_grad_(False) if settings.kl > 0 else None
    host = "cpu" if settings.optimizer_device == "cpu" else None
    optimizer = star.MasterAdamW(policy.transformer.parameters(), 1e-12, host)

    def iterate(arm, number):
        chosen = star.pick_prompts(prompts, settings, number)
        return star.train_iteration(policy, reference, optimizer, chosen, brightness, arms[arm], number)

    lines, names, images = {arm: [] for arm in arms}, list(arms), settings.prompts_per_iteration * settings.group_size
    for number in range(1, rounds + 2):
        for arm in names[number % 3 :] + names[: number % 3]:
            lines[arm].append(iterate(arm, number))
    for arm, rows in lines.items():
        rows.pop(0)  # the first round warms up
        sampling, update = (median(row[f"seconds_{part}"] for row in rows) / images for part in ("sampling", "update"))
        peak, deviation = (max(row[name] or 0 for row in rows) for name in ("peak_memory_gb", "ratio_deviation"))
        print(f"{arm}, window {arms[arm].sde_window}: {sampling:.4f} s an image for sampling, {update:.4f} for update; "
              f"peak memory {peak:.1f} GB; ratio deviation {deviation:.1e}; gradient RMS {rows[0]['gradient_rms']:.1e}")
    for other, parts in (("flow-grpo", "sampling update"), ("full", "sampling"), ("full", "update")):
        seconds = lambda row: sum(row[f"seconds_{part}"] for part in parts.split())
        found = [seconds(a) / seconds(b) for a, b in zip(lines["star"], lines[other])]
        print(f"star / {other}, {parts}: median {median(found):.3f} ({min(found):.3f} to {max(found):.3f}, n {rounds})")
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            iterate("star", rounds + 2)
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=5))

def test_the_cost_command_builds_sd35_at_full_size_and_runs_it_at_a_small_one(monkeypatch, capsys):
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in SD3Transformer2DModel(**SD35_MEDIUM).parameters())
    assert count == pytest.approx(2.243e9, rel=1e-3)  # SD3.5 Medium's published size
    little = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=32)
    little |= dict(caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8, dual_attention_layers=())
    monkeypatch.setitem(globals(), "SD35_MEDIUM", SD35_MEDIUM | little)
    monkeypatch.setitem(globals(), "SD35_VAE", SD35_VAE | dict(block_out_channels=(8,) * 4, norm_num_groups=4))
    arguments = "--model random --prompts-per-iteration 2 --group-size 2 --batch-size 2 --resolution 64 --t5-length 8"
    measure_cost(*arguments.split(), "--attention-blocks", "1", rounds=1)
    printed = capsys.readouterr().out
    assert re.search(r"star / full, update: median 0\.\d+ \(0\.\d+ to 0\.\d+, n 1\)", printed)
    assert printed.count("ratio deviation 0.0e+00") == 3 and "star / flow-grpo, sampling update: median" in printed

# --- kills, by hand: python test_star.py kill 100 ---------------------------------------------------------------------

MOMENTS = ("elsewhere", "reward_all", "train_iteration", "save_checkpoint")  # reward_all: sampling, within iteration

def kill_runs(kills="100", folder=None):
    """Kill a run at a random moment, resume it, kill it again, ...: each, once it ends, must equal the unkilled run.

    Every run is a process of its own, forked from this one after the slow imports, and killed by SIGKILL. It marks in
    shared memory which of MOMENTS it is in, so that we can aim, and count where we hit.
    """
    torch.set_num_threads(1)
    folder, doing, duration = Path(folder or tempfile.mkdtemp()), mmap.mmap(-1, 1), 0.0
    variants = [small(folder, "--iterations 4" + more) for more in ("", " --method fdfo --dtype bf16")]
    star.make_reward = lambda *_: brightness
    star.load_policy(star.parse_settings(variants[0]), "cpu")  # imports

    def marked(number, function, *args):
        before, doing[0] = doing[0], number
        result, doing[0] = function(*args), before
        return result

    for number, name in enumerate(MOMENTS[1:], 1):
        setattr(star, name, functools.partial(marked, number, getattr(star, name)))

    def run(out, variant, kill, aim):
        """A run, killed at a random time once it does what we aim at: where it was hit, None if it came to its end."""
        if not (out / "config.json").exists():  # killed before the run had begun
            shutil.rmtree(out, ignore_errors=True)
        doing[0], due = 0, time.monotonic() + (random.random() * duration if kill else math.inf)
        child, ended = os.fork(), (0, 0)
        if child == 0:
            torch.set_num_threads(1)  # torch makes its thread pool anew after a fork: here, before any thread does
            sys.stdout = sys.stderr = open(folder / "log", "a", buffering=1)
            sys.argv = ["star.py", "--out", str(out), *(["--resume"] if out.exists() else variant)]
            try:
                star.main()
            except BaseException as error:
                os._exit(error.code if isinstance(error, SystemExit) else print(repr(error)) or 9)
        while not ended[0] and (time.monotonic() < due or aim and doing[0] != aim):
            time.sleep(0.0002)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            time.sleep(random.random() * 0.01)
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        assert ended[1] in (0, signal.SIGKILL), f"a run failed with {ended[1]}: see {folder}/log"
        return doing[0] if ended[1] else None

    hits, runs = [0] * len(MOMENTS), 0
    for number, variant in enumerate(variants):
        began = time.monotonic()
        run(folder / f"straight-{number}", variant, kill=False, aim=0)
        duration = time.monotonic() - began
    while sum(hits) < int(kills) or not all(hits[1:]):
        number, out, hit = runs % 2, folder / f"run-{runs}", 0
        while hit is not None:
            kill = sum(hits) < int(kills) or not all(hits[1:])
            hit = run(out, variants[number], kill, sum(hits) % len(MOMENTS))
            hits = [count + (place == hit) for place, count in enumerate(hits)]
        assert outcome(out) == outcome(folder / f"straight-{number}"), f"{out} differs from the run that was not killed"
        runs += 1
    print(json.dumps({"kills": sum(hits), "runs": runs, **dict(zip(MOMENTS, hits))}))

if __name__ == "__main__":
    {"cost": measure_cost, "kill": kill_runs, "process": process}[sys.argv[1]](*sys.argv[2:])
