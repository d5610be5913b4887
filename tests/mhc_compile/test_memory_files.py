"""Tables as files: what is written comes back, damage is refused by code, and a table larger than memory is served."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import mhc_compile.kernels.memory.ultramem  # noqa: F401  (registers the ops)
from mhc_compile.checkpoint import table_files as files
from mhc_compile.checkpoint.table_files import open_table, read_info, write_files
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.memory.quantise import FP8, dequantise, quantise
from mhc_compile.memory.tables import MemoryTable

ROWS, WIDTH = 300, 40
DTYPES = [torch.float32, torch.bfloat16, FP8]


def table(dtype: torch.dtype = torch.float32, storage: str = "host") -> MemoryTable:
    return MemoryTable(ROWS, WIDTH, dtype=dtype, storage=storage).start(0, 1.0)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000])
def test_what_is_written_comes_back(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    source = table(dtype)
    paths = write_files(tmp_path, "memory", source, hash_spec="multipliers=1,3", shard_bytes=shard_bytes)
    assert (len(paths) > 1) == (shard_bytes == 5000)
    assert shards(tmp_path) == paths
    assert all(p.stat().st_size < shard_bytes + 2000 for p in paths)
    info = read_info(tmp_path, "memory")
    assert (info.rows, info.width, info.dtype, info.hash_spec) == (ROWS, WIDTH, dtype, "multipliers=1,3")
    opened = open_table(tmp_path, "memory", rows=ROWS, width=WIDTH, dtype=dtype, hot_rows=50, verify=True)
    rows = torch.randint(0, ROWS, (3, 50, 4))
    assert torch.equal(opened(rows), source(rows))
    # Any reader of safetensors finds the rows.
    held = torch.cat([safetensors.torch.load_file(p)["weight"].view(torch.uint8) for p in paths])
    assert torch.equal(held, source.weight.view(torch.uint8))


def write_table(folder: Path, source: MemoryTable, **options: Any) -> None:
    folder.mkdir()
    write_files(folder, "table", source, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_rows_are_narrowed_while_they_are_written(tmp_path: Path, dtype: torch.dtype) -> None:
    source = table()
    write_table(tmp_path / "one", source)
    write_table(tmp_path / "two", open_table(tmp_path / "one"), dtype=dtype)  # a mapped table is a source, too
    values = source.weight.detach()
    wanted = dequantise(*quantise(values), torch.bfloat16) if dtype == FP8 else values.to(dtype)
    assert torch.equal(open_table(tmp_path / "two", dtype=dtype)(torch.arange(ROWS)[:, None]), wanted)
    if dtype == FP8:
        with pytest.raises(MHCError, match="MHC223"):
            write_table(tmp_path / "three", open_table(tmp_path / "two"), dtype=torch.float32)
        assert list((tmp_path / "three").iterdir()) == []


def test_pieces_of_any_size(tmp_path: Path) -> None:
    values = torch.randn(ROWS, WIDTH)
    pieces = [(p, None) for p in values.split([1, 0, 120, 79, 100])]
    of, size = MemoryTable(ROWS, WIDTH, device="meta"), 70 * 4 * WIDTH
    write_files(tmp_path, "a", of, pieces=pieces, shard_bytes=size)
    assert torch.equal(open_table(tmp_path, "a")(torch.arange(ROWS)[:, None]), values)
    for wrong in (pieces[:-1], [*pieces, (values[:1], None)], [(values[:, 1:], None)]):
        with pytest.raises(MHCError, match="MHC223"):
            write_files(tmp_path, "b", of, pieces=wrong, shard_bytes=size)
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"a"}


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table()
    sync, calls = files.sync, []

    def fail(file: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(MHCError, match="MHC413"):
        write_files(tmp_path, "table", source, shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_writing_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    write_files(tmp_path, "table", table(), shard_bytes=5000)
    second = MemoryTable(ROWS, WIDTH).start(1)
    write_files(tmp_path, "table", second)
    write_files(tmp_path, "other", table())
    assert [p.name.split("-")[0] for p in shards(tmp_path)] == ["other", "table"]
    rows = torch.arange(ROWS)[:, None]
    assert torch.equal(open_table(tmp_path)(rows), second(rows))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", ROWS + 1), ("width", 41), ("dtype", torch.bfloat16), ("hash_spec", "multipliers=5")],
)
def test_a_table_of_another_memory(tmp_path: Path, name: str, value: Any) -> None:
    write_table(tmp_path / "t", table(), hash_spec="multipliers=1")
    with pytest.raises(MHCError, match="MHC223") as error:
        open_table(tmp_path / "t", **{name: value})
    assert name in str(error.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same data under a changed header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def truncated(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])


def longer(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes() + b"x")


def without_the_last(folder: Path) -> None:
    shards(folder)[-1].unlink()


def without_the_second(folder: Path) -> None:
    shards(folder)[1].unlink()


def of_two_writings(folder: Path) -> None:
    keep = shards(folder)[1].read_bytes()
    write_files(folder, "table", MemoryTable(ROWS, WIDTH).start(1), shard_bytes=20_000)
    shards(folder)[1].write_bytes(keep)


def foreign(folder: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(4, 4)}, shards(folder)[0])


def a_pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(4, 4)}, shards(folder)[0])


def empty(folder: Path) -> None:
    shards(folder)[0].write_bytes(b"")


def other_width(folder: Path) -> None:
    rewrite(shards(folder)[0], lambda h: h["__metadata__"].update(width="41"))


def no_number(folder: Path) -> None:
    rewrite(shards(folder)[0], lambda h: h["__metadata__"].update(rows="many"))


def other_dtype(folder: Path) -> None:
    rewrite(shards(folder)[0], lambda h: h["weight"].update(dtype="I32"))


def other_name(folder: Path) -> None:
    rewrite(shards(folder)[0], lambda h: h.update(rows=h.pop("weight")))


def nothing_at_all(folder: Path) -> None:
    for path in shards(folder):
        path.unlink()


DAMAGES = [
    truncated, longer, without_the_last, without_the_second, of_two_writings, foreign, a_pickle, empty, other_width,
    no_number, other_dtype, other_name, nothing_at_all,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_files(tmp_path, "table", table(), shard_bytes=20_000)
    assert len(shards(tmp_path)) == 3
    open_table(tmp_path)
    damage(tmp_path)
    with pytest.raises(MHCError, match="MHC224"):
        open_table(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC224"):
        open_table(tmp_path / "none")


def test_changed_rows_are_seen_when_asked(tmp_path: Path) -> None:
    write_files(tmp_path, "table", table(FP8))
    path = shards(tmp_path)[0]
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        data = file.get_tensor("scale").numpy().tobytes()
    assert said["sha256.scale"] == hashlib.sha256(data).hexdigest()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    open_table(tmp_path)
    with pytest.raises(MHCError, match="MHC224"):
        open_table(tmp_path, verify=True)


# A process that may have only so much memory of its own beyond what it has when the libraries are loaded.
SERVE = """
import os, resource, sys
import torch
from safetensors.torch import load_file
import mhc_compile.kernels.memory.ultramem
from mhc_compile.checkpoint.table_files import open_table
from mhc_compile.memory.tables import MemoryTable

