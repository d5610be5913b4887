"""`bisect` finds what is planted at its pass and site, its reproducers run, and right models are left in peace."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted_passes
import pytest
import torch
from memories import with_memory
from planted_passes import ForgetsABranch, MistakesPre, ReversesPost, ReversesPostOf, Rounds, SwapsOperands
from tiny_models import chain, gpt2, ids, llama, shake, state, t5
from torch import Tensor, nn
from torch.fx import GraphModule

import mhc_compile
from mhc_compile.bisect import Bisection, bisect, inner
from mhc_compile.cli import main
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.cpp import build
from mhc_compile.passes.base import Pass
from mhc_compile.passes.pipeline import Pipeline

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")
EAGER = Options(inner="eager")


def passes_with(step: Pass, *, instead: str | None = None, kernels: str = "none") -> Pipeline:
    """The usual passes with `step` after `widen`, or in the place of another."""
    usual = compile_pipeline(Options(inner="eager", kernels=kernels))
    return usual.after("widen", step) if instead is None else usual.replace(instead, step)


def run_file(path: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    """A reproducer in a Python of its own, as a user runs it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def mended(tmp_path: Path) -> Path:
    """A folder with the planted passes mended."""
    folder = tmp_path / "mended"
    folder.mkdir()
    text = (HERE / "planted_passes.py").read_text(encoding="utf-8")
    assert "\nWRONG = True\n" in text
    (folder / "planted_passes.py").write_text(text.replace("\nWRONG = True\n", "\nWRONG = False\n"), encoding="utf-8")
    return folder


def run_here(path: Path) -> int:
    """The same in this process, which is quicker: the exit code."""
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(path), run_name="__main__")
    assert isinstance(done.value.code, int)
    return done.value.code


