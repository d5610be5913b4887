"""Part of `fuse`: give the reads of depth forms their kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Graph, Node

from mhc_compile.kernels import targets
from mhc_compile.kernels.forms import READS
from mhc_compile.kernels.fused import attend_op
from mhc_compile.passes.base import KERNELS_OF, device_of, value
from mhc_compile.passes.depth_sites import kernel_of
from mhc_compile.passes.graphs import Writer
from mhc_compile.passes.stages import SITE

READ_OF = "mhc_read"
"""Key of a kernel's metadata: the places of the outputs that it reads, and the text of the specification."""


def fuse_reads(graph: Graph, *, without_kernels: bool = False) -> list[str]:
    """Replace reads of earlier outputs by `mhc_kernels` ops where a kernel can compute them; returns notes."""
    notes: Counter[str] = Counter()
    for node in list(graph.nodes):
        if node.target in READS:
            notes[_fuse(graph, node, without_kernels=without_kernels)] += 1
    return [f"{count} x {text}" for text, count in notes.items()]


def _fuse(graph: Graph, node: Node, *, without_kernels: bool) -> str:
    """Replace a read; return what was done."""
    form = READS[node.target]
    arguments: tuple[Any, ...] = node.args
    sources, places, *parameters, text = arguments
    first, *others = (value(source) for source in sources)
    spec = kernel_of(node)
    if spec is None:
        return f"read not fused: the form {form.name} has no kernel"
    if any(other.dtype != first.dtype or other.shape != first.shape for other in others):
        return "read not fused: its sources differ in shape or dtype"
    target, reason = targets.choose(spec, device_of(sources[0]))
    if target == "reference" and not without_kernels:
        return f"read not fused: {reason}"
    write = Writer(graph, node)
    with graph.inserting_before(node):
        fused = write.call(attend_op(len(sources)), *sources, *parameters)
        fused.meta |= {KERNELS_OF: (spec,), "mhc_parts": (node.name,), READ_OF: (places, text)}
        if SITE in node.meta:
            fused.meta[SITE] = node.meta[SITE]
        hidden = write.item(fused, 0)
    hidden.meta["example_value"] = first
    node.replace_all_uses_with(hidden)
    graph.erase_node(node)
    return f"{spec.kind} in {spec.name}"
