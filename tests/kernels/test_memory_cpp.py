"""The generated C++ of memories against the float64 reference, and the ways in which tensors come."""

from __future__ import annotations

from typing import Any

import memory_steps
import pytest
import torch
from chains import error
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_steps import STEPS, Values, errors, exactly, name_of, random_flow, random_inputs

from mhc_compile.kernels import in_cpp as cpp
from mhc_compile.kernels import targets
from mhc_compile.kernels.cpp import build, memory
from mhc_compile.kernels.kernelspec import Sizes
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep

pytestmark = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: plain PyTorch computes")
SOME = settings(max_examples=60, deadline=None, derandomize=True)
INJECT = STEPS[:4]


def both(step: MemoryStep, inputs: Values, flow: Values) -> Values:
    return memory_steps.both(targets.TARGETS["cpp"], step, inputs, flow)


def check(step: MemoryStep, sizes: Sizes, seed: int, scale: float = 1.0) -> None:
    inputs, flow = random_inputs(step, sizes, seed, scale), random_flow(step, sizes, seed + 1)
    found = both(step, inputs, flow)
    half = bool({torch.bfloat16, torch.float16} & {*step.floats().values()})
    for name, (ours, plain) in errors(step, found, inputs, flow).items():
        assert found[name].dtype == step.dtype(name)
        floor = 1e-5 if found[name].dtype == torch.float32 and not half else 1e-2
        assert ours <= max(floor, 3 * plain), f"{name}: {ours} against {plain}"


def sizes_of(step: MemoryStep, batch: int, tokens: int, before: int = 0) -> Sizes:
    return (batch, tokens) if step.gates else (batch, tokens, before)


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_every_step_equals_the_reference(step: MemoryStep) -> None:
    assert targets.choose(step, "cpu") == ("cpp", "")
    check(step, sizes_of(step, 2, 37), seed=0)
    check(step, sizes_of(step, 1, 150, step.spec.history), seed=1)  # several blocks
    if step.gates:
        check(step, (5,), seed=2)


