"""Memories: hashing against copying, the share of the look-ups in a training step, and gathering rows from anywhere."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import mhc_compile.kernels.memory.hash_ops  # noqa: F401  (registers the ops)
from mhc_compile.bench.contest import Contender, Row, contest, say, show
from mhc_compile.bench.engram_step import run_steps
from mhc_compile.checkpoint.table_files import NAME, open_table, write_files
from mhc_compile.kernels.memory import hashing
from mhc_compile.kernels.memory.settings import MemorySettings, hash_specs
from mhc_compile.kernels.memory.spec import HashSpec
from mhc_compile.memory.tables import MemoryTable

OURS = "mhc-compile"
COPY = "copying inputs and outputs"
IN_MEMORY = "in memory"
_VOCAB = 99_092
"""V' of a tokenizer of 128k ids, compressed."""
_CALLS = 16
"""Different calls that a contender's rounds go through."""


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure all three; print the tables and return all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups: dict[str, Sequence[dict[str, Any]]] = {}
    for preset, tokens in itertools.product(("paper", "v41"), (256,) if quick else (2048, 16384, 65536)):
        title, rows = hash_contest(console, preset, tokens, device, rounds=5 if quick else 51)
        groups[title] = show(console, title, rows)
    title, rows, rates = gather_contest(console, device, quick=quick)
    groups[title] = show(console, title, rows)
    console.print(", ".join(f"{name}: {rate / 1e6:.1f} million rows a second" for name, rate in rates.items()))
    steps, shares = run_steps(console, quick=quick)
    return {"groups": {**groups, **steps}, "rows_a_second": rates, "added_share": shares}


def hash_contest(
    console: Console, preset: str, tokens: int, device: torch.device, rounds: int
) -> tuple[str, list[Row]]:
    """Measure the rows of one layer for sequences of up to 1024 tokens, each into new memory, as copies are."""
    settings = MemorySettings.preset(preset)
    spec = hash_specs(settings, [1], vocab=_VOCAB, fill=0)[0]
    rng = torch.Generator().manual_seed(0)
    length = min(tokens, 1024)
    ids = torch.randint(0, _VOCAB, (tokens // length, length), generator=rng).to(device)
    reach = torch.arange(length, device=device).expand_as(ids).contiguous()
    exact = hashing.rows(ids, reach, None, spec)
    text = str(spec)

    def check(hashes: Tensor) -> float:
        return 0.0 if torch.equal(hashes, exact) else float("inf")

    moved = ids.nbytes + reach.nbytes + exact.nbytes
    contenders = [
        Contender(OURS, lambda: torch.ops.engram_kernels.rows(ids, reach, None, text), moved, check),
        Contender(COPY, lambda: [t.clone() for t in (ids, reach, exact)], 2 * moved, lambda c: check(c[2])),
        Contender("Inductor", _compiled(spec, ids, reach), moved, check),
        Contender("eager", lambda: hashing.rows(ids, reach, None, spec), moved, check),
    ]
    title = f"hashes of {preset} (orders 2..{settings.order}, {settings.heads} heads), {tokens} tokens"
    rows = contest(console, contenders, ours=OURS, device=device, shape=f"{tokens} tokens", rounds=rounds)
    return title, rows


def _compiled(spec: HashSpec, ids: Tensor, reach: Tensor) -> Callable[[], Tensor]:
    program = torch.compile(lambda ids, reach: hashing.rows(ids, reach, None, spec), dynamic=False)
    return lambda: program(ids, reach)


def gather_contest(console: Console, device: torch.device, *, quick: bool) -> tuple[str, list[Row], dict[str, float]]:
    """Measure rows of one table for calls that follow Zipf's law; also return rows per second by contender."""
    rows, width, asked, hot = (4096, 8, 512, 512) if quick else (1 << 20, 80, 16384, 1 << 16)
    calls = zipf_calls(rows, asked, _CALLS, device)
    memory = MemoryTable(rows, width, trainable=False).start(0)
    with tempfile.TemporaryDirectory() as temporary:
        write_files(Path(temporary), NAME, memory)
        mapped, cached = open_table(temporary, verify=True), open_table(temporary, hot_rows=hot)
        tables = {IN_MEMORY: memory.to(device), "mapped": mapped, f"mapped, {hot} hot rows": cached}
        exact = [memory(call) for call in calls]
        moved = asked * (8 + 2 * 4 * width)
        contenders = [_gathering(name, table, calls, exact, moved) for name, table in tables.items()]
        shape = f"{asked} of {rows} rows, width {width}, float32"
        measured = contest(console, contenders, ours=IN_MEMORY, device=device, shape=shape, rounds=7 if quick else 61)
        assert cached.hot is not None
        say(console, f"mapped from {temporary}; of the different rows of a call {cached.hot.hit_rate:.0%} were hot")
    return f"gathering {shape}", measured, {r.name: asked / r.median for r in measured}


def _gathering(name: str, table: MemoryTable, calls: list[Tensor], exact: list[Tensor], moved: int) -> Contender:
    """Return a contender that looks up one call after the other, each compared once before."""
    wrong = sum(not torch.equal(table(call), values) for call, values in zip(calls, exact, strict=True))
    turn = itertools.cycle(calls)
    return Contender(name, lambda: table(next(turn)), moved, lambda _: float(wrong), tolerance=0.0)


def zipf_calls(rows: int, asked: int, count: int, device: torch.device) -> list[Tensor]:
    """Draw `count` calls [asked] of row numbers: the k-th most frequent row has a probability that falls as 1 / k.

    Frequent rows lie anywhere in the table, as hashes do.
    """
    rng = np.random.default_rng(0)
    weights = np.cumsum(1 / np.arange(1, rows + 1))
    ranks = [np.searchsorted(weights, rng.random(asked) * weights[-1]) for _ in range(count)]
    place = rng.permutation(rows)
    return [torch.from_numpy(place[r]).to(device) for r in ranks]
