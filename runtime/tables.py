"""Tables of memories in a distributed run: cut by rows over the ranks of a group, their look-ups begun early."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from mhc_compile.memory.parameters import tables
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable, Storage
from mhc_compile.runtime.stage import TableFactory, plain_table


def table_factory(group: dist.ProcessGroup | None) -> TableFactory:
    """Return the `make_table` of `build_stages`: sharded over `group`, or whole where that is one rank.

    All ranks of the group call it for the same tables in the same order. It raises MHC630 where they differ and MHC228
    for mapped tables.
    """
    if group is None or group.size() == 1:
        return plain_table

    def make(rows: int, width: int, dtype: torch.dtype, storage: str) -> MemoryTable:
        return ShardedTable(rows, width, group, dtype=dtype, storage=cast("Storage", storage), device="meta")

    return make


def look_up_early(model: nn.Module) -> None:
    """Let graphs that are captured from `model` from now on begin look-ups as soon as their rows are known.

    For tables on the compute device that will be sharded: rows are exchanged while the layers before the memory run.
    """
    for _, table in tables(model):
        table.early = True


def shard_tables(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace every table of `model` by one that is sharded over `group`, with this rank's rows of it.

    The rows of tables on the meta device are not set. A collective; make optimizers, and compile, afterwards. Raises
    MHC630 where the ranks' models differ, and MHC228 for mapped tables.
    """
    for path, table in list(tables(model)):
        shard = ShardedTable(
            table.rows,
            table.width,
            group,
            dtype=table.dtype,
            storage=table.storage,
            device=table.anchor.device,
            trainable=table.trainable,
            hot_rows=table.hot.capacity if table.hot else 0,
        )
        shard.ratio = table.ratio
        if table.storage != "mapped" and not table.weight.is_meta:
            shard.fill(shard.begin, *table.block(shard.begin, shard.end))
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, shard)
