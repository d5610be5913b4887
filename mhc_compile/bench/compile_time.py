"""How long a training step takes to compile, with streams of its own or given ones: Inductor and the backend `mhc`."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mhc_compile.bench.contest import Row, distance, show
from mhc_compile.bench.step import llama
from mhc_compile.conversion import convert
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import cache, in_cpp
from mhc_compile.kernels.cpp import build

OURS = "mhc-compile"
_FOLDER = "MHC_COMPILE_CACHE_DIR"


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Compile forward and backward, all caches empty; print the tables and return the rows.

    Of a model that has its own streams once, ours and Inductor; of a Llama in turn, with four streams and without.
    """
    torch.manual_seed(0)
    layers, depth, width, rounds = (1, 2, 64, 1) if quick else (4, 12, 768, 3)
    native, residual = deepseek_v4(layers), llama(depth, width)
    streams = convert(copy.deepcopy(residual), streams=4)
    groups = {}
    for title, contenders, count in (
        (f"DeepSeek-V4, {layers} layers, 20 Sinkhorn iterations", {OURS: native, "Inductor": native}, 1),
        (f"a Llama, {depth} layers, C={width}, 4 streams", {OURS: streams, "residual, Inductor": residual}, rounds),
    ):
        title = f"torch.compile of {title}, forward and backward, {torch.get_num_threads()} threads"
        groups[title] = show(console, title, _rows(console, title, contenders, count))
    return {"groups": groups}


def _rows(console: Console, shape: str, models: dict[str, Any], rounds: int) -> list[Row]:
    """Compile each in turn. Raises MHC110 where the logits are not those of the last one, uncompiled."""
    *_, model = models.values()
    ids = torch.randint(0, model.config.vocab_size, (2, 32))
    expected = model(ids, use_cache=False).logits.detach()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for name, model in models.items():
            console.print(f"compiling with {name} ...")
            taken, logits = _compile(model, ids, "mhc" if name == OURS else "inductor")
            seconds[name].append(taken)
            errors[name] = distance([logits], [expected.double()])
            if not errors[name] <= 1e-4:
                raise MHCError("MHC110", f"{name} is off by {errors[name]:.3g} of its scale: no figures")
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return [
        Row(name, "cpu", shape, median[name], min(s), max(s), median[name] / median[OURS], None, None, errors[name])
        for name, s in seconds.items()
    ]


def deepseek_v4(layers: int) -> Any:
    """Return Hugging Face's DeepSeek-V4 with small widths and its own 20 iterations."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        num_hidden_layers=layers, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4, head_dim=16,
        qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=8, o_groups=2, n_routed_experts=4, num_experts_per_tok=2,
        vocab_size=128, index_n_heads=2, index_head_dim=16, index_topk=4, num_hash_layers=0,
        max_position_embeddings=256,
    )  # fmt: skip
    return DeepseekV4ForCausalLM(config).train()


def _compile(model: nn.Module, ids: torch.Tensor, backend: str) -> tuple[float, torch.Tensor]:
    torch._dynamo.reset()
    model.zero_grad()
    with _empty_caches(), torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        out = torch.compile(model, backend=backend)(ids, use_cache=False).logits
        out.square().mean().backward()
        return time.perf_counter() - start, out.detach()


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Compile our own kernels anew, too."""
    cached = (cache.cache_dir, in_cpp.library, build.compiler_problem)
    usual = os.environ.get(_FOLDER)
    with tempfile.TemporaryDirectory() as os.environ[_FOLDER]:
        for function in cached:
            function.cache_clear()
        yield
    del os.environ[_FOLDER]
    if usual is not None:
        os.environ[_FOLDER] = usual
    for function in cached:
        function.cache_clear()
