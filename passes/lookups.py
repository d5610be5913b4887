"""What the passes that look rows up have in common: tables and where nodes go; for hashes reach and carried state."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

import mhc_compile.kernels.memory.gather
import mhc_compile.kernels.memory.hash_ops  # noqa: F401  (these register the ops)
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Widened, refuse, shape, value
from mhc_compile.passes.graphs import Writer, after
from mhc_compile.passes.marks import Argument, State, Table, Unknown, Weight
from mhc_compile.passes.numeric import KEEPS
from mhc_compile.passes.tokens import reaches

ENGRAM = torch.ops.engram
KERNELS = torch.ops.engram_kernels
MEMORY = "mhc_memory"
"""Key of a node's metadata: owner, layer and first site of the memory that it computes; "" for an over-encoding."""
_ALL = slice(None)


class TableReader(Writer):
    """Inserts look-ups for the owner of one stream.

    `portable`: rows are read by PyTorch's embedding, for programs that run without this package.
    """

    def __init__(self, graph: Graph, widened: Widened, *, portable: bool) -> None:
        super().__init__(graph, widened.stream.entry)
        self.widened, self.portable = widened, portable
        self.inputs, self.parameters = widened.mark.inputs, widened.mark.parameters
        self.last = max(*self.inputs.values(), *self.parameters.values())
        """The last node that look-ups read; the next look-up goes after the previous one."""
        self.part = ("", "")
        """The layer and first site of the memory whose nodes are inserted now."""

    def _look_up(self, table: str, rows: Node, width: int) -> Callable[[], Node]:
        """Begin to fetch the rows; return a function that inserts the node of their values where it is called."""
        if self.portable:
            if Weight(table) not in self.inputs:
                detail = f"the rows of {table} are no float32 or bfloat16 tensor in memory"
                raise MHCError("MHC504", detail, way_out='load the folder with tables="device"')
            embedded = self._early(torch.nn.functional.embedding, rows, self.inputs[Weight(table)])
            flat = self._early(torch.flatten, embedded, -2)
            return lambda: flat
        described = next(x for x in self.inputs if isinstance(x, Table) and x.of == table)
        dtype = torch.float32 if described.dtype == "float32" else torch.bfloat16
        gathered = (rows, self.inputs[described], described.handle, width, dtype)
        if not described.early:
            return lambda: self.call(KERNELS.gather.default, *gathered)
        ticket = self._early(KERNELS.prefetch.default, rows, described.handle)
        return lambda: self.call(KERNELS.collect.default, ticket, *gathered)

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _early(self, target: Callable[..., Any], *args: Any) -> Node:
        with self.graph.inserting_before(after(self.last)):
            self.last = self.call(target, *args)
        return self.last

    def _with_meta(self, new: Node, like: Node | None) -> Node:
        new.meta[MEMORY] = (self.widened.mark.owner, *self.part)
        return super()._with_meta(new, like)


class Lookups(TableReader):
    """Inserts look-ups by hashes of the token ids, `ids`."""

    def __init__(self, graph: Graph, widened: Widened, ids: Node, *, portable: bool) -> None:
        super().__init__(graph, widened, portable=portable)
        self.ids = ids
        self.last = max(ids, self.last)
        self.kept: dict[State, Node] = {}
        """What every tensor of the state becomes."""
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        """Raise MHC236 for an argument that reaches the streams and may be a mask or positions.

        Whatever the ids are computed from is the ids themselves, and targets are read after the streams alone.
        """
        unknown = {x.argument: node for x, node in self.inputs.items() if isinstance(x, Unknown)}
        sources = [node for node in unknown.values() if value(node).dtype != torch.bool and reaches(node, self.ids)]
        for argument, node in unknown.items():
            if sources != [node] and reaches(node, torch.ops.mhc.reduce.default):
                owner = self.widened.mark.owner or "the model"
                detail = f"{argument} {list(shape(node))} of {owner} may be ids, a mask or positions"
                raise refuse("MHC236", detail, node)

    # --- early in the graph: ids, rows ---------------------------------------------------------------------------

    def _documents(self, ids: Node, eos: int, of: str) -> tuple[Node, Node | None]:
        """Return reach [B, S] of `ids`, and the ids before them that the state `of` carries; keep the last ones."""
        mask, positions = (self.inputs.get(Argument(role)) for role in ("mask", "positions"))
        optional = (mask, positions, self.inputs.get(State("reach", of)))
        reach = self._early(ENGRAM.reach.default, ids, *optional, eos)
        before = self.inputs.get(State("ids", of))
        if before is not None:
            self._keep_end(State("ids", of), self._early(torch.cat, (before, ids), 1))
            following = self._early(operator.add, self._early(operator.getitem, reach, (_ALL, -1)), 1)
            # A document ends with its end-of-text token, and before padding.
            for tensor, end in ((ids, eos), (mask, 0)):
                if tensor is not None and end >= 0:
                    last = self._early(operator.getitem, tensor, (_ALL, -1))
                    following = self._early(operator.mul, following, self._early(operator.ne, last, end))
            self.kept[State("reach", of)] = following
        return reach, before

    # --- state ---------------------------------------------------------------------------------------------------

    def _keep_end(self, state: State, whole: Node) -> None:
        """Keep the end of `whole` as the `state` to carry on."""
        with self.graph.inserting_before(after(whole)):
            end = self.call(operator.getitem, whole, (_ALL, slice(-value(self.inputs[state]).shape[1], None)))
            self.kept[state] = self.method("detach", end)

    def _keep(self) -> None:
        """Write the state, once everything has read it."""
        with self.graph.inserting_before(self.graph.output_node()):
            for state, new in self.kept.items():
                copied = self.method("copy_", self.inputs[state], new)
                copied.meta |= {KEEPS: True, MEMORY: new.meta[MEMORY]}
