"""Over-Encoding's rows against Python integers, and the choice of moduli."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory import hash_ops, hashing, over_cpp, overencoding
from mhc_compile.kernels.memory.overencoding import overencoding_spec
from mhc_compile.kernels.memory.overencoding_settings import OverEncoding, OverEncodingSettings, over_encoding_of
from mhc_compile.kernels.memory.spec import OverEncodingSpec

SOME = settings(max_examples=60, deadline=None, derandomize=True)


@SOME
@given(st.data(), st.integers(1, 2**20), st.integers(1, 2**40), st.integers(2, 5), st.integers(1, 3))
def test_indices_are_those_of_python_integers(
    data: st.DataObject, vocab: int, rows: int, order: int, heads: int
) -> None:
    spec = overencoding_spec(vocab, rows, order=order, heads=heads)
    S = data.draw(st.integers(1, 7))
    ids = data.draw(st.lists(st.integers(0, vocab - 1) | st.just(vocab - 1), min_size=S, max_size=S))
    reach = data.draw(st.lists(st.integers(0, 5), min_size=S, max_size=S))
    for given_reach in (None, reach):
        far = torch.tensor([given_reach]) if given_reach is not None else None
        found = indices(torch.tensor([ids]), far, spec)[0].tolist()
        for t in range(S):
            want = []
            for i in range(2, order + 1):
                kept = [s for s in range(i) if s <= t and (given_reach is None or s <= given_reach[t])]
                number = sum(ids[t - s] * vocab**s for s in kept)
                want += [number % m for m in spec.moduli[(i - 2) * heads : (i - 1) * heads]]
            assert found[t] == want


def indices(ids: Tensor, reach: Tensor | None, spec: OverEncodingSpec) -> Tensor:
    """The rows of every table, counted from its own first one."""
    return overencoding.rows(ids, reach, None, spec) - torch.tensor(spec.offsets)


@SOME
@given(st.integers(1, 10**6), st.integers(1, 10**9), st.integers(2, 4), st.integers(1, 9))
def test_moduli_are_the_smallest_distinct_coprime_ones(vocab: int, rows: int, order: int, heads: int) -> None:
    spec = overencoding_spec(vocab, rows, order=order, heads=heads)
    assert spec.heads == heads
    coprime = [m for m in range(rows, spec.moduli[-1] + 1) if math.gcd(m, vocab) == 1]
    assert list(spec.moduli) == coprime


def test_earlier_tokens_tell_rows_apart_because_moduli_are_coprime() -> None:
    spec = overencoding_spec(6, 7, order=2)
    pairs = torch.tensor([[earlier, 3] for earlier in range(6)])
    assert len(indices(pairs, None, spec)[:, 1, 0].unique()) == 6


OPS = [torch.ops.engram.over_rows, torch.ops.engram_kernels.over_rows]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    """Wait for the C++, where there is a compiler: until then plain PyTorch serves."""
    if hash_ops.target("cpu") == "cpp":
        over_cpp.library().result()


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize(("order", "heads", "rows"), [(2, 1, 3), (3, 2, 2**40), (5, 3, 101)], ids=str)
def test_rows_of_one_table(op: Any, order: int, heads: int, rows: int) -> None:
    spec = overencoding_spec(2**17 - 1, rows, order=order, heads=heads)
    ids, reach = torch.randint(0, spec.vocab, (3, 700)), torch.randint(0, order + 2, (3, 700))
    offsets = torch.tensor(spec.offsets)
    assert torch.equal(op(ids, reach, None, str(spec)), indices(ids, reach, spec) + offsets)
    assert int(op(ids, reach, None, str(spec)).max()) < spec.rows == sum(spec.moduli)
    assert op(ids[:, :0], reach[:, :0], None, str(spec)).shape == (3, 0, len(spec.moduli))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rows_go_on_from_the_ids_before(op: Any) -> None:
    spec = overencoding_spec(11, 23, order=4, heads=2)
    ids = torch.randint(0, 11, (2, 9))
    reach = hashing.reach(ids, None, None, None, 3)
    whole, before, found = op(ids, reach, None, str(spec)), torch.zeros(2, 3, dtype=torch.int64), []
    for part, far in zip(ids.split([1, 4, 2, 2], 1), reach.split([1, 4, 2, 2], 1), strict=True):
        found.append(op(part.int(), far, before, str(spec)))
        before = torch.cat([before, part], 1)[:, -3:]
    assert torch.equal(torch.cat(found, 1), whole)


def test_the_op_is_known_to_compilers() -> None:
    spec = overencoding_spec(11, 23, order=3)
    ids = torch.randint(0, 11, (2, 5))
    for before in (None, torch.randint(0, 11, (2, 2))):
        torch.library.opcheck(OPS[1], (ids, hashing.reach(ids, None, None, None), before, str(spec)))


def test_without_a_compiler_plain_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = overencoding_spec(11, 23, order=3)
    ids = torch.randint(0, 11, (2, 5))
    reach = hashing.reach(ids, None, None, None)
    wanted = OPS[1](ids, reach, None, str(spec))
    monkeypatch.setattr(hash_ops, "target", lambda _: "reference")
    calls = []
    monkeypatch.setitem(hash_ops.RUN_OVER, "reference", lambda *a: (calls.append(a), overencoding.rows(*a))[1])
    assert torch.equal(OPS[1](ids, reach, None, str(spec)), wanted)
    assert len(calls) == 1


def test_no_call_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = overencoding_spec(11, 23, order=3)
    ids = torch.randint(0, 11, (2, 5))
    reach = hashing.reach(ids, None, None, None)
    monkeypatch.setattr(hash_ops, "target", lambda _: "cpp")
    monkeypatch.setattr(over_cpp, "library", lambda: Future())  # which nobody ever compiles
    assert torch.equal(OPS[1](ids, reach, None, str(spec)), overencoding.rows(ids, reach, None, spec))


def test_specifications_are_text_and_back() -> None:
    over = over_encoding_of(OverEncodingSettings(order=3, heads=2, rows=100), vocab=64, hidden=32)
    assert OverEncodingSpec.parse(str(over.hash)) == over.hash
    assert OverEncoding.parse(over.plain()) == over
    assert over.hash.moduli == (101, 103, 105, 107)
    assert over.width == 5  # of 32 / 6


@pytest.mark.parametrize("wrong", [{"order": 1}, {"heads": 0}, {"rows": 1}, {"rows": 2.5}, {"order": True}], ids=str)
def test_settings_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match=f"MHC220.*{next(iter(wrong))}="):
        OverEncodingSettings(**wrong)


def test_more_tables_than_channels_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC220.*7 channels"):
        over_encoding_of(OverEncodingSettings(heads=3, rows=100), vocab=64, hidden=7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab": 0}, {"order": 1}, {"moduli": ()}, {"moduli": (7, 11, 13)}, {"moduli": (7, 7)}, {"moduli": (7, 0)},
        {"moduli": (7, 15)}, {"moduli": (7, 2**60 + 1)},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_cannot_hash_are_refused(wrong: dict[str, object]) -> None:
    assert OverEncodingSpec(vocab=10, order=3, moduli=(7, 11)).heads == 1
    with pytest.raises(MHCError, match="MHC220"):
        OverEncodingSpec(**{"vocab": 10, "order": 3, "moduli": (7, 11)} | wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocab", "rows", "heads"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_a_choice_that_cannot_be_made_is_refused(vocab: int, rows: int, heads: int) -> None:
    with pytest.raises(MHCError, match="MHC220"):
        overencoding_spec(vocab, rows, heads=heads)
