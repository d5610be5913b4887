"""Every refusal of the analysis, on small models that deserve it: the code, the node, the module, the user's line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile import MHCError, convert
from mhc_compile.capture import capture
from mhc_compile.passes.base import Context
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline
from mhc_compile.passes.verify import VerificationError, verify

WIDTH = 16


def layer(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())


class Layers(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(count))


class NoStream(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for f in self.layers:
            x = f(x)
        return x


class Fork(Layers):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inside(x)
        x = x + self.layers[0](x)
        left = x + self.layers[1](x)
        right = x + self.layers[2](x)
        return left, right


class Lost(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.layers[0](x)
        for f in self.layers[1:]:
            x = f(x)
        return x


class Mutated(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.layers[0](x)
        x[:, 0] = 0.0
        x = x + self.layers[1](x)
        return x + self.layers[2](x)


class Widening(nn.Module):
    """Padding doubles the stream's width between two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.first, self.second = nn.Linear(WIDTH, WIDTH), layer(), layer(2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        x = x + self.first(x)
        x = x.reshape(x.shape[0], x.shape[1] // 2, 2 * WIDTH)
        return x + self.second(x)


class Streams(Layers):
    """n streams of its own, [B, S, n, C] or [n, B, S, C], mixed and read as hyper-connections do."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.mix = nn.Parameter(torch.eye(4) + 0.1)
        self.embed = nn.Embedding(32, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inside(self.embed(ids))
        x = x.unsqueeze(0).repeat(4, 1, 1, 1) if self.first else x.unsqueeze(2).repeat(1, 1, 4, 1)
        for f in self.layers:
            y = f(x.mean(0 if self.first else 2))
            x = torch.einsum("nm,mbsc->nbsc" if self.first else "nm,bsmc->bsnc", self.mix, x)
            x = x + y.unsqueeze(0 if self.first else 2)
        return x.mean(0 if self.first else 2)


class ChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv1d(4, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for f in self.layers:
            x = x + f(x)
        return x


class Breaks(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for f in self.layers:
            x = x + f(x)
            if float(x.sum()) > 1e9:
                x = x * 0
        return x


X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).reshape(2, 6)
CASES = [
    pytest.param(NoStream(), X, "MHC101", id="no stream"),
    pytest.param(Fork(), X, "MHC102", id="two candidates"),
    pytest.param(Lost(14), X, "MHC103", id="lost"),
    pytest.param(Breaks(), X, "MHC104", id="graph break"),
    pytest.param(Widening(), X, "MHC105", id="shape changes"),
    pytest.param(Mutated(), X, "MHC106", id="mutated"),
    pytest.param(Streams(first=False), IDS, "MHC107", id="streams before channels"),
    pytest.param(Streams(first=True), IDS, "MHC107", id="streams first"),
    pytest.param(ChannelsFirst(), torch.randn(2, 4, 20), "MHC108", id="channels first"),
]


@pytest.mark.parametrize(("model", "example", "code"), CASES)
def test_refusal_has_its_code_and_leaves_the_model(model: nn.Module, example: torch.Tensor, code: str) -> None:
    state = {n: p.clone() for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    before = None if code == "MHC104" else model(example)
    with pytest.raises(MHCError) as refused:
        convert(model, example, streams=4, inner="eager")
    assert refused.value.code == code
    assert code in str(refused.value)
    assert "fix: " in str(refused.value)
    assert [type(m) for m in model.modules()] == classes
    assert state.keys() == dict(model.named_parameters()).keys()
    if before is not None:
        torch.testing.assert_close(model(example), before)


@pytest.mark.parametrize(("model", "example"), [(Fork(), X), (Mutated(), X), (Widening(), X)])
def test_refusal_names_node_module_and_the_users_line(model: nn.Module, example: torch.Tensor) -> None:
    with pytest.raises(MHCError) as refused:
        convert(model, example, streams=4, inner="eager")
    assert refused.value.node
    assert refused.value.module
    assert "test_refusals.py:" in (refused.value.source or "")


@dataclass(frozen=True)
class Wrong:
    """A pass that halves the last value: what no check but numbers can see."""

    name: ClassVar[str] = "wrong"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    shift: bool = False

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        last = next(n for n in reversed(gm.graph.nodes) if n.op == "call_function")
        with gm.graph.inserting_after(last):
            new = gm.graph.call_method("sum" if self.shift else "mul", (last, -1 if self.shift else 0.5))
        last.replace_all_uses_with(new)
        new.args = (last, new.args[1])
        new.meta["mhc_from"] = last.name
        if self.shift:
            new.meta["example_value"] = last.meta["example_value"]
        return gm


def test_numeric_debugging_finds_a_wrong_pass() -> None:
    captured = capture(Fork(), (X,), {})
    context = Context(inputs=captured.inputs)
    with pytest.raises(MHCError, match="pass wrong moved output") as found:
        Pipeline((Normalize(), Wrong())).run(captured.graph, context, debug="numeric")
    assert found.value.code == "MHC110"


def test_a_wrong_shape_does_not_pass_verification() -> None:
    captured = capture(Fork(), (X,), {})
    with pytest.raises(VerificationError, match="after pass wrong"):
        Pipeline((Normalize(), Wrong(shift=True))).run(captured.graph, Context(), debug=True)


def test_the_right_passes_pass_both_checks() -> None:
    captured = capture(Plain(), (X,), {})
    observer = Observer(snapshots=True)
    context = Context(inputs=captured.inputs)
    gm = ANALYSIS.run(captured.graph, context, observer, debug="numeric")
    verify(gm, whole=True, after="all")
    assert [r.name for r in observer.records] == ["normalize", "residual"]
    assert [len(s.sites) for s in context.streams] == [3]


class Plain(Layers):
    """What none of the above is: a plain pre-norm stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for f in self.layers:
            x = x + f(x)
        return x
