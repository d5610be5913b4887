"""Tables: storages, dtypes, what modules do to them, the cache of hot rows, float8 rows."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.registry import table_of, tables
from mhc_compile.memory.hot import WAYS, HotRows
from mhc_compile.memory.quantise import BLOCK, FP8, blocks, dequantise, quantise
from mhc_compile.memory.rows import FileRows, MappedRows
from mhc_compile.memory.tables import START_BLOCK, MemoryTable, row_bytes

ROWS, WIDTH = 500, 40
IN_MEMORY = [(s, d) for s in ("device", "host") for d in (torch.float32, torch.bfloat16, FP8)]


def exact(table: MemoryTable) -> Tensor:
    """All values, by plain indexing."""
    return dequantise(table.weight, table.scale) if table.dtype == FP8 else table.weight.float()


def asked(*shape: int) -> Tensor:
    return torch.randint(0, ROWS, shape)


def mapped(folder: Path, parts: int, hot_rows: int = 0) -> tuple[MemoryTable, Tensor]:
    """A table over raw files, the first bytes of which are something else, and its values."""
    values = torch.randn(ROWS, WIDTH)
    files = []
    for number, piece in enumerate(values.tensor_split(parts)):
        path = folder / f"{number}.bin"
        path.write_bytes(b"x" * (8 * number) + piece.contiguous().numpy().tobytes())
        files.append(FileRows(path, len(piece), (8 * number,)))
    held = MappedRows(files, row_bytes(WIDTH, torch.float32))
    return MemoryTable(ROWS, WIDTH, storage="mapped", files=held, hot_rows=hot_rows), values


@pytest.mark.parametrize(("storage", "dtype"), IN_MEMORY)
@pytest.mark.parametrize("hot_rows", [0, 60])
def test_lookups_are_indexing(storage: str, dtype: torch.dtype, hot_rows: int) -> None:
    table = MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage, hot_rows=hot_rows).start(0)
    for shape in [(2, 5, 3), (4,), (2, 0, 3), (1, 300, 8)]:
        rows = asked(*shape)
        found = table(rows)
        wanted = exact(table)[rows].reshape(*shape[:-1], shape[-1] * WIDTH)
        assert found.dtype == table.result_dtype
        assert torch.equal(found, wanted.to(table.result_dtype))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("hot_rows", [0, 60])
def test_mapped_lookups_are_indexing(tmp_path: Path, parts: int, hot_rows: int) -> None:
    table, values = mapped(tmp_path, parts, hot_rows)
    for shape in [(2, 5, 3), (2, 0, 3), (3, 700, 4)]:
        rows = asked(*shape)
        assert torch.equal(table(rows), values[rows].reshape(*shape[:-1], -1) if rows.numel() else table(rows))
    assert not list(table.parameters())
    again = pickle.loads(pickle.dumps(table))
    assert torch.equal(again(rows), table(rows))
    assert torch.equal(table.block(7, 300)[0], values[7:300])


def test_many_rows_are_read_by_several_threads(tmp_path: Path) -> None:
    count = 50_000
    values = torch.randn(count, 2)
    (tmp_path / "rows").write_bytes(values.numpy().tobytes())
    held = MappedRows([FileRows(tmp_path / "rows", count, (0,))], (8,))
    table = MemoryTable(count, 2, storage="mapped", files=held)
    rows = torch.randint(0, count, (20_000, 2))
    assert torch.equal(table(rows), values[rows].flatten(1))


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_there_is_not(storage: str, row: int) -> None:
    table = MemoryTable(ROWS, WIDTH, storage=storage).start(0)
    with pytest.raises(IndexError):
        table(torch.tensor([[0, row]]))


def test_storage_is_read_once_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = mapped(tmp_path, 2)
    read: list[list[int]] = []
    plain = MappedRows.read
    monkeypatch.setattr(MappedRows, "read", lambda self, rows: (read.append(rows.tolist()), plain(self, rows))[1])
    table(torch.tensor([[3, 3, 490], [490, 3, 7]]))
    assert read == [[3, 7, 490]]


def test_what_is_no_table() -> None:
    for wrong in ({"rows": 0}, {"width": 0}, {"dtype": torch.float16}, {"storage": "cloud"}, {"storage": "mapped"}):
        with pytest.raises(MHCError, match="MHC223"):
            MemoryTable(**{"rows": 4, "width": 4, **wrong})


def test_rows_that_files_do_not_hold(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(100))
    with pytest.raises(MHCError, match="MHC224"):
        MappedRows([FileRows(tmp_path / "rows", 11, (0,))], (10,))
    with pytest.raises(MHCError, match="MHC224"):
        MappedRows([FileRows(tmp_path / "none", 1, (0,))], (10,))
    held = MappedRows([FileRows(tmp_path / "rows", 10, (0,))], (10,))
    with pytest.raises(MHCError, match="MHC223"):
        MemoryTable(10, 5, storage="mapped", files=held)


@pytest.mark.parametrize(("storage", "dtype"), IN_MEMORY)
def test_casts_and_moves_of_the_model(storage: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage).start(0))
    table: MemoryTable = model[1]
    rows = asked(3, 2)
    before, weight = table(rows), table.weight
    for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to("cpu", torch.float16)):
        change(model)
        assert model[0].weight.dtype != torch.float32
        assert table.weight is weight
        assert (table.weight.dtype, table.anchor.dtype) == (dtype, torch.float32)
        assert torch.equal(table(rows), before)
        assert table.anchor.is_leaf
    assert table.trainable == (dtype != FP8)


@pytest.mark.parametrize("storage", ["device", "host"])
def test_a_table_moves_with_its_model_or_stays(storage: str) -> None:
    # The meta device stands for another one; `fn` is what `.to("cuda")` would call, on a stand-in.
    table = MemoryTable(ROWS, WIDTH, storage=storage).start(0)
    sizes: list[int] = []

    def fn(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t.to("meta")

    table._apply(fn)
    assert sizes == [0] * 2
    assert table.anchor.is_meta
    assert table.weight.is_meta
    with pytest.raises(MHCError, match="MHC223"):
        table.gather(asked(2, 2), torch.float32)


@pytest.mark.parametrize(("storage", "dtype"), IN_MEMORY)
def test_copies_have_a_handle_of_their_own(storage: str, dtype: torch.dtype) -> None:
    table = MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage, hot_rows=16).start(0)
    rows = asked(3, 4)
    table(rows)
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other.handle != table.handle
        assert table_of(other.handle) is other
        assert torch.equal(other(rows), table(rows))
        assert other.trainable == table.trainable
        other.fill(0, torch.ones(ROWS, WIDTH))
        assert not torch.equal(other(rows), table(rows))
    handle = other.handle
    del other
    assert all(t.handle != handle for t in tables())
    with pytest.raises(LookupError, match=str(handle)):
        table_of(handle)


@pytest.mark.parametrize(("storage", "dtype"), IN_MEMORY)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(storage: str, dtype: torch.dtype, assign: bool) -> None:
    table = MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage).start(0)
    assert list(table.state_dict()) == (["weight", "scale"] if dtype == FP8 else ["weight"])
    saved = io.BytesIO()
    torch.save(table.state_dict(), saved)
    saved.seek(0)
    other = MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage, device="meta" if assign else None, hot_rows=16)
    rows = asked(3, 4)
    if not assign:
        other.start(1)
        assert not torch.equal(other(rows), table(rows))
    other.load_state_dict(torch.load(saved), assign=assign)
    assert torch.equal(other(rows), table(rows))
    assert (other.anchor.device.type, other.trainable) == ("cpu", table.trainable)


def test_state_dicts_that_do_not_fit() -> None:
    narrow = MemoryTable(4, 32, dtype=FP8).start(0)
    wide = MemoryTable(4, 32).start(0)
    for table, other in ((narrow, wide), (wide, narrow)):
        with pytest.raises(RuntimeError, match="MHC223"):
            table.load_state_dict(other.state_dict(), strict=False)
    half = MemoryTable(4, 32, dtype=torch.bfloat16)
    half.load_state_dict(wide.state_dict(), assign=True)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, wide.weight.bfloat16())


@pytest.mark.parametrize(("storage", "dtype"), IN_MEMORY)
def test_filled_from_the_meta_device(storage: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        table = MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage)
    assert table.weight.is_meta
    values = torch.randn(ROWS, WIDTH)
    weights = set()
    for begin in range(0, ROWS, 120):
        table.fill(begin, values[begin : begin + 120])
        weights.add(table.weight.data_ptr())
    assert len(weights) == 1  # made once
    assert table.anchor.device.type == "cpu"
    wanted = dequantise(*quantise(values)) if dtype == FP8 else values.to(dtype).float()
    assert torch.equal(exact(table), wanted)
    for wrong in ((ROWS - 1, values[:2]), (-1, values[:1]), (0, values[:, :-1])):
        with pytest.raises(MHCError, match="MHC223"):
            table.fill(*wrong)


def test_start_is_the_same_everywhere() -> None:
    rows = START_BLOCK + 100
    first, second, meta, other = (
        MemoryTable(rows, 3, storage=s, device=d).start(seed)
        for s, d, seed in (("device", None, 5), ("host", None, 5), ("device", "meta", 5), ("device", None, 6))
    )
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, meta.weight)
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.weight[:100], first.weight[START_BLOCK:])
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_tables_for_inference_are_not_trained(tmp_path: Path) -> None:
    for table in (MemoryTable(ROWS, WIDTH, dtype=FP8).start(0), mapped(tmp_path, 1)[0]):
        assert not table(asked(2, 2)).requires_grad
        for refused in (
            lambda t=table: setattr(t, "trainable", True),
            lambda t=table: t.requires_grad_(),
            lambda t=table: t.accumulate(torch.tensor([0]), torch.zeros(1, WIDTH)),
        ):
            with pytest.raises(MHCError, match="MHC228"):
                refused()
    with pytest.raises(MHCError, match="MHC228"):
        table.fill(0, torch.zeros(1, WIDTH))
    with pytest.raises(MHCError, match="MHC228"):
        MemoryTable(ROWS, WIDTH, dtype=FP8, trainable=True)
    frozen = MemoryTable(ROWS, WIDTH).start(0).requires_grad_(False)
    assert not frozen(asked(2, 2)).requires_grad


@given(st.integers(1, 100), st.integers(0, 2**31), st.floats(1e-30, 1e30))
@settings(max_examples=60, deadline=None)
def test_float8_bound(width: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, width, generator=generator) * scale
    values[0] = 0.0
    values[1] *= torch.logspace(-8, 0, width)
    weight, scales = quantise(values)
    assert (weight.dtype, scales.shape) == (FP8, (5, blocks(width)))
    error = (dequantise(weight, scales).double() - values.double()).abs()
    steps = scales.double().repeat_interleave(BLOCK, 1)[:, :width]
    assert (error <= torch.maximum(values.double().abs() / 16, steps / 1024) * (1 + 1e-5)).all()


def is_cached(cache: HotRows, row: int) -> bool:
    return bool((cache._tags == row).any())


def fetched(cache: HotRows, rows: list[int], load: Callable | None = None) -> list[int]:
    """The rows that were loaded."""
    seen: list[int] = []

    def read(missing: np.ndarray) -> list[np.ndarray]:
        seen.extend(missing.tolist())
        return [np.stack([np.full(4, r % 251, np.uint8) for r in missing.tolist()])]

    out = cache.fetch(np.array(rows, np.int64), load or read)
    assert out[0][:, 0].tolist() == [r % 251 for r in rows]
    return seen


@given(st.lists(st.integers(0, 30), max_size=120), st.integers(1, WAYS))
@settings(max_examples=60, deadline=None)
def test_a_small_cache_is_an_lru(stream: list[int], capacity: int) -> None:
    cache, model = HotRows(capacity, (4,)), OrderedDict()
    hits = 0
    for row in stream:
        known = row in model
        model[row] = None
        model.move_to_end(row)
        if len(model) > capacity:
            model.popitem(last=False)
        hits += known
        assert fetched(cache, [row]) == ([] if known else [row])
    assert sorted(r for r in range(31) if is_cached(cache, r)) == sorted(model)
    assert cache.hit_rate == (hits / len(stream) if stream else 0.0)


@given(st.lists(st.sets(st.integers(0, 400), max_size=80), max_size=12), st.integers(1, 100))
@settings(max_examples=40, deadline=None)
def test_a_cache_is_right_and_bounded(calls: list[set[int]], capacity: int) -> None:
    cache = HotRows(capacity, (4,))
    for rows in calls:
        missing = set(fetched(cache, sorted(rows)))
        assert missing <= rows
        assert len(cache) <= cache.capacity <= capacity
        if len(rows) == 1:
            assert is_cached(cache, next(iter(rows)))
    cache.clear()
    assert (len(cache), cache.hit_rate) == (0, 0.0)


def test_rows_asked_for_often_stay() -> None:
    # A stream with few hot rows and many cold ones: the hot ones survive whatever comes between.
    cache = HotRows(1000, (4,))
    generator = np.random.default_rng(0)
    hot = generator.choice(10**6, 100, replace=False)
    for _ in range(50):
        fetched(cache, np.unique(np.concatenate([hot, generator.integers(10**6, 10**9, 200)])).tolist())
    assert sum(is_cached(cache, int(r)) for r in hot) >= 98


def test_a_cache_forgets_rows_that_change() -> None:
    table = MemoryTable(ROWS, WIDTH, storage="host", hot_rows=100).start(0)
    rows = asked(3, 4)
    table(rows)
    assert torch.equal(table(rows), table.weight[rows].flatten(1))
    assert table.hot.hit_rate == 0.5
    table.fill(0, torch.randn(ROWS, WIDTH))
    assert torch.equal(table(rows), table.weight[rows].flatten(1))


def test_a_load_that_a_change_overtakes_is_not_kept() -> None:
    cache = HotRows(10, (4,))

    def load(missing: np.ndarray) -> list[np.ndarray]:
        cache.clear()  # what a changed table does, in another thread
        return [np.full((len(missing), 4), 7, np.uint8)]

    cache.fetch(np.array([1, 2], np.int64), load)
    assert len(cache) == 0


def test_threads_share_a_cache() -> None:
    table = MemoryTable(ROWS, WIDTH, storage="host", hot_rows=64).start(0)
    wrong: list[Tensor] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            rows = torch.randint(0, ROWS, (20, 3), generator=generator)
            if not torch.equal(table(rows), table.weight[rows].flatten(1)):
                wrong.append(rows)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(table.hot) <= 64
