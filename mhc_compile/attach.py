"""Make the parameters of a model's streams and rewrite its graph with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mhc_compile import carry
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.guard import stream_readers
from mhc_compile.kernels.form import DepthForm
from mhc_compile.kernels.forms import StreamForm, form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT, Start
from mhc_compile.memory.request import NOTHING, Request
from mhc_compile.modes import joined_sites
from mhc_compile.owner import refuse_unconvertible
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.attention import written
from mhc_compile.passes.base import Context, Mark, value
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.marks import Described, inputs_of
from mhc_compile.passes.observer import log
from mhc_compile.passes.ownership import OWNED
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.passes.results import Coverage, ResidualStream
from mhc_compile.selection import chosen_coverage, skipped_sites


def rewrite_with_parameters(
    root: nn.Module,
    gm: GraphModule,
    context: Context,
    spec: StreamSpec,
    options: Options,
    inputs: Sequence[Any],
    *,
    start: Start = DEFAULT,
    request: Request = NOTHING,
    others: Sequence[ResidualStream] = (),
) -> tuple[dict[str, StreamParameters], GraphModule]:
    """Make parameters for the streams of an analysed graph and rewrite it with them; `root` is not changed.

    `context` holds the results of the passes up to `residual`. Returns the argument of `convert_owners`, and the graph
    with further placeholders for `graph_inputs`. What `request` asks for is added to the last owner: the decoder.
    Sites that only `others`, the streams of the other mode, have get parameters as well. Raises the errors of passes,
    and MHC207 as `convert_owners` does.
    """
    streams = context.streams
    if (request.engram or request.ultramem) and not isinstance(form_of(spec), StreamForm):
        raise MHCError("MHC204", f"a memory is added to streams, which form={spec.form!r} does not have")
    parameters: dict[str, StreamParameters] = {}
    joined, partial = joined_sites(sites_of_owners(streams, spec), sites_of_owners(others, spec))
    if not joined:
        raise MHCError("MHC204", f"form={spec.form!r} is written where there is a second attention, and none was found")
    skipped = skipped_sites(root, joined, options)
    refuse_skipping(streams, spec, request, skipped)
    # An inference tensor could never be trained.
    with torch.inference_mode(False):
        for path, every in joined.items():
            sites = {name: hidden for name, hidden in every.items() if name not in skipped[path]}
            if not sites:
                continue
            refuse_unconvertible(_owner(root, path), path)
            stream = [s for s in (*others, *streams) if s.owner == path][-1]
            device = value(stream.exit).device
            lookups = request.of(stream.entry, list(sites)) if path == streams[-1].owner else {}
            readers = stream_readers(s for s in (*streams, *others) if s.owner == path)
            parameters[path] = StreamParameters(
                spec, sites, options=options, start=start, device=device, readers=readers,
                partial=[names & sites.keys() for names in partial[path] if names & sites.keys() != sites.keys()],
                skipped=skipped[path], **lookups,
            )  # fmt: skip
    context.coverage = chosen_coverage(context.coverage, streams, skipped)
    present = sites_of_owners(streams, spec)
    context.marks = [append_parameters(gm, path, p) for path, p in parameters.items() if path in present]
    if options.debug == "numeric":
        context.inputs = [*inputs, *(t for p in parameters.values() for t in graph_inputs(p).values())]
    # The graph runs once, which no kernel is worth compiling for.
    analysis, rest = compile_pipeline(options.without_recompute()).split("residual")
    refuse_missing(rest, context.marks)
    if "fuse" in rest.names:
        rest = rest.replace("fuse", Fuse(()))
    return parameters, rest.run(gm, context, debug=options.debug, provided=analysis.provides)


def refuse_skipping(
    streams: Sequence[ResidualStream], spec: StreamSpec, request: Request, skipped: Mapping[str, Collection[str]]
) -> None:
    """Raise MHC204 where not all adds are sites and the look-ups or the form need them."""
    if not any(skipped.values()):
        return
    if request.engram or request.over_encoding or request.ultramem:
        raise MHCError("MHC204", "a memory is added to streams that begin at the embedding", way_out="leave sites= out")
    form = form_of(spec)
    parts = [stream.without(skipped[stream.owner]) for stream in streams if stream.owner in skipped]
    if isinstance(form, DepthForm) and not form.later_attentions and any(len(part) > 1 for part in parts):
        detail = f"form={spec.form!r} weighs all earlier outputs, and the chosen sites do not follow one another"
        raise MHCError("MHC204", detail, way_out="choose sites without a gap")


def refuse_missing(passes: Pipeline, marks: Sequence[Mark]) -> None:
    """Raise MHC241 for a pipeline without the pass of a look-up that a marked owner has."""
    wanted = {name.replace("_", "") for mark in marks for name in mark.memories.kinds}
    for name in sorted(wanted):
        if name not in passes.names:
            detail = f"the model looks rows up, which {passes} leaves out"
            raise MHCError("MHC241", detail, way_out=f"put {name} after widen")


def report_coverage(coverage: Coverage, spec: StreamSpec, options: Options, *, whole: bool) -> None:
    """Warn of a degenerate conversion, or with `strict` raise MHC109.

    `whole` tells that the graph is that of a model; what was compiled may be a layer of one.
    """
    log.info("%s are part of a stream", coverage)
    coverage = replace(coverage, alone=0) if whole else coverage
    constrained = spec.form == "mhc" and spec.manifold not in ("identity", "unconstrained")
    problem = (coverage if constrained else replace(coverage, short=False)).problem
    if problem and options.strict:
        raise MHCError("MHC109", problem)
    if problem:
        warn("MHC109", problem)


def sites_of_owners(streams: Sequence[ResidualStream], spec: StreamSpec) -> dict[str, dict[str, int]]:
    """Return the sites that are written of every owner path: their names, in the order of the stream, with C."""
    # An owner that is called several times repeats its names.
    every = {
        owner: {site.name: s.hidden for s in streams if s.owner == owner for site in written(s, spec)}
        for owner in dict.fromkeys(s.owner for s in streams)
    }
    return {owner: sites for owner, sites in every.items() if sites}


def _owner(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        detail = f"{type(root).__name__} calls it, but does not hold it as a submodule"
        raise MHCError("MHC207", detail, module=path) from None


def refuse_wrapped(model: nn.Module) -> None:
    """Raise MHC303 for a model inside DDP or FSDP."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrappers = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    if DistributedDataParallel._get_active_ddp_module() is not None or any(
        isinstance(m, wrappers) for m in model.modules()
    ):
        raise MHCError("MHC303", "it is wrapped in DDP or FSDP, which do not know parameters made now")


