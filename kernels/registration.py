"""Register ops from kernel specifications: opaque to every compiler, with fakes and gradients that are ops again.

    namespace::name(inputs..., spec, ...) -> outputs...
    namespace::name_backward(what the backward reads..., gradients of outputs..., spec, ...) -> gradients of inputs...

An op computes one specification, or several in a row, of which the later read what the earlier write. What computes a
call is chosen by its device (`mhc_compile.kernels.targets`). Gradients of gradients raise NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph

from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Values

Specs = tuple[KernelSpec, ...]
_OPS: dict[str, KernelOp] = {}
_DIRECT: dict[str, Callable[..., Any]] = {}
_PLANS = 256
"""Shapes of which an op keeps what it computed from them."""


@dataclass(frozen=True, kw_only=True)
class KernelOp:
    """One op and what it computes."""

    library: torch.library.Library
    name: str
    prototypes: Specs
    """Specifications with the names of values that those of every call have."""
    specs_of: Callable[[Values, Sequence[Any]], Specs]
    """From a call's tensors by name, fake ones too and those of either direction, and the arguments after them."""
    inputs: tuple[str, ...] = ()
    """In order; by default those of the one prototype."""
    outputs: tuple[str, ...] = ()
    static: tuple[str, ...] = ("str spec",)
    optional: tuple[str, ...] = ()
    """Inputs that may be None."""
    same_gradient: Mapping[str, str] = field(default_factory=dict)
    """Inputs whose gradient is that of an output, which is handed on as it is."""

    @property
    def taken(self) -> tuple[str, ...]:
        """The inputs, in order."""
        return self.inputs or self.prototypes[0].inputs()

    @property
    def given(self) -> tuple[str, ...]:
        """The outputs, in order."""
        return self.outputs or self.prototypes[0].outputs()

    @property
    def kept(self) -> tuple[str, ...]:
        """The inputs and outputs that the backward reads."""
        reads = {name for p in self.prototypes for name in p.inputs("backward")}
        return tuple(name for name in (*self.taken, *self.given) if name in reads)

    @property
    def flows(self) -> tuple[str, ...]:
        """The gradients of outputs that the backward reads."""
        reads = {name for p in self.prototypes for name in p.inputs("backward")}
        return tuple(f"d_{name}" for name in self.given if f"d_{name}" in reads)

    def arguments(self, direction: Direction) -> tuple[str, ...]:
        """Return the names of the tensors that one direction takes."""
        return self.taken if direction == "forward" else (*self.kept, *self.flows)

    def results(self, direction: Direction) -> tuple[str, ...]:
        """Return the names of the tensors that one direction gives."""
        if direction == "forward":
            return self.given
        written = {name for p in self.prototypes for name in p.outputs("backward")}
        return tuple(f"d_{name}" for name in self.taken if f"d_{name}" in written)

    def parse(self, args: Sequence[Any], direction: Direction = "forward") -> tuple[dict[str, Tensor], Specs]:
        """Return a call's tensors by name, and the specifications that it computes."""
        names = self.arguments(direction)
        values = {name: t for name, t in zip(names, args, strict=False) if t is not None}
        return values, self.specs_of(values, args[len(names) :])


