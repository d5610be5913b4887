"""Note in an exported program which of its operations one fused kernel would compute.

The notes change nothing that the program computes. They are in the `custom` metadata of its nodes, which torch keeps
through decompositions and in saved programs, and `to_mlir` makes functions of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx import traceback as fx_traceback

from mhc_compile.capture import private_copy
from mhc_compile.kernels import reference
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, kernels_of
from mhc_compile.passes.fuse import Fuse
from mhc_compile.tracing import replaced

CHAIN = "mhc_chain"
"""Key of the note on an operation of a chain: its number, its name, n, C, and what it takes and gives by name."""
SINKHORN = "mhc_sinkhorn"
"""Key of the note on an operation of a Sinkhorn projection inside a chain: `{"name": ...}`."""


@dataclass(frozen=True)
class Outline:
    """Notes what `fuse` would merge, whether or not there is a kernel for it."""

    name: ClassVar[str] = "outline"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Add notes to the nodes of `gm` and leave all else as it is."""
        trial = private_copy(gm)
        first = next(iter(trial.graph.nodes))
        for node in reversed(trial.graph.find_nodes(op="get_attr")):
            first.prepend(node)  # a parameter, read where the model does
            first = node
        Fuse(without_kernels=True).apply(trial, Context())
        nodes = {n.name: n for n in gm.graph.nodes}
        calls = [n for n in trial.graph.nodes if "mhc_parts" in n.meta]
        for number, fused in enumerate(calls):
            note = {"call": number, **_described(kernels_of(fused))}
            for part in fused.meta["mhc_parts"]:
                nodes[part].meta["custom"] = {**nodes[part].meta.get("custom", {}), CHAIN: note}
        context.notes.append(f"{len(calls)} chains noted")
        return gm


def note_on(node: Node, key: str) -> dict[str, Any] | None:
    """Return the note under `key` on a program's node, or None."""
    return (node.meta.get("custom") or {}).get(key)


@contextmanager
def noting_sinkhorn() -> Iterator[None]:
    """Note the operations of Sinkhorn projections that are traced in here."""
    plain = reference.sinkhorn

    def noted(logits: Tensor, spec: StreamSpec) -> Tensor:
        meta = fx_traceback.get_current_meta()
        if "custom" in meta:
            meta["custom"] = dict(meta["custom"])  # `annotate` writes into the traced node's own
        with fx_traceback.annotate({SINKHORN: {"name": f"mhc_sinkhorn_n{spec.streams}_x{spec.iterations}"}}):
            return plain(logits, spec)

    with replaced(reference, "_SINKHORN", noted):
        yield


def _described(specs: tuple[KernelSpec, ...]) -> dict[str, Any]:
    *before, last = specs
    name = f"{'engram' if isinstance(last, MemoryStep) else 'mhc'}_{last.name}"
    takes = last.inputs()
    for gate in before:
        name = name.replace(last.kind, "recall", 1)
        takes = (*gate.inputs(), *(n for n in takes if n not in (*gate.inputs(), *gate.outputs())))
    return {"name": name, "streams": last.n, "width": last.width, "takes": list(takes), "gives": list(last.outputs())}
