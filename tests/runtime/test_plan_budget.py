"""`mhc-compile plan`: the published split, and sizes that add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.kernels.memory.ultramem import expand, retrieve
from mhc_compile.kernels.memory.ultramem_settings import UltraMem, UltraMemSettings
from mhc_compile.memory.parameters import ultramem_values
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


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_values_get_their_share(version: str) -> None:
    """The sizes, and the products that torch counts, are those of the layers themselves."""
    small = {"key_width": 8, "value_width": 16, "top": 4, "heads": 2}
    chosen = UltraMemSettings.preset(version, layers=(0, 1), skip=0, **small)
    found = allocate(4_000_000, chosen, share=0.5, hidden=64)
    assert found.memory == pytest.approx(2_000_000, rel=0.05)
    assert found.experts + found.memory == found.budget
    operands = ("query_gain", "keys", "key_gain", "cores")
    memory = UltraMem(settings=found.settings, hidden=64, layers=(("0", "0"), ("1", "1")))
    p, spec, x = ultramem_values(memory), memory.spec(0), torch.randn(10, 64)
    assert 2 * sum(t.numel() for t in p.values()) == found.dense
    with FlopCounterMode(display=False) as counter:
        rows, groups, scores = retrieve(x @ p["query"].T, *(p[name] for name in operands), spec)
        read = x @ p["input"].T if "input" in p else None
        expand(torch.zeros(10, rows.shape[1] * memory.width), groups, scores, read, spec) @ p["projection"].T
    # Coarse scores and sums of values are no products of matrices, which alone are counted.
    assert 0.8 * found.flops < 2 * counter.get_total_flops() / 10 <= found.flops
    assert found.row_traffic("bfloat16") == 2 * 2 * 2 * 4 * memory.width


def test_values_need_their_layers() -> None:
    with pytest.raises(MHCError, match=r"MHC220.*(?s:.)*--ultramem-layers"):
        allocate(10**9, UltraMemSettings.preset("v2"), share=0.2, hidden=64)
    with pytest.raises(MHCError, match=r"MHC220.*are the least"):
        allocate(100, UltraMemSettings.preset("v1"), share=0.2, hidden=64)


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
    assert main(["plan", "--budget", "26B", "--ultramem", "v2", "--ultramem-layers", "12"]) == 0
    split = capsys.readouterr().out
    assert "values a layer" in split
    assert "rows per head" in split
    assert main(["plan", "--budget", "26B", "--ultramem", "v1", "--share", "0.2", "--ultramem-share", "0.2"]) == 2
    assert "MHC220" in capsys.readouterr().err
    assert main(["plan", "--budget", "1e3", "--share", "0.5"]) == 2
    assert "MHC220" in capsys.readouterr().err
    assert main(["plan", "--budget", "many"]) == 2
