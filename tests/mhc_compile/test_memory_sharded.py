"""Tables sharded over processes: look-ups, gradients, steps and errors on 2, 3 and 4 ranks (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_compile.checkpoint.table_files import write_files
from mhc_compile.memory.tables import MemoryTable, drawn_rows

WORKER = Path(__file__).parent / "memory_sharded_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found; what they compare themselves ends them with a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    write_files(folder, "table", MemoryTable(40, 6).start(9, 1.0), hash_spec="h", shard_bytes=300)
    outs = [folder / f"{rank}.pt" for rank in range(4)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(n), str(folder / "store"), str(out), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, out in enumerate(outs)
    ]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n\n".join(told)
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_tables(found: list[dict[str, Any]], size: int) -> None:
    held = [f[f"{size}"] for f in found if f"{size}" in f]
    assert all(h["equal runs"] for h in held)
    errors = [h["errors"] for h in held]
    everywhere = {
        "sizes": "MHC630",
        "seeds": "MHC630",
        "mapped": "MHC228",
        "another table": "MHC631",
        "another purpose": "MHC631",
        "hollow": "MHC223",
        "copied": "TypeError",
        "float8": "MHC228",
    }
    for name, code in everywhere.items():
        assert [e[name] for e in errors] == [code] * size, name
    assert [e["out of range"] for e in errors] == ["MHC631"] * (size - 1) + ["IndexError"]
    assert [e["negative"] for e in errors] == ["IndexError"] + ["MHC631"] * (size - 1)


def test_shards_inside_replicas(found: list[dict[str, Any]]) -> None:
    weights = [f["replicas"] for f in found]
    assert torch.equal(weights[0], weights[2])  # the replicas of a shard do not drift apart
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(("begin", "end"), [(0, None), (0, 5), (16_380, 16_390), (20_000, 40_000), (40_000, 40_000)])
def test_a_part_of_the_start(begin: int, end: int | None) -> None:
    whole = torch.cat(list(drawn_rows(40_000, 2, 7, 1.0)))
    found = [torch.empty(0, 2), *drawn_rows(40_000, 2, 7, 1.0, begin, end)]
    assert torch.equal(torch.cat(found), whole[begin:end])
