"""Let the tests of this folder import its modules by name, and start each with nothing compiled."""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from folders import converted, copied, original, saved, saved_copy  # noqa: F401  (fixtures)
from layout_folders import sources  # noqa: F401  (a fixture)

from mhc_compile.kernels.in_cpp import Cpp


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call wait for its kernels, as those with gradients do: some tests compare bits."""
    monkeypatch.setattr(Cpp, "_ready", staticmethod(lambda *_: True))
