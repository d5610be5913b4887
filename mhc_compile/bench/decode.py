"""Generating with a Llama, residual and with four streams: the first token, and each one after it, by batch size."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mhc_compile.bench.contest import distance
from mhc_compile.bench.step import llama
from mhc_compile.conversion import convert
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import targets

WIDTH, PROMPT, TOKENS, ROUNDS = 512, 32, 24, 9
BATCHES, LAYERS, PROCESSES = (1, 4, 16), (2, 8), 3
_FOLDER = "MHC_COMPILE_CACHE_DIR"


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure in processes of their own; print the tables and return their rows.

    The first token is that of a new process, with an empty cache of kernels and with a full one. A token after it is
    the median over processes of medians of alternating runs, in processor time as well: others may use the machine.
    """
    layers, processes = (LAYERS[:1], 1) if quick else (LAYERS, PROCESSES)
    first: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in layers:
            # A cold process waits for no kernel, so that what it began is finished by another one.
            for cache in ("cold", "filling", "warm"):
                first.setdefault(f"{count} layers, {cache}", []).append(_process("first", count, f"{folder}/{count}"))
    rows = [{"what": what, **_medians(found)} for what, found in first.items() if "filling" not in what]
    _print(console, "first token, seconds", rows)
    found = [_process("decode", layers[-1], os.environ.get(_FOLDER)) for _ in range(processes)]
    decoded = [{"what": f"batch {batch}", **_medians([of[batch] for of in found])} for batch in found[0]]
    _print(console, f"a token, {layers[-1]} layers, C={WIDTH}, median of {processes} processes", decoded)
    return {"first": rows, "decode": decoded}


def _medians(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def _print(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def _process(what: str, layers: int, folder: str | None) -> dict[str, Any]:
    """Measure in a new process with its kernels in `folder`. Raises what it raised, MHC110 for a wrong result."""
    command = [sys.executable, "-m", __name__, what, str(layers), str(torch.get_num_threads())]
    environment = {**os.environ, **({} if folder is None else {_FOLDER: folder})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MHCError("MHC110", done.stderr.strip().splitlines()[-1])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _models(layers: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    residual = llama(layers, WIDTH).eval()
    return residual, convert(copy.deepcopy(residual), streams=4)


def _prompt(model: Any, batch: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, PROMPT))


def _generate(model: Any, ids: Tensor, count: int) -> tuple[float, float]:
    """Return the seconds and the processor's seconds that `count` tokens take."""
    mask = torch.ones_like(ids)
    wall, used = time.perf_counter(), time.process_time()
    model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return time.perf_counter() - wall, time.process_time() - used


def _check(residual: Any, streams: Any, ids: Tensor) -> None:
    """Raise MHC110 where the logits are not the residual model's: conversion preserves the function."""
    with torch.no_grad():
        error = distance([streams(ids, use_cache=False).logits], [residual(ids, use_cache=False).logits.double()])
    if not error <= 1e-4:
        raise MHCError("MHC110", f"the logits are off by {error:.3g} of their scale: no figures")


def first(layers: int) -> dict[str, float]:
    """Return what the first token takes; the residual model goes first, and so pays for what both load."""
    residual, streams = _models(layers)
    ids = _prompt(residual, 1)
    plain, (wall, used) = _generate(residual, ids, 1), _generate(streams, ids, 1)
    again = _generate(streams, _prompt(residual, 1)[:, :20], 1)
    _check(residual, streams, ids)
    targets.wait()  # a process that ends would leave its kernels half compiled
    return {"residual": plain[0], "mHC": wall, "mHC, processor": used, "mHC, another length": again[0]}


def decode(layers: int) -> dict[str, dict[str, float]]:
    """Return by batch size what each token takes, in milliseconds, and the ratios."""
    residual, streams = _models(layers)
    _check(residual, streams, _prompt(residual, 2))
    found = {}
    for batch in BATCHES:
        ids = _prompt(residual, batch)
        for model in (residual, streams):
            _generate(model, ids, 3)
        targets.wait()
        runs = [(_generate(residual, ids, TOKENS), _generate(streams, ids, TOKENS)) for _ in range(ROUNDS)]
        plain, ours = (1e3 * statistics.median(pair[i][0] for pair in runs) / TOKENS for i in (0, 1))
        wall, used = (statistics.median(b[kind] / a[kind] for a, b in runs) for kind in (0, 1))
        found[str(batch)] = {"residual, ms": plain, "mHC, ms": ours, "ratio": wall, "ratio of processor time": used}
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps({"first": first, "decode": decode}[sys.argv[1]](int(sys.argv[2]))))
