from __future__ import annotations

import io
import json
import math
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mhc_compile
from mhc_compile.cli import main
from mhc_compile.demo import run
from mhc_compile.demo.chart import ROWS, Series, chart
from mhc_compile.demo.memory import LEAST_SEEN
from mhc_compile.demo.output import ENTRIES, RESULTS, OutputFolder
from mhc_compile.demo.settings import QUICK, Settings, settings_for
from mhc_compile.demo.short import CHECKPOINT
from mhc_compile.demo.text import build_corpus, held_out_batches, training_batches
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import at_start, owners
from mhc_compile.trial.training import difference, learning_rate, spread

TINY = replace(
    QUICK, layers=1, hidden=32, heads=2, vocabulary=512, length=32, batch=4, steps=16, text_bytes=400_000,
    held_out_batches=4, sampled_tokens=12, initializer_range=32**-0.5, memory_steps=16, hot_rows=512,
    memory=replace(QUICK.memory, layers=(0,)),
)  # fmt: skip
MIDDLE = replace(QUICK, steps=60, memory_steps=60)
Finished = tuple[Path, dict[str, Any], Settings]
SIZES = [pytest.param(TINY, id="tiny"), pytest.param(MIDDLE, id="quick", marks=pytest.mark.slow)]


def demo(out: Path, *words: str) -> int:
    return main(["demo", "--out", str(out), *words])


