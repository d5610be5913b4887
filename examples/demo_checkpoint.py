"""Train the checkpoint that `mhc-compile demo` starts from: a residual Llama of half a million parameters.

The text is the Python standard library's own sources. The learning rate stays at its peak to the end: what goes on from
the checkpoint may lower it.

Run: python examples/demo_checkpoint.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

from mhc_compile.demo.experiment import model_config
from mhc_compile.demo.settings import SHORT, Settings
from mhc_compile.demo.text import divided_by_name, encoded, named_sources, train_tokenizer
from mhc_compile.trial.training import contender, even_windows, random_windows, threads

SEED = 0
WARM_UP = 200
"""Steps in which the learning rate rises."""
SHOWN_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """How long, and on what."""

    steps: int
    batch: int
    learning_rate: float
    text_bytes: int
    inner: str


RECIPE = Recipe(steps=2500, batch=8, learning_rate=5e-3, text_bytes=20_000_000, inner="inductor")
QUICK = Recipe(steps=6, batch=2, learning_rate=5e-3, text_bytes=400_000, inner="eager")


def train(recipe: Recipe, settings: Settings, folder: Path) -> None:
    """Train the tokenizer and the model, and write both to `folder`."""
    train_texts, held_out_texts = divided_by_name(named_sources(recipe.text_bytes))
    tokenizer = train_tokenizer(train_texts, settings.vocabulary)
    tokens, others = (encoded(tokenizer.backend_tokenizer, texts) for texts in (train_texts, held_out_texts))
    print(f"{len(tokens):,} tokens to train on, {len(others):,} held out")

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(model_config(settings, tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    one = contender("residual", model, backend="residual", inner=recipe.inner)
    begin = time.process_time()
    for step, batch in enumerate(random_windows(tokens, recipe.steps, recipe.batch, settings.length, SEED), start=1):
        one.step(batch, recipe.learning_rate * min(1.0, step / WARM_UP))
        if step % SHOWN_EVERY == 0:
            loss = sum(one.losses[-SHOWN_EVERY:]) / SHOWN_EVERY
            print(f"step {step}: training loss {loss:.3f}, {time.process_time() - begin:.0f} s", flush=True)
    held_out = one.held_out(even_windows(others, 16, recipe.batch, settings.length))
    print(f"held-out loss {sum(held_out) / len(held_out):.4f} in nats per token")
    save(model, tokenizer, folder)


def save(model: nn.Module, tokenizer: object, folder: Path) -> None:
    """Write the folder of the checkpoint, weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("demo-checkpoint"), help="the folder (%(default)s)")
    arguments = parser.parse_args()
    with threads(1):
        train(QUICK if arguments.quick else RECIPE, SHORT, arguments.out)


if __name__ == "__main__":
    main()
