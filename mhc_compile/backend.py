"""The `torch.compile` backend `mhc`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhc_compile import frame
from mhc_compile.attach import graph_inputs, refuse_missing, refuse_wrapped, report_coverage, rewrite_with_parameters
from mhc_compile.capture import find_marks, private_copy
from mhc_compile.config import Options, compile_pipeline, native_pipeline, split_options, stream_spec
from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.identity import ModuleNames, identify
from mhc_compile.kernels import targets
from mhc_compile.kernels.forms import width_of
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.kernels.registration import call_directly
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.memory import prefetch
from mhc_compile.owner import BACKEND, convert_owners
from mhc_compile.parameters import StreamParameters, added_by_lookups, attention_of, owners
from mhc_compile.passes.base import Context, Mark
from mhc_compile.passes.fuse import kernels_in
from mhc_compile.passes.fuse_memory import prepare_hashes
from mhc_compile.passes.match_marks import sites_of
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.passes.probe import Probe
from mhc_compile.passes.recompute import is_tagged
from mhc_compile.passes.results import NATIVE_CODES, ResidualStream
from mhc_compile.probes.recording import recording
from mhc_compile.tracing import traced_error

Compiled = Callable[..., Any]
BackwardCompiler = Callable[..., Any]


def mhc(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Rewrite and compile one graph, as `torch.compile(model, backend="mhc", options={...})` asks.

    Options: the fields of `StreamSpec` (`streams`, `convention`, `manifold`, `iterations`, `exit`, `form`) for an
    unconverted model, and those of `Options` (`inner`, `mode`, `kernels`, `pipeline`, ...). Raises `MHCError`,
    which Dynamo wraps in `BackendCompilerFailed` (`error.inner_exception`).
    """
    stream, own = split_options(options)
    if mode is not None:
        own["mode"] = mode
    return Backend(Options(**own), stream)(gm, example_inputs)


torch._dynamo.register_backend(mhc, name=BACKEND, tags=("debug",))


