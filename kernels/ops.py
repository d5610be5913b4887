"""The stream ops, registered with `torch.library` on import.

`mhc::*` is the dialect of the graph passes. Its ops are composite: they decompose into the plain PyTorch of
`mhc_compile.kernels.reference` before autograd sees them, with autocast off inside. The sites of other forms than mHC
begin with ops `mhc_forms::*` (`mhc_compile.kernels.form`), among which is the read of models that have attention over
depth of their own (`mhc_compile.kernels.attend`). `mhc_kernels::reference_coefficients` is mHC's with the
Sinkhorn loop as one opaque op (`mhc_compile.kernels.sinkhorn`). `spec` is always `str(StreamSpec)`.

    mhc::expand(x [..., C], streams n) -> [..., n, C]
    mhc::coefficients(streams [..., n, C], phi [rows, n*C], alpha [3], bias [rows], spec) -> pre, post, H
    mhc::aggregate(streams, pre [..., n]) -> [..., C]
    mhc::distribute(streams, branch [..., C], post [..., n], mix [..., n, n]) -> [..., n, C]
    mhc::reduce(streams, spec, fn=None, base=None, scale=None) -> [..., C]
    mhc_forms::attend_normalised(sources, each [..., C], query [Q, C]) -> [..., Q, C]
    mhc::mark(x, params, spec, given, names) -> like x
    mhc::inside(x) -> like x

`mark` shows the backend `mhc` a converted model and is removed by it. Running it raises MHCError MHC301: the model was
compiled by something else, which would silently compute the residual network. `given` is what an owner with a memory
passes of its call, which the JSON `names` describes: masks, positions, carried state, anchors of its tables. `inside`
stands at every module that reads a stream: it is removed where the graph holds its owner's mark; it raises MHC313.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

import mhc_compile.kernels.fused  # noqa: F401  (registers the fused chains)
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import reference
from mhc_compile.kernels.attend import attend_normalised
from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.form import LIBRARY as FORMS
from mhc_compile.kernels.sinkhorn import LIBRARY as KERNELS
from mhc_compile.kernels.sinkhorn import parse_spec
from mhc_compile.kernels.spec import StreamSpec

DIALECT = torch.library.Library("mhc", "DEF")

Three = tuple[Tensor, Tensor, Tensor]


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with autocast off for the device of its first operand."""

    def kernel(streams: Tensor, *arguments: Any) -> Any:
        with without_autocast(streams):
            return function(streams, *arguments)

    return kernel


def _coefficients(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: str) -> Three:
    return reference.coefficients(X, phi, alpha, bias, parse_spec(spec))


def _coefficients_opaque(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: str) -> Three:
    def sinkhorn(logits: Tensor, _: StreamSpec) -> Tensor:
        return torch.ops.mhc_kernels.sinkhorn(logits, spec)

    return reference.coefficients(X, phi, alpha, bias, parse_spec(spec), sinkhorn=sinkhorn)


def _reduce(
    streams: Tensor, spec: str, fn: Tensor | None = None, base: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    head = None if fn is None or base is None or scale is None else (fn, base, scale)
    return reference.reduce(streams, parse_spec(spec), head)


def _attend_normalised(sources: list[Tensor], query: Tensor) -> Tensor:
    with without_autocast(sources[0]):
        return attend_normalised(sources, query)[0]


def _mark(x: Tensor, params: list[Tensor], spec: str, given: list[Tensor], names: str) -> NoReturn:  # noqa: ARG001
    raise MHCError("MHC301", json.loads(spec)["spec"])


def _mark_fake(x: Tensor, params: list[Tensor], spec: str, given: list[Tensor], names: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def _mark_save(ctx: Any, inputs: tuple[Tensor, list[Tensor], str, list[Tensor], str], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1])
    ctx.given = len(inputs[3])


def _mark_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor], None, list[None], None]:
    """Return gradients for tracing alone: the forward raises before any gradient flows."""
    return grad, [torch.zeros_like(p) for p in ctx.saved_tensors], None, [None] * ctx.given, None


def _inside(x: Tensor) -> NoReturn:  # noqa: ARG001
    raise MHCError("MHC313", "compiled by another backend")


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    coefficients = "coefficients(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, str spec)"
    coefficients += " -> (Tensor, Tensor, Tensor)"
    head = "Tensor? fn=None, Tensor? base=None, Tensor? scale=None"
    composite: dict[str, Callable[..., Any]] = {
        "expand(Tensor x, int streams) -> Tensor": reference.expand,
        coefficients: _coefficients,
        "aggregate(Tensor streams, Tensor pre) -> Tensor": reference.aggregate,
        "distribute(Tensor streams, Tensor branch, Tensor post, Tensor mix) -> Tensor": reference.distribute,
        f"reduce(Tensor streams, str spec, {head}) -> Tensor": _reduce,
    }
    for schema, kernel in composite.items():
        DIALECT.define(schema, tags=tags)
        DIALECT.impl(schema.split("(", 1)[0], _apart(kernel), "CompositeImplicitAutograd")
    KERNELS.define(f"reference_{coefficients}", tags=tags)
    KERNELS.impl("reference_coefficients", _apart(_coefficients_opaque), "CompositeImplicitAutograd")

    FORMS.define("attend_normalised(Tensor[] sources, Tensor query) -> Tensor", tags=tags)
    FORMS.impl("attend_normalised", _attend_normalised, "CompositeImplicitAutograd")

    DIALECT.define("mark(Tensor x, Tensor[] params, str spec, Tensor[] given, str names) -> Tensor", tags=tags)
    DIALECT.impl("mark", _mark, "CompositeExplicitAutograd")
    torch.library.register_fake("mhc::mark", _mark_fake, lib=DIALECT)
    torch.library.register_autograd("mhc::mark", _mark_backward, setup_context=_mark_save, lib=DIALECT)

    DIALECT.define("inside(Tensor x) -> Tensor", tags=tags)
    DIALECT.impl("inside", _inside, "CompositeExplicitAutograd")
    torch.library.register_fake("mhc::inside", torch.empty_like, lib=DIALECT)
    torch.library.register_autograd("mhc::inside", lambda _, grad: grad, lib=DIALECT)


_register()
