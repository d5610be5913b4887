"""Capture a converted model's forward once, without weights: the graph that stages are cut from."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS, LABELS, without_cache
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import attention_of
from mhc_compile.passes.base import Context, is_tensor, module_path, op_name, value
from mhc_compile.passes.graphs import ancestors
from mhc_compile.passes.pipeline import WIDENING, Pipeline
from mhc_compile.passes.routers import count_loads, find_routers, only_chooses
from mhc_compile.passes.stages import outputs_of, site_nodes


@dataclass(frozen=True)
class Program:
    """A model's forward in the `mhc` dialect, at the shapes of one microbatch."""

    graph: GraphModule
    """Its inputs are placeholders; its output is a tuple of the logits and, where the model's loss has terms beside
    that of the tokens, their sum: a scalar, weighted as the model weights it. Counters follow: the load of every
    router's experts."""
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
    biases: dict[str, tuple[str, ...]]
    """Parameter or buffer that balances the loads of experts, and has no gradient -> the counters of these loads."""
    unclear: tuple[str, ...]
    """Vectors without gradient that the model reads for choices alone, in a way that is not known to balance."""
    model: nn.Module

    @property
    def auxiliary(self) -> bool:
        """Whether the model's loss has terms beside that of the tokens."""
        return len(outputs_of(self.graph.graph)) > 1

    @property
    def sites(self) -> int:
        """L, the residual sites."""
        return len(site_nodes(self.graph.graph))


def capture_program(model: nn.Module, batch: Mapping[str, Tensor]) -> Program:
    """Capture the training forward of `model`, converted but without weights, on a microbatch like `batch`.

    `batch` holds the forward's keyword arguments, `input_ids` `[b, S]` among them; only shapes and dtypes matter.
    Raises what `convert` raises for a forward that is not one graph, MHC501 for a model that is not converted, and
    MHC113 where its attention is to be blocks and the graph has no causal mask, and MHC609 for a loss of its own whose
    terms cannot be told apart.
    """
    model.train()
    given: dict[str, Any] = {**batch, **without_cache(model)}
    captured = capture(model, (), given)
    if _scalars(captured.graph):
        # Beside the logits there is a loss of the model itself, whose weight is in the loss of labels alone.
        if LABELS not in inspect.signature(model.forward).parameters:
            raise MHCError("MHC609", f"{type(model).__name__} takes no {LABELS}")
        given[LABELS] = torch.zeros_like(batch[IDS])
        captured = capture(model, (), given)
    marks = find_marks(captured.graph)
    if not marks:
        raise MHCError("MHC501", f"{type(model).__name__} holds no stream parameters")
    masking = Options(attention=attention_of(model.modules())).masking
    graph = Pipeline((*WIDENING, *masking)).run(captured.graph, Context(marks=marks))
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    known = {id(t): name for name, t in (*buffers.items(), *parameters.items())}
    inputs_by_id = {id(t): name for name, t in given.items() if isinstance(t, Tensor)}
    names, inputs = {}, {}
    for node, real in zip(graph.graph.find_nodes(op="placeholder"), captured.inputs, strict=True):
        if id(real) in inputs_by_id:
            inputs[node.name] = inputs_by_id[id(real)]
        elif id(real) in known:
            names[node.name] = known[id(real)]
        elif node.users:
            raise MHCError("MHC504", f"{node.name} is no parameter, buffer or tensor of the call")
    labels = next((node for node, name in inputs.items() if name == LABELS), None)
    auxiliary = None if labels is None else _auxiliary_loss(graph, labels)
    _keep_logits(graph, getattr(getattr(model, "config", None), "vocab_size", None), auxiliary)
    inputs = {node: name for node, name in inputs.items() if name != LABELS}
    tables = {m.handle: name for name, m in model.named_modules() if isinstance(m, MemoryTable)}
    biases = _count_loads(graph, names, inputs)
    outputs = outputs_of(graph.graph)
    unclear = tuple(
        name
        for node in graph.graph.find_nodes(op="placeholder")
        if (name := names.get(node.name, "")) not in biases
        and (name in buffers or (name in parameters and not parameters[name].requires_grad))
        and only_chooses(node, outputs)
    )
    return Program(graph, names, inputs, parameters, buffers, tables, biases, unclear, model)


