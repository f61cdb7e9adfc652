"""How the embedded model in assets/tiny was made: a small SD3 that draws grey signs with three letters, and misspells.

    python assets/make_tiny.py --out FOLDER --seed 0        about four minutes on two CPU cores
    python assets/make_tiny.py --out FOLDER --scale 0.01    a hundredth of the steps, to try the script

FOLDER opens as SD3.5's does, by StableDiffusion3Pipeline.from_pretrained(FOLDER, vae=None). Its parts are the real
ones, only small: an SD3Transformer2DModel of four blocks and 2.3 million parameters, two CLIP text encoders with a
tokenizer of characters, no T5. Only a VAE is missing: latents are 4x4 cells of grey pixels (star.py's Policy.decode),
48 px are 12 x 12 latents of 16 channels, and so 36 image tokens.

1. The text encoders are taught to read: which letter of the quoted word is this token?
2. The transformer is pre-trained by flow matching on words rendered on the spot, as a poor speller that knows its
   letters: 45 in a hundred are missing from the signs it is shown, so it leaves many out, and reinforcement learning
   has something to mend. Bases that were stopped early instead, at the same reward but with letters badly bound to
   their places, rose by only 0.18 in 70 iterations. No test word ever occurs.

star.py never imports this file.
"""

import argparse
import dataclasses
import functools
import math
import random
import string
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import star  # noqa: E402

LETTERS = string.ascii_uppercase
WORD = 3  # letters
SIZE, CELL = 48, 8  # px: of the image, and of a letter, which fills one image token
TEXT_LENGTH, TEXT_WIDTH = 24, 64
READING_STEPS, READING_BATCH, READING_RATE = 250, 128, 3e-3
STEPS, BATCH = 1100, 32
RATE, MATRIX_RATE = 1.5e-3, 4.5e-3  # AdamW's, and Muon's
MISSING = 0.45  # of the letters in the pictures
JUDGE_AFTER, JUDGE_EVERY, ENOUGH = 500, 200, 0.6  # steps, and the reward on training words at which it may stop


