"""Make a parallel generator of a trained checkpoint by training it on: Seed Diffusion, residual and with four streams.

A small Llama learns next tokens on the sources of Python's standard library. Its copies then see blocks and learn to
restore corrupted text. Printed are their held-out denoising losses before and after, and, beside greedy decoding of the
checkpoint, what they sample: tokens a call of the model, and the loss of the sampled tokens under the checkpoint.

Run: python examples/diffusion.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.demo.experiment import residual_model
from mhc_compile.demo.settings import QUICK, Settings
from mhc_compile.demo.text import Corpus, build_corpus, held_out_batches, training_batches
from mhc_compile.diffusion import attend, denoising_loss, sample
from mhc_compile.integrations.diffusion import add_mask_token
from mhc_compile.trial.training import Contender, adamw, learning_rate, train

BLOCK = 16
FULL = replace(QUICK, steps=300, held_out_batches=8)
QUICKLY = replace(
    QUICK, layers=1, hidden=32, heads=2, vocabulary=512, length=48, batch=4, steps=12, text_bytes=400_000,
    held_out_batches=2, initializer_range=32**-0.5,
)  # fmt: skip
LONGER = 3
"""The second training takes so many times the steps of the first."""
PROMPTS = 8
LEAST = (1, 2, 4)
"""Positions that a call accepts at least, however sure the model is of them."""


def denoise(model: nn.Module, batches: Sequence[Tensor], peak: float, mask_token: int) -> None:
    """Train on `batches` by the two-stage curriculum."""
    optimizer, network = adamw(model), logits_of(model)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), peak)
        loss = denoising_loss(
            network, ids, step / len(batches), mask_token=mask_token, vocabulary=mask_token + 1, generator=generator
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def logits_of(model: Any) -> Any:
    """Return the network as `denoising_loss` calls it."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Tensor], mask_token: int) -> float:
    """Return the mask loss in nats per token, with the same corruption for every model."""
    model.eval()
    generator = torch.Generator().manual_seed(2)
    arguments: dict[str, Any] = {"mask_token": mask_token, "vocabulary": mask_token + 1, "generator": generator}
    return statistics.fmean(float(denoising_loss(logits_of(model), ids, 0.0, **arguments)) for ids in batches)


@torch.no_grad()
def judged(judge: Any, ids: Tensor, prompt: int) -> float:
    """Return the loss of the tokens after the prompt under the checkpoint, a model of next tokens."""
    logits = judge(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten()))


@torch.no_grad()
def decode_greedily(model: Any, prompt: Tensor, new: int) -> Tensor:
    """Return the prompt continued, a token at a time."""
    ids = prompt
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def right(ids: Tensor, text: Tensor, prompt: int) -> float:
    """Return the share of sampled tokens that are those of the text."""
    return float((ids[:, prompt:] == text[:, prompt : ids.shape[1]]).double().mean())


def run(settings: Settings, corpus: Corpus, kernels: str) -> None:
    """Train and print."""
    torch.manual_seed(settings.seed)
    checkpoint: Any = residual_model(settings, corpus)
    mask_token = add_mask_token(checkpoint, corpus.tokenizer)
    held_out = held_out_batches(corpus, settings)
    learner = Contender("checkpoint", checkpoint, checkpoint, adamw(checkpoint))
    train([learner], training_batches(corpus, settings, stream=0), settings.learning_rate, lambda: None)
    checkpoint.eval()
    print(f"checkpoint: held-out loss of next tokens {statistics.fmean(learner.held_out(held_out)):.3f}")
    text = torch.cat(list(held_out))[:: settings.batch * settings.held_out_batches // PROMPTS][:PROMPTS]
    prompt = settings.length // 3
    new = settings.length - prompt
    greedy = decode_greedily(checkpoint, text[:, :prompt], new)
    lines = [("text itself", "", judged(checkpoint, text, prompt), 1.0)]
    lines += [("greedy", "1.00", judged(checkpoint, greedy, prompt), right(greedy, text, prompt))]
    for name in ("residual", f"{settings.streams} streams"):
        model = copy.deepcopy(checkpoint)
        if name != "residual":
            mhc_compile.convert(model, streams=settings.streams, inner="eager", kernels=kernels)
        attend(model, f"block:{BLOCK}", inner="eager", kernels=kernels)
        before = held_out_loss(model, held_out, mask_token)
        batches = training_batches(corpus, replace(settings, steps=settings.steps * LONGER), stream=1)
        denoise(model, batches, settings.learning_rate, mask_token)
        print(f"{name}: held-out denoising loss {before:.3f} -> {held_out_loss(model, held_out, mask_token):.3f}")
        for least in LEAST:
            made = sample(model, text[:, :prompt], new, mask_token=mask_token, least=least)
            figures = f"{made.tokens_per_forward:.2f}", judged(checkpoint, made.ids, prompt)
            lines.append((f"{name}, {least} a call", *figures, right(made.ids, text, prompt)))
    print(f"\n{'sampled':<22}{'tokens a call':>14}{'loss':>8}{'right':>8}")
    for name, speed, loss, share in lines:
        print(f"{name:<22}{speed:>14}{loss:>8.3f}{share:>8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model: to see that it runs")
    settings, kernels = (QUICKLY, "none") if parser.parse_args().quick else (FULL, "all")
    torch.set_num_threads(settings.threads)
    run(settings, build_corpus(settings), kernels)


if __name__ == "__main__":
    main()
