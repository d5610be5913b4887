"""Train the checkpoint that `mhc-compile demo` starts from: a residual Llama of half a million parameters.

The text is the Python standard library's own sources. The learning rate stays at its peak in the first phase. The
second phase starts from the folder that the first one wrote, and lowers it.

Run: python examples/demo_checkpoint.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mhc_compile.demo.experiment import model_config
from mhc_compile.demo.settings import SHORT
from mhc_compile.demo.text import divided_by_name, encoded, named_sources, train_tokenizer
from mhc_compile.overrides import Inner
from mhc_compile.trial.training import contender, even_windows, random_windows, threads, train

SEED = 0
LENGTH = 128
WARM_UP = 200
"""Steps of the first phase in which the learning rate rises."""
SHOWN_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """How long, and on what."""

    steps: tuple[int, int]
    """Settings of both training phases."""
    batch: int
    learning_rate: float
    text_bytes: int
    inner: Inner


RECIPE = Recipe(steps=(2500, 500), batch=8, learning_rate=5e-3, text_bytes=20_000_000, inner="inductor")
QUICK = Recipe(steps=(5, 5), batch=2, learning_rate=5e-3, text_bytes=400_000, inner="eager")


def first_phase(recipe: Recipe, tokens: Tensor, tokenizer: Any, folder: Path) -> None:
    """Train from random weights at a constant learning rate; write the folder."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(model_config(replace(SHORT, length=LENGTH), tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    one = contender("residual", model, backend="residual", inner=recipe.inner)
    for step, batch in enumerate(random_windows(tokens, recipe.steps[0], recipe.batch, LENGTH, SEED), start=1):
        one.step(batch, recipe.learning_rate * min(1.0, step / WARM_UP))
        if step % SHOWN_EVERY == 0:
            print(f"step {step}: training loss {sum(one.losses[-SHOWN_EVERY:]) / SHOWN_EVERY:.3f}", flush=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def second_phase(recipe: Recipe, tokens: Tensor, held_out: Tensor, folder: Path) -> None:
    """Train the folder's model while the learning rate falls; write the folder again."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).train()
    one = contender("residual", model, backend="residual", inner=recipe.inner)
    batches = random_windows(tokens, recipe.steps[1], recipe.batch, LENGTH, SEED + 1)
    train([one], batches, recipe.learning_rate, lambda: None)
    losses = one.held_out(even_windows(held_out, 16, recipe.batch, LENGTH))
    print(f"held-out loss {sum(losses) / len(losses):.4f} in nats per token")
    model.bfloat16().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("demo-checkpoint"), help="the folder (%(default)s)")
    arguments = parser.parse_args()
    recipe = QUICK if arguments.quick else RECIPE
    texts = divided_by_name(named_sources(recipe.text_bytes))
    tokenizer = train_tokenizer(texts[0], SHORT.vocabulary)
    tokens, held_out = (encoded(tokenizer.backend_tokenizer, part) for part in texts)
    print(f"{len(tokens):,} tokens to train on, {len(held_out):,} held out")
    with threads(1):
        first_phase(recipe, tokens, tokenizer, arguments.out)
        second_phase(recipe, tokens, held_out, arguments.out)
    print(f"{time.process_time():.0f} s of the processor")


if __name__ == "__main__":
    main()