class Backend:
    """The backend with its options checked: what `torch.compile` calls for every graph."""

    __name__ = "mhc"

    def __init__(self, options: Options, stream: Mapping[str, Any] | None = None) -> None:
        self.options = options
        self.stream = dict(stream or {})
        stream_spec(self.stream)

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Compiled:
        """Rewrite one graph and compile it. The caller's graph is not touched."""
        copy = private_copy(gm)
        names = identify(copy, example_inputs)
        marks = find_marks(copy)
        if marks:
            return self._compile_converted(copy, marks, example_inputs)
        if any(owners(module) for module in frame.modules()):
            # A part of a converted model outside its owners: the head, the loss.
            return compile_inner(copy, example_inputs, self.options)
        return self._compile_unconverted(copy, example_inputs, names)

    def _compile_unconverted(self, gm: GraphModule, example_inputs: list[Any], names: ModuleNames) -> Compiled:
        """Compile what the model writes out by hand, or convert the module that holds its streams.

        The graph is looked at once: what both pipelines begin with, the normal form, is shared.
        """
        debug = self.options.debug
        analysis, _ = compile_pipeline(self._now).split("residual")
        begin, analyse, lift = analysis.shared_with(native_pipeline(self._now))
        context = Context(inputs=list(example_inputs) if debug == "numeric" else [])
        normal = begin.run(private_copy(gm), context, debug=debug)
        lifted = self._lift_native(private_copy(normal), lift, begin.provides, context.inputs)
        if lifted is not None:
            return compile_inner(lifted, example_inputs, self.options)
        for module in frame.modules():
            refuse_wrapped(module)
        try:
            normal = analyse.run(normal, context, debug=debug, provided=begin.provides)
        except MHCError as error:
            if error.code == "MHC101" and not frame.is_whole() and self.options.attention is None:
                # A compiled training step also has graphs without a model in them, such as the optimizer's update.
                if any(node.meta.get("nn_module_stack") for node in gm.graph.nodes):
                    warn("MHC305", frame.broke() or "the graph is a part of what was compiled")
                return compile_inner(gm, example_inputs, self.options)
            if error.code in NATIVE_CODES and self.options.attention is None:
                warn("MHC308", f"{error.detail}, which no known convention computes")
                return compile_inner(gm, example_inputs, self.options)
            raise
        return self._convert_at_first_call(normal, context, example_inputs, names)

    def _lift_native(
        self, gm: GraphModule, passes: Pipeline, provided: Collection[str], inputs: list[Any]
    ) -> GraphModule | None:
        """Lift what the model writes out by hand into the dialect and lower it; return None if there is nothing."""
        context, debug = Context(inputs=inputs), self.options.debug
        lift, kernels = passes.split("native")
        gm = lift.run(gm, context, debug=debug, provided=provided)
        for text in dict.fromkeys(site.spec for site in context.native):
            self._check_options(StreamSpec.parse(text))
        if context.native_reads and self.stream:
            name, option = next(iter(self.stream.items()))
            raise MHCError("MHC304", f"{name}={option!r} is requested, the model has attention over depth of its own")
        lifted = context.native or context.native_reads
        reason = frame.broke() if lifted or context.cut else None
        if reason is not None:
            warn("MHC310", reason)
        if lifted:
            return kernels.run(gm, context, debug=debug, provided={*provided, *lift.provides})
        return None if reason is None else gm

    def _compile_converted(self, gm: GraphModule, marks: list[Mark], example_inputs: list[Any]) -> Compiled:
        _refuse_split_graphs()
        for mark in marks:
            self._check_options(StreamSpec.parse(mark.spec))
        context = Context(marks=marks)
        if self.options.debug == "numeric":
            context.inputs = inputs_at_start(gm, marks, example_inputs)
        # A function that is compiled may have its model from anywhere.
        traced = frame.traced_modules().values()
        attention = attention_of([*traced, *(m for whole in frame.modules() for m in whole.modules())])
        if attention is not None and self.options.attention not in (None, attention):
            raise MHCError("MHC304", f"attention={self.options.attention!r} is requested, the model has {attention!r}")
        passes = compile_pipeline(replace(self._now, attention=self.options.attention or attention))
        refuse_missing(passes, marks)
        if any(mark.probe is not None for mark in marks):
            passes = Pipeline((*passes, Probe()))
        try:
            gm = passes.run(gm, context, debug=self.options.debug)
        except MHCError as error:
            reason = frame.broke()
            if reason is None or error.code not in ("MHC101", "MHC206"):
                raise
            raise traced_error("MHC104", reason, marks[0].owner or type(frame.own_module()).__name__) from error
        if torch.is_grad_enabled() and any(module.training for module in frame.modules()):
            _warn_of_frozen_streams(gm, marks, example_inputs)
        compiled = compile_inner(gm, example_inputs, self.options)
        return recording(compiled, gm, context.probed) if context.probed else compiled

    @property
    def _now(self) -> Options:
        """The options of the current graph: without gradients there is nothing to recompute."""
        return self.options if torch.is_grad_enabled() else self.options.without_recompute()

    def _check_options(self, spec: StreamSpec) -> None:
        for name, option in self.stream.items():
            value = getattr(spec, name)
            if str(getattr(value, "value", value)) != str(getattr(option, "value", option)):
                raise MHCError("MHC304", f"{name}={option!r} is requested, the model has {spec}")

    def _convert_at_first_call(
        self, gm: GraphModule, context: Context, example_inputs: list[Any], names: ModuleNames
    ) -> Compiled:
        """Convert the module being compiled, and run its first call uncompiled.

        `context` has the streams of the analysed graph. Later calls find converted owners, whose frames are new to
        Dynamo and are compiled like those of any converted model, so that a compiled form of this graph would be lost.
        """
        root, coverage = _root_of(context.streams, names), context.coverage
        spec = stream_spec(self.stream)
        parameters, gm = rewrite_with_parameters(root, gm, context, spec, self.options, example_inputs)
        report_coverage(coverage, spec, self.options, whole=False)
        frame.guard_identity(root)

        def first_call(*inputs: Any) -> Any:
            # Not earlier: after this backend has returned, Dynamo makes guards from the model as it traced it.
            if not owners(root):
                convert_owners(root, parameters)
                warn("MHC302", f"{sum(len(p.sites) for p in parameters.values())} sites, {coverage}")
            current = owners(root)  # not `parameters`: an adapter may have its own
            return gm(*inputs, *(t for path in parameters for t in graph_inputs(current[path]).values()))

        return first_call


def _root_of(streams: Sequence[ResidualStream], names: ModuleNames) -> nn.Module:
    """Return the module in which the paths of `streams` begin.

    Raises MHC104 where the owner's own forward breaks, MHC303 where no module's forward holds a stream.
    """
    module, whole = frame.own_module(), frame.compiled()
    roots = set()
    for stream in streams:
        root = names.root(stream.exit)
        in_forward = module is not None and isinstance(whole, nn.Module)
        # In a function, all of the stream must lie in one call of one module.
        stacks = [site.add.meta.get("nn_module_stack") or {"": ("function", None)} for site in stream.sites]
        calls = {(key, path) for key, (path, _) in (next(iter(stack.items())) for stack in stacks)}
        called_here = frame.is_whole() and len(calls) == 1 and all(not path for _, path in calls)
        if root is None or not (in_forward or called_here):
            raise MHCError("MHC303", "the stream lies in a function, not in the forward of a module")
        if not stream.owner and (frame.broke() or frame.resumed()):
            raise traced_error("MHC104", frame.broke() or "the forward breaks before the stream", type(root).__name__)
        if isinstance(whole, nn.Module) and root is not whole:
            _refuse_layer(root, whole)
        roots.add(root)
    if len(roots) > 1:
        raise MHCError("MHC303", f"one graph holds the streams of {len(roots)} modules")
    return roots.pop()


def _refuse_layer(root: nn.Module, whole: nn.Module) -> None:
    path = next((name for name, m in whole.named_modules() if m is root), "")
    parents = [whole.get_submodule(".".join(path.split(".")[:i])) for i in range(1, path.count(".") + 1)]
    if any(isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) for m in parents):
        raise traced_error("MHC104", "the model's forward breaks between its layers", path)


