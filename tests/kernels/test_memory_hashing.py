"""Hashes of n-grams against Python integers: the reference, C++ and Triton; documents, padding and carried tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.memory import hash_ops, hashing, rows_cpp, rows_triton
from mhc_compile.kernels.memory.spec import HashSpec

SOME = settings(max_examples=60, deadline=None, derandomize=True)
needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

INT64 = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, -(2**53) - 1, 2**32, -(2**32)]),
)
MODULI = st.one_of(
    st.integers(1, 64), st.integers(8180, 8200), st.integers(2**24, 2**25), st.integers(2**31, 2**33), INT64.map(abs)
).map(lambda p: max(1, p >> 5 if p >= 2**58 else p))  # so that a table's rows fit in 64 bits
PUBLISHED = HashSpec(multipliers=(76632096046245, 4839876093313, 35959672319349), moduli=(646403, 646411) * 2, fill=2)


def wrapped(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def by_hand(ids: list[int], reach: list[int], before: list[int] | None, spec: HashSpec) -> list[list[int]]:
    """One sequence, in Python integers."""
    held = [*(before if before is not None else [spec.fill] * (spec.order - 1)), *ids]
    found = []
    for t, far in enumerate(reach):
        mix, row, offset, heads = wrapped(ids[t] * spec.multipliers[0]), [], 0, iter(spec.moduli)
        for i in range(1, spec.order):
            x = held[t + spec.order - 1 - i] if far >= i else spec.fill
            mix ^= wrapped(x * spec.multipliers[i])
            for _ in range(spec.heads):
                p = next(heads)
                row.append(wrapped(mix % p + offset))
                offset += p
        found.append(row)
    return found


@pytest.mark.parametrize("run", [hashing.rows, pytest.param(rows_cpp.run, marks=needs_compiler)], ids=["torch", "C++"])
@pytest.mark.parametrize("given_before", [False, True])
def test_rows_are_those_of_python_integers(run: object, given_before: bool) -> None:
    # Few shapes of hash, because each is compiled; any numbers in them.
    shapes = [(2, 3), (3, 8), (4, 5)]

    @SOME
    @given(st.data(), st.sampled_from(shapes), st.integers(0, 2), st.integers(0, 6))
    def check(data: st.DataObject, shape: tuple[int, int], B: int, S: int) -> None:
        order, heads = shape
        count = heads * (order - 1)
        spec = HashSpec(
            multipliers=tuple(data.draw(st.lists(INT64, min_size=order, max_size=order))),
            moduli=tuple(data.draw(st.lists(MODULI, min_size=count, max_size=count))),
            fill=data.draw(INT64),
        )
        many = st.lists(INT64, min_size=B * S, max_size=B * S)
        ids = torch.tensor(data.draw(many), dtype=torch.int64).view(B, S)
        far = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=B * S, max_size=B * S)), dtype=torch.int64)
        far = far.view(B, S)
        earlier = st.lists(INT64, min_size=B * (order - 1), max_size=B * (order - 1))
        before = torch.tensor(data.draw(earlier), dtype=torch.int64).view(B, order - 1) if given_before else None
        found = run(ids, far, before, spec)  # type: ignore[operator]
        assert found.shape == (B, S, count)
        assert found.dtype == torch.int64
        for b in range(B):
            held = before[b].tolist() if before is not None else None
            assert found[b].tolist() == by_hand(ids[b].tolist(), far[b].tolist(), held, spec)

    check()


@needs_compiler
@pytest.mark.parametrize("p", [1, 2, 3, 7, 8191, 8192, 8193, 646403, 2**24 + 43, 2**32 - 5, 2**52 + 21, 2**62 + 135])
def test_remainders_are_exact_next_to_multiples_and_at_the_ends(p: int) -> None:
    ends = [-(2**63), 2**63 - 1]
    quotients = [0, 1, -1, *(end // p for end in ends), *(2**k // p for k in range(12, 63)), *range(-40, 40)]
    near = {q * p + d for q in quotients for d in (-2, -1, 0, 1, 2)} | {2**k + d for k in range(63) for d in (-1, 0, 1)}
    x = torch.tensor(sorted({*ends, *(v for v in near if -(2**63) <= v < 2**63)}))
    # With one multiplier of 1 and a fill of 0 the remainder is that of x itself.
    spec = HashSpec(multipliers=(1, 1), moduli=(p, 8209), fill=0)
    found = rows_cpp.run(x[None], torch.zeros_like(x)[None], None, spec)[0]
    assert found[:, 0].tolist() == [v % p for v in x.tolist()]
    assert found[:, 1].tolist() == [v % 8209 + p for v in x.tolist()]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_every_token_is_written_by_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    ids, far = torch.randint(0, 99092, (7, 1501)), torch.randint(0, 4, (7, 1501))
    before = torch.randint(0, 99092, (7, 2))
    assert torch.equal(rows_cpp.run(ids, far, before, PUBLISHED), hashing.rows(ids, far, before, PUBLISHED))
    # Whatever dtype and strides.
    columns = rows_cpp.run(ids.int().T.contiguous().T, far.int(), before, PUBLISHED)
    assert torch.equal(columns, hashing.rows(ids.int(), far, before.int(), PUBLISHED))


@needs_compiler
@pytest.mark.parametrize("floats", [4, 8, 16])
def test_vectors_of_any_width_hash_alike(floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_cpp, "lanes", lambda: floats)
    rows_cpp._library.cache_clear()
    try:
        spec = HashSpec(multipliers=PUBLISHED.multipliers, moduli=(646403, 3, 8191, 2**40 + 15, 97, 646411), fill=2)
        ids, far, before = (
            torch.randint(-(2**62), 2**62, (2, 99)),
            torch.randint(0, 4, (2, 99)),
            torch.ones(2, 2).long(),
        )
        assert f"LANES = {floats // 2}," in rows_cpp.source(spec.order, spec.heads)
        assert torch.equal(rows_cpp.run(ids, far, before, spec), hashing.rows(ids, far, before, spec))
    finally:
        rows_cpp._library.cache_clear()


def reach_by_hand(
    ids: list[int], mask: list[int] | None, positions: list[int] | None, carried: int | None, eos: int
) -> list[int]:
    found: list[int] = []
    for t in range(len(ids)):
        ends = t > 0 and (
            (eos != -1 and ids[t - 1] == eos)
            or (mask is not None and not mask[t - 1])
            or (positions is not None and positions[t] != positions[t - 1] + 1)
        )
        begins = t == 0 and (carried is None or (positions is not None and positions[0] == 0))
        padding = mask is not None and not mask[t]
        found.append(0 if ends or begins or padding else found[-1] + 1 if t else int(carried or 0))
    return found


@SOME
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.sampled_from([-1, 3]))
def test_reach_is_the_least_that_any_of_its_rules_allows(data: st.DataObject, B: int, S: int, eos: int) -> None:
    def some(least: int, most: int, rows: int = B, columns: int = S) -> Tensor:
        numbers = data.draw(st.lists(st.integers(least, most), min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(numbers, dtype=torch.int64).view(rows, columns)

    ids = some(0, 4)
    T = S + data.draw(st.integers(0, 2))
    mask = data.draw(st.sampled_from([None, some(0, 1, columns=T)]))
    positions = data.draw(st.sampled_from([None, some(0, 3), some(0, 3, rows=1)]))
    carried = data.draw(st.sampled_from([None, some(0, 5, columns=1)[:, 0]]))
    kind = data.draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    found = hashing.reach(ids, mask.to(kind) if mask is not None else None, positions, carried, eos)
    for b in range(B):
        want = reach_by_hand(
            ids[b].tolist(),
            mask[b, -S:].tolist() if mask is not None else None,
            positions[b % len(positions)].tolist() if positions is not None else None,
            int(carried[b]) if carried is not None else None,
            eos,
        )
        assert found[b].tolist() == want


def test_reach_of_left_padding_and_of_packed_documents() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    want = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert hashing.reach(ids, mask, None, None).tolist() == want
    assert hashing.reach(ids, None, positions, None).tolist() == want
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert hashing.reach(ids, None, packed, None).tolist() == [[0, 1, 2, 0, 1]] * 2
    assert hashing.reach(torch.tensor([[5, 9, 9, 4, 4]]), None, None, None, 9).tolist() == [[0, 1, 0, 0, 1]]


def test_a_padded_sequence_hashes_like_the_sequence_alone() -> None:
    ids = torch.randint(0, 99092, (1, 6))
    alone = hashing.rows(ids, hashing.reach(ids, None, None, None), None, PUBLISHED)
    padded = torch.cat([torch.full((1, 3), 7), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 6)], 1)
    found = hashing.rows(padded, hashing.reach(padded, mask, None, None), None, PUBLISHED)
    assert torch.equal(found[:, 3:], alone)
    document = hashing.rows(padded, hashing.reach(padded, None, None, None), None, PUBLISHED)
    assert not torch.equal(document[:, 3:], alone)


@SOME
@given(st.integers(0, 99), st.integers(1, 9), st.booleans(), st.sampled_from([-1, 3]), st.integers(2, 4))
def test_a_call_split_anywhere_gives_what_the_whole_gives(
    seed: int, S: int, padded: bool, eos: int, order: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    spec = HashSpec(multipliers=(3, 5, 7, 11)[:order], moduli=(97, 101) * (order - 1), fill=3)
    ids = torch.randint(0, 5, (2, S), generator=draw)
    mask = (torch.randint(0, 4, (2, S), generator=draw) > 0) if padded else None
    whole = hashing.rows(ids, hashing.reach(ids, mask, None, None, eos), None, spec)
    for cut in range(1, S):
        carried, before, parts = None, None, []
        for part in (slice(0, cut), slice(cut, S)):
            now, seen = ids[:, part], mask[:, : part.stop] if mask is not None else None
            far = hashing.reach(now, seen, None, carried, eos)
            parts.append(hashing.rows(now, far, before, spec))
            carried, before = hashing.carry(far, now, seen, eos), hashing.window(now, before, spec)
            assert before.shape == (2, order - 1)
        assert torch.equal(torch.cat(parts, 1), whole)
    # One token at a time, as in decoding.
    carried, before, parts = None, None, []
    for t in range(S):
        now, seen = ids[:, t : t + 1], mask[:, : t + 1] if mask is not None else None
        far = hashing.reach(now, seen, None, carried, eos)
        parts.append(hashing.rows(now, far, before, spec))
        carried, before = hashing.carry(far, now, seen, eos), hashing.window(now, before, spec)
    assert torch.equal(torch.cat(parts, 1), whole)


def test_no_tokens_at_all() -> None:
    ids = torch.zeros(2, 0, dtype=torch.int64)
    far = hashing.reach(ids, torch.ones(2, 0), torch.zeros(1, 0), torch.zeros(2, dtype=torch.int64), 3)
    assert far.shape == (2, 0)
    assert torch.ops.engram_kernels.rows(ids, far, None, str(PUBLISHED)).shape == (2, 0, 4)


def test_ops_compute_the_reference() -> None:
    if hash_ops.target("cpu") == "cpp":
        rows_cpp.library(PUBLISHED).result()  # until then plain PyTorch serves
    ids, far, before = torch.randint(0, 9, (2, 5)), torch.randint(0, 3, (2, 5)), torch.randint(0, 9, (2, 2))
    want = hashing.rows(ids, far, before, PUBLISHED)
    for rows in (torch.ops.engram.rows, torch.ops.engram_kernels.rows):
        assert torch.equal(rows(ids, far, before, str(PUBLISHED)), want)
    mask, positions, carried = torch.ones(2, 5), torch.arange(5)[None], torch.tensor([4, 0])
    found = torch.ops.engram.reach(ids, mask, positions, carried, 3)
    assert torch.equal(found, hashing.reach(ids, mask, positions, carried, 3))
    torch.library.opcheck(torch.ops.engram_kernels.rows.default, (ids, far, before, str(PUBLISHED)))
    torch.library.opcheck(torch.ops.engram_kernels.rows.default, (ids, far, None, str(PUBLISHED)))
    with pytest.raises(MHCError, match="MHC220"):
        torch.ops.engram_kernels.rows(ids, far, before, "moduli=3")


def test_inductor_computes_the_dialect_and_the_projection_and_reports_unknown_ids() -> None:
    table = torch.randint(0, 7, (11,))
    spec = str(PUBLISHED)

    def hashed(ids: Tensor, mask: Tensor, carried: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        far = torch.ops.engram.reach(ids, mask, None, carried, 3)
        new = torch.where(ids < 0, ids, table[ids.clamp(min=0)])
        return torch.ops.engram.rows(new, far, before, spec), torch.ops.engram_kernels.rows(new, far, before, spec)

    compiled = torch.compile(hashed, fullgraph=True, dynamic=True)
    for S in (5, 9):
        ids = torch.randint(-2, 11, (2, S))
        call = ids, torch.randint(0, 2, (2, S)), torch.tensor([1, 2]), torch.randint(0, 7, (2, 2))
        want = hashed(*call)
        assert torch.equal(want[0], want[1])
        assert all(torch.equal(a, b) for a, b in zip(compiled(*call), want, strict=True))
    beyond = torch.full((2, 5), 11), *(torch.ones(2, 5), torch.tensor([1, 2]), torch.randint(0, 7, (2, 2)))
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(*beyond)
    with pytest.raises(IndexError):
        hashed(*beyond)


def test_ids_are_checked_before_a_call() -> None:
    ids = torch.tensor([[3, 10, -100]])
    hashing.check_ids(ids, 11)
    hashing.check_ids(ids[:, :0], 1)
    with pytest.raises(MHCError, match=r"MHC221.*id 10 in a vocabulary of 10"):
        hashing.check_ids(ids, 10)


def test_who_hashes_where(monkeypatch: pytest.MonkeyPatch) -> None:
    hash_ops.target.cache_clear()
    build.no_compiler.cache_clear()
    try:
        assert hash_ops.target("cpu") == ("reference" if build.compiler_problem() else "cpp")
        assert hash_ops.target("xpu") == "reference"
        hash_ops.target.cache_clear()
        build.no_compiler.cache_clear()
        monkeypatch.setattr(build, "compiler_problem", lambda: "CppCompileError: no g++")
        assert hash_ops.target("cpu") == "reference"
        ids = torch.randint(0, 9, (1, 4))
        found = torch.ops.engram_kernels.rows(ids, ids, None, str(PUBLISHED))
        assert torch.equal(found, hashing.rows(ids, ids, None, PUBLISHED))
    finally:
        hash_ops.target.cache_clear()
        build.no_compiler.cache_clear()


@needs_triton
def test_gpus_get_triton_and_its_kernel_gives_the_reference() -> None:
    assert hash_ops.target("cuda") == "triton"
    worker = Path(__file__).with_name("memory_worker.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    seen = json.loads(found.stdout)
    assert seen["equal"] == [True] * 25
    assert seen["through the op"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_triton_compiles_for_sm_90(before: bool, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mhc_compile.kernels.memory.rows_kernel import rows
    from mhc_compile.kernels.triton.build import Compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = HashSpec(multipliers=(3, 5, 7, 11), moduli=(97,) * 3 * heads, fill=0)
    constants = rows_triton.compile_time(spec, before)
    numbers = dict.fromkeys(("tokens", "length"), "i64") | dict.fromkeys(constants, "constexpr")
    types = {name: numbers.get(name, "*i64") for name in rows.arg_names}
    source = ASTSource(rows, types, constants, {(i,): [["tt.divisibility", 16]] for i in range(5)})
    made = compile_triton(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rows_triton.WARPS})
    compiled = Compiled(dict(made.asm), made.metadata.shared)
    registers, stack = compiled.registers()
    assert registers <= 128
    assert stack == 0
    # Remainders by multiplication: the one division finds a token's place in its sequence.
    assert compiled.texts["ptx"].count("mul.hi.u64") >= 1
