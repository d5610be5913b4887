"""What a chain's kernels take and give, by name: the order of pointers in generated code and of values in the ops.

`T` tokens (all leading dimensions flattened), `n` streams, `C` hidden size, `R` rows of phi. Streams, h and y are in
the chain's dtypes, all else is float32 (float64 where one of them is).

    X [T, n, C]   y [T, C]   post [T, n]   mix [T, n, n]   pre [T, n]   phi [R, n*C]   alpha [3], of a head [1]
    bias [R]   norm_weight, norm_bias [C]
    next_X [T, n, C]   h [T, C]   next_pre, next_post [T, n]   next_mix [T, n, n]
    z [T, R + 1]  phi @ X before the norm, and the sum of squares: all that the backward needs of the coefficients
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mhc_compile.kernels.chain import Chain


def inputs(chain: Chain) -> tuple[str, ...]:
    """The forward's inputs."""
    names = ["X"]
    if chain.mixes:
        names += ["y", "post", "mix"]
    if chain.weights == "given":
        names.append("pre")
    if chain.projects:
        names += ["phi", "alpha", "bias"]
    if chain.norm != "none":
        names.append("norm_weight")
    if chain.norm == "layer":
        names.append("norm_bias")
    return tuple(names)


def outputs(chain: Chain) -> tuple[str, ...]:
    """The forward's outputs; `z` is kept for the backward and has no gradient."""
    names = []
    if chain.keeps_streams:
        names.append("next_X")
    if chain.collapses:
        names.append("h")
    if chain.kind == "coefficients":
        names.append("next_pre")
    if chain.weights == "site":
        names += ["next_post", "next_mix"]
    if chain.projects:
        names.append("z")
    return tuple(names)


def saved(chain: Chain) -> tuple[str, ...]:
    """What the backward reads of the forward's inputs and outputs."""
    return (*inputs(chain), *(("z",) if chain.projects else ()))


def gradients_in(chain: Chain) -> tuple[str, ...]:
    """The outputs whose gradients the backward reads."""
    return tuple(name for name in outputs(chain) if name != "z")


def shape(chain: Chain, name: str, lead: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a value, `lead` being its leading dimensions."""
    n, rows = chain.stream.streams, chain.rows
    by_name: dict[str, tuple[int, ...]] = {
        "X": (*lead, n, chain.width),
        "next_X": (*lead, n, chain.width),
        "y": (*lead, chain.width),
        "h": (*lead, chain.width),
        "pre": (*lead, n),
        "post": (*lead, n),
        "mix": (*lead, n, n),
        "next_pre": (*lead, n),
        "next_post": (*lead, n),
        "next_mix": (*lead, n, n),
        "z": (*lead, rows + 1),
        "phi": (rows, n * chain.width),
        "alpha": (1 if chain.weights == "head" else 3,),
        "bias": (rows,),
        "norm_weight": (chain.width,),
        "norm_bias": (chain.width,),
    }
    return by_name[name]


def dtype(chain: Chain, name: str) -> torch.dtype:
    """The dtype of a value."""
    if name in ("X", "next_X", "h"):
        return chain.streams_dtype
    if name == "y":
        return chain.branch_dtype
    return torch.float64 if torch.float64 in (chain.streams_dtype, chain.branch_dtype) else torch.float32


def token_stride(X: Tensor) -> int | None:
    """Elements from one token's streams to the next, where X `[..., n, C]` has one such step; None where it has not."""
    *lead, n, C = X.shape
    if (C > 1 and X.stride(-1) != 1) or (n > 1 and X.stride(-2) != C):
        return None
    steps = [(size, X.stride(i)) for i, size in enumerate(lead) if size > 1]
    for (_, outer), (size, inner) in itertools.pairwise(steps):
        if outer != size * inner:
            return None
    return steps[-1][1] if steps else n * C
