"""Call generated Triton on tensors of a GPU, or under `TRITON_INTERPRET=1` on those of a CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels import signature
from mhc_compile.kernels.chain import Chain, dtypes_against
from mhc_compile.kernels.triton import norm
from mhc_compile.kernels.triton.blocks import MAX_SPLITS, Blocks, autotunes, candidates, default, fastest
from mhc_compile.kernels.triton.build import Direction, Kernel, load, pointers, precision, source

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(chain: Chain) -> str | None:
    """Why there is no generated Triton for `chain`; None where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if reason := dtypes_against(chain, FLOATS):
        return f"Triton: {reason}"
    if chain.weights == "site":
        spec = chain.stream
        if spec.manifold not in ("sinkhorn", "identity", "unconstrained"):
            return f"no Triton kernel for the manifold {spec.manifold}"
        if spec.manifold == "sinkhorn" and spec.iterations < 1:
            return "no Triton kernel without a Sinkhorn iteration"
    if chain.norm != "none" and chain.kind not in ("read", "boundary"):
        return f"no Triton kernel for {chain.kind} with a norm"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "Triton kernels are for GPUs of compute capability 8.0 and later"
    return None


def interprets() -> bool:
    """Whether Triton runs on the CPU here: `TRITON_INTERPRET=1` was set before it was imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None


def run(
    chain: Chain, direction: Direction, values: Mapping[str, Tensor], wanted: tuple[str, ...], lead: tuple[int, ...]
) -> dict[str, Tensor]:
    """Run one direction on `values` and return the `wanted` outputs by name.

    Any strides and leading dimensions. Raises what Triton raises where it cannot compile or launch.
    """
    like = values["X"]
    out = {
        name: like.new_empty(signature.shape(chain, plain, lead), dtype=signature.dtype(chain, plain))
        for name in wanted
        for plain in [name.removeprefix("d_")]
    }
    tokens = math.prod(lead)
    if not tokens:
        return {name: t.zero_() for name, t in out.items()}
    held = {name: t if name == "X" else _plain(chain, name, t) for name, t in values.items()}
    stride = signature.token_stride(like)
    if stride is None:
        held["X"], stride = like.contiguous(), chain.stream.streams * chain.width
    if direction == "forward":
        _launch(chain, "forward", {**held, **out}, tokens, {"x_stride": stride})
        return out
    return _backward(chain, held, out, tokens, stride)


def _plain(chain: Chain, name: str, value: Tensor) -> Tensor:
    return value.to(signature.dtype(chain, name.removeprefix("d_"))).contiguous()


def _backward(
    chain: Chain, held: dict[str, Tensor], out: dict[str, Tensor], tokens: int, stride: int
) -> dict[str, Tensor]:
    values, numbers = {**held, **out}, {"x_stride": stride}
    if not chain.projects:
        _launch(chain, "backward", values, tokens, numbers)
        return out
    n, rows, like = chain.stream.streams, chain.rows, held["z"]
    values["dlogits"], values["du"] = like.new_empty(tokens, rows), like.new_empty(tokens, rows)
    values |= _sums(chain, values, tokens, _blocks(chain, "backward", values, tokens, numbers))
    _launch(chain, "backward", values, tokens, numbers)
    biases, per_row = values["sums"].sum(0)
    out["d_bias"].copy_(biases)
    groups = (per_row,) if chain.weights == "head" else (per_row[:n], per_row[n : 2 * n], per_row[2 * n :])
    out["d_alpha"].copy_(torch.stack([group.sum() for group in groups]))
    if chain.norm != "none":
        for name, gradient in zip(("d_norm_weight", "d_norm_bias"), values["norm_sums"].sum(0), strict=False):
            out[name].copy_(gradient)
    # Each program adds up a fixed range of tokens; the ranges' sums are added in one order.
    step = default(chain, "phi_gradient", _arch(like.device)).tokens * 16
    splits = min(MAX_SPLITS, -(-tokens // step))
    per_split = -(-tokens // (splits * step)) * step
    splits = -(-tokens // per_split)
    values["partial"] = like.new_empty(splits, rows, n * chain.width)
    _launch(chain, "phi_gradient", values, tokens, {"per_split": per_split, **numbers})
    torch.sum(values["partial"], 0, out=out["d_phi"])
    return out


def _sums(chain: Chain, values: dict[str, Tensor], tokens: int, blocks: Blocks) -> dict[str, Tensor]:
    """What each block of tokens adds to the gradients of the parameters but phi; the rows are added in their order."""
    like, programs = values["z"], -(-tokens // blocks.tokens)
    sums = {"sums": like.new_empty(programs, 2, chain.rows)}
    if chain.norm != "none":
        sums["norm_sums"] = like.new_empty(programs, norm.gradients(chain), chain.width)
    return sums


def _launch(chain: Chain, kernel: Kernel, values: dict[str, Tensor], tokens: int, numbers: dict[str, int]) -> None:
    _start(chain, kernel, values, tokens, numbers, _blocks(chain, kernel, values, tokens, numbers))


def _start(
    chain: Chain, kernel: Kernel, values: dict[str, Tensor], tokens: int, numbers: dict[str, int], blocks: Blocks
) -> None:
    fn = getattr(load(chain, "forward" if kernel == "forward" else "backward"), kernel)
    if kernel == "phi_gradient":
        grid = (-(-chain.width // blocks.columns), values["partial"].shape[0])
    else:
        grid = (-(-tokens // blocks.tokens), 1)
    device = values["X"].device
    options: dict[str, Any] = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    if device.type == "cpu":  # the interpreter
        options = {}
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        fn[grid](
            *(values[name] for name in pointers(chain, kernel)),
            tokens=tokens,
            **numbers,
            BT=blocks.tokens,
            BK=blocks.columns,
            PRECISION=precision(chain, kernel, "cuda" if device.type == "cuda" and not torch.version.hip else "other"),
            **options,
        )


_MEASURED: dict[tuple[Chain, Kernel, str], Blocks] = {}


def _blocks(chain: Chain, kernel: Kernel, values: dict[str, Tensor], tokens: int, numbers: dict[str, int]) -> Blocks:
    device = values["X"].device
    if not autotunes() or device.type != "cuda":
        return default(chain, kernel, _arch(device))
    key = (chain, kernel, torch.cuda.get_device_name(device))
    if key not in _MEASURED:
        _MEASURED[key] = _measure(chain, kernel, key[2], values, tokens, numbers)
    return _MEASURED[key]


@cache
def _arch(device: torch.device) -> int | str:
    if device.type != "cuda":  # the interpreter: any will do
        return 90
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _measure(
    chain: Chain, kernel: Kernel, device: str, values: dict[str, Tensor], tokens: int, numbers: dict[str, int]
) -> Blocks:
    from triton.testing import do_bench

    text = source(chain, "forward" if kernel == "forward" else "backward")
    key = hashlib.sha256(f"{text}\n{device}".encode()).hexdigest()[:16]

    def milliseconds(blocks: Blocks) -> float:
        own = {**values, **(_sums(chain, values, tokens, blocks) if kernel == "backward" and chain.projects else {})}
        return float(do_bench(lambda: _start(chain, kernel, own, tokens, numbers, blocks)))

    return fastest(f"{chain.name}_{kernel}_{key}", candidates(chain, kernel, _arch(values["X"].device)), milliseconds)
