"""Draw the house from its imports and put the picture into docs/architecture.md.

Run: python docs/architecture.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "passes", "mhc_compile", "runtime")
PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- picture: begin -->", "<!-- picture: end -->"


def sources(room: str) -> list[Path]:
    """Return the room's own files, without those behind the symbolic links."""
    links = {ROOT / "mhc_compile" / name for name in ("kernels", "passes", "runtime")}
    return [p for p in sorted((ROOT / room).rglob("*.py")) if not links & set(p.parents)]


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere in it, except under `TYPE_CHECKING`."""
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


def module_name(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mhc_compile" else ("mhc_compile", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for room in ROOMS for path in sources(room)}


def module_of(name: str) -> str:
    """Return the module that holds what `name` is imported as: itself or one around it."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


ARROWS = {module: {module_of(name) for name in imports(path)} - {module} for module, path in MODULES.items()}
"""Imports between our modules: for each module the modules that it imports."""


def unit_of(module: str) -> str:
    """Return the folder or file directly below the package that holds a module; the engine above the runtime is one."""
    parts = module.split(".")[1:]
    if parts[0:1] == ["integrations"] and parts[-1].startswith("torchtitan"):
        return "torchtitan"
    return parts[0] if parts else "(package)"


def picture(units: Iterable[tuple[str, str]]) -> str:
    """Return a Mermaid flowchart of arrows between units, without those that others imply."""
    graph = nx.DiGraph(sorted({(a, b) for a, b in units if a != b}))
    reduced = nx.transitive_reduction(graph)
    folders = {unit for unit in graph if (ROOT / "mhc_compile" / unit).is_dir()}
    lines = [f"    {unit}[{unit}/]" if unit in folders else f"    {unit}({unit})" for unit in sorted(graph)]
    return "\n".join(["flowchart BT", *lines, *(f"    {a} --> {b}" for a, b in sorted(reduced.edges))])


def house() -> str:
    """Return the picture of all units but the package itself and what starts it."""
    arrows = [(unit_of(module), unit_of(other)) for module, below in ARROWS.items() for other in below]
    return picture((a, b) for a, b in arrows if not {a, b} & {"(package)", "__main__"})


def updated(page: str) -> str:
    """Return the text of the page with the picture between its marks."""
    assert page.count(BEGIN) == page.count(END) == 1
    block = f"{BEGIN}\n```mermaid\n{house()}\n```\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
