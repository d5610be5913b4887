"""What is published: the sdist and the wheel that .ci/release.py builds, and the files that go with a release."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from mhc_compile.versions import VERSION

ROOT = Path(__file__).parent.parent
URL = "https://example.org/owner/name"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, ".ci/release.py", URL, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_one_value_makes_urls_and_absolute_links(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(name))
    assert f"Repository, {URL}" in (about.get_all("Project-URL") or [])
    links = [
        one or other for one, other in re.findall(r'\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', str(about.get_payload()))
    ]
    assert len(links) > 20
    assert all(link.startswith(("https://", "#")) for link in links)
    assert any(link.startswith(f"{URL}/raw/v{VERSION}/docs/images/") for link in links)


def test_an_unpacked_sdist_installs_and_its_tests_are_collected(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), "."]
    done = subprocess.run([sys.executable, *install], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/mhc_compile/passes/widen.py").is_file()
    assert (tmp_path / "site/mhc_compile/codes/graph.md").is_file()
    collect = ["-m", "pytest", "--collect-only", "-q", "tests/passes/test_pipeline.py", "tests/test_house.py"]
    done = subprocess.run([sys.executable, *collect], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ tests collected", done.stdout)


def test_every_file_has_this_version() -> None:
    for file, line in (("pyproject.toml", 'version = "{}"'), ("CITATION.cff", "version: {}")):
        assert line.format(VERSION) in (ROOT / file).read_text(encoding="utf-8").splitlines()
