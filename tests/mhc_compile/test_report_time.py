"""A step under the profiler: what every part takes, the model left as it was, and the timeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import opened
from memories import with_memory
from playwright.sync_api import Browser, expect
from report_pages import browser, choose, written
from test_inspect import config, run
from test_report import check, in_order, needs_compiler
from tiny_models import code_of, ids, llama

import mhc_compile
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.report.timing import RUNS, WARM_UP

Data = dict[str, Any]
__all__ = ["browser"]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[mhc_compile.Report, Data]:
    """The report of a converted model in training mode whose step was run, and the timeline of it."""
    torch._dynamo.reset()
    model = with_memory(llama(attention_dropout=0.1), layers=(1,)).train()
    model(ids(), labels=ids()).loss.backward()
    model.zero_grad()
    (table,) = (m for m in model.modules() if isinstance(m, MemoryTable))
    held = table.gradient
    assert held is not None
    before, seed = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    file = tmp_path_factory.mktemp("time") / "step.json"
    report = mhc_compile.inspect(model, ids(), trace=file)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), seed)
    assert table.gradient is not None
    assert all(map(torch.equal, table.gradient, held))
    return report, json.loads(file.read_text())


def test_every_part_that_computes_has_a_time(timed: tuple[mhc_compile.Report, Data]) -> None:
    report, _ = timed
    data = check(report)
    step = data["step"]
    assert (step["warm_up"], step["runs"]) == (WARM_UP, RUNS)
    assert step["device"].startswith("cpu, ")
    assert step["inputs"] == ["input_ids int64[2, 8]"]
    times = {e["name"]: e["time"] for e in data["elements"] if e["time"]}
    assert {e["name"] for e in data["elements"] if e["kind"] in ("site", "branch", "stream", "exit")} <= times.keys()
    for time in [*times.values(), step["time"]]:
        assert 0 <= time["low"] <= time["ms"] <= time["high"]
    assert step["parts"] == pytest.approx(sum(e["time"]["ms"] for e in data["elements"] if e["time"]))
    assert times["memory at model.layers.1"]["backward"] > 0
    own = [e["time"]["ms"] for e in data["elements"] if e["kind"] in ("stream", "site", "exit")]
    assert step["streams"] == pytest.approx(sum(own))
    # The tables of the rotation have no gradient, everything at and in a site has one.
    assert times["model.rotary_emb"]["backward"] == 0 < times["model.rotary_emb"]["forward"]
    assert all(e["time"]["backward"] > 0 for e in data["elements"] if e["kind"] in ("site", "branch"))
    lines = str(report).splitlines()
    assert any(line.startswith("a step: ") for line in lines)
    assert any(line.split()[0] == "model.layers.0-1#0" and line.count("%") for line in lines if line.strip())


@needs_compiler
def test_the_timeline_names_sites_forward_and_backward(timed: tuple[mhc_compile.Report, Data]) -> None:
    report, trace = timed
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    named = [e for e in events if e["cat"] == "user_annotation"]
    (forward,), (backward,) = ([e for e in named if e["name"] == name] for name in ("forward", "backward"))

    def inside(outer: Data, inner: Data) -> bool:
        return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3

    def names(of: Data) -> list[str]:
        ranges = sorted((e for e in named if e is not of and inside(of, e)), key=lambda e: e["ts"])
        return [e["name"] for e in ranges if "#" in e["name"]]

    sites = [e.full_name for e in report.sites]
    assert sites == [f"model.layers.{i}#{k}" for i in range(2) for k in range(2)]
    assert list(dict.fromkeys(names(forward))) == sites
    assert list(dict.fromkeys(names(backward))) == sites[::-1]
    # A boundary is computed for the site after it, forward and backward; none crosses the memory between the layers.
    kernels = [e for e in events if "boundary_rms" in e["name"] and e["cat"] == "cpu_op"]
    at = {name: {r["name"] for r in named for e in kernels if r["name"] == name and inside(r, e)} for name in sites}
    assert [name for name in sites if at[name]] == sites[1::2]
    for part in (forward, backward):
        assert any(inside(part, e) for e in kernels)


def test_bars_stand_beside_the_bytes(timed: tuple[mhc_compile.Report, Data], browser: Browser, tmp_path: Path) -> None:
    data = json.loads(timed[0].json())
    with opened(browser, written(data, tmp_path)) as page:
        table = page.page.locator("section", has=page.page.get_by_role("heading", name="Time of a step"))
        parts = [i for i in in_order(data) if data["elements"][i]["time"]]
        expect(table.locator("tbody tr")).to_have_count(len(parts))
        expect(table.locator("tbody .gauge")).to_have_count(len(parts))
        beside = page.page.locator("section", has=page.page.get_by_role("heading", name="Traffic of"))
        moving = [e for e in data["elements"] if e["bytes_token"] and e["time"]]
        expect(beside.locator("tbody td:nth-child(5) .gauge")).to_have_count(len(moving))
        choose(page, "layers.1#0")
        site = next(e for e in data["elements"] if e["name"] == "layers.1#0")
        share = f"{100 * site['time']['ms'] / data['step']['parts']:.1f} %"
        expect(page.page.locator("#detail")).to_contain_text(share)
        page.check()


def test_the_command_runs_what_a_configuration_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    file = tmp_path / "step.json"
    assert run(str(tmp_path), "--time", "--trace", str(file)) == 0
    out = capsys.readouterr().out
    assert "the streams' own work" in out
    assert "the folder has no weights" in out
    assert "input_ids int64[2, 64]" in out  # as many as the model has positions for
    assert "model.layers.1.mlp" in {e["name"] for e in json.loads(file.read_text())["traceEvents"]}


def test_without_weights_nothing_runs() -> None:
    with torch.device("meta"):
        hollow = llama()
    with pytest.raises(mhc_compile.MHCError) as caught:
        mhc_compile.inspect(hollow, ids(), time=True)
    assert code_of(caught.value) == "MHC525"


def test_what_cannot_be_converted_does_not_run(tmp_path: Path) -> None:
    report = mhc_compile.inspect(torch.nn.Linear(4, 4), torch.ones(2, 4), trace=tmp_path / "step.json")
    assert report.refusal is not None
    assert report.step is None
    assert not (tmp_path / "step.json").exists()
