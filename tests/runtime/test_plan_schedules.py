"""The simulator against closed forms, what every simulation must keep, and torch's own order of actions."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.plan.hardware import KNOWN, hardware
from mhc_compile.runtime.plan.schedules import Message, Schedule, Work, schedule
from mhc_compile.runtime.plan.simulate import Link, Simulated, StageCost, simulate
from mhc_compile.runtime.recipe import parse_recipe
from mhc_compile.runtime.recipe_tables import SCHEDULES, ScheduleName


def made(name: ScheduleName, ranks: int, microbatches: int, each: int = 2) -> Schedule:
    return schedule(name, ranks=ranks, stages_per_rank=1 if name == "1f1b" else each, microbatches=microbatches)


def equal(name: ScheduleName, ranks: int, microbatches: int, each: int = 2) -> Simulated:
    """Equal stages: a rank's forwards take 1 second a microbatch, each half of its backwards as long."""
    plan = made(name, ranks, microbatches, each)
    part = ranks / len(plan.owner)
    costs = [StageCost(forward=part, input=part, weight=part, kept=1, deferred=1)] * len(plan.owner)
    return simulate(plan, costs, Link())


def live_of_rank(found: Simulated, ranks: int) -> list[int]:
    """The most pairs of a stage and a microbatch that each rank keeps something of at a time."""
    steps = {"forward": 1, "input": 0, "weight": -1, "backward": -1}
    works = sorted(found.works, key=lambda timed: timed.begin)
    return [max(itertools.accumulate(steps[t.work.kind] for t in works if t.rank == rank)) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 2), (2, 7), (4, 4), (4, 16), (8, 64)])
def test_1f1b_has_the_known_bubble(ranks: int, microbatches: int) -> None:
    found = equal("1f1b", ranks, microbatches)
    assert found.seconds == pytest.approx(3 * (microbatches + ranks - 1))
    assert found.bubbles == pytest.approx([(ranks - 1) / (microbatches + ranks - 1)] * ranks)
    assert found.live == [min(microbatches, ranks - stage) for stage in range(ranks)]


@pytest.mark.parametrize(("ranks", "microbatches", "each"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 32, 4)])
def test_interleaving_divides_the_bubble(ranks: int, microbatches: int, each: int) -> None:
    """(P - 1) / (v*m + P - 1), arXiv 2104.04473, section 2.2; and its first rank's chunks in flight."""
    found = equal("interleaved1f1b", ranks, microbatches, each)
    assert found.bubbles == pytest.approx([(ranks - 1) / (each * microbatches + ranks - 1)] * ranks)
    assert live_of_rank(found, ranks) == [
        min((each - 1) * ranks + 2 * (ranks - r - 1) + 1, each * microbatches) for r in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 32), (8, 32)])
def test_schedules_with_split_backwards_have_less(ranks: int, microbatches: int) -> None:
    plain = equal("1f1b", ranks, microbatches)
    assert equal("zbv", ranks, microbatches).bubble < plain.bubble / 3
    assert equal("dualpipev", ranks, microbatches).bubble < plain.bubble / 2
    # Per rank in chunks: 2P for ZB-V as for 1F1B's first rank (arXiv 2401.10241), 2P + 1 for DualPipeV (2412.19437).
    assert live_of_rank(equal("zbv", ranks, microbatches), ranks) == [2 * ranks] * ranks
    assert live_of_rank(equal("dualpipev", ranks, microbatches), ranks) == [2 * ranks + 1] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_order_is_torch_s(name: ScheduleName, ranks: int) -> None:
    letters = {"forward": "F", "backward": "B", "input": "I", "weight": "W"}
    plan = made(name, ranks, 3 * ranks)
    each = len(plan.owner) // ranks
    theirs = get_schedule_ops({"zbv": "ZBVZeroBubble"}.get(name, name), ranks, 3 * ranks, each)
    # torch's display of 1F1B begins the last rank with the second microbatch; what it runs does not.
    for rank in range(ranks - (name == "1f1b")):
        flat = [a for action in theirs[rank] if action is not None for a in (action.sub_actions or (action,))]
        wanted = [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in flat]
        wanted = [w for w in wanted if w[1] in letters.values()]
        assert [(w.stage, letters[w.kind], w.microbatch) for w in works(plan, rank)] == wanted


def works(plan: Schedule, rank: int) -> list[Work]:
    return [work for action in plan.ranks[rank] if not isinstance(action, Message) for work in action]


