"""Write small powers as products: `x.pow(2)` becomes `x * x`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from mhc_compile.passes.base import Context, call_nodes, copy_meta, op_name


@dataclass(frozen=True)
class Powers:
    """Replaces `x.pow(k)` by k - 1 multiplications, for the integers k among `exponents`."""

    exponents: tuple[int, ...] = (2,)

    name: ClassVar[str] = "powers"
    requires: ClassVar[tuple[str, ...]] = ("normal-form",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        replaced = 0
        for node in list(call_nodes(gm)):
            exponent = node.args[1] if op_name(node) == "pow" and len(node.args) == 2 else None
            if not isinstance(exponent, int) or exponent not in self.exponents or exponent < 2:
                continue
            product = x = node.args[0]
            with gm.graph.inserting_before(node):
                for _ in range(exponent - 1):
                    product = copy_meta(gm.graph.call_function(operator.mul, (product, x)), node)
            node.replace_all_uses_with(product)
            gm.graph.erase_node(node)
            replaced += 1
        context.notes.append(f"{replaced} powers written as products")
        return gm
