"""An unconverted model under the backend: converted at its first call, or refused and left as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import Block, Outer, chain, close, code_of, ids, llama, logits, shake, state, t5, warned
from torch import Tensor, nn

from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.kernels import in_cpp
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.kernelspec import Direction, KernelSpec
from mhc_compile.parameters import owners

EAGER: dict[str, Any] = {"backend": "mhc", "options": {"inner": "eager", "streams": 2}}


@pytest.mark.compat
@pytest.mark.parametrize("make", [chain, llama])
def test_conversion_at_the_first_call(make: Any) -> None:
    model = make()
    expected = logits(model(ids()))
    step = torch.compile(model, **EAGER)
    with warned() as codes:
        outputs = [logits(step(ids())) for _ in range(3)]
    assert codes == ["MHC302"]
    assert all(close(out, expected) for out in outputs)
    shake(model)
    assert not close(logits(step(ids())), expected)
    assert torch.equal(logits(step(ids())), logits(model(ids())))
    assert {p.spec.streams for p in owners(model).values()} == {2}


@pytest.mark.compat
def test_the_first_call_trains_the_new_parameters() -> None:
    model = llama()
    with warned():
        torch.compile(model, **EAGER)(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in stream_parameters(model).items() if name.endswith("phi"))


def test_the_first_call_in_inference_mode_leaves_trainable_parameters() -> None:
    model = chain()
    step = torch.compile(model, **EAGER)
    with torch.inference_mode(), warned():
        step(ids())
    step(ids()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compile_in_place() -> None:
    model = chain()
    expected = model(ids())
    model.compile(**EAGER)
    with warned() as codes:
        assert all(close(model(ids()), expected) for _ in range(2))
    assert codes == ["MHC302"]
    shake(model)
    assert not close(model(ids()), expected)


def test_two_owners_are_converted_together() -> None:
    model = t5()
    step = torch.compile(model, **EAGER)
    with warned() as codes:
        step(input_ids=ids(), labels=ids())
    assert codes == ["MHC302"]
    assert list(owners(model)) == ["encoder", "decoder"]


@pytest.mark.parametrize("argument", [True, False])
def test_a_function_of_a_module(argument: bool) -> None:
    model = llama()
    expected = model(ids()).logits
    if argument:
        compiled = torch.compile(lambda m, x: m(x).logits, **EAGER)
        step = lambda x: compiled(model, x)  # noqa: E731
    else:
        step = torch.compile(lambda x: model(x).logits, **EAGER)
    with warned() as codes:
        assert all(close(step(ids()), expected) for _ in range(2))
    assert codes == ["MHC302"]
    shake(model)
    assert torch.equal(step(ids()), model(ids()).logits)


def test_breaks_outside_the_stream() -> None:
    model = Outer(chain())
    expected = model(ids())
    step = torch.compile(model, **EAGER)
    with warned() as codes:
        assert all(close(step(ids()), expected) for _ in range(2))
    assert codes == ["MHC302"]
    assert list(owners(model)) == ["inner"]


def test_a_part_without_streams_is_compiled_as_it_is_and_told() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            torch._dynamo.graph_break()
            return y.relu()

    model = Head()
    x = torch.ones(2, 4)
    with warned() as codes:
        assert torch.equal(torch.compile(model, **EAGER)(x), model(x))
    assert set(codes) == {"MHC305"}


@pytest.mark.parametrize("where", ["before", "inside", "after"])
@pytest.mark.parametrize("call", ["module", "in place", "function"])
def test_a_break_in_the_owner_is_refused(where: str, call: str) -> None:
    model = chain(breaks=where)
    before = state(model)
    if call == "in place":
        model.compile(**EAGER)
        step: Any = model
    else:
        step = torch.compile(model if call == "module" else lambda x: model(x), **EAGER)
    with pytest.raises(Exception, match="MHC") as caught:
        step(ids())
    assert code_of(caught.value) in (("MHC303", "MHC104") if call == "function" else ("MHC104",))
    assert state(model) == before


def test_layers_behind_a_break_are_not_converted_one_by_one() -> None:
    class Skipped(nn.Module):
        """Dynamo gives up the loop's frame and compiles each layer on its own."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        @torch._dynamo.disable(recursive=False)
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Skipped()
    before = state(model)
    with pytest.raises(Exception, match="MHC104") as caught:
        torch.compile(model, **EAGER)(torch.ones(2, 3, 32))
    assert code_of(caught.value) == "MHC104"
    assert state(model) == before


