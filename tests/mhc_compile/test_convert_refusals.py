"""`convert(model)`: what it refuses, by code, and that the model is then as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, VOCAB, Block, chain, ids, shake, state
from torch import Tensor, nn

from mhc_compile import MHCError, convert


def refused(model: nn.Module, *args: Any, **options: Any) -> str:
    """The code of the refusal, which leaves the model as it was."""
    before = state(model)
    with pytest.raises(MHCError) as caught:
        convert(model, *args, **options)
    assert state(model) == before
    assert caught.value.code in str(caught.value)
    return caught.value.code


def test_no_stream() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert refused(model, torch.ones(2, 4)) == "MHC101"


def test_nothing_to_capture() -> None:
    assert refused(nn.Identity(), torch.ones(2, 4)) == "MHC101"


def test_converted_already() -> None:
    model = convert(chain(), ids(), inner="eager")
    assert refused(model, ids()) == "MHC208"
    assert refused(nn.Sequential(model), ids()) == "MHC208"


@pytest.mark.parametrize("taken", ["attribute", "module", "parameter"])
def test_an_owner_with_an_attribute_of_our_name(taken: str) -> None:
    model = chain()
    model.mhc = {"attribute": 1, "module": nn.Linear(2, 2), "parameter": nn.Parameter(torch.ones(1))}[taken]
    assert refused(model, ids()) == "MHC207"


def test_an_owner_whose_forward_was_replaced() -> None:
    model = chain()
    original = model.forward
    model.forward = lambda x: 2 * original(x)
    expected = model(ids())
    assert torch.allclose(convert(model, ids(), inner="eager")(ids()), expected, atol=1e-6)
    shake(model)
    assert not torch.allclose(model(ids()), expected)


def test_an_owner_that_is_not_a_submodule() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [chain()]

        def forward(self, x: Tensor) -> Tensor:
            return self.held[0](x)

    assert refused(Holder(), ids()) == "MHC207"


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_graph_break(where: str) -> None:
    assert refused(chain(breaks=where), ids()) == "MHC104"


def test_no_example_inputs() -> None:
    assert refused(chain()) == "MHC209"


def test_inputs_that_the_forward_rejects() -> None:
    class Rows(nn.Module):
        """Takes the rows of the batch in threes."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).reshape(-1, 3, *x.shape[1:], VOCAB)

    assert refused(Rows(), ids()) == "MHC111"
    with pytest.raises(MHCError, match=r"reshape[\s\S]*source: .*test_convert_refusals.py"):
        convert(Rows(), ids())


def test_a_call_with_inputs_that_the_forward_rejects() -> None:
    class Positions(nn.Module):
        """Knows the positions of eight tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(8, HIDDEN))
            self.layers = chain().layers

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.positions
            for layer in self.layers:
                h = layer(h)
            return h

    model = convert(Positions(), torch.randn(2, 8, HIDDEN), inner="eager")
    with pytest.raises(MHCError, match=r"MHC111[\s\S]*source: .*test_convert_refusals.py"):
        model(torch.randn(2, 5, HIDDEN))


def test_a_graph_module() -> None:
    assert refused(torch.fx.symbolic_trace(chain()), ids()) == "MHC207"


def test_an_owner_called_without_tensors() -> None:
    class Untouched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(1, 3, 32))
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, scale: float = 1.0) -> Tensor:
            x = nn.functional.linear(self.start, torch.eye(32)) * scale
            for layer in self.layers:
                x = layer(x)
            return x

    assert refused(Untouched(), 1.0) == "MHC101"
    with pytest.raises(MHCError, match="MHC207"):
        convert(chain(), ids(), inner="eager")([1, 2])


def test_a_refusal_while_widening_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import mhc_compile.passes.widen

    def refuse(*_: Any) -> None:
        raise MHCError("MHC108", "a chain without an n-stream form")

    monkeypatch.setattr(mhc_compile.passes.widen, "apply_per_stream", refuse)
    assert refused(chain(), ids()) == "MHC108"


@pytest.mark.parametrize("path", ["./model", Path("model"), None])
def test_a_path_is_no_model(path: Any) -> None:
    with pytest.raises(MHCError, match=r"(?s)MHC204.*convert_folder.*from_pretrained"):
        convert(path)
