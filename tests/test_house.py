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
    """Return the modules that a file imports wherever in it, but for those whose types alone it names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    exempt = {inner for node in checking for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in exempt:
            names.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{a.name}" for a in node.names if node not in exempt)
    return {name for name in names if name.split(".")[0] in (*ROOMS, "tests")}


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


# Inside mhc_compile/: each line may import those above it, and nothing below or beside it. A folder is one unit, but
# for its command.py, which only `cli` imports. `(package)` is mhc_compile/__init__.py.
LAYERS = """
    codes
    diagnostics
    kernels frame rich_text atomic_write versions modes sharded tracing
    conventions passes
    config identity guard memory
    pipeline parameters
    checkpoint probes
    integrations
    carry capture
    owner measure
    attach loading gates
    backend configured
    conversion
    bisect
    exporting
    report
    diff demo
    bench
    (package) runtime
    doctor
    commands
    cli
    __main__
"""
LEVEL = {unit: level for level, line in enumerate(LAYERS.split("\n")) for unit in line.split()}


def module_name(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mhc_compile" else ("mhc_compile", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in EVERY}


def module_of(name: str) -> str:
    """Return the module that holds what `name` is imported as: itself or one around it."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


ARROWS = {module: {module_of(name) for name in imports(path)} - {module} for module, path in MODULES.items()}


def unit_of(module: str) -> str:
    """Return the name of a module in `LAYERS`."""
    parts = module.split(".")[1:]
    if parts[1:] == ["command"] and parts[0] != "runtime":
        return "commands"
    return parts[0] if parts else "(package)"


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
