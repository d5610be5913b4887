"""Check samples of probes in reports: figures at their sites, bars, and files of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
from chromium import opened
from memories import with_memory
from playwright.sync_api import Browser, expect
from report_pages import browser, choose, written
from sampling import converted, sampled
from test_report import check
from tiny_models import chain, code_of, ids, llama, shake

import mhc_compile
from mhc_compile.palette import HEAT, HEAT_COLOURS
from mhc_compile.probes import Probes

__all__ = ["browser"]


def test_figures_of_the_last_sample_stand_at_their_sites(browser: Browser, tmp_path: Path) -> None:
    model = with_memory(llama(), layers=(1,))
    shake(model)
    probes = Probes(model, every=1)
    for _ in range(2):
        with probes.step():
            model(ids(), labels=ids()).loss.backward()
    probes.write(tmp_path / "probes.jsonl")
    report = mhc_compile.inspect(model, ids(), probes=tmp_path / "probes.jsonl")
    data = check(report)
    last = probes.samples[-1]
    assert report.probes == "step 1, the last of 2 sampled"
    assert report.probes in str(report)
    for i, name in enumerate(last.sites):
        (site,) = [e for e in report.sites if e.name == name]
        assert site.probe["apart"] == pytest.approx(float(last.values["separation"][i]), rel=1e-5)
        gains = [float(last.values[f"gain_{way}_max"][i]) for way in ("forward", "backward")]
        assert site.probe["gain"] == pytest.approx(max(gains), rel=1e-5)
    (memory,) = report.of_kind("memory")
    assert 0 < memory.probe["gate"] < 1
    apart = report.sites[-1].probe["apart"]
    with opened(browser, written(data, tmp_path)) as page:
        choose(page, "layers.1#1")
        facts = page.page.locator("#detail .facts").first
        expect(facts).to_contain_text(f"apart {apart:.4g}".rstrip("0"))
        row = page.page.locator(".item[aria-selected=true] > .row")
        expect(row.locator("rect.heat")).to_have_count(2)
        widths = row.locator("rect.heat").evaluate_all("bars => bars.map((bar) => Number(bar.getAttribute('width')))")
        full = float(row.locator("rect.bar-back").first.get_attribute("width") or 0)
        assert widths[1] == pytest.approx(full * apart, rel=0.01)
        expect(page.page.locator(".item.memory > .row rect.heat")).to_have_count(1)
        page.check()


def test_samples_of_another_model_are_refused(tmp_path: Path) -> None:
    model = converted()
    Path(tmp_path / "three.jsonl").write_text("".join(f"{sample.line()}\n" for sample in sampled(model)))
    assert mhc_compile.inspect(model, ids(), probes=tmp_path / "three.jsonl").sites[0].probe
    others: list[tuple[Any, str]] = [
        (chain(depth=2), "layers.2#0 is no site here"), (chain(depth=4), "layers.3#0 has no sample"),
        (llama(), "streams here are those of model"),
    ]  # fmt: skip
    for other, said in others:
        with pytest.raises(mhc_compile.MHCError, match=said) as caught:
            mhc_compile.inspect(other, ids(), probes=tmp_path / "three.jsonl")
        assert code_of(caught.value) == "MHC234"


def test_the_colours_of_the_bars_are_those_of_the_figures() -> None:
    colours = [matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](i / 4)) for i in range(5)]
    assert list(HEAT_COLOURS) == colours
