"""What the passes cost: their share of the whole compile time, and how it grows with depth."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.utils import compilation_time_metrics

from mhc_compile.capture import capture
from mhc_compile.conversion import convert
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.pipeline import TIMED

TOLERANCE = 1e-5


@dataclass(frozen=True)
class PassTime:
    """One depth: seconds of the passes (median and spread of the runs) for one forward graph."""

    layers: int
    nodes: int
    runs: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class CompileTime:
    """One whole `torch.compile` of a training step by Inductor, and the passes within it, in seconds."""

    layers: int
    total: float
    passes: float


def llama(layers: int) -> nn.Module:
    """Return a Llama of `layers` layers with small widths: graphs and compile times depend on depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=256, **sizes))


def _ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def _spent() -> float:
    return float(sum(compilation_time_metrics.get(TIMED, [])))


def pass_time(layers: int, runs: int, *, first_call: bool = False) -> PassTime:
    """Time the passes over the forward graph of a converted Llama, `runs` times, after checking its logits.

    With `first_call` the model is not converted before its first call, which is timed.
    """
    ids = _ids()
    model = llama(layers).eval()
    seconds = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MHC302: converted at its first call
        expected = model(ids).logits
        if not first_call:
            convert(model, streams=4, inner="eager")
        for _ in range(runs):
            torch._dynamo.reset()
            model = llama(layers).eval() if first_call else model
            before = _spent()
            _check(expected, torch.compile(model, backend="mhc", options={"inner": "eager"})(ids).logits)
            seconds.append(_spent() - before)
    torch._dynamo.reset()
    nodes = len(capture(llama(layers).eval(), (ids,), {}).graph.graph.nodes)
    return PassTime(layers, nodes, runs, statistics.median(seconds), min(seconds), max(seconds))


def compile_time(layers: int) -> CompileTime:
    """Compile forward and backward of a converted Llama with Inductor, caches off."""
    torch._dynamo.reset()
    model = llama(layers).train()
    ids = _ids()
    expected = model(ids).logits
    convert(model, streams=4)
    passes, start = _spent(), time.perf_counter()
    with torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(model, backend="mhc")(ids, labels=ids)
        out.loss.backward()
    total = time.perf_counter() - start
    _check(expected, out.logits)
    return CompileTime(layers, total, _spent() - passes)


def _check(expected: torch.Tensor, got: torch.Tensor) -> None:
    error = float((expected - got).detach().abs().max() / expected.detach().abs().max())
    if not error <= TOLERANCE:
        raise MHCError("MHC110", f"the converted model is off by {error:.3g} of its scale: no figures")


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure, print the tables, and return all figures."""
    depths = (2, 4, 8) if quick else (12, 24, 48, 96)
    runs = 3 if quick else 5
    pass_time(depths[0], 1)  # warms imports and caches
    rows = [pass_time(layers, runs) for layers in depths]
    first = pass_time(4 if quick else 24, runs, first_call=True)
    for title, shown in (("forward graph of a converted model", rows), ("first call of an unconverted model", [first])):
        table = Table("layers", "graph nodes", "passes (median)", "spread", "per layer", title=f"passes, {title}")
        for r in shown:
            table.add_row(
                str(r.layers), str(r.nodes), f"{r.median:.3f} s", f"{r.low:.3f} .. {r.high:.3f} s",
                f"{1e3 * r.median / r.layers:.2f} ms",
            )  # fmt: skip
        console.print(table)
    whole = compile_time(2 if quick else 24)
    share = whole.passes / whole.total
    console.print(
        f"torch.compile of a training step, {whole.layers} layers, Inductor: {whole.total:.1f} s, "
        f"of which passes {whole.passes:.2f} s ({share:.1%})"
    )
    return {"passes": [asdict(r) for r in rows], "first_call": asdict(first), "compile": asdict(whole), "share": share}
