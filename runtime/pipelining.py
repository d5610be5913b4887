"""torch's pipeline stage, with buffers only for the microbatches in flight, and heartbeats; forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from mhc_compile.runtime.launch import World
from mhc_compile.runtime.stage import Stage


class RunStage(PipelineStage):
    """A stage of this rank, on torch 2.11 to 2.13.

    torch keeps buffers for the received streams and gradients of every microbatch of a step. Here a buffer is allocated
    when a message is awaited and freed when the backward has run, so that only microbatches in flight take memory. The
    watch is told of every pass: a step may take long as long as it makes progress.

    torch 2.11 warms connections up by messages between neighbouring stages; those of a rank to itself, which gloo
    rejects, are left out.

    `defers`: weights' gradients may be left for later (`Stage.dw_builder`). Otherwise torch would split a backward pass
    by walking the autograd graph, of which a compiled stage is one node.
    """

    submod: Stage

    def __init__(self, stage: Stage, world: World, *, defers: bool) -> None:
        super().__init__(
            stage,
            stage.index,
            stage.count,
            world.device,
            input_args=tuple(map(_learning, stage.example_inputs)),
            output_args=tuple(map(_learning, stage.example_outputs)),
            group=world.pipe_group,
            dw_builder=stage.dw_builder if defers else None,
        )
        self._watch = world.watch
        self._nothing = torch.empty(0, device=world.device)
        self.done: Callable[[Stage], None] | None = None
        """Called with the stage after the last backward pass of a step."""

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's forward pass, and tell the watch."""
        output = super().forward_one_chunk(*args, **kwargs)
        self._watch.beat()
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Run torch's backward pass, free its buffers, and tell the watch."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._clear([self.args_recv_info[bwd_chunk_id], self.grad_recv_info.get(bwd_chunk_id, ())])
        self._watch.beat()
        self._end(kwargs.get("last_backward", False))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run torch's backward pass of weights."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        self._end(last_backward)

    def _end(self, last_backward: bool) -> None:
        if last_backward and self.done is not None:
            self.done(self.submod)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return torch's receive operations, with buffers allocated for them."""
        self._make_room(self.args_recv_info[fwd_chunk_id], self.submod.example_inputs, learns=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return torch's receive operations, with buffers allocated for them."""
        self._make_room(self.grad_recv_info.get(bwd_chunk_id, ()), self.submod.example_outputs)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Set the gradients as torch does, which puts zeros where there is none."""
        if any(t is None for t in next_stage_bwd_outputs):
            self._make_room(self.grad_recv_info[mb_index], self.submod.example_outputs)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._prepare_forward_infra(*args, **kwargs)
        self._clear(self.args_recv_info.values())
        return outputs

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._prepare_backward_infra(*args, **kwargs)
        self._clear(self.grad_recv_info.values())
        return outputs

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _clear(self, messages: Iterable[Sequence[Any]]) -> None:
        for info in (info for infos in messages for info in infos):
            if getattr(info, "buffer", None) is not None:
                info.buffer = self._nothing

    def _make_room(self, infos: Sequence[Any], examples: Sequence[Tensor], *, learns: bool = False) -> None:
        for info, example in zip(infos, examples, strict=False):
            if getattr(info, "buffer", None) is self._nothing:
                room = torch.empty_like(example, device=self.device, requires_grad=False)
                info.buffer = room.requires_grad_(learns and room.is_floating_point())


def _learning(example: Tensor) -> Tensor:
    """Return `example` as it crosses in training: requiring a gradient where it can have one."""
    return example.requires_grad_(example.is_floating_point())


def forward_passes(
    stages: Sequence[Stage],
    places: Sequence[int],
    group: dist.ProcessGroup | None,
    microbatches: int,
    run: Callable[[Stage, tuple[Tensor, ...], int], tuple[Tensor, ...]],
) -> None:
    """Run microbatches forward through the stages of a pipeline, without gradients.

    `stages`: this rank's. `places`: the rank in `group` of every stage of the pipeline; without a group, all 0.
    `run(stage, what crosses into it, number of the microbatch)` returns what crosses out of the stage.

    Stage s runs microbatch m in round s + m. Between two rounds every rank posts all its messages as one batch: each of
    them is sent in one round and received before the next, so that no two ranks wait for each other, also where a send
    is over only when it is received, as with NCCL.
    """
    rank = 0 if group is None else dist.get_rank(group)
    held = sorted(stages, key=lambda stage: stage.index)
    crossing: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    """The inputs of passes that have not run yet, by stage and microbatch."""
    for number in range(len(places) + microbatches - 1):
        for stage in held:
            microbatch = number - stage.index
            if 0 <= microbatch < microbatches:
                out = run(stage, crossing.pop((stage.index, microbatch), ()), microbatch)
                if stage.index + 1 < len(places):
                    crossing[stage.index + 1, microbatch] = out
        _exchange(held, places, rank, group, crossing, number, microbatches)


def _exchange(
    stages: Sequence[Stage],
    places: Sequence[int],
    rank: int,
    group: dist.ProcessGroup | None,
    crossing: dict[tuple[int, int], tuple[Tensor, ...]],
    number: int,
    microbatches: int,
) -> None:
    """Send what this rank's stages have made in a round to others, and receive what its stages take in the next one."""
    by_index = {stage.index: stage for stage in stages}
    messages = []
    for index in range(1, len(places)):
        microbatch, (sender, receiver) = number - (index - 1), places[index - 1 : index + 1]
        if not 0 <= microbatch < microbatches or sender == receiver:
            continue
        if sender == rank:
            tensors = [t.contiguous() for t in crossing.pop((index, microbatch))]
            messages += [dist.P2POp(dist.isend, t, group=group, group_peer=receiver) for t in tensors]
        elif receiver == rank:
            stage = by_index[index]
            room = tuple(torch.empty_like(t, device=stage.device) for t in stage.example_inputs)
            crossing[index, microbatch] = room
            messages += [dist.P2POp(dist.irecv, t, group=group, group_peer=sender) for t in room]
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
