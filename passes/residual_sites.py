"""Find residual adds by structure, never by class or module names.

A *site* is an add `carry + branch` where the carry comes from an earlier stream value through operations without
parameters, and the branch depends on that same stream value through at least one parameter contraction.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

from torch.fx import Node

from mhc_compile.passes.base import is_tensor, op_name, same_shape, shape
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.results import Site

# The stream passes through these by their first operand, whatever the others are.
THROUGH_FIRST = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach", "dropout",
    "dropout1d", "view", "reshape", "flatten", "transpose", "permute", "layer_norm", "rms_norm", "alias",
    "feature_dropout", "mark", "view_as", "reshape_as", "unflatten", "swapaxes", "swapdims", "movedim",
}  # fmt: skip
# The stream passes through these by the one operand that is hot, if the others are not.
THROUGH_HOT = {"mul", "truediv", "div", "add", "sub", "where", "masked_fill", "clamp", "multiply"}
MAX_NORM_NODES = 64
"""A norm written out is a dozen nodes; a jump over more is a missed layer."""


def branch_mask(flow: Dataflow, site: Site) -> int:
    """Return the bit mask of everything the site's branches depend on."""
    mask = 0
    for branch in site.branches:
        mask |= flow.ancestors[branch]
    return mask


def branches_mask(flow: Dataflow, sites: Iterable[Site]) -> int:
    """Return the bit mask of what lies inside the branches of `sites`, without what their carries hold already."""
    return functools.reduce(operator.or_, (branch_mask(flow, s) & ~flow.ancestors[s.carry] for s in sites), 0)


