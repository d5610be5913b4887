"""The rules of the house that a reader relies on: where things live, which way imports point, what every code needs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from mhc_compile.diagnostics import TABLE, MHCError

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("docs_architecture", ROOT / "docs" / "architecture.py")
assert _spec is not None
assert _spec.loader is not None
architecture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architecture)
ROOMS, MODULES, ARROWS = architecture.ROOMS, architecture.MODULES, architecture.ARROWS
imports, unit_of = architecture.imports, architecture.unit_of
EVERY = list(MODULES.values())


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
        if room != "runtime" and not path.name.startswith("torchtitan"):
            assert not name.startswith("mhc_compile.runtime"), f"{path} imports {name}"


# Inside mhc_compile/: each line may import those above it, and nothing below or beside it. A folder is one unit.
# `(package)` is mhc_compile/__init__.py.
LAYERS = """
    codes
    diagnostics progress
    kernels frame rich_text palette atomic_write versions modes sharded tracing
    conventions passes overrides output
    config identity guard memory
    pipeline parameters
    checkpoint probes
    integrations
    carry capture
    owner measure
    selection loading gates
    attach
    backend configured
    diffusion
    conversion
    emitting
    bisect
    exporting
    report
    diff trial
    demo
    bench
    (package) runtime
    torchtitan
    doctor
    commands
    cli
    __main__
"""
LEVEL = {unit: level for level, line in enumerate(LAYERS.split("\n")) for unit in line.split()}


def test_no_import_circle_of_files() -> None:
    # The first line that cannot be peeled off names the files of a circle and those that lead to one.
    left = dict(ARROWS)
    while free := [module for module, below in left.items() if not below & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_up_the_table_of_layers(module: str) -> None:
    unit = unit_of(module)
    assert unit in LEVEL, f"give {unit} a layer"
    for other in sorted(ARROWS[module]):
        above = unit_of(other)
        assert above == unit or LEVEL[above] < LEVEL[unit], f"{module} imports {other}"


def test_the_picture_is_of_these_imports() -> None:
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert architecture.updated(page) == page, "python docs/architecture.py"


def test_leaf_imports_nothing_of_ours() -> None:
    for path in (ROOT / "mhc_compile" / "diagnostics.py", *(ROOT / "mhc_compile" / "codes").glob("*.py")):
        assert all(name.startswith(CODES) for name in imports(path))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree), "what is this file for?"
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


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


def test_slow_tests_exist() -> None:
    for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines():
        file, name = line.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), line


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
    files |= {"CHANGELOG.md", "CITATION.cff", "RELEASING.md", "SECURITY.md", "MANIFEST.in", "mkdocs.yml"}
    files |= {".pre-commit-config.yaml"}
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
