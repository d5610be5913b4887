"""Ranks that are killed at any moment: torchrun starts them again, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mhc_compile.runtime.checkpoint.format import read_description

WORKER = Path(__file__).with_name("fault_worker.py")


def start(
    ranks: int, folder: Path, steps: int, every: int, plan: Any = (), *, seconds: float = 0.0, restarts: int = 0
) -> subprocess.Popen[bytes]:
    folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    how = ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(WORKER), str(folder)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*torchrun, *how, str(steps), str(every), str(seconds), json.dumps(list(plan))],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(broken: Path, whole: Path, ranks: int, steps: int, every: int) -> None:
    """The same final checkpoint byte by byte, the same loss at every step, and no checkpoint lost."""
    names = sorted(p.name for p in (broken / "run").iterdir())
    assert names == sorted(p.name for p in (whole / "run").iterdir())
    assert names == [".lock", f"step-{steps - every:08d}", f"step-{steps:08d}"]
    one, other = (read_description(f / "run" / f"step-{steps:08d}") for f in (broken, whole))
    assert one == other  # with the sha256 of every file, random states included
    for rank in range(ranks):
        wanted = dict(lines(whole / f"losses-{rank}"))
        found = lines(broken / f"losses-{rank}")
        assert {step for step, _ in found} == set(range(steps))
        assert all(loss == wanted[step] for step, loss in found)
    starts = lines(broken / "starts")
    for begin, present in starts:
        assert begin == max((int(name.split("-")[1]) for name in present), default=0)
    assert [begin for begin, _ in starts] == sorted(begin for begin, _ in starts)


def finish(process: subprocess.Popen[bytes], folder: Path, timeout: float) -> None:
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            process.wait(60)
    assert code == 0, (folder / "log").read_text()[-5000:]


def test_killed_in_a_step_and_in_every_part_of_a_save(tmp_path: Path) -> None:
    plan = [(1, 5, "step"), (1, 8, "write"), (0, 12, "publish"), (0, 16, "prune")]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    one = start(2, broken, 20, 4, plan, restarts=len(plan))
    other = start(2, whole, 20, 4)
    finish(other, whole, 120)
    finish(one, broken, 240)
    assert sorted(p.name for p in broken.glob("died-*")) == sorted(f"died-{r}-{s}-{w}" for r, s, w in plan)
    # What was being written when a rank died is not gone on from; what had its name is. A save waits for the last one.
    begins = [begin for begin, _ in lines(broken / "starts")]
    assert begins in [[0, first, 4, 8, 16] for first in (0, 4)]
    compare(broken, whole, 2, 20, 4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_twenty_kills_at_random_moments(ranks: int, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    finish(start(ranks, whole, 200, 2), whole, 300)
    draw = random.Random(ranks)
    process = start(ranks, broken, 200, 2, seconds=0.4, restarts=60)
    killed = 0
    try:
        while process.poll() is None and killed < 20:
            before = (broken / "starts").read_text() if (broken / "starts").exists() else ""
            time.sleep(draw.uniform(0, 4))
            if process.poll() is None:
                killed += kill(broken, draw.randrange(ranks))
            # The next one dies once the run goes on, sometimes before.
            patience = time.monotonic() + draw.choice([0, 60, 60, 60])
            while process.poll() is None and time.monotonic() < patience:
                if (broken / "starts").exists() and (broken / "starts").read_text() != before:
                    break
                time.sleep(0.05)
    finally:
        finish(process, broken, 600)
    assert killed == 20
    compare(broken, whole, ranks, 200, 2)


def kill(folder: Path, rank: int) -> bool:
    """SIGKILL for a rank of the run, if it is there."""
    with suppress(OSError, ValueError):
        pid = int((folder / f"pid-{rank}").read_text())
        if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            return True
    return False
