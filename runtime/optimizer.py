"""From the gradients of one replica's microbatches to moved weights: sums and means over ranks, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _take_tensors
from torch.distributed.tensor import DTensor

from mhc_compile.memory.gradient import RowGradient
from mhc_compile.memory.optimizer import TableAdamW, add_gradients, groups_of
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import DECAYED
from mhc_compile.runtime.launch import World
from mhc_compile.runtime.recipe_tables import TrainTable
from mhc_compile.runtime.stage import Stage

BUCKET = 100 * 2**20
"""Bytes of gradients in one message, where there are so many."""


def learning_rate(step: int, train: TrainTable) -> float:
    """Return the learning rate of the optimizer step numbered `step`, from 1 on.

    It rises linearly over `warmup` steps, of which the last has `lr`, and falls until the last step has `final * lr`;
    `wsd` begins to fall before the last `decay * steps` steps.
    """
    if step <= train.warmup:
        return train.lr * step / train.warmup
    if train.schedule == "constant":
        return train.lr
    begin = train.warmup if train.schedule != "wsd" else train.steps - round(train.decay * train.steps)
    progress = max(step - begin, 0) / max(train.steps - begin, 1)
    fall = (1 + math.cos(math.pi * progress)) / 2 if train.schedule == "cosine" else 1 - progress
    return train.lr * (train.final + (1 - train.final) * fall)


class RunAdamW(TableAdamW):
    """AdamW over the parameters and tables of this rank's stages.

    A step is `reduce`, `norm`, then `update` or `skip`: all of them are called by all ranks.

    `tied`: what several stages hold, with the stages, as `mhc_compile.runtime.stage.tied` says. No decay on vectors and
    on coefficients of streams. Tables have 5 times the learning rate, those looked up by content from 4 times to once.
    """

    def __init__(
        self, stages: Sequence[Stage], tied: Mapping[str, Sequence[int]], world: World, train: TrainTable
    ) -> None:
        self.world, self.train = world, train
        self.stages = list(stages)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        """Trained parameters by name; a tied one may have two, of the first and the last stage."""
        self.tables: dict[str, MemoryTable] = {}
        rows: set[int] = set()
        for stage in stages:
            self.tables |= {name: t for name, t in stage.tables.items() if t.trainable}
            rows |= {id(p) for t in stage.tables.values() for p in t.parameters()}
        for stage in stages:
            for name, p in stage.named_parameters():
                if p.requires_grad and id(p) not in rows and all(p is not q for q in self.parameters.get(name, [])):
                    self.parameters.setdefault(name, []).append(p)
        self._taken: dict[str, RowGradient | None] | None = None
        self._replicas = world.replica_mesh.get_group()
        self._begun: list[tuple[list[Tensor], dist.Work]] = []
        """Gradients whose sums are on their way, with what waits for them."""
        self._tied = _ties(tied, world)
        super().__init__(
            _groups(self.parameters, self.tables, train),
            betas=train.betas,
            process_group=world.data_group if world.data_group.size() > 1 else None,
            # One pass over memory in place of a dozen. On GPUs torch's default is as good.
            fused=True if world.device.type == "cpu" else None,
        )
        for t in self.tables.values():
            t.has_optimizer = True

    @torch.no_grad()
    def begin(self, stage: Stage) -> None:
        """Begin to average the gradients of a stage whose backward passes are all done, while others' go on.

        Those that another stage shares wait for `reduce`. All replicas finish their stages in one order.
        """
        if self.world.parallel.mode == "replicate":
            own = [p for name, p in stage.named_parameters() if name not in stage.tied and name in self.parameters]
            self._begin([p.grad for p in own if p.grad is not None])

    def _begin(self, gradients: Sequence[Tensor]) -> None:
        """Send gradients, a message for every `BUCKET` of a dtype."""
        if self._replicas.size() > 1:
            for bucket in _take_tensors(gradients, BUCKET):
                sums = self._replicas.allreduce_coalesced(list(bucket), dist.AllreduceCoalescedOptions())
                self._begun.append((list(bucket), sums))

    @torch.no_grad()
    def reduce(self) -> None:
        """Average gradients over replicas, and add those of tied parameters over the stages that hold them."""
        if self.world.parallel.mode == "replicate":  # FSDP has averaged its own
            begun = {id(g) for bucket, _ in self._begun for g in bucket}
            self._begin([g for g in self._gradients() if id(g) not in begun])
            for bucket, work in self._begun:
                work.wait()
                torch._foreach_div_(bucket, self._replicas.size())
            self._begun.clear()
        self._taken = {name: super(RunAdamW, self).take_gradient(t) for name, t in self.tables.items()}
        for name, (_, group) in self._tied.items():
            if name in self.tables:
                self._add_rows(name, group)
            else:
                self._add_up(name, group)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the norm of all gradients of the model, those of tables included; float64, the same on all ranks."""
        assert self._taken is not None, "reduce() first"
        shards: list[Tensor] = []
        wholes: list[Tensor] = []
        for name, (p, *_) in self.parameters.items():
            gradient = p.grad
            if gradient is not None and self._counts(name):
                (shards if isinstance(gradient, DTensor) else wholes).append(_local(gradient))
        spread: list[Tensor] = []
        for name, rows in self._taken.items():
            if rows is not None and self._counts(name):
                (spread if isinstance(self.tables[name], ShardedTable) else wholes).append(rows.values)
        squares = torch.stack([self._squares(wholes), self._squares(shards), self._squares(spread)])
        if self.world.parallel.mode == "fsdp":
            dist.all_reduce(squares[1:2], group=self.world.replica_mesh.get_group())
        if self.world.parallel.engram > 1:
            dist.all_reduce(squares[2:3], group=self.world.engram_group)
        total = squares.sum()
        dist.all_reduce(total, group=self.world.pipe_group)
        return total.sqrt()

    @torch.no_grad()
    def update(self, step: int, norm: float) -> float:
        """Clip to `train.clip`, update the weights with the learning rate of `step`, and clear; return that rate."""
        rate = learning_rate(step, self.train)
        for group in self.param_groups:
            group["lr"] = group["ratio"] * rate
        self.apply(norm)
        return rate

    @torch.no_grad()
    def apply(self, norm: float) -> None:
        """Do what `update` does with the learning rates that the groups have."""
        clip = self.train.clip
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        if scale < 1.0:
            if gradients := [_local(gradient) for gradient in self._gradients()]:
                torch._foreach_mul_(gradients, scale)
            assert self._taken is not None
            self._taken = {n: g and RowGradient(g.rows, g.values * scale) for n, g in self._taken.items()}
        self.step()
        self.skip()
        for stage in self.stages:
            stage.forget_casts()

    def skip(self) -> None:
        """Clear all gradients and leave the weights as they are."""
        self._taken = None
        for p in (p for parameters in self.parameters.values() for p in parameters):
            p.grad = None
        for t in self.tables.values():
            t.drop_gradient()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for parameters in self.parameters.values() for p in parameters if p.grad is not None]

    def take_gradient(self, table: MemoryTable) -> RowGradient | None:
        """Return the gradient of a table that `reduce` took."""
        assert self._taken is not None, "reduce() first"
        return self._taken[next(name for name, t in self.tables.items() if t is table)]

    def _counts(self, name: str) -> bool:
        """Return whether this rank's gradient of a parameter or table counts in the norm: one of a tied one does."""
        return name not in self._tied or min(self._tied[name][0]) == self.world.pipe

    def _add_up(self, name: str, group: dist.ProcessGroup | None) -> None:
        """Make the gradient of a tied parameter the sum over its stages, here and on the other ranks."""
        for p in self.parameters[name]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        total, *others = [_local(p.grad) for p in self.parameters[name]]
        for gradient in others:
            total += gradient
        if group is not None:
            dist.all_reduce(total, group=group)
        for gradient in others:
            gradient.copy_(total)

    def _add_rows(self, name: str, group: dist.ProcessGroup | None) -> None:
        """Make the gradient of a table the sum over its stages on several ranks; those on one rank share it."""
        assert self._taken is not None
        if group is not None:
            table = self.tables[name]
            self._taken[name] = add_gradients(self._taken[name], table.width, table.anchor.device, group)

    def _squares(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the sum of squares in float64."""
        tensors = [t for t in tensors if t.numel()]
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=self.world.device)
        norms: list[Tensor] = torch._foreach_norm(tensors)  # type: ignore[assignment]
        return torch.stack([n.to(self.world.device, torch.float64) for n in norms]).square().sum()


def _groups(
    by_name: Mapping[str, Sequence[nn.Parameter]], tables: Mapping[str, MemoryTable], train: TrainTable
) -> list[dict[str, Any]]:
    """Return what `mhc_compile.parameter_groups` returns, from names."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameters in by_name.items():
        ours = "mhc" in name.split(".")
        plain = parameters[0].ndim < 2 or (ours and not name.endswith(DECAYED))
        (free if plain else decayed).extend(parameters)
    groups = [
        {"params": decayed, "lr": train.lr, "weight_decay": train.weight_decay},
        {"params": free, "lr": train.lr, "weight_decay": 0.0},
        *groups_of(tables.values(), train.lr, steps=train.steps),
    ]
    return [group for group in groups if group["params"]]


def _ties(
    tied: Mapping[str, Sequence[int]], world: World
) -> dict[str, tuple[tuple[int, ...], dist.ProcessGroup | None]]:
    """Return the tied parameters of this rank: the places in the pipeline that hold them, and the group of several.

    All ranks create these groups in the order of `tied`, which is the same on all of them.
    """
    ties: dict[str, tuple[tuple[int, ...], dist.ProcessGroup | None]] = {}
    for name, stages in tied.items():
        places = tuple(sorted({world.parallel.place_of(stage) for stage in stages}))
        if world.pipe in places:
            ties[name] = (places, world.pipe_ranks(places) if len(places) > 1 else None)
    return ties


def _local(tensor: Tensor | None) -> Tensor:
    """Return the part of a tensor on this rank."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
