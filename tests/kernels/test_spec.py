"""The specification: legal values, codes for the others, and text that parses back."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import MAX_PERMUTATION_STREAMS, Convention, Exit, Manifold, StreamSpec


@st.composite
def specs(draw: st.DrawFn) -> StreamSpec:
    manifold = draw(st.sampled_from(get_args(Manifold)))
    streams = draw(st.integers(1, 8))
    if manifold == "permutations":
        streams = min(streams, MAX_PERMUTATION_STREAMS)
    if manifold == "kronecker":
        streams = 1 << (streams.bit_length() - 1)
    convention = draw(st.sampled_from(Convention))
    exits = [e for e in get_args(Exit) if e != "pre" or convention.fields.deferred]
    return StreamSpec(
        streams=streams,
        convention=convention,
        manifold=manifold,
        iterations=draw(st.integers(0, 40)),
        exit=draw(st.sampled_from(exits)),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(specs())
def test_text_parses_back(spec: StreamSpec) -> None:
    assert StreamSpec.parse(str(spec)) == spec
    assert hash(StreamSpec.parse(str(spec))) == hash(spec)


def test_defaults_and_omitted_fields() -> None:
    assert StreamSpec.parse("") == StreamSpec()
    assert StreamSpec.parse("streams=2") == StreamSpec(streams=2)
    assert StreamSpec(convention="liger").convention is Convention.LIGER  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"streams": 0}, "MHC201"),
        ({"streams": 9}, "MHC201"),
        ({"streams": True}, "MHC201"),
        ({"streams": 4.0}, "MHC201"),
        ({"convention": "hyper"}, "MHC202"),
        ({"manifold": "sphere"}, "MHC203"),
        ({"manifold": "permutations", "streams": 7}, "MHC203"),
        ({"manifold": "kronecker", "streams": 6}, "MHC203"),
        ({"iterations": -1}, "MHC204"),
        ({"iterations": 1001}, "MHC204"),
        ({"iterations": 2.5}, "MHC204"),
        ({"iterations": True}, "MHC204"),
        ({"exit": "max"}, "MHC204"),
    ],
)
def test_bad_values_have_codes(values: dict[str, Any], code: str) -> None:
    with pytest.raises(MHCError) as caught:
        StreamSpec(**values)
    assert caught.value.code == code


@pytest.mark.parametrize("text", ["stream=4", "streams", "streams=", "streams=four", "streams=4 exit", "4"])
def test_bad_text_has_a_code(text: str) -> None:
    with pytest.raises(MHCError) as caught:
        StreamSpec.parse(text)
    assert caught.value.code == "MHC204"


@pytest.mark.parametrize("n", range(1, 9))
def test_rows(n: int) -> None:
    assert StreamSpec(streams=n).rows == n * n + 2 * n
    assert StreamSpec(streams=n, manifold="identity").rows == 2 * n
    assert StreamSpec(streams=n, manifold="unconstrained").rows == n * n + 2 * n
    if n <= MAX_PERMUTATION_STREAMS:
        assert StreamSpec(streams=n, manifold="permutations").rows == math.factorial(n) + 2 * n
    if n in (1, 2, 4, 8):
        assert StreamSpec(streams=n, manifold="kronecker").rows == 2 * int(math.log2(n)) + 2 * n
