"""Checkpoints of runs: any number of ranks, whole or not at all, and nothing in them is trusted."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import Cut, build, claim, fill, load, save, troubles, wrong
from ranks import run_ranks

from mhc_compile import MHCError, MHCWarning
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints
from mhc_compile.runtime.checkpoint.format import NAME, read_description
from mhc_compile.runtime.state import restore, training_state

SAME = {"data": {"seed": 1}}


def size(cut: Cut) -> int:
    return cut[0] * cut[1] * cut[2]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ((2, 2, 1), [(1, 1, 1), (2, 1, 1), (1, 2, 1)]),
        ((1, 2, 2), [(1, 1, 2), (1, 1, 1)]),
        pytest.param((2, 2, 1), [(2, 2, 2), (4, 1, 2), (1, 4, 2), (1, 1, 8)], marks=pytest.mark.slow),
        pytest.param((2, 2, 2), [(1, 1, 1), (1, 1, 3), (4, 1, 1)], marks=pytest.mark.slow),
    ],
)
def test_saved_on_some_ranks_and_loaded_on_others(there: Cut, here: list[Cut], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    copied = [name for names in run_ranks(size(there), save, tmp_path, there, str(folder), True) for name in names]
    assert len(copied) == len(set(copied))
    files = {p.name: p.stat().st_size for p in (folder / "step-00000007").glob("*.safetensors")}
    assert len(files) == size(there)
    # Every value once: what several ranks hold is written by one of them.
    description = read_description(folder / "step-00000007")
    assert all(len({c.offsets for c in t.chunks}) == len(t.chunks) for t in description.tensors.values())
    for cut in here:
        assert run_ranks(size(cut), load, tmp_path, cut, str(folder)) == [[]] * size(cut)


def test_a_full_disk_and_a_damaged_file_on_one_of_several_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, troubles, tmp_path, (2, 1, 1), str(tmp_path / "run"))
    (warning,) = first.pop("warned")
    assert "MHC616" in warning
    assert "File too large" in warning
    assert second.pop("warned") == []
    assert first == second == {
        "due": [2, 4],
        "after full": 1,
        "close": "MHC616",
        "kept": [".lock", "step-00000004", "step-00000005"],
        "other data": "MHC608",
        "damaged": "",
        "set aside": [".lock", "damaged-step-00000005", "step-00000004"],
    }  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint, of one process."""
    save((1, 1, 1), str(tmp_path), asynchronous=False)
    return tmp_path


def code_of_loading(folder: Path, progress: dict[str, Any] = SAME) -> tuple[str, str]:
    part, optimizer = build((1, 1, 1))
    checkpoints = Checkpoints(folder)
    try:
        restore(checkpoints, [part], optimizer, progress)
    except MHCError as error:
        # Before anything is changed.
        assert not any(p.any() for _, p in part.named_parameters())
        assert not optimizer.state
        return error.code, error.detail
    finally:
        checkpoints.close()
    assert wrong(part, optimizer) == []
    return "", ""


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {p.suffix for p in (saved / "step-00000007").iterdir()}
    assert kinds == {".json", ".safetensors"}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    (saved / "step-00000007" / ".metadata").write_bytes(pickle.dumps(print))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert code_of_loading(saved) == ("", "")


def test_there_is_nothing_yet(tmp_path: Path) -> None:
    part, optimizer = build((1, 1, 1))
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.latest() is None
    assert restore(checkpoints, [part], optimizer, SAME) is None
    checkpoints.close()


