"""Who is where in the mesh; a wrong number of processes; ranks that die, hang, or block without an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from training import environment

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.launch import is_lost, launch
from mhc_compile.runtime.recipe_tables import ParallelTable

WORKER = Path(__file__).with_name("lost_worker.py")


def test_alone_without_torchrun() -> None:
    with launch(ParallelTable(timeout=30)) as world:
        assert (world.rank, world.parallel.world, world.pipe, world.replica) == (0, 1, 0, 0)
        assert world.pipe_group.size() == world.replica_mesh.size() == world.engram_group.size() == 1
        world.meet()
    assert not dist.is_initialized()


@pytest.mark.parametrize("processes", [1, 8])
def test_a_wrong_number_of_processes_is_refused_at_once(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody listens at this port: it is refused before the others are looked for.
    for name, value in environment(0, processes, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MHCError, match="MHC603") as refused, launch(ParallelTable(stages=2, data=2, timeout=30)):
        pass
    assert "2 x 2 x 1 = 4" in str(refused.value)
    assert "--nproc-per-node 4" in str(refused.value)
    assert not dist.is_initialized()


def test_the_others_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in environment(0, 2, store.port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MHCError, match="MHC605"), launch(ParallelTable(stages=2, timeout=1)):
        pass


@pytest.mark.parametrize(
    ("how", "timeout", "most", "code", "said"),
    [
        ("dies", 30.0, 10.0, 3, "by peer|not connected|pipe"),
        ("hangs", 2.0, 8.0, 3, "Timed out"),
        ("blocks", 1.0, 15.0, 1, "no answer"),
        ("stops", 1.0, 15.0, 1, "no sign of life of rank 1"),
    ],
)
def test_a_lost_rank_ends_in_a_coded_error(how: str, timeout: float, most: float, code: int, said: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), how, str(timeout)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment(rank, 2, store.port)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        text, _ = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == code, text
    assert "MHC605" in text
    assert ("rank 0 of 2, compiling" if how == "stops" else "rank 0 of 2, step 7, forward and backward passes") in text
    assert re.search(said, text, re.IGNORECASE)
    seconds = re.search(r"after (\d+\.\d) s", text)
    assert seconds is not None
    assert float(seconds[1]) <= most


def test_what_counts_as_lost() -> None:
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4230"))
    assert is_lost(dist.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not is_lost(ValueError("no"))
    outer = RuntimeError("failed to run forward")
    outer.__cause__ = RuntimeError("Timed out waiting 4000ms for recv operation to complete")
    assert is_lost(outer)
