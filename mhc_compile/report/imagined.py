"""The marks that a model would have in its graph, were it converted."""

from __future__ import annotations

import torch

from mhc_compile.capture import Captured, private_copy
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, Mark, value
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.ownership import OWNED


def imagined_marks(captured: Captured, spec: StreamSpec, options: Options, observer: Observer) -> list[Mark]:
    """The marks that the graph would have, were the model converted: a placeholder for each parameter, of shapes alone.

    Raises `MHCError` as the analysis of the graph does.
    """
    analysed, context = private_copy(captured.graph), Context()
    analysis, _ = compile_pipeline(options).split("residual")
    analysis.run(analysed, context, observer, debug=options.debug)
    graph = captured.graph.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    fake = next(m for n in graph.nodes if (m := getattr(value(n), "fake_mode", None)))
    marks = []
    for owner in dict.fromkeys(s.owner for s in context.streams):
        mine = [s for s in context.streams if s.owner == owner]
        device, n = value(mine[0].exit).device, spec.streams
        shapes: dict[str, tuple[int, ...]] = {}
        sites: list[str] = []
        for stream in mine:
            for site in stream.sites:
                parameters = form_of(spec).parameters(spec, len(sites), stream.hidden)
                shapes |= {f"{site.name}.{name}": p.shape for name, p in parameters.items()}
                sites.append(site.name)
        if spec.exit == "head":
            shapes |= {"head.fn": (n, n * mine[0].hidden), "head.base": (n,), "head.scale": (1,)}
        nodes = {}
        for name, size in shapes.items():
            with graph.inserting_after(last), fake:
                last = graph.placeholder(f"mhc_{owner}_{name}".replace(".", "_").replace("#", "_"))
                last.meta["example_value"] = torch.nn.Parameter(torch.empty(size, device=device))
            last.meta[OWNED] = True
            nodes[name] = last
        marks.append(Mark(owner, str(spec), nodes))
    return marks
