"""Record what the streams do, in the steps that `mhc_compile.probes` samples, without changing the results.

    streams', branch' = watch(streams, branch, slot)      before every mix; their gradients go to the slot
    figures, composite = mhc_probes.site(...)             after it
    counts = mhc_probes.gates(...)                        of every memory
    rows                                                  the numbers of those that every look-up reads

In a depth form, what a site reads is watched where it is read, and the site's output where it is computed, with

    figures = mhc_probes.depth(...)                       after it

It runs after `lower` and reads what the kernels return anyway, so that a sampled graph has the kernels of a plain one;
what they do not return is computed besides. The figures become further results of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

import mhc_compile.kernels.memory.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.forms import READS
from mhc_compile.kernels.probe_ops import watch, watch_one
from mhc_compile.passes.base import Context, Mark, kernels_of, op_name, value
from mhc_compile.passes.fuse_depth import READ_OF
from mhc_compile.passes.graphs import Writer, after
from mhc_compile.passes.lookups import MEMORY
from mhc_compile.passes.marks import Table
from mhc_compile.passes.numeric import RECORDED
from mhc_compile.passes.results import Probed
from mhc_compile.passes.stages import SITE

PROBES = torch.ops.mhc_probes
_ENGRAM, _KERNELS = torch.ops.engram, torch.ops.engram_kernels
_GATES = {
    op.default: places
    for op, places in (
        (_ENGRAM.gate, (0, 1, 2, 3)), (_KERNELS.gate, (0, 1, 2, 3)), (_KERNELS.remember, (0, 1, 3, 4)),
        (_KERNELS.recall, (0, 1, 3, 4)),
    )
}  # fmt: skip
"""The ops that compute a gate, with the places of streams, keys, query gain and key gain among their operands."""
_READ = {_KERNELS.gather.default: (0, 2), _KERNELS.collect.default: (1, 3), _KERNELS.sum_rows.default: (0, 5)}
"""The ops that read rows of a table, with the places of the rows and of the table's handle."""
_MOVES = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "roll", "flip", "index_select"}
"""Operations after which another token may be in a token's place."""


