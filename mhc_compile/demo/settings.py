"""The sizes of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.overrides import Inner


class DemoError(Exception):
    """The demonstration cannot run here; the text says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, on how much text, and with which compiler."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    length: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in a batch."""
    steps: int
    """Optimizer steps before the conversion, and again after it."""
    text_bytes: int
    """How much of the standard library is read."""
    held_out_batches: int
    sampled_tokens: int
    inner: Inner
    """What compiles both contenders."""
    learning_rate: float
    memory: MemorySettings
    """What is added to the converted model in the second part."""
    memory_steps: int
    """Optimizer steps with and without it."""
    seeds: int
    """Of the second part's repetitions."""
    initializer_range: float
    """Standard deviation of the weights at the start: 1/sqrt(C) suits models this small; transformers has 0.02."""
    hot_rows: int
    """Of each table, kept in memory when it is read from its file."""
    threads: int = 1
    """Of torch. Threads wait for one another at every operation of a model this small, worst on a busy machine."""
    streams: int = 4
    seed: int = 0


def _memory(*layers: int) -> MemorySettings:
    """Return settings for n-grams of two and three tokens, tables of 131,072 rows or a few more."""
    return MemorySettings.preset("paper", heads=4, rows_per_head=16_384, row_width=16, layers=layers)


FULL = Settings(
    layers=4, hidden=128, heads=4, vocabulary=2048, length=128, batch=8, steps=300, text_bytes=6_000_000,
    held_out_batches=16, sampled_tokens=80, inner="inductor", learning_rate=4e-3, memory=_memory(0, 2),
    memory_steps=120, seeds=3, initializer_range=128**-0.5, hot_rows=8192,
)  # fmt: skip
QUICK = Settings(  # of the full demonstration: for tests, benchmarks and examples
    layers=2, hidden=96, heads=3, vocabulary=1024, length=96, batch=8, steps=100, text_bytes=1_500_000,
    held_out_batches=8, sampled_tokens=40, inner="eager", learning_rate=5e-3, memory=_memory(0, 1),
    memory_steps=100, seeds=1, initializer_range=96**-0.5, hot_rows=8192,
)  # fmt: skip
SHORT = Settings(  # of the checkpoint that ships with this package
    layers=6, hidden=80, heads=4, vocabulary=1024, length=96, batch=8, steps=100, text_bytes=2_000_000,
    held_out_batches=12, sampled_tokens=36, inner="eager", learning_rate=8e-3, memory=_memory(0),
    memory_steps=0, seeds=1, initializer_range=80**-0.5, hot_rows=8192,
)  # fmt: skip


def settings_for(*, full: bool, steps: int | None, seed: int, seeds: int | None = None) -> Settings:
    """Return the settings that the command's arguments ask for. Raises MHC204 for `seeds` of the short one."""
    if seeds is not None and not full:
        raise MHCError("MHC204", "--seeds repeats the training with a memory", way_out="add --full")
    chosen = FULL if full else SHORT
    steps = chosen.steps if steps is None else steps
    memory_steps = min(chosen.memory_steps, steps)
    return replace(chosen, seed=seed, steps=steps, memory_steps=memory_steps, seeds=seeds or chosen.seeds)
