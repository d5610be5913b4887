"""Where hand-written hyper-connections may lie in a graph: proposals by structure, for `confirm` to check.

A site reads its n streams X `[..., n, C]` through one projection with a parameter of n*C columns. All that follows from
X and parameters alone is local to the site: the coefficients, the branch input h. What combines local values with one
more value y `[..., C]` that depends on h is the mix, and one of its values is the next X. Names, the order
of operations and the spelling of products do not matter.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.kernels.spec import MAX_STREAMS
from mhc_compile.passes.base import is_tensor, op_name, shape, value
from mhc_compile.passes.dataflow import CASTS, VIEW_OPS, Dataflow, carries_data, storage_root, writes_first_operand

MAX_CANDIDATES = 8
"""Values tried as the next X: partial sums come before it, and what is computed from it after it."""
SIZED = {"view", "reshape", "expand", "broadcast_to"}
"""Operations whose arguments are sizes, tokens included."""
_RESHAPES = (VIEW_OPS | {"repeat_interleave"}) - {"dropout", "getitem", "mark"}
_RANDOM = ("dropout", "rand", "bernoulli", "normal_", "multinomial", "poisson")


@dataclass
class Proposal:
    """A projection of n streams and what is computed from it: a site, or (`branch is None`) a learned exit."""

    streams: Node
    """X `[..., n, C]`."""
    phi: Node
    """The projection's parameter `[rows, n*C]`, or its transpose."""
    projection: Node
    read: Node
    """The branch input, or the reduced stream: `[..., C]`."""
    branch: Node | None = None
    """y `[..., C]`."""
    following: list[Node] = field(default_factory=list)
    """What may be the next streams `[..., n, C]`, in graph order."""

    @property
    def n(self) -> int:
        """The number of streams."""
        return int(shape(self.streams)[-2])

    @property
    def hidden(self) -> int:
        """C."""
        return int(shape(self.streams)[-1])

    @property
    def rows(self) -> int:
        """Outputs of the projection."""
        return math.prod(shape(self.phi)) // (self.n * self.hidden)


@dataclass
class Region:
    """The nodes between `leaves` and `outputs`, in graph order, and the parameters that they read."""

    nodes: list[Node]
    parameters: list[Node]
    numbers: list[Node] = field(default_factory=list)
    """Attributes of the model that Dynamo treats as variables: an eps under `dynamic=True`."""


class NotApart(Exception):
    """Why some values cannot be computed apart from the rest of the graph."""


def proposals(flow: Dataflow) -> Iterator[Proposal]:
    """Yield every projection of n streams whose result is used to read them, in graph order."""
    for node in flow.members(flow.matmuls):
        phi = _phi(flow, node)
        if phi is None:
            continue
        streams = _streams(flow, node, max(shape(phi))), _streams(flow, node, min(shape(phi)))
        nearest = next((s for s in streams if s is not None), None)
        if nearest is not None:
            yield from _proposal(flow, Proposal(nearest, phi, node, nearest))


def _proposal(flow: Dataflow, p: Proposal) -> Iterator[Proposal]:
    tokens = shape(p.streams)[:-2]
    near = local(flow, p.streams, p.projection)
    projected = [n for n in near if flow.depends(n, p.projection)]
    read = next((n for n in projected if is_tensor(n) and shape(n) == (*tokens, p.hidden)), None)
    if read is None:
        return
    p.read = cast_behind(read, value(p.streams).dtype)
    before = {n for n in projected if not flow.depends(n, read)}
    if p.rows > p.n:
        p.branch, p.following = _mix(flow, p, set(near), before)
    yield p


def _phi(flow: Dataflow, node: Node) -> Node | None:
    """Return the one parameter matrix that `node` contracts with."""
    parametric = [n for n in flow.inputs[node] if n in flow.parametric]
    if len(parametric) != 1:
        return None
    leaf = parametric[0]
    while leaf.op not in ("placeholder", "get_attr"):
        above = [n for n in flow.inputs[leaf] if n in flow.parametric]
        if len(above) != 1 or op_name(leaf) not in _RESHAPES:
            return None
        leaf = above[0]
    fits = len(shape(leaf)) == 2 and all(isinstance(d, int) for d in shape(leaf))
    return leaf if fits else None


def _streams(flow: Dataflow, node: Node, size: int) -> Node | None:
    """Return the nearest `[..., n, C]` with n*C = `size` through which passes all that `node` projects."""
    at = flow.dominators.get(node)
    while at is not None and not flow.bit(at) & flow.matmuls:
        if is_tensor(at) and len(shape(at)) >= 3:
            *_, n, hidden = shape(at)
            if isinstance(n, int) and 2 <= n <= MAX_STREAMS and hidden == size // n and n * hidden == size:
                return without_widening(at)
        at = flow.dominators.get(at)
    return None


def without_widening(node: Node) -> Node:
    """Return `node` before casts that lose nothing."""
    while op_name(node) in CASTS and isinstance(node.args[0], Node) and is_tensor(node.args[0]):
        source = node.args[0]
        if torch.promote_types(value(source).dtype, value(node).dtype) != value(node).dtype:
            break
        node = source
    return node