@dataclass(frozen=True)
class Probe:
    """Adds the recording ops for every owner that passed a slot, and their results to the graph's output.

    `context.probed` gets a `Probed` for each owner; the output ends with its figures, then its counts where it has
    memories, then the rows of every look-up, owner by owner.
    """

    name: ClassVar[str] = "probe"
    requires: ClassVar[tuple[str, ...]] = ("kernels",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        probed = _Probing(gm.graph, [mark for mark in context.marks if mark.probe is not None]).run()
        context.probed += probed
        context.notes += [f"{len(p.sites)} sites and {len(p.layers)} memories recorded" for p in probed]
        return gm


@dataclass(frozen=True)
class _Read:
    """A read of a site of a depth form whose output is still to come."""

    owner: Probed
    name: str
    outputs: tuple[Node, ...]
    places: tuple[int, ...]
    parameters: tuple[Node, ...]
    hidden: Node
    spec: str


class _Probing(Writer):
    def __init__(self, graph: Graph, marks: Sequence[Mark]) -> None:
        super().__init__(graph)
        self.slots: dict[Node, tuple[Node, str]] = {}
        """The slot and the name of every parameter."""
        self.owners: dict[Node, Probed] = {}
        """By slot: an owner that is called twice has one."""
        self.watched: dict[Node, list[Node]] = {}
        """The rows of every slot as nodes."""
        self.composites: dict[Node, Node] = {}
        """By the mix, the product of it and all before it in its stream."""
        self.reads: dict[str, _Read] = {}
        """By site."""
        self.tables: dict[int, tuple[Node, str]] = {}
        """The slot, and what the table belongs to, of every handle."""
        for mark in marks:
            assert mark.probe is not None
            self.slots |= {p: (mark.probe, name) for name, p in mark.parameters.items()}
            self.tables |= {x.handle: (mark.probe, x.of) for x in mark.inputs if isinstance(x, Table)}

    def run(self) -> list[Probed]:
        for node in list(self.graph.nodes):
            if _mixes(node):
                self._site(node)
            elif node.target in _GATES:
                self._gates(node, _GATES[node.target])
            elif node.target in _READ:
                self._look_up(node, *_READ[node.target])
            elif node.target in READS or READ_OF in node.meta:
                self._read(node)
            elif node.meta.get(SITE) in self.reads:
                self._output(node)
        owners = list(self.owners.values())
        output: Any = self.graph.output_node()
        added = []
        with self.graph.inserting_before(output):
            for owner in owners:
                for recorded in (owner.figures, owner.counts):
                    if recorded:
                        added.append(self._record(torch.stack, (recorded,), recorded[-1]))
                added += owner.found
        output.args = ((*output.args[0], *added),)
        output.meta[RECORDED] = len(added)
        return owners

    def _site(self, mix: Node) -> None:
        """Watch and record one site."""
        X, y, post, H = (a for a in mix.args[:4] if isinstance(a, Node))
        coefficients = _maker(post)
        slot_and_name = next((self.slots[p] for p in coefficients.all_input_nodes if p in self.slots), None)
        if slot_and_name is None:
            return
        owner = self._owner(slot_and_name[0])
        name = slot_and_name[1].rpartition(".")[0]
        earlier = self._earlier(X)
        self._watch(owner, name, mix)
        fused = _chain(mix)
        mixed = fused is None or fused.keeps_streams
        with self.graph.inserting_before(after(mix, *(u for u in mix.users if u.target is operator.getitem))):
            several = fused is not None and len(fused.outputs()) > 1
            state = (self.item(mix, 0) if several else mix) if mixed else X
            both = self._record(PROBES.site.default, (state, y, self._pre(coefficients), post, H, earlier, mixed), mix)
            owner.figures.append(self.item(both, 0))
            self.composites[mix] = self.item(both, 1)
        owner.sites.append(name)

    def _owner(self, slot: Node) -> Probed:
        if slot not in self.owners:
            self.owners[slot] = Probed(slot)
            with self.graph.inserting_before(after(slot)):
                rows = self.call(torch.unbind, slot, like=slot)
                self.watched[slot] = [self.item(rows, i) for i in range(int(value(slot).shape[0]))]
        return self.owners[slot]

    def _row(self, owner: Probed, name: str) -> Node:
        """Return the site's row of the slot."""
        if name not in owner.rows:
            owner.rows.append(name)
        return self.watched[owner.slot][owner.rows.index(name)]

    def _watch(self, owner: Probed, name: str, mix: Node) -> None:
        X, y = mix.args[:2]
        assert isinstance(X, Node)
        with self.graph.inserting_before(mix):
            both = self.call(watch, X, y, self._row(owner, name), like=X)
            mix.args = (self.item(both, 0), self.item(both, 1), *mix.args[2:])

    def _pre(self, coefficients: Node) -> Node:
        """Return the weights with which the branch reads the streams, from `z` where a kernel kept that alone."""
        chain = _chain(coefficients)
        if chain is None or "next_pre" in chain.outputs():
            return self.item(coefficients, chain.outputs().index("next_pre") if chain else 0)
        inputs = dict(zip(chain.inputs(), coefficients.args, strict=False))
        z = self.item(coefficients, chain.outputs().index("z"))
        operands = (z, inputs["alpha"], inputs["bias"], chain.width, str(chain.stream))
        return self._record(PROBES.pre.default, operands, coefficients)

    def _earlier(self, X: Node) -> Node | None:
        """Return the composite of the sites before `X` in its stream; None at the first and where tokens move.

        After such a place composites begin anew: what a token's streams went through is no product of one token's H.
        """
        queue, seen = [(X, False)], {X}
        while queue:
            above, moved = queue.pop(0)
            if above in self.composites:
                return None if moved else self.composites[above]
            if above.target is torch.ops.mhc.expand.default:
                return None
            moved = moved or op_name(above) in _MOVES
            for operand in above.all_input_nodes:
                if operand not in seen:
                    seen.add(operand)
                    queue.append((operand, moved))
        return None

    def _read(self, node: Node) -> None:
        """Watch what a site of a depth form reads first; the exit is no site."""
        arguments: Any = node.args
        if READ_OF in node.meta:
            (places, spec), hidden = node.meta[READ_OF], self.item(node, 0)
            outputs, parameters = arguments[: len(places)], arguments[len(places) :]
        else:
            (outputs, places, *parameters, spec), hidden = arguments, node
        slot_and_name = next((self.slots[p] for p in parameters if p in self.slots), None)
        site = node.meta.get(SITE)
        if slot_and_name is None or site is None or site in self.reads:
            return
        owner, name = self._owner(slot_and_name[0]), slot_and_name[1].rpartition(".")[0]
        self._watch_one(owner, name, hidden, 0)
        self.reads[site] = _Read(owner, name, tuple(outputs), tuple(places), tuple(parameters), hidden, spec)

    def _output(self, output: Node) -> None:
        """Record a site of a depth form, and watch its output."""
        read = self.reads.pop(output.meta[SITE])
        self._watch_one(read.owner, read.name, output, 1)
        columns = len(self.watched[read.owner.slot]) + 1
        operands = (
            list(read.outputs),
            list(read.places),
            list(read.parameters),
            read.hidden,
            output,
            columns,
            read.spec,
        )
        with self.graph.inserting_before(after(output)):
            read.owner.figures.append(self._record(PROBES.depth.default, operands, output))
        read.owner.sites.append(read.name)

    def _watch_one(self, owner: Probed, name: str, node: Node, column: int) -> None:
        """Give the readers of `node` its watched value."""
        row = self._row(owner, name)
        with self.graph.inserting_before(after(node)):
            slot = self.call(operator.getitem, row, column, like=row)
            watched = self.call(watch_one, node, slot, like=node)
        node.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)

    def _gates(self, gate: Node, places: tuple[int, ...]) -> None:
        X, keys, query_gain, key_gain = (gate.args[i] for i in places)
        assert isinstance(X, Node)
        assert isinstance(key_gain, Node)
        # A gain that is stored as what is added to 1 is one step further up.
        slot_and_name = next((self.slots[p] for p in (key_gain, *key_gain.all_input_nodes) if p in self.slots), None)
        if slot_and_name is None:
            return
        owner = self._owner(slot_and_name[0])
        with self.graph.inserting_before(after(gate)):
            operands = (X, keys, query_gain, key_gain, gate.args[-1])
            owner.counts.append(self._record(PROBES.gates.default, operands, gate))
        owner.layers.append(slot_and_name[1].removeprefix("engram.").rpartition(".")[0])

    def _look_up(self, node: Node, at: int, handle: int) -> None:
        """Record the rows that a look-up reads, under what its table belongs to and the layer that reads."""
        rows = node.args[at]
        slot_and_of = self.tables.get(node.args[handle])  # type: ignore[arg-type]
        if slot_and_of is None:
            return
        owner, of, layer = self._owner(slot_and_of[0]), slot_and_of[1], node.meta[MEMORY][1]
        with self.graph.inserting_before(after(node)):
            owner.found.append(self._record(torch.clone, (rows,), node))
        owner.look_ups.append(of if layer in ("", of) else f"{of}.{layer}")

    def _record(self, target: Callable[..., Any], arguments: tuple[Any, ...], like: Node) -> Node:
        """Call `target` without tags: the backward pass has no use for what is recorded."""
        new = self.call(target, *arguments, like=like)
        for tag in ("recompute", "ac_graph_id"):
            new.meta.pop(tag, None)
        return new


def _mixes(node: Node) -> bool:
    """Return whether `node` reads streams, a branch, post and H, and mixes them."""
    chain = _chain(node)
    return node.target is torch.ops.mhc.distribute.default or (chain is not None and chain.mixes)


def _chain(node: Node) -> Chain | None:
    """Return the fused chain that a node computes."""
    return next((spec for spec in kernels_of(node) if isinstance(spec, Chain)), None)


def _maker(node: Node) -> Node:
    """Return the node of which `node` is a result, through casts."""
    while node.target is operator.getitem or op_name(node) == "to":
        node = node.args[0]  # type: ignore[assignment]
    return node
