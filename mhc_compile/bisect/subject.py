"""The graph that is searched, with inputs at the start of the streams and away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mhc_compile.attach import append_at_start
from mhc_compile.backend import inputs_at_start
from mhc_compile.bisect.places import ResidualSite, residual_sites
from mhc_compile.capture import capture, find_marks, private_copy
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context, Mark
from mhc_compile.passes.results import NATIVE_CODES

NOISE = 0.3
"""Standard deviation of what moves stream parameters off their start, where all streams would be equal."""


@dataclass
class Subject:
    """A captured graph, ready for its passes."""

    graph: GraphModule
    marks: list[Mark]
    start: list[Any]
    """The graph's inputs with every stream parameter at its function-preserving start."""
    own: list[Any]
    """The inputs with the model's own stream parameters, or with moved ones where these are at their start."""
    moved: bool
    residual: list[ResidualSite]
    native: bool
    """Whether the model is multi-stream by itself: its hyper-connections are raised rather than its adds widened."""


def subject_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], spec: StreamSpec, options: Options
) -> Subject:
    """Capture a model, converted or not, in its own mode; it is not changed.

    Raises `MHCError` as `convert` does for a model whose streams cannot be found. The streams of an unconverted model
    get `spec` and parameters of their own.
    """
    with torch.no_grad():
        captured = capture(model, args, kwargs)
    graph, inputs = captured.graph, captured.inputs
    context = Context()
    try:
        analysis, _ = compile_pipeline(options).split("residual")
        analysis.run(private_copy(graph), context, debug=options.debug)
    except MHCError as error:
        if error.code not in NATIVE_CODES or owners(model):
            raise
        return Subject(graph, [], inputs, inputs, moved=False, residual=[], native=True)
    if owners(model):
        marks = find_marks(graph)
    else:
        marks, values = append_at_start(model, graph, spec, options, context.streams)
        inputs = [*inputs, *values]
    start = inputs_at_start(graph, marks, inputs)
    own, moved = inputs, all(_equal(a, b) for a, b in zip(inputs, start, strict=True))
    if moved:
        own = _moved(graph, marks, start)
    return Subject(graph, marks, start, own, moved, residual_sites(context.streams), native=False)


def _equal(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.to(b.dtype), b))


def _moved(graph: GraphModule, marks: Sequence[Mark], start: Sequence[Any]) -> list[Any]:
    parameters = {node for mark in marks for node in mark.parameters.values()}
    generator = torch.Generator().manual_seed(0)
    inputs = list(start)
    for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        if node in parameters and isinstance(inputs[i], Tensor):
            noise = torch.randn(inputs[i].shape, generator=generator) * NOISE
            inputs[i] = inputs[i].detach() + noise.to(inputs[i].device, inputs[i].dtype)
    return inputs


def parameters_read(gm: GraphModule, marks: Sequence[Mark]) -> set[str]:
    """Return the names of the nodes of the stream parameters that a graph computes with.

    A pass that begins to read some changes the function, except at their start.
    """
    live = set(gm.graph.nodes)
    marking = {mark.node for mark in marks}
    return {
        p.name
        for mark in marks
        for p in mark.parameters.values()
        if p in live and any(u not in marking for u in p.users)
    }