def cast_behind(node: Node, dtype: torch.dtype) -> Node:
    """Return the cast of `node` to `dtype`, where that is all that reads it."""
    users = list(node.users)
    narrows = value(node).dtype != dtype and len(users) == 1 and op_name(users[0]) in CASTS
    return users[0] if narrows and is_tensor(users[0]) and value(users[0]).dtype == dtype else node


def local(flow: Dataflow, streams: Node, projection: Node | None = None) -> list[Node]:
    """Return all values that follow from `streams` and parameters alone, through no layer other than `projection`."""
    values: dict[Node, None] = {streams: None}
    queue = Ahead(flow, [streams])
    for node in queue:
        hot = [n for n in flow.inputs[node] if n in flow.hot]
        layer = node is not projection and bool(flow.bit(node) & flow.matmuls)
        if hot and not layer and all(n in values for n in hot) and is_pure(node):
            values[node] = None
            queue.add(node)
    return [n for n in values if n is not streams]


def _mix(flow: Dataflow, p: Proposal, near: set[Node], before: set[Node]) -> tuple[Node | None, list[Node]]:
    """Return y, and in graph order what may be the next streams."""
    tokens, branch = shape(p.streams)[:-2], None
    mixed: set[Node] = set()
    candidates: list[Node] = []
    queue = Ahead(flow, [p.streams, *before])
    for node in queue:
        if node in near or flow.bit(node) & flow.matmuls or not is_pure(node):
            continue
        hot = [n for n in flow.inputs[node] if n in flow.hot]
        others = [n for n in hot if n is not p.streams and n not in near and n not in mixed]
        if branch is None and not any(n in before for n in hot):
            continue
        branches = {_branch(n, (*tokens, p.hidden)) for n in others}
        if len(branches) > 1 or any(
            y is None or y is not (branch or y) or not flow.depends(y, p.read) for y in branches
        ):
            continue
        branch = branch or next(iter(branches), None)
        mixed.add(node)
        queue.add(node)
        if is_tensor(node) and shape(node) == shape(p.streams):
            candidates.append(node)
            if len(candidates) == MAX_CANDIDATES:
                break
    return branch, candidates


def _branch(node: Node, form: tuple[Any, ...]) -> Node | None:
    """Return the value `[..., C]` that `node` is a view or a cast of."""
    while is_tensor(node) and shape(node) != form:
        if op_name(node) not in _RESHAPES or not node.args or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return without_widening(node) if is_tensor(node) else None


class Ahead:
    """The readers of some nodes, in graph order, each once; readers of nodes added on the way join."""

    def __init__(self, flow: Dataflow, start: list[Node]) -> None:
        self.index = flow.index
        self.seen: set[Node] = set()
        self.heap: list[tuple[int, Node]] = []
        for node in start:
            self.add(node)

    def add(self, node: Node) -> None:
        """Let the readers of `node` join."""
        for user in node.users:
            if user not in self.seen and user.op != "output":
                self.seen.add(user)
                heapq.heappush(self.heap, (self.index[user], user))

    def __iter__(self) -> Iterator[Node]:
        while self.heap:
            yield heapq.heappop(self.heap)[1]


def is_pure(node: Node) -> bool:
    """Return whether the node's result depends on its operands alone, and it changes nothing."""
    if node.op not in ("call_function", "call_method") or not carries_data(node) or writes_first_operand(node):
        return False
    random = any(r in op_name(node) for r in _RANDOM) and not _drops_nothing(node)
    return not isinstance(node.target, torch._ops.HigherOrderOperator) and not random


def _drops_nothing(node: Node) -> bool:
    """Return whether `node` is `dropout` of its operand outside training, or of none of it."""
    if op_name(node) != "dropout":
        return False
    p, training = (node.kwargs.get(k, (*node.args, None, None, None)[i]) for i, k in ((1, "p"), (2, "training")))
    return training is False or bool(p == 0)


def region(flow: Dataflow, outputs: list[Node], leaves: list[Node]) -> Region:
    """Return what computes `outputs` from `leaves`, parameters and constants. Raises `NotApart`."""
    computed: set[Node] = set()
    parameters: set[Node] = set()
    numbers: set[Node] = set()
    stack = [n for n in outputs if n not in leaves]
    while stack:
        node = stack.pop()
        if node in computed or node in parameters:
            continue
        if isinstance(value(node), torch.SymFloat) and value(node).node.hint is not None:
            numbers.add(node)
            continue
        if node in flow.parametric and node.op in ("placeholder", "get_attr"):
            parameters.add(node)
            continue
        if not is_pure(node):
            raise NotApart(f"it reads {node.name}")
        if storage_root(node) in flow.writes:
            raise NotApart(f"{node.name} is written in place")
        computed.add(node)
        sizes = node.all_input_nodes if op_name(node) in SIZED else []
        stack += [n for n in node.all_input_nodes if n not in leaves and (carries_data(n) or n not in sizes)]
    for node in leaves:
        if storage_root(node) in flow.writes:
            raise NotApart(f"{node.name} is written in place")
    order = flow.index.__getitem__
    return Region(*(sorted(nodes, key=order) for nodes in (computed, parameters, numbers)))
