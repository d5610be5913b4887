"""What each rank does in tests of exports: saves a converted model of transformers, cut over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mhc_compile
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints
from mhc_compile.runtime.state import training_state


class Whole:
    """A model as one stage."""

    def __init__(self, parameters: dict[str, nn.Parameter], tables: dict[str, MemoryTable]) -> None:
        self.parameters, self.tables = parameters, tables

    def named_parameters(self) -> Any:
        yield from self.parameters.items()


def save_model(source: str, folder: str, options: dict[str, Any]) -> None:
    """Save the model that `trained` gives, every matrix and every table cut over all ranks there are."""
    model = trained(source, options)
    tables = {name: m for name, m in model.named_modules() if isinstance(m, MemoryTable)}
    weights = {id(t.weight) for t in tables.values()}
    parameters = {name: p for name, p in model.named_parameters() if id(p) not in weights}
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, p in parameters.items():
            if p.ndim > 1:
                parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        for name, t in tables.items():
            cut = ShardedTable(t.rows, t.width, mesh.get_group(), device="cpu")
            cut.fill(0, t.weight.detach())
            tables[name] = cut
    stage = Whole(parameters, tables)
    checkpoints = Checkpoints(folder)
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad])
    checkpoints.save(1, training_state([stage], optimizer, {}))
    checkpoints.close()


def trained(source: str, options: dict[str, Any]) -> nn.Module:
    """The folder's model with streams and a memory, every value moved: the same in every process."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    cls = getattr(transformers, config.architectures[0])
    torch.manual_seed(0)
    model = mhc_compile.convert(cls.from_pretrained(source), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MemoryTable):
                m.weight.normal_(generator=generator)
        for name, p in model.named_parameters():
            if ".table." not in name:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.02)
    return model.eval()
