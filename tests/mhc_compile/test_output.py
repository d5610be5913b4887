"""`--json` and `--quiet` of the commands."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from pkgutil import resolve_name

import pytest
from tiny_models import llama

from mhc_compile.cli import COMMANDS, USAGE, main
from mhc_compile.output import Output

WITHOUT_RESULT = {"demo", "train"}
"""Their results are files."""


def test_every_command_has_them() -> None:
    for name, place in COMMANDS.items():
        parameters = inspect.signature(resolve_name(place)).parameters
        assert name in WITHOUT_RESULT or "output" in parameters, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("output") / "llama"
    llama().save_pretrained(path)
    return path


def test_a_result_on_the_standard_output_is_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "mhc"
    assert main(["convert", str(folder), str(out), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(out)
    assert main(["diff", str(folder), str(folder), "--b.streams", "2", "--no-run", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert found["sites"][0]["b"]["specification"].startswith("streams=2")
    assert main(["plan", "--budget", "26B", "--engram", "paper", "--hidden", "2560", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["0.2"]["Engram `paper`"]["budget"] == 26_000_000_000


def test_a_file_beside_the_text_and_nothing_when_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "back.json"
    out = folder.parent / "emitted"
    assert main(["emit", str(folder / "config.json"), "--out", str(out), "--json", str(file)]) == 0
    assert "lines" in capsys.readouterr().out
    assert json.loads(file.read_text()) == {"file": str(out / "modeling_mhc.py")}
    assert main(["bisect", str(folder), "--inner", "eager", "--quiet", "--json", str(file)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(file.read_text())["finding"] is None


def test_a_flag_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--quiet"]) == USAGE
    assert "--quiet is a" in capsys.readouterr().err


def test_text_that_is_json_already_is_kept(tmp_path: Path) -> None:
    Output(json=tmp_path / "a.json").write('{"a": 1}\n')
    assert (tmp_path / "a.json").read_text() == '{"a": 1}\n'
