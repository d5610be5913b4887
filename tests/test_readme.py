"""The README's own code and commands, run in order in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"^```(python|sh)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]
# What other tests run: the installation and the tests are CI's own steps, `test_demo.py` runs the demo,
# `tests/mhc_compile/bench` the benchmarks, `tests/runtime` training.
ELSEWHERE = (
    "pip ",
    "pytest",
    "mhc-compile demo",
    "mhc-compile bench",
    "mhc-compile train",
    "mhc-compile plan examples/",
    "torchrun ",
    "python examples/",
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(256, 256)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256), nn.GELU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes))


def tokenizer() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={token: i for i, token in enumerate("_aAbBcCdD")}, merges=[], unk_token="_"))


# The tables of the README's memories are as large as they should be, the model here has two layers.
SMALLER = {
    "50_000": "50",
    "50000": "50",
    "layers=(1, 14)": "layers=(0, 1)",
    "--engram-layers 1,14": "--engram-layers 0,1",
}


def smaller(code: str) -> str:
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return code


def run_python(code: str) -> None:
    namespace = {
        "torch": torch,
        "mhc_compile": __import__("mhc_compile"),
        "model": llama(),
        "my_module": Residual(),
        "tokenizer": tokenizer(),
        "ids": torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0)),
    }
    # Snippets that go on from `model` mean a converted one.
    if "convert(" not in code and "from_pretrained" not in code and "first call" not in code:
        namespace["mhc_compile"].convert(namespace["model"], inner="eager")
    exec(compile(code, "README.md", "exec"), namespace)


def run_shell(commands: str) -> int:
    ran = 0
    for line in commands.replace("\\\n", "").splitlines():
        command = line.split("#")[0].strip()
        if not command or command.startswith(ELSEWHERE):
            continue
        words = shlex.split(command)
        program = [sys.executable, "-m", "mhc_compile.cli"] if words[0] == "mhc-compile" else [words[0]]
        done = subprocess.run(
            [*program, *words[1:]], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    return ran


def test_code_and_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("CKPT_DIR")
    torch._dynamo.reset()
    pythons = shells = 0
    tokenizer().save("CKPT_DIR/tokenizer.json")
    Path("TEXT_DIR").mkdir()
    Path("TEXT_DIR", "lines.jsonl").write_text("".join(f'{{"text": "aAbB {i:07b}"}}\n' for i in range(128)))
    for language, code in ((language, smaller(code)) for language, code in BLOCKS):
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_python(code)
            pythons += 1
        else:
            shells += run_shell(code)
    assert pythons >= 5
    assert shells >= 3


def test_every_option_of_the_table_exists() -> None:
    from mhc_compile.config import OPTION_FIELDS, STREAM_FIELDS

    table = set(re.findall(r"^\| `(\w+)` \|", README.split("## Options")[1].split("## How")[0], re.MULTILINE))
    assert table == OPTION_FIELDS | STREAM_FIELDS


def test_every_named_file_exists() -> None:
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:kernels|passes|mhc_compile|examples|tests)/[\w/.]+)`", README):
        assert (root / name).exists(), name
