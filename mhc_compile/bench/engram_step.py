"""What looking rows up adds to a training step: the demo's converted model with its tables in memory and on disk."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule

from mhc_compile.bench.contest import Contender, contest, show
from mhc_compile.conversion import convert
from mhc_compile.demo.experiment import residual_model
from mhc_compile.demo.settings import FULL, QUICK
from mhc_compile.demo.text import build_corpus, training_batches
from mhc_compile.loading import from_pretrained
from mhc_compile.memory.optimizer import TableAdamW
from mhc_compile.parameters import owners, parameter_groups
from mhc_compile.passes.base import Context, value
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.trial.training import Spread, spread, threads

ENGRAM, KERNELS = torch.ops.engram, torch.ops.engram_kernels
MAPPED = "mapped from disk"
GIVEN = "rows given, no look-up"
FIXED = "in memory"
TRAINED = "in memory, trained"
_BATCHES = 16
_LEARNING_RATE = 0.0
"""So that every step computes what the same step of the others computes."""


def run_steps(console: Console, *, quick: bool) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Measure steps; return rows by title, and by contender the time of a step over one with its rows given."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are shown
    settings = QUICK if quick else FULL
    corpus = build_corpus(settings)
    batches = training_batches(corpus, settings, stream=1)[: 3 if quick else _BATCHES]
    torch.manual_seed(0)
    model: Any = residual_model(settings, corpus)
    convert(model, streams=settings.streams, inner="eager", engram=settings.memory, tokenizer=corpus.tokenizer)
    scatter(model)
    shape = (
        f"{settings.layers} layers, C={settings.hidden}, {settings.batch} x {settings.length} tokens, "
        f"{settings.threads} thread"
    )
    with tempfile.TemporaryDirectory() as temporary, threads(settings.threads):
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        corpus.tokenizer.save_pretrained(folder)
        steps = contenders(folder, batches, settings.inner)
        with torch.no_grad():
            exact = model(input_ids=batches[0], labels=batches[0], use_cache=False).loss.double()

        def check(loss: Tensor) -> float:
            return float((loss.double() - exact).abs() / exact)

        rows = contest(
            console, [Contender(name, s, check=check, tolerance=1e-5) for name, s in steps.items()], ours=MAPPED,
            device=torch.device("cpu"), shape=shape, rounds=5 if quick else 101,
        )  # fmt: skip
    title = f"training step with memories at {len(settings.memory.layers)} layers, {shape}"
    groups = {title: show(console, title, rows)}
    shares = {name: relative(steps[GIVEN], s) for name, s in steps.items() if name != GIVEN}
    for name, share in shares.items():
        console.print(
            f"looking rows up, {name}: {share.median - 1:+.1%} of a step with its rows given (quartiles of paired "
            f"steps {share.low - 1:+.1%} .. {share.high - 1:+.1%})"
        )
    return groups, {name: asdict(share) for name, share in shares.items()}


def contenders(folder: Path, batches: Sequence[Tensor], inner: str) -> dict[str, Steps]:
    """Return the model of `folder` in every form."""

    def loaded(*, trained: bool = False, **where: Any) -> nn.Module:
        model = from_pretrained(folder, inner="eager", local_files_only=True, **where).train()
        for parameters in owners(model).values():
            for layer in parameters.memories.tables:
                parameters.table(layer).trainable = trained
        return model

    without_look_up = loaded()
    return {
        MAPPED: Steps(loaded(tables="mapped"), batches, inner),
        GIVEN: Steps(without_look_up, batches, inner, given=looked_up(without_look_up, batches[0])),
        FIXED: Steps(loaded(), batches, inner),
        TRAINED: Steps(loaded(trained=True), batches, inner),
    }


class Steps:
    """Training steps on one batch after the other, timed. `given`: by layer what stands in the place of a look-up."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Tensor], inner: str, *, given: Sequence[Tensor] | None = None
    ) -> None:
        options: dict[str, Any] = {"inner": inner}
        if given is not None:
            options["pipeline"] = partial(without_look_ups, given)
        self._program = torch.compile(model, backend="mhc", options=options, dynamic=False)
        self._optimizer = TableAdamW(parameter_groups(model, weight_decay=0.0, lr=_LEARNING_RATE), fused=True)
        self._batches = itertools.cycle(batches)
        self.seconds: list[float] = []

    def __call__(self) -> Tensor:
        """Run forward, backward and AdamW; return the loss."""
        batch = next(self._batches)
        begin = time.perf_counter()
        loss: Tensor = self._program(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)
        return loss.detach()


def relative(given: Steps, other: Steps) -> Spread:
    """Return the time of a step over that of the one with its rows given in the same round."""
    return spread([b / a for a, b in zip(given.seconds[3:], other.seconds[3:], strict=True)])


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Set what a memory starts at zero to random values, and widen rows: the loss depends on every row."""
    for parameters in owners(model).values():
        for name, p in parameters.in_graph().items():
            if name.endswith((".value", ".conv")):
                p.normal_(std=0.2)
        for layer in parameters.memories.tables:
            parameters.table(layer).start(0, 1.0)


def looked_up(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Look up the values [B, S, d_mem] of the rows of `ids` [B, S] by layer, outside of any graph."""
    values = []
    for parameters in owners(model).values():
        engram = parameters.memories.engram
        assert engram is not None
        small = parameters.get_submodule("engram").compression[ids] if engram.compressed else ids  # type: ignore[index]
        reach = torch.ops.engram.reach(ids, None, None, None, -1)
        for m in engram.layers:
            rows = torch.ops.engram.rows(small, reach, None, str(m.hash))
            values.append(parameters.table(m.layer)(rows).detach())
    return values


@dataclass(frozen=True)
class Given:
    """Puts constants in the place of what is looked up, and drops what only the look-ups read.

    That is the values of the rows, or where they are found by content their weighted sums.
    """

    values: Sequence[Tensor]
    """One by one; random where there are none."""

    name: ClassVar[str] = "given"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:  # noqa: ARG002
        """Rewrite `gm` in place."""
        looked_up = [n for n in gm.graph.nodes if n.target is ENGRAM.expand.default]
        looked_up = looked_up or [
            n for n in gm.graph.nodes if n.target in (KERNELS.gather.default, KERNELS.collect.default)
        ]
        constants = self.values or [torch.randn(value(node).shape) for node in looked_up]
        for number, (node, values) in enumerate(zip(looked_up, constants, strict=True)):
            gm.register_buffer(f"given_{number}", values)
            with gm.graph.inserting_before(node):
                constant = gm.graph.get_attr(f"given_{number}")
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
        gm.graph.eliminate_dead_code(lambda n: n.is_impure() or n.op != "call_function")
        left = (KERNELS.prefetch.default, KERNELS.gather.default, ENGRAM.rows.default, ENGRAM.retrieve.default)
        assert not any(n.target in left for n in gm.graph.nodes)
        return gm


def without_look_ups(values: Sequence[Tensor], usual: Pipeline) -> Pipeline:
    """Return the usual passes with `Given` after those that insert memories."""
    return usual.after("ultramem", Given(values))
