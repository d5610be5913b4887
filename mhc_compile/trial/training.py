"""Contenders: one program each, the same batches, steps taken in turn so that their times compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.memory.optimizer import TableAdamW
from mhc_compile.overrides import Inner
from mhc_compile.parameters import parameter_groups
from mhc_compile.trial.studies import WARM_UP_STEPS

_WARM_UP_SHARE = 0.1
_LAST_SHARE = 0.05
_CLIP = 1.0


@dataclass
class Contender:
    """A model with its compiled program, its optimizer and what was seen of it."""

    name: str
    model: nn.Module
    program: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    """Training loss of every step."""
    seconds: list[float] = field(default_factory=list)
    """Duration of every step: forward, backward, clipping, update."""
    norms: list[float] = field(default_factory=list)
    """Of every step's gradient before clipping, over all parameters but the rows of tables."""

    def step(self, batch: Tensor, learning_rate: float) -> None:
        """Take one optimizer step and time it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        begin = time.perf_counter()
        loss = self.program(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())
        self.norms.append(norm.item())

    def held_out(self, batches: Sequence[Tensor]) -> list[float]:
        """Return the loss of every batch, with gradients on: the program that trains is the one that is measured."""
        return [self.program(input_ids=batch, labels=batch).loss.item() for batch in batches]

    @property
    def timed(self) -> list[float]:
        """Durations after the compilation."""
        return self.seconds[WARM_UP_STEPS:]


def contender(name: str, model: nn.Module, *, backend: str, inner: Inner) -> Contender:
    """Compile `model` with `backend`: `mhc` with `inner` inside, or `inner` itself for the residual model."""
    if backend == "mhc":
        program = torch.compile(model, backend="mhc", options={"inner": inner}, dynamic=False)
    else:
        program = torch.compile(model, backend=inner, dynamic=False)
    return Contender(name, model, program, adamw(model))


def renewed(old: Contender) -> Contender:
    """Return the same model and program with a fresh optimizer and no history."""
    return Contender(old.name, old.model, old.program, adamw(old.model))


def adamw(model: nn.Module, steps: int = 0) -> torch.optim.Optimizer:
    """Return AdamW for a `Contender`, which sets the learning rate at every step; `steps` as `parameter_groups` has."""
    groups = parameter_groups(model, weight_decay=0.05, lr=0.0, steps=steps)
    return TableAdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a linear warm-up, then a cosine down to a twentieth of the peak."""
    warm = max(1, round(steps * _WARM_UP_SHARE))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (_LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2)


def train(contenders: Sequence[Contender], batches: Sequence[Tensor], peak: float, tick: Callable[[], None]) -> None:
    """Take a step of every contender on every batch, in alternating order; call `tick` after each batch."""
    for i, batch in enumerate(batches):
        rate = learning_rate(i, len(batches), peak)
        for one in contenders if i % 2 == 0 else reversed(contenders):
            one.step(batch, rate)
        tick()


def random_windows(tokens: Tensor, count: int, batch: int, length: int, seed: int) -> list[Tensor]:
    """Return `count` batches `[batch, length]` of windows at random places of `tokens` `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - length, (count, batch, 1), generator=generator)
    return list(tokens[starts + torch.arange(length)])


def even_windows(tokens: Tensor, count: int, batch: int, length: int) -> list[Tensor]:
    """Return `count` batches `[batch, length]` of windows spread evenly over `tokens` `[N]`."""
    starts = torch.linspace(0, len(tokens) - length, count * batch).long()
    return list(tokens[starts[:, None] + torch.arange(length)].view(count, batch, length))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the quartiles of `values` (two or more)."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def paired(first: Contender, second: Contender) -> Spread:
    """Return the ratio of the durations of two contenders' steps on the same batch, taken one after the other."""
    return spread([b / a for a, b in zip(first.timed, second.timed, strict=True)])


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean of `second - first` over paired batches, and its standard error."""
    deltas = [b - a for a, b in zip(first, second, strict=True)]
    return statistics.fmean(deltas), statistics.stdev(deltas) / math.sqrt(len(deltas))