def build_pipeline():
    """The untrained parts. Two encoders of one shape: SD3 concatenates their features."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 4, pos_embed_max_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16,
        num_layers=4, num_attention_heads=4, attention_head_dim=32, caption_projection_dim=128,
        joint_attention_dim=2 * TEXT_WIDTH, pooled_projection_dim=2 * TEXT_WIDTH, qk_norm="rms_norm",
    )  # fmt: skip
    encoders = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    for encoder in encoders:  # from CLIP's own 0.02, reading would take many times as long to learn
        torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
        torch.nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


# --- pictures ---------------------------------------------------------------------------------------------------------


@functools.cache
def glyphs():
    """{letter: [8, 8] in [0, 1]}: the capitals of Pillow's built-in font, each squeezed into one token's cell."""
    font, drawn = ImageFont.load_default(size=40), {" ": torch.zeros(CELL, CELL)}
    for letter in LETTERS:
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((32, 32), letter, fill=255, font=font, anchor="mm", stroke_width=2)
        ink = canvas.crop(canvas.getbbox())
        width = max(1, round(ink.width * min((CELL - 1) / ink.width, (CELL - 1) / 28)))  # never stretched: I stays thin
        glyph = Image.new("L", (CELL, CELL))
        glyph.paste(ink.resize((width, CELL - 1), Image.LANCZOS), ((CELL - width) // 2, 0))
        drawn[letter] = torch.from_numpy(np.array(glyph)) / 255
    return drawn


def render_words(words, generator):
    """Words -> grey images [B, 1, 48, 48] in [-1, 1]: dark letters on a bright sign, which stands at a random place of
    the letter grid (6 rows x 2 columns) before a random soft gradient. The sign fills a twelfth of the image."""
    axis, count, width = torch.linspace(-0.5, 0.5, SIZE), len(words), CELL * WORD
    one, other, turn = torch.rand(3, count, 1, 1, generator=generator)
    slope = (2 * math.pi * turn).cos() * axis + (2 * math.pi * turn).sin() * axis[:, None]
    images = (one + other) / 4 + (one - other) / 2 * slope
    rows = torch.randint(SIZE // CELL, (count,), generator=generator) * CELL
    columns = torch.randint(SIZE // width, (count,), generator=generator) * width
    for image, word, top, left in zip(images, words, rows, columns):
        image[top : top + CELL, left : left + width] = 1 - torch.cat([glyphs()[letter] for letter in word], dim=1)
    return images[:, None] * 2 - 1


class Words:
    """Training prompts with random words in place of the quoted ones, and never a test word."""

    def __init__(self, seed):
        load = lambda name: [prompt.text for prompt in star.load_prompts(ROOT / f"prompts/tiny/ocr/{name}.txt", "ocr")]
        self.templates, self.random = load("train"), random.Random(seed)
        self.held_out = {text[slice(*star.quoted_span(text))].upper() for text in load("test")}

    def draw(self, count):
        """(prompts, words)"""
        words = []
        while len(words) < count:
            word = "".join(self.random.choices(LETTERS, k=WORD))
            words += [word] if word not in self.held_out else []
        prompts = [self.random.choice(self.templates) for _ in words]
        spans = [star.quoted_span(prompt) for prompt in prompts]
        return [prompt[:a] + word + prompt[b:] for prompt, word, (a, b) in zip(prompts, words, spans)], words

    def wear(self, word):
        """The word with letters missing."""
        return "".join(" " if self.random.random() < MISSING else letter for letter in word)


# --- 1. the reading lesson --------------------------------------------------------------------------------------------


def teach_reading(pipe, words, steps):
    """Pre-train the text encoders, as SD3's were: every token learns to tell whether and where it stands in the quoted
    word and which letter it is, and the pooled feature to spell the word. The linear heads that ask are thrown away."""
    encoders = [pipe.text_encoder.requires_grad_(True), pipe.text_encoder_2.requires_grad_(True)]
    places, names, spellers = (
        torch.nn.ModuleList(torch.nn.Linear(TEXT_WIDTH, size) for _ in encoders) for size in (WORD + 1, 26, 26 * WORD)
    )
    parameters = [p for module in (*encoders, places, names, spellers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=READING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, READING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="teaching the text encoders to read"):
        token_ids, place, name, spelling = reading_lesson(pipe.tokenizer, *words.draw(READING_BATCH))
        loss = 0
        for encoder, which_place, which_name, speller in zip(encoders, places, names, spellers):
            output = encoder(token_ids, output_hidden_states=True)
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


def reading_lesson(tokenizer, prompts, words):
    """(token ids [B, N], place in the word [B, N], letter [B, N], spelling [B, 3])"""
    batch = tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt", return_offsets_mapping=True
    )
    spelling = torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])
    place = torch.full(batch.input_ids.shape, WORD)  # "not in the word"
    name = torch.full(batch.input_ids.shape, -100)  # asked of the word's letters only
    for row, prompt in enumerate(prompts):
        start, end = star.quoted_span(prompt)
        for position, (a, b) in enumerate(batch.offset_mapping[row].tolist()):
            if start <= a < b <= end:
                place[row, position] = a - start
                name[row, position] = spelling[row, a - start]
    return batch.input_ids, place, name, spelling


# --- 2. pre-training --------------------------------------------------------------------------------------------------


def make_optimizers(transformer, steps):
    """(optimizers, schedules). Muon on the blocks' matrices learns to spell in half the steps that AdamW takes."""
    matrices, others = [], []
    for name, parameter in transformer.named_parameters():
        matrix = parameter.ndim == 2 and name.startswith("transformer_blocks") and "norm" not in name
        (matrices if matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.01, betas=(0.9, 0.99)),
    ]
    curve = lambda step: min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, curve) for optimizer in optimizers]


def pretrain(policy, words, settings, seed, scale):
    """Flow matching until a fair part of the letters can be read, by star.py's own evaluation on training words."""
    transformer, reward, generator = policy.transformer, star.OCRReward(), torch.Generator().manual_seed(seed)
    steps, after, every = (max(1, round(number * scale)) for number in (STEPS, JUDGE_AFTER, JUDGE_EVERY))
    optimizers, schedules = make_optimizers(transformer, steps)
    judged, bar = [star.Prompt(text) for text in words.draw(64)[0]], tqdm(range(1, steps + 1), desc="pre-training")
    for step in bar:
        prompts, drawn = words.draw(BATCH)
        prompts = [prompt if words.random.random() > 0.1 else "" for prompt in prompts]  # one in ten: for guidance
        embeddings, pooled = policy.encode(prompts)
        images = render_words([words.wear(word) for word in drawn], generator)
        data = (F.pixel_unshuffle(images, 4) + 0.4) * 2.5  # about unit variance: unscaled, letters drown in noise
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
        if step >= after and step % every == 0:
            score = star.evaluate(policy, judged, reward, settings)[0]["eval_reward"]
            bar.set_postfix(loss=f"{loss.item():.3f}", ocr_reward=f"{score:.2f}")
            if score >= ENOUGH:
                break


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    given = parser.parse_args()
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty")
    print("about four minutes on two CPU cores", flush=True) if given.scale == 1 else None
    transformers.logging.set_verbosity_error()
    began, words = time.perf_counter(), Words(given.seed)
    torch.manual_seed(given.seed)
    pipe = build_pipeline()
    settings = dataclasses.replace(star.parse_settings(["--model", "tiny"]), batch_size=64)
    policy = star.Policy(pipe, settings, "cpu")
    teach_reading(pipe, words, max(3, round(READING_STEPS * given.scale)))
    pretrain(policy, words, settings, given.seed, given.scale)
    pipe.save_pretrained(given.out)
    print(f"{given.out} holds the model, after {time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
