"""AdamW that also trains tables: lazily, only the rows that a step has touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.registry import tables
from mhc_compile.kernels.memory.row_gradients_cpp import adamw, takes
from mhc_compile.memory.gradient import RowGradient, merge
from mhc_compile.memory.tables import MemoryTable

RATIO = 5.0
"""The tables' learning rate over the model's (arXiv 2601.07372)."""


def table_groups(model: nn.Module, lr: float, *, ratio: float = RATIO, steps: int = 0) -> list[dict[str, Any]]:
    """Return the optimizer groups of the trainable tables of `model`: `ratio` x `lr`, no weight decay.

    Tables that are looked up by content have 4 x `lr` (arXiv 2411.12364), in a group of their own. With `steps`, the
    optimizer's steps of the whole training, `TableAdamW` lets it fall to `lr`, linearly, as published.

    Pass them to `TableAdamW` after the groups of everything else (`mhc_compile.parameter_groups`).
    """
    return groups_of((m for m in model.modules() if isinstance(m, MemoryTable)), lr, ratio=ratio, steps=steps)


def groups_of(
    tables: Iterable[MemoryTable], lr: float, *, ratio: float = RATIO, steps: int = 0
) -> list[dict[str, Any]]:
    """Return what `table_groups` returns. Raises MHC204 for `steps` below 0."""
    if steps < 0:
        raise MHCError("MHC204", f"steps={steps}", way_out="the optimizer's steps of the whole training; 0: no fall")
    groups: dict[float | None, dict[str, Any]] = {}
    for table in tables:
        if table.trainable:
            own = ratio if table.ratio is None else table.ratio
            new = {"params": [], "lr": own * lr, "weight_decay": 0.0, "table": True, "ratio": own}
            group = groups.setdefault(table.ratio, new | {"falls_over": 0 if table.ratio is None else steps})
            group["params"].append(table.weight)
    return list(groups.values())


class TableAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose groups with `"table": True` hold weights of tables.

    A table's gradient is taken from `table.gradient`, and cleared. Only its rows change, and only their moments: a
    row that no token has hit keeps its value bit by bit, without decay. Each row counts its own steps for the bias
    correction, so that a row which first appears after ten thousand steps moves by `lr`, as in the first step. With
    every row hit at every step this is Adam.

    Moments are float32 `[rows, width]`, made at a table's first step where its weight lies; the update is computed in
    float32 and rounded once for bfloat16 rows. In a group with `"falls_over": n` the learning rate falls from `lr` in a
    table's first step to `lr / ratio` in its step n + 1, whatever a schedule does to `lr` besides.

    DDP does not see tables: with a `process_group` (its own, or
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
        """Add a group as torch does, after checking groups of tables."""
        weights = {id(t.weight) for t in tables() if t.storage != "mapped"}
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        is_table = [id(p[1] if isinstance(p, tuple) else p) in weights for p in params]
        group = {"ratio": 1.0, "falls_over": 0, **param_group, "params": params}
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
        for table, of_table in self._tables():
            if of_table is self.param_groups[-1]:
                table.has_optimizer = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient."""
        dense: Any = torch.optim.AdamW.step
        # An AdamW made before has wrapped that function with the step hooks, which run around this one already.
        loss = (dense.__wrapped__ if getattr(dense, "hooked", False) else dense)(self, closure)
        for table, group in self._tables():
            self._step_table(table, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of the tables too."""
        super().zero_grad(set_to_none)
        for table, _ in self._tables():
            table.drop_gradient()

    def _tables(self) -> Iterator[tuple[MemoryTable, dict[str, Any]]]:
        """Yield the table of each weight in a group of tables, with its group."""
        by_weight = {id(t.weight): t for t in tables() if t.storage != "mapped"}
        for group in self.param_groups:
            for weight in group["params"] if group.get("table") else ():
                if id(weight) not in by_weight:
                    way_out = "make the optimizer after the table is filled"
                    raise MHCError("MHC223", "a table has another weight now", way_out=way_out)
                yield by_weight[id(weight)], group

    def take_gradient(self, table: MemoryTable) -> RowGradient | None:
        """Return the gradient of a step, averaged over `process_group`, and clear that of the table."""
        gradient = table.take_gradient()
        if self.process_group is None:
            return gradient
        return average_gradient(gradient, table.width, table.anchor.device, self.process_group)

    def table_state(self, weight: Tensor) -> dict[str, Any]:
        """Return the state of a table's weight, which is made if there is none yet."""
        state: dict[str, Any] = self.state[weight]
        if not state:
            like: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros(weight.shape, **like)
            state["exp_avg_sq"] = torch.zeros(weight.shape, **like)
            state["row_step"] = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return state

    def _step_table(self, table: MemoryTable, group: dict[str, Any]) -> None:
        taken = self.take_gradient(table)
        if taken is None:
            return
        weight = table.weight
        state = self.table_state(weight)
        state["step"] += 1
        rows, gradient = taken.rows.to(weight.device), taken.values.to(weight.device)
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        if group["falls_over"]:
            lr *= 1 - (1 - 1 / group["ratio"]) * min(1.0, float(state["step"] - 1) / group["falls_over"])
        if group["maximize"]:
            gradient = -gradient
        if takes(weight, gradient) and weight.is_contiguous():
            adamw(weight, state, rows, gradient, lr, (beta1, beta2), eps)
            # Whoever knows the rows by their version reads them again.
            torch.autograd.graph.increment_version(weight)
            return
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
        """Load the state as torch does, except that the state of tables keeps its own dtypes."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        of_tables = {id(p) for group in self.param_groups if group.get("table") for p in group["params"]}
        for number, p in zip(numbers, params, strict=True):
            if id(p) in of_tables and number in state_dict["state"]:
                state = state_dict["state"][number]
                self.state[p] = {k: v.to(v.device if k == "step" else p.device, copy=True) for k, v in state.items()}


def average_gradient(
    gradient: RowGradient | None, width: int, device: torch.device, group: dist.ProcessGroup
) -> RowGradient | None:
    """Return the mean over the processes of `group`, as `add_gradients` returns the sum."""
    total = add_gradients(gradient, width, device, group)
    return total and RowGradient(total.rows, total.values / group.size())


def add_gradients(
    gradient: RowGradient | None, width: int, device: torch.device, group: dist.ProcessGroup
) -> RowGradient | None:
    """Return the sum over the processes of `group`, bit-identical on all; None where no process has a gradient.

    A collective: every process calls it for the same tables in the same order, with None where its own batch left no
    gradient. `device` is the one that the group communicates on.
    """
    rows, values = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, width, device=device)
    if gradient is not None:
        rows, values = gradient.rows.to(device), gradient.values.to(device)
    # -1 for no gradient: with a sharded table, a gradient may have no rows on this rank.
    count = torch.tensor([-1 if gradient is None else len(rows)], device=device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    if max(map(int, counts)) < 0:
        return None
    sizes = [max(int(c), 0) for c in counts]
    padding = max(sizes) - len(rows)
    padded_rows, padded = F.pad(rows, (0, padding)), F.pad(values, (0, 0, 0, padding))
    all_rows, all_values = ([torch.empty_like(t) for _ in sizes] for t in (padded_rows, padded))
    dist.all_gather(all_rows, padded_rows, group=group)
    dist.all_gather(all_values, padded, group=group)
    return merge([RowGradient(r[:n], v[:n]) for r, v, n in zip(all_rows, all_values, sizes, strict=True)])
