"""The options `pipeline` and `disable`, `--passes`, and passes and forms of installed packages, on real models."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from memories import small
from tiny_models import close, ids, llama, logits, warned
from torch.fx import GraphModule

from mhc_compile import MHCError, Options, convert, inspect
from mhc_compile.bisect import bisect
from mhc_compile.cli import main
from mhc_compile.config import compile_pipeline, native_pipeline, parse_options
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.pipeline import Pipeline

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"
TEXT = "normalize,residual,widen,fuse{kinds=boundary},lower"


@dataclass(frozen=True)
class Counts:
    """Counts the graphs that it sees."""

    seen: list[int] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "counts"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        self.seen.append(len(gm.graph.nodes))
        return gm


@pytest.fixture
def passes_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all passes that run, in order; each runs as it is."""
    names: list[str] = []
    observe = Observer.run

    def noting(self: Observer, step: Any, *rest: Any) -> GraphModule:
        names.append(step.name)
        return observe(self, step, *rest)

    monkeypatch.setattr(Observer, "run", noting)
    return names


# --- options ------------------------------------------------------------------------------------------------------


def test_which_pipeline_an_option_replaces() -> None:
    usual = compile_pipeline(Options())
    assert str(compile_pipeline(Options(pipeline=TEXT))) == TEXT
    assert compile_pipeline(Options(pipeline=Pipeline.parse(TEXT))) == Pipeline.parse(TEXT)
    assert native_pipeline(Options(pipeline=TEXT)) == native_pipeline(Options())
    own = Options(pipeline="normalize,native,lower")
    assert native_pipeline(own).names == ("normalize", "native", "lower")
    assert compile_pipeline(own) == usual
    changed = Options(pipeline=lambda p: p.after("widen", Counts()))
    assert compile_pipeline(changed) == usual.after("widen", Counts())
    assert native_pipeline(changed) == native_pipeline(Options())


def test_what_may_be_left_out() -> None:
    assert compile_pipeline(Options(recompute=2, disable="fuse")).names[-2:] == ("recompute", "lower")
    assert native_pipeline(Options(recompute=2, disable="fuse, recompute")).names == ("normalize", "native", "lower")
    assert "fuse" not in compile_pipeline(Options(pipeline=TEXT, disable="recompute,fuse")).names
    for name in ("widen", "engram", "fues"):
        with pytest.raises(MHCError, match=rf"MHC204 .*disable='{name}'; may be left out: recompute, fuse"):
            Options(disable=f"fuse,{name}")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("residual,widen", "MHC241 .*residual requires normal-form"),
        ("normalize,residual,lower", "MHC241 .*leaves the model residual"),
        ("normalize,native,fues", "MHC240 .*no pass 'fues'"),
        (3, "MHC204 .*pipeline=3; known: a Pipeline, its text"),
        (lambda _: TEXT, "MHC204 .*known: a Pipeline"),
        (lambda p: p.without("fues"), "MHC240 .*no pass 'fues'"),
        (lambda p: p.without("normalize"), "MHC241 .*residual requires normal-form"),
    ],
)
def test_pipelines_that_cannot_be(option: Any, told: str) -> None:
    with pytest.raises(MHCError, match=told):
        Options(pipeline=option)


@pytest.mark.parametrize(
    "pipeline", [TEXT, Pipeline.parse(TEXT), lambda usual: usual.without("overencoding", "engram", "fuse")]
)
def test_a_converted_model_under_a_pipeline(pipeline: Any, passes_run: list[str]) -> None:
    model = llama()
    expected = logits(model(ids()))
    convert(model, streams=2, inner="eager")
    passes_run.clear()
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "pipeline": pipeline})
    assert close(logits(step(ids())), expected)
    wanted = compile_pipeline(Options(inner="eager", pipeline=pipeline)).names
    assert tuple(passes_run) == wanted
    assert "engram" not in wanted


def test_a_model_converted_with_a_pipeline_keeps_it(passes_run: list[str]) -> None:
    model, counts = llama(), Counts()
    expected = logits(model(ids()))
    convert(model, streams=2, inner="aot_eager", recompute=2, disable="recompute", pipeline=counting(counts))
    passes_run.clear()
    out = model(ids()).logits
    assert close(out, expected)
    assert "recompute" not in passes_run
    assert passes_run.index("counts") == passes_run.index("widen") + 1
    assert counts.seen


def counting(counts: Counts) -> Any:
    return lambda usual: usual.after("widen", counts)