@contextmanager
def offline() -> Iterator[None]:
    """No connection may be opened."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _no_network)
        patch.setattr(socket, "getaddrinfo", _no_network)
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=SIZES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the full demonstration at a smaller size."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with offline():
        assert run.run(request.param, out, full=True) == 0
    return out, json.loads((out / RESULTS).read_text()), request.param


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One run of the command with few steps, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with offline(), redirect_stdout(io.StringIO()) as printed:
        assert demo(out, "--steps", "6") == 0
    return out, json.loads((out / RESULTS).read_text()), printed.getvalue()


def _no_network(*args: object, **kwargs: object) -> None:
    raise AssertionError("the demonstration went to the network")


def test_the_conversion_leaves_the_loss_alone(finished: Finished) -> None:
    held = finished[1]["held_out"]
    assert held["relative_change_by_conversion"] < 1e-5
    assert held["at_conversion"]["streams"] == pytest.approx(held["at_conversion"]["residual"], rel=1e-5)


def test_both_train(finished: Finished) -> None:
    results = finished[1]
    held, losses = results["held_out"], results["training_loss"]
    assert held["at_conversion"]["residual"] < losses["before"][0]
    for name in ("residual", "streams"):
        assert held["at_end"][name] < held["at_conversion"][name]
        assert len(losses[name]) == finished[2].steps
        assert all(math.isfinite(loss) for loss in losses[name])
    assert losses["streams"][0] == pytest.approx(losses["residual"][0], rel=1e-5), "the same batch, the same weights"


def test_the_streams_separate_and_keep_their_gain(finished: Finished) -> None:
    before, after = (finished[1][when] for when in ("at_conversion", "at_end"))
    assert list(after["separation"]) == [f"layers.{i}#{j}" for i in range(finished[2].layers) for j in range(2)]
    assert max(before["separation"].values()) < 1e-5
    assert min(after["separation"].values()) > 1e-4
    for measured in (before, after):
        assert all(gain == pytest.approx(1, abs=0.05) for gain in measured["composite_gain"].values())


def test_the_memory_leaves_the_loss_alone_and_then_lowers_it(finished: Finished) -> None:
    found, held = finished[1]["memory"], finished[1]["held_out"]
    assert found["relative_change_by_adding"] < 1e-6
    (seed,) = found["seeds"]
    assert seed["at_start"]["with"] == pytest.approx(held["at_conversion"]["streams"], rel=1e-6)
    assert seed["at_end"]["without"] == pytest.approx(held["at_end"]["streams"], rel=1e-4), "the same batches"
    assert seed["difference"] == pytest.approx(seed["at_end"]["with"] - seed["at_end"]["without"])
    if finished[2] is MIDDLE:
        assert seed["difference"] < -0.03


def test_what_the_memory_holds_is_shown(finished: Finished) -> None:
    found, settings = finished[1]["memory"], finished[2]
    assert list(found["gates"]) == [f"model.layers.{i}" for i in range(settings.layers)]
    for rows in found["gates"].values():
        gates = [row["gate"] for row in rows]
        assert 1 > gates[0] > (0.6 if settings is MIDDLE else 0)
        assert gates == sorted(gates, reverse=True)
        assert all(row["seen"] >= LEAST_SEEN for row in rows)
    assert found["mapped"]["relative_change"] < 1e-6
    for used in found["mapped"]["tables"]:
        assert 0.02 < used["hit_rate"] < 1
        assert used["hot_rows"] <= settings.hot_rows < used["rows"]


def test_what_is_in_the_folder(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, results, settings = finished
    assert results["state"] == "finished"
    assert results["settings"]["inner"] == "eager"
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == set(results["files"])
    assert {"curves.png", "samples.txt", "residual/model.safetensors", "residual/tokenizer.json"} <= found
    assert {p.name for p in out.iterdir()} == set(ENTRIES) - {"report.html"}
    assert f"{2 * settings.layers} sites" in (out / "inspection.txt").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.txt").read_text().count("def read(") == 2
    assert f"model.layers.{settings.layers - 1}" in (out / "memory.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out / "residual", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(out / "residual", local_files_only=True)
    assert model.config.vocab_size == len(tokenizer) == settings.vocabulary


def test_the_converted_checkpoints_load(finished: Finished) -> None:
    for name, fresh in (("mhc", True), ("mhc-trained", False), ("mhc-memory", False)):
        model = mhc_compile.from_pretrained(finished[0] / name, inner="eager")
        assert [at_start(p) for p in owners(model).values()] == [fresh]


def test_the_shipped_checkpoint_converts_and_trains(short: tuple[Path, dict[str, Any], str]) -> None:
    out, results, printed = short
    assert results["largest_difference"] < 1e-5
    assert results["texts"]["residual"] == results["texts"]["mHC"]
    assert "The converted model wrote the same." in printed
    assert all(text.splitlines()[0] in printed for text in results["texts"]["mHC"])
    losses = results["training_loss"]
    assert {len(v) for v in losses.values()} == {6}
    for name in ("mHC", "any H"):
        assert losses[name][0] == pytest.approx(losses["residual"][0], rel=1e-5), "the same batch, the same weights"
        assert results["gains"][name]["0"] == pytest.approx(1, abs=1e-3)
    assert results["gains"]["mHC"]["6"] == pytest.approx(1, abs=0.05)
    assert {p.name for p in out.iterdir()} == {"residual", "mhc", "report.html", RESULTS}
    assert "<html" in (out / "report.html").read_text()
    assert "\x1b" not in printed, "lines without control characters where there is no terminal"
    assert "step 6 of 6; training loss: residual" in printed


def test_the_commands_that_come_next_run(short: tuple[Path, dict[str, Any], str]) -> None:
    out, _, printed = short
    inspect, back, full = (line.strip() for line in printed.splitlines()[-3:])
    assert full == "mhc-compile demo --full"
    for command in (inspect, back):
        words = shlex.split(command)
        assert words[0] == "mhc-compile"
        assert main(words[1:]) == 0
    weights = [load_file(out / name / "model.safetensors") for name in ("residual", "back")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())


def test_the_checkpoint_is_small_and_plain() -> None:
    files = sorted(CHECKPOINT.iterdir())
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert sum(p.stat().st_size for p in files) < 1_200_000


def test_a_chart_places_values_by_their_logarithm() -> None:
    drawn = chart([Series("any H", "x", "", {0: 1.0, 5: 10.0, 10: 1e4}), Series("mHC", "o", "", {0: 1.0, 10: 1.0})], 10)
    rows = drawn.plain.splitlines()
    assert rows[0].startswith("  10,000 │")
    assert rows[0].rstrip().endswith("x")
    assert rows[ROWS - 1].startswith("       1 │o")
    assert rows[ROWS - 1].endswith("o")
    assert rows[ROWS - 1 - (ROWS - 1) // 4].count("x") == 1
    assert rows[-1].split() == ["x", "any", "H:", "1e+04", "o", "mHC:", "1"]
    assert "x" in chart([Series("any H", "x", "", {3: math.inf, 4: math.nan})], 10).plain.splitlines()[0]


def test_a_second_run_replaces_only_what_the_first_wrote(finished: Finished, tmp_path: Path) -> None:
    for name in finished[1]["files"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    (tmp_path / "mine.txt").write_text("mine")
    OutputFolder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", RESULTS}
    (tmp_path / "curves.png").write_text("mine, under one of the demo's names")
    with pytest.raises(MHCError, match=r"curves\.png was not written by this command"):
        OutputFolder(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_file_put_into_a_checkpoint_folder_stays(tmp_path: Path) -> None:
    out = OutputFolder(tmp_path)
    (out / "residual").mkdir()
    (out / "residual" / "config.json").write_text("{}")
    out.record({})
    (out / "residual" / "notes.md").write_text("mine")
    with pytest.raises(MHCError, match="residual was not written"):
        OutputFolder(tmp_path)
    assert (out / "residual" / "notes.md").read_text() == "mine"


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "out"):
        with pytest.raises(MHCError, match="--out") as error:
            run.run(settings_for(full=False, steps=None, seed=0), out)
        assert error.value.code == "MHC412"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / RESULTS).write_text('{"made_by": "something else", "files": ["thesis.tex"]}')
    with pytest.raises(MHCError, match="was not made by this command"):
        OutputFolder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_list_that_names_other_files_removes_nothing(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "residual").symlink_to(elsewhere)
    names = ["../elsewhere/a", str(elsewhere / "a"), "residual/a", "residual/../../elsewhere/a", "", "mine.txt"]
    (folder / "mine.txt").write_text("mine")
    (folder / RESULTS).write_text(json.dumps({"made_by": "mhc-compile demo", "files": names}))
    with pytest.raises(MHCError, match="residual was not written"):
        OutputFolder(folder)
    assert (elsewhere / "a").exists()
    assert (folder / "mine.txt").exists()


def test_too_few_steps_and_the_default_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "4"]) == 2
    assert "Must be >= 5" in capsys.readouterr().err
    chosen = settings_for(full=True, steps=7, seed=3)
    assert (chosen.steps, chosen.seed, chosen.inner) == (7, 3, "inductor")
    assert (chosen.memory_steps, chosen.seeds) == (7, 3)
    assert settings_for(full=True, steps=None, seed=0, seeds=2).seeds == 2
    assert main(["demo", "--seeds", "2"]) == 2
    assert "add --full" in capsys.readouterr().err
    assert main(["demo", "--seeds", "0"]) == 2


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_NEEDED", ("torch", "a_package_that_nobody_has"))
    assert demo(tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert "needs a_package_that_nobody_has: pip install 'mhc-compile[demo]'" in message
    assert not (tmp_path / "out").exists()


def test_the_text_is_the_same_each_time_and_held_out_of_training() -> None:
    first, second = build_corpus(QUICK), build_corpus(QUICK)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    assert int(first.train.max()) < QUICK.vocabulary
    batches, held = training_batches(first, QUICK, stream=0), held_out_batches(first, QUICK)
    assert len(batches) == QUICK.steps
    assert {b.shape for b in (*batches, *held)} == {(QUICK.batch, QUICK.length)}
    assert not torch.equal(batches[0], training_batches(first, QUICK, stream=1)[0])
    text = first.tokenizer.decode(held[0][0])
    assert first.tokenizer.decode(first.tokenizer(text)["input_ids"]) == text


def test_schedule_and_statistics() -> None:
    rates = [learning_rate(i, 100, 1.0) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    found = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert difference([1.0, 1.0], [2.0, 4.0]) == pytest.approx((2.0, 1.0))
