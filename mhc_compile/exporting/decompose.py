"""Turn every dialect op of a graph into the plain PyTorch it stands for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from mhc_compile.passes.base import Context, erase_unused

DIALECTS = ("mhc", "mhc_kernels", "hc", "engram", "engram_kernels")
"""Namespaces of ops that exist only where this package is imported."""


@dataclass(frozen=True)
class Decompose:
    """Replaces each composite dialect op by a call of its kernel, which a tracer then sees as ATen operations.

    Autocast regions are entered as well as recorded: `torch.export` with `strict=True` only records them and traces
    their operations in the wrong dtypes.
    """

    name: ClassVar[str] = "decompose"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ("plain",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        kernels: dict[OpOverload[..., Any], Callable[..., Any]] = {}
        replaced = 0
        for node in gm.graph.nodes:
            op = node.target
            node.target = _REGIONS.get(op, op)
            if node.op == "call_function" and isinstance(op, OpOverload) and op.namespace in DIALECTS:
                node.target = kernels.setdefault(op, _kernel(op))
                replaced += 1
        erase_unused(gm)
        context.notes.append(f"{replaced} ops decomposed")
        return gm


def _enter(*args: Any) -> torch.autocast:
    region = torch.autocast(*args)
    region.__enter__()
    return region


def _exit(region: torch.autocast) -> None:
    region.__exit__(None, None, None)


_REGIONS: dict[Any, Callable[..., Any]] = {
    torch.amp.autocast_mode._enter_autocast: _enter,
    torch.amp.autocast_mode._exit_autocast: _exit,
}


def leftovers(gm: GraphModule) -> list[str]:
    """Return the names of the dialect ops in `gm` and its subgraphs."""
    return sorted(
        {
            str(node.target)
            for module in gm.modules()
            if isinstance(module, GraphModule)
            for node in module.graph.nodes
            if isinstance(node.target, OpOverload) and node.target.namespace in DIALECTS
        }
    )


def _kernel(op: OpOverload[..., Any]) -> Callable[..., Any]:
    """Return the composite kernel of `op` as a function of the same signature."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        # The kernel turns autocast off, in a region that is recorded here, where there is something to turn off.
        with torch.autocast(device, enabled=False) if is_on else nullcontext(), torch._C.DisableTorchFunction():
            return op.decompose(*args, **kwargs)

    run.__name__ = run.__qualname__ = op.name().replace("::", "_").replace(".", "_")
    return run
