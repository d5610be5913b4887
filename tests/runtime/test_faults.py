"""Ranks that are killed at any moment: torchrun starts them again, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import documents, make_tokenizer, write_lines
from training import model_folder

from mhc_compile import from_pretrained
from mhc_compile.cli import main
from mhc_compile.runtime.checkpoint.format import read_description
from mhc_compile.runtime.data.prepare import prepare

WORKER = Path(__file__).with_name("fault_worker.py")


STEPS = 8


def start(ranks: int, folder: Path, program: list[str], *, restarts: int = 0) -> subprocess.Popen[bytes]:
    """torchrun in `folder`, which gets its log."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    how = ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*torchrun, *how, *program], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], folder: Path, timeout: float) -> None:
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            for pid in workers(process):
                os.kill(pid, signal.SIGKILL)
            process.terminate()
            process.wait(60)
    assert code == 0, (folder / "log").read_text()[-5000:]


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    """The ranks that torchrun has started and that are alive, in the order of their ids."""
    with suppress(OSError):
        held = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in held}
        return sorted(pid for pid, name in names.items() if b"fault_worker" in name or b"mhc_compile" in name)
    return []


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.002)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_end(broken: Path, whole: Path, steps: int, every: int) -> None:
    """The two newest checkpoints and nothing else; the last ones are the same byte by byte."""
    names = [p.name for p in sorted((broken / "run").glob("*step-*"))]
    assert names == [f"step-{steps - every:08d}", f"step-{steps:08d}"]
    one, other = (read_description(f / "run" / f"step-{steps:08d}") for f in (broken, whole))
    assert one.tensors == other.tensors
    for name in one.files.keys() | other.files.keys():
        assert one.files[name] == other.files[name]


# --- a small loop, killed exactly where it hurts ------------------------------------------------------------------


def small(
    folder: Path, steps: int, every: int, plan: Any, *, ranks: int, seconds: float = 0.0, restarts: int = 0
) -> Any:
    folder.mkdir()
    program = [str(WORKER), str(folder), str(steps), str(every), str(seconds), json.dumps(list(plan))]
    return start(ranks, folder, program, restarts=restarts)


def compare(broken: Path, whole: Path, ranks: int, steps: int, every: int) -> None:
    """The same end, the same loss at every step, and no checkpoint lost."""
    same_end(broken, whole, steps, every)
    for rank in range(ranks):
        wanted = dict(lines(whole / f"losses-{rank}"))
        found = lines(broken / f"losses-{rank}")
        assert {step for step, _ in found} == set(range(steps))
        assert all(loss == wanted[step] for step, loss in found)
    starts = lines(broken / "starts")
    for begin, present in starts:
        assert begin == max((int(name.split("-")[1]) for name in present), default=0)
    assert [begin for begin, _ in starts] == sorted(begin for begin, _ in starts)


IN_A_STEP, IN_A_SAVE = (1, 5, "step"), [(1, 8, "write"), (0, 12, "publish"), (0, 16, "prune")]


