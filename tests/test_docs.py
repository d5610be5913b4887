"""The code and commands of README.md and docs/*.md, run in order, a page a test in a folder of its own; the links, too.

Every Python block finds a `model` (a tiny Llama, converted unless the block converts it), the same one as `residual`
(not converted), `my_module` (a residual module of 256 channels), `ids`, a `tokenizer`, `torch` and `mhc_compile`, all
new, and whatever the page's blocks before it made. Commands find CKPT_DIR (that Llama and tokenizer, not converted),
TEXT_DIR (text to train on) and PAIRS_DIR (questions and answers).
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile import cli
from mhc_compile.diagnostics import TABLE
from mhc_compile.kernels.spec import FORM_GROUP

ROOT = Path(__file__).parent.parent
PROJECT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "RELEASING")]
PAGES = {p.name: p for p in [*PROJECT, *sorted((ROOT / "docs").glob("*.md"))]}
ELSEWHERE = {
    "pip ": ".ci/run",
    "ruff ": ".ci/run",
    "pytest": ".ci/run",
    "mkdocs ": "tests/test_site.py",
    "mhc-compile inspect meta-llama/": "tests/mhc_compile/test_hub.py",
    "mhc-compile convert meta-llama/": "tests/mhc_compile/test_hub.py",
    "mhc-compile demo": "tests/mhc_compile/test_demo.py",
    "mhc-compile trial": "tests/mhc_compile/test_trial.py",
    "mhc-compile bench": "tests/mhc_compile/test_bench.py",
    "mhc-compile doctor": "tests/mhc_compile/test_doctor.py",
    "mhc-compile train": "tests/runtime/test_command.py",
    "mhc-compile plan examples/": "tests/runtime/test_plan.py",
    "torchrun ": "tests/runtime/test_launch.py",
    "python examples/train/": "tests/runtime/test_train_examples.py",
    "python examples/s": "tests/test_claims.py",
    "python examples/payoff": "tests/test_claims.py",
    "python examples/": "tests/test_examples.py",
    "python tests/zoo/": "tests/zoo/test_zoo.py",
}
"""What other tests run, by how the command begins, and which."""
SLOW = {
    "mlir.md": "a whole model is lowered three times; mhc_compile/test_mlir.py lowers models",
    "diff.md": "models are compiled a dozen times; mhc_compile/test_diff.py runs the command",
    "quantise.md": "torch.onnx takes half a minute; mhc_compile/test_onnx.py exports a smaller model",
}
"""Pages that take longer than CI has time for, with the reason."""
# Settings are as large as they should be, the model here has two layers.
SMALLER = {
    "50_000": "50",
    "50000": "50",
    "layers=(1, 14)": "layers=(0, 1)",
    "--engram-layers 1,14": "--engram-layers 0,1",
}


@dataclass(frozen=True)
class Block:
    """One block of code: its language, text and first line."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


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


def smaller(code: str) -> str:
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return code


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    code = smaller(block.text)
    namespace |= {
        "torch": torch,
        "mhc_compile": mhc_compile,
        "CKPT_DIR": "CKPT_DIR",
        "model": llama(),
        "residual": llama(),
        "my_module": Residual(),
        "tokenizer": tokenizer(),
        "ids": torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0)),
    }
    # Snippets that go on from `model` mean a converted one.
    if "model" in code and not any(word in code for word in ("convert(", "from_pretrained", "first call")):
        mhc_compile.convert(namespace["model"], inner="eager")
    # Lines of tracebacks are the page's.
    exec(compile("\n" * (block.line - 1) + code, str(page), "exec", dont_inherit=True), namespace)


def commands(block: Block) -> list[tuple[str, int]]:
    """The block's commands without comments, and what each exits with: 0, unless its comment says so."""
    found = []
    for line in smaller(block.text).replace("\\\n", "").splitlines():
        if words := shlex.split(line, comments=True):
            code = re.search(r"# exits with (\d)", line)
            found.append((shlex.join(words), int(code[1]) if code else 0))
    return found


