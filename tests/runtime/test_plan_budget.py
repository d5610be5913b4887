"""`mhc-compile plan`: the published split, and sizes that add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.runtime.plan.allocation import allocate


def test_the_paper_s_table_costs_what_the_paper_says() -> None:
    """Engram-27B: 2,262,400 rows a head at width 80 and two layers are its 5.7B parameters of memory."""
    preset = MemorySettings.preset("paper")
    found = allocate(26_000_000_000, preset, share=0.2228, hidden=2560, streams=4)
    assert found.memory == pytest.approx(5.79e9, rel=2e-3)
    assert found.settings.rows_per_head == pytest.approx(preset.rows_per_head, rel=2e-3)
    assert found.experts + found.memory == found.budget


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), st.integers(10**9, 10**12), st.floats(0.05, 0.9), st.integers(1, 4))
def test_the_memory_gets_its_share(preset: str, budget: int, share: float, layers: int) -> None:
    chosen = MemorySettings.preset(preset, layers=tuple(range(layers)))
    found = allocate(budget, chosen, share=share, hidden=512, streams=4)
    assert len(found.rows) == layers
    # Every head takes the next prime, not the number itself.
    assert found.memory / budget == pytest.approx(share, rel=0.02)
    assert found.table_bytes("bfloat16") == 2 * found.memory
    assert found.table_bytes("float32") > found.table_bytes("float8_e4m3fn") > found.memory


def test_projections_are_counted() -> None:
    chosen = MemorySettings.preset("v41", layers=(0,), rows_per_head=100, row_width=2)
    found = allocate(10**6, chosen, share=0.5, hidden=8, streams=2)
    width = 3 * 8 * 2
    assert found.dense == 2 * 8 * width + 8 * width + 2 * 2 * 8


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(MHCError, match="MHC220"):
        allocate(10**9, MemorySettings.preset("paper"), share=share, hidden=64, streams=4)


def test_a_budget_that_pays_for_no_table() -> None:
    with pytest.raises(MHCError, match=r"MHC220.*are the least"):
        allocate(1000, MemorySettings.preset("paper"), share=0.2, hidden=64, streams=4)


def test_the_command_prints_both_ends_of_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--budget", "26B", "--engram", "paper", "--hidden", "2560"]) == 0
    out = capsys.readouterr().out
    assert "20% memory" in out
    assert "25% memory" in out
    assert "rows per head" in out
    assert main(["plan", "--budget", "1e3", "--share", "0.5"]) == 2
    assert "MHC220" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--budget", "many"])