@pytest.mark.parametrize(
    "plan", [[IN_A_SAVE[0]], pytest.param([IN_A_STEP, *IN_A_SAVE], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_killed_in_a_step_and_in_every_part_of_a_save(plan: list[tuple[int, int, str]], tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    one = small(broken, 20, 4, plan, ranks=2, restarts=len(plan))
    other = small(whole, 20, 4, (), ranks=2)
    finish(other, whole, 120)
    finish(one, broken, 300)
    assert sorted(p.name for p in broken.glob("died-*")) == sorted(f"died-{r}-{s}-{w}" for r, s, w in plan)
    # What was being written when a rank died is not gone on from; what had its name is. A save waits for the last one.
    begins = [begin for begin, _ in lines(broken / "starts")]
    assert begins == [0, 4] if len(plan) == 1 else begins in [[0, first, 4, 8, 16] for first in (0, 4)]
    compare(broken, whole, 2, 20, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_twenty_kills_at_random_moments(ranks: int, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    finish(small(whole, 200, 2, (), ranks=ranks), whole, 300)
    process = small(broken, 200, 2, (), ranks=ranks, seconds=0.3, restarts=60)
    kill_often(process, broken, random.Random(ranks))
    compare(broken, whole, ranks, 200, 2)


def kill_often(process: subprocess.Popen[bytes], folder: Path, draw: random.Random, count: int = 20) -> None:
    """SIGKILL for a rank `count` times: mostly some time after the run went on, and sometimes while it starts."""
    run = folder / "run"
    try:
        for _ in range(count):
            if draw.random() < 0.8:
                before = newest(run)
                wait_for(lambda before=before: newest(run) > before, process, 300)
            time.sleep(draw.uniform(0, 1.5))
            wait_for(lambda: workers(process), process)
            os.kill(draw.choice(workers(process)), signal.SIGKILL)
    finally:
        finish(process, folder, 900)


def newest(run: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in run.glob("step-*")), default=0)


# --- mhc-compile train ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with a tokenizer, and its data."""
    folder = tmp_path_factory.mktemp("material")
    model_folder(folder / "model", vocab_size=300, attention_dropout=0.1)
    make_tokenizer(folder / "model")
    prepare([str(write_lines(folder / "texts.jsonl", documents(200)))], folder / "tokens", tokenizer=folder / "model")
    return folder


def real(
    folder: Path,
    material: Path,
    *,
    stages: int,
    data: int = 1,
    steps: int = STEPS,
    timeout: float = 60,
    restarts: int = 0,
) -> subprocess.Popen[bytes]:
    folder.mkdir()
    (folder / "recipe.toml").write_text(f"""
        [model]
        folder = "{material / "model"}"
        inner = "eager"
        [data]
        folder = "{material / "tokens"}"
        sequence = 16
        [train]
        steps = {steps}
        batch = 4
        microbatch = 1
        lr = 1e-2
        [parallel]
        stages = {stages}
        data = {data}
        timeout = {timeout}
        [checkpoint]
        folder = "run"
        every = 2
        [metrics]
        every = 1
    """)
    return start(stages * data, folder, ["-m", "mhc_compile", "train", "recipe.toml"], restarts=restarts)


def same_losses(broken: Path, whole: Path, steps: int) -> None:
    wanted, found = ({m["step"]: m["loss"] for m in lines(f / "run" / "metrics.jsonl")} for f in (broken, whole))
    assert wanted == found
    assert sorted(found) == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_in_a_coded_error_and_the_run_goes_on(material: Path, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = real(broken, material, stages=2, timeout=8, restarts=1)
    try:
        wait_for(lambda: newest(broken / "run") >= 2, process)
        # In the midst of the next save, where nothing is very slow.
        wait_for(lambda: list((broken / "run").glob(".step-*.partial")), process)
        other, stopped = workers(process)
        os.kill(stopped, signal.SIGSTOP)
        begin = time.monotonic()
        wait_for(lambda: "MHC605" in (broken / "log").read_text(), process, 60)
        assert time.monotonic() - begin < 8 * 1.25 + 5 + 10
        wait_for(lambda: workers(process) != [other, stopped], process, 20)  # it does not wait for what it was saving
        os.kill(stopped, signal.SIGKILL)
        finish(real(whole, material, stages=2), whole, 300)
    finally:
        finish(process, broken, 300)
    same_end(broken, whole, STEPS, 2)
    same_losses(broken, whole, STEPS)
    # What two ranks have trained, in one process without a group.
    assert main(["train", str(broken / "recipe.toml"), "--export", str(tmp_path / "trained")]) == 0
    trained = dict(from_pretrained(tmp_path / "trained").named_parameters())
    start = dict(from_pretrained(material / "model").named_parameters())
    assert trained.keys() == start.keys()
    assert not any(torch.equal(p, start[name]) for name, p in trained.items() if p.ndim > 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stages", "data"), [(2, 1), (2, 2)])
def test_twenty_kills_of_a_training_run(stages: int, data: int, material: Path, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    finish(real(whole, material, stages=stages, data=data, steps=200), whole, 600)
    process = real(broken, material, stages=stages, data=data, steps=200, restarts=60)
    kill_often(process, broken, random.Random(stages + data))
    same_end(broken, whole, 200, 2)
    same_losses(broken, whole, 200)