PLANTED: dict[str, tuple[Pass, str | None, str, str]] = {
    "post": (ReversesPost(), None, "reverses_post", "model.layers.1#0"),
    "rounding": (Rounds(), "lower", "lower", "model.layers.1#1"),
    "pre": (MistakesPre(), "widen", "widen", "model.layers.1#0"),
    "operands": (SwapsOperands(), "normalize", "normalize", "model.layers.1#1"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_pass_is_found_at_its_site(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, instead, wrong, site = PLANTED[name]
    path = tmp_path / "wrong.py"
    found = bisect(llama(), inner="eager", pipeline=passes_with(step, instead=instead), reproducer=path)
    assert (found.step, found.site) == (wrong, site)
    assert found.checked[-1].name == wrong
    assert found.finding is not None
    assert found.finding.source is not None
    assert "modeling_llama.py" in found.finding.source
    assert found.finding.before != found.finding.after
    assert f"{wrong} is wrong at site {site}" in str(found)
    assert found.reproducer == path
    text = path.read_text(encoding="utf-8")
    assert "def before(" in text
    assert "def after(" in text
    assert run_here(path) == 1
    out = capsys.readouterr().out
    assert "before: " in out
    assert "after: " in out
    assert out.endswith("wrong\n")
    monkeypatch.setattr(planted_passes, "WRONG", False)
    assert run_here(path) == 0


def test_the_reproducer_runs_by_itself(tmp_path: Path, mended: Path) -> None:
    path = tmp_path / "wrong.py"
    found = bisect(llama(), inner="eager", pipeline=passes_with(ReversesPostOf("layers.0#1")), reproducer=path)
    assert (found.step, found.site) == ("reverses_post_of", "model.layers.0#1")
    assert len(path.read_text(encoding="utf-8")) < 30_000  # the site's part of the graph alone
    shown, gone, alone = run_file(path, HERE), run_file(path, mended), run_file(path)
    assert shown.returncode == 1, shown.stderr
    assert "by planted_passes.ReversesPostOf" in shown.stdout
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert gone.stdout.endswith("right\n")
    assert alone.returncode == 1, alone.stderr
    assert "as recorded" in alone.stdout


@needs_compiler
def test_a_branch_forgotten_by_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wrong.py"
    steps = passes_with(ForgetsABranch(Options(kernels="all").kinds), instead="fuse", kernels="all")
    found = bisect(llama(), inner="eager", pipeline=steps, reproducer=path)
    assert (found.step, found.site) == ("fuse", "model.layers.0#1")
    assert run_here(path) == 1
    monkeypatch.setattr(planted_passes, "WRONG", False)
    assert run_here(path) == 0


@needs_compiler
@pytest.mark.parametrize(
    ("result", "kind", "site"),
    [("next_mix", "boundary", "model.layers.0#1"), ("d_y", "boundary", "model.layers.0#0"),
     ("h", "leave", "model.layers.1#1")],
)  # fmt: skip
def test_a_wrong_kernel(result: str, kind: str, site: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    undo = planted_passes.plant_kernel(result, kind)
    try:
        found = bisect(llama(), inner="eager", kernels="all", reproducer=path)
        assert run_here(path) == 1
    finally:
        undo()
    assert (found.step, found.site) == ("kernels", site)
    assert found.finding is not None
    assert found.finding.what.startswith(f"{result} of {kind}")
    assert found.finding.dtype == "float32"
    assert run_here(path) == 0


@needs_compiler
@pytest.mark.parametrize(
    ("result", "kind", "preset"),
    [("d_keys", "gate", "paper"), ("next_X", "inject", "paper"), ("d_value", "remember", "v41")],
)
def test_a_wrong_kernel_of_a_memory(result: str, kind: str, preset: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    model = with_memory(llama(), preset, layers=(1,))
    undo = planted_passes.plant_kernel(result, kind, 1e-2)
    try:
        found = bisect(model, ids(), inner="eager", kernels="all", reproducer=path)
        assert found.finding is not None
        assert (found.step, found.site) == ("kernels", None)
        assert found.finding.what.startswith(f"{result} of {kind}")
        assert found.finding.module.startswith("model.layers.1")
        assert run_here(path) == 1
    finally:
        undo()
    assert run_here(path) == 0


@needs_compiler
def test_right_kernels_of_a_memory_are_judged_and_right() -> None:
    found = bisect(with_memory(llama(), layers=(1,)), ids(), inner="eager", kernels="all")
    assert found.finding is None
    assert next(c.rounding for c in found.checked if c.name == "kernels") is not None


def test_a_wrong_inner_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = inner.compile_inner

    def wrong(gm: GraphModule, inputs: Any, options: Options) -> Any:
        node = planted_passes.distributes(gm)[1]
        planted_passes.changed(gm, node, 3, "mul", 1.001)
        gm.recompile()
        return right(gm, inputs, options)

    monkeypatch.setattr(inner, "compile_inner", wrong)
    found = bisect(llama(), inner="aot_eager", kernels="none", reproducer=tmp_path / "wrong.py")
    assert (found.step, found.site) == ("aot_eager", "model.layers.0#1")


def test_a_graph_that_cannot_be_run() -> None:
    found = bisect(llama(), inner="eager", pipeline=passes_with(planted_passes.Breaks(), instead="lower"))
    assert (found.step, found.site) == ("lower", "model.layers.1#0")
    assert found.finding is not None
    assert "cannot be run" in found.finding.what


def test_a_pass_that_cannot_be_imported_is_shown_as_recorded(tmp_path: Path) -> None:
    class Local(ReversesPost):
        pass

    path = tmp_path / "wrong.py"
    found = bisect(llama(), inner="eager", pipeline=passes_with(Local()), reproducer=path)
    assert found.site == "model.layers.1#0"
    text = path.read_text(encoding="utf-8")
    assert "step=None" in text
    assert "flip((-1,))" in text
    assert len(text) < 30_000  # the site's part of the graph alone
    assert run_here(path) == 1


def test_inputs_that_are_too_many_are_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhc_compile.bisect.reproducer.EMBEDDED", 1 << 10)
    monkeypatch.setattr("mhc_compile.bisect.reproducer.SMALL", 1 << 8)
    path = tmp_path / "wrong.py"
    bisect(llama(), inner="eager", pipeline=passes_with(ReversesPostOf("layers.0#1")), reproducer=path)
    text = path.read_text(encoding="utf-8")
    assert "replay.seeded(" in text
    assert len(text) < 5_000
    assert run_here(path) == 1


def test_a_user_s_line_cannot_break_out_of_the_heading(tmp_path: Path) -> None:
    class Quoted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(64, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return h + self.up(h) * len("""\\""")

    torch.manual_seed(0)
    path = tmp_path / "wrong.py"
    found = bisect(Quoted(), ids(), inner="eager", pipeline=passes_with(ReversesPost(0)), reproducer=path)
    assert found.finding is not None
    assert '"""' in str(found.finding.source)
    assert run_here(path) == 1


RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"kernels": "all"}),
    "gpt2 in training": (lambda: gpt2(resid_pdrop=0.5).train(), {"streams": 2}),
    "t5 of deepseek": (t5, {"convention": "deepseek_v4", "streams": 2}),
    "llama in bfloat16": (lambda: llama().to(torch.bfloat16), {"kernels": "all"}),
    "one stream": (llama, {"streams": 1, "convention": "megatron_main"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_is_left_in_peace(name: str) -> None:
    make, options = RIGHT[name]
    model = make()
    before = state(model)
    found = bisect(model, inner="eager", **options)
    assert found.finding is None, str(found)
    assert (found.step, found.site, found.reproducer) == (None, None, None)
    assert "no difference found" in str(found)
    judged = "kernels" in options and not build.compiler_problem()
    assert [c.name for c in found.checked][-1] == ("kernels" if judged else "lower")
    assert state(model) == before


def test_a_converted_model_is_searched_with_its_own_parameters() -> None:
    model = mhc_compile.convert(llama(), inner="eager")
    shake(model)
    before = state(model)
    found = bisect(model, ids(), inner="eager", example_kwargs={"use_cache": False})
    assert found.finding is None, str(found)
    wrong = bisect(model, ids(), inner="eager", pipeline=passes_with(ReversesPost()))
    assert (wrong.step, wrong.site) == ("reverses_post", "model.layers.1#0")
    assert wrong.finding is not None
    assert wrong.finding.values == "the model's own parameters"
    assert state(model) == before


def test_a_compiled_model_and_one_of_plain_pytorch() -> None:
    found = bisect(torch.compile(chain()), ids(), inner="aot_eager", kernels="none")
    assert found.model == "Chain"
    assert found.finding is None, str(found)
    assert found.checked[-1].name == "aot_eager"


class _Undefined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float("nan")


def test_results_that_are_not_numbers_are_said() -> None:
    found = bisect(_Undefined(), ids(), inner="eager")
    assert found.finding is None
    assert any("not numbers" in note for note in found.notes)
    assert "not numbers" in found.text()


def test_a_pass_that_makes_numbers_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    class Divides(ReversesPost):
        name = "divides"

        def apply(self, gm: GraphModule, context: Any) -> GraphModule:
            planted_passes.changed(gm, planted_passes.distributes(gm)[1], 1, "mul", float("inf"))
            return gm

    found = bisect(llama(), inner="eager", pipeline=passes_with(Divides()))
    assert (found.step, found.site) == ("divides", "model.layers.0#1")
    assert found.finding is not None
    assert found.finding.error == float("inf")


def test_the_tolerance_can_be_chosen() -> None:
    assert bisect(chain(), ids(), inner="eager", tolerance=1e-12).step == "widen"  # whose parameters are float32
    found = bisect(chain(), ids(), inner="eager", pipeline=passes_with(ReversesPost(1)), tolerance=1.0)
    assert found.finding is None


def test_refusals(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = chain()
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
        ("MHC525", hollow, (ids(),), {}),
        ("MHC526", chain(), (ids(),), {"reproducer": tmp_path / "nowhere" / "wrong.py"}),
        ("MHC204", chain(), (ids(),), {"stream": 2}),
        ("MHC209", chain(), (), {}),
        ("MHC101", nn.Linear(4, 4), (torch.ones(2, 4),), {}),
    ]
    for code, model, args, options in cases:
        with pytest.raises(MHCError) as caught:
            bisect(model, *args, inner="eager", **options)
        assert caught.value.code == code


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bisect") / "llama"
    llama().save_pretrained(path)
    return path


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--inner", "eager", "--streams", "2"]
    for model in (folder, folder / "config.json"):
        assert main(["bisect", str(model), *words, "--reproducer", str(tmp_path / "wrong.py")]) == 0
        assert "no difference found" in capsys.readouterr().out
    assert not (tmp_path / "wrong.py").exists()
    out = tmp_path / "converted"
    assert main(["convert", str(folder), str(out)]) == 0
    assert main(["bisect", str(out), "--inner", "eager"]) == 0


@needs_compiler
def test_the_command_finds_a_wrong_kernel(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.py"
    undo = planted_passes.plant_kernel()
    try:
        code = main(["bisect", str(folder), "--inner", "eager", "--kernels", "all", "--reproducer", str(path)])
    finally:
        undo()
    assert code == 1
    out = capsys.readouterr().out
    assert "kernels is wrong at site model.layers.0#1" in out
    assert f"reproducer: python {path}" in out
    assert path.is_file()


@pytest.mark.parametrize(
    ("words", "code"),
    [(["{folder}", "--kernels", "all,none"], "MHC204"),
     (["{folder}/nothing"], "MHC508"), (["{folder}", "--reproducer", "{folder}/nothing/x.py"], "MHC526")],
)  # fmt: skip
def test_the_command_refuses(words: list[str], code: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", *(word.format(folder=folder) for word in words)]) == (2 if code == "MHC204" else 3)
    assert capsys.readouterr().err.startswith(code)


def test_text_is_what_is_printed() -> None:
    found = bisect(chain(), ids(), inner="eager")
    assert isinstance(found, Bisection)
    assert str(found) == found.text()
    assert all(c.name in found.text() for c in found.checked)