def graph_inputs(parameters: StreamParameters) -> dict[str | Described, Tensor]:
    """Return the inputs of an owner's graphs besides the model's own: parameters by name, then tables."""
    inputs: list[tuple[str | Described, Tensor]] = [*parameters.in_graph().items()]
    return dict([*inputs, *carry.table_inputs(parameters).items()])


def append_at_start(
    root: nn.Module, gm: GraphModule, spec: StreamSpec, options: Options, streams: Sequence[ResidualStream]
) -> tuple[list[Mark], list[Tensor]]:
    """Append parameters at their start for the owners of `streams`; return their marks and the new inputs' values.

    `gm` is the graph of `root`. Raises MHC204 where `options` choose no site, or not those that the form needs.
    """
    marks: list[Mark] = []
    values: list[Tensor] = []
    devices = {stream.owner: value(stream.exit).device for stream in streams}
    of_owners = sites_of_owners(streams, spec)
    skipped = skipped_sites(root, of_owners, options)
    refuse_skipping(streams, spec, NOTHING, skipped)
    for owner, every in of_owners.items():
        sites = {name: hidden for name, hidden in every.items() if name not in skipped[owner]}
        if not sites:
            continue
        parameters = StreamParameters(spec, sites, device=devices[owner], skipped=skipped[owner])
        marks.append(append_parameters(gm, owner, parameters))
        values += [t.detach() for t in graph_inputs(parameters).values()]
    return marks, values


def append_parameters(gm: GraphModule, owner: str, parameters: StreamParameters) -> Mark:
    """Append a placeholder for each of `graph_inputs` to the graph's inputs; returns the mark that names them."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    fake = next(m for n in gm.graph.nodes if (m := getattr(n.meta.get("example_value"), "fake_mode", None)))
    nodes: dict[str | Described, Node] = {}
    for name, p in graph_inputs(parameters).items():
        words = name if isinstance(name, str) else "_".join(map(str, name))
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(re.sub(r"\W", "_", f"mhc_{owner}_{words}"))
        last.meta["example_value"] = fake.from_tensor(p, static_shapes=True)
        last.meta[OWNED] = True
        nodes[name] = last
    tables = [name for name in nodes if not isinstance(name, str)]
    return Mark(
        owner,
        str(parameters.spec),
        {name: node for name, node in nodes.items() if isinstance(name, str)},
        inputs=dict(zip(inputs_of(tables), (nodes[name] for name in tables), strict=True)),
        memories=parameters.memories,
        partial=parameters.partial,
        skipped=parameters.skipped,
        sites=tuple(parameters.sites),
    )
