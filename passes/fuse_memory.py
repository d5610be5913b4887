"""Part of `fuse`: give the ops of memories their kernels."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

import mhc_compile.kernels.memory.gather
import mhc_compile.kernels.memory.ops  # noqa: F401  (these register the ops)
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.memory import hash_ops, sum_rows, top
from mhc_compile.kernels.memory.spec import HashSpec, OverEncodingSpec
from mhc_compile.kernels.registration import registered
from mhc_compile.passes.base import KERNELS_OF, copy_meta, value

ENGRAM = torch.ops.engram
KERNELS = torch.ops.engram_kernels
MEMORIES = "engram"
"""The name by which the option `kernels` switches these on and off."""


def fuse_memories(graph: Graph) -> list[str]:
    """Replace `engram` ops by `engram_kernels` ops, a gate and what it lets in by one; returns notes."""
    notes: Counter[str] = Counter()
    for node in list(graph.nodes):
        if node.target is ENGRAM.inject.default and _reads_its_own_gate(node):
            _merge(graph, node)
            notes["memory's gate and what it lets in, in one kernel"] += 1
    for node in list(graph.nodes):
        for name in ("rows", "gate", "inject"):
            if node.target is getattr(ENGRAM, name).default:
                _in_a_kernel(node, name)
                notes[f"memory's {name} in a kernel"] += 1
        # Other devices have no kernel, and their compilers do well with a chain of whole numbers.
        if node.target is ENGRAM.over_rows.default and value(node.args[0]).device.type in ("cpu", "meta"):
            node.target = KERNELS.over_rows.default
            notes["over-encoding's rows in a kernel"] += 1
        if node.target is ENGRAM.retrieve.default and value(node.args[0]).device.type in ("cpu", "meta"):
            node.target = KERNELS.retrieve.default
            notes["choice of the largest scores in a kernel"] += 1
        if node.target is ENGRAM.expand.default and _sums_what_it_looks_up(node):
            _sum_rows(graph, node)
            notes["look-up by content and its sums, in one kernel"] += 1
    return [f"{count} x {text}" for text, count in notes.items()]


def _sums_what_it_looks_up(expand: Node) -> bool:
    """Return whether the values come from a table on the device, at once, and nothing else reads them."""
    gather, device = expand.args[0], value(expand).device.type
    assert isinstance(gather, Node)
    # Where there is no kernel, the device's own compiler does better with the equations.
    has_kernel = device in ("cpu", "meta") or hash_ops.target(device) == "triton"
    return has_kernel and gather.target is KERNELS.gather.default and len(gather.users) == 1


def _sum_rows(graph: Graph, expand: Node) -> None:
    gather, *operands, spec = expand.args
    assert isinstance(gather, Node)
    rows, anchor, handle, width, _ = gather.args
    expand.target = KERNELS.sum_rows.default
    expand.args = (rows, *operands, anchor, handle, width, spec)
    graph.erase_node(gather)


def _in_a_kernel(node: Node, name: str) -> None:
    """Give a dialect op the kernel of the same name; `add` where nothing is convolved."""
    if name == "inject" and node.args[5] is None:
        name, node.args = "add", (*node.args[:3], node.args[-1])
    node.target = getattr(KERNELS, name).default
    if name != "rows":
        node.meta |= {KERNELS_OF: _specs(node), "mhc_parts": (node.name,)}


def _specs(node: Node) -> tuple[KernelSpec, ...]:
    op = registered(node.target)
    assert op is not None
    return op.parse([value(a) if isinstance(a, Node) else a for a in node.args])[1]


def prepare_hashes(graph: Graph) -> None:
    """Begin to compile what hashes n-grams in this graph."""
    for node in graph.nodes:
        if node.target is KERNELS.rows.default:
            hash_ops.prepare(HashSpec.parse(str(node.args[3])), value(node.args[0]).device.type)
        elif node.target in (KERNELS.sum_rows.default, KERNELS.retrieve.default) and _on_cpu(node.args[0]):
            (sum_rows if node.target is KERNELS.sum_rows.default else top).start()
        elif node.target is KERNELS.over_rows.default:
            hash_ops.prepare(OverEncodingSpec.parse(str(node.args[3])), value(node.args[0]).device.type)


def _on_cpu(tensor: Any) -> bool:
    return value(tensor).device.type == "cpu" and not build.no_compiler()


def _merge(graph: Graph, inject: Node) -> None:
    """Replace `inject` and the gate that it reads by one op."""
    arguments: tuple[Any, ...] = inject.args
    X, gate, fact, reach, conv_gain, conv, spec = arguments
    keys, query_gain, key_gain = gate.args[1:4]
    operands = (X, keys, fact, query_gain, key_gain)
    target = KERNELS.remember.default if conv is None else KERNELS.recall.default
    with graph.inserting_before(inject):
        merged = graph.call_function(target, (*operands, *((reach, conv_gain, conv) if conv is not None else ()), spec))
        new = copy_meta(merged, inject)
        merged.meta |= {KERNELS_OF: _specs(merged), "mhc_parts": (gate.name, inject.name)}
        if conv is not None:
            new = copy_meta(graph.call_function(operator.getitem, (merged, 0)), inject)
    new.meta["example_value"] = value(inject)
    inject.replace_all_uses_with(new)
    graph.erase_node(inject)
    graph.erase_node(gate)


def _reads_its_own_gate(inject: Node) -> bool:
    """Return whether nothing else reads the gate, and no history precedes it."""
    X, gate = inject.args[:2]
    return isinstance(gate, Node) and gate.target is ENGRAM.gate.default and gate.args[0] is X and len(gate.users) == 1