torch.set_num_threads(1)
folder, rows, width, spec = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
calls = load_file(folder + "/calls")
open_table(folder, hot_rows=100)(torch.zeros(1, 1, dtype=torch.int64))  # everything imported, every thread started

def served(table, number):
    ids = calls["ids"][number]
    if spec:
        operands = [calls[name] for name in ("query_gain", "keys", "key_gain", "cores")]
        ids, groups, scores = torch.ops.engram.retrieve(calls["query"][number], *operands, spec)
    ticket = torch.ops.engram_kernels.prefetch(ids, table.handle)
    found = torch.ops.engram_kernels.collect(ticket, ids, table.anchor, table.handle, width)
    assert torch.equal(found.view(*ids.shape, width)[..., 0], ids.float() + 1), "wrong rows"
    if spec:
        sums = torch.ops.engram.expand(found, groups, scores, None, spec)
        exact = ((ids + 1) * scores[..., 0].double()).sum(-1)
        assert (sums[:, 0] - exact).abs().max() < 1e-5 * exact.abs().max(), "wrong sums"

served(open_table(folder, hot_rows=100), 0)
used = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData"))
limit = used + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert rows * width * 4 >= 4 * limit, limit
try:
    MemoryTable(rows, width)
except (MemoryError, RuntimeError):
    pass
else:
    raise SystemExit("a table four times as large as the limit was loaded")
table = open_table(folder, hot_rows=10_000)
for number in range(len(calls["ids"])):
    served(table, number)
print("served", limit >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings on Linux alone")
@pytest.mark.parametrize("by", ["hashes", "content"])
def test_a_table_larger_than_memory_is_served(tmp_path: Path, by: str) -> None:
    keys, width = 4090, 80  # rows are exact in float32
    rows = keys**2  # 5.4 GB, nearly all of it a hole of the file
    calls = {"ids": torch.randint(0, rows, (20, 64, 8))}
    spec = ""
    if by == "content":
        reach = {"reach": rows, "rows": rows, "offset": 0, "groups": 1}
        spec = str(ContentSpec(top=8, multiplier=7919, input=0, eps=1e-5, **reach))
        calls |= {
            "query": torch.randn(20, 64, 16), "query_gain": torch.ones(8), "keys": torch.randn(1, 2, keys, 8, 2),
            "key_gain": torch.ones(8), "cores": torch.rand(2, 1, 2, 2),
        }  # fmt: skip
        operands = [calls[name] for name in ("query_gain", "keys", "key_gain", "cores")]
        calls["ids"] = torch.stack([torch.ops.engram.retrieve(q, *operands, spec)[0] for q in calls["query"]])
    read = [0, *calls["ids"].unique().tolist()]
    save_file(calls, tmp_path / "calls")
    path = tmp_path / "table-00001-of-00001.safetensors"
    said = {
        "format": files.FORMAT, "rows": str(rows), "width": str(width), "hash": "", "writing": "0", "first": "0",
        "shard": "1", "shards": "1",
    }  # fmt: skip
    size = rows * width * 4
    header = json.dumps(
        {"__metadata__": said, "weight": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        begin = out.tell()
        out.truncate(begin + size)
        for row in read:
            out.seek(begin + row * width * 4)
            out.write(struct.pack("<f", row + 1))
    script = [sys.executable, "-c", SERVE, str(tmp_path), str(rows), str(width), spec]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("served")


def test_writers_refuse_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC223"):
        write_table(tmp_path / "t", MemoryTable(ROWS, WIDTH, device="meta"))
    assert list((tmp_path / "t").iterdir()) == []


def values_of(opened: MemoryTable) -> Tensor:
    return opened.block(0, opened.rows)[0]


def test_blocks_of_a_mapped_table(tmp_path: Path) -> None:
    source = table(torch.bfloat16, "device")
    write_files(tmp_path, "table", source, shard_bytes=5000)
    assert torch.equal(values_of(open_table(tmp_path)), source.weight)
