"""Make a parallel generator of a trained checkpoint by training it on: Seed Diffusion, residual and with four streams.

A small Llama learns next tokens on the sources of Python's standard library. Its copies then learn to restore corrupted
text, each block beside clean ones. Printed are their held-out denoising losses before and after; what they sample, for
held-out prompts, beside greedy decoding of the checkpoint, as another model of next tokens judges it; and bodies of
held-out functions that they fill in. A last training is on what the checkpoint itself writes (arXiv 1606.07947): its
greedy text leaves less to choose than people's, so that the tokens of one call fit each other.

Run: python examples/diffusion.py [--quick]
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.demo.experiment import residual_model
from mhc_compile.demo.settings import QUICK, Settings
from mhc_compile.demo.text import Corpus, build_corpus, divided, held_out_batches, source_texts, training_batches
from mhc_compile.diffusion import attend, denoising_loss, sample
from mhc_compile.diffusion.objective import EDITS_FROM
from mhc_compile.integrations.diffusion import CachedCalls, add_mask_token, beside_clean
from mhc_compile.trial.training import Contender, adamw, even_windows, learning_rate, train

BLOCK = 4
FULL = replace(QUICK, steps=600, batch=16, text_bytes=6_000_000, held_out_batches=4)
QUICKLY = replace(
    QUICK, layers=1, hidden=32, heads=2, vocabulary=512, length=48, batch=4, steps=12, text_bytes=400_000,
    held_out_batches=2, initializer_range=32**-0.5,
)  # fmt: skip
LOWER = 0.5
"""The learning rate of the second training, of the first one's. It has as many steps of half as many sequences, which
the network reads twice: clean and corrupted."""
PROMPTS = 64
FUNCTIONS = 48
WRITTEN, ROUNDS = 64, 3
"""How many prompts, times a fifth of the steps, the checkpoint continues, and how often its copies see the result."""
SPEEDS = ((1, 2.0), (1, 0.5), (2, 2.0), (4, 2.0))
"""How many positions a call accepts at least, and from which probability on all; 2 is above every one."""


def learn(settings: Settings, corpus: Corpus) -> Any:
    """Return a model of next tokens."""
    torch.manual_seed(settings.seed)
    model: Any = residual_model(settings, corpus)
    add_mask_token(model, corpus.tokenizer)
    learner = Contender("next tokens", model, model, adamw(model))
    train([learner], training_batches(corpus, settings, stream=0), settings.learning_rate, lambda: None)
    model.eval()
    loss = statistics.fmean(learner.held_out(held_out_batches(corpus, settings)))
    print(f"{settings.layers} layers, {settings.steps} steps of next tokens: held-out loss {loss:.3f}", flush=True)
    return model


def loss_of(
    model: nn.Module, ids: Tensor, progress: float, mask_token: int, generator: torch.Generator, prompt: int = 0
) -> Tensor:
    """Return the denoising loss behind the prompts of a batch, in which every block sees clean ones before it."""
    network = beside_clean(model, ids, BLOCK, shift=True)
    valid = (torch.arange(ids.shape[1]) >= prompt).expand(ids.shape)
    how: dict[str, Any] = {"mask_token": mask_token, "vocabulary": mask_token + 1}
    return denoising_loss(network, ids, progress, **how, valid=valid, generator=generator)


def denoise(
    model: nn.Module, batches: Sequence[Tensor], peak: float, mask_token: int, *, edits: bool = True, prompt: int = 0
) -> Iterator[str]:
    """Train on `batches` by the two-stage curriculum, or without edits; yield each stage's name when it is done."""
    optimizer = adamw(model)
    generator = torch.Generator().manual_seed(1)
    for step, ids in enumerate(batches):
        progress = step / len(batches) if edits else 0.0
        if progress >= EDITS_FROM > (step - 1) / len(batches):
            yield "masks"
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), peak)
        loss_of(model, ids, progress, mask_token, generator, prompt).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    yield "masks and edits" if edits else "masks, then own text"