@SOME
@given(
    st.sampled_from(STEPS), st.integers(1, 3), st.integers(1, 40), st.sampled_from(["none", "whole", "some"]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_number_of_tokens_and_of_history(
    step: MemoryStep, batch: int, tokens: int, history: str, seed: int
) -> None:
    before = {"none": 0, "whole": step.spec.history or 4, "some": 1}[history]
    check(step, sizes_of(step, batch, tokens, before), seed)


@SOME
@given(st.sampled_from(INJECT), st.integers(1, 30), st.integers(0, 99), st.data())
def test_a_sequence_in_two_parts_equals_the_whole(step: MemoryStep, tokens: int, seed: int, data: Any) -> None:
    """Values to the bit; the gradient of a row is the sum of those through its own part and through the next one."""
    at, keep = data.draw(st.integers(0, tokens)), step.spec.history
    whole = (2, tokens, 0)
    inputs, flow = random_inputs(step, whole, seed), random_flow(step, whole, seed + 1)
    expected = both(step, inputs, flow)
    padded = {k: torch.nn.functional.pad(inputs[k], (0, 0, keep, 0)) for k in ("a", "value")}
    parts, gradients = [], {k: torch.zeros_like(v, dtype=torch.float32) for k, v in padded.items()}
    sums = {k: torch.zeros_like(inputs[k]) for k in ("conv_gain", "conv")}
    for first, last in ((0, at), (at, tokens)):
        part = {k: v[:, first : last + keep] for k, v in padded.items()}
        part = {**inputs, **part, **{k: inputs[k][:, first:last] for k in ("X", "reach")}}
        found = both(step, part, {k: v[:, first:last] for k, v in flow.items()})
        parts.append(found["next_X"])
        for k, total in gradients.items():
            total[:, first : last + keep] += found[f"d_{k}"].float()
        for k, total in sums.items():
            total += found[f"d_{k}"]
    assert torch.equal(torch.cat(parts, 1), expected["next_X"])
    tolerance = 2e-2 if step.value_dtype == torch.bfloat16 else 1e-5
    for k, total in gradients.items():
        assert error(total[:, keep:], expected[f"d_{k}"]) < tolerance, k
    for k, total in sums.items():
        assert error(total, expected[f"d_{k}"]) < 1e-5, k


@pytest.mark.parametrize("step", INJECT, ids=name_of)
def test_documents_do_not_see_each_other(step: MemoryStep) -> None:
    sizes, start = (1, 60, 0), 23
    inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
    inputs["reach"] = torch.cat([torch.arange(start), torch.arange(60 - start)])[None]
    expected = both(step, inputs, flow)
    other = {k: v.clone() for k, v in inputs.items()}
    other["value"][:, :start] = torch.nan
    found = both(step, other, flow)
    assert torch.equal(found["next_X"][:, start:], expected["next_X"][:, start:])
    for name in ("d_a", "d_value"):
        assert torch.equal(found[name][:, start:], expected[name][:, start:])
    alone = {k: v[:, start:] if k in ("X", "a", "value", "reach") else v for k, v in inputs.items()}
    second = both(step, alone, {k: v[:, start:] for k, v in flow.items()})
    assert torch.equal(second["next_X"], expected["next_X"][:, start:])


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_outputs_are_written_whole_and_twice_the_same(step: MemoryStep, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(step, 2, 70, 3)
    inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
    expected = both(step, inputs, flow)
    monkeypatch.setattr(memory.POOL, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))
    found = both(step, inputs, flow)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # Threads share out the tokens: sums change by rounding, and not from run to run.
    torch.set_num_threads(3)
    shared = both(step, inputs, flow)
    again = both(step, inputs, flow)
    for name, value in expected.items():
        assert torch.equal(shared[name], again[name]), name
        assert error(shared[name], value) < 1e-5, name


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_layouts_other_than_contiguous(step: MemoryStep) -> None:
    sizes = sizes_of(step, 3, 5, 2)
    inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
    expected = both(step, inputs, flow)
    apart = [{k: torch.stack([v, v], -1)[..., 0] for k, v in values.items()} for values in (inputs, flow)]
    every_second = {**inputs, "X": torch.stack([inputs["X"], inputs["X"]], 2).flatten(1, 2)[:, ::2]}
    for values, gradient in (apart, (every_second, flow)):
        found = both(step, values, gradient)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("step", STEPS, ids=name_of)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_extreme_values_stay_finite(step: MemoryStep, scale: float) -> None:
    sizes = sizes_of(step, 2, 9, 2)
    scale = min(scale, 1e3) if torch.float16 in step.floats().values() else scale  # the dtype's own end
    inputs, flow = random_inputs(step, sizes, 0, scale), random_flow(step, sizes, 1)
    if "a" in inputs:
        inputs["a"][:, ::3], inputs["a"][:, 1::3] = 0.0, 1.0
    for name, value in both(step, inputs, flow).items():
        assert value.isfinite().all(), name


def test_scores_about_the_floor_of_the_signed_root() -> None:
    step, scores = STEPS[7], torch.tensor([-1e-3, -2e-6, -5e-7, 0.0, 5e-7, 2e-6, 1e-3])
    n, C, sizes = step.streams, step.width, (1, len(scores))
    inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
    for name, column in (("X", 0), ("keys", 1)):
        inputs[name].zero_()
        inputs[name][..., column] = 1.0
        inputs[{"X": "query_gain", "keys": "key_gain"}[name]].fill_(1.0)
    inputs["keys"][..., 0] = (scores / C**0.5)[None, :, None].expand(1, -1, n)
    found, exact = both(step, inputs, flow), exactly(step, inputs, flow)
    torch.testing.assert_close(found["d_X"].double(), exact["d_X"], rtol=1e-3, atol=1e-4)
    assert not found["d_keys"][:, 2:5].any()
    assert all(found["d_keys"][:, at].any() for at in (0, 1, 5, 6))


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_no_tokens(step: MemoryStep) -> None:
    for sizes in ((1, 0), (0, 4)) if step.gates else ((2, 0, 3), (0, 4, 0)):
        found = both(step, random_inputs(step, sizes, 0), random_flow(step, sizes, 1))
        assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("lanes", [4, 8])
def test_machines_with_shorter_vectors(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lanes", lambda: lanes)
    cpp.library.cache_clear()
    try:
        step = STEPS[3 if lanes == 4 else 7]
        assert f"constexpr int LANES = {lanes};" in targets.TARGETS["cpp"].source(step, "forward").text
        check(step, sizes_of(step, 1, 13), seed=0)
    finally:
        cpp.library.cache_clear()


def test_what_has_no_kernel_is_left_to_plain_pytorch() -> None:
    wide = MemoryStep(kind="gate", streams=2, width=4, spec=FusionSpec(), keys_dtype=torch.float64)
    target, why = targets.choose(wide, "cpu")
    assert target == "reference"
    assert "float64" in why
    assert targets.choose(STEPS[0], "mps") == ("reference", "no kernels for mps")
    with pytest.raises(ValueError, match="float64"):
        targets.source(wide, "forward", "cpu")
    assert "inject_n4_c48_float32" in targets.source(STEPS[0], "backward", "cpu").text
    targets.prepare(STEPS[0], "cpu")
    assert cpp.library(STEPS[0], "forward").result()


def test_nothing_travels_that_need_not() -> None:
    def values(kind: Any, *, backward: bool) -> float:
        step = MemoryStep(kind=kind, streams=4, width=64, spec=FusionSpec(dilation=3))
        return step.bytes_moved(10, backward=backward) / (10 * 64 * 4)

    assert [values(kind, backward=False) for kind in ("gate", "add", "inject", "remember")] == [8, 9, 9, 13]
    assert [values(kind, backward=True) for kind in ("gate", "add", "inject", "remember")] == [16, 6, 6, 22]
    joined = MemoryStep(kind="gate", streams=4, width=64, spec=FusionSpec(), joins=True)
    assert joined.bytes_moved(10, backward=True) == 20 * 10 * 64 * 4
