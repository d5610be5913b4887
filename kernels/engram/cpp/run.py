"""Compile and call the generated C++ by which a memory enters the streams."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.cpp.run import FLOATS
from mhc_compile.kernels.engram.cpp import convolution, tokens
from mhc_compile.kernels.engram.entry import Direction, Entry, Sizes
from mhc_compile.kernels.signature import token_stride


def unsupported(entry: Entry) -> str | None:
    """Why there is no generated C++ for `entry`; None where there is."""
    others = [t for t in entry.dtypes() if t not in FLOATS]
    return f"C++: kernels are for {', '.join(map(str, FLOATS))}, not {others[0]}" if others else None


def source(entry: Entry, direction: Direction) -> str:
    """The generated C++ of one direction for this machine."""
    of = convolution if entry.convolves else tokens
    return (of.forward_source if direction == "forward" else of.backward_source)(entry, build.lanes())


def start(entry: Entry) -> None:
    """Begin to compile both directions, beside whatever else is compiled meanwhile."""
    _library(entry, "forward")
    _library(entry, "backward")


def run(entry: Entry, direction: Direction, values: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Run one direction on `values`, in the order of `entry.arguments`; results by name."""
    out = {name: POOL.empty(entry.shape(name, sizes), entry.dtype(name)) for name in entry.outputs(direction)}
    if not sizes.batch * sizes.tokens:
        return {name: t.zero_() for name, t in out.items()}
    stride = token_stride(values["X"]) if "X" in values else None
    held = [v if k == "X" and stride is not None else v.to(entry.dtype(k)).contiguous() for k, v in values.items()]
    pointers = [t.data_ptr() for t in (*held, *out.values())]
    numbers = [*sizes, entry.streams * entry.width if stride is None else stride]
    getattr(_library(entry, direction).result(), direction)(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_int(torch.get_num_threads()),
    )
    if direction == "backward" and entry.kind == "add" and sizes.before:  # history takes no part in it
        for t in out.values():
            t[:, : sizes.before].zero_()
    return out


@cache
def _library(entry: Entry, direction: Direction) -> Future[Any]:
    return build.begin(f"{entry.name}_{direction}", lambda: source(entry, direction))
