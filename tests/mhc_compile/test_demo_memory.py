"""The demonstration's second part, without training: n-grams and their gates, the report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memories import with_memory
from rich.console import Console
from tiny_models import llama

from mhc_compile.demo import memory_report
from mhc_compile.demo.memory import LEAST_SEEN, CacheUse, MemoryOutcome, Opened, Repetition, opened
from mhc_compile.gates import gate_values
from mhc_compile.trial.training import Contender


class Words:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids.tolist()))


def test_ngrams_are_listed_with_the_mean_gate_at_their_last_token() -> None:
    model = with_memory(llama())
    windows = torch.randint(0, 3, (4, 40), generator=torch.Generator().manual_seed(0))
    found = opened(model, SimpleNamespace(tokenizer=Words()), windows)  # type: ignore[arg-type]
    for layer, gates in gate_values(model, {"input_ids": windows, "use_cache": False}).items():
        sums: dict[tuple[int, ...], list[float]] = {}
        for row, gate in zip(windows.tolist(), gates.mean(-1).tolist(), strict=True):
            for t in range(2, len(row)):
                sums.setdefault(tuple(row[t - 2 : t + 1]), []).append(gate[t])
        wanted = {" ".join(map(str, k)): (sum(v) / len(v), len(v)) for k, v in sums.items() if len(v) >= LEAST_SEEN}
        assert {o.text: (pytest.approx(o.gate, abs=1e-5), o.seen) for o in found[layer]} == wanted
        assert [o.gate for o in found[layer]] == sorted((o.gate for o in found[layer]), reverse=True)
        assert len({round(o.gate, 3) for o in found[layer]}) > 5


@pytest.fixture(scope="module")
def outcome() -> MemoryOutcome:
    model = with_memory(llama(), layers=(1,))

    def contender(name: str, seconds: float) -> Contender:
        program: Any = None
        return Contender(name, model, program, program, [1.0] * 6, [9.0, 9.0, *[seconds] * 4])

    runs = [
        Repetition(seed, ([3.0, 5.0], [3.0, 5.0]), ([2.0, 4.0], [2.0 - by, 4.0 - by]))
        for seed, by in ((0, 0.1), (1000, 0.3))
    ]  # fmt: skip
    gates = {"model.layers.1": [Opened(f"<{i}>", 1 - i / 100, 7) for i in range(30)]}
    return MemoryOutcome(
        runs, contender("without", 0.1), contender("with", 0.12), 500, 7000, gates, 0.0,
        [CacheUse("model.layers.1", 1600, 512, 0.25)],
    )  # fmt: skip


def test_numbers_are_over_seeds(outcome: MemoryOutcome) -> None:
    found = memory_report.numbers(outcome)
    assert found["difference"] == pytest.approx(
        {"mean": -0.2, "standard_deviation": 0.2 / 2**0.5, "low": -0.3, "high": -0.1}
    )
    assert [s["at_end"]["with"] for s in found["seeds"]] == pytest.approx([2.9, 2.7])
    assert found["relative_change_by_adding"] == 0
    assert found["seconds_ratio"]["median"] == pytest.approx(1.2)
    assert [row["text"] for row in found["gates"]["model.layers.1"]] == [f"<{i}>" for i in (*range(12), *range(26, 30))]


def test_what_is_printed(outcome: MemoryOutcome) -> None:
    text = " ".join(memory_report.text(outcome).split())
    for part in (
        "moved the held-out loss of no batch at all",
        "0.2000 lower with the memory (2 seeds, standard deviation 0.1414)",
        "7,000 parameters in rows, of which a token reads 64, and 500 others", "1.20 times as long", "'<0>'",
        "25% at model.layers.1 (at most 512 of 1,600)",
    ):  # fmt: skip
        assert part in text, part
    one = MemoryOutcome(**{**vars(outcome), "repetitions": outcome.repetitions[:1], "mapped_change": 1e-7})
    console = Console(width=120)
    with console.capture() as held:
        memory_report.show(one, console)
    assert "(one seed)" in held.get()
    assert "by more than 1e-07 of it" in " ".join(held.get().split())
