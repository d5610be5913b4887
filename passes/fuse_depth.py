"""Part of `fuse`: give reads of earlier outputs, of depth forms and of models' own, their kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

import mhc_compile.kernels.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels import targets
from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.forms import READS
from mhc_compile.kernels.fused import attend_op
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.passes.base import KERNELS_OF, device_of, value
from mhc_compile.passes.depth_sites import kernel_of, parameters_of, sources_of
from mhc_compile.passes.graphs import Writer
from mhc_compile.passes.stages import SITE

READ_OF = "mhc_read"
"""Key of a kernel's metadata: the places of the outputs that it reads, and the text of the specification."""

OWN_READ = torch.ops.mhc_forms.attend_normalised.default


def fuse_reads(graph: Graph, *, without_kernels: bool = False) -> list[str]:
    """Replace reads of earlier outputs by `mhc_kernels` ops where a kernel can compute them; returns notes."""
    notes: Counter[str] = Counter()
    for node in list(graph.nodes):
        if node.target in READS or node.target is OWN_READ:
            notes[_fuse(graph, node, without_kernels=without_kernels)] += 1
    return [f"{count} x {text}" for text, count in notes.items()]


def _fuse(graph: Graph, node: Node, *, without_kernels: bool) -> str:
    """Replace a read; return what was done."""
    sources, parameters, spec = _read(node)
    first, *others = (value(source) for source in sources)
    if spec is None:
        return f"read not fused: the form {READS[node.target].name} has no kernel"
    if any(other.dtype != first.dtype or other.shape != first.shape for other in others):
        return "read not fused: its sources differ in shape or dtype"
    target, reason = targets.choose(spec, device_of(sources[0]))
    if target == "reference" and not without_kernels:
        return f"read not fused: {reason}"
    write = Writer(graph, node)
    with graph.inserting_before(node):
        op = attend_op(len(sources), normalised=node.target is OWN_READ)
        fused = write.call(op, *sources, *parameters)
        fused.meta |= {KERNELS_OF: (spec,), "mhc_parts": (node.name,)}
        if node.target in READS:
            fused.meta[READ_OF] = (node.args[1], node.args[-1])
        if SITE in node.meta:
            fused.meta[SITE] = node.meta[SITE]
        hidden = write.item(fused, 0)
    hidden.meta["example_value"] = value(node)
    node.replace_all_uses_with(hidden)
    graph.erase_node(node)
    return f"{spec.kind} in {spec.name}"


def _read(node: Node) -> tuple[list[Node], list[Node], KernelSpec | None]:
    """Return what a read reads, its parameters, and the fused computation; None where its form has none."""
    if node.target in READS:
        return sources_of(node), parameters_of(node), kernel_of(node)
    arguments: tuple[Any, ...] = node.args
    sources, query = arguments
    first = value(sources[0])
    fields = {"sources": len(sources), "width": int(first.shape[-1]), "sources_dtype": first.dtype}
    return sources, [query], Attend(normalised=True, queries=int(value(query).shape[0]), **fields)