def test_a_stream_in_a_function_is_refused() -> None:
    layers = [Block(), Block()]

    @torch.compile(**EAGER)
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    with pytest.raises(Exception, match="MHC303") as caught:
        run(torch.ones(2, 3, 32))
    assert code_of(caught.value) == "MHC303"


def test_a_function_without_a_stream_is_refused() -> None:
    with pytest.raises(Exception, match="MHC101") as caught:
        torch.compile(lambda x: x.sin() + 1, **EAGER)(torch.ones(3))
    assert code_of(caught.value) == "MHC101"


def test_an_owner_with_an_attribute_of_our_name_is_refused() -> None:
    model = chain()
    model.mhc = "taken"
    before = state(model)
    for _ in range(2):
        with pytest.raises(Exception, match="MHC207") as caught:
            torch.compile(model, **EAGER)(ids())
        assert code_of(caught.value) == "MHC207"
    assert state(model) == before


def test_a_refused_model_runs_uncompiled() -> None:
    model = chain(breaks="inside")
    expected = model(ids())
    with pytest.raises(Exception, match="MHC104"):
        torch.compile(model, **EAGER)(ids())
    assert torch.equal(model(ids()), expected)
    assert not stream_parameters(model)


def test_a_call_without_gradients_compiles_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: set[str] = set()
    library = in_cpp.library

    def noted(spec: KernelSpec, direction: Direction) -> Any:
        begun.add(direction)
        return library(spec, direction)

    monkeypatch.setattr(in_cpp, "library", noted)
    model = convert(chain(), ids())
    with torch.no_grad():
        model(ids())
    assert begun == ({"forward"} if not build.compiler_problem() else set())
    model(ids()).sum().backward()
    assert begun == ({"forward", "backward"} if not build.compiler_problem() else set())


def test_plain_calls_see_what_changes_between_them() -> None:
    model, plain = llama(attention_dropout=0.5), llama(attention_dropout=0.5)
    convert(model)
    shake(model)
    convert(plain, inner="eager")
    plain.load_state_dict(model.state_dict())

    def agree(tolerance: float = 2e-6) -> Tensor:
        results = []
        for each in (model, plain):
            torch.manual_seed(1)
            results.append(each(ids()).logits)
        assert close(*results, tolerance)
        return results[0]

    with torch.no_grad():
        seen = [agree()]
        hooks = [m.model.layers[1].mlp.register_forward_hook(lambda *call: 2 * call[-1]) for m in (model, plain)]
        seen.append(agree())
        for hook in hooks:
            hook.remove()
        assert torch.equal(agree(), seen[0])
        for each in (model, plain):
            each.train()
        seen.append(agree())
        for each in (model, plain):
            each.eval()
            projection = each.model.layers[0].mlp.up_proj
            projection.weight = nn.Parameter(torch.ones_like(projection.weight))
        seen.append(agree())
        for each in (model, plain):
            each.to(torch.bfloat16)
        assert agree(3e-2).dtype == torch.bfloat16
    assert not any(close(one, other, 1e-4) for one, other in itertools.combinations(seen, 2))


def test_a_model_converted_at_its_first_call_cannot_be_converted_again() -> None:
    model = chain()
    with warned():
        torch.compile(model, **EAGER)(ids())
    with pytest.raises(MHCError, match="MHC208"):
        convert(model, ids())