def _rewrite(path: Path, change: Any) -> None:
    """Change the description, as one of an earlier version: without a hash of its own."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "missing shard": lambda f: (f / "rank-00000.safetensors").unlink(),
    "cut short": lambda f: (f / "rank-00000.safetensors").write_bytes((f / "rank-00000.safetensors").read_bytes()[:-4]),
    "other bytes": lambda f: (f / "rank-00000.safetensors").write_bytes(
        (f / "rank-00000.safetensors").read_bytes().replace(b"0", b"1")
    ),
    "no description": lambda f: (f / NAME).unlink(),
    "no JSON": lambda f: (f / NAME).write_text("{"),
    "a list": lambda f: (f / NAME).write_text("[]"),
    "an edited field": lambda f: (f / NAME).write_text((f / NAME).read_text().replace('"seed": 1', '"seed": 2')),
    "another step": lambda f: _rewrite(f / NAME, lambda c: c.update(step=8)),
    "a path": lambda f: _rewrite(
        f / NAME, lambda c: c["files"].update({"../x.safetensors": c["files"]["rank-00000.safetensors"]})
    ),
    "a file that is not listed": lambda f: _rewrite(f / NAME, lambda c: c["files"].pop("rank-00000.safetensors")),
    "a part that is missing": lambda f: _rewrite(
        f / NAME, lambda c: c["tensors"]["model/embed.weight"]["chunks"].pop()
    ),
    "a part outside": lambda f: _rewrite(
        f / NAME, lambda c: c["tensors"]["model/embed.weight"]["chunks"][0].update(offsets=[1, 0])
    ),
    "a negative size": lambda f: _rewrite(
        f / NAME, lambda c: c["tensors"]["model/embed.weight"].update(shape=[-7, -4])
    ),
    "another dtype": lambda f: _rewrite(f / NAME, lambda c: c["tensors"]["model/embed.weight"].update(dtype="I32")),
    "an unknown dtype": lambda f: _rewrite(f / NAME, lambda c: c["tensors"]["model/embed.weight"].update(dtype="F1")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_damaged_is_refused(damage: str, saved: Path) -> None:
    DAMAGES[damage](saved / "step-00000007")
    assert code_of_loading(saved)[0] == "MHC615"


def test_a_later_format_is_not_taken_for_damage(saved: Path) -> None:
    shutil.copytree(saved / "step-00000007", saved / "step-00000006")
    _rewrite(saved / "step-00000007" / NAME, lambda c: c.update(format=2))
    assert code_of_loading(saved)[0] == "MHC619"


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(saved: Path) -> None:
    part, optimizer = build((1, 1, 1))
    fill(part, optimizer)
    checkpoints = Checkpoints(saved, keep=3)
    for step in (8, 9):
        checkpoints.save(step, training_state([part], optimizer, SAME))
    checkpoints.close()
    for step in ("step-00000008", "step-00000009"):
        DAMAGES["other bytes"](saved / step)
    with pytest.warns(MHCWarning, match=r"MHC615.*sha256.*and step 7 is tried") as warned:
        assert code_of_loading(saved) == ("", "")
    assert len([w for w in warned if w.category is MHCWarning]) == 2
    names = sorted(p.name for p in saved.iterdir())
    assert names == [".lock", "damaged-step-00000008", "damaged-step-00000009", "step-00000007"]


def test_another_model_or_other_data(saved: Path) -> None:
    code, detail = code_of_loading(saved, {"data": {"seed": 2, "sequence": 8}, "model": {"streams": 4}})
    assert (code, detail.partition(": ")[2]) == (
        "MHC608",
        "data.seed is 1 there and 2 here; data.sequence is None there and 8 here",
    )
    part, optimizer = build((1, 1, 1))
    part.parameters["more.weight"] = torch.nn.Parameter(torch.zeros(3))
    part.parameters["embed.weight"] = torch.nn.Parameter(torch.zeros(7, 5))
    part.parameters["layers.0.weight"] = torch.nn.Parameter(torch.zeros(10, 3, dtype=torch.bfloat16))
    del part.parameters["scale"]
    checkpoints = Checkpoints(saved)
    with pytest.raises(MHCError, match="MHC617") as caught:
        restore(checkpoints, [part], optimizer, SAME)
    checkpoints.close()
    assert caught.value.detail.partition(": ")[2] == (
        "only here: model/more.weight; only in the checkpoint: model/scale; "
        "model/embed.weight is [7, 4] float32 there and [7, 5] float32 here, "
        "model/layers.0.weight is [10, 3] float32 there and [10, 3] bfloat16 here"
    )


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    (told,) = run_ranks(1, claim, tmp_path, str(tmp_path / "run"))
    assert told == f"MHC619 another run is writing checkpoints to {tmp_path / 'run'}"
    checkpoints.close()
    assert run_ranks(1, claim, tmp_path, str(tmp_path / "run")) == [""]
    (tmp_path / "file").touch()
    with pytest.raises(MHCError, match="MHC619"):
        Checkpoints(tmp_path / "file")


def test_what_a_killed_run_left_is_cleared_and_whole_ones_stay(saved: Path) -> None:
    for name in (".step-00000008.partial", ".step-00000006.removed", "mine", "step-old"):
        (saved / name).mkdir()
        (saved / name / "x").touch()
    Checkpoints(saved).close()
    assert sorted(p.name for p in saved.iterdir()) == [".lock", "mine", "step-00000007", "step-old"]


def test_saving_again_after_loading_does_nothing_and_says_nothing(saved: Path) -> None:
    part, optimizer = build((1, 1, 1))
    checkpoints = Checkpoints(saved)
    restore(checkpoints, [part], optimizer, SAME)
    before = (saved / "step-00000007" / NAME).stat().st_ino
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.save(7, training_state([part], optimizer, SAME))
        checkpoints.close()
    assert (saved / "step-00000007" / NAME).stat().st_ino == before


def test_progress_is_plain_json(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError):
        checkpoints.save(1, {"progress": {"x": object()}})
    checkpoints.close()


def test_a_tied_parameter_of_two_stages_that_are_two(saved: Path) -> None:
    (first, optimizer), (last, _) = build((1, 1, 1)), build((1, 1, 1))
    last.parameters = {"embed.weight": last.parameters["embed.weight"]}
    last.tables = {}
    optimizer.add_param_group({"params": [last.parameters["embed.weight"]]})
    checkpoints = Checkpoints(saved)
    restore(checkpoints, [first, last], optimizer, SAME)
    assert wrong(first, optimizer) == wrong(last, optimizer) == []
    state = training_state([first, last], optimizer, SAME)
    checkpoints.save(8, state)
    checkpoints.close()
    assert code_of_loading(saved) == ("", "")
