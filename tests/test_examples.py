"""The programs in `examples/` run as a reader runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# `test_claims.py` runs those that take minutes, at their quick size.
LONG = ("payoff", "stability", "scaling")
QUICK = ("diffusion", "demo_checkpoint")
"""Those that are run at their quick size here."""
EXAMPLES = sorted(p for p in (Path(__file__).parent.parent / "examples").glob("*.py") if p.stem not in LONG)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_prints(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example), *["--quick"] * (example.stem in QUICK)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
