"""Passes, a kernel and an inner compiler that are wrong on purpose, for `bisect` to find.

Each is right once `WRONG` is False: a reproducer that imports such a copy of this file must see the error gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.passes.base import Context, copy_meta, op_name
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.widen import Widen

WRONG = True


def distributes(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if op_name(n) == "distribute"]


def changed(gm: GraphModule, node: Node, argument: int, method: str, *args: Any) -> None:
    """Give `node` what `method` makes of its argument."""
    with gm.graph.inserting_before(node):
        made = copy_meta(gm.graph.call_method(method, (node.args[argument], *args)), node)
    node.update_arg(argument, made)


@dataclass(frozen=True)
class ReversesPost:
    """Gives the branch of one site to the streams in the wrong order: the site of this number, counted from 0."""

    site: int = 2

    name: ClassVar[str] = "reverses_post"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        if WRONG:
            changed(gm, distributes(gm)[self.site], 2, "flip", (-1,))
        return gm


@dataclass(frozen=True)
class ReversesPostOf:
    """The same at the sites of this name."""

    site: str

    name: ClassVar[str] = "reverses_post_of"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        for node in distributes(gm):
            if WRONG and node.meta["mhc_site"] == self.site:
                changed(gm, node, 2, "flip", (-1,))
        return gm


@dataclass(frozen=True)
class ForgetsABranch(Fuse):
    """Leaves the branch of the second site out of the streams."""

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        gm = super().apply(gm, context)
        if WRONG:
            changed(gm, [n for n in gm.graph.nodes if "mhc_mixes" in n.meta][1], 1, "mul", 0.0)
        return gm


@dataclass(frozen=True)
class Rounds(Lower):
    """Rounds what the last branch gives to bfloat16, which no comparison in float64 shows."""

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        gm = super().apply(gm, context)
        if WRONG:
            node = distributes(gm)[-1]
            changed(gm, node, 1, "bfloat16")
            changed(gm, node, 1, "float")
        return gm


@dataclass(frozen=True)
class MistakesPre(Widen):
    """Takes `pre` for `post` at the third site."""

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        gm = super().apply(gm, context)
        node = distributes(gm)[2]
        post: Any = node.args[2]
        if WRONG:
            node.update_arg(2, next(u for u in post.args[0].users if u.args[1] == 0))
        return gm


@dataclass(frozen=True)
class SwapsOperands(Normalize):
    """Takes the activation for the gate in the second layer: `silu(up) * gate` in place of `silu(gate) * up`."""

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        gm = super().apply(gm, context)
        if WRONG:
            silu = [n for n in gm.graph.nodes if op_name(n) == "silu"][1]
            (product,) = silu.users
            up = next(a for a in product.args if a is not silu)
            gate = silu.args[0]
            assert isinstance(up, Node)
            with gm.graph.inserting_before(product):
                other = copy_meta(gm.graph.call_function(torch.nn.functional.silu, (up,)), silu)
            product.args = (other, gate)
        return gm


@dataclass(frozen=True)
class Breaks(Lower):
    """Leaves a graph that cannot be run: the third site gets a branch without its last dimension."""

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        gm = super().apply(gm, context)
        if WRONG:
            changed(gm, distributes(gm)[2], 1, "sum", -1)
        return gm


def plant_kernel(result: str = "next_mix", kind: str = "boundary", change: float = 1e-4) -> Callable[[], None]:
    """Make generated kernels of one kind return one result a little too large; returns what takes that back."""
    right = targets.TARGETS["cpp"]

    class Wrong(type(right)):  # type: ignore[misc]
        def run(self, spec: KernelSpec, direction: Any, values: Any) -> dict[str, torch.Tensor]:
            results: dict[str, torch.Tensor] = right.run(spec, direction, values)
            if WRONG and spec.kind == kind and result in results:
                results[result] = results[result] * (1 + change)
            return results

        def plan(self, *_: Any) -> None:
            return None

    def undo() -> None:
        targets.TARGETS["cpp"] = right

    targets.TARGETS["cpp"] = Wrong()
    return undo
