"""Capture leaves no trace: neither in the model nor in what Dynamo remembers of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile.capture import capture


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def test_one_graph_without_running_it() -> None:
    model = Two()
    ran: list[Any] = []
    model.a.weight.register_hook(ran.append)
    captured = capture(model, (torch.ones(2, 3, 8),), {})
    assert [n.op for n in captured.graph.graph.nodes].count("output") == 1
    assert any(x is model.a.weight for x in captured.inputs)
    assert ran == []


def test_next_compile_of_another_shape_is_static() -> None:
    seen: list[list[Any]] = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        seen.append([v.shape for v in values if isinstance(v, torch.Tensor)])
        return gm

    model = Two()
    capture(model, (torch.ones(2, 3, 8),), {})
    torch.compile(model, backend=backend)(torch.ones(4, 5, 8))
    assert torch.Size((4, 5, 8)) in seen[0]
    assert all(isinstance(d, int) for shape in seen[0] for d in shape)


def test_model_keeps_no_mark_of_the_capture() -> None:
    model = Two()
    before = set(vars(model))
    capture(model, (torch.ones(2, 3, 8),), {})
    assert set(vars(model)) == before


def test_a_capture_is_no_failed_compilation_in_structured_logs() -> None:
    artifacts: list[str] = []

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifacts.append(getattr(record, "metadata", {}).get("artifact", {}).get("name", ""))

    trace, handler = logging.getLogger("torch.__trace"), Names()
    level = trace.level
    trace.addHandler(handler)
    trace.setLevel(logging.DEBUG)
    try:
        capture(Two(), (torch.ones(2, 3, 8),), {})
    finally:
        trace.removeHandler(handler)
        trace.setLevel(level)
    assert artifacts
    assert "dynamo_error" not in artifacts
