"""What every test gets: a seed made from its own name and one thread. And the option that rewrites golden files."""

import zlib
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the golden files of the tests that run")


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
