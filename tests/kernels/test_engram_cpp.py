"""The generated C++ of memories against the float64 reference, and the ways in which tensors come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import error
from engram_entries import ENTRIES, Values, backward_values, errors, exactly, name_of, random_flow, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.kernels.cpp import build, memory
from mhc_compile.kernels.engram import providers
from mhc_compile.kernels.engram.cpp import run as cpp
from mhc_compile.kernels.engram.entry import Entry, Sizes
from mhc_compile.kernels.engram.spec import FusionSpec

pytestmark = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: plain PyTorch computes")
SOME = settings(max_examples=60, deadline=None, derandomize=True)
INJECT = ENTRIES[:4]


def both(entry: Entry, inputs: Values, flow: Values, sizes: Sizes) -> Values:
    out = cpp.run(entry, "forward", inputs, sizes)
    return {**out, **cpp.run(entry, "backward", backward_values(entry, inputs, flow), sizes)}


def check(entry: Entry, sizes: Sizes, seed: int, scale: float = 1.0) -> None:
    inputs, flow = random_inputs(entry, sizes, seed, scale), random_flow(entry, sizes, seed + 1)
    found = both(entry, inputs, flow, sizes)
    half = bool({torch.bfloat16, torch.float16} & {*entry.dtypes()})
    for name, (ours, plain) in errors(entry, found, inputs, flow, sizes).items():
        assert found[name].dtype == entry.dtype(name)
        floor = 1e-5 if found[name].dtype == torch.float32 and not half else 1e-2
        assert ours <= max(floor, 3 * plain), f"{name}: {ours} against {plain}"


def sizes_of(entry: Entry, batch: int, tokens: int, before: int = 0) -> Sizes:
    return Sizes(1, batch * tokens) if entry.gates else Sizes(batch, tokens, before)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_every_entry_equals_the_reference(entry: Entry) -> None:
    assert providers.choose(entry, "cpu") == ("cpp", "")
    check(entry, sizes_of(entry, 2, 37), seed=0)
    check(entry, sizes_of(entry, 1, 150, entry.spec.history), seed=1)  # several blocks


@SOME
@given(
    st.sampled_from(ENTRIES), st.integers(1, 3), st.integers(1, 40), st.sampled_from(["none", "whole", "some"]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_number_of_tokens_and_of_history(entry: Entry, batch: int, tokens: int, history: str, seed: int) -> None:
    before = {"none": 0, "whole": entry.spec.history or 4, "some": 1}[history]
    check(entry, sizes_of(entry, batch, tokens, before), seed)


@SOME
@given(st.sampled_from(INJECT), st.integers(1, 30), st.integers(0, 99), st.data())
def test_a_sequence_in_two_parts_equals_the_whole(entry: Entry, tokens: int, seed: int, data: Any) -> None:
    """Values to the bit; the gradient of a row is the sum of those through its own part and through the next one."""
    at, keep = data.draw(st.integers(0, tokens)), entry.spec.history
    whole = Sizes(2, tokens)
    inputs, flow = random_inputs(entry, whole, seed), random_flow(entry, whole, seed + 1)
    expected = both(entry, inputs, flow, whole)
    padded = {k: torch.nn.functional.pad(inputs[k], (0, 0, keep, 0)) for k in ("a", "value")}
    parts, gradients = [], {k: torch.zeros_like(v, dtype=torch.float32) for k, v in padded.items()}
    sums = {k: torch.zeros_like(inputs[k]) for k in ("conv_gain", "conv")}
    for first, last in ((0, at), (at, tokens)):
        part = {k: v[:, first : last + keep] for k, v in padded.items()}
        part = {**inputs, **part, **{k: inputs[k][:, first:last] for k in ("X", "reach")}}
        sizes = Sizes(2, last - first, keep)
        found = both(entry, part, {k: v[:, first:last] for k, v in flow.items()}, sizes)
        parts.append(found["next_X"])
        for k, total in gradients.items():
            total[:, first : last + keep] += found[f"d_{k}"].float()
        for k, total in sums.items():
            total += found[f"d_{k}"]
    assert torch.equal(torch.cat(parts, 1), expected["next_X"])
    tolerance = 2e-2 if entry.value_dtype == torch.bfloat16 else 1e-5
    for k, total in gradients.items():
        assert error(total[:, keep:], expected[f"d_{k}"]) < tolerance, k
    for k, total in sums.items():
        assert error(total, expected[f"d_{k}"]) < 1e-5, k


@pytest.mark.parametrize("entry", INJECT, ids=name_of)
def test_documents_do_not_see_each_other(entry: Entry) -> None:
    sizes, start = Sizes(1, 60), 23
    inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
    inputs["reach"] = torch.cat([torch.arange(start), torch.arange(60 - start)])[None]
    expected = both(entry, inputs, flow, sizes)
    other = {k: v.clone() for k, v in inputs.items()}
    other["value"][:, :start] = torch.nan
    found = both(entry, other, flow, sizes)
    assert torch.equal(found["next_X"][:, start:], expected["next_X"][:, start:])
    for name in ("d_a", "d_value"):
        assert torch.equal(found[name][:, start:], expected[name][:, start:])
    alone = {k: v[:, start:] if k in ("X", "a", "value", "reach") else v for k, v in inputs.items()}
    second = both(entry, alone, {k: v[:, start:] for k, v in flow.items()}, Sizes(1, 60 - start))
    assert torch.equal(second["next_X"], expected["next_X"][:, start:])


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_outputs_are_written_whole_and_twice_the_same(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(entry, 2, 70, 3)
    inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
    expected = both(entry, inputs, flow, sizes)
    monkeypatch.setattr(memory.POOL, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))
    found = both(entry, inputs, flow, sizes)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # Threads share out the tokens: sums change by rounding, and not from run to run.
    torch.set_num_threads(3)
    shared = both(entry, inputs, flow, sizes)
    again = both(entry, inputs, flow, sizes)
    for name, value in expected.items():
        assert torch.equal(shared[name], again[name]), name
        assert error(shared[name], value) < 1e-5, name


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_layouts_other_than_contiguous(entry: Entry) -> None:
    sizes = sizes_of(entry, 3, 5, 2)
    inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
    expected = both(entry, inputs, flow, sizes)
    apart = [{k: torch.stack([v, v], -1)[..., 0] for k, v in values.items()} for values in (inputs, flow)]
    every_second = {**inputs, "X": torch.stack([inputs["X"], inputs["X"]], 2).flatten(1, 2)[:, ::2]}
    for values, gradient in (apart, (every_second, flow)):
        found = both(entry, values, gradient, sizes)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_extreme_values_stay_finite(entry: Entry, scale: float) -> None:
    sizes = sizes_of(entry, 2, 9, 2)
    scale = min(scale, 1e3) if torch.float16 in entry.dtypes() else scale  # the dtype's own end
    inputs, flow = random_inputs(entry, sizes, 0, scale), random_flow(entry, sizes, 1)
    if "a" in inputs:
        inputs["a"][:, ::3], inputs["a"][:, 1::3] = 0.0, 1.0
    for name, value in both(entry, inputs, flow, sizes).items():
        assert value.isfinite().all(), name


def test_scores_about_the_floor_of_the_signed_root() -> None:
    entry, scores = ENTRIES[7], torch.tensor([-1e-3, -2e-6, -5e-7, 0.0, 5e-7, 2e-6, 1e-3])
    n, C, sizes = entry.streams, entry.width, Sizes(1, len(scores))
    inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
    for name, column in (("X", 0), ("keys", 1)):
        inputs[name].zero_()
        inputs[name][..., column] = 1.0
        inputs[{"X": "query_gain", "keys": "key_gain"}[name]].fill_(1.0)
    inputs["keys"][..., 0] = (scores / C**0.5)[None, :, None].expand(1, -1, n)
    found, exact = both(entry, inputs, flow, sizes), exactly(entry, inputs, flow, sizes)
    torch.testing.assert_close(found["d_X"].double(), exact["d_X"], rtol=1e-3, atol=1e-4)
    assert not found["d_keys"][:, 2:5].any()
    assert all(found["d_keys"][:, at].any() for at in (0, 1, 5, 6))


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_no_tokens(entry: Entry) -> None:
    for sizes in (Sizes(1, 0), Sizes(0, 4)) if entry.gates else (Sizes(2, 0, 3), Sizes(0, 4)):
        found = both(entry, random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1), sizes)
        assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("lanes", [4, 8])
def test_machines_with_shorter_vectors(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lanes", lambda: lanes)
    cpp._library.cache_clear()
    try:
        entry = ENTRIES[3 if lanes == 4 else 7]
        assert f"constexpr int LANES = {lanes};" in cpp.source(entry, "forward")
        check(entry, sizes_of(entry, 1, 13), seed=0)
    finally:
        cpp._library.cache_clear()


def test_what_has_no_kernel_is_left_to_plain_pytorch() -> None:
    wide = Entry(kind="gate", streams=2, width=4, spec=FusionSpec(), keys_dtype=torch.float64)
    provider, why = providers.choose(wide, "cpu")
    assert provider == "reference"
    assert "float64" in why
    assert providers.choose(ENTRIES[0], "mps") == ("reference", "no kernels for mps")
    with pytest.raises(ValueError, match="float64"):
        providers.source(wide, "forward", "cpu")
    assert "inject_n4_c48_float32" in providers.source(ENTRIES[0], "backward", "cpu")
    providers.prepare(ENTRIES[0], "cpu")
    assert cpp._library(ENTRIES[0], "forward").result()


def test_nothing_travels_that_need_not() -> None:
    def values(kind: Any, *, backward: bool) -> float:
        entry = Entry(kind=kind, streams=4, width=64, spec=FusionSpec(dilation=3))
        return entry.bytes_moved(10, backward=backward) / (10 * 64 * 4)

    assert [values(kind, backward=False) for kind in ("gate", "add", "inject", "remember")] == [8, 9, 9, 13]
    assert [values(kind, backward=True) for kind in ("gate", "add", "inject", "remember")] == [16, 6, 6, 22]
    joined = Entry(kind="gate", streams=4, width=64, spec=FusionSpec(), joins=True)
    assert joined.bytes_moved(10, backward=True) == 20 * 10 * 64 * 4
