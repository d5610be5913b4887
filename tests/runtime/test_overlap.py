"""Overlapped schedules on two ranks: torch's gradients bit by bit, and what happens beside what."""

import itertools
from typing import Any

import overlap_ranks
import pytest
import torch
from overlap_ranks import MICROBATCHES
from pipelines import gradients, ids, program_of, run, stages_of, tiny
from ranks import run_ranks
from torch import Tensor

from mhc_compile.config import Options

Ran = dict[str, Any]
CASES = list(itertools.product(overlap_ranks.SCHEDULES, ("torch", "in turn")))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Ran]]:
    """What both ranks saved of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, overlap_ranks.train, folder, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of the microbatches and gradients of the model that is not cut."""
    model = tiny()
    whole = stages_of(model, program_of(model), [], [0], Options(inner="eager", kernels="none"), split=False)
    batches = [t for seed in (1, 2) for t in ids(MICROBATCHES, seed).split(1)]
    losses = [run(whole, tokens) for tokens in batches]
    return losses, gradients(whole)


@pytest.mark.parametrize(("schedule", "how"), CASES)
def test_gradients(
    ranks: list[dict[str, Ran]], alone: tuple[list[Tensor], dict[str, Tensor]], schedule: str, how: str
) -> None:
    found, plain = ([rank[f"{schedule} {kind}"] for rank in ranks] for kind in (how, "torch"))
    for mine, its in zip(found, plain, strict=True):
        assert mine["gradients"].keys() == its["gradients"].keys()
        assert all(torch.equal(mine["gradients"][name], g) for name, g in its["gradients"].items())
    losses, expected = alone
    torch.testing.assert_close(found[0]["losses"], losses)
    together = found[0]["gradients"] | found[1]["gradients"]
    assert not found[0]["gradients"].keys() & found[1]["gradients"].keys()
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("schedule", overlap_ranks.SCHEDULES)
@pytest.mark.parametrize("how", ["torch", "in turn"])
def test_weights_are_computed_in_their_own_actions(ranks: list[dict[str, Ran]], schedule: str, how: str) -> None:
    for rank in ranks:
        events = rank[f"{schedule} {how}"]["events"]
        inside: list[str] = []
        apart = 0
        for event in events:
            if event[0] in "BW":
                inside = inside[:-1] if event.endswith("done") else [*inside, event]
            elif event.startswith("weights") and not event.endswith("done"):
                apart += inside[-1][0] == "W"
                assert inside[-1][1:] == event.removeprefix("weights")
        assert apart == sum(e[0] == "W" and not e.endswith("done") for e in events) > 0


@pytest.mark.parametrize("schedule", overlap_ranks.SCHEDULES)
def test_recomputation_begins_before_the_gradient_is_waited_for(ranks: list[dict[str, Ran]], schedule: str) -> None:
    """Stage 0 gets its gradients from the other rank: every backward of it follows a recomputation, then a wait."""
    events = [e for e in ranks[0][f"{schedule} in turn"]["events"] if e in ("R0", "R0 done", "B0") or "wait" in e]
    at = [i for i, e in enumerate(events) if e == "B0"]
    assert len(at) == MICROBATCHES
    assert events.count("R0") == MICROBATCHES
    for before, now in itertools.pairwise([-1, *at]):
        begun = events.index("R0", before + 1)
        assert begun < now
        assert "wait" in events[begun:now]
        assert events[now - 1] == "wait done"


def test_overlapped_forwards_run_while_gradients_are_on_their_way(ranks: list[dict[str, Ran]]) -> None:
    """In turn: recompute, forward, send, and only then wait for the gradient of the backward."""
    begun = {how: " ".join(begins(ranks[1][f"dualpipev {how}"]["events"])) for how in ("torch", "in turn")}
    assert "R2 wait F1 wait B2" in begun["in turn"]  # for the forward's input, and for the backward's gradient
    assert "F2 send2 B1" in begun["in turn"]
    assert "F2 B1 weights1 send2" in begun["torch"]


def begins(events: list[str]) -> list[str]:
    return [e for e in events if not e.endswith("done")]
