"""`diff` of two forms of a model: sites, nodes, kernels and outputs, of models and of reports in files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama, shake
from transformers import SqueezeBertConfig, SqueezeBertModel

import mhc_compile
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.diff import Form, compare, form_of, read_form
from mhc_compile.diff.outputs import SAMPLES, compare_outputs
from mhc_compile.kernels.cpp import build
from mhc_compile.overrides import CompileOverrides

EAGER: CompileOverrides = {"inner": "eager"}
needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diff") / "llama"
    llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def usual(folder: Path) -> Form:
    return read_form(folder, EAGER)


@pytest.fixture
def report(usual: Form, tmp_path: Path) -> Path:
    """What a file of a report holds, outputs among it."""
    path = tmp_path / "report.json"
    path.write_text(usual.report.json(), encoding="utf-8")
    return path


def changed(report: Path, **parts: Any) -> Path:
    path = report.with_name("changed.json")
    path.write_text(json.dumps({**json.loads(report.read_text(encoding="utf-8")), **parts}), encoding="utf-8")
    return path


def test_a_form_is_the_same_as_itself(folder: Path, usual: Form) -> None:
    found = compare(usual, read_form(folder, EAGER))
    assert found.same
    assert not found.sites
    assert [n.which for n in found.numerics] == ["start", "moved"]
    assert all(n.error == 0 for n in found.numerics)
    assert "no difference" in str(found)
    assert len(usual.report.sites) == 4
    assert {s.topology for s in usual.report.sites} == {"pre-norm"}
    assert {s.added for s in usual.report.sites} == {24 * 4 * 32 + 24 + 3}


def test_another_number_of_streams(folder: Path, usual: Form) -> None:
    found = compare(usual, read_form(folder, {**EAGER, "streams": 2}))
    assert not found.same
    assert [s.kind for s in found.sites] == ["specification, parameters"] * 4
    start, moved = found.numerics
    assert start.relative is not None
    assert 0 < start.relative < 1e-5  # the function is preserved by both
    assert moved.error is None
    assert moved.reason == "stream parameters of other shapes"
    text = str(found)
    assert re.search(r"model\.layers\.0-1#0 +specification, parameters +streams=4; 3,099 +streams=2; 523", text)
    assert "nodes: the same" in text
    assert "not comparable: stream parameters of other shapes" in text


def test_another_convention_computes_something_else(folder: Path, usual: Form) -> None:
    found = compare(usual, read_form(folder, {**EAGER, "convention": "deepseek_v4", "exit": "mean"}))
    assert [s.kind for s in found.sites] == ["specification"] * 4
    start, moved = found.numerics
    assert start.relative is not None
    assert moved.relative is not None
    assert start.relative < 1e-5 < moved.relative
    assert "differ by" in str(found)


@needs_compiler
def test_kernels_and_the_bytes_that_they_move(folder: Path, usual: Form) -> None:
    found = compare(usual, read_form(folder, {**EAGER, "kernels": "all"}))
    assert usual.bytes_token == 0
    calls = {name.split("_n4")[0]: b for name, a, b in found.kernels if a is None}
    assert {name: count for name, (count, _) in calls.items()} == {"read_rms": 1, "boundary_rms": 3, "leave": 1}
    assert found.b.bytes_token == sum(count * size for count, size in calls.values()) > 0
    before, after = next((a, b) for name, a, b in found.nodes if name == "fuse")
    assert after < before
    assert not found.sites
    assert all(n.relative is not None and n.relative < 1e-5 for n in found.numerics)
    assert f"{found.b.bytes_token:,}" in str(found)


def test_layers_that_only_one_has(folder: Path, usual: Form, tmp_path: Path) -> None:
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "three")
    found = compare(usual, read_form(tmp_path / "three", EAGER))
    assert {s.name: s.kind for s in found.sites} == {f"model.layers.2#{i}": "only in B" for i in (0, 1)}
    assert found.numerics[0].reason == "other weights"
    assert {s.kind for s in compare(found.b, usual).sites} == {"only in A"}
    assert "only in B" in str(found)
    assert "4 in A, 6 in B, 4 in both" in str(found)


def test_a_converted_folder_is_compared_with_the_original(folder: Path, usual: Form, tmp_path: Path) -> None:
    mhc_compile.convert_folder(folder, tmp_path / "converted")
    found = compare(read_form(tmp_path / "converted", EAGER), usual)
    (n,) = found.numerics
    assert n.which == "own and start"
    assert n.relative is not None
    assert n.relative < 1e-5
    model = mhc_compile.convert(llama(), inner="eager")
    shake(model)
    model.save_pretrained(tmp_path / "trained")
    trained = compare(read_form(tmp_path / "trained", EAGER), found.a)
    assert not trained.same
    assert not trained.sites
    assert trained.numerics[0].which == "own"
    assert "the forms differ" in str(trained)


def test_random_weights_come_from_the_seed(folder: Path) -> None:
    config = folder / "config.json"
    one, same = (read_form(config, EAGER, seed=1) for _ in range(2))
    assert compare(one, same).same


def squeezebert() -> SqueezeBertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return SqueezeBertModel(SqueezeBertConfig(**sizes, num_attention_heads=4, vocab_size=64)).eval()


def test_a_model_that_is_refused_is_compared_as_it_is() -> None:
    forms = [form_of(squeezebert(), label, inner="eager") for label in ("one", "other")]
    found = compare(*forms)
    assert found.same
    assert [n.which for n in found.numerics] == ["own"]
    assert re.search(r"state +refused MHC108 +refused MHC108", str(found))
    assert not found.a.report.sites
    assert found.a.report.outputs is not None
    assert len(found.a.report.outputs["runs"]["own"]["sample"]) == SAMPLES


# --- reports in files -------------------------------------------------------------------------------------------------


def test_a_report_is_compared_with_a_model(folder: Path, report: Path, usual: Form) -> None:
    held = read_form(report)
    assert compare(held, usual).same
    old = changed(report, versions={**usual.report.versions, "mhc_compile": "0.0.9"})
    found = compare(read_form(old), usual)
    assert found.same  # what another version makes of the model is the same
    assert re.search(r"mhc_compile +0\.0\.9 +0\.1\.0", str(found))


def test_what_another_version_did_otherwise_is_found(report: Path, usual: Form) -> None:
    more, kinds = {"widen": 7}, {"layers.0#1": "post-norm"}
    data = json.loads(usual.report.json())
    passes = [{**p, "nodes_after": p["nodes_after"] + more.get(p["name"], 0)} for p in data["passes"]]
    elements = [{**e, "topology": kinds.get(e["name"], e["topology"])} for e in data["elements"]]
    found = compare(read_form(changed(report, passes=passes, elements=elements)), usual)
    assert [(s.name, s.kind) for s in found.sites] == [("model.layers.0#1", "topology")]
    assert [(name, a - b) for name, a, b in found.nodes if a != b] == [("widen", 7)]
    assert re.search(r"model\.layers\.0#1 +topology +post-norm +pre-norm", str(found))
    assert not found.same


def test_a_report_without_outputs(folder: Path, report: Path, usual: Form) -> None:
    path = changed(report, outputs=None)
    found = compare(read_form(path), usual)
    (n,) = found.numerics
    assert n.error is None
    assert "has no outputs" in n.reason
    assert f"outputs: not comparable: {path} has no outputs" in " ".join(str(found).split())
    assert found.same


def test_outputs() -> None:
    run = {"streams": "x", "shape": [2], "scale": 2.0, "mean": 0.5, "rms": 1.0, "sample": [1.0, 2.0]}
    nan = float("nan")

    def one(**other: Any) -> dict[str, Any]:
        return {"seed": 0, "weights": "w", "runs": {"own": {**run, **other}}}

    assert compare_outputs(one(), one(sample=[1.0, 2.5]), "")[0].relative == 0.25
    assert compare_outputs(one(sample=[nan, 1.0]), one(sample=[nan, 1.0]), "")[0].error == 0
    assert compare_outputs(one(), one(sample=[nan, 2.0]), "")[0].error == float("inf")
    assert compare_outputs(one(), one(shape=[3]), "")[0].reason == "outputs of [2] and of [3]"
    assert compare_outputs(one(), {**one(), "seed": 1}, "")[0].reason == "other inputs: another seed"
    assert compare_outputs(None, one(), "why")[0].reason == "why"


# --- refusals and the command -----------------------------------------------------------------------------------------


def test_refusals(folder: Path, report: Path, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no JSON", encoding="utf-8")
    mhc_compile.convert_folder(folder, tmp_path / "converted")
    cases: list[tuple[str, Path, Any]] = [
        ("MHC204", folder, {"stream": 2}),
        ("MHC204", report, {"streams": 2}),
        ("MHC201", folder, {"streams": 9}),
        ("MHC304", tmp_path / "converted", {"streams": 2}),
        ("MHC508", tmp_path, {}),
        ("MHC527", tmp_path / "nothing.json", {}),
        ("MHC527", tmp_path / "text.json", {}),
    ]
    for code, path, options in cases:
        with pytest.raises(MHCError) as caught:
            read_form(path, options)
        assert caught.value.code == code
    for parts in ({"format": 99}, {"elements": None}):
        with pytest.raises(MHCError) as caught:
            read_form(changed(report, **parts))
        assert caught.value.code == "MHC527"


def test_a_file_that_inspect_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "before.json"
    assert main(["inspect", str(folder), "--json", str(path), "--outputs"]) == 0
    found = compare(read_form(path), read_form(folder))
    assert found.same
    assert [(n.which, n.error) for n in found.numerics] == [("start", 0), ("moved", 0)]
    capsys.readouterr()
    assert main(["inspect", str(folder), "--outputs"]) == 2
    assert capsys.readouterr().err.startswith("MHC520")


def test_the_command(folder: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--a.inner", "eager", "--b.inner", "eager"]
    assert main(["diff", str(folder), str(folder), *words, "--no-run"]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["diff", str(folder), str(folder), *words, "--b.streams", "2", "--no-run"]) == 1
    out = capsys.readouterr().out
    assert "the forms differ" in out
    assert "was not run" in out
    assert main(["diff", str(report), str(folder), "--b.inner", "eager"]) == 0
    capsys.readouterr()
    assert main(["diff", str(folder), str(folder), "--a.wrong", "1"]) == 2
    assert "Unknown option: --a.wrong" in capsys.readouterr().err
