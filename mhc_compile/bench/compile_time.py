"""How long a native mHC model takes to compile: Hugging Face's DeepSeek-V4, Inductor against the backend `mhc`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mhc_compile.bench.contest import Row, distance, show
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import cache, in_cpp
from mhc_compile.kernels.cpp import build

OURS = "mhc-compile"
_FOLDER = "MHC_COMPILE_CACHE_DIR"


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Compile forward and backward once each, all caches empty; print the table and return the rows."""
    layers = 1 if quick else 4
    torch.manual_seed(0)
    model = deepseek_v4(layers)
    ids = torch.randint(0, model.config.vocab_size, (2, 32))
    expected = model(ids, use_cache=False).logits.detach()
    seconds = {}
    for name, backend in ((OURS, "mhc"), ("Inductor", "inductor")):
        console.print(f"compiling with {name} ...")
        seconds[name], logits = _compile(model, ids, backend)
        error = distance([logits], [expected.double()])
        if not error <= 1e-4:
            raise MHCError("MHC110", f"{name} is off by {error:.3g} of its scale: no figures")
    shape = f"{layers} layers, 20 Sinkhorn iterations, {torch.get_num_threads()} threads"
    rows = [Row(name, "cpu", shape, s, s, s, s / seconds[OURS], None, None, 0.0) for name, s in seconds.items()]
    title = f"torch.compile of DeepSeek-V4, forward and backward, {shape}"
    return {"groups": {title: show(console, title, rows)}}


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