def run_command(command: str, code: int) -> None:
    words = shlex.split(command)
    if command.startswith(tuple(ELSEWHERE)):
        if words[0] == "mhc-compile":
            cli.app().parse_args(words[1:], exit_on_error=False)  # raises where there is no such option
        return
    if words[0] == "mhc-compile":
        assert cli.main(words[1:]) == code, command
        return
    words[0] = {"python": sys.executable}.get(words[0], words[0])
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands find, made once."""
    given = tmp_path_factory.mktemp("given")
    with chdir(given):
        llama().save_pretrained("CKPT_DIR")
        tokenizer().save("CKPT_DIR/tokenizer.json")
        Path("TEXT_DIR").mkdir()
        pairs = (f'{{"question": "aAbB {i}", "answer": "aA"}}\n' for i in range(64))
        Path("PAIRS_DIR").mkdir()
        Path("PAIRS_DIR", "pairs.jsonl").write_text("".join(pairs))
        Path("TEXT_DIR", "lines.jsonl").write_text("".join(f'{{"text": "aAbB {i:07b}"}}\n' for i in range(128)))
    return given


def _runs(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize(
    "name", [_runs(name) for name in PAGES if any(b.language in ("python", "sh") for b in blocks(PAGES[name]))]
)
def test_code_and_commands_run_in_order(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for given in folders.iterdir():
        shutil.copytree(given, given.name)
    torch._dynamo.reset()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(PAGES[name]):
        if block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_python(block, PAGES[name], namespace)
        elif block.language == "sh":
            for command, code in commands(block):
                run_command(command, code)


def test_pages_hold_code_that_is_run() -> None:
    every = [block for page in PAGES.values() for block in blocks(page)]
    assert {block.language for block in every} <= {"python", "sh", "text", "toml", "json", "mlir", "mermaid"}
    shells = [command for block in every if block.language == "sh" for command, _ in commands(block)]
    assert sum(block.language == "python" for block in every) >= 15
    assert sum(not command.startswith(tuple(ELSEWHERE)) for command in shells) >= 10


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def missing(text: str) -> list[str]:
    """Files of ours, dotted names and codes that `text` speaks of, and that do not exist."""
    files = re.findall(r"(?<![\w/.])((?:kernels|passes|mhc_compile|runtime|examples|tests)/[\w/.]*\w)", text)
    dotted = re.findall(r"\bmhc_compile(?:\.\w+)+", text)
    codes = re.findall(r"\bMHC\d{3}\b", text)
    return [
        *(name for name in files if not (ROOT / name).exists()),
        *(name for name in set(dotted) if name != FORM_GROUP and not resolves(name)),
        *(code for code in codes if code not in TABLE),
    ]


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_exists(name: str) -> None:
    assert missing(PAGES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room", ["kernels", "passes", "mhc_compile", "runtime"])
def test_what_docstrings_name_exists(room: str) -> None:
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / room).rglob("*.py")):  # rglob does not follow the links between the rooms
        text = path.read_text(encoding="utf-8")
        documented = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        docstrings = "\n".join(ast.get_docstring(node) or "" for node in documented)
        if names := missing("\n".join(re.findall(r"`([^`]+)`", docstrings))):
            found[str(path)] = names
    assert found == {}


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[split:])
    return False


@cache
def options_of(command: str) -> set[str]:
    """The options that a command's help names."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert cli.main([command, "--help"]) == 0
    return set(re.findall(r"--[\w-]+", shown.getvalue()))


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_sentences_exist(name: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[name].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for command, rest in re.findall(r"`mhc-compile ([a-z]+)([^`]*)`", prose):
        assert command in cli.COMMANDS, command
        assert set(re.findall(r"--[\w-]+", rest)) <= options_of(command), f"{command}{rest}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", PAGES["README.md"].read_text(encoding="utf-8")))
    linked |= {
        link
        for page in linked
        if page in PAGES
        for link in re.findall(r"\]\((\w+\.md)", PAGES[page].read_text(encoding="utf-8"))
    }
    assert set(PAGES) - {page.name for page in PROJECT} <= linked


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].read_text(encoding="utf-8").splitlines()) <= 150


def test_what_other_tests_run_is_there() -> None:
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def test_every_option_of_the_table_exists() -> None:
    from mhc_compile.config import OPTION_FIELDS, STREAM_FIELDS

    table = set(re.findall(r"^\| `(\w+)` \|", PAGES["options.md"].read_text(encoding="utf-8"), re.MULTILINE))
    assert table == OPTION_FIELDS | STREAM_FIELDS