def inputs_at_start(gm: GraphModule, marks: Sequence[Mark], example_inputs: Sequence[Any]) -> list[Any]:
    """Return the graph's inputs with every stream parameter at its function-preserving start."""
    inputs = list(example_inputs)
    position = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    for mark in marks:
        spec = StreamSpec.parse(mark.spec)
        shapes = {name: tuple(inputs[position[node]].shape) for name, node in mark.parameters.items()}
        sites = {site: width_of(spec, i, site, shapes) for i, site in enumerate(sites_of(mark))}
        for name, p in StreamParameters(spec, sites).named_parameters():
            at = position[mark.parameters[name]]
            inputs[at] = p.detach().to(inputs[at].device)
        for name in added_by_lookups(mark.parameters):
            at = position[mark.parameters[name]]
            inputs[at] = torch.zeros_like(inputs[at])
    return inputs


def compile_inner(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    backward: BackwardCompiler | None = None,
) -> Compiled:
    """Hand the rewritten graph to the inner compiler; the kernels it calls are compiled meanwhile.

    Calls that record gradients wait for their kernels, so that every step of a training run computes the same bits.
    Without gradients and without a compiler nothing waits: plain PyTorch serves until the kernels are loaded.

    `backward(gm, example_inputs, compile)` compiles the backward graph instead, with the inner compiler's `compile`,
    at once rather than at the first backward.
    """
    recorded = torch.is_grad_enabled()
    for spec, device in kernels_in(gm):
        targets.prepare(
            spec, device, DIRECTIONS if recorded else ("forward",), wait=recorded or options.compiler != "eager"
        )
    prepare_hashes(gm.graph)
    if options.inner == "eager" and not (options.kinds and is_tagged(gm.graph)):
        if not recorded:
            call_directly(gm.graph)
            gm.recompile()
        return gm.forward
    with functorch_config.patch({**(NOT_CACHED if is_tagged(gm.graph) else {}), **(OWN_BACKWARD if backward else {})}):
        if options.compiler != "inductor":  # of eager, what is to be computed again, which AOTAutograd does
            from torch._dynamo.backends.debugging import aot_eager, boxed_nop

            own = partial(backward, compile=boxed_nop) if backward else None
            return aot_eager(gm, list(example_inputs), bw_compiler=own)
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        prefetches = any(n.target is torch.ops.engram_kernels.prefetch.default for n in gm.graph.nodes)
        overlapping = prefetch.INDUCTOR if prefetches else {}
        patches = {**(list_mode_options(options.mode) if options.mode else {}), **overlapping}
        if backward:
            patches["triton.cudagraphs"] = False  # a recorded backward could not leave a part of itself for later
        inner = partial(_backward_apart, backward) if backward else compile_fx_inner
        with _traced(example_inputs) as inputs:
            return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)  # type: ignore[return-value]


@contextmanager
def _traced(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield inputs as Dynamo hands them over: Inductor's caches pass by what is compiled without its context."""
    if TracingContext.try_get() is not None:
        yield list(inputs)
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(t, static_shapes=True) if isinstance(t, Tensor) else t for t in inputs]


NOT_CACHED = {"enable_autograd_cache": False, "enable_remote_autograd_cache": False}
"""For a graph with tags: AOTAutograd's cache knows graphs by their code, in which tags do not appear."""

OWN_BACKWARD = {
    "force_non_lazy_backward_lowering": True,
    # The first of several compiled functions must not overwrite buffers that others read.
    "donated_buffer": False,
    # Only what Inductor itself returns can be written to this cache.
    **NOT_CACHED,
}
"""Options of AOTAutograd for a backward that is not one compiled function."""


def _backward_apart(backward: BackwardCompiler, gm: GraphModule, inputs: Sequence[Any], *args: Any, **kw: Any) -> Any:
    """Call `compile_fx_inner`, or `backward` for a backward graph."""
    from torch._inductor.compile_fx import compile_fx_inner

    if not kw.get("is_backward"):
        return compile_fx_inner(gm, inputs, *args, **kw)
    del kw["static_input_idxs"]  # of the whole graph
    return backward(gm, inputs, lambda part, part_inputs: compile_fx_inner(part, part_inputs, *args, **kw))


def _warn_of_frozen_streams(gm: GraphModule, marks: list[Mark], inputs: list[Any]) -> None:
    streams = {p for mark in marks for p in mark.parameters.values()}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    trained = {n for n, t in zip(placeholders, inputs, strict=True) if isinstance(t, Tensor) and t.requires_grad}
    if trained and not trained & streams:
        warn("MHC210")


def _refuse_split_graphs() -> None:
    from torch.nn.parallel import DistributedDataParallel

    splits = torch._dynamo.config.optimize_ddp in (True, "ddp_optimizer")
    if splits and DistributedDataParallel._get_active_ddp_module() is not None:
        raise MHCError("MHC306")
