"""The figures of `mhc_compile.measure` for a model that is cut into stages on several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from mhc_compile.measure import StreamInterpreter, StreamMeasures, StreamPart, summarise
from mhc_compile.runtime.pipelining import forward_passes
from mhc_compile.runtime.stage import Stage
from mhc_compile.runtime.unit import FromPrevious, without_dropout

T = TypeVar("T")


def stream_figures(
    stages: Sequence[Stage], batch: Mapping[str, Tensor], pipe_group: ProcessGroup | None = None
) -> dict[str, float]:
    """Return separation and gain of every site, and the composite gain of all of them, by the names of metrics.

    `separation/SITE` (a mean over tokens) and `gain/SITE` (the largest over tokens) with sites named by their modules
    (`model.layers.3#0`), and `composite_gain/forward_mean`, `forward_max`, `backward_mean` and `backward_max`
    (arXiv 2512.24880), with the owner's module path before the last part where a model has several streams.

    `stages`: this rank's, in any order. `batch`: the model's inputs for one microbatch, equal on all ranks of a
    pipeline. `pipe_group`: those ranks, which all call this; None where this rank holds every stage. With FSDP or
    sharded tables all replicas call this, each with its own microbatch. Stages run in eval mode, without gradients;
    weights, random states and modes stay as they are.
    """
    return named(summarise(_parts(stages, batch, pipe_group)))


def named(measures: Mapping[str, StreamMeasures]) -> dict[str, float]:
    """Return the measures of all owners under the names of metrics."""
    figures: dict[str, float] = {}
    for owner, m in measures.items():
        for kind, values in (("separation", m.separation), ("gain", m.gains)):
            figures |= {f"{kind}/{f'{owner}.{s}'.strip('.')}": x for s, x in zip(m.sites, values, strict=True)}
        middle = f"{owner or 'model'}/" if len(measures) > 1 else ""
        figures |= {f"composite_gain/{middle}{name}": figure for name, figure in asdict(m.gain).items()}
    return figures


def _parts(stages: Sequence[Stage], batch: Mapping[str, Tensor], group: ProcessGroup | None) -> list[StreamPart]:
    """Return the measures of every stage's streams, in the order of the pipeline."""
    measured: dict[int, list[StreamPart]] = {}

    def run(stage: Stage, crossing: tuple[Tensor, ...], _: int) -> tuple[Tensor, ...]:
        crossing, measured[stage.index] = _run(stage, crossing, batch)
        return crossing

    indices = _gathered([stage.index for stage in stages], group)
    place_of = {index: place for place, some in enumerate(indices) for index in some}
    forward_passes(stages, [place_of[index] for index in range(stages[0].count)], group, 1, run)
    by_index = {index: parts for some in _gathered(measured, group) for index, parts in some.items()}
    return [part for index in sorted(by_index) for part in by_index[index]]


def _gathered(value: T, group: ProcessGroup | None) -> list[T]:
    """Return `value` of every rank of the group; without a group, this rank's."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@torch.no_grad()
def _run(
    stage: Stage, crossing: Sequence[Tensor], batch: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], list[StreamPart]]:
    """Return what crosses to the next stage, and the measures of this stage's streams."""
    inputs = {name: t.to(stage.device) for name, t in batch.items()}
    carried = dict(zip(stage.piece.crosses_in, crossing, strict=True)) if stage.index else {}
    parts: list[StreamPart] = []
    devices = [stage.device] if stage.device.type == "cuda" else []
    _gather(stage, True)
    with torch.random.fork_rng(devices=devices):  # a router may draw, and training goes on as if nothing had happened
        for unit in stage.units:
            _gather(unit, True)
            crossing_names = [source.name for source in unit.sources if isinstance(source, FromPrevious)]
            watch = StreamInterpreter(without_dropout(unit.piece.graph), crossing_names)
            out = watch.run(*unit.arguments(carried, inputs))
            _gather(unit, False)
            carried |= dict(zip(unit.piece.crosses_out or stage.piece.crosses_out, out, strict=False))
            parts += watch.parts
    _gather(stage, False)
    for part in parts:
        part.separations = [s.cpu() for s in part.separations]
        part.composite = None if part.composite is None else part.composite.cpu()
    return tuple(carried[name] for name in stage.piece.crosses_out), parts


def _gather(module: torch.nn.Module, whole: bool) -> None:
    """Gather the module's own parameters, or free the other ranks' shards, under FSDP."""
    if isinstance(module, FSDPModule):
        module.unshard() if whole else module.reshard()
