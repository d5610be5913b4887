"""What the streams of a pipeline do on one microbatch, by layer: how far they separate, how much the mixes amplify.

The figures of `mhc_compile.measure`, of a model that is cut into stages on several ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.fx import Graph, GraphModule

from mhc_compile.measure import StreamInterpreter, StreamMeasures, StreamPart, summarise
from mhc_compile.passes.stages import Piece
from mhc_compile.runtime.stage import Stage
from mhc_compile.runtime.unit import FromPrevious, without_dropout


def stream_figures(
    stages: Sequence[Stage], batch: Mapping[str, Tensor], pipe_group: ProcessGroup | None = None
) -> dict[str, float]:
    """Separation and gain of every site, and the composite gain of all of them, by the names of metrics.

    `separation/SITE` (a mean over tokens) and `gain/SITE` (the largest over tokens) with sites named by their modules
    (`model.layers.3#0`), and `composite_gain/forward_mean`, `forward_max`, `backward_mean` and `backward_max`
    (arXiv 2512.24880), with the owner's module path before the last part where a model has several streams.

    `stages`: this rank's, in any order. `batch`: the model's inputs for one microbatch of the shapes that the stages
    were captured with, equal on all ranks of a pipeline. `pipe_group`: those ranks, all of which must call this, and
    all get the figures; None where this rank holds every stage. With FSDP or sharded tables all replicas must call
    this, each with its own microbatch. The stages run in eval mode, without gradients; weights, random states and modes
    stay as they are.
    """
    return named(summarise(_parts(stages, batch, pipe_group)))


def named(measures: Mapping[str, StreamMeasures]) -> dict[str, float]:
    """The measures of all owners under the names of metrics."""
    found: dict[str, float] = {}
    for owner, m in measures.items():
        for kind, values in (("separation", m.separation), ("gain", m.gains)):
            for site, figure in zip(m.sites, values, strict=True):
                found[f"{kind}/{f'{owner}.{site}'.strip('.')}"] = figure
        middle = f"{owner or 'model'}/" if len(measures) > 1 else ""
        found |= {f"composite_gain/{middle}{name}": figure for name, figure in asdict(m.gain).items()}
    return found


def _parts(stages: Sequence[Stage], batch: Mapping[str, Tensor], group: ProcessGroup | None) -> list[StreamPart]:
    """What every stage's streams showed, in the order of the pipeline."""
    mine = {stage.index: stage for stage in stages}
    count = stages[0].count
    holder = _holders(mine, group)
    rank = 0 if group is None else dist.get_rank(group)
    shown: dict[int, list[StreamPart]] = {}
    carried: tuple[Tensor, ...] = ()
    for index in (i for i in range(count) if i in mine):
        stage = mine[index]
        if index and holder[index - 1] != rank:
            carried = tuple(torch.empty_like(t, device=stage.device) for t in stage.example_inputs)
            for tensor in carried:
                dist.recv(tensor, group=group, group_src=holder[index - 1])
        carried, shown[index] = _run(stage, carried, batch)
        if index + 1 < count and holder[index + 1] != rank:
            for tensor in carried:
                dist.send(tensor.contiguous(), group=group, group_dst=holder[index + 1])
    if group is not None:
        every: list[dict[int, list[StreamPart]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(every, shown, group=group)
        shown = {index: parts for one in every for index, parts in one.items()}
    return [part for index in sorted(shown) for part in shown[index]]


def _holders(mine: Mapping[int, Stage], group: ProcessGroup | None) -> dict[int, int]:
    """The rank in `group` that holds each stage."""
    if group is None:
        return dict.fromkeys(mine, 0)
    held: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(held, list(mine), group=group)
    return {index: rank for rank, indices in enumerate(held) for index in indices}


@torch.no_grad()
def _run(
    stage: Stage, crossing: Sequence[Tensor], batch: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], list[StreamPart]]:
    """What crosses to the next stage, and what the streams of this one showed."""
    inputs = {name: t.to(stage.device) for name, t in batch.items()}
    carried = dict(zip(stage.piece.crosses_in, crossing, strict=True)) if stage.index else {}
    parts: list[StreamPart] = []
    devices = [stage.device] if stage.device.type == "cuda" else []
    _gather(stage, True)
    with torch.random.fork_rng(devices=devices):  # a router may draw, and training goes on as if nothing had happened
        for unit in stage.units:
            _gather(unit, True)
            given = [source.name for source in unit.sources if isinstance(source, FromPrevious)]
            watch = StreamInterpreter(_in_eval_mode(unit.piece), given)
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
    """Under FSDP: exchange the module's own parameters so that they are whole, or let the other ranks' shards go."""
    if isinstance(module, FSDPModule) and whole:
        module.unshard()
    elif isinstance(module, FSDPModule):
        module.reshard()


def _in_eval_mode(piece: Piece) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(piece.graph.graph, {}))
    gm = GraphModule(piece.graph, graph)
    without_dropout(gm)
    return gm
