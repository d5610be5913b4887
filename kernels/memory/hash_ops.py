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

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.memory import hashing, over_cpp, overencoding, rows_cpp, rows_triton
from mhc_compile.kernels.memory.spec import HashSpec, OverEncodingSpec
from mhc_compile.kernels.triton.launch import interprets

DIALECT = torch.library.Library("engram", "FRAGMENT")
KERNELS = torch.library.Library("engram_kernels", "FRAGMENT")
RUN = {"cpp": rows_cpp.run, "triton": rows_triton.run, "reference": hashing.rows}


@cache
def target(device: str) -> str:
    """Return which target hashes on a type of device (`cpu`, `cuda`, ...)."""
    if (device == "cuda" or (device == "cpu" and interprets())) and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "reference" if device != "cpu" or build.no_compiler() else "cpp"


def prepare(spec: HashSpec | OverEncodingSpec, device: str) -> None:
    """Begin to compile what will hash like `spec` on a type of device, so that the first call does not wait."""
    if target(device) == "cpp":
        over_cpp.start() if isinstance(spec, OverEncodingSpec) else rows_cpp.start(spec)


def _reach(ids: Tensor, mask: Tensor | None, positions: Tensor | None, carried: Tensor | None, eos: int) -> Tensor:
    return hashing.reach(ids, mask, positions, carried, eos)


def _rows(ids: Tensor, reach: Tensor, before: Tensor | None, hash_spec: str) -> Tensor:
    return hashing.rows(ids, reach, before, HashSpec.parse(hash_spec))


def _rows_opaque(ids: Tensor, reach: Tensor, before: Tensor | None, hash_spec: str) -> Tensor:
    return RUN[target(ids.device.type)](ids, reach, before, HashSpec.parse(hash_spec))


def _rows_fake(ids: Tensor, reach: Tensor, before: Tensor | None, hash_spec: str) -> Tensor:  # noqa: ARG001
    return ids.new_empty((*ids.shape, len(HashSpec.parse(hash_spec).moduli)), dtype=torch.int64)


def _over_rows(ids: Tensor, reach: Tensor, before: Tensor | None, spec: str) -> Tensor:
    return overencoding.rows(ids, reach, before, OverEncodingSpec.parse(spec))


def _over_rows_opaque(ids: Tensor, reach: Tensor, before: Tensor | None, spec: str) -> Tensor:
    run = over_cpp.run if target(ids.device.type) == "cpp" else overencoding.rows
    return run(ids, reach, before, OverEncodingSpec.parse(spec))


def _over_rows_fake(ids: Tensor, reach: Tensor, before: Tensor | None, spec: str) -> Tensor:  # noqa: ARG001
    return ids.new_empty((*ids.shape, len(OverEncodingSpec.parse(spec).moduli)), dtype=torch.int64)


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    rows = "rows(Tensor ids, Tensor reach, Tensor? before, str hash_spec) -> Tensor"
    DIALECT.define("reach(Tensor ids, Tensor? mask, Tensor? positions, Tensor? carried, int eos) -> Tensor", tags=tags)
    DIALECT.impl("reach", _reach, "CompositeImplicitAutograd")
    DIALECT.define(rows, tags=tags)
    DIALECT.impl("rows", _rows, "CompositeImplicitAutograd")
    KERNELS.define(rows, tags=tags)
    KERNELS.impl("rows", _rows_opaque, "CompositeExplicitAutograd")
    torch.library.register_fake("engram_kernels::rows", _rows_fake, lib=KERNELS)
    over_rows = "over_rows(Tensor ids, Tensor reach, Tensor? before, str spec) -> Tensor"
    DIALECT.define(over_rows, tags=tags)
    DIALECT.impl("over_rows", _over_rows, "CompositeImplicitAutograd")
    KERNELS.define(over_rows, tags=tags)
    KERNELS.impl("over_rows", _over_rows_opaque, "CompositeExplicitAutograd")
    torch.library.register_fake("engram_kernels::over_rows", _over_rows_fake, lib=KERNELS)


_register()
