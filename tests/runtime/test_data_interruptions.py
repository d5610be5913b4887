"""Preparing that is killed, out of space or loses a worker: nothing unfinished looks finished, no process is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from data_folders import documents, make_tokenizer, tree, write_lines

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data import encoding
from mhc_compile.runtime.data.prepare import prepare

DRIVER = """
import json, os, resource, signal, sys
from multiprocessing.process import BaseProcess
from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data import encoding
from mhc_compile.runtime.data.prepare import prepare

encoding.BATCH = 2000
source, model, target, *points = sys.argv[1:]
for point in points:
    pids = os.path.join(os.path.dirname(source), "pids")
    child = os.fork()
    if child == 0:
        start = BaseProcess.start
        def recorded(self):
            start(self)
            with open(pids, "a") as file:
                file.write(f"{self.pid}\\n")
        BaseProcess.start = recorded
        if point.startswith("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(point[5:]), int(point[5:])))
        def progress(done, total, tokens, name):
            if point.startswith("kill") and tokens >= int(point[4:]):
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            prepare([source], target, tokenizer=model, workers=2, progress=progress)
        except MHCError as error:
            os._exit(int(error.code.removeprefix("MHC")) - 400)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([point, os.waitstatus_to_exitcode(status), sorted(os.listdir(os.path.dirname(target)))]))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_or_out_of_space_leaves_nothing_finished_and_a_rerun_finishes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "lines.jsonl", documents(400))
    make_tokenizer(tmp_path / "model")
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "out"
    points = ["kill1", "kill5000", "limit100", "limit9000", "limit1000000"]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, source, tmp_path / "model", out, *points],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = {point: (code, files) for point, code, files in map(json.loads, run.stdout.splitlines())}
    assert told == {
        "kill1": (-9, [".out.mhc-partial"]),
        "kill5000": (-9, [".out.mhc-partial"]),
        # A limit on the size of a file is how the system refuses to write on.
        "limit100": (13, []),
        "limit9000": (13, []),
        "limit1000000": (0, ["out"]),
    }
    prepare([str(source)], tmp_path / "again", tokenizer=tmp_path / "model")
    assert tree(out) == tree(tmp_path / "again")
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 10
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_worker_that_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH", 200)
    source = write_lines(tmp_path / "lines.jsonl", documents(300))
    make_tokenizer(tmp_path / "model")

    def progress(done: int, total: int, tokens: int, name: str) -> None:
        if tokens > 1000:
            for child in active_children()[:1]:  # none any more when the batches before it are counted
                child.kill()

    with pytest.raises(MHCError, match="MHC614") as caught:
        prepare([str(source)], tmp_path / "out", tokenizer=tmp_path / "model", workers=2, progress=progress)
    assert "terminated abruptly" in str(caught.value)
    assert "--workers" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines.jsonl", "model"]
    assert not active_children()