def _count_loads(graph: GraphModule, names: Mapping[str, str], inputs: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Add a counter for each router, named by its module; return the biases with their counters."""
    output = graph.graph.output_node()
    outputs = output.all_input_nodes
    given = [n for n in graph.graph.find_nodes(op="placeholder") if n.name in inputs]
    routers = find_routers(graph.graph, given, outputs)
    counters: list[str] = []
    biases: dict[str, tuple[str, ...]] = {}
    for router in routers:
        path = module_path(router.indices)
        again = sum(name.partition("#")[0] == path for name in counters)
        counters.append(f"{path}#{again}" if again else path)
        for bias in router.biases:
            biases[names[bias.name]] = (*biases.get(names[bias.name], ()), counters[-1])
    output.args = ((*outputs, *count_loads(graph.graph, routers, counters)),)
    return biases


def _scalars(graph: GraphModule) -> list[Node]:
    """Return the outputs that may be a loss: floating-point scalars."""
    outputs = graph.graph.output_node().all_input_nodes
    return [n for n in outputs if is_tensor(n) and value(n).is_floating_point() and value(n).ndim == 0]


def _auxiliary_loss(graph: GraphModule, labels: str) -> Node | None:
    """Return the sum of the terms of the model's loss that labels do not change; None where there are none.

    Raises MHC609 where the loss depends in another way on a scalar that labels do not change.
    """
    nodes = list(graph.graph.nodes)
    of_labels = {n for n in nodes if n.op == "placeholder" and n.name == labels}
    for node in nodes:
        if any(above in of_labels for above in node.all_input_nodes):
            of_labels.add(node)
    losses = [n for n in _scalars(graph) if n in of_labels]
    if len(losses) != 1:
        raise MHCError("MHC609", f"the forward returns {len(losses)} losses of its labels")
    terms = _terms(losses[0])
    free = [term for term in terms if term not in of_labels]
    above = ancestors(term for term in terms if term in of_labels)
    if mixed := [n for n in _scalars(graph) if n not in of_labels and n in above]:
        raise MHCError("MHC609", f"{losses[0].name} is no sum with a multiple of {mixed[0].name}")
    if not free:
        return None
    with graph.graph.inserting_before(graph.graph.output_node()):
        total = free[0]
        for term in free[1:]:
            total = graph.graph.call_function(operator.add, (total, term))
            total.meta = dict(free[0].meta)
    return total


def _terms(loss: Node) -> list[Node]:
    """Return what is added up to a loss."""
    if op_name(loss) not in ("add", "iadd", "add_") or not all(isinstance(a, Node) for a in loss.args) or loss.kwargs:
        return [loss]
    return [term for operand in loss.all_input_nodes for term in _terms(operand)]


def _keep_logits(graph: GraphModule, vocabulary: int | None, auxiliary: Node | None) -> None:
    """Make the logits and the auxiliary loss the graph's outputs.

    The logits are the first floating-point output with a value for each token and id.
    """
    output = graph.graph.output_node()
    logits = next((n for n in output.all_input_nodes if _is_logits(n, vocabulary)), None)
    if logits is None:
        raise MHCError("MHC504", "the forward returns no logits [batch, sequence, vocabulary]")
    output.args = ((logits,) if auxiliary is None else (logits, auxiliary),)


def _is_logits(node: Node, vocabulary: int | None) -> bool:
    if not is_tensor(node) or not value(node).is_floating_point() or value(node).ndim != 3:
        return False
    return vocabulary is None or int(value(node).shape[-1]) == vocabulary
