"""Graphs as Dynamo hands them over: private copies, marks, and capture without running."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from mhc_compile.diagnostics import MHCError
from mhc_compile.guard import erase_guards
from mhc_compile.identity import identify
from mhc_compile.integrations.transformers import install_recorders, remove_recorders
from mhc_compile.passes.base import Mark, module_path
from mhc_compile.passes.marks import ProbeSlot, Signature, parse_inputs
from mhc_compile.tracing import graph_break_error, traced_error, tracing_config

Result = TypeVar("Result")


@dataclass
class Captured:
    """One graph of a model with the inputs it was captured with."""

    graph: GraphModule
    inputs: list[Any]


def private_copy(gm: GraphModule) -> GraphModule:
    """Return a copy to rewrite: Dynamo reads its own placeholders' metadata after the backend has returned.

    Its code is generated when it is called, like that of Dynamo's own graphs: most copies are only analysed.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output)
    new_last = next(n for n in reversed(graph.nodes) if n.op == "output")
    new_last.meta = dict(last.meta)
    copy = _LazyGraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, body in copy.named_children():
        if isinstance(body, GraphModule):
            setattr(copy, name, private_copy(body))
    return copy


def find_marks(gm: GraphModule) -> list[Mark]:
    """Return the marks that converted owners left in the graph, in graph order, and erase the guards of their layers.

    Raises MHC313 for a layer of a converted model that is called outside of its owner.
    """
    marks = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (torch.ops.mhc.mark, torch.ops.mhc.mark.default):
            _, parameters, signature, tensors, described = node.args
            known = Signature.parse(signature)
            inputs = dict(zip(parse_inputs(described), tensors, strict=True))
            marks.append(
                Mark(
                    owner=module_path(node),
                    spec=known.spec,
                    parameters=dict(zip(known.names, parameters, strict=True)),
                    probe=inputs.pop(ProbeSlot(), None),
                    inputs=inputs,
                    memories=known.memories,
                    partial=known.partial,
                    skipped=known.skipped,
                    sites=known.sites,
                    node=node,
                )
            )
    erase_guards(gm, marks)
    return marks


class _Done(BaseException):
    """Ends the capture before anything is compiled or run.

    No `Exception`: Dynamo would report it as a compilation that failed, in its logs and to tlparse.
    """


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Return the model's forward as one graph, without running it. Raises MHC104 where Dynamo breaks it."""
    captured: list[Captured] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        graph = private_copy(gm)
        identify(graph, example_inputs)
        captured.append(Captured(graph, list(example_inputs)))
        raise _Done

    try:
        traced(model, lambda: torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs))
    except _Done:
        return captured[0]
    raise MHCError("MHC101", "the forward computes nothing that Dynamo captures")


def traced(model: nn.Module, call: Callable[[], Result]) -> Result:
    """Return `call()`, in which Dynamo traces `model` as one graph. Raises MHC104 or MHC111 where it cannot."""
    # Dynamo remembers the sizes it saw: the user's next call of another shape would be traced with dynamic sizes.
    sizes = torch._dynamo.pgo.get_code_state()
    sizes_before = copy.deepcopy(sizes)
    marked = "_is_torch_compile" in vars(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # A whole `nn.TransformerEncoderLayer` as one operator would hide its sites.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Dynamo counts this capture with the model's own compiled graphs.
        with torch._dynamo.config.patch(tracing_config()):
            return call()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MHCError):
            raise error.inner_exception from None
        raise
    # A user error is how Dynamo calls a size or a branch that depends on data.
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        # A mixture of experts that returns its router's logits records them, as hidden states are recorded.
        if "output_capturing.py" in str(error) and install_recorders(model):
            try:
                return traced(model, call)
            finally:
                remove_recorders(model)
        raise graph_break_error(model, error) from error
    except torch._dynamo.exc.TorchRuntimeError as error:
        raise traced_error("MHC111", str(error), type(model).__name__) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        sizes.clear()
        sizes.update(sizes_before)
        if not marked:
            vars(model).pop("_is_torch_compile", None)  # torch.compile sets it
