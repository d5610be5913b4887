"""Check a graph after a pass: recompute metadata instead of trusting it, and hold the dialect to its rules.

A failure here is a bug of this package, not of the user: `VerificationError` names the pass and the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT
from mhc_compile.passes.base import op_name, value

_DIALECT = torch.ops.mhc
_CONTEXT_OPS = ("_set_grad_enabled", "_vmap_increment_nesting")


class VerificationError(AssertionError):
    """A pass broke the graph."""

    def __init__(self, after: str, node: Node, problem: str) -> None:
        super().__init__(f"after pass {after}: {node.format_node()}: {problem}")


def verify(gm: GraphModule, *, whole: bool, after: str) -> None:
    """Propagate fake tensors over nodes without a value, or the `whole` graph; check the dialect's rules.

    Values are recorded in `meta["example_value"]`, where later passes read them.
    """
    mode = _fake_mode(gm)
    if mode is None:
        return
    # Without Python's dispatcher, which Dynamo traces with too, some operations (padding; products in torch 2.11) fix
    # the sizes that are dynamic, and every length of a sequence would be compiled anew.
    with mode, enable_python_dispatcher(), torch.no_grad(), _Autocast() as autocast:
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output") or autocast.switched_by(node):
                continue
            known = value(node)
            namespace = getattr(node.target, "namespace", "")
            if namespace == "mhc" or node.target is torch.ops.mhc_kernels.reference_coefficients.default:
                result = _dialect_value(node, after, known is None)
            elif (
                namespace in ("mhc_kernels", "mhc_forms", "engram", "engram_kernels")
                or (known is None and "mhc_from" in node.meta)
                or (whole and _replayable(node))
            ):
                result = _run(gm, node)
            else:
                continue
            if known is not None and not _same(known, result):
                raise VerificationError(after, node, f"its value was {_form(known)} and is now {_form(result)}")
            if known is None:
                node.meta["example_value"] = result


class _Autocast:
    """The graph's own switches of autocast, obeyed: operations between them are run again under the same rules."""

    def __init__(self) -> None:
        self.entered: dict[Node, Any] = {}

    def __enter__(self) -> _Autocast:
        return self

    def switched_by(self, node: Node) -> bool:
        """Switch autocast if `node` is such a switch; return whether it is."""
        name = op_name(node)
        if name == "_enter_autocast":
            self.entered[node] = _enter_autocast(*node.args)
        elif name == "_exit_autocast":
            assert isinstance(node.args[0], Node)
            _exit_autocast(self.entered.pop(node.args[0]))
        return name in ("_enter_autocast", "_exit_autocast")

    def __exit__(self, *_: object) -> None:
        for mode in reversed(list(self.entered.values())):
            _exit_autocast(mode)


def _fake_mode(gm: GraphModule) -> FakeTensorMode | None:
    for node in gm.graph.nodes:
        mode = getattr(value(node), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


def _replayable(node: Node) -> bool:
    """Return whether running the node again changes nothing else: no mutation, no state, no subgraph."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") or name in _CONTEXT_OPS or isinstance(target, torch._ops.HigherOrderOperator):
        return False
    values = [value(n) for n in (node, *node.all_input_nodes)]
    # Inside vmap the recorded values are wrapped and cannot be computed with again.
    return all(v is not None and not _wrapped(v) for v in values) and isinstance(values[0], torch.Tensor)


def _wrapped(v: Any) -> bool:
    return isinstance(v, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)


def _run(gm: GraphModule, node: Node) -> Any:
    args = torch.fx.map_arg(node.args, value)
    kwargs = torch.fx.map_arg(node.kwargs, value)
    if node.op == "call_method":
        first, *rest = args
        return getattr(first, str(node.target))(*rest, **kwargs)
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


@dataclass(frozen=True)
class _Like:
    """The form of a value, to compare with a recorded value: fake tensors take a millisecond each."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def _dialect_value(node: Node, after: str, new: bool) -> Any:
    """Return the value of a dialect op by its rule, or its form where it is not `new`, and check its operands."""

    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise VerificationError(after, node, problem)

    operands: list[Any] = [value(a) if isinstance(a, Node) else a for a in node.args]
    x = operands[0]
    need(isinstance(x, torch.Tensor) and x.is_floating_point(), "its first operand is no floating-point tensor")

    def make(shape: tuple[Any, ...], dtype: torch.dtype = x.dtype) -> Any:
        return x.new_empty(shape, dtype=dtype) if new else _Like(shape, dtype, x.device)

    name = str(node.target).split(".")[1].removeprefix("reference_")
    wide = max(x.dtype, torch.float32, key=lambda d: d.itemsize)
    if name == "expand":
        return make((*x.shape[:-1], operands[1], x.shape[-1]))
    n, hidden = x.shape[-2:]
    tokens = x.shape[:-2]
    if name == "coefficients":
        spec = StreamSpec.parse(operands[-1])
        need(n == spec.streams, f"{n} streams, specification {spec}")
        parameters = form_of(spec).parameters(spec, 0, hidden, DEFAULT)
        for operand, (name, parameter) in zip(operands[1:-1], parameters.items(), strict=True):
            size = tuple(operand.shape)
            need(size == parameter.shape, f"{name} is {size}, not {parameter.shape}")
        return tuple(make((*tokens, *tail), dtype=wide) for tail in ((n,), (n,), (n, n)))
    if name == "aggregate":
        need(tuple(operands[1].shape) == (*tokens, n) and operands[1].dtype == wide, "`pre` does not fit the streams")
        return make((*tokens, hidden))
    if name == "reduce":
        return make((*tokens, hidden))
    need(name == "distribute", f"unknown dialect op {name}")
    _, y, post, mix = operands
    need(tuple(y.shape) == (*tokens, hidden), f"the branch is {tuple(y.shape)}, the stream {tuple(x.shape)}")
    need(tuple(post.shape) == (*tokens, n), "`post` does not fit the streams")
    need(tuple(mix.shape) == (*tokens, n, n), "`mix` does not fit the streams")
    return make(tuple(x.shape), dtype=torch.promote_types(x.dtype, y.dtype))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, (torch.Tensor, _Like)):
        return a.dtype == b.dtype and a.device == b.device and tuple(a.shape) == tuple(b.shape)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)


def _form(v: Any) -> str:
    return f"{v.dtype}{list(v.shape)} on {v.device}" if isinstance(v, (torch.Tensor, _Like)) else type(v).__name__
