"""What each rank of the test of sharded tables does: a module that the ranks import by its name."""

from pathlib import Path

import torch
import torch.distributed as dist
from small import VOCAB, ids, llama, program_of, stages_of, through
from torch import Tensor

from mhc_compile.config import Options
from mhc_compile.memory.optimizer import TableAdamW, table_groups
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.stage import Stage, build_stages, materialise_all
from mhc_compile.runtime.tables import look_up_early, table_factory
from mhc_compile.runtime.weights import assign, load_folder

STARTS = [2, 3]
KERNELS = torch.ops.engram_kernels


def loss_of(stages: list[Stage], tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(through(stages, tokens).reshape(-1, VOCAB), tokens.reshape(-1))


def sharded_stages(program: Program, options: Options) -> list[Stage]:
    """Stages with this rank's rows of their tables, the values those of the program's model."""
    stages = build_stages(
        program, STARTS, indices=range(3), options=options, make_table=table_factory(dist.group.WORLD)
    )
    materialise_all(stages)
    own = dict(program.model.named_parameters())
    for stage in stages:
        for name, p in stage.named_parameters():
            if name.removesuffix(".weight") not in stage.tables:
                assign(p, own[name].detach())
        for name, table in stage.tables.items():
            table.fill(0, own[f"{name}.weight"].detach())
    return stages


def trained(program: Program) -> int:
    """Two steps of the tables; returns the number of look-ups."""
    ours = sharded_stages(program, Options(inner="aot_eager", recompute="stage"))
    plain = stages_of(program, STARTS)
    ((name, table),), ((_, whole),) = ([t for s in held for t in s.tables.items()] for held in (ours, plain))
    assert isinstance(table, ShardedTable)
    asked = []
    ask = table._ask
    table._ask = lambda rows: (asked.append(rows), ask(rows))[1]  # type: ignore[method-assign]
    first, second = TableAdamW(table_groups(table, 0.01)), TableAdamW(table_groups(whole, 0.01))
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(2):
        batches = [ids(seed=10 * step + r) for r in range(size)]
        losses = [loss_of(plain, b) for b in batches]
        (torch.stack(losses).sum() / size).backward()
        loss = loss_of(ours, batches[rank])
        torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=0)
        loss.backward()
        first.step()
        second.step()
    torch.testing.assert_close(table.weight, whole.weight[table.begin : table.end], rtol=1e-4, atol=1e-6)
    before = program.model.get_submodule(name).weight
    assert not torch.equal(table.weight, before[table.begin : table.end])
    return len(asked)


def loaded(program: Program, folder: str) -> tuple[int, int]:
    """Which rows of a folder's table this rank has."""
    stages = build_stages(
        program, STARTS, indices=[1], options=Options(inner="eager"), make_table=table_factory(dist.group.WORLD)
    )
    materialise_all(stages)
    load_folder(stages, program, Path(folder), seed=0)
    (table,) = stages[0].tables.values()
    assert torch.equal(table.weight, torch.load(f"{folder}.pt")[table.begin : table.end])
    return table.begin, table.end


def both(folder: str) -> tuple[int, tuple[int, int]]:
    """In one process, because importing and capturing take longer than either."""
    model = llama(memory=True)
    look_up_early(model)
    program = program_of(model, ids())
    targets = [n.target for n in program.graph.graph.nodes]
    assert KERNELS.prefetch.default in targets
    assert KERNELS.gather.default not in targets
    return trained(program), loaded(program, folder)
