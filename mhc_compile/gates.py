"""Measure how far the gates of a model's memories open for each token.

The model's forward is captured, rewritten as for compiling, and interpreted node by node in eval mode without
gradients, so the figures are those of the equations themselves, whatever compiles the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.measure import Batch, widened
from mhc_compile.modes import in_mode
from mhc_compile.parameters import owners, unwrapped
from mhc_compile.passes.base import Mark


def gate_values(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gates `a` of every memory layer, by the layer's module path: `[B, S, n]`, in (0, 1).

    A gate is how much of what was looked up for a token enters each of the n streams (arXiv 2601.07372, section 3).
    Of a layer that one forward runs several times, the calls follow each other in the first dimension.

    `batch` holds the inputs of one forward call: a tensor, positional inputs in a sequence, or keyword inputs in a
    mapping. Tables may lie anywhere. Raises MHC410 for a model without memories, and what `convert` raises for a
    forward that cannot be captured in one graph.
    """
    model = unwrapped(model)
    if not any(parameters.memories.engram for parameters in owners(model).values()):
        raise MHCError("MHC410", f"{type(model).__name__} holds no memory", way_out="convert(model, engram=...)")
    graph, inputs, marks = widened(model, batch)
    watch = _GateInterpreter(graph, marks)
    with in_mode(model, training=False), torch.no_grad():
        watch.run(*inputs)
    return {layer: torch.cat(calls) for layer, calls in watch.gates.items()}


class _GateInterpreter(Interpreter):
    """Runs a graph with its memories inserted and keeps every gate."""

    def __init__(self, graph: GraphModule, marks: Sequence[Mark]) -> None:
        super().__init__(graph)
        self.gates: dict[str, list[Tensor]] = {}
        self._layers: dict[Node, str] = {}
        """The layer of each memory by the parameter that no other gate reads."""
        for mark in marks:
            for layer in () if mark.memories.engram is None else mark.memories.engram.paths:
                path = f"{mark.owner}.{layer}".strip(".")
                self._layers[mark.parameters[f"engram.{layer}.key_gain"]] = path

    def run_node(self, n: Node) -> Any:
        """Run one node, and keep the result of a gate."""
        out = super().run_node(n)
        if n.target is torch.ops.engram.gate.default:
            gain = n.args[3]
            assert isinstance(gain, Node)
            if gain not in self._layers:  # stored as what is added to 1
                gain = next(above for above in gain.all_input_nodes if above in self._layers)
            self.gates.setdefault(self._layers[gain], []).append(out)
        return out
