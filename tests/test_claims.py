"""The examples that try claims, with `--quick`: what they write, and what must hold at any size."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mhc_compile.trial.studies import in_processes, markdown, plus_minus, smooth

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCS = Path(__file__).parent.parent / "docs"
HELD = ("yes", "**no**")


class Run(NamedTuple):
    numbers: dict[str, Any]
    tables: list[list[list[str]]]
    """The cells of every table."""
    folder: Path


def finished(name: str, folder: Path, example: str = "", *flags: str) -> Run:
    """A quick run of an example that writes files called `name`."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{example or name}.py"), "--quick", "--out", str(folder), *flags],
        cwd=folder.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.{ending}" for ending in ("json", "md", "png")]
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / f"{name}.png").stat().st_size < 150_000
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert text in done.stdout
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return Run(json.loads((folder / f"{name}.json").read_text()), [cells(table) for table in tables], folder)


def cells(table: str) -> list[list[str]]:
    """Without the head."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(row) for row in found}) == 1
    return found[2:]


@pytest.fixture(scope="module")
def stability(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("stability", tmp_path_factory.mktemp("claims") / "stability")


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("scaling", tmp_path_factory.mktemp("claims") / "scaling")


@pytest.fixture(scope="module")
def payoff(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("payoff", tmp_path_factory.mktemp("claims") / "payoff")


def test_conversions_start_from_the_trained_model(payoff: Run) -> None:
    by_arm = {t["arm"]: t for t in payoff.numbers["trained"]}
    first = by_arm["residual"]["losses"][0]
    for arm in ("mHC", "mHC, published start", "mHC, H free, alpha 1"):
        assert by_arm[arm]["losses"][0] == pytest.approx(first, rel=1e-5)
    assert by_arm["residual, before"]["losses"][0] == pytest.approx(by_arm["mHC from scratch"]["losses"][0], rel=1e-5)
    assert first < by_arm["residual, before"]["losses"][0] - 0.2
    assert len(by_arm["residual, as long as mHC takes"]["losses"]) >= len(by_arm["residual"]["losses"])
    claims, arms = payoff.tables
    assert claims[0][-1] == "yes"
    assert all(row[-1] in HELD for row in claims)
    assert len(arms) == len(by_arm)


def test_all_forms_start_from_the_same_function(stability: Run) -> None:
    runs = stability.numbers["by_form"]
    assert [r["job"]["form"] for r in runs] == ["residual", "HC", "mHC, H free", "mHC", "mHC + Engram"]
    first = runs[0]["losses"][0]
    for run in runs[1:]:
        assert run["losses"][0] == pytest.approx(first, rel=1e-5)
        assert run["losses"][-1] != runs[0]["losses"][-1], "the form trains on as the residual model does"


def test_stability_is_measured_at_every_size(stability: Run) -> None:
    found = stability.numbers
    runs = [r for part in ("by_depth", "by_count", "by_form") for r in found[part]]
    for run in runs:
        steps = run["job"]["settings"]["steps"]
        assert len(run["losses"]) == len(run["norms"]) == steps
        assert all(math.isfinite(x) and x > 0 for x in (*run["losses"], *run["norms"], run["held_out"]))
        assert run["losses"][-1] < run["losses"][0]
        after = {int(step): gain for step, gain in run["gains"].items()}
        assert set(after) == (set() if run["job"]["form"] == "residual" else {0, steps})
        assert all(math.isfinite(g) and g > 0.5 for gain in after.values() for g in gain.values())
    assert [r["job"]["settings"]["layers"] for r in found["by_depth"]] == [2, 2, 1, 1], "the longest first"


def test_the_gain_of_mhc_stays_and_that_of_free_matrices_does_not(stability: Run) -> None:
    found = stability.numbers
    for run in [*found["by_depth"], *found["by_form"]]:
        form, gains = run["job"]["form"], run["gains"]
        if form in ("mHC", "mHC + Engram"):
            assert all(g == pytest.approx(1, abs=0.01) for gain in gains.values() for g in gain.values())
        elif form != "residual":
            start, end = (gains[str(step)]["forward_mean"] for step in (0, run["job"]["settings"]["steps"]))
            assert start == pytest.approx(1, abs=1e-5)
            assert abs(end - 1) > 1e-3
    without = next(r for r in found["scratch"] if r["job"]["iterations"] == 0)
    # exp(0) on the diagonal and exp(-8) beside it, at each of two sites.
    assert without["gains"]["0"]["forward_mean"] == pytest.approx((1 + 3 * math.exp(-8)) ** 2, rel=1e-4)


def test_tables_of_stability(stability: Run) -> None:
    claims, depth, forms, iterations = stability.tables
    assert len(claims) == 8
    assert all(row[-1] in HELD for row in claims)
    assert [row[:2] for row in depth] == [["1", "2"], ["2", "4"]]
    assert [row[0] for row in forms] == ["residual", "HC", "mHC, H free", "mHC", "mHC + Engram"]
    assert [row[0] for row in iterations] == ["0", "20"]
    by_random = [float(x) for x in iterations[0][1].split(", ")]
    assert min(by_random) > 2, "random logits without normalisation amplify"
    assert [float(x) for x in iterations[1][1].split(", ")] == pytest.approx([1, 1], abs=1e-3)


def test_experts_and_rows_share_one_budget(scaling: Run) -> None:
    runs = {r["name"]: r for r in scaling.numbers["trained"]}
    assert [*runs] == ["none", "least", "25%", "75%"]
    none, least = runs["none"], runs["least"]
    paid = [r for r in runs.values() if r["share"]]
    for run in paid:
        assert run["experts"] < none["experts"]
        assert run["used"] == least["used"], "a token uses as many parameters at every share"
        dense = least["parameters"] - least["tables"] - none["parameters"]
        moved = run["parameters"] - dense
        assert 0.93 * none["parameters"] < moved <= none["parameters"], (
            "what experts lose the tables get, up to a prime"
        )
    assert [r["tables"] for r in paid] == sorted(r["tables"] for r in paid)


def test_scaling_trains_on_equal_batches(scaling: Run) -> None:
    runs = scaling.numbers["trained"]
    none, least = runs[:2]
    assert least["first"] == pytest.approx(none["first"], rel=1e-5), "adding a memory keeps the function"
    for run in runs:
        assert len(run["losses"]) == scaling.numbers["recipe"]["settings"]["steps"]
        assert all(math.isfinite(x) for x in (*run["losses"], run["held_out"]))
        assert run["held_out"] < run["first"]
        assert run["first"] == pytest.approx(none["first"], rel=0.02)
        # The auxiliary loss is at least its weight times the experts a token is routed to.
        assert run["losses"][0] > run["first"] - 0.2


def test_tables_of_scaling(scaling: Run) -> None:
    claims, shares = scaling.tables
    assert all(row[-1] in HELD for row in claims)
    assert [row[0] for row in shares] == ["none", "least", "25%", "75%"]
    for row, run in zip(shares, scaling.numbers["trained"], strict=True):
        assert float(row[-2]) == pytest.approx(run["held_out"], abs=1e-4)


@pytest.mark.slow
def test_kinds_of_memories(tmp_path: Path) -> None:
    kinds = finished("kinds", tmp_path / "kinds", "scaling", "--kinds")
    none, *others = kinds.numbers["trained"]
    assert [none["name"], *(r["name"] for r in others)] == ["none", "Engram", "UltraMem", "both"]
    for run in others:
        assert run["parameters"] == pytest.approx(none["parameters"], rel=0.02)
        assert run["first"] == pytest.approx(none["first"], rel=0.02)
        assert run["held_out"] < run["first"]
    (table,) = kinds.tables
    assert [row[0] for row in table] == ["none", "Engram", "UltraMem", "both"]


def test_the_page_takes_what_was_found(scaling: Run, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("claims.md", "claims.py"):
        shutil.copyfile(DOCS / name, docs / name)
    folder = scaling.folder
    before = (docs / "claims.md").read_text(encoding="utf-8")
    for _ in range(2):
        subprocess.run([sys.executable, str(docs / "claims.py"), str(folder)], check=True)
        after = (docs / "claims.md").read_text(encoding="utf-8")
        assert after.count((folder / "scaling.md").read_text(encoding="utf-8")) == 1
        assert after.split("<!-- scaling: begin -->")[0] == before.split("<!-- scaling: begin -->")[0]
        assert after.split("<!-- scaling: end -->")[1] == before.split("<!-- scaling: end -->")[1]
    assert (docs / "images" / "scaling.png").read_bytes() == (folder / "scaling.png").read_bytes()
    assert subprocess.run([sys.executable, str(docs / "claims.py"), str(tmp_path)], capture_output=True).returncode == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_in_processes_keep_their_order(processes: int, capsys: pytest.CaptureFixture[str]) -> None:
    run: Callable[[float], float] = math.sqrt
    assert in_processes(run, [9.0, 4.0, 1.0], processes) == [3, 2, 1]
    assert capsys.readouterr().out.count("of 3 after") == 3


def test_figures_of_tables() -> None:
    assert plus_minus([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert plus_minus([0.25], 2, sign=True) == "+0.25"
    assert smooth([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]], over=2) == [2.0, 2.5, 5.0]
    assert markdown(("a", "b", "c"), [("1", "+2", "x")]) == "| a | b | c |\n| --- | ---: | --- |\n| 1 | +2 | x |"
