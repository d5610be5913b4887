"""`mhc-compile bench`: the figures it prints come with a correctness gate, and depth is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhc_compile.bench import passes
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError


def test_time_of_the_passes_is_part_of_dynamos_own_account() -> None:
    shallow, deep = passes.pass_time(1, 1), passes.pass_time(2, 1)
    assert deep.nodes > shallow.nodes > 50
    assert 0 < shallow.low <= shallow.median <= shallow.high


def test_no_figure_without_equal_results() -> None:
    expected = torch.ones(3)
    passes._check(expected, expected + 1e-7)
    with pytest.raises(MHCError, match="MHC110"):
        passes._check(expected, expected + 1e-3)
    with pytest.raises(MHCError, match="MHC110"):
        passes._check(expected, expected * float("nan"))


@pytest.mark.slow
def test_command_writes_all_figures(tmp_path: Path) -> None:
    assert main(["bench", "passes", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["layers"] for row in figures["passes"]] == [2, 4, 8]
    assert 0 < figures["share"] < 1
    assert figures["compile"]["passes"] < figures["compile"]["total"]


def test_nothing_to_draw_is_wrong_usage(tmp_path: Path) -> None:
    assert main(["bench", "passes", "--quick", "--png", str(tmp_path / "bars.png")]) == 2
    assert not list(tmp_path.iterdir())


def test_unknown_benchmark_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "nothing"])
    assert stop.value.code == 2
