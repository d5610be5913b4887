"""The experiment's second part: the same training with and without a memory of n-grams, and what the memory holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mhc_compile.conversion import convert
from mhc_compile.demo.experiment import Outcome, stage, train_shown
from mhc_compile.demo.output import OutputFolder
from mhc_compile.demo.settings import Settings
from mhc_compile.demo.text import Corpus, held_out_batches
from mhc_compile.gates import gate_values
from mhc_compile.loading import from_pretrained
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import owners
from mhc_compile.trial.training import Contender, contender, renewed

LEAST_SEEN = 4
"""N-grams that the held-out text has more rarely are not listed."""
_SEED_STRIDE = 1000
"""Between the seeds of the repetitions: their batches must not be those of the demo's own phases."""


@dataclass(frozen=True)
class Repetition:
    """One seed: both forms trained on the same batches. Held-out losses batch by batch, without and with the memory."""

    seed: int
    before: tuple[list[float], list[float]]
    after: tuple[list[float], list[float]]

    @property
    def difference(self) -> float:
        """The held-out loss with the memory minus the one without, at the end."""
        return statistics.fmean(self.after[1]) - statistics.fmean(self.after[0])


@dataclass(frozen=True)
class Opened:
    """An n-gram of the held-out text and the gate at its last token."""

    text: str
    gate: float
    """The mean over streams and occurrences."""
    seen: int


@dataclass(frozen=True)
class CacheUse:
    """The table of one layer, read from its file with a cache of rows in front."""

    layer: str
    rows: int
    hot_rows: int
    hit_rate: float


@dataclass(frozen=True)
class MemoryOutcome:
    """Everything that was measured of the memory."""

    repetitions: list[Repetition]
    plain: Contender
    """Of the last seed."""
    memory: Contender
    dense: int
    """Parameters that the memory adds besides its rows."""
    rows: int
    """Parameters in its tables."""
    gates: dict[str, list[Opened]]
    """By layer, the gates that open most first."""
    mapped_change: float
    """The largest change of a held-out batch's loss, relative to it, when rows are read from their file."""
    caches: list[CacheUse]


def run_memory(settings: Settings, out: OutputFolder, console: Console, outcome: Outcome) -> MemoryOutcome:
    """Train the converted model with and without a memory from the folders of the first part, once for every seed."""
    corpus, held_out = outcome.corpus, held_out_batches(outcome.corpus, settings)
    plain, memory = outcome.streams, None
    repetitions: list[Repetition] = []
    for number in range(settings.seeds):
        seed = settings.seed + number * _SEED_STRIDE
        start = _with_memory(out / "residual", corpus, settings, seed)
        plain.model.load_state_dict(from_pretrained(out / "mhc", local_files_only=True).state_dict())
        if memory is None:
            memory = contender("with a memory", start, backend="mhc", inner=settings.inner)
        else:
            memory.model.load_state_dict(start.state_dict())
        plain, memory = (replace(renewed(c), name=n) for c, n in ((plain, "without"), (memory, "with a memory")))
        with stage(console, "Adding a memory: held-out loss without and with it"):
            before = plain.held_out(held_out), memory.held_out(held_out)
        console.print(f"  {statistics.fmean(before[0]):.6f} without, {statistics.fmean(before[1]):.6f} with a memory")
        text = f"Training without and with it, seed {seed}"
        shorter = replace(settings, seed=seed, steps=settings.memory_steps)
        train_shown(console, text, [plain, memory], corpus, shorter, phase=1)
        repetitions.append(Repetition(seed, before, (plain.held_out(held_out), memory.held_out(held_out))))
    assert memory is not None
    with stage(console, "What opens the gates"):
        gates = opened(memory.model, corpus, torch.cat(held_out))
    memory.model.save_pretrained(out / "mhc-memory")  # type: ignore[operator]
    corpus.tokenizer.save_pretrained(out / "mhc-memory")
    with stage(console, "Reading the tables' rows from their files"):
        change, caches = _mapped(out / "mhc-memory", held_out, memory.held_out, settings.hot_rows)
    sizes = [sum(p.numel() for p in c.model.parameters()) for c in (plain, memory)]
    rows = sum(t.rows * t.width for t in _tables(memory.model).values())
    return MemoryOutcome(repetitions, plain, memory, sizes[1] - sizes[0] - rows, rows, gates, change, caches)


def _with_memory(residual: Path, corpus: Corpus, settings: Settings, seed: int) -> nn.Module:
    """Return the residual checkpoint converted, with a memory drawn from `seed`."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(residual, local_files_only=True)
    torch.manual_seed(seed)
    memory = {"engram": settings.memory, "tokenizer": corpus.tokenizer}
    return convert(model, streams=settings.streams, inner="eager", **memory).train()


def opened(model: nn.Module, corpus: Corpus, windows: Tensor) -> dict[str, list[Opened]]:
    """Return the N-grams that `windows` [B, S] hold at least `LEAST_SEEN` times, by layer, widest gate first.

    N is the longest that the memory hashes; the gate is the one at the last of the N tokens.
    """
    order = next(engram.settings.order for p in owners(model).values() if (engram := p.memories.engram) is not None)
    ngrams = windows.unfold(1, order, 1).reshape(-1, order)
    different, which, seen = ngrams.unique(dim=0, return_inverse=True, return_counts=True)
    frequent = (seen >= LEAST_SEEN).nonzero().flatten().tolist()
    gates_of = {}
    for layer, gates in gate_values(model, {"input_ids": windows, "use_cache": False}).items():
        sums = torch.zeros(len(different)).index_add_(0, which, gates.mean(-1)[:, order - 1 :].reshape(-1))
        means = sums / seen
        rows = [Opened(corpus.tokenizer.decode(different[i]), float(means[i]), int(seen[i])) for i in frequent]
        gates_of[layer] = sorted(rows, key=lambda r: -r.gate)
    return gates_of


def _mapped(
    folder: Path, held_out: list[Tensor], in_memory: Callable[[list[Tensor]], list[float]], hot_rows: int
) -> tuple[float, list[CacheUse]]:
    """Run the held-out text once through the model with its tables on disk, a sequence per call."""
    model: Any = from_pretrained(folder, inner="eager", tables="mapped", hot_rows=hot_rows, local_files_only=True)
    with torch.no_grad():
        losses = [
            statistics.fmean(model(input_ids=s, labels=s, use_cache=False).loss.item() for s in batch.split(1))
            for batch in held_out
        ]
    change = max(abs(b - a) / a for a, b in zip(in_memory(held_out), losses, strict=True))
    uses = []
    for layer, table in _tables(model).items():
        assert table.hot is not None
        uses.append(CacheUse(layer, table.rows, table.hot.capacity, table.hot.hit_rate))
    return change, uses


def _tables(model: nn.Module) -> dict[str, MemoryTable]:
    """Return the tables by the paths of the layers that they belong to."""
    tables: dict[str, MemoryTable] = {}
    for path, parameters in owners(model).items():
        engram = parameters.memories.engram
        layers = () if engram is None else engram.paths
        tables |= {f"{path}.{layer}".strip("."): parameters.table(layer) for layer in layers}
    return tables
