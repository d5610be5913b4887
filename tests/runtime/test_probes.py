"""Figures of streams that are cut into stages equal those of the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from probe_worker import BATCH, CASES, WORLD, difference, llama, memory, shaken, stages_of
from torch import nn

import mhc_compile
from mhc_compile.runtime.probes import stream_figures


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("starts", "units"), [([2, 3], "stage"), ([1], "blocks")])
def test_stages_of_one_rank(starts: list[int], units: str) -> None:
    model = llama()
    stages = stages_of(model, starts, list(range(len(starts) + 1)), units=units)
    found = stream_figures(stages, BATCH)
    assert difference(found, model) < 1e-12
    names = [f"model.layers.{layer}#{k}" for layer in range(3) for k in (0, 1)]
    assert list(found) == [
        *(f"separation/{name}" for name in names),
        *(f"gain/{name}" for name in names),
        *(f"composite_gain/{name}" for name in ("forward_mean", "forward_max", "backward_mean", "backward_max")),
    ]
    assert min(found[f"separation/{name}"] for name in names) > 1e-3, "the test's streams are apart"


def test_a_memory_between_the_sites() -> None:
    model = memory()
    assert difference(stream_figures(stages_of(model, [1, 4], [0, 1, 2]), BATCH), model) < 1e-12


@pytest.mark.slow
def test_two_streams_are_named_by_their_owners() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    model = shaken(mhc_compile.convert(T5ForConditionalGeneration(config), inner="eager"))
    batch = {**BATCH, "decoder_input_ids": BATCH["input_ids"][:, :4].contiguous()}
    found = stream_figures(stages_of(model, [2, 5], [0, 1, 2], batch), batch)
    assert difference(found, model, batch) < 1e-12
    assert {"composite_gain/encoder/forward_max", "composite_gain/decoder/forward_max"} <= set(found)


def test_measuring_changes_nothing() -> None:
    stages = stages_of(llama(), [3], [0, 1])
    before = {name: p.clone() for stage in stages for name, p in stage.named_parameters()}
    random = torch.get_rng_state()
    first = stream_figures(stages, BATCH)
    assert stream_figures(stages, BATCH) == first, "dropout is off"
    assert torch.equal(torch.get_rng_state(), random)
    assert all(stage.training for stage in stages)
    held: dict[str, nn.Parameter] = {name: p for stage in stages for name, p in stage.named_parameters()}
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in held.items())


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("probe_worker.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=300)
            found = {k: float(v) for k, v in (line.split(": ") for line in out.splitlines() if ": " in line)}
            assert list(found) == [case.__name__ for case in CASES], errors
            assert max(found.values()) < 1e-12, found
    finally:
        for rank in ranks:
            rank.kill()
