"""Gradients of tables over data-parallel processes: what DDP does for dense parameters, for a few rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mhc_compile.memory.gradient import RowGradient, merge


def average_gradient(
    found: RowGradient | None, width: int, device: torch.device, group: dist.ProcessGroup
) -> RowGradient | None:
    """The mean over the processes of `group`, the same bit by bit on all of them; None where no process has a gradient.

    A collective: every process calls it for the same tables in the same order, with None where its own batch left no
    gradient. `device` is the one that the group communicates on.
    """
    has = found is not None
    if found is None:
        found = RowGradient(torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, width, device=device))
    # Of a sharded table a process may have a gradient that touches none of its rows.
    count = torch.tensor([len(found.rows) if has else -1], device=device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    said = [int(c) for c in counts]
    if max(said) < 0:
        return None
    sizes = [max(n, 0) for n in said]
    rows = torch.zeros(max(sizes), dtype=torch.int64, device=device)
    values = torch.zeros(max(sizes), width, device=device)
    rows[: len(found.rows)], values[: len(found.rows)] = found.rows.to(device), found.values.to(device)
    all_rows = [torch.empty_like(rows) for _ in sizes]
    all_values = [torch.empty_like(values) for _ in sizes]
    dist.all_gather(all_rows, rows, group=group)
    dist.all_gather(all_values, values, group=group)
    total = merge([RowGradient(r[:n], v[:n]) for r, v, n in zip(all_rows, all_values, sizes, strict=True)])
    return RowGradient(total.rows, total.values / group.size())
