"""The fused chains as ops `mhc_kernels::*`, opaque to every compiler, with fakes and gradients that are ops again.

One op a kind of chain (`mhc_compile.kernels.chain`), its arguments and results in the order of
`mhc_compile.kernels.signature`, the text of the `StreamSpec` last:

    mhc_kernels::boundary(X, y, post, mix, phi, alpha, bias, spec) -> next_X, h, next_post, next_mix, z
    mhc_kernels::boundary_backward(X, y, post, mix, phi, alpha, bias, z, d_next_X, d_h, ..., spec) -> d_X, d_y, ...

`reduce_head` and `leave_head` are `reduce` and `leave` with a learned head; `read_rms`, `boundary_layer`, ... end with
the branch's norm, take its weight (and bias) behind the site's parameters, and its eps behind `spec`.
What computes a call is chosen by its device (`mhc_compile.kernels.providers`). Gradients of gradients raise
NotImplementedError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from mhc_compile.kernels import providers, signature
from mhc_compile.kernels.chain import Chain, Kind, Norm
from mhc_compile.kernels.cpp.build import Direction
from mhc_compile.kernels.sinkhorn import LIBRARY, parse_spec
from mhc_compile.kernels.spec import StreamSpec

Op = Callable[..., Any]


def op_of(chain: Chain) -> str:
    """The op's name in `mhc_kernels`: the kind, with `_head` where a learned head weighs the streams."""
    if chain.norm != "none":
        return f"{chain.kind}_{chain.norm}"
    return f"{chain.kind}_head" if chain.weights == "head" else chain.kind


def prototypes() -> dict[str, Chain]:
    """One chain an op: names and number of its values are those of every chain of the op."""
    chains = [Chain(kind=kind, stream=StreamSpec(), width=1) for kind in get_args(Kind)]
    head = StreamSpec(exit="head")
    chains += [Chain(kind="reduce", stream=head, width=1), Chain(kind="leave", stream=head, width=1)]
    normed: tuple[tuple[Kind, Norm], ...] = tuple(itertools.product(("read", "boundary"), ("rms", "layer")))
    chains += [Chain(kind=kind, stream=StreamSpec(), width=1, norm=norm) for kind, norm in normed]
    return {op_of(chain): chain for chain in chains}


@lru_cache(maxsize=1024)
def _chain(
    prototype: Chain, spec: str, width: int, streams: torch.dtype, branch: torch.dtype, norm_eps: float
) -> Chain:
    return replace(
        prototype, stream=parse_spec(spec), width=width, streams_dtype=streams, branch_dtype=branch, norm_eps=norm_eps
    )


def _chain_of(prototype: Chain, values: dict[str, Tensor], static: tuple[Any, ...]) -> Chain:
    """The chain of one call; `static` is what stands behind its tensors."""
    X = values["X"]
    branch = values["y"].dtype if "y" in values else X.dtype
    return _chain(prototype, static[0], int(X.shape[-1]), X.dtype, branch, static[1] if len(static) > 1 else 0.0)


def _names(prototype: Chain, direction: Direction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of an op's tensors: arguments and results."""
    if direction == "forward":
        return signature.inputs(prototype), signature.outputs(prototype)
    given = (*signature.saved(prototype), *(f"d_{g}" for g in signature.gradients_in(prototype)))
    return given, tuple(f"d_{i}" for i in signature.inputs(prototype))


def _single(results: tuple[Tensor, ...]) -> Any:
    return results if len(results) > 1 else results[0]


def _kernel(prototype: Chain, direction: Direction) -> Op:
    names, wanted = _names(prototype, direction)

    def kernel(*args: Any) -> Any:
        values = dict(zip(names, args, strict=False))
        chain = _chain_of(prototype, values, args[len(names) :])
        lead = tuple(values["X"].shape[:-2])
        found = providers.run(chain, direction, values, wanted, lead)
        return _single(tuple(found[name] for name in wanted))

    return kernel


def _fake(prototype: Chain, direction: Direction) -> Op:
    names, wanted = _names(prototype, direction)

    def fake(*args: Any) -> Any:
        values = dict(zip(names, args, strict=False))
        chain = _chain_of(prototype, values, args[len(names) :])
        X = values["X"]
        plain = [name.removeprefix("d_") for name in wanted]
        lead = tuple(X.shape[:-2])
        return _single(
            tuple(X.new_empty(signature.shape(chain, p, lead), dtype=signature.dtype(chain, p)) for p in plain)
        )

    return fake


def _save(prototype: Chain) -> Op:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = len(signature.inputs(prototype))
        tensors, ctx.static = inputs[:count], inputs[count:]
        results = output if isinstance(output, (tuple, list)) else (output,)
        kept = [results[-1]] if prototype.projects else []
        ctx.save_for_backward(*tensors, *kept)
        ctx.dtypes = [t.dtype for t in tensors]

    return save


def _differentiate(name: str, prototype: Chain) -> Op:
    backward = getattr(torch.ops.mhc_kernels, f"{name}_backward")

    def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        taken = gradients[: len(signature.gradients_in(prototype))]  # z has none
        found = backward(*ctx.saved_tensors, *taken, *ctx.static)
        found = found if isinstance(found, (tuple, list)) else (found,)
        given = tuple(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True))
        return given + (None,) * len(ctx.static)

    return differentiate


def _no_second_order(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("fused kernels have no second derivative; mhc_compile.kernels.reference has PyTorch's")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for name, prototype in prototypes().items():
        directions: tuple[Direction, ...] = ("forward", "backward")
        for direction in directions:
            op = name if direction == "forward" else f"{name}_backward"
            given, wanted = _names(prototype, direction)
            static = ["str spec"] if prototype.norm == "none" else ["str spec", "float norm_eps"]
            arguments = ", ".join([*(f"Tensor {g}" for g in given), *static])
            results = f"({', '.join(['Tensor'] * len(wanted))})" if len(wanted) > 1 else "Tensor"
            LIBRARY.define(f"{op}({arguments}) -> {results}", tags=tags)
            LIBRARY.impl(op, _kernel(prototype, direction), "CompositeExplicitAutograd")
            torch.library.register_fake(f"mhc_kernels::{op}", _fake(prototype, direction), lib=LIBRARY)
        torch.library.register_autograd(
            f"mhc_kernels::{name}", _differentiate(name, prototype), setup_context=_save(prototype), lib=LIBRARY
        )
        torch.library.register_autograd(
            f"mhc_kernels::{name}_backward", _no_second_order, setup_context=_nothing, lib=LIBRARY
        )


_register()
