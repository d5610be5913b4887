"""The calls of one sampled step: the figures that graphs recorded, and the gradients.

A sampled step gives every stream owner a *slot*, which goes into the owner's graph by `mhc::mark` and by which Dynamo
tells sampled steps from others. What runs a sampled graph finds the record of its step by the slot, and puts a new slot
in its place for each call: calls may run, and their gradients come back, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from mhc_compile.kernels.forms import DepthForm, form_of
from mhc_compile.kernels.probe_ops import DEPTH_GRADIENTS, depth_layout, gradient_layout, layout, size
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.results import Probed

Shapes = dict[str, tuple[int, ...]]


def layouts(parameters: StreamParameters) -> tuple[Shapes, Shapes]:
    """Return what is recorded of a site of an owner: the shapes of its figures and of its gradients, in order."""
    spec = parameters.spec
    form = form_of(spec)
    if isinstance(form, DepthForm):
        return depth_layout(len(parameters.sites) + 1, weights=form.tells_weights), DEPTH_GRADIENTS
    return layout(spec.streams), gradient_layout(spec.streams)


@dataclass
class Call:
    """The figures that one run of a graph recorded of an owner; tensors are on its device."""

    rows: tuple[str, ...]
    """The sites of the rows of `squares`."""
    sites: tuple[str, ...]
    """The calls of sites, in their order, of which `figures` has rows; a name may be there several times."""
    layers: tuple[str, ...]
    """The same of memories and `counts`."""
    look_ups: tuple[str, ...]
    """The same of what looks rows of tables up and `found`."""
    figures: Tensor | None = None
    """`[len(sites), values]`, laid out as `layouts` says."""
    counts: Tensor | None = None
    """`[len(layers), n, bins]`."""
    found: tuple[Tensor, ...] = ()
    """The numbers of the rows of each, int64."""
    squares: Tensor | None = None
    """`[rows, values]`: squared norms of the gradients; None before a backward pass."""


@dataclass
class Record:
    """All calls of one owner in one sampled step."""

    owner: str
    """The owner's module path."""
    parameters: StreamParameters
    calls: list[Call] = field(default_factory=list)

    def open(self) -> None:
        """Pass a slot to the owner's calls from now on."""
        device = next(self.parameters.parameters()).device
        _, gradients = layouts(self.parameters)
        shape = (len(self.parameters.sites), size(gradients))
        with torch.inference_mode(False):
            slot = torch.zeros(shape, dtype=torch.float64, device=device, requires_grad=True)
        _records[slot] = self
        self.parameters.probe_slot = slot

    def close(self) -> None:
        """Let the owner's calls run graphs without probes again."""
        self.parameters.probe_slot = None


_records = WeakTensorKeyDictionary()
"""The open record by its slot."""


def recording(compiled: Callable[..., Any], gm: GraphModule, probed: Sequence[Probed]) -> Callable[..., Any]:
    """Return a function that runs `compiled`, the graph `gm` after the pass `probe`, with the results from before it.

    The results that the pass added go to the records of the call's slots.
    """
    position = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    at = [position[p.slot] for p in probed]
    names_of = [(tuple(p.rows), tuple(p.sites), tuple(p.layers), tuple(p.look_ups)) for p in probed]
    added = [(bool(p.figures), bool(p.counts), len(p.found)) for p in probed]
    count = sum(map(sum, added))

    def run(*inputs: Any) -> Any:
        arguments = list(inputs)
        calls = []
        # A checkpointed forward that the backward pass runs again was recorded the first time.
        again = torch._C._current_graph_task_id() != -1
        for i, names in zip(at, names_of, strict=True):
            call = Call(*names)
            record = _records.get(inputs[i])
            if record is not None and not again:
                record.calls.append(call)
            arguments[i] = _watched(inputs[i], call)
            calls.append(call)
        results = compiled(*arguments)
        original, recorded = results[:-count], iter(results[-count:])
        for call, (figures, counts, look_ups) in zip(calls, added, strict=True):
            # Copies: the memory of a CUDA graph's results belongs to its next run.
            call.figures = next(recorded).clone() if figures else None
            call.counts = next(recorded).clone() if counts else None
            call.found = tuple(next(recorded).clone() for _ in range(look_ups))
        return original

    return run


def _watched(slot: Tensor, call: Call) -> Tensor:
    """Return a new slot for the call, whose gradient becomes `call.squares`."""
    watched = torch.zeros_like(slot, requires_grad=True)

    def keep(gradient: Tensor) -> None:
        squares = gradient.detach().clone()
        call.squares = squares if call.squares is None else call.squares + squares

    if watched.requires_grad and torch.is_grad_enabled():
        watched.register_hook(keep)
    return watched
