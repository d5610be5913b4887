"""Capture a converted model's forward once, without weights: the graph that stages are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import without_cache
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import attention_of
from mhc_compile.passes.base import Context, is_tensor, value
from mhc_compile.passes.pipeline import WIDENING, Pipeline
from mhc_compile.passes.stages import site_nodes


@dataclass(frozen=True)
class Program:
    """A model's forward in the `mhc` dialect, at the shapes of one microbatch."""

    graph: GraphModule
    """Its inputs are placeholders; its output is a tuple with the logits alone."""
    names: dict[str, str]
    """Placeholder -> the parameter's or buffer's name in the model; user inputs are not among them."""
    inputs: dict[str, str]
    """Placeholder -> the name by which the model's forward takes it."""
    parameters: dict[str, nn.Parameter]
    """As the model holds them: of the right shapes and dtypes, their values do not matter. A tied one has one name."""
    buffers: dict[str, Tensor]
    """With the model's own values: rotary frequencies, the compression of a memory's ids."""
    tables: dict[int, str]
    """The name of each memory's table by the handle that the graph holds."""
    model: nn.Module

    @property
    def sites(self) -> int:
        """L, the residual sites."""
        return len(site_nodes(self.graph.graph))


def capture_program(model: nn.Module, batch: Mapping[str, Tensor]) -> Program:
    """Capture the training forward of `model`, converted but without weights, on a microbatch like `batch`.

    `batch` holds the forward's keyword arguments, `input_ids` `[b, S]` among them; only shapes and dtypes matter.
    Raises what `convert` raises for a forward that is not one graph, MHC501 for a model that is not converted, and
    MHC113 where its attention is to be blocks and the graph has no causal mask.
    """
    model.train()
    captured = capture(model, (), {**batch, **without_cache(model)})
    marks = find_marks(captured.graph)
    if not marks:
        raise MHCError("MHC501", f"{type(model).__name__} holds no stream parameters")
    masking = Options(attention=attention_of(model.modules())).masking
    graph = Pipeline((*WIDENING, *masking)).run(captured.graph, Context(marks=marks))
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    known = {id(t): name for name, t in (*buffers.items(), *parameters.items())}
    inputs_by_id = {id(t): name for name, t in batch.items()}
    names, inputs = {}, {}
    for node, real in zip(graph.graph.find_nodes(op="placeholder"), captured.inputs, strict=True):
        if id(real) in inputs_by_id:
            inputs[node.name] = inputs_by_id[id(real)]
        elif id(real) in known:
            names[node.name] = known[id(real)]
        elif node.users:
            raise MHCError("MHC504", f"{node.name} is no parameter, buffer or tensor of the call")
    _keep_logits(graph, getattr(getattr(model, "config", None), "vocab_size", None))
    tables = {m.handle: name for name, m in model.named_modules() if isinstance(m, MemoryTable)}
    return Program(graph, names, inputs, parameters, buffers, tables, model)


def _keep_logits(graph: GraphModule, vocabulary: int | None) -> None:
    """Make the logits the graph's only output: the first floating-point one with a value for each token and id."""
    output = graph.graph.output_node()
    logits = next((n for n in output.all_input_nodes if _is_logits(n, vocabulary)), None)
    if logits is None:
        raise MHCError("MHC504", "the forward returns no logits [batch, sequence, vocabulary]")
    output.args = ((logits,),)


def _is_logits(node: Node, vocabulary: int | None) -> bool:
    if not is_tensor(node) or not value(node).is_floating_point() or value(node).ndim != 3:
        return False
    return vocabulary is None or int(value(node).shape[-1]) == vocabulary