def registered(target: object) -> KernelOp | None:
    """Return the op that a graph node's target stands for; None for any other."""
    return _OPS.get(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None


def call_directly(graph: Graph) -> None:
    """Have a graph that records no gradients call what computes its ops without PyTorch's dispatcher."""
    for node in graph.nodes:
        op = registered(node.target)
        if op is not None:
            node.target = _DIRECT[f"{op.library.ns}::{op.name}"]


def _direct(op: KernelOp, kernel: Callable[..., Any]) -> Callable[..., Any]:
    dispatched = getattr(getattr(torch.ops, op.library.ns), op.name)

    def direct(*args: Any) -> Any:
        # A mode, a profiler or gradients, which a part of a graph may switch on, would miss it.
        watched = torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled()
        return dispatched(*args) if watched or torch.is_grad_enabled() else kernel(*args)

    direct.__name__ = direct.__qualname__ = f"{op.library.ns}_{op.name}"
    return direct


def forward_values(specs: Specs, values: Values) -> dict[str, Tensor]:
    """Compute the specifications in a row; return what was given and what they wrote."""
    every = dict(values)
    for spec in specs:
        every |= targets.run(spec, "forward", every)
    return every


def _backward_values(specs: Specs, values: Values) -> dict[str, Tensor]:
    every = dict(values)
    for spec in reversed(specs):
        for name, gradient in targets.run(spec, "backward", every).items():
            every[name] = gradient.add_(every[name]) if name in every else gradient
    return every


def _single(results: Sequence[Tensor]) -> Any:
    return tuple(results) if len(results) > 1 else results[0]


def _kernel(op: KernelOp, direction: Direction) -> Callable[..., Any]:
    compute = forward_values if direction == "forward" else _backward_values

    def kernel(*args: Any) -> Any:
        values, specs = op.parse(args, direction)
        every = compute(specs, values)
        return _single([every[name] for name in op.results(direction)])

    (first, *more), names = op.prototypes, op.arguments(direction)
    if more or op.optional or (names, op.results(direction)) != (first.inputs(direction), first.outputs(direction)):
        return kernel
    count, plans = len(names), dict[Any, targets.Planned]()

    def planned(*args: Any) -> Any:
        tensors = args[:count]
        key = (args[count:], *[(t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors])
        found = plans.get(key)
        if found is not None and targets.may_run(found):
            return _single(found.plan(tensors))
        if len(plans) >= _PLANS:
            plans.clear()
        values, specs = op.parse(args, direction)
        if all(t.is_contiguous() for t in tensors) and (new := targets.planned(specs[0], direction, values)):
            plans[key] = new
        return kernel(*args)

    return planned


def _fake(op: KernelOp, direction: Direction) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        values, specs = op.parse(args, direction)
        like, results = next(iter(values.values())), []
        for name in op.results(direction):
            spec = next(s for s in specs if name in s.outputs(direction))
            results.append(like.new_empty(spec.shape(name, spec.sizes(values)), dtype=spec.dtype(name)))
        return _single(results)

    return fake


def _save(op: KernelOp) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, (tuple, list)) else (output,)
        values = dict(zip((*op.taken, *op.given), (*inputs[: len(op.taken)], *results), strict=True))
        ctx.save_for_backward(*(values[name] for name in op.kept))
        ctx.static = inputs[len(op.taken) :]
        ctx.dtypes = {name: values[name].dtype for name in op.taken if values[name] is not None}

    return save


def _differentiate(op: KernelOp) -> Callable[..., Any]:
    backward = getattr(getattr(torch.ops, op.library.ns), f"{op.name}_backward")

    def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flows = {f"d_{name}": gradient for name, gradient in zip(op.given, gradients, strict=True)}
        written = backward(*ctx.saved_tensors, *(flows[name] for name in op.flows), *ctx.static)
        written = written if isinstance(written, (tuple, list)) else (written,)
        by_name = dict(zip(op.results("backward"), written, strict=True))
        by_name |= {f"d_{name}": flows[f"d_{output}"] for name, output in op.same_gradient.items()}
        each = (by_name.get(f"d_{name}") for name in op.taken)
        cast = (g if g is None else g.to(ctx.dtypes[name]) for name, g in zip(op.taken, each, strict=True))
        return (*cast, *(None,) * len(ctx.static))

    return differentiate


def _no_second_order(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("fused kernels have no second derivative; kernels='none' has PyTorch's")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def register(op: KernelOp) -> None:
    """Define both ops with their fakes and gradients."""
    directions: tuple[tuple[Direction, str], ...] = (("forward", op.name), ("backward", f"{op.name}_backward"))
    for direction, name in directions:
        tensors = (f"Tensor{'?' * (n in op.optional)} {n}" for n in op.arguments(direction))
        count = len(op.results(direction))
        results = f"({', '.join(['Tensor'] * count)})" if count > 1 else "Tensor"
        schema = f"{name}({', '.join([*tensors, *op.static])}) -> {results}"
        op.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel = _kernel(op, direction)
        op.library.impl(name, kernel, "CompositeExplicitAutograd")
        if direction == "forward":
            _DIRECT[f"{op.library.ns}::{name}"] = _direct(op, kernel)
        torch.library.register_fake(f"{op.library.ns}::{name}", _fake(op, direction), lib=op.library)
    forward, backward = (f"{op.library.ns}::{name}" for _, name in directions)
    torch.library.register_autograd(forward, _differentiate(op), setup_context=_save(op), lib=op.library)
    torch.library.register_autograd(backward, _no_second_order, setup_context=_nothing, lib=op.library)
    _OPS[forward] = op
