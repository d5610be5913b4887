"""The pages of codes, which `mhc-compile explain` prints: their examples run, and give the code that they are about.

A `python` block finds `model` (a tiny Llama, not converted), `my_module` (a residual module of 256 channels), `ids`,
`nn`, `torch` and `mhc_compile`. Blocks and commands run in a folder with CKPT_DIR (that Llama and its tokenizer),
TEXT_DIR (text) and `recipe.toml`. A `text` block needs several processes, a full disk, another stack or a large model.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ids, llama
from tokenizers import Tokenizer, models
from torch import nn

import mhc_compile
from mhc_compile.cli import main
from mhc_compile.diagnostics import TABLE, MHCError, MHCWarning

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPE = """\
[model]
folder = "CKPT_DIR"
inner = "eager"
[mhc]
streams = 2
[data]
folder = "DATA_DIR"
sequence = 8
[train]
steps = 1
batch = 2
microbatch = 1
lr = 1e-3
[checkpoint]
folder = "run"
every = 1
"""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def blocks(code: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(TABLE[code].page) if language in languages]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    with chdir(folder):
        llama().save_pretrained("CKPT_DIR")
        tokens = {token: i for i, token in enumerate("_aAbBcCdD")}
        Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token="_")).save("CKPT_DIR/tokenizer.json")
        Path("CKPT_DIR", "tokenizer_config.json").write_text('{"eos_token": "_"}')
        Path("TEXT_DIR").mkdir()
        Path("TEXT_DIR", "lines.txt").write_text("aAbBcCdD\n" * 200)
        assert main(["data", "TEXT_DIR", "DATA_DIR", "--tokenizer", "CKPT_DIR"]) == 0
        Path("recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def place(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for path in given.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("example", None)


def run(text: str) -> None:
    """Run `text` as a module in a file of its own: Dynamo, `inspect` and `emit` read its lines."""
    Path("example.py").write_text(text)
    spec = spec_from_file_location("example", "example.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["example"] = module = module_from_spec(spec)
    names = {"nn": nn, "torch": torch, "mhc_compile": mhc_compile, "CKPT_DIR": "CKPT_DIR"}
    vars(module).update(names, model=llama(), my_module=Residual(), ids=ids())
    spec.loader.exec_module(module)


def chain_of(error: BaseException | None) -> Iterator[str]:
    """Codes of an error and of what it was raised from; Dynamo wraps errors of backends."""
    while error is not None:
        if isinstance(inner := getattr(error, "inner_exception", error), MHCError):
            yield inner.code
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("code", [code for code in TABLE if blocks(code, "python")])
def test_the_example_gives_its_code(code: str, place: Path) -> None:
    for text in blocks(code, "python"):
        raised: list[Any] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run(text)
            except Exception as error:
                raised += chain_of(error)
                if not raised:
                    raise
        raised += [w.message.code for w in caught if isinstance(w.message, MHCWarning)]
        assert code in raised


@pytest.mark.parametrize("code", [code for code in TABLE if blocks(code, "sh")])
def test_the_command_gives_its_code(code: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in "".join(blocks(code, "sh")).splitlines():
        command, *words = shlex.split(line, comments=True)
        assert command == "mhc-compile"
        assert main(words) in (2, 3)
        error = capfd.readouterr().err
        assert re.search(rf"^{code} ", error, re.MULTILINE), error
        assert error.endswith(f"more: mhc-compile explain {code}\n")


@pytest.mark.parametrize("code", TABLE)
def test_a_page_says_what_happened_and_how_to_fix_it(code: str) -> None:
    page = TABLE[code].page
    assert re.match(rf"## {code} \S", page)
    what = page.split("\n\n")[1]
    assert what.endswith((".", ".)")), what
    assert len(BLOCK.findall(page)) >= 1
    assert {language for language, _ in BLOCK.findall(page)} <= {"python", "sh", "text"}
    assert all(len(line) <= 88 for _, text in BLOCK.findall(page) for line in text.splitlines())
    assert page.rstrip().split("\n\n")[-1].startswith("Fix: ")


def test_explain_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "MHC207"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert "my_module.mhc = 1" in page
    assert " ".join(f"Fix: {TABLE['MHC207'].way_out}".split()) in " ".join(page.split())
    assert main(["explain", "mhc207", "--json", "-"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {
        "code": "MHC207",
        "title": TABLE["MHC207"].title,
        "fix": TABLE["MHC207"].way_out,
        "page": row["page"],
    }
    assert main(["explain"]) == 0
    assert set(re.findall(r"^MHC\d+", capsys.readouterr().out, re.MULTILINE)) == set(TABLE)
    assert main(["explain", "MHC2007"]) == 2
    assert re.search(r"did you mean MHC2\d\d\?", capsys.readouterr().err)


def test_explain_imports_nothing_heavy() -> None:
    code = "import sys, mhc_compile.cli as cli; cli.main(['explain', '101']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MHC101 no residual stream" in done.stdout
    assert not {"torch", "numpy", "mhc_compile.commands.convert"} & set(re.findall(r"'([\w.]+)'", done.stdout))
