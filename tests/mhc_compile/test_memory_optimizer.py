"""Training tables: lazy Adam on the touched rows beside an ordinary AdamW, saved and resumed bit by bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.kernels.memory import row_gradients_cpp
from mhc_compile.memory.gradient import PATIENCE
from mhc_compile.memory.optimizer import TableAdamW, table_groups
from mhc_compile.memory.quantise import FP8
from mhc_compile.memory.tables import MemoryTable

ROWS, WIDTH = 30, 4


class Model(nn.Module):
    """A table in front of a layer."""

    def __init__(self, storage: str = "device", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = MemoryTable(ROWS, WIDTH, storage=storage, dtype=dtype).start(0, 1.0)
        self.out = nn.Linear(3 * WIDTH, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.table(rows).float())


def optimizer(model: Model, lr: float = 0.01, **options: Any) -> TableAdamW:
    dense = {"params": list(model.out.parameters())}
    return TableAdamW([dense, *table_groups(model, lr)], lr=lr, **options)


def step(model: Model, chosen: torch.optim.Optimizer, rows: Tensor) -> None:
    chosen.zero_grad()
    model(rows).square().sum().backward()
    chosen.step()


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize(("maximize", "in_cpp"), [(False, True), (True, True), (True, False)])
def test_it_is_adam_where_every_row_is_touched(
    storage: str, maximize: bool, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_gradients_cpp.build, "no_compiler", lambda: not in_cpp)
    model = Model(storage)
    weight = nn.Parameter(model.table.weight.detach().clone())
    out = copy.deepcopy(model.out)
    ours = optimizer(model, weight_decay=0.1, maximize=maximize)
    adam = torch.optim.Adam([weight], lr=0.05, maximize=maximize)
    dense = torch.optim.AdamW(out.parameters(), lr=0.01, weight_decay=0.1, maximize=maximize)
    for _ in range(20):
        rows = torch.stack([torch.randperm(ROWS) for _ in range(3)], 1)  # each row three times
        step(model, ours, rows)
        for o in (adam, dense):
            o.zero_grad()
        out(weight[rows].flatten(-2)).square().sum().backward()
        for o in (adam, dense):
            o.step()
        torch.testing.assert_close(model.table.weight.data, weight.data, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.out.weight, out.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [16, 37])
def test_rows_move_alike_with_and_without_a_compiler(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for in_cpp in (True, False):
        monkeypatch.setattr(row_gradients_cpp.build, "no_compiler", lambda in_cpp=in_cpp: not in_cpp)
        rng, table = torch.Generator().manual_seed(0), MemoryTable(3000, width).start(0, 1.0)
        chosen = TableAdamW([{"params": [table.weight], "lr": 0.1, "table": True}])
        for _ in range(5):
            before = table.weight.detach().clone()
            rows, version = torch.randint(0, 3000, (2000,), generator=rng), table.weight._version
            table.accumulate(rows, torch.randn(2000, width, generator=rng))
            chosen.step()
            assert table.weight._version > version, "look-ups that began before are not used"
            still = torch.ones(3000, dtype=torch.bool).index_fill(0, rows, False)
            assert torch.equal(table.weight[still], before[still])
        results.append([table.weight.detach(), *(chosen.state[table.weight][k] for k in ("exp_avg_sq", "row_step"))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_rate_that_falls_to_the_models() -> None:
    """From 4 x to once, on top of a schedule; afterwards it stays."""
    model = Model()
    model.table.ratio = 4.0
    weight = nn.Parameter(model.table.weight.detach().clone())
    ours = TableAdamW([{"params": list(model.out.parameters())}, *table_groups(model, 0.01, steps=6)], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1 / (step + 1))
    adam = torch.optim.Adam([weight], lr=1.0)
    for number in range(9):
        rows = torch.stack([torch.randperm(ROWS) for _ in range(3)], 1)
        adam.param_groups[0]["lr"] = 0.01 / (number + 1) * (4 - 3 * min(number, 6) / 6)
        adam.zero_grad()
        copy.deepcopy(model.out)(weight[rows].flatten(-2)).square().sum().backward()
        step(model, ours, rows)
        adam.step()
        schedule.step()
        torch.testing.assert_close(model.table.weight.data, weight.data, rtol=1e-5, atol=1e-6)
    with pytest.raises(MHCError, match=r"MHC204.*steps=-1"):
        table_groups(model, 0.01, steps=-1)


def test_rows_that_are_not_touched_stay() -> None:
    model = Model()
    chosen = optimizer(model, weight_decay=0.5)
    before = model.table.weight.detach().clone()
    for _ in range(5):
        step(model, chosen, torch.randint(0, ROWS // 2, (4, 3)))
    assert torch.equal(model.table.weight[ROWS // 2 :], before[ROWS // 2 :])
    assert not torch.equal(model.table.weight[: ROWS // 2], before[: ROWS // 2])
    state = chosen.state[model.table.weight]
    assert not state["exp_avg_sq"][ROWS // 2 :].any()
    assert not state["row_step"][ROWS // 2 :].any()


def test_a_row_that_comes_late_begins_like_the_first() -> None:
    model = Model()
    chosen = optimizer(model, lr=0.01)
    for _ in range(30):
        step(model, chosen, torch.tensor([[0, 1, 2]]))
    before = model.table.weight[7].detach().clone()
    step(model, chosen, torch.tensor([[7, 8, 9]]))
    moved = (model.table.weight[7] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-3, atol=0)  # 5 x lr, Adam's first step


def test_duplicates_in_a_batch_are_summed() -> None:
    found = []
    for rows in ([[0, 0, 1]], [[0, 1, 0]]):
        model = Model()
        model.out.weight.data.copy_(torch.ones(2, 3 * WIDTH))
        with torch.no_grad():
            model.table.fill(0, torch.ones(ROWS, WIDTH))
        model(torch.tensor(rows)).sum().backward()
        found.append(model.table.take_gradient())
    for gradient in found:
        assert gradient.rows.tolist() == [0, 1]
        assert gradient.values.tolist() == [[4.0] * WIDTH, [2.0] * WIDTH]


def test_backwards_are_accumulated() -> None:
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    first, second = optimizer(model), optimizer(other)
    rows = torch.randint(0, ROWS, (8, 3))
    model(rows).square().sum().backward()
    for part in rows.split(2):
        other(part).square().sum().backward()
    first.step()
    second.step()
    torch.testing.assert_close(model.table.weight, other.table.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["device", "host"])
def test_interrupted_and_resumed(dtype: torch.dtype, storage: str) -> None:
    batches = [torch.randint(0, ROWS, (6, 3)) for _ in range(12)]
    whole = Model(storage, dtype)
    start = copy.deepcopy(whole.state_dict())

    def schedule(o: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(o, 12)

    def run(model: Model, o: torch.optim.Optimizer, s: Any, part: list[Tensor]) -> None:
        for rows in part:
            step(model, o, rows)
            s.step()

    o = optimizer(whole)
    run(whole, o, schedule(o), batches)

    model = Model(storage, dtype)
    model.load_state_dict(start)
    o = optimizer(model)
    s = schedule(o)
    run(model, o, s, batches[:5])
    saved = io.BytesIO()
    torch.save([model.state_dict(), o.state_dict(), s.state_dict()], saved)
    saved.seek(0)
    held = torch.load(saved)  # weights only: the state is tensors and numbers
    resumed = Model(storage, dtype)
    resumed.load_state_dict(held[0])
    o = optimizer(resumed)
    s = schedule(o)
    o.load_state_dict(held[1])
    s.load_state_dict(held[2])
    state = o.state[resumed.table.weight]
    assert {k: v.dtype for k, v in state.items()} == {
        "step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "row_step": torch.int32,
    }  # fmt: skip
    run(resumed, o, s, batches[5:])
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
    # What was loaded is a copy.
    assert not torch.equal(held[1]["state"][2]["exp_avg"], state["exp_avg"])


def test_the_rate_of_the_tables() -> None:
    model = Model()
    chosen = optimizer(model, lr=0.01)
    assert [g["lr"] for g in chosen.param_groups] == [0.01, 0.05]
    assert chosen.param_groups[1]["weight_decay"] == 0.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda n: 0.5**n)
    step(model, chosen, torch.tensor([[0, 1, 2]]))
    scheduler.step()
    assert [g["lr"] for g in chosen.param_groups] == [0.005, 0.025]
    model.table.trainable = False
    assert table_groups(model, 0.01) == []
    assert table_groups(nn.Linear(2, 2), 0.01) == []


def test_zero_grad_clears_tables() -> None:
    model = Model()
    chosen = optimizer(model)
    model(torch.tensor([[0, 1, 2]])).sum().backward()
    assert model.table.gradient is not None
    chosen.zero_grad()
    assert model.table.gradient is None
    assert model.table.anchor.grad is None
    before = model.table.weight.detach().clone()
    chosen.step()
    assert torch.equal(model.table.weight, before)


def test_closures_and_hooks_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # wraps AdamW.step with the hooks
    model = Model()
    chosen = optimizer(model)
    calls = []
    chosen.register_step_pre_hook(lambda *_: calls.append("pre"))
    chosen.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        chosen.zero_grad()
        loss = model(torch.tensor([[0, 1, 2]])).square().sum()
        loss.backward()
        return loss

    before = model.table.weight.detach().clone()
    assert chosen.step(closure).item() > 0
    assert calls == ["pre", "closure", "post"]
    assert not torch.equal(model.table.weight, before)


def test_groups_that_are_refused() -> None:
    model = Model()
    with pytest.raises(MHCError, match="MHC223"):
        TableAdamW(model.parameters())
    with pytest.raises(MHCError, match="MHC223"):
        TableAdamW([{"params": list(model.out.parameters()), "table": True}])
    for wrong in ({"weight_decay": 0.1}, {"amsgrad": True}):
        with pytest.raises(MHCError, match="MHC204"):
            TableAdamW([{"params": [model.table.weight], "table": True, **wrong}])
    group = {"params": model.table.weight, "table": True}
    assert TableAdamW([group]).param_groups[0]["weight_decay"] == 0.0


def test_a_table_whose_weight_was_replaced() -> None:
    model = Model()
    chosen = optimizer(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(MHCError, match="MHC223"):
        chosen.step()


def test_a_table_without_an_optimizer() -> None:
    model = Model()
    chosen = torch.optim.AdamW(model.out.parameters())
    losses = [model(torch.tensor([[0, 1, 2]])).sum() for _ in range(PATIENCE)]
    with pytest.warns(MHCWarning, match="MHC227"):
        torch.autograd.backward(losses)
    chosen.step()


def test_tables_for_inference_have_no_group() -> None:
    assert table_groups(nn.Sequential(MemoryTable(ROWS, WIDTH, dtype=FP8)), 0.1) == []


def test_training_learns() -> None:
    model = Model("host")
    chosen = optimizer(model, lr=0.02)
    rows, wanted = torch.randint(0, ROWS, (16, 3)), torch.randn(16, 2)
    losses = []
    for _ in range(150):
        chosen.zero_grad()
        loss = (model(rows) - wanted).square().mean()
        loss.backward()
        chosen.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# Two processes with batches of their own, one of them without rows in the second step, against one with both.
RANK = """
import sys
import torch, torch.distributed as dist
from torch import nn
from mhc_compile.memory.optimizer import TableAdamW, table_groups
from mhc_compile.memory.tables import MemoryTable

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def trained():
    model = nn.ModuleList([MemoryTable(30, 4).start(0, 1.0)])
    chosen = TableAdamW(table_groups(model, 0.01), process_group=dist.group.WORLD)
    for step in range(4):
        rows = torch.randint(0, 30, (2, 6, 3), generator=torch.Generator().manual_seed(step))
        if not (rank and step == 1):
            model[0](rows[rank]).square().sum().backward()
        chosen.step()
    return model[0].weight.detach()


# In a function: a group that an optimizer still holds keeps its threads when it is destroyed, until Python has ended.
torch.save(trained(), out)
dist.destroy_process_group()
"""


def test_processes_train_one_table(tmp_path: Path) -> None:
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(n), str(tmp_path / "store"), str(out)])
        for n, out in enumerate(outs)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = [torch.load(out) for out in outs]
    assert torch.equal(*found)
    table = MemoryTable(ROWS, WIDTH).start(0, 1.0)
    chosen = TableAdamW(table_groups(table, 0.01))
    for number in range(4):
        rows = torch.randint(0, ROWS, (2, 6, 3), generator=torch.Generator().manual_seed(number))
        (table(rows[:1] if number == 1 else rows).square().sum() / 2).backward()
        chosen.step()
    torch.testing.assert_close(found[0], table.weight.data, rtol=1e-4, atol=1e-5)
