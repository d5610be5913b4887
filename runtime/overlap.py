"""Pipeline actions that use the time in which a gradient is on its way.

    a backward       the recomputation that it reads first begins before its gradient is waited for
    an overlapped    (`OVERLAP_F_B` of DualPipeV, DeepSeek-V3, arXiv 2412.19437, 3.2.1) both halves at once, on two
    forward and      streams, where there is a GPU; the forward's result is sent as soon as it is there, not after the
    backward         backward

Results equal those of torch's runtime bit by bit: the halves share no value, and each sum is made by one of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    OVERLAP_F_B,
    SEND_F,
    _Action,
    _batch_p2p,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

Key = tuple[int, int]
"""A stage and a microbatch."""
WAIT_SEND_F = getattr(schedules, "WAIT_SEND_F", None)
"""Retires a send of a forward, from torch 2.15 on; before, the runtime waits for all sends after the last action."""
Half = Callable[[], None]


def register(schedule: _PipelineScheduleRuntime) -> None:
    """Let `schedule` run backwards and overlapped actions as this module's first lines say. Call it once.

    A stage's module may have `begin_recompute()`; without, only overlapped actions change. Any schedule on torch's
    action runtime will do (Interleaved1F1B, ZBVZeroBubble, DualPipeV). Outputs of a step are not kept.
    """
    actions = Actions(schedule)
    actions.take_sends()
    step = schedule.step

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        outputs = step(*args, **kwargs)
        actions.end()
        return outputs

    # torch has no place to wait for what custom functions have sent.
    schedule.step = wrapped  # type: ignore[method-assign]
    for kind in (FULL_BACKWARD, BACKWARD_INPUT):
        schedule.register_custom_function(kind, actions.backward_alone)
    schedule.register_custom_function(OVERLAP_F_B, actions.overlap)


class Actions:
    """The actions of one rank's schedule, as torch's `_PipelineScheduleRuntime._step_microbatches` performs them."""

    def __init__(self, schedule: _PipelineScheduleRuntime) -> None:
        self.schedule = schedule
        self.stages: dict[int, Any] = {s.stage_index: s for s in schedule._stages}
        self._early: set[Key] = set()
        """Forwards whose results their overlapped action sends."""
        self._sent: list[tuple[Key, list[dist.Work]]] = []
        self._begun: set[Key] = set()
        """Backwards whose recomputation has begun."""
        self._aside: dict[Key, torch.cuda.Stream] = {}
        """The stream of each forward that did not run on the main one: there autograd runs its backward, too."""
        self._stream: torch.cuda.Stream | None = None

    def take_sends(self) -> None:
        """Remove from this rank's list the sends of forwards right after their overlapped action, and their waits.

        `end` waits for these sends.
        """
        order = self.schedule.pipeline_order_with_comms
        kept: list[_Action] = []
        for action in order[self.schedule.rank]:
            if action.computation_type == WAIT_SEND_F and _key(action) in self._early:
                continue
            halves = (kept[-1].sub_actions if kept else None) or ()
            if action.computation_type == SEND_F and _key(action) in [
                _key(a) for a in halves if a.computation_type == FORWARD
            ]:
                self._early.add(_key(action))
            else:
                kept.append(action)
        order[self.schedule.rank] = kept

    def end(self) -> None:
        """Finish a step: wait until what was sent has arrived."""
        while self._sent:
            (index, microbatch), works = self._sent.pop()
            _wait_batch_p2p(works)
            if WAIT_SEND_F is not None:
                self.stages[index].release_fwd_send_outputs(microbatch)
        self._aside.clear()

    def perform(self, action: _Action, ctx: _PipelineContext) -> None:
        """Run a forward, a backward or one of its halves."""
        self.schedule._assert_unsharded(self.stages[action.stage_index])
        if action.computation_type == FORWARD:
            self._forward(action, ctx)
        elif action.computation_type == BACKWARD_WEIGHT:
            self._weights(action)
        else:
            self._backward(action)

    def backward_alone(self, action: _Action, ctx: _PipelineContext) -> None:
        """Run a backward that is no part of an overlapped action, on the stream of its forward."""
        stream = self._aside.get(_key(action))
        if stream is None:
            self.perform(action, ctx)
            return
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            self.perform(action, ctx)
        main.wait_stream(stream)

    def _forward(self, action: _Action, ctx: _PipelineContext) -> None:
        index, microbatch = key = _key(action)
        stage = self.stages[index]
        if not stage.is_first and index - 1 not in self.stages:
            _wait_batch_p2p(self.schedule.fwd_recv_ops.pop(key))
        assert ctx.arg_mbs is not None
        assert ctx.kwarg_mbs is not None
        output = stage.forward_one_chunk(
            microbatch, ctx.arg_mbs[microbatch], ctx.kwarg_mbs[microbatch], save_forward_output=False
        )
        self.schedule._maybe_compute_loss(stage, output, ctx.target_mbs, microbatch)
        if index + 1 in self.stages:
            self.stages[index + 1].set_local_fwd_input(output, microbatch)
        if key in self._early:
            self._sent.append((key, _batch_p2p(stage.get_fwd_send_ops(microbatch))))

    def _begin(self, action: _Action) -> None:
        """Recompute what a backward reads first if its gradient comes from another rank and may be on its way."""
        key = _key(action)
        stage = self.stages[action.stage_index]
        begin = getattr(stage.submod, "begin_recompute", None)
        backward = action.computation_type in (FULL_BACKWARD, BACKWARD_INPUT)
        if backward and stage.has_backward and begin and key in self.schedule.bwd_recv_ops and key not in self._begun:
            self._begun.add(key)
            begin()

    def _backward(self, action: _Action) -> None:
        index, microbatch = key = _key(action)
        stage, schedule = self.stages[index], self.schedule
        self._begin(action)
        self._begun.discard(key)
        if not stage.is_last and index + 1 not in self.stages:
            _wait_batch_p2p(schedule.bwd_recv_ops.pop(key))
        loss = schedule._maybe_get_loss(stage, microbatch)
        full = action.computation_type == FULL_BACKWARD
        schedule.backward_counter[index] += full
        last = full and schedule.backward_counter[index] == schedule._n_microbatches
        stage.backward_one_chunk(microbatch, loss=loss, full_backward=full, last_backward=last)
        if index - 1 in self.stages and stage.has_backward:
            self.stages[index - 1].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)

    def _weights(self, action: _Action) -> None:
        index, microbatch = _key(action)
        self.schedule.backward_counter[index] += 1
        last = self.schedule.backward_counter[index] == self.schedule._n_microbatches
        self.stages[index].backward_weight_one_chunk(microbatch, last_backward=last)

    def overlap(self, action: _Action, ctx: _PipelineContext) -> None:
        """Run the forwards of an overlapped action alongside the rest of it. The halves are different stages' work."""
        assert action.sub_actions is not None
        forwards = [a for a in action.sub_actions if a.computation_type == FORWARD]
        rest = [a for a in action.sub_actions if a.computation_type != FORWARD]

        def forward() -> None:
            for a in forwards:
                self.perform(a, ctx)

        def backward() -> None:
            for a in rest:
                self.perform(a, ctx)

        stages = self.stages.values()
        # With FSDP both halves gather parameters, which must happen in one order on all ranks.
        if all(s.device.type == "cuda" and not isinstance(s.submod, FSDPModule) for s in stages):
            self._on_streams(forwards, rest, forward, backward)
            return
        for a in rest:
            self._begin(a)
        forward()
        backward()

    def _on_streams(self, forwards: Sequence[_Action], rest: Sequence[_Action], forward: Half, backward: Half) -> None:
        """Run each half on a stream of its own: the backward on that of its forward, where autograd runs it anyway.

        The streams wait for each other before and after, so that each may use what the other has freed.
        """
        main = torch.cuda.current_stream()
        side = self._stream = self._stream or torch.cuda.Stream()
        back = next((s for a in rest if (s := self._aside.get(_key(a)))), main)
        ahead = side if back is main else main
        side.wait_stream(main)
        with torch.cuda.stream(back):
            for a in rest:
                self._begin(a)
        with torch.cuda.stream(ahead):
            forward()
        with torch.cuda.stream(back):
            backward()
        if ahead is side:
            self._aside.update(dict.fromkeys(map(_key, forwards), side))
        main.wait_stream(side)


def _key(action: _Action) -> Key:
    return action.stage_index, -1 if action.microbatch_index is None else action.microbatch_index
