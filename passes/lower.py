"""Replace what is left of the dialect by plain PyTorch.

The Sinkhorn loop is one opaque op, because unrolled it costs seconds of Inductor's time per site. `export` keeps the
dialect, which decomposes into PyTorch's own operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

import mhc_compile.kernels.ops  # noqa: F401  (registers the ops)
from mhc_compile.passes.base import Context, erase_unused


@dataclass(frozen=True)
class Lower:
    """Replaces `mhc::coefficients` by `mhc_kernels::reference_coefficients`; other ops decompose as they are."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ("kernels",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        replaced = 0
        for node in gm.graph.nodes:
            if node.target is torch.ops.mhc.coefficients.default:
                node.target = torch.ops.mhc_kernels.reference_coefficients.default
                replaced += 1
        erase_unused(gm)
        context.notes.append(f"{replaced} sites: coefficients with an opaque Sinkhorn, the rest in plain PyTorch")
        return gm
