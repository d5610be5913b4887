"""One of four ranks that share tables: in groups of 2 and 3, and two of 2 inside two of 2. Runs every check, and writes
what it found for the test to compare.

    python memory_sharded_worker.py RANK STORE OUT FOLDER

FOLDER holds a table `table` of files. What is expected is computed here by tables in one piece, which every rank has.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.checkpoint.table_files import fill_rows
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.memory.gradient import RowGradient, merge
from mhc_compile.memory.optimizer import TableAdamW, table_groups
from mhc_compile.memory.prefetch import desk
from mhc_compile.memory.quantise import FP8
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import START_BLOCK, MemoryTable
from mhc_compile.runtime.tables import look_up_early, shard_tables, table_factory

ops = torch.ops.engram_kernels
WIDTH, HEADS = 6, 3
MEMBERS = [[0, 1], [1, 2, 3]]
KINDS = [("device", torch.float32), ("device", torch.bfloat16), ("host", torch.float32), ("host", FP8)]


def drawn(rows: int, shape: tuple[int, ...], *seeds: int) -> Tensor:
    number = sum(s * 1000**i for i, s in enumerate(seeds))
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(number))


def code(call: Callable[[], Any]) -> str:
    try:
        call()
    except (MHCError, IndexError, TypeError) as error:
        return error.code if isinstance(error, MHCError) else type(error).__name__
    return ""


class Rank:
    """This process in a group."""

    def __init__(self, group: dist.ProcessGroup, folder: str) -> None:
        self.group, self.folder = group, folder
        self.rank, self.size = group.rank(), group.size()

    def run(self) -> dict[str, Any]:
        """Every check."""
        self.lookups()
        self.tickets()
        runs = [(self.gradients(), self.training()) for _ in range(2)]
        self.compiled()
        self.values()
        self.modules()
        gradients = [[*first, *second] for first, second in zip(runs[0][0], runs[1][0], strict=True)]
        equal = all(torch.equal(r, s) and torch.equal(v, w) for r, v, s, w in gradients) and all(
            torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items()
        )
        return {"equal runs": equal, "errors": self.errors()}

    def table(self, rows: int, width: int = WIDTH, **options: Any) -> ShardedTable:
        return ShardedTable(rows, width, self.group, **options).start(3, 1.0)

    def lookups(self) -> None:
        """Equal to plain indexing bit by bit: other rows on every rank, duplicates, none, empty shards."""
        for rows in (50, 2 * self.size - 1, 1):
            for storage, dtype in KINDS:
                whole = MemoryTable(rows, WIDTH, storage=storage, dtype=dtype).start(3, 1.0)
                table = self.table(rows, storage=storage, dtype=dtype, hot_rows=8 if storage == "host" else 0)
                assert table.held == len(table.weight) == table.end - table.begin
                assert torch.equal(table.weight, whole.weight[table.begin : table.end])
                for n, shape in enumerate([(4, 5, HEADS), (7,), (2, 0, HEADS), (1, 2)]):
                    asked = drawn(rows, shape, self.rank, n)
                    if n == 3 and self.rank == self.size - 1:
                        asked = asked[:0]  # nothing, while the others ask
                    found = table(asked)
                    assert found.dtype == table.result_dtype
                    assert torch.equal(found, whole(asked)), (rows, storage, dtype, shape)
                    ticket = ops.prefetch(asked, table.handle)
                    other = table(asked[:1])  # beside the look-up under way
                    assert torch.equal(
                        ops.collect(ticket, asked, table.anchor, table.handle, WIDTH, table.result_dtype), found
                    )
                    assert torch.equal(other, whole(asked[:1]))

    def tickets(self) -> None:
        """A ticket is good once, and until an optimizer takes the gradient; then all ranks look up again."""
        table = self.table(20)
        asked = drawn(20, (3, 2), self.rank)
        call = (asked, table.anchor, table.handle, WIDTH)
        ticket = ops.prefetch(asked, table.handle)
        before = len(desk())
        first = ops.collect(ticket, *call)
        assert len(desk()) == before - 1
        assert torch.equal(ops.collect(ticket, *call), first)
        ticket = ops.prefetch(asked, table.handle)
        assert table.take_gradient() is None
        with torch.no_grad():
            table.weight.mul_(2)
        dist.barrier(self.group)
        assert torch.equal(ops.collect(ticket, *call), 2 * first)

    def gradients(self) -> list[RowGradient]:
        """The mean over the ranks, of the rows that lie here; also where a rank has none, or its rows no token."""
        taken = []
        for dtype in (torch.float32, torch.bfloat16):
            for silent in (None, self.size - 1):
                table, whole = self.table(50, dtype=dtype), MemoryTable(50, WIDTH, dtype=dtype).start(3, 1.0)
                for rank in range(self.size):
                    for n in range(3):
                        asked = drawn(20, (4, 5, HEADS), rank, n)  # rows from 20 on have no gradient
                        scale = torch.randn(4, 5, HEADS * WIDTH, generator=torch.Generator().manual_seed(n + rank))
                        if rank != silent:
                            (whole(asked) * scale).square().mean().backward()
                        if rank == self.rank and rank != silent:
                            (table(asked) * scale).square().mean().backward()
                        elif rank == self.rank:
                            table(asked[:0])
                found, wanted = table.take_gradient(), whole.take_gradient()
                assert found is not None
                assert wanted is not None
                here = (wanted.rows >= table.begin) & (wanted.rows < table.end)
                assert torch.equal(found.rows + table.begin, wanted.rows[here])
                torch.testing.assert_close(found.values, wanted.values[here] / self.size, rtol=1e-5, atol=1e-7)
                assert table.gradient is None
                assert table.take_gradient() is None
                taken.append(found)
        table = self.table(50)
        if not self.rank:
            table(drawn(20, (2, 2), 0)).sum().backward()
        else:
            table(drawn(20, (0, 2), 0))
        table.drop_gradient()  # no collective
        assert table.take_gradient() is None
        return taken

    def training(self) -> dict[str, Tensor]:
        """Steps of the optimizer: as a table in one piece that sees all ranks' batches."""
        outs: dict[str, Tensor] = {}
        for storage, dtype in KINDS[:3]:
            table, whole = self.table(40, storage=storage, dtype=dtype), MemoryTable(40, WIDTH, dtype=dtype).start(3, 1)
            ours, plain = (TableAdamW(table_groups(t, 0.01)) for t in (table, whole))
            for step in range(5):
                for optimizer in (ours, plain):
                    optimizer.zero_grad()
                for rank in range(self.size):
                    asked = drawn(40 if step % 2 else 15, (4, 2), rank, step)
                    (whole(asked).float().square().mean() / self.size).backward()
                    if rank == self.rank:
                        table(asked).float().square().mean().backward()
                ours.step()
                plain.step()
            wanted = whole.weight[table.begin : table.end]
            bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(table.weight.float(), wanted.float(), rtol=bound, atol=bound)
            state, other = ours.state[table.weight], plain.state[whole.weight]
            assert state["step"] == other["step"]
            for name in ("exp_avg", "exp_avg_sq", "row_step"):
                part = other[name][table.begin : table.end]
                torch.testing.assert_close(state[name].float(), part.float(), rtol=1e-2, atol=1e-4)
            again = TableAdamW(table_groups(table, 0.01))
            again.load_state_dict(ours.state_dict())
            assert torch.equal(again.state[table.weight]["row_step"], state["row_step"])
            outs[f"{storage} {dtype}"] = table.weight.detach().clone()
        return outs

    def compiled(self) -> None:
        """Two tables, ahead and not, recomputed, and values found by content: what a graph looks up, and leaves."""
        spec = ContentSpec(top=2, multiplier=1, reach=30, offset=0, rows=30, groups=1, input=0, eps=1e-5)
        tables = [self.table(30), self.table(30, storage="host")]
        wholes = [MemoryTable(30, WIDTH).start(3, 1.0) for _ in tables]

        def run(a: Any, b: Any) -> Callable[[Tensor], Tensor]:
            def forward(asked: Tensor) -> Tensor:
                ticket = ops.prefetch(asked, b.handle)
                x = ops.gather(asked, a.anchor, a.handle, WIDTH).tanh()
                scores = x[:, :2, None].double()  # for which there is no kernel in C++
                values = ops.sum_rows(
                    asked, torch.zeros_like(asked), scores, None, a.anchor, a.handle, WIDTH, str(spec)
                )
                x = x * values.repeat(1, 2)
                return (x * ops.collect(ticket, asked, b.anchor, b.handle, WIDTH)).square().sum()

            return forward

        asked = drawn(30, (4, 2), self.rank)
        loss = torch.compile(run(*tables), backend="aot_eager_decomp_partition", fullgraph=True)(asked)
        plain = run(*wholes)(asked)
        torch.testing.assert_close(loss, plain)
        loss.backward()
        plain.backward()
        for table, whole in zip(tables, wholes, strict=True):
            found, part = table.take_gradient(), whole.take_gradient()
            assert found is not None
            assert part is not None
            parts: list[Any] = [None] * self.size
            dist.all_gather_object(parts, part, group=self.group)
            total = merge([RowGradient(*p) for p in parts])
            here = (total.rows >= table.begin) & (total.rows < table.end)
            torch.testing.assert_close(found.values, total.values[here] / self.size)

    def values(self) -> None:
        """Row numbers are those of the whole table; files are read from the own row on."""
        with torch.device("meta"):
            table = ShardedTable(50, WIDTH, self.group)
        assert (table.weight.is_meta, table.anchor.is_meta) == (True, True)
        values = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
        for begin in range(0, 50, 8):
            table.fill(begin, values[begin : begin + 8])
        assert torch.equal(table.weight, values[table.begin : table.end])
        assert torch.equal(table.block(table.begin, table.end)[0], table.weight)
        other = 0 if table.begin else table.end
        assert code(lambda: table.block(other, other + 1)) == "MHC223"
        big = START_BLOCK + 9
        assert torch.equal(
            ShardedTable(big, 1, self.group, device="meta").start(5).weight,
            MemoryTable(big, 1).start(5).weight[min(self.rank * -(-big // self.size), big) :][: -(-big // self.size)],
        )
        read = fill_rows(ShardedTable(40, WIDTH, self.group, device="meta"), self.folder, hash_spec="h")
        assert torch.equal(read.weight, MemoryTable(40, WIDTH).start(9, 1.0).weight[read.begin : read.end])
        assert fill_rows(ShardedTable(40, WIDTH, self.group, dtype=torch.bfloat16), self.folder, hash_spec="h").held
        narrow = ShardedTable(40, WIDTH, self.group, dtype=FP8)
        assert code(lambda: fill_rows(narrow, self.folder, hash_spec="h")) == "MHC228"
        assert code(lambda: fill_rows(narrow, self.folder, hash_spec="other")) == "MHC223"

    def modules(self) -> None:
        """What the runtime makes of a model's tables."""
        model = torch.nn.Sequential(MemoryTable(20, WIDTH).start(1), MemoryTable(20, WIDTH, device="meta"))
        first = model[0]
        look_up_early(model)
        assert first.early
        first.ratio = 4.0
        shard_tables(model, self.group)
        assert isinstance(model[0], ShardedTable)
        assert torch.equal(model[0].weight, first.weight[model[0].begin : model[0].end])
        assert model[1].weight.is_meta
        assert [t.ratio for t in model] == [4.0, None]
        made = table_factory(self.group)(20, WIDTH, torch.bfloat16, "host")
        assert isinstance(made, ShardedTable)
        assert (made.weight.is_meta, made.storage, made.dtype) == (True, "host", torch.bfloat16)
        assert type(table_factory(None)(20, WIDTH, torch.float32, "device")) is MemoryTable

    def errors(self) -> dict[str, str]:
        """The code on this rank of what goes wrong on one of them; the group is good for more afterwards."""
        first, last = self.rank == 0, self.rank == self.size - 1
        table, other = self.table(20), self.table(20)
        hollow = ShardedTable(20, WIDTH, self.group, device="meta")
        found = {
            "sizes": code(lambda: ShardedTable(20 + last, WIDTH, self.group)),
            "seeds": code(lambda: table.start(1 + last)),
            "mapped": code(lambda: ShardedTable(20, WIDTH, self.group, storage="mapped")),
            "out of range": code(lambda: table(torch.tensor([[3, 20 if last else 4]]))),
            "negative": code(lambda: table(torch.tensor([[3, -1 if first else 4]]))),
            "another table": code(lambda: (other if last else table)(torch.tensor([[3]]))),
            "another purpose": code(lambda: table.take_gradient() if last else table(torch.tensor([[3]]))),
            "hollow": code(lambda: hollow.gather(torch.tensor([[3]]), torch.float32)),
            "copied": code(table.__getstate__),
            "float8": code(lambda: ShardedTable(20, WIDTH, self.group, dtype=FP8, trainable=True)),
        }  # fmt: skip
        table(torch.tensor([[3, 4]]))
        return found


def replicas(rank: int) -> Tensor:
    """Two ranks that share rows, twice: the mean over tokens of all four is what one process computes."""
    shards, data = (
        groups(*pairs)[number]
        for pairs, number in zip(([[0, 1], [2, 3]], [[0, 2], [1, 3]]), (rank // 2, rank % 2), strict=True)
    )
    table, whole = ShardedTable(40, WIDTH, shards).start(3, 1.0), MemoryTable(40, WIDTH).start(3, 1.0)
    ours, plain = TableAdamW(table_groups(table, 0.01), process_group=data), TableAdamW(table_groups(whole, 0.01))
    for step in range(4):
        # In the second step no token hits the rows of the second shard, in the third two ranks have no gradient.
        asked = drawn(20 if step == 1 else 40, (4, 6, 2), step)
        heard = 2 if step == 2 else 4
        whole(asked[:heard]).square().mean(dim=(1, 2)).sum().div(4).backward()
        if rank < heard:
            table(asked[rank]).square().mean().backward()
        else:
            table(asked[rank])
        ours.step()
        plain.step()
    torch.testing.assert_close(table.weight, whole.weight[table.begin : table.end], rtol=1e-5, atol=1e-6)
    state, wanted = ours.state[table.weight], plain.state[whole.weight]
    assert state["step"] == 4
    assert torch.equal(state["row_step"], wanted["row_step"][table.begin : table.end])
    return table.weight.detach().clone()


def groups(*members: list[int]) -> list[dist.ProcessGroup]:
    """A group of each list, made by all ranks."""
    return [dist.new_group(m) for m in members]  # type: ignore[attr-defined]


def main() -> None:
    rank = int(sys.argv[1])
    store, out, folder = sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {"replicas": replicas(rank)}
    for members, group in zip(MEMBERS, groups(*MEMBERS), strict=True):
        if rank in members:
            found[f"{len(members)}"] = Rank(group, folder).run()
    (single,) = groups([0])
    if rank == 0:
        assert type(table_factory(single)(20, WIDTH, torch.float32, "device")) is MemoryTable
    torch.save(found, Path(out))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
