"""`mhc-compile data`, as a user types it."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data_folders import documents, make_tokenizer, tree, write_lines

from mhc_compile.cli import main
from mhc_compile.runtime.data.command import data
from mhc_compile.runtime.data.shards import open_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples of the help name."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "Qwen3-0.6B")
    (tmp_path / "books").mkdir()
    for i, text in enumerate(documents(300)):
        (tmp_path / "books" / f"{i}.txt").write_text(text)
    write_lines(tmp_path / "notes.jsonl", documents(5, seed=1))
    return tmp_path


def test_the_examples_of_the_help_are_right(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"content": documents(9)})}).save_to_disk("saved")
    capsys.readouterr()
    text = inspect.getdoc(data) or ""
    lines = [line for line in text.splitlines() if line.startswith("mhc-compile")]
    pairs = [json.dumps({"question": text, "answer": text}) for text in documents(9)]
    Path("pairs.jsonl").write_text("\n".join(pairs))
    assert len(lines) == 4
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    told = capsys.readouterr()
    assert f"{place / 'tokens'}: 305 documents" in told.out
    assert f'[data] folder = "{place}/tokens-split/train", validation = "{place}/tokens-split/validation"' in told.out
    assert "tokens/s" in told.out
    assert told.err == ""
    assert open_data("tokens").documents == 305
    assert open_data("tokens-split/train").documents > open_data("tokens-split/validation").documents > 0
    assert open_data("tokens-rows").documents == 9
    for name in {**tree(place / "tokens"), **tree(place / "tokens-pairs")}:
        assert name in text


def test_as_a_program(place: Path) -> None:
    (place / "books" / "picture").write_bytes(b"\x89PNG\0\0")
    words = ["data", "books", "out", "--tokenizer", "Qwen3-0.6B", "--workers", "2"]
    run = subprocess.run([sys.executable, "-m", "mhc_compile.cli", *words], capture_output=True, text=True,
                         env={**os.environ, "PYTHONSAFEPATH": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == f"left out, not text: {Path('books/picture')}\n"
    assert open_data("out").documents == 300


def test_refusals_have_codes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "nothing", "out", "--tokenizer", "Qwen3-0.6B"]) == 3
    assert capsys.readouterr().err.startswith("MHC610 ")
    assert main(["data", "books", "out", "--tokenizer", "books"]) == 3
    assert capsys.readouterr().err.startswith("MHC614 ")
    assert main(["data", "books", "books", "--tokenizer", "Qwen3-0.6B"]) == 3
    assert capsys.readouterr().err.startswith("MHC412 ")
    for wrong in (["--workers", "-1"], ["--validation", "1"], ["--validation", "x"]):
        assert main(["data", "books", "out", "--tokenizer", "Qwen3-0.6B", *wrong]) == 2
    assert main(["data", "books", "--tokenizer", "Qwen3-0.6B"]) == 2
    assert not (place / "out").exists()
