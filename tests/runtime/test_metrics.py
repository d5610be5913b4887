from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mhc_compile import MHCError, MHCWarning
from mhc_compile.runtime.metrics import EVENTS, FILE, Metrics, drop_after

GAINS = {"composite_gain/forward_max": 1.0, "composite_gain/backward_mean": 2.0, "composite_gain/backward_max": 1.05}


class Clock:
    """Seconds as the test wants them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, soft_wrap=True)


def shown(metrics: Metrics) -> str:
    out = metrics._console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def run(folder: Path, steps: Iterator[int] | range, **options: object) -> None:
    start = steps[0] - 1 if isinstance(steps, range) else 0
    with Metrics(folder, total_steps=20, start=start, console=console(), **options) as metrics:
        for step in steps:
            metrics.progress(step, 5.0 - step / 10, tokens=1000)
            metrics.log(step, {"loss": 5.0 - step / 10, "lr": 1e-3})


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / FILE).read_text().splitlines()]


def test_a_line_has_what_was_given_and_the_mean_speed_since_the_last_one(tmp_path: Path) -> None:
    clock = Clock()
    with Metrics(tmp_path, total_steps=4, console=console(), clock=clock) as metrics:
        for step in (1, 2):
            clock.now += 0.5
            metrics.progress(step, 4.0, tokens=100)
        clock.now += 60  # an evaluation
        metrics.log(2, {"grad_norm": 1.5, "loss": 4.0, "evaluation_loss": 4.5, "separation/layers.0#0": 0.25, **GAINS})
        clock.now += 0.25
        metrics.progress(3, 4.0, tokens=100)
        metrics.log(3, {"loss": 4.0})
    first, second = (json.loads(line) for line in (tmp_path / FILE).read_text().splitlines())
    assert first == {
        "step": 2, "loss": 4.0, "evaluation_loss": 4.5, "grad_norm": 1.5, "tokens_per_second": 200.0, "seconds": 0.5,
        "separation/layers.0#0": 0.25, **GAINS,
    }  # fmt: skip
    assert list(first)[:3] == ["step", "loss", "evaluation_loss"]
    assert second == {"step": 3, "loss": 4.0, "tokens_per_second": 400.0, "seconds": 0.25}
    text = shown(metrics)
    assert text.count("\n") == 2
    assert (
        "step 2/4  loss 4.0000  evaluation 4.5000  gradient 1.5  200 tokens/s  composite gain 1.0500  0:00:01 left"
        in text
    )


def test_lines_are_strict_json_whatever_the_figures_are(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=1, console=console()) as metrics:
        metrics.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    (line,) = (tmp_path / FILE).read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert found == {"step": 1, "loss": None, "grad_norm": None}
    assert "loss nan" in shown(metrics)


@pytest.mark.parametrize("start", [0, 3, 5, 9])
def test_a_run_that_goes_on_from_a_checkpoint_has_every_step_once(tmp_path: Path, start: int) -> None:
    run(tmp_path, range(1, 6))
    run(tmp_path, range(start + 1, 11))
    assert steps_of(tmp_path) == [*range(1, min(start, 5) + 1), *range(start + 1, 11)]
    assert [p.name for p in tmp_path.iterdir()] == [FILE], "no temporary file is left"


def test_a_line_that_a_killed_run_did_not_finish_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    path = tmp_path / FILE
    whole = path.read_text()
    for cut in (1, 5, len(whole.splitlines()[-1])):
        path.write_text(whole[:-cut])
        drop_after(path, 10)
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    run(tmp_path, range(3, 5))
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_file_with_nothing_to_drop_is_left_alone(tmp_path: Path) -> None:
    drop_after(tmp_path / FILE, 3)
    assert not (tmp_path / FILE).exists()
    run(tmp_path, range(1, 4))
    before = (tmp_path / FILE).stat().st_ino
    drop_after(tmp_path / FILE, 3)
    assert (tmp_path / FILE).stat().st_ino == before


def test_lines_are_on_the_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from mhc_compile.runtime.metrics import Metrics
metrics = Metrics(Path({str(tmp_path)!r}), total_steps=3)
metrics.log(1, {{"loss": 1.0}})
metrics.log(2, {{"loss": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert steps_of(tmp_path) == [1, 2]


def test_a_rank_that_does_not_show_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path / "metrics", range(1, 3), shows=False)
    assert not (tmp_path / "metrics").exists()


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    clock = Clock()
    metrics = Metrics(tmp_path, total_steps=4, start=1, console=console(terminal=True), clock=clock)
    for step in (2, 3, 4):
        clock.now += 0.5 if step < 4 else 0.01  # too soon to be drawn, but for the end
        metrics.progress(step, 4.25 + step / 100, tokens=100)
    metrics.log(4, {"loss": 4.25})
    metrics.close()
    metrics.close()
    text = shown(metrics)
    for part in ("training", "1/4", "loss 4.2700", "200 tokens/s", "4/4", "loss 4.2900", "step 4/4  loss 4.2500"):
        assert part in text, part
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 5), tensorboard=True)
    run(tmp_path, range(3, 7), tensorboard=True)  # from the checkpoint of step 2
    found = EventAccumulator(str(tmp_path / EVENTS)).Reload()
    assert {"loss", "lr", "seconds", "tokens_per_second"} <= set(found.Tags()["scalars"])
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx({step: 5 - step / 10 for step in range(1, 7)})
    assert len(found.Scalars("loss")) == 6


def test_lists_are_lists_in_the_file_and_histograms_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, total_steps=1, tensorboard=True, console=console()) as metrics:
        metrics.log(1, {"loss": 1.0}, {"expert_load/gate": [3.0, 0.0, 5.0]})
    assert json.loads((tmp_path / FILE).read_text()) == {"step": 1, "loss": 1.0, "expert_load/gate": [3, 0, 5]}
    (event,) = EventAccumulator(str(tmp_path / EVENTS)).Reload().Histograms("expert_load/gate")
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (1, 3.0, 8.0)


def test_the_part_of_the_devices_that_is_used(tmp_path: Path) -> None:
    clock = Clock()
    with Metrics(tmp_path, total_steps=1, devices=4, console=console(), clock=clock) as metrics:
        metrics.flops, metrics.peak = 5.0, 1000.0
        clock.now += 0.5
        metrics.progress(1, 4.0, tokens=20)
        metrics.log(1, {"loss": 4.0})
    found = json.loads((tmp_path / FILE).read_text())
    assert (found["tokens_per_second_per_device"], found["mfu"]) == (10.0, 0.2)
    assert "40 tokens/s  MFU 20.0%" in shown(metrics)


def test_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (range(1, 3), range(3, 5)):
        run(tmp_path, steps, wandb="project", recipe={"train": {"steps": 4}})
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(path.name.endswith((tmp_path / "wandb-id.txt").read_text()) for path in runs)
    assert all(list(path.glob("*.wandb")) for path in runs)


def test_weights_and_biases_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MHCError, match=r"(?s)MHC606.*mhc-compile\[wandb\]"):
        Metrics(tmp_path / "new", total_steps=1, wandb="project")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shows", [True, False])
def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shows: bool) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MHCError, match="MHC606") as error:
        Metrics(tmp_path / "new", total_steps=1, tensorboard=True, shows=shows)
    assert "mhc-compile[train]" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MHCError, match="MHC413"):
        Metrics(tmp_path / "file" / "metrics", total_steps=1)


def test_lines_that_the_disk_has_no_room_for_are_left_out(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on the sizes of files are those of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path, total_steps=4, console=console()) as metrics:
        metrics.log(1, {"loss": 1.0})
        size = (tmp_path / FILE).stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
            with pytest.warns(MHCWarning, match=r"MHC607.*No space"):
                metrics.log(2, {"loss": 2.0})
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # one warning is enough
                metrics.log(3, {"loss": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        metrics.log(4, {"loss": 4.0})
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 4]


def test_events_end_with_the_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on the sizes of files are those of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path, total_steps=2, tensorboard=True, console=console()) as metrics:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with pytest.warns(MHCWarning, match="MHC607"):
                metrics.log(1, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        metrics.log(2, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [2]
