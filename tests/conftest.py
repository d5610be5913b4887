"""Give every test a seed made from its own name, one thread and little garbage collection; add the options that rewrite
golden files and record the stack."""

import gc
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from mhc_compile.versions import STACK, installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the golden files of the tests that run")
    parser.addoption("--record", type=Path, metavar="FILE", help="add the versions to FILE if every test passes")


def record(path: Path, tests: str, counts: Mapping[str, int]) -> None:
    """Add a row for this stack to `path`, in place of one of the same versions and tests."""
    row = {**installed(), "tests": tests, **counts}
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    key = [row.get(name) for name in (*STACK, "tests")]
    rows = [other for other in rows if [other.get(name) for name in (*STACK, "tests")] != key]
    rows.append(row)
    rows.sort(key=lambda r: ([Version(r[name]) for name in ("torch", "transformers", "python")], r["tests"]))
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


@pytest.fixture
def record_stack() -> Callable[[Path, str, Mapping[str, int]], None]:
    """Return the function behind `--record`."""
    return record


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Record what ran with what, in the process that collects the results of all: workers know only their own."""
    path = config.getoption("--record")
    if path is not None and exitstatus == 0 and not hasattr(config, "workerinput"):
        counts = {name: len(terminalreporter.getreports(name)) for name in ("passed", "skipped")}
        record(path, config.getoption("-m"), counts)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in slow.txt: variants of what CI runs or part of `compat`, most of over three CPU seconds each.

    The studies of docs/claims.md and the longest runs of `runtime` are there as well, though CI has no shorter form.
    """
    slow = set(Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Collect garbage more rarely, and never search what is imported: it took an eighth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
