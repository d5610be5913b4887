"""Run the passes over a captured model one by one, and keep what the graph computes after each."""

from dataclasses import dataclass, field
from typing import Any

import torch
from goldens import graph_text
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from mhc_compile.attach import sites_of_owners
from mhc_compile.capture import Captured, capture
from mhc_compile.config import Options
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, Mark, Pass, value
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.native import Native
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.ownership import OWNED
from mhc_compile.passes.pipeline import ANALYSIS
from mhc_compile.passes.residual import Residual
from mhc_compile.passes.results import ResidualStream
from mhc_compile.passes.verify import verify
from mhc_compile.passes.widen import Widen

CHECKED = Options(inner="eager", debug=True)


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    """The model's forward as Dynamo hands it over."""
    torch._dynamo.reset()
    return capture(model, args, kwargs)


def run(gm: GraphModule, inputs: list[Any]) -> list[Tensor]:
    """What the graph computes: its tensors, from copies of `inputs`."""
    gm.recompile()
    with torch.no_grad():
        out = gm(*(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs))
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def compute(gm: GraphModule, inputs: list[Any]) -> list[Tensor]:
    """The output, and the gradients of its squares by every parameter."""
    gm.recompile()
    values = [x.detach().clone() for x in inputs]
    leaves = [v.requires_grad_() for v, x in zip(values, inputs, strict=True) if isinstance(x, nn.Parameter)]
    (out,) = gm(*values)
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in found)]


def apply(step: Pass, gm: GraphModule, context: Context) -> GraphModule:
    """One pass, linted and verified over the whole graph."""
    gm = step.apply(gm, context)
    gm.graph.lint()
    verify(gm, whole=True, after=step.name)
    return gm


def normal(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """The captured graph in normal form."""
    return apply(Normalize(), captured(model, *args, **kwargs).graph, Context())


def analysed(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[GraphModule, list[ResidualStream]]:
    """The captured graph in normal form and its streams."""
    context = Context()
    gm = ANALYSIS.run(captured(model, *args, **kwargs).graph, context, debug=CHECKED.debug)
    return gm, context.streams


def site_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Full names of the sites in order: owner and site."""
    _, streams = analysed(model, *args, **kwargs)
    return [f"{s.owner}:{site.name}" if s.owner else site.name for s in streams for site in s.sites]


def add_parameters(gm: GraphModule, owner: str, parameters: StreamParameters) -> Mark:
    """Append the stream parameters to the inputs of the graph, as the backend receives them."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    mode = next(m for n in gm.graph.nodes if (m := getattr(value(n), "fake_mode", None)))
    nodes = {}
    for name, p in parameters.named_parameters():
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"mhc_{owner}_{name}".replace(".", "_").replace("#", "_"))
        last.meta.update({"example_value": mode.from_tensor(p, static_shapes=True), OWNED: True})
        nodes[name] = last
    return Mark(owner, str(parameters.spec), nodes)


def randomise(parameters: StreamParameters, seed: int) -> StreamParameters:
    """Stream parameters far from their start, in float64."""
    rng = torch.Generator().manual_seed(seed)
    parameters = parameters.double()
    with torch.no_grad():
        for p in parameters.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * (0.3 if p.ndim > 1 else 1.0))
    return parameters


@dataclass
class Stepped:
    """The passes' work on one model, step by step."""

    inputs: list[Any] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """What the graph computed after each step, the stream parameters at random values."""
    at_start: list[Tensor] = field(default_factory=list)
    """What the rewritten graph computed with the stream parameters at their start."""
    texts: dict[str, str] = field(default_factory=dict)
    streams: list[ResidualStream] = field(default_factory=list)
    parameters: dict[str, StreamParameters] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    graph: GraphModule | None = None


def stepped(model: nn.Module, spec: StreamSpec, *args: Any, fuse: Fuse | None = None, **kwargs: Any) -> Stepped:
    """All passes one by one (`fuse` where it is given, in the model's dtype), every graph run on real inputs."""
    found = captured(model, *args, **kwargs)
    gm, inputs = found.graph, found.inputs
    out = Stepped()

    def record(step: str) -> None:
        out.outputs[step] = run(gm, inputs)
        out.texts[step] = graph_text(gm)

    record("captured")
    context = Context()
    gm = apply(Normalize(), gm, context)
    record("normalize")
    gm = apply(Residual(), gm, context)
    record("residual")
    out.streams = context.streams
    for owner, sites in sites_of_owners(context.streams, spec).items():
        out.parameters[owner] = StreamParameters(spec, sites)
        context.marks.append(add_parameters(gm, owner, out.parameters[owner]))
    start = [*inputs, *(p.detach().clone() for held in out.parameters.values() for p in held.parameters())]
    for i, held in enumerate(out.parameters.values()):
        randomise(held, i)
        if fuse is not None:
            held.float()
    inputs = [*inputs, *(p for held in out.parameters.values() for p in held.parameters())]
    gm = apply(Widen(), gm, context)
    record("widen")
    out.at_start = run(gm, start)
    if fuse is not None:
        gm = apply(fuse, gm, context)
        record("fuse")
    gm = apply(Lower(), gm, context)
    record("lower")
    out.inputs, out.notes, out.graph = inputs, context.notes, gm
    return out


def sites_in_order(out: Stepped) -> list[tuple[Tensor, ...]]:
    """The parameters (phi, alpha and bias) of every site in the order of the graph."""
    found = []
    for stream in out.streams:
        held = out.parameters[stream.owner]
        names = form_of(held.spec).parameters(held.spec, 0, stream.hidden, DEFAULT)
        found += [tuple(held.get_parameter(f"{site.name}.{p}").detach() for p in names) for site in stream.sites]
    return found


def raised(model: nn.Module, *args: Any) -> tuple[Context, GraphModule]:
    """The graph after `native`, which computes what it did before, gradients included."""
    found = captured(model.double(), *args)
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    before = compute(gm, found.inputs)
    gm = apply(Native(), gm, context)
    for a, b in zip(compute(gm, found.inputs), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    return context, gm
