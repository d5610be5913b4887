"""The command line: what `mhc-compile convert` writes, prints and returns."""

from __future__ import annotations

import filecmp
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_models import llama, shake

import mhc_compile
from mhc_compile.cli import COMMANDS, app, main
from mhc_compile.commands.convert import convert


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "llama"
    llama().save_pretrained(folder, max_shard_size="30KB")
    return folder


def test_there_and_back(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(original), str(there), "--streams", "2", "--convention", "deepseek_v4"]) == 0
    out = capsys.readouterr().out
    assert "streams at 4 sites" in out
    (load,) = re.findall(r"mhc_compile\.from_pretrained\((.*)\)", out)
    assert load == f'"{there}"'
    model = mhc_compile.from_pretrained(there, inner="eager")
    spec = model.model.mhc.spec
    assert (spec.streams, spec.convention.value, spec.exit) == (2, "deepseek_v4", "head")
    assert main(["convert", str(there), str(back), "--to", "residual"]) == 0
    assert "residual again" in capsys.readouterr().out
    assert not filecmp.dircmp(original, back).diff_files
    assert {p.name for p in original.iterdir()} == {p.name for p in back.iterdir()}


def test_all_options_arrive(original: Path, tmp_path: Path) -> None:
    shape = ["--streams", "3", "--manifold", "permutations", "--iterations", "5"]
    assert (
        main(["convert", str(original), str(tmp_path / "out"), *shape, "--exit", "sum", "--convention", "liger"]) == 0
    )
    spec = mhc_compile.from_pretrained(tmp_path / "out", inner="eager").model.mhc.spec
    assert str(spec) == "streams=3 convention=liger manifold=permutations iterations=5 exit=sum"


def test_what_is_left_out_is_said(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (original / "pytorch_model.bin").write_bytes(b"x")
    try:
        assert main(["convert", str(original), str(tmp_path / "out")]) == 0
    finally:
        (original / "pytorch_model.bin").unlink()
    assert "left out: pytorch_model.bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{original}", "{out}", "--to", "residual"], "MHC410"),
        (["{original}", "{original}/out"], "MHC412"),
        (["{out}/nothing", "{out}"], "MHC401"),
        (["{trained}", "{out}", "--to", "residual"], "MHC411"),
    ],
)
def test_a_refusal_is_one_coded_message(
    words: list[str], code: str, original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "{trained}" in words:
        model = mhc_compile.convert(llama(), inner="eager")
        shake(model)
        model.save_pretrained(tmp_path / "trained")
    capfd.readouterr()
    places = {"original": original, "out": tmp_path / "out", "trained": tmp_path / "trained"}
    assert main(["convert", *(word.format(**places) for word in words)]) == 3
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(code)
    assert "fix: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert"], "CKPT_DIR"), (["convert", "a"], "OUT_DIR"), (["transmute"], "Unknown command"),
        (["trane"], "Did you mean"), (["convert", "a", "b", "--streams", "two"], "--streams"),
        (["convert", "a", "b", "--streams", "2", "--streams", "3"], "--streams"),
        (["convert", "a", "b", "--stream", "2"], "Did you mean --streams"),
        (["convert", "a", "b", "--strange"], "--strange"), (["convert", "a", "b", "--engram-l", "1"], "--engram-l"),
        (["inspect", "a", "--htm", "x"], "Did you mean --html"), (["train", "a", "--field"], "Did you mean --fields"),
        (["diff", "a", "b", "--b.stream", "2"], "--b.stream"),
    ],
)  # fmt: skip
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["convert", "{original}", "{out}", "--streams", "9"], "MHC201"),
        (["convert", "{original}", "{out}", "--iterations", "-1"], "MHC204"),
        (["convert", "{original}", "{out}", "--convention", "mine"], "MHC202"),
        (["convert", "{original}", "{out}", "--manifold", "kronecker", "--streams", "3"], "MHC203"),
        (["convert", "{original}", "{out}", "--engram-rows", "3"], "MHC220"),
        (["diff", "{original}", "{original}", "--b.streams", "9"], "MHC201"),
        (["diff", "{original}", "{original}", "--b.kernels", "bad"], "MHC204"),
    ],
)
def test_wrong_values_of_options(
    words: list[str], code: str, original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(original=original, out=tmp_path / "out") for word in words]) == 2
    assert capfd.readouterr().err.startswith(code)
    assert not (tmp_path / "out").exists()


def test_interrupted(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file that takes far longer to copy than the interruption takes to arrive.
    source = tmp_path / "source"
    source.mkdir()
    for path in original.iterdir():
        shutil.copy(path, source)
    with (source / "notes.txt").open("wb") as file:
        file.truncate(4 << 30)
    staging = tmp_path / ".out.mhc-partial"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (staging / "notes.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["convert", str(source), str(tmp_path / "out")]) == 130
    thread.join()
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["convert", "--help"]):
        assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"│ {name} " in text for name in COMMANDS)
    assert "Exit codes" in text
    for convention in mhc_compile.Convention:
        assert convention.value.replace("_", "-") in " ".join(text.replace("│", " ").split())


def test_the_examples_of_the_help_are_right(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-0.6B").symlink_to(original)
    text = [line.strip() for line in (convert.__doc__ or "").splitlines()]
    lines = [line for line in text if line.startswith("mhc-compile")]
    assert len(lines) == 8
    for i, line in enumerate(lines):
        words = shlex.split(line)
        if {"--engram", "--ultramem"} & set(words):  # gigabytes: see test_memory_folder.py, test_ultramem_folder.py
            continue
        if Path(words[3]).exists():
            Path(words[3]).rename(tmp_path / f"earlier-{i}")
        assert main(words[1:]) == 0
    code = [line for line in text if line.startswith("model")]
    exec("\n".join(code), {"mhc_compile": mhc_compile})
    assert (tmp_path / "trained" / "mhc.json").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: mhc-compile {name}")
    assert max(map(len, out.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mhc-compile {mhc_compile.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mhc_compile, mhc_compile.cli as cli; cli.main(['convert', '--help']); print(sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = run.stdout.splitlines()[-1]
    assert "'mhc_compile.cli'" in imported
    assert not [name for name in ("torch", "numpy", "sympy", "networkx", "transformers") if f"'{name}'" in imported]


def test_a_reader_that_has_read_enough() -> None:
    code = "from mhc_compile.cli import main; raise SystemExit(main(['train', '--schema']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = app().generate_completion(prog_name="mhc-compile", shell=shell)
    assert "over-encoding" in script
