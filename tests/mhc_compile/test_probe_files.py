"""What becomes of samples: lines of JSON, TensorBoard, pictures, and the command that shows them."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import small
from tiny_models import chain, ids, loss_of, shake

from mhc_compile import MHCError, Probes, convert
from mhc_compile.cli import main
from mhc_compile.probes import read_samples


@pytest.fixture(scope="module")
def probes() -> Probes:
    """Two samples of a model with memories."""
    model = convert(chain(depth=3), ids(), streams=3, engram=small("paper"), inner="eager")
    shake(model)
    found = Probes(model, every=2)
    for step in range(3):
        with found.step():
            loss_of(model, step).backward()
        model.zero_grad()
    return found


@pytest.fixture(scope="module")
def deep() -> Probes:
    """Two samples of a depth form."""
    model = convert(chain(depth=3), ids(), form="denseformer", inner="eager")
    shake(model)
    sampling = Probes(model, every=1)
    for step in range(2):
        with sampling.step():
            loss_of(model, step).backward()
    return sampling


def refused(code: str, path: Path) -> None:
    with pytest.raises(MHCError, match=code):
        read_samples(path)


def test_a_file_has_every_sample(probes: Probes, tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text("something else")
    probes.write(path)
    samples = read_samples(path)
    assert [s.step for s in samples] == [0, 2]
    for found, held in zip(samples, probes.samples, strict=True):
        assert (found.owner, found.tokens, found.sites, found.layers) == ("", 16, held.sites, ("layers.0", "layers.1"))
        assert list(found.values) == list(held.values)
        for name, value in held.values.items():
            torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["probes.jsonl"]


def test_a_value_that_is_not_finite_is_null(probes: Probes, tmp_path: Path) -> None:
    (sample, _) = probes.samples
    values = {**sample.values, "separation": torch.tensor([1.0, torch.nan, torch.inf])}
    line = replace(sample, values=values).line()
    assert json.loads(line)["values"]["separation"] == [1.0, None, None]
    (tmp_path / "one.jsonl").write_text(line)
    (found,) = read_samples(tmp_path / "one.jsonl")
    assert found.values["separation"].isnan().tolist() == [False, True, True]


def test_files_that_are_refused(probes: Probes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    refused("MHC413", path)
    good = json.loads(probes.samples[0].line())
    cut = {**good, "values": {**good["values"], "mix": good["values"]["mix"][:1]}}
    ragged = {**good, "values": {**good["values"], "pre": [[1.0], [1.0, 2.0], []]}}
    for line in (
        "", "{", "[1]", "[" * 100_000, json.dumps({**good, "format": 2}), json.dumps({**good, "values": {}}),
        json.dumps({**good, "sites": [1, 2, 3]}), json.dumps({**good, "step": 1e400}), json.dumps(cut),
        json.dumps(ragged), json.dumps({**good, "values": [1]}), json.dumps({**good, "layers": ["one"]}),
        json.dumps({**good, "look_ups": ["one"]}),
        json.dumps({**good, "values": {**good["values"], "more": [1.0]}}),
    ):  # fmt: skip
        path.write_text(line)
        refused("MHC232", path)
    path.write_bytes(b"\xff\xfe")
    refused("MHC413", path)
    with pytest.raises(MHCError, match="MHC413"):
        probes.write(tmp_path / "missing" / "file")


def test_pictures(probes: Probes, tmp_path: Path) -> None:
    drawn = probes.plot(tmp_path / "new" / "folder")
    names = [path.name for path in drawn]
    pictures = ("mix", "gain", "streams", "gates", "history", "rows")
    assert names == [f"model-{picture}.png" for picture in pictures]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (tmp_path / "file").touch()
    with pytest.raises(MHCError, match="MHC413"):
        probes.plot(tmp_path / "file")


def test_pictures_without_matplotlib(probes: Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MHCError, match="MHC233"):
        probes.plot(tmp_path)


def test_tensorboard(probes: Probes, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        probes.to_tensorboard(writer)
        probes.to_tensorboard(writer)  # nothing is new
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    first, last = probes.samples
    tags = events.Tags()
    scalars = events.Scalars("separation/layers.1#0")
    assert [(e.step, e.value) for e in scalars] == [
        (s.step, pytest.approx(float(s.values["separation"][1]))) for s in (first, last)
    ]
    assert {"streams/layers.2#0/2", "branch_gradient/layers.0#0"} <= set(tags["scalars"])
    assert "gates/layers.0/1" in tags["histograms"]
    used = events.Scalars("rows_used/layers.1")
    assert [e.value for e in used] == [float(s.values["rows_used"][1]) for s in (first, last)]
    assert events.Histograms("gates/layers.0/1")[0].histogram_value.num == 16


def test_the_command(probes: Probes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "probes.jsonl"
    probes.write(path)
    assert main(["probe", str(path), "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert "model, step 2, 16 tokens" in out
    assert "layers.2#0" in out
    separation = float(probes.samples[-1].values["separation"][2])
    assert (f"{separation:.4g}" if separation >= 0.1 else f"{separation:.1e}") in out
    assert f"{probes.samples[-1].values['rows_entropy'][1]:.4g}" in out
    assert (tmp_path / "plots" / "model-gates.png").exists()
    path.write_text("nothing")
    assert main(["probe", str(path)]) == 3
    assert "MHC232" in capsys.readouterr().err


def test_a_depth_form(deep: Probes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "probes.jsonl"
    deep.write(path)
    samples = read_samples(path)
    for read, sample in zip(samples, deep.samples, strict=True):
        assert list(read.values) == list(sample.values)
        for name, value in sample.values.items():
            torch.testing.assert_close(read.values[name], value, rtol=1e-5, atol=0)
    assert main(["probe", str(path), "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("read", "newest", "output", "entropy", "gradient", "layers.2#0"))
    drawn = sorted(picture.name for picture in (tmp_path / "plots").iterdir())
    assert drawn == ["model-depth.png", "model-history.png", "model-weights.png"]
    good = json.loads(samples[0].line())
    values = good["values"]
    for wrong in ({**values, "output": [1.0]}, {**values, "mix": [1.0] * 3}, {**values, "gates": [[[1.0]]]}):
        path.write_text(json.dumps({**good, "values": wrong}))
        refused("MHC232", path)
