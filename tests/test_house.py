"""The rules of the house that a reader relies on: where things live, which way imports point, what every code needs."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from mhc_compile.diagnostics import TABLE, MHCError

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "passes", "mhc_compile", "runtime")


def sources(room: str) -> list[Path]:
    """The room's own files, without those behind the symbolic links."""
    links = {ROOT / "mhc_compile" / name for name in ("kernels", "passes", "runtime")}
    return [p for p in sorted((ROOT / room).rglob("*.py")) if not links & set(p.parents)]


EVERY = [p for room in ROOMS for p in sources(room)]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{a.name}" for a in node.names)
    return {name for name in found if name.split(".")[0] in (*ROOMS, "tests")}


# The leaf that every room may import: it imports nothing of ours but the codes.
LEAF = "mhc_compile.diagnostics"
CODES = "mhc_compile.codes"
ALLOWED = {
    "kernels": (LEAF, "mhc_compile.kernels"),
    "passes": (LEAF, "mhc_compile.kernels", "mhc_compile.passes"),
    "mhc_compile": ("mhc_compile",),
    "runtime": ("mhc_compile",),
}


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        assert name.startswith(ALLOWED[room]), f"{path} imports {name}"
        if room != "runtime":
            assert not name.startswith("mhc_compile.runtime"), f"{path} imports {name}"


def test_leaf_imports_nothing_of_ours() -> None:
    for path in (ROOT / "mhc_compile" / "diagnostics.py", *sources("mhc_compile/codes")):
        assert all(name.startswith(CODES) for name in imports(path))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "what is this file for?"


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_others_may_use_is_documented(path: Path) -> None:
    bare = []
    for parent in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(parent, (ast.Module, ast.ClassDef)) or getattr(parent, "name", "").startswith("_"):
            continue
        for node in parent.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                bare.append(node.name)
    assert bare == []


def test_no_relative_imports_anywhere() -> None:
    for folder in (*ROOMS, "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            imports(path)


def test_kernels_is_no_package() -> None:
    # transformers imports whatever it finds under the name `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "passes", "runtime"):
        link = ROOT / "mhc_compile" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_top_level_holds_nothing_else() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {name.split("/")[0] for name in tracked if name}
    folders = {*ROOMS, "docs", "examples", "tests"}
    files = {"pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", ".gitignore", ".ci", ".github"}
    assert top == folders | files


def _all_text(*folders: str) -> str:
    return "\n".join(p.read_text(encoding="utf-8") for f in folders for p in sorted((ROOT / f).rglob("*.py")))


@pytest.mark.parametrize("code", TABLE)
def test_every_code_is_raised_and_tested(code: str) -> None:
    raised = "\n".join(p.read_text(encoding="utf-8") for p in EVERY if "codes" not in p.parts)
    assert re.search(rf'"{code}"', raised), "no code raises it"
    assert code in _all_text("tests").replace(f'"{code}": ', ""), "no test provokes it"


@pytest.mark.parametrize("code", TABLE)
def test_every_diagnostic_says_what_to_do(code: str) -> None:
    row = TABLE[code]
    assert row.title == row.title.strip(". ")
    assert len(row.way_out) > 15
    error = MHCError(code, "detail", node="%add", module="layers.0", source="file.py:1")
    for part in (code, row.title, "detail", "%add", "layers.0", "file.py:1", row.way_out):
        assert part in str(error)
