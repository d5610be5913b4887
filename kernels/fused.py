"""The fused chains as ops `mhc_kernels::*`, opaque to every compiler, with fakes and gradients that are ops again.

One op per kind of chain (`mhc_compile.kernels.chain`), its arguments and results in the order of
`Chain.inputs` and `Chain.outputs`, the text of the `StreamSpec` last:

    mhc_kernels::boundary(X, y, post, mix, phi, alpha, bias, spec) -> next_X, h, next_post, next_mix, z
    mhc_kernels::boundary_backward(X, y, post, mix, phi, alpha, bias, z, d_next_X, d_h, ..., spec) -> d_X, d_y, ...

`reduce_head` and `leave_head` are `reduce` and `leave` with a learned head; `read_rms`, `deferred_layer`, ... end with
the branch's norm, take its weight (and bias) after the site's parameters, and its eps after `spec`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, get_args

import torch

from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.chain import NORMED, Chain, Kind, Norm
from mhc_compile.kernels.kernelspec import Values
from mhc_compile.kernels.registration import KernelOp, register
from mhc_compile.kernels.sinkhorn import LIBRARY, parse_spec
from mhc_compile.kernels.spec import StreamSpec


def op_of(chain: Chain) -> str:
    """Return the op's name in `mhc_kernels`: the kind, with `_head` where a learned head weighs the streams."""
    if chain.norm != "none":
        return f"{chain.kind}_{chain.norm}"
    return f"{chain.kind}_head" if chain.weights == "head" else chain.kind


def prototypes() -> dict[str, Chain]:
    """Return one chain per op: every chain of the op has as many values, of the same names."""
    chains = [Chain(kind=kind, stream=StreamSpec(), width=1) for kind in get_args(Kind)]
    head = StreamSpec(exit="head")
    chains += [Chain(kind="reduce", stream=head, width=1), Chain(kind="leave", stream=head, width=1)]
    normed: tuple[tuple[Kind, Norm], ...] = tuple(itertools.product(NORMED, ("rms", "layer")))
    chains += [Chain(kind=kind, stream=StreamSpec(), width=1, norm=norm) for kind, norm in normed]
    return {op_of(chain): chain for chain in chains}


@lru_cache(maxsize=1024)
def _chain(
    prototype: Chain, spec: str, width: int, streams: torch.dtype, branch: torch.dtype, norm_eps: float
) -> Chain:
    return replace(
        prototype, stream=parse_spec(spec), width=width, streams_dtype=streams, branch_dtype=branch, norm_eps=norm_eps
    )


def _specs_of(prototype: Chain, values: Values, static: Sequence[Any]) -> tuple[Chain]:
    X = values["X"]
    branch = values["y"].dtype if "y" in values else X.dtype
    norm_eps = static[1] if len(static) > 1 else 0.0
    return (_chain(prototype, static[0], int(X.shape[-1]), X.dtype, branch, norm_eps),)


@cache
def attend_op(sources: int, *, normalised: bool) -> torch._ops.OpOverload:
    """Return the op `attend_N(s0, s1, ..., query, gain) -> h, z` for N sources, registered at its first use.

    `attend_normalised_N` takes no gain.
    """
    prototype = Attend(sources=sources, width=1, normalised=normalised)
    name = f"attend_{'normalised_' if normalised else ''}{sources}"

    def specs_of(values: Values, static: Sequence[Any]) -> tuple[Attend]:  # noqa: ARG001
        queries = int(values["query"].shape[0]) if normalised else 1
        return (replace(prototype.of_dtypes(values), width=int(values["s0"].shape[-1]), queries=queries),)

    register(KernelOp(library=LIBRARY, name=name, prototypes=(prototype,), specs_of=specs_of, static=()))
    return getattr(torch.ops.mhc_kernels, name).default


def _register() -> None:
    for name, prototype in prototypes().items():
        static = ("str spec",) if prototype.norm == "none" else ("str spec", "float norm_eps")
        specs_of = partial(_specs_of, prototype)
        register(KernelOp(library=LIBRARY, name=name, prototypes=(prototype,), specs_of=specs_of, static=static))


_register()
