"""Contenders: gated by correctness, measured in turn, drawn."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mhc_compile.bench.contest import Contender, chart, contest, copy_rate, distance, show
from mhc_compile.bench.gpu_contenders import PACKAGES
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError

CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO(), width=200)


def adder(name: str, wrong: float = 0.0, log: list[str] | None = None) -> Contender:
    x = torch.ones(1000)

    def run() -> torch.Tensor:
        if log is not None:
            log.append(name)
        return x + 1 + wrong

    return Contender(name, run, 8000, lambda found: distance([found], [torch.full((1000,), 2.0).double()]), 1e-6)


def test_contenders_run_in_turn_and_ours_is_one() -> None:
    log: list[str] = []
    rows = contest(QUIET, [adder("a", log=log), adder("b", log=log)], ours="b", device=CPU, shape="1000", rounds=4)
    assert log[-8:] == ["a", "b"] * 4
    assert [r.name for r in rows] == ["a", "b"]
    assert rows[1].ratio == 1
    assert rows[0].ratio == pytest.approx(rows[0].median / rows[1].median)
    assert all(r.low <= r.median <= r.high for r in rows)
    assert rows[0].fraction is not None
    assert rows[0].fraction > 0


def test_no_figure_for_a_contender_that_computes_wrongly() -> None:
    for wrong in (1e-3, float("nan")):
        with pytest.raises(MHCError, match=r"MHC110.*wrong one"):
            contest(QUIET, [adder("right"), adder("wrong one", wrong)], ours="right", device=CPU, shape="", rounds=1)


def test_another_package_that_raises_or_computes_wrongly_is_left_out_with_a_line() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image [sm_70]\nand many more lines")

    out = io.StringIO()
    others = [Contender("broken", fails, optional=True), replace(adder("wrong one", 1e-3), optional=True)]
    rows = contest(
        Console(file=out, width=20), [*others, adder("a")], ours="a", device=CPU, shape="", rounds=1
    )  # fmt: skip
    assert [r.name for r in rows] == ["a"]
    lines = [line for line in out.getvalue().splitlines() if "left out" in line]
    assert lines[0] == "broken: left out: RuntimeError: no kernel image [sm_70]"
    assert lines[1].startswith("wrong one: left out: MHCError: MHC110")
    assert len(lines) == 2
    with pytest.raises(RuntimeError, match="no kernel image"):
        contest(QUIET, [Contender("broken", fails), adder("a")], ours="a", device=CPU, shape="", rounds=1)


def test_what_a_run_consumes_is_made_again_before_every_run() -> None:
    log: list[str] = []
    consuming = replace(adder("a", log=log), prepare=lambda: log.append("prepare"))
    contest(QUIET, [consuming], ours="a", device=CPU, shape="", rounds=2)
    assert log == ["prepare", "a"] * 5


def test_copying_has_a_rate() -> None:
    assert copy_rate(CPU, 1 << 20) > 0


def test_table_and_chart(tmp_path: Path) -> None:
    rows = contest(QUIET, [adder("a"), Contender("other", lambda: None)], ours="a", device=CPU, shape="1", rounds=1)
    out = io.StringIO()
    plain = show(Console(file=out, width=200), "adding", rows)
    assert "adding" in out.getvalue()
    assert "other equations" in out.getvalue()
    chart(tmp_path / "bars.png", {"adding": plain, "again": plain})
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["boundary", "native", "step", "compile-time"])
def test_commands_write_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, image = tmp_path / "rows.json", tmp_path / "rows.png"
    assert main(["bench", name, "--quick", "--json", str(file), "--png", str(image)]) == 0
    figures = json.loads(file.read_text())
    assert figures["name"] == name
    for rows in figures["groups"].values():
        assert {"name", "device", "shape", "median", "low", "high", "ratio", "bytes", "fraction"} <= set(rows[0])
        assert any(row["ratio"] == 1 for row in rows)
    assert image.exists()
    if name == "boundary":
        named, printed = {row["name"] for row in rows}, capsys.readouterr().out
        assert all(package.name in named or f"{package.name}: " in printed for package in PACKAGES)