def stages(
    model: nn.Module, texts: Sequence[Tensor], own: Sequence[Tensor], peak: float, mask_token: int, prompt: int
) -> Iterator[tuple[str, nn.Module]]:
    """Train `model` by the curriculum, and from its first stage on a copy on what the checkpoint wrote, `own`."""
    masked = model
    for name in denoise(model, texts, peak, mask_token):
        yield name, model
        if masked is model:
            masked = copy.deepcopy(model)
    for name in denoise(masked, own, peak, mask_token, edits=False, prompt=prompt):
        yield name, masked


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Tensor], mask_token: int) -> float:
    """Return the mask loss in nats per token, with the same corruption for every model."""
    model.eval()
    generator = torch.Generator().manual_seed(2)
    return statistics.fmean(float(loss_of(model, ids, 0.0, mask_token, generator)) for ids in batches)


@torch.no_grad()
def decode_greedily(model: Any, prompt: Tensor, new: int) -> Tensor:
    """Return the prompt continued, a token at a time."""
    ids, given, logits_of = prompt, prompt, CachedCalls(model)
    for _ in range(new):
        given = logits_of(given)[:, -1:].argmax(-1)
        ids = torch.cat([ids, given], 1)
    return ids


def written(model: Any, corpus: Corpus, settings: Settings, prompt: int) -> list[Tensor]:
    """Return batches of training texts that `model` has continued greedily behind their first tokens."""
    asked = training_batches(corpus, replace(settings, steps=max(settings.steps // 5, 1), batch=WRITTEN), stream=2)
    texts = [decode_greedily(model, ids[:, :prompt], settings.length - prompt) for ids in asked]
    return [batch for ids in texts for batch in ids.split(settings.batch // 2)] * ROUNDS


@dataclass(frozen=True)
class Judged:
    """A row of the table."""

    name: str
    speed: float
    """Tokens a call."""
    loss: float
    """The judge's mean `-log p` of the sampled tokens, in nats."""
    distinct: float
    """The share of pairs of tokens that a row has for the first time: low where it repeats itself."""
    right: float
    """The share of tokens that the held-out text has at the same place."""

    def __str__(self) -> str:
        return f"{self.name:<44}{self.speed:>14.2f}{self.loss:>8.3f}{self.distinct:>10.2f}{self.right:>8.1%}"


@torch.no_grad()
def judged(name: str, speed: float, judge: Any, ids: Tensor, text: Tensor, prompt: int) -> Judged:
    """Return what there is to say of continuations of a prompt."""
    logits = judge(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
    loss = float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten()))
    rows = [row[prompt:].tolist() for row in ids]
    pairs = [list(itertools.pairwise(row)) for row in rows]
    distinct = statistics.fmean(len(set(row)) / len(row) for row in pairs)
    return Judged(name, speed, loss, distinct, float((ids[:, prompt:] == text[:, prompt:]).double().mean()))


def functions(settings: Settings, corpus: Corpus) -> Iterator[tuple[Tensor, int]]:
    """Yield held-out functions of a few lines as ids [1, S], and where their bodies begin."""
    _, held_out = divided(source_texts(settings.text_bytes))
    encode = corpus.tokenizer.backend_tokenizer.encode
    for text in held_out:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                source = ast.get_source_segment(text, node) or ""
                lines = source.splitlines(keepends=True)
                at = node.body[0].lineno - node.lineno
                head, body = (encode("".join(part)).ids for part in (lines[:at], lines[at:]))
                if at and 8 <= len(body) <= 32 and len(head) + len(body) <= settings.length:
                    yield torch.tensor([[*head, *body]]), len(head)


def filled(
    model: Any, corpus: Corpus, bodies: Sequence[tuple[Tensor, int]], mask_token: int
) -> tuple[float, float, str]:
    """Return the share of right tokens in bodies that were masked, tokens a call, and the first function filled in."""
    right = total = calls = 0.0
    first = ""
    for ids, begin in bodies:
        prompt = ids.clone()
        prompt[:, begin:] = mask_token
        made = sample(model, prompt, mask_token=mask_token, least=2, threshold=2.0, order="leftmost", shift=True)
        right += float((made.ids == ids)[:, begin:].sum())
        total += made.new
        calls += made.forwards
        first = first or str(corpus.tokenizer.decode(made.ids[0]))
    return right / total, total / calls, first


def greedily_filled(model: Any, bodies: Sequence[tuple[Tensor, int]]) -> float:
    """Return the share of right tokens in bodies that greedy decoding continues the signature by."""
    right = total = 0
    for ids, begin in bodies:
        made = decode_greedily(model, ids[:, :begin], ids.shape[1] - begin)
        right += int((made == ids)[:, begin:].sum())
        total += ids.shape[1] - begin
    return right / total


def run(settings: Settings, corpus: Corpus, kernels: str) -> None:
    """Train and print."""
    checkpoint = learn(settings, corpus)
    mask_token = corpus.tokenizer.mask_token_id
    longer = replace(settings, layers=settings.layers + 1, seed=7)
    judge = learn(longer, corpus)
    held_out = held_out_batches(corpus, settings)
    text = torch.cat(even_windows(corpus.held_out, PROMPTS, 1, settings.length))
    prompt = settings.length // 3 // BLOCK * BLOCK
    new = settings.length - prompt
    bodies = list(functions(settings, corpus))[:FUNCTIONS]
    greedy = decode_greedily(checkpoint, text[:, :prompt], new)
    table = [
        judged("the text itself", 1.0, judge, text, text, prompt),
        judged("greedy decoding of the checkpoint", 1.0, judge, greedy, text, prompt),
    ]
    shares = [f"greedy decoding of the checkpoint: {greedily_filled(checkpoint, bodies):.1%} of the tokens right"]
    texts = training_batches(corpus, replace(settings, batch=settings.batch // 2), stream=1)
    own = written(checkpoint, corpus, settings, prompt)
    for name in ("residual", f"{settings.streams} streams"):
        trained = copy.deepcopy(checkpoint)
        if name != "residual":
            mhc_compile.convert(trained, streams=settings.streams, inner="eager", kernels=kernels)
        losses = [held_out_loss(trained, held_out, mask_token)]
        for stage, network in stages(trained, texts, own, settings.learning_rate * LOWER, mask_token, prompt):
            losses.append(held_out_loss(network, held_out, mask_token))
            model = attend(copy.deepcopy(network), f"block:{BLOCK}", inner="eager", kernels=kernels).eval()
            for least, threshold in SPEEDS:
                made = sample(
                    model, text[:, :prompt], new, mask_token=mask_token, least=least, threshold=threshold,
                    order="leftmost", shift=True,
                )  # fmt: skip
                how = f"{name}, {stage}: {least}" + (f", all of {threshold}" if threshold < 1 else "")
                table.append(judged(how, made.tokens_per_forward, judge, made.ids, text, prompt))
            share, speed, first = filled(model, corpus, bodies, mask_token)
            shares.append(f"{name}, {stage}: {share:.1%} right, {speed:.2f} tokens a call; the first:\n{first}")
        print(f"{name}: held-out denoising loss", " -> ".join(f"{loss:.3f}" for loss in losses), flush=True)
    print(f"\n{'sampled':<44}{'tokens a call':>14}{'loss':>8}{'distinct':>10}{'right':>8}", *table, sep="\n")
    print(
        f"\nbodies of {len(bodies)} held-out functions; the first is\n{corpus.tokenizer.decode(bodies[0][0][0])}",
        *shares,
        sep="\n\n",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model: to see that it runs")
    settings, kernels = (QUICKLY, "none") if parser.parse_args().quick else (FULL, "all")
    torch.set_num_threads(settings.threads)
    run(settings, build_corpus(settings), kernels)


if __name__ == "__main__":
    main()
