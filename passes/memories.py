"""Part of `fuse`: give the ops of memories their kernels."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

import mhc_compile.kernels.engram.gather  # noqa: F401  (registers its ops)
from mhc_compile.kernels.engram import hash_ops
from mhc_compile.kernels.engram.entry import Entry
from mhc_compile.kernels.engram.ops import entry_of
from mhc_compile.kernels.engram.spec import HashSpec, OverEncodingSpec
from mhc_compile.passes.base import copy_meta, value

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
    for node in graph.nodes:
        for name in ("rows", "gate", "inject"):
            if node.target is getattr(ENGRAM, name).default:
                node.target = getattr(KERNELS, name).default
                notes[f"memory's {name} in a kernel"] += 1
                if name != "rows":
                    node.meta["mhc_chain"] = _entry(node, name)
                    node.meta["mhc_parts"] = (node.name,)
        # Other devices have no kernel, and their compilers do well with a chain of whole numbers.
        if node.target is ENGRAM.over_rows.default and value(node.args[0]).device.type in ("cpu", "meta"):
            node.target = KERNELS.over_rows.default
            notes["over-encoding's rows in a kernel"] += 1
    return [f"{count} x {text}" for text, count in notes.items()]


def prepare_hashes(graph: Graph) -> None:
    """Begin to compile what hashes n-grams in this graph."""
    for node in graph.nodes:
        if node.target is KERNELS.rows.default:
            hash_ops.prepare(HashSpec.parse(str(node.args[3])), value(node.args[0]).device.type)
        elif node.target is KERNELS.over_rows.default:
            hash_ops.prepare(OverEncodingSpec.parse(str(node.args[3])), value(node.args[0]).device.type)


def _entry(node: Node, name: str) -> Entry:
    arguments: tuple[Any, ...] = node.args
    X, second, third, *_, conv, spec = arguments
    if name == "gate":
        return entry_of("gate", value(X), spec, keys=value(second))
    return entry_of("inject" if conv is not None else "add", value(X), spec, value=value(third))


def _merge(graph: Graph, inject: Node) -> None:
    """One op for `inject` and the gate that it reads."""
    arguments: tuple[Any, ...] = inject.args
    X, gate, fact, reach, conv_gain, conv, spec = arguments
    keys, query_gain, key_gain = gate.args[1:4]
    given = (X, keys, fact, query_gain, key_gain)
    with graph.inserting_before(inject):
        if conv is None:
            new = copy_meta(graph.call_function(KERNELS.remember.default, (*given, spec)), inject)
            new.meta["mhc_chain"] = entry_of("remember", value(X), spec, keys=value(keys), value=value(fact))
        else:
            both = graph.call_function(KERNELS.recall.default, (*given, reach, conv_gain, conv, spec))
            first = entry_of("gate", value(X), spec, keys=value(keys), joins=True)
            copy_meta(both, inject).meta["mhc_chain"] = (first, entry_of("inject", value(X), spec, value=value(fact)))
            new = copy_meta(graph.call_function(operator.getitem, (both, 0)), inject)
    new.meta["example_value"] = value(inject)
    (new if conv is None else both).meta["mhc_parts"] = (gate.name, inject.name)
    inject.replace_all_uses_with(new)
    graph.erase_node(inject)
    graph.erase_node(gate)


def _reads_its_own_gate(inject: Node) -> bool:
    """Whether nothing else reads the gate, and no history stands in front of it."""
    X, gate = inject.args[:2]
    return isinstance(gate, Node) and gate.target is ENGRAM.gate.default and gate.args[0] is X and len(gate.users) == 1
