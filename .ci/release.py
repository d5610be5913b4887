"""Build what is published, from a copy of the committed files: `python .ci/release.py [URL] [--out DIR]`.

URL is the address of the repository, the one value that it does not know itself. It becomes `[project.urls]` and
`repository-code`, and makes the README's links absolute, as PyPI shows the README without the files beside it. Without
it links stay as they are. The sdist and the wheel pass `twine check --strict` and must hold what is promised.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IN_SDIST = (
    "tests/conftest.py",
    "docs/choose.md",
    "passes/widen.py",
    "mhc_compile/passes/widen.py",
    "CHANGELOG.md",
    "mkdocs.yml",
)
IN_WHEEL = (
    "mhc_compile/codes/graph.md",
    "mhc_compile/tested.json",
    "mhc_compile/kernels/forms.py",
    "mhc_compile/py.typed",
)


def absolute(markdown: str, url: str, tag: str) -> str:
    """Return Markdown whose relative links lead to the repository at `url`: pictures raw, other files as pages."""

    def turn(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({url}/{kind}/{tag}/{link[3]})"

    markdown = re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", turn, markdown)
    return re.sub(r'((?:src|srcset)=")(?!https?:)', rf"\g<1>{url}/raw/{tag}/", markdown)


def urls(url: str, tag: str) -> str:
    """Return the table of pyproject.toml."""
    rows = {"Repository": url, "Issues": f"{url}/issues", "Changelog": f"{url}/blob/{tag}/CHANGELOG.md"}
    return "\n[project.urls]\n" + "".join(f'{name} = "{value}"\n' for name, value in rows.items())


def address(folder: Path, url: str) -> None:
    """Write the address into the files of a copy."""
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    assert version is not None
    tag = f"v{version[1]}"
    project.write_text(text.replace("\n[project.scripts]", f"{urls(url, tag)}\n[project.scripts]"), encoding="utf-8")
    readme, citation = folder / "README.md", folder / "CITATION.cff"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), url, tag), encoding="utf-8")
    citation.write_text(f'{citation.read_text(encoding="utf-8")}repository-code: "{url}"\n', encoding="utf-8")


def build(url: str | None, out: Path) -> tuple[Path, Path]:
    """Build and check the sdist and the wheel; return their paths."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        if url:
            address(Path(folder), url.rstrip("/"))
        subprocess.run([sys.executable, "-m", "build", "-o", str(out.resolve()), folder], check=True)
    sdist, wheel = max(out.glob("*.tar.gz"), key=_age), max(out.glob("*.whl"), key=_age)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], check=True)
    with tarfile.open(sdist) as archive_file:
        names = {name.partition("/")[2] for name in archive_file.getnames()}
    missing = [name for name in IN_SDIST if name not in names]
    with zipfile.ZipFile(wheel) as wheel_file:
        names = set(wheel_file.namelist())
    missing += [name for name in IN_WHEEL if name not in names]
    missing += [name for name in names if not name.startswith(("mhc_compile/", "mhc_compile-"))]
    if missing:
        raise SystemExit(f"missing, or too much: {', '.join(missing)}")
    return sdist, wheel


def _age(path: Path) -> float:
    return path.stat().st_mtime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", help="address of the repository, https://HOST/OWNER/NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    print(*build(arguments.url, arguments.out), sep="\n")
