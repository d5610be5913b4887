"""Add pages that lie outside docs/ to the site, and rewrite their links: a hook of mkdocs.

The README is the front page. CONTRIBUTING, CHANGELOG and SECURITY, the pages of codes, and docs/tour.ipynb, which is
run, are pages as well. Every module of the table in docs/api.md, and each below it, has a page of the reference.
Links are written for a reader of the repository: those to pages lead to pages here; those to sources lead to the
repository if MHC_COMPILE_URL names it, and are plain text otherwise.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "RELEASING.md": "releasing.md",
    "docs/tour.ipynb": "tour.md",
    **{f"mhc_compile/codes/{path.name}": f"codes/{path.name}" for path in (ROOT / "mhc_compile/codes").glob("*.md")},
}
"""Files of the repository that are pages, and what the pages are called."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)")
FIGURE = re.compile(r"!\[[^\]]*\]\((images/concept-\w+\.svg)\)")
SOURCE = {page: file for file, page in PAGES.items()}


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the reference read a copy of the package in which every folder, and so `kernels`, has an `__init__.py`."""
    copy = Path(tempfile.mkdtemp()) / "mhc_compile"
    shutil.copytree(ROOT / "mhc_compile", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in copy.rglob("*/"):
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(copy.parent)]  # type: ignore[attr-defined]
    atexit.register(shutil.rmtree, copy.parent)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for file, page in PAGES.items():
        path = ROOT / file
        text = notebook(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for module in modules():
        files.append(File.generated(config, f"reference/{module}.md", content=reference(module)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn the links of a page, name the code pages' sections, and put the reference's pages under its table."""
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    source = Path(SOURCE.get(name, f"docs/{name}"))
    markdown = FIGURE.sub(lambda link: inside(ROOT / "docs" / link[1]), markdown)
    markdown = LINK.sub(lambda link: turned(link, source, name), markdown)
    if source.parent == Path():
        markdown = re.sub(r'((?:src|srcset)=")docs/', r"\1", markdown)
    if name.startswith("codes/"):
        markdown = markdown.replace("\nFix: ", "\n**Fix:** ")
    if name == "api.md":
        markdown = re.sub(r"^\| (`mhc_compile[^|]*)", lambda row: f"| {linked(row[1])}", markdown, flags=re.MULTILINE)
        markdown += "\n## Every module\n\n" + "\n".join(f"* [`{m}`](reference/{m}.md)" for m in modules()) + "\n"
    if name == "architecture.md":
        markdown = re.sub(
            r"^```mermaid\n(.*?)^```", lambda block: drawn(block[1]), markdown, flags=re.MULTILINE | re.DOTALL
        )
    return markdown


def inside(figure: Path) -> str:
    """Return the text of an SVG file for a page, whose light or dark it then has, in place of the system's."""
    return re.sub(r"<style>.*?</style>\n", "", figure.read_text(encoding="utf-8"))


def turned(link: re.Match[str], source: Path, name: str) -> str:
    """Return a link of the file `source`, which is the page `name`, as the site has it."""
    image, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if not path:
        return link[0]
    file = os.path.normpath(source.parent / path)
    there = PAGES.get(file) or (
        file.removeprefix("docs/") if file.startswith("docs/") and Path(file).suffix != ".py" else ""
    )
    if there:
        relative = os.path.relpath(there, Path(name).parent)
        return f"{image}[{text}]({relative}{'#' * bool(anchor)}{anchor})"
    url = os.environ.get("MHC_COMPILE_URL")
    return f"[{text}]({url}/blob/main/{file})" if url else text if text.startswith("`") else f"`{text}`"


@cache
def modules() -> list[str]:
    """Return the modules of the table in docs/api.md, and those below them, by name."""
    table = re.findall(r"^\| (`mhc_compile[^|]*)\|", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = {name for row in table for name in re.findall(r"`([\w.]+)`", row)}
    for name in found - {"mhc_compile"}:
        folder = ROOT / name.replace(".", "/")
        for path in folder.rglob("*.py") if folder.is_dir() else ():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found |= {".".join(parts)} if not any(part.startswith("_") for part in parts) else set()
    return sorted(found)


def reference(module: str) -> str:
    """Return the page of a module, with links to the modules in it."""
    below = [name for name in modules() if name.rpartition(".")[0] == module]
    return f"::: {module}\n\n" + "".join(f"* [`{name}`]({name}.md)\n" for name in below)


def linked(names: str) -> str:
    """Return names of modules in backquotes as links to their pages."""
    return re.sub(r"`([\w.]+)`", r"[`\1`](reference/\1.md)", names)


def notebook(path: Path) -> str:
    """Run a notebook and return it as Markdown with what its cells print; a cell that fails ends the build."""
    cells = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    kernel = AsyncKernelManager(transport="ipc", connection_file=f"{tempfile.mkdtemp()}/kernel")
    kernel.kernel_spec.argv[0] = sys.executable  # this interpreter, whatever kernels are installed
    # The launcher drops the first of sys.path, which is the current folder without PYTHONSAFEPATH.
    NotebookClient(cells, km=kernel, timeout=120).execute(
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    )
    return "\n\n".join(part for cell in cells.cells for part in cell_parts(cell))


def cell_parts(cell: Any) -> list[str]:
    """Return a cell's Markdown, or its code and the text that it printed."""
    if cell.cell_type == "markdown":
        return [cell.source]
    printed = [o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in cell.outputs]
    text = "".join(printed).rstrip()
    return [f"```python\n{cell.source}\n```", *([f"```text\n{text}\n```"] if text else [])]


def drawn(flowchart: str) -> str:
    """Return a Mermaid flowchart of boxes and arrows as an SVG in layers, for readers without Mermaid's script."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs_drawings", ROOT / "docs/drawings.py")
    assert spec is not None
    assert spec.loader is not None
    drawings = module_from_spec(spec)
    spec.loader.exec_module(drawings)
    arrows = re.findall(r"(\w+) --> (\w+)", flowchart)
    return f"\n{drawings.layers(arrows)}\n"
