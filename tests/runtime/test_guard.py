"""Losses that are not finite or explode: all ranks do the same, and a stop leaves the step's data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from guard_ranks import steps
from ranks import run_ranks
from safetensors.torch import load_file

from mhc_compile import MHCError
from mhc_compile.diagnostics import MHCWarning
from mhc_compile.runtime.guard import PATIENCE, Guard

BATCH = {"input_ids": torch.arange(6).reshape(2, 3), "labels": torch.arange(6).reshape(2, 3).T}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0), (1.0, math.nan)])
def test_stop_saves_what_the_step_read(loss: float, norm: float, tmp_path: Path) -> None:
    guard = Guard("stop", tmp_path)
    assert guard.check(1, 2.0, 1.0, BATCH) == "ok"
    with pytest.raises(MHCError, match=r"MHC618.*step 12"):
        guard.check(12, loss, norm, BATCH, {"epoch": 3})
    where = tmp_path / "failed-step-12"
    said = json.loads((where / "rank-00000.json").read_text())
    assert said == {
        "step": 12,
        "reason": "the loss or the gradient is not finite",
        "loss": repr(loss),
        "grad_norm": repr(norm),
        "position": {"epoch": 3},
    }
    held = load_file(where / "rank-00000.safetensors")
    assert held.keys() == BATCH.keys()
    assert all(torch.equal(held[name], t) for name, t in BATCH.items())


def test_exploding_is_measured_against_the_running_median(tmp_path: Path) -> None:
    guard = Guard("stop", tmp_path, explode=3.0)
    assert guard.check(0, 1000.0, 1.0, BATCH) == "ok"  # the first ones fall quickly
    for step in range(1, 20):
        assert guard.check(step, 2.0, 1.0, BATCH) == "ok"
    again = Guard("stop", tmp_path, explode=3.0)
    again.load_state(json.loads(json.dumps(guard.state())))
    for one in (guard, again):
        assert one.check(20, 6.0, 1.0, BATCH) == "ok"
        with pytest.raises(MHCError, match=r"MHC618.*the loss is 6.1, 3.05 times the median of the last 21"):
            one.check(21, 6.1, 1.0, BATCH)
    assert Guard("stop", tmp_path).check(0, 1e30, 1.0, None) == "ok"


def test_skipping_ends_after_too_many_in_a_row(tmp_path: Path) -> None:
    guard = Guard("skip", tmp_path)
    for step in range(PATIENCE):
        with pytest.warns(MHCWarning, match=f"MHC618.*step {step} is left out"):
            assert guard.check(step, math.nan, 1.0, BATCH) == "skip"
    assert guard.check(PATIENCE, 1.0, 1.0, BATCH) == "ok"
    for step in range(PATIENCE):
        with pytest.warns(MHCWarning):
            assert guard.check(step, math.nan, 1.0, BATCH) == "skip"
    assert guard.skipped == 2 * PATIENCE
    with pytest.raises(MHCError, match="after 10 steps left out in a row"):
        guard.check(99, math.nan, 1.0, BATCH)
    assert (tmp_path / "failed-step-99").is_dir()


def test_a_full_disk_does_not_hide_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MHCError, match=r"MHC618.*not finite.*not written"):
        Guard("stop", tmp_path / "file").check(1, math.nan, 1.0, BATCH)


def test_all_ranks_do_the_same(tmp_path: Path) -> None:
    state = "{'skipped': 2, 'row': 1, 'losses': [2.0, 2.0]}"
    assert run_ranks(2, steps, tmp_path, "skip", str(tmp_path)) == [
        ["ok", "skip", "ok", "skip", "MHC618", "MHC618", state],
        ["ok", "skip", "ok", "skip", state],
    ]
    first, second = run_ranks(2, steps, tmp_path, "stop", str(tmp_path))
    assert first == second == ["ok", "MHC618", "{'skipped': 0, 'row': 1, 'losses': [2.0]}"]
    where = tmp_path / "failed-step-1"
    assert len(list(where.iterdir())) == 4
    assert load_file(where / "rank-00001.safetensors")["input_ids"].eq(1).all()
