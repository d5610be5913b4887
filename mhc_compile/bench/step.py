"""A whole training step: a residual Llama under Inductor, and the same with four streams, converted or emitted."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mhc_compile.bench.contest import Contender, contest, show
from mhc_compile.conversion import convert
from mhc_compile.emitting import emit
from mhc_compile.emitting.file import load

RESIDUAL, OURS = "residual", "mHC, mhc-compile"


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure forward, backward and optimizer, compiled and in plain calls; print the tables and return all rows."""
    base, ids, shape = subject(quick=quick)
    with torch.no_grad():
        expected = base(ids, labels=ids, use_cache=False).loss.double()
    groups, overhead = {}, {}
    # One after the other: each contender holds a model of its own.
    for how, contenders in (("", _compiled), (" in plain calls", _plain)):
        able = contenders(base, ids)
        for c in able:
            c.check = lambda loss: float((loss.double() - expected).abs() / expected)
            c.tolerance = 1e-4 if base.dtype == torch.float32 else 2e-2
        rows = contest(console, able, ours=OURS, device=ids.device, shape=shape, rounds=2 if quick else 5)
        del able, c
        title = f"training step{how}, {shape}"
        groups[title] = show(console, title, rows)
        times = {r.name: r.median for r in rows}
        overhead[how] = times[OURS] / times[RESIDUAL] - 1
        console.print(f"four streams add {overhead[how]:+.1%} to the step{how}")
    compiled, plain = overhead.values()
    parameters = sum(p.numel() for p in base.parameters())
    return {"groups": groups, "overhead": compiled, "overhead_plain": plain, "parameters": parameters}


def _compiled(base: Any, ids: Tensor) -> list[Contender]:
    contenders = [Contender(RESIDUAL, training(torch.compile(copy.deepcopy(base)), ids))]
    for name, kernels in ((OURS, "auto"), ("mHC, no fused kernels", "none")):
        model = convert(copy.deepcopy(base), streams=4)
        compiled = torch.compile(model, backend="mhc", options={"kernels": kernels})
        contenders.append(Contender(name, training(compiled, ids)))
    model = emitted(copy.deepcopy(base))
    for name, compiled in (
        ("emitted source, mhc-compile", torch.compile(model, backend="mhc")),
        ("emitted source, Inductor", torch.compile(copy.deepcopy(model))),
    ):
        contenders.append(Contender(name, training(compiled, ids)))
    return contenders


def _plain(base: Any, ids: Tensor) -> list[Contender]:
    models = {RESIDUAL: copy.deepcopy(base), OURS: convert(copy.deepcopy(base), streams=4)}
    return [Contender(name, training(model, ids)) for name, model in models.items()]


def subject(*, quick: bool, device: torch.device | None = None) -> tuple[Any, Tensor, str]:
    """Return a Llama of the size that this machine measures, ids for it, and both in words."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers, width, batch, length = (2, 64, 2, 16) if quick else (12, 768, 4, 512)
    dtype = torch.float32
    if device.type == "cuda" and not quick:
        layers, width, batch, length, dtype = 12, 4096, 4, 2048, torch.bfloat16
    torch.manual_seed(0)
    model = llama(layers, width).to(device, dtype)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    return model, ids, f"{layers} layers, C={width}, {batch} x {length} tokens, {str(dtype).removeprefix('torch.')}"


def llama(layers: int, width: int) -> Any:
    """Return a Llama of usual proportions with a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=width * 8 // 3 // 16 * 16,
            num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), vocab_size=8192,
        )
    ).train()  # fmt: skip


def emitted(model: Any) -> Any:
    """Give a Llama the classes of its emitted source, which a smaller one has, too."""
    with tempfile.TemporaryDirectory() as folder:
        module = load(emit(llama(2, 64), Path(folder) / "mhc_bench_emitted.py", streams=4))
    sys.modules[module.__name__] = module  # where Dynamo looks for it
    return module.add_streams(model)


def training(model: nn.Module | Callable[..., Any], ids: Tensor) -> Callable[[], Tensor]:
    """Return a step: forward, backward, AdamW at a learning rate of zero, so that all compute the same loss."""
    assert isinstance(model, nn.Module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def step() -> Tensor:
        loss: Tensor = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