costs = st.builds(
    StageCost,
    forward=st.floats(0.1, 5),
    input=st.floats(0.1, 5),
    weight=st.floats(0.0, 5),
    sent=st.integers(0, 100),
    kept=st.integers(0, 100),
    deferred=st.integers(0, 100),
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES), ranks=st.integers(1, 4), more=st.integers(0, 6), data=st.data(),
    latency=st.floats(0, 1), bandwidth=st.floats(1, 1e3),
)  # fmt: skip
def test_what_every_simulation_keeps(
    name: ScheduleName, ranks: int, more: int, data: st.DataObject, latency: float, bandwidth: float
) -> None:
    microbatches = 2 * ranks * (1 + more)
    plan = made(name, ranks, microbatches)
    held = data.draw(st.lists(costs, min_size=len(plan.owner), max_size=len(plan.owner)))
    link = Link(latency=latency, bandwidth=bandwidth)
    found = simulate(plan, held, link)
    done = {(t.work.kind, t.work.stage, t.work.microbatch): t for t in found.works}
    assert len(done) == len(found.works)
    for stage, cost in enumerate(held):
        for m in range(microbatches):
            first = done["forward", stage, m]
            last = done.get(("backward", stage, m)) or done["input", stage, m]
            assert last.begin >= first.end - 1e-9
            if ("weight", stage, m) in done:
                assert done["weight", stage, m].begin >= last.end - 1e-9
            if stage:
                apart = plan.owner[stage] != plan.owner[stage - 1]
                travel = latency + held[stage - 1].sent / bandwidth if apart else 0.0
                assert first.begin >= done["forward", stage - 1, m].end + travel - 1e-6
            assert cost.forward > 0
    # No rank does two things at once, and computes exactly its stages' passes.
    for rank in range(ranks):
        mine = sorted((t for t in found.works if t.rank == rank), key=lambda t: t.begin)
        assert all(a.end <= b.begin + 1e-9 for a, b in itertools.pairwise(mine))
        total = sum(
            microbatches * (c.forward + c.input + c.weight) for c, o in zip(held, plan.owner, strict=True) if o == rank
        )
        assert found.busy[rank] == pytest.approx(total)
    assert found.seconds >= max(found.busy) - 1e-6
    assert all(0 <= b <= 1 for b in found.bubbles)
    # Everything that crosses between ranks, forward and back, is sent once.
    crossing = [k for k in range(len(held) - 1) if plan.owner[k] != plan.owner[k + 1]]
    assert sum(found.sent) == 2 * microbatches * sum(held[k].sent for k in crossing)
    assert sum(found.messages) == 2 * microbatches * len(crossing)
    # A slower link never makes a step quicker.
    assert simulate(plan, held, Link()).seconds <= found.seconds + 1e-6


def test_numbers_that_no_schedule_takes_make_no_recipe() -> None:
    """Wherever torch's class rejects the numbers, a recipe has done so before."""
    for name, ranks, each, microbatches in itertools.product(SCHEDULES[1:], (1, 2, 3, 4), (1, 2, 3), range(1, 14)):
        content = {
            "model": {"folder": "model"}, "data": {"folder": "data", "sequence": 1},
            "train": {"steps": 1, "batch": microbatches, "microbatch": 1, "lr": 1.0},
            "parallel": {"schedule": name, "stages": ranks, "stages_per_rank": each},
            "checkpoint": {"folder": "run", "every": 0},
        }  # fmt: skip
        with suppress(MHCError):
            parse_recipe(content, Path())
            assert made(name, ranks, microbatches, each).owner


def test_hardware_by_name_and_by_rates() -> None:
    assert hardware("h100") is not None
    assert hardware("h100") == KNOWN["h100"]
    assert hardware("h100", memory=1e9).memory == 10**9
    assert hardware("h100", flops=1e12).rate("float32") == 1e12
    assert hardware(None, flops=1, bandwidth=2, link=3, memory=4).network == 3
    assert hardware("h100", network=2, node=4).between(3, 4, 1) == 2
    with pytest.raises(MHCError, match=r"MHC640.*nearest: h100"):
        hardware("h10")
    with pytest.raises(MHCError, match=r"MHC640.*--memory is missing"):
        hardware(None, flops=1, bandwidth=2, link=3)
    with pytest.raises(MHCError, match=r"MHC640.*above 0"):
        hardware("h100", link=-1)