def test_the_first_call_looks_at_the_graph_once_and_by_the_same_pipeline(passes_run: list[str]) -> None:
    model, counts = llama(), Counts()
    expected = logits(model(ids()))
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "pipeline": counting(counts)})
    with warned() as codes:
        assert close(logits(step(ids())), expected)
    assert codes == ["MHC302"]
    assert [passes_run.count(name) for name in ("normalize", "native", "residual", "widen", "counts", "lower")] == [
        1
    ] * 6
    first = len(passes_run)
    assert close(logits(step(ids())), expected)
    assert passes_run[first:].count("counts") == 1


def test_memories_are_not_left_out_in_silence() -> None:
    told = r"MHC241 .*looks rows up(?s:.)*put engram after widen"
    with pytest.raises(MHCError, match=told):
        convert(llama(), engram=small("paper"), streams=2, inner="eager", pipeline=TEXT)
    model = convert(llama(), engram=small("paper"), streams=2, inner="eager")
    (held,) = owners(model).values()
    held.options = Options(inner="eager", pipeline=TEXT)
    with pytest.raises(MHCError, match=told):
        model(ids())


# --- inspect, bisect, the command line ------------------------------------------------------------------------------


def test_inspect_and_bisect_take_pipelines() -> None:
    found = inspect(llama(), ids(), inner="eager", pipeline=TEXT)
    assert tuple(record.name for record in found.passes) == Pipeline.parse(TEXT).names
    assert parse_options([f"pipeline={TEXT}"]) == {"pipeline": TEXT}
    wrong = bisect(llama(), ids(), inner="eager", pipeline=TEXT)
    assert wrong.finding is None
    assert [checked.name for checked in wrong.checked][:3] == ["normalize", "residual", "widen"]


def test_passes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().config.save_pretrained(tmp_path)
    report = tmp_path / "report.json"
    assert main(["inspect", str(tmp_path / "config.json"), "--passes", TEXT, "--json", str(report)]) == 0
    assert [step["name"] for step in json.loads(report.read_text())["passes"]] == list(Pipeline.parse(TEXT).names)
    assert main(["inspect", str(tmp_path / "config.json"), "--passes", "normalize,fues"]) == 2
    assert main(["bisect", str(tmp_path / "config.json"), "--passes", "widen"]) == 2
    told = capsys.readouterr().err
    assert "MHC240" in told
    assert "MHC241" in told


# --- passes of other packages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which pip has installed the example package, without a network."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


def test_a_pass_of_an_installed_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "normalize,residual,widen,fuse{kinds=},powers{exponents=2,3},lower"
    with pytest.raises(MHCError, match=r"MHC240 .*no pass 'powers'"):
        Pipeline.parse(text)
    monkeypatch.syspath_prepend(installed)
    importlib.invalidate_caches()
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(MHCError, match=r"MHC240 .*no pass 'power'; known: .*probe, powers"):
        Pipeline.parse("power")
    model = llama()
    expected = logits(model(ids()))
    convert(model, streams=2, inner="eager")
    options = {"inner": "eager", "debug": "numeric", "pipeline": text}
    assert close(logits(torch.compile(model, backend="mhc", options=options)(ids())), expected)
    found = inspect(llama(), ids(), inner="eager", pipeline=text)
    notes = next(record.notes for record in found.passes if record.name == "powers")
    assert notes == ("5 powers written as products",)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("broken = missing_module:Broken", "broken is missing_module:Broken, which cannot be imported"),
        ("broken = mhc_powers:Missing", "broken is mhc_powers:Missing, which cannot be imported"),
        ("broken = mhc_powers:Powers", "mhc_powers:Powers is no frozen dataclass .* the name 'broken'"),
        ("broken = json:dumps", "json:dumps is no frozen dataclass"),
    ],
)
def test_an_entry_point_that_is_no_pass(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[mhc_compile.passes]\n{line}\n")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(MHCError, match=rf"MHC240 .*{told}"):
        Pipeline.parse("broken")


def test_a_form_of_an_installed_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*form='gated'; known: mhc, hc, hc_static"):
        StreamSpec(form="gated")
    monkeypatch.syspath_prepend(installed)
    importlib.invalidate_caches()
    model = llama()
    expected = logits(model(ids()))
    convert(model, form="gated", streams=2, inner="eager", debug="numeric")
    assert close(logits(model(ids())), expected)
    shapes = {n.rpartition(".")[2]: tuple(p.shape) for n, p in model.named_parameters() if ".mhc." in n}
    assert shapes == {"pre": (2,), "post": (2,)}


def test_an_entry_point_that_is_no_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("lost", "missing_module:Lost"), ("other", "json:dumps")):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[mhc_compile.forms]\n{name} = {place}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(MHCError, match=r"MHC204 .*missing_module:Lost, which cannot be imported"):
        form_of(StreamSpec(form="lost"))
    with pytest.raises(MHCError, match=r"MHC204 .*json:dumps is no subclass"):
        form_of(StreamSpec(form="other"))
