"""The hashing ops, registered with `torch.library` on import. `hash_spec` is always `str(HashSpec)`.

    engram::reach(ids [B, S], mask [B, T >= S]?, positions [B or 1, S]?, carried [B]?, eos) -> [B, S] int64
    engram::rows(ids [B, S], reach [B, S], before [B, N - 1]?, hash_spec) -> [B, S, H] int64
    engram::over_rows(ids [B, S], reach [B, S], before [B, n - 1]?, spec) -> [B, S, H] int64
    engram_kernels::rows(ids, reach, before, hash_spec)
    engram_kernels::over_rows(ids, reach, before, spec)

Those of `engram` are composite: they decompose into the plain PyTorch of `mhc_compile.kernels.memory.hashing` and
`overencoding`, whose `spec` is `str(OverEncodingSpec)`. Those of `engram_kernels` are opaque to every compiler: C++ on
a CPU, for `rows` Triton on a GPU, plain PyTorch elsewhere. No gradients. Spec texts that cannot be read raise
`MHCError` MHC220.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.memory import hashing, over_cpp, overencoding, rows_cpp, rows_triton
from mhc_compile.kernels.memory.spec import HashSpec, OverEncodingSpec
from mhc_compile.kernels.triton.launch import interprets

DIALECT = torch.library.Library("engram", "FRAGMENT")
KERNELS = torch.library.Library("engram_kernels", "FRAGMENT")
RUN = {"cpp": rows_cpp.run, "triton": rows_triton.run, "reference": hashing.rows}
RUN_OVER = {"cpp": over_cpp.run, "reference": overencoding.rows}
TAGS = (torch.Tag.pt2_compliant_tag,)


@cache
def target(device: str) -> str:
    """Return which target hashes on a type of device (`cpu`, `cuda`, ...)."""
    if (device == "cuda" or (device == "cpu" and interprets())) and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "reference" if device != "cpu" or build.no_compiler() else "cpp"


def prepare(spec: HashSpec | OverEncodingSpec, device: str) -> bool:
    """Begin to compile what hashes like `spec` on a type of device; return whether there is nothing to wait for."""
    if target(device) != "cpp":
        return True
    return (over_cpp.library() if isinstance(spec, OverEncodingSpec) else rows_cpp.library(spec)).done()


def _register(name: str, argument: str, kind: type[HashSpec | OverEncodingSpec], runs: dict[str, Any]) -> None:
    """Register the op `name` in both libraries; `argument` is the text of a `kind`, `runs` are the targets."""

    def composite(ids: Tensor, reach: Tensor, before: Tensor | None, text: str) -> Tensor:
        return runs["reference"](ids, reach, before, kind.parse(text))

    def opaque(ids: Tensor, reach: Tensor, before: Tensor | None, text: str) -> Tensor:
        spec, device = kind.parse(text), ids.device.type
        # The numbers are the same: no call waits for a compiler.
        run = runs.get(target(device), runs["reference"]) if prepare(spec, device) else runs["reference"]
        return run(ids, reach, before, spec)

    def fake(ids: Tensor, reach: Tensor, before: Tensor | None, text: str) -> Tensor:  # noqa: ARG001
        return ids.new_empty((*ids.shape, len(kind.parse(text).moduli)), dtype=torch.int64)

    for library in (DIALECT, KERNELS):
        library.define(f"{name}(Tensor ids, Tensor reach, Tensor? before, str {argument}) -> Tensor", tags=TAGS)
    DIALECT.impl(name, composite, "CompositeImplicitAutograd")
    KERNELS.impl(name, opaque, "CompositeExplicitAutograd")
    torch.library.register_fake(f"engram_kernels::{name}", fake, lib=KERNELS)


DIALECT.define("reach(Tensor ids, Tensor? mask, Tensor? positions, Tensor? carried, int eos) -> Tensor", tags=TAGS)
DIALECT.impl("reach", hashing.reach, "CompositeImplicitAutograd")
_register("rows", "hash_spec", HashSpec, RUN)
_register("over_rows", "spec", OverEncodingSpec, RUN_OVER)
