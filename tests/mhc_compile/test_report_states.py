"""The report's data of models that are refused or have streams of their own; its files, sizes and warnings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_inspect import config, run
from test_report import check, code, in_order, named
from tiny_models import HIDDEN, VOCAB, Late, chain, code_of, ids, llama

import mhc_compile
from mhc_compile import MHCWarning, Report
from mhc_compile.kernels import targets
from mhc_compile.kernels.cpp import build
from mhc_compile.report.elements import MAX_SITES, layers_of


def test_a_refused_model_is_drawn_by_its_modules() -> None:
    data = check(mhc_compile.inspect(Late(), torch.randn(2, 3, HIDDEN)))
    assert data["state"] == "refused"
    (diagnostic,) = data["diagnostics"]
    assert (diagnostic["code"], diagnostic["severity"]) == ("MHC103", "error")
    assert diagnostic["module"].startswith("first.")
    assert diagnostic["way_out"]
    assert data["reach"]["module"] == "first.11"
    assert data["reach"]["sites"] == ["layers.1", "layers.0"]
    first = next(e for e in data["elements"] if e["name"] == "first")
    assert [data["elements"][c]["name"] for c in first["children"]] == [f"first.{i}" for i in range(12)]
    assert first["parameters"] == 12 * HIDDEN * (HIDDEN + 1)
    assert sum("linear(" in text and e["module"] == "first.3" for text, e in code(data, "normalize")) == 1


def test_a_model_that_is_not_captured_is_drawn_by_its_modules() -> None:
    data = check(mhc_compile.inspect(chain(breaks="inside"), ids()))
    assert [d["code"] for d in data["diagnostics"]] == ["MHC104"]
    assert (data["lines"], data["captured"], data["passes"]) == ([], [], [])
    assert [data["elements"][r]["name"] for r in data["roots"]] == ["embed", "layers", "head"]
    assert named(data, "layer") == ["layers.0", "layers.1"]
    assert "layers.1.up" in named(data, "outside")


def test_streams_of_its_own() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    made = transformers.DeepseekV4Config(
        hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3, vocab_size=VOCAB,
        max_position_embeddings=64, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made).eval()
    data = check(mhc_compile.inspect(model, recompute="auto", stages=2))
    assert data["state"] == "native"
    assert [d["code"] for d in data["diagnostics"]] == ["MHC107"]
    assert named(data, "stream") == ["model"]
    assert named(data, "site") == [f"model.layers.{i}#{k}" for i in range(3) for k in range(2)]
    assert named(data, "branch") == ["self_attn", "mlp"] * 3
    specs = {e["spec"] for e in data["elements"] if e["kind"] == "site"}
    assert "; ".join(sorted(specs)) == next(e["spec"] for e in data["elements"] if e["kind"] == "stream")
    for text, element in code(data, "native"):
        if "= mhc.coefficients(" in text or "= mhc.distribute(" in text:
            assert element["kind"] == "site"
        if "self_attn." in text.partition(" = ")[2]:
            assert element["name"] == "self_attn"
    order = [data["elements"][i]["kind"] for i in in_order(data) if i in data["roots"]]
    assert order.index("stream") < order.index("exit")


@given(st.lists(st.lists(st.sampled_from(["0", "1", "7", "block", "attn"]), max_size=5), min_size=1, max_size=12))
def test_layers_are_numbered_modules_around_their_sites(paths: list[list[str]]) -> None:
    modules = [".".join(["owner", *p]) for p in paths]
    layers = layers_of("owner", modules)
    for path, module, layer in zip(paths, modules, layers, strict=True):
        if layer is None:
            assert not any(p.isdigit() for p in path)
        else:
            assert f"{module}.".startswith(f"{layer}.")
            assert layer.rpartition(".")[2].isdigit()
    numbers = [sum(p.isdigit() for p in path) for path in paths]
    for module, layer, count in zip(modules, layers, numbers, strict=True):
        # Nothing deeper was there to choose where a layer has more sites than it may.
        if layer is not None and layers.count(layer) > MAX_SITES:
            same = [n for m, x, n in zip(modules, layers, numbers, strict=True) if x == layer]
            deepest = sum(p.isdigit() for p in layer.split("."))
            assert max(same) == deepest or max(numbers) == deepest, (module, count)


def test_a_page_and_json_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found = mhc_compile.inspect(chain(), ids())
    file = tmp_path / "report.html"
    file.write_text("old")
    assert found.html(file) == file.read_text()
    assert json.loads(found.json()) == json.loads(json.dumps(asdict(found)))
    (tmp_path / "taken").mkdir()
    for wrong in (tmp_path / "nowhere" / "report.html", tmp_path / "taken", ""):
        with pytest.raises(mhc_compile.MHCError) as caught:
            found.html(wrong)
        assert code_of(caught.value) == "MHC509"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "taken"]


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    data, page = tmp_path / "report.json", tmp_path / "report.html"
    wanted = ["--json", str(data), "--html", str(page), "--recompute", "1", "--stages", "2"]
    assert run(str(tmp_path), *wanted) == 0
    assert str(data) in capsys.readouterr().out
    held = check(Report.of(json.loads(data.read_text())))
    assert (len(held["blocks"]), len(held["stages"])) == (4, 2)
    assert "layers.1#0" in page.read_text()


def test_warnings_are_in_the_report_and_still_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget() -> None:
        for cached in (targets.choose, build.no_compiler):
            cached.cache_clear()

    forget()
    monkeypatch.setattr(build, "compiler_problem", lambda: "none of them works")
    try:
        with pytest.warns(MHCWarning, match="MHC309"):
            data = check(mhc_compile.inspect(chain(), ids()))
    finally:
        forget()
    (warning,) = data["diagnostics"]
    assert (warning["code"], warning["severity"], warning["detail"]) == ("MHC309", "warning", "none of them works")
    assert data["kernels"] == []


@pytest.mark.slow
def test_ninety_six_layers_stay_small() -> None:
    with torch.device("meta"):
        model = llama(num_hidden_layers=96)
    found = mhc_compile.inspect(model, recompute="auto", stages=4)
    assert len(found.json()) < 4e6
    data = check(found)
    assert len(named(data, "site")) == 192
