"""The interface of a pass, what passes share, and where a node came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.memory.memories import NONE, Memories
from mhc_compile.passes.marks import Input
from mhc_compile.passes.results import Block, Coverage, NativeRead, NativeSite, Probed, ResidualStream


@dataclass
class Mark:
    """The parameters of one converted stream owner, as they arrived in a graph (`mhc::mark`)."""

    owner: str
    """Module path of the owner inside this graph, `""` for the root of the graph."""
    spec: str
    """The owner's `StreamSpec` as text."""
    parameters: dict[str, Node]
    """Placeholder (or attribute) node of every stream parameter by name relative to the owner's `mhc` module."""
    inputs: dict[Input, Node] = field(default_factory=dict)
    """Name the inputs of an owner's call, besides parameters, that its look-ups read."""
    memories: Memories = NONE
    """The owner's memories."""
    partial: tuple[frozenset[str], ...] = ()
    """The smaller sets of sites that the owner's graphs in one mode, training or evaluation, hold."""
    skipped: tuple[str, ...] = ()
    """Adds that could be sites and were not chosen: they stay residual."""
    probe: Node | None = None
    """The slot that a sampled step passes for gradients (`mhc_compile.passes.probe`); None in every other step."""
    sites: tuple[str, ...] = ()
    """The owner's sites in the order of the stream, where `parameters` has another."""
    node: Node | None = None
    """The `mhc::mark` itself, which `widen` removes; None where there is none (export, the first call of a model)."""


@dataclass(frozen=True)
class Widened:
    """Describe a stream that `widen` rewrote, for the passes after it."""

    mark: Mark
    stream: ResidualStream
    """Its sites are named as in the mark; `mhc.expand` reads its entry."""
    reads: dict[str, Node]
    """The coefficients of every site by the site's name."""
    inputs: dict[str, Node] = field(default_factory=dict)
    """What the branch of every site reads, where it reads the stream."""
    writes: dict[str, Node] = field(default_factory=dict)
    """The n streams that every site leaves, where the stream has a stream form."""


@dataclass
class Context:
    """Hold what passes hand on besides the graph. `streams` is the result of `residual`, read by all later passes."""

    marks: list[Mark] = field(default_factory=list)
    streams: list[ResidualStream] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    """How many residual adds the streams cover."""
    widened: list[Widened] = field(default_factory=list)
    """The streams that `widen` rewrote, with their marks, in graph order."""
    native: list[NativeSite] = field(default_factory=list)
    """The hand-written sites that the pass `native` lifted, in graph order."""
    native_reads: list[NativeRead] = field(default_factory=list)
    """The hand-written reads by attention over depth that the pass `native` lifted, in graph order."""
    blocks: list[Block] = field(default_factory=list)
    """The blocks that the pass `recompute` tagged, in graph order."""
    probed: list[Probed] = field(default_factory=list)
    """What the pass `probe` records, by owner."""
    cut: int = 0
    """Hand-written sites of which the graph holds only the beginning."""
    inputs: list[object] = field(default_factory=list)
    """Real values for the graph's placeholders, stream parameters at their start, when `debug="numeric"` needs them."""
    notes: list[str] = field(default_factory=list)
    """One line each: what a pass decided and why, shown by `inspect` and in the debug log."""


class Pass(Protocol):
    """One rewriting or analysing step. Options are dataclass fields; `requires` and `provides` declare the order."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    provides: ClassVar[tuple[str, ...]]

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` (a private copy) or fill in `context`; raise `MHCError` to refuse the whole graph."""
        ...


def module_stack(node: Node) -> list[str]:
    """Return the module paths around `node` from the graph's root (`""`) to the innermost module."""
    return [path for _, path in module_calls(node)]


def module_calls(node: Node) -> list[tuple[str, str]]:
    """Return what `module_stack` returns, each path after a key that tells the calls of one module apart."""
    stack = node.meta.get("nn_module_stack") or {}
    return [("", ""), *((key, path) for key, (path, _) in stack.items() if path)]


def module_path(node: Node) -> str:
    """Return the innermost module path of `node`, `""` for the root."""
    return module_stack(node)[-1]


def site_path(node: Node) -> str:
    """Return the full name of a dialect node's site: `model.layers.3#0`, its module's path and the ordinal there."""
    return f"{module_path(node)}#{str(node.meta.get('mhc_site', '')).rpartition('#')[2]}"


