"""AdamW that also trains tables: lazily, only the rows that a step has touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.registry import tables
from mhc_compile.memory.distributed import average_gradient
from mhc_compile.memory.gradient import RowGradient
from mhc_compile.memory.tables import MemoryTable

RATIO = 5.0
"""The tables' learning rate over the model's (arXiv 2601.07372)."""


def table_groups(model: nn.Module, lr: float, *, ratio: float = RATIO) -> list[dict[str, Any]]:
    """Optimizer groups for the trainable tables of `model`: `ratio` x `lr`, no weight decay. Empty without tables.

    Pass them to `TableAdamW` behind the groups of everything else (`mhc_compile.parameter_groups`).
    """
    held = [m.weight for m in model.modules() if isinstance(m, MemoryTable) and m.trainable]
    return [{"params": held, "lr": ratio * lr, "weight_decay": 0.0, "table": True}] if held else []


class TableAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose groups with `"table": True` hold weights of tables.

    A table's gradient is taken from `table.gradient`, and cleared. Only its rows change, and only their moments: a
    row that no token has hit keeps its value bit by bit, without decay. Each row counts its own steps, so its bias
    correction, and with it its first update, is that of a parameter which began when the row was first hit: a row
    that first appears after ten thousand steps moves by `lr`, as one of the first step does. With every row hit at
    every step this is Adam.

    Moments are float32 `[rows, width]`, made at a table's first step where its weight lies; the update is computed in
    float32 and rounded once for bfloat16 rows. DDP does not see tables: with a `process_group` (its own, or
    `torch.distributed.group.WORLD`) their gradients are averaged over it at each step; without, the processes' tables
    drift apart. Of a sharded table (`mhc_compile.memory.sharded`) a process steps its own rows, with the mean
    over the table's ranks, and `process_group` is that of the processes with the same rows. `lr`, `betas`, `eps` and
    `maximize` are those of the group. Raises MHC204 for `amsgrad` or a weight decay in a table group, MHC223 for
    parameters that are no table's weight there, and for weights of tables in other groups.
    """

    process_group: dist.ProcessGroup | None = None

    def __init__(
        self, params: Iterable[Any], *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, **kwargs)
        self.process_group = process_group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the tables' groups checked."""
        weights = {id(t.weight) for t in tables() if t.storage != "mapped"}
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        plain = [p[1] if isinstance(p, tuple) else p for p in given]
        is_table = [id(p) in weights for p in plain]
        group = {**param_group, "params": given}
        if not group.setdefault("table", False):
            if any(is_table):
                way_out = "put it into a group of mhc_compile.table_groups(model, lr)"
                raise MHCError("MHC223", "a table's weight in an ordinary group", way_out=way_out)
        elif not all(is_table):
            raise MHCError("MHC223", "a group of tables holds what is no table's weight")
        else:
            group.setdefault("weight_decay", 0.0)
            if group["weight_decay"] or group.get("amsgrad", self.defaults["amsgrad"]):
                raise MHCError("MHC204", "tables are trained without weight_decay and amsgrad")
        super().add_param_group(group)
        if group["table"]:
            known = _tables()
            for weight in self.param_groups[-1]["params"]:
                _of(weight, known).has_optimizer = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of everything that has a gradient."""
        dense: Any = torch.optim.AdamW.step
        # An AdamW made before has wrapped that function with the step hooks, which run around this one already.
        loss = (dense.__wrapped__ if getattr(dense, "hooked", False) else dense)(self, closure)
        known = _tables()
        for group in self.param_groups:
            if group.get("table"):
                for weight in group["params"]:
                    self._step_table(_of(weight, known), group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of the tables too."""
        super().zero_grad(set_to_none)
        known = _tables()
        for group in self.param_groups:
            if group.get("table"):
                for weight in group["params"]:
                    _of(weight, known).drop_gradient()

    def take_gradient(self, table: MemoryTable) -> RowGradient | None:
        """What a step is made with: the table's gradient, averaged over `process_group`, and cleared."""
        found = table.take_gradient()
        if self.process_group is not None:
            found = average_gradient(found, table.width, table.anchor.device, self.process_group)
        return found

    def _step_table(self, table: MemoryTable, group: dict[str, Any]) -> None:
        found = self.take_gradient(table)
        if found is None:
            return
        weight = table.weight
        state = self.state[weight]
        if not state:
            like: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros(weight.shape, **like)
            state["exp_avg_sq"] = torch.zeros(weight.shape, **like)
            state["row_step"] = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        state["step"] += 1
        rows, gradient = found.rows.to(weight.device), found.values.to(weight.device)
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        if group["maximize"]:
            gradient = -gradient
        steps = state["row_step"].index_select(0, rows).add_(1)
        first = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["row_step"].index_copy_(0, rows, steps)
        state["exp_avg"].index_copy_(0, rows, first)
        state["exp_avg_sq"].index_copy_(0, rows, second)
        count = steps.double()[:, None]
        size = (lr / (1 - beta1**count)).float()
        root = (1 - beta2**count).sqrt().float()
        values = weight.index_select(0, rows).float()
        values -= size * first / (second.sqrt().div_(root).add_(eps))
        weight.index_copy_(0, rows, values.to(weight.dtype))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what belongs to tables keeps its own dtypes instead of taking the weight's."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        of_tables = {id(p) for group in self.param_groups if group.get("table") for p in group["params"]}
        for number, p in zip(numbers, params, strict=True):
            if id(p) in of_tables and number in state_dict["state"]:
                held = state_dict["state"][number]
                self.state[p] = {k: v.to(v.device if k == "step" else p.device, copy=True) for k, v in held.items()}


def _tables() -> dict[int, MemoryTable]:
    return {id(t.weight): t for t in tables() if t.storage != "mapped"}


def _of(weight: Tensor, known: dict[int, MemoryTable]) -> MemoryTable:
    table = known.get(id(weight))
    if table is None:
        raise MHCError(
            "MHC223", "a table has another weight now", way_out="make the optimizer after the table is filled"
        )
    return table