class SiteSearch:
    """The search in one graph, with its memo tables. `notes` collects what was left alone and why."""

    def __init__(self, flow: Dataflow, notes: list[str]) -> None:
        self.flow = flow
        self.notes = notes
        self.sites: dict[Node, Site] = {}
        self._up: dict[Node, Node | None] = {}

    def find(self) -> list[Site]:
        """Return the sites of the graph in order, without those inside branches of others."""
        for node in self.flow.nodes:
            if op_name(node) == "add" and node in self.flow.hot and is_tensor(node):
                self.consider(node)
        return self._outermost()

    def up(self, node: Node) -> Node | None:
        """Return the value `node` carries on, one step back along the stream; None at its start or after a layer."""
        if node not in self._up:
            self._up[node] = self._find_up(node)
        return self._up[node]

    def _find_up(self, node: Node) -> Node | None:
        flow = self.flow
        if node not in flow.hot or not is_tensor(node) or flow.bit(node) & flow.matmuls:
            return None
        hot = [n for n in flow.inputs[node] if n in flow.hot]
        name = op_name(node)
        if name in THROUGH_FIRST and hot and hot[0] is node.args[0]:
            return hot[0]
        if name in THROUGH_HOT and len(hot) == 1 and is_tensor(hot[0]) and same_shape(hot[0], node):
            return hot[0]
        # Otherwise the nearest value that all of this one comes from: a norm written out, a clamp by its own maximum.
        if node not in flow.dominators:
            return None
        above = flow.dominators[node]
        if above is None or not is_tensor(above) or shape(above) != shape(node):
            return None
        region = flow.between(above, node)
        if region & flow.matmuls & ~flow.bit(above) or region.bit_count() > MAX_NORM_NODES:
            return None
        return above

    def trace(self, node: Node) -> list[Node]:
        """Return `node` and the values it carries on, back to a site (included) or to where the stream starts."""
        out = [node]
        while node not in self.sites and (above := self.up(node)) is not None:
            out.append(above)
            node = above
        return out

    def line(self, node: Node) -> int:
        """Return the bit mask of all stream values from `node` back to its entry, through sites."""
        mask = 0
        while True:
            for n in self.trace(node):
                mask |= self.flow.bit(n)
                node = n
            site = self.sites.get(node)
            if site is None:
                return mask
            node = site.carry

    def adds(self, carry: Node, branch: Node) -> bool:
        """Return whether `carry + branch` would be a site."""
        return carry in self.flow.hot and branch in self.flow.hot and self._root_for(carry, branch) is not None

    def joins(self, carry: Node, sources: Sequence[Node], *, contracts: bool = False) -> Node | None:
        """Return the stream value from which `carry + branch` would start; None where that would be no site.

        The branch is computed from `sources`, with a parameter of its own if it `contracts`.
        """
        for branch in sources:
            root = self._root_for(carry, branch, contracts=contracts)
            if root is not None:
                return None if not contracts and self._reinjects(root, branch) else root
        last = self.trace(carry)[-1]
        return last if any(self._older(carry, branch, contracts=contracts) for branch in sources) else None

    def _root_for(self, carry: Node, branch: Node, *, contracts: bool = False) -> Node | None:
        """Return the stream value from which `carry` is carried and on which `branch` depends through parameters."""
        for root in self.trace(carry):
            if self.flow.depends(branch, root) and (contracts or self._holds_parameters(root, branch)):
                return root
        return None

    def _older(self, carry: Node, branch: Node, *, contracts: bool = False) -> Node | None:
        """Return the stream value before the site of `carry` on which `branch` depends through parameters."""
        last = self.trace(carry)[-1]
        if last not in self.sites:
            return None
        line = self.line(last) & self.flow.ancestors[branch]
        if not line:
            return None
        root = self.flow.nodes[line.bit_length() - 1]
        between = self.flow.between(root, branch) & ~self.flow.bit(root)
        # What adds to itself on the way is a stream of its own: two towers that meet.
        if any(between & self.flow.bit(add) for add in self.sites):
            return None
        return root if contracts or between & self.flow.matmuls else None

    def _holds_parameters(self, root: Node, branch: Node) -> bool:
        return bool(self.flow.between(root, branch) & self.flow.matmuls & ~self.flow.bit(root))

    def consider(self, add: Node) -> None:
        """Record `add` as a site if it is one; nodes are considered in graph order."""
        if len(add.args) != 2 or not all(isinstance(a, Node) and a in self.flow.hot for a in add.args):
            return
        left, right = add.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        if len(shape(add)) < 2 or left is right:
            return
        pairs = [(c, b) for c, b in ((left, right), (right, left)) if same_shape(c, add)]
        for carry, branch in pairs:
            root = self._root_for(carry, branch)
            if root is None:
                continue
            if self._reinjects(root, branch):
                self._up[add] = branch
            else:
                self._add_site(add, root, carry, [branch], [], [])
            return
        if self._consider_tree(add):
            return
        for carry, branch in pairs:
            older = self._older(carry, branch)
            if older is not None:
                self._add_site(add, self.trace(carry)[-1], carry, [branch], [], [older])
                return

    def _reinjects(self, root: Node, other: Node) -> bool:
        """Return whether `other` is the stream itself, further on: the add mixes an earlier stream value back in."""
        last = self.trace(other)[-1]
        if last not in self.sites:
            return False
        line = self.line(last)
        # The value itself or what it is a copy of.
        return any(line & self.flow.bit(n) for n in self.trace(root))

    def _consider_tree(self, add: Node) -> bool:
        leaves, inner = self._flatten(add)
        if len(leaves) < 3:
            return False
        for carry in leaves:
            if not same_shape(carry, add) or leaves.count(carry) > 1:
                continue
            rest = [n for n in leaves if n is not carry]
            # The leaf must be the one from which every other leaf comes, or the stream's values before it.
            for root in self.trace(carry):
                late = [n for n in rest if not self.flow.depends(n, root)]
                older = [o for n in late if (o := self._older(carry, n)) is not None]
                if len(older) == len(late) and any(self._holds_parameters(root, n) for n in rest):
                    self._add_site(add, root, carry, rest, inner, older)
                    return True
        return False

    def _flatten(self, add: Node) -> tuple[list[Node], list[Node]]:
        leaves: list[Node] = []
        inner: list[Node] = []
        for arg in add.args:
            if (
                isinstance(arg, Node)
                and op_name(arg) == "add"
                and len(arg.users) == 1
                and len(arg.args) == 2
                and arg.args[0] is not arg.args[1]
                and all(isinstance(a, Node) and a in self.flow.hot and same_shape(a, add) for a in arg.args)
            ):
                below, deeper = self._flatten(arg)
                leaves += below
                inner += [arg, *deeper]
            elif isinstance(arg, Node):
                leaves.append(arg)
        return leaves, inner

    def _add_site(
        self,
        add: Node,
        root: Node,
        carry: Node,
        branches: list[Node],
        inner: list[Node],
        older: list[Node],
    ) -> None:
        for node in inner:
            self.sites.pop(node, None)
        line = self.trace(carry)
        previous = line[-1] if line[-1] in self.sites else root
        chain: list[Node] = []
        if previous is not carry:
            region = self.flow.between(previous, carry) & ~self.flow.bit(previous)
            chain = self.flow.members(region)
        self.sites[add] = Site(add, carry, tuple(branches), previous, tuple(chain), tuple(inner), tuple(older))

    def _nested(self, inner: Site, outer: Site) -> bool:
        """Return whether `inner`, inside the branch of `outer`, depends on what the outer carry starts from."""
        return any(self.flow.depends(inner.add, root) for root in (*self.trace(outer.carry), *outer.older))

    def _outermost(self) -> list[Site]:
        """Drop sites inside branches of others. The longer chain wins; of equal ones the outer."""
        down: dict[Node, int] = {}
        up: dict[Node, int] = {}
        sites = list(self.sites.values())
        for site in sites:
            up[site.add] = up.get(site.previous, 0) + 1
        for site in reversed(sites):
            down[site.add] = max(down.get(site.add, 0), 1)
            if site.previous in self.sites:
                down[site.previous] = max(down.get(site.previous, 0), down[site.add] + 1)
        # What each site's branch adds to what its carry holds already; masks, so that no pair is checked in vain.
        inside = {s.add: branch_mask(self.flow, s) & ~self.flow.ancestors[s.carry] for s in sites}
        kept: list[Site] = []
        adds = covered = 0
        for site in sorted(sites, key=lambda s: (-(up[s.add] + down[s.add]), -self.flow.index[s.add])):
            bit = self.flow.bit(site.add)
            outer = [o for o in kept if inside[o.add] & bit] if covered & bit else []
            inner = [self.sites[n] for n in self.flow.members(inside[site.add] & adds)]
            if any(self._nested(site, o) for o in outer) or any(self._nested(i, site) for i in inner):
                self.notes.append(f"{site.add.name} adds within the branch of another site: left alone")
                continue
            kept.append(site)
            adds |= bit
            covered |= inside[site.add]
        return sorted(kept, key=lambda s: self.flow.index[s.add])