def source_line(node: Node) -> str | None:
    """Return `file:line, in function: text` of the user's line that created `node`, if Dynamo recorded one."""
    lines = [ln.strip() for ln in (node.meta.get("stack_trace") or "").splitlines() if ln.strip()]
    for i in reversed(range(len(lines))):
        if where := re.match(r'File "(.*)", line (\d+), in (.*)', lines[i]):
            # After the line itself, newer Pythons mark with carets which part of it is meant.
            return ": ".join([f"{where[1]}:{where[2]}, in {where[3]}", *lines[i + 1 : i + 2]])
    return lines[-1] if lines else None


def refuse(code: str, detail: str, node: Node | None = None) -> MHCError:
    """Return the coded error for `node`, with its module path and source line filled in."""
    if node is None:
        return MHCError(code, detail)
    return MHCError(
        code,
        detail,
        node=node.format_node() or node.name,
        module=module_path(node) or "(root)",
        source=source_line(node),
    )


def value(node: Node) -> Any:
    """Return the fake value that Dynamo (`example_value`) or export (`val`) recorded for `node`, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_tensor(node: object) -> bool:
    """Return whether `node` is a graph node whose value is one tensor."""
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def shape(node: Node) -> tuple[Any, ...]:
    """Return the shape of a tensor node: integers, and symbolic expressions for dynamic sizes.

    Expressions, because comparing two `SymInt`s would add a guard to the graph being compiled.
    """
    return tuple(d if isinstance(d, int) else d.node.expr for d in value(node).shape)


def same_shape(a: Node, b: Node) -> bool:
    """Return whether two tensors that meet in an element-wise operation have the same sizes.

    Dynamic sizes may be equal by a guard that their expressions do not show: of `4 * (S // 4)` and `S`, added to each
    other. So two of them are compared by the sizes of the inputs at hand, without adding a guard.
    """
    if len(shape(a)) != len(shape(b)):
        return False
    sizes = zip(shape(a), shape(b), value(a).shape, value(b).shape, strict=True)
    return all(bool(one == other) or _same_hint(m, n) for one, other, m, n in sizes)


def _same_hint(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    if isinstance(m, int) or isinstance(n, int):
        return False
    return m.node.hint is not None and bool(m.node.hint == n.node.hint)


def op_name(node: Node) -> str:
    """Return the operation's plain name, however it is spelt: `add` for `x + y`, `torch.add(x, y)` and `x.add(y)`."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def call_nodes(gm: GraphModule) -> Iterator[Node]:
    """Yield the nodes that compute something, in order."""
    return (n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module"))


def erase_unused(gm: GraphModule) -> None:
    """Erase nodes of ours that nothing reads.

    FX's own dead-code elimination takes in-place methods (`scatter_`, `index_add_`) for pure and drops them.
    """
    for node in reversed(gm.graph.nodes):
        writes = node.op == "call_method" and str(node.target).endswith("_")
        if not node.users and not writes and (node.op == "get_attr" or "mhc_from" in node.meta):
            gm.graph.erase_node(node)


def copy_meta(new: Node, old: Node) -> Node:
    """Give `new` the provenance of `old`: module stack, source line, recompute tags."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id", "custom"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta.setdefault("mhc_from", old.name)
    return new


def switches_gradients(node: Node) -> bool:
    """Return whether `node` turns gradients on or off for what follows it."""
    return node.op == "call_function" and op_name(node) == "_set_grad_enabled"


def gradient_modes(graph: Graph) -> dict[Node, object]:
    """Return whether gradients are on at each node.

    `with` blocks restore the mode that they found, so the last switch tells the mode of the first nodes.
    """
    on = next((n.args[0] for n in reversed(graph.nodes) if switches_gradients(n)), None)
    modes = {}
    for node in graph.nodes:
        on = node.args[0] if switches_gradients(node) else on
        modes[node] = on
    return modes


KERNELS_OF = "mhc_kernels"
"""Key of a node's metadata: the specifications of the kernels that it calls, in order."""


def kernels_of(node: Node) -> tuple[KernelSpec, ...]:
    """Return the specifications of the kernels that a node calls, in order; none where it calls no fused kernel."""
    specs: tuple[KernelSpec, ...] = node.meta.get(KERNELS_OF, ())
    return specs


def device_of(X: Node) -> str:
    """Return the type of device whose kernels compute on X; for a `meta` model, that of this machine."""
    device = str(value(X).device.type)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "meta" else device
