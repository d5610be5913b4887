"""The command line: what `mhc-compile convert` writes, prints and returns."""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from tiny_models import llama, shake

import mhc_compile
from mhc_compile.cli import COMMANDS, main
from mhc_compile.conversion import command


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
    assert main(["convert", *(word.format(**places) for word in words)]) == 1
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(code)
    assert "fix: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [[], ["convert"], ["convert", "a"], ["transmute"], ["convert", "a", "b", "--streams", "two"],
     ["convert", "a", "b", "--convention", "mine"], ["convert", "a", "b", "--stream", "2"],
     ["convert", "a", "b", "--strange"], ["convert", "a", "b", "--engram-l", "1"], ["inspect", "a", "--htm", "x"],
     ["train", "a", "--field"]],
)  # fmt: skip
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: mhc-compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["convert", "{original}", "{out}", "--streams", "9"], "MHC201"),
        (["convert", "{original}", "{out}", "--iterations", "-1"], "MHC204"),
        (["convert", "{original}", "{out}", "--manifold", "kronecker", "--streams", "3"], "MHC203"),
        (["convert", "{original}", "{out}", "--engram-rows", "3"], "MHC220"),
        (["diff", "{original}", "{original}", "--b", "streams=9"], "MHC201"),
        (["diff", "{original}", "{original}", "--b", "manifold=bad"], "MHC203"),
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
    for words in (["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert "exit codes" in text
    for convention in mhc_compile.Convention:
        assert convention.value in text


def test_the_examples_of_the_help_are_right(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-0.6B").symlink_to(original)
    lines = [ln.strip() for ln in command._EXAMPLES.splitlines() if ln.strip().startswith("mhc-compile")]
    assert len(lines) == 8
    for i, line in enumerate(lines):
        words = shlex.split(line)
        if {"--engram", "--ultramem"} & set(words):  # gigabytes: see test_memory_folder.py, test_ultramem_folder.py
            continue
        if Path(words[3]).exists():
            Path(words[3]).rename(tmp_path / f"earlier-{i}")
        assert main(words[1:]) == 0
    code = [ln.strip() for ln in command._EXAMPLES.splitlines() if ln.strip().startswith("model")]
    exec("\n".join(code), {"mhc_compile": mhc_compile})
    assert (tmp_path / "trained" / "mhc.json").is_file()


def test_every_command_has_its_two_functions() -> None:
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_parser(parser.add_subparsers())
        assert name in parser.format_help()
        assert callable(module.run)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mhc-compile {mhc_compile.__version__}\n"
