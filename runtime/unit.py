"""A graph cut from a program, compiled, with where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mhc_compile.backend import compile_inner
from mhc_compile.config import Options, lowering
from mhc_compile.passes.base import Context, op_name, value
from mhc_compile.passes.stages import Piece, dropout_of, is_random
from mhc_compile.runtime.split import SplitFunction, compile_split

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class FromPrevious:
    """An input that crosses from the unit before."""

    name: str


@dataclass(frozen=True)
class ModelInput:
    """An input of the model's own forward, by its name there."""

    name: str


@dataclass(frozen=True)
class Owned:
    """A parameter or buffer of a module, read at every call: FSDP exchanges it around each of them."""

    module: nn.Module
    attribute: str
    dtype: torch.dtype
    """In which the graph takes it. Masters of parameters are float32 whatever this is."""
    casts: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """The tensor in `dtype`, by where the master lies and how often it was changed."""

    @property
    def tensor(self) -> Tensor:
        """What the module holds now."""
        found = getattr(self.module, self.attribute)
        assert isinstance(found, Tensor)
        return found

    def cast(self) -> Tensor:
        """The tensor in `dtype`; one copy serves all microbatches until the master changes or `casts` is cleared.

        Each microbatch keeps what it was given for its backward pass: as many copies would be more than the master.
        """
        held = self.tensor
        if held.dtype == self.dtype:
            return held
        key = (held.data_ptr(), held._version)
        if key not in self.casts:
            self.casts.clear()
            self.casts[key] = held.detach().to(self.dtype)
        found: Tensor = _Cast.apply(held, self.casts[key])
        return found


class _Cast(torch.autograd.Function):
    """A master in another dtype, made already."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


Source = FromPrevious | ModelInput | Owned


class Unit(nn.Module):
    """Runs one piece of a program.

    Its own parameters, if it has any, are in modules nested under it by their names in the model. With `split` weights'
    gradients can be deferred (`mhc_compile.runtime.split`). `shared` holds what equal units have compiled already.
    """

    def __init__(
        self,
        piece: Piece,
        options: Options,
        *,
        split: bool = False,
        shared: dict[str, Compiled] | None = None,
    ) -> None:
        super().__init__()
        self.piece, self.options, self.split = piece, options, split
        self.sources: tuple[Source, ...] = ()
        """Where each placeholder of the piece's graph comes from."""
        self._shared = {} if shared is None else shared
        self._compiled: dict[bool, Compiled] = {}
        self._random = any(_drops(n) for n in piece.graph.graph.nodes)
        self.functions: list[SplitFunction] = []
        """The compiled functions whose weights' gradients can be deferred."""

    def forward(self, crossing: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What crosses out of the piece, in its order, or the model's outputs, each contiguous."""
        arguments = self.arguments(crossing, inputs)
        found = self.compiled(arguments)(*arguments)
        return tuple(t.contiguous() for t in found)

    def arguments(self, crossing: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of the graph's placeholders."""
        return [resolve(source, crossing, inputs) for source in self.sources]

    def compiled(self, arguments: Sequence[Tensor]) -> Compiled:
        """What runs the graph in the present mode; compiled for tensors like `arguments` when first asked for."""
        trains = self.training or not self._random
        if trains not in self._compiled:
            # What an evaluation asks for first must have gradients when training comes to it.
            with torch.set_grad_enabled(trains):
                self._compiled[trains] = self._compile(arguments, trains)
        return self._compiled[trains]

    def _compile(self, arguments: Sequence[Tensor], trains: bool) -> Compiled:
        graph = Graph()
        graph.output(graph.graph_copy(self.piece.graph.graph, {}))
        gm = GraphModule(self.piece.graph, graph)
        if not trains:
            without_dropout(gm)
        text = "" if self.split else signature(gm)
        if text and text in self._shared:
            return self._shared[text]
        gm = lowering(self.options).run(gm, Context(), debug=self.options.debug, provided=("dialect",))
        examples = [_example(a, s) for a, s in zip(arguments, self.sources, strict=True)]
        if self.split and trains:
            function = compile_split(
                gm,
                examples,
                self.options,
                weights={i for i, s in enumerate(self.sources) if isinstance(s, Owned)},
                accumulate=self._accumulate,
            )
            self.functions.append(function)
            return function
        made = compile_inner(gm, examples, self.options)
        if text:
            self._shared[text] = made
        return made

    def _accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a deferred gradient to the parameter at the placeholder `index`."""
        source = self.sources[index]
        assert isinstance(source, Owned)
        held = source.tensor
        if not held.requires_grad:
            return
        gradient = gradient.to(held.dtype)
        held.grad = gradient if held.grad is None else held.grad.add_(gradient)


def resolve(source: Source, crossing: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a graph is given, in the dtype in which it takes it."""
    if not isinstance(source, Owned):
        return (crossing if isinstance(source, FromPrevious) else inputs)[source.name]
    return source.cast()


def _example(argument: Tensor, source: Source) -> Tensor:
    """Like `argument`, with a gradient to be computed where training will want one."""
    made = argument.detach()
    wanted = source.tensor.requires_grad if isinstance(source, Owned) else isinstance(source, FromPrevious)
    return made.requires_grad_(wanted and made.is_floating_point())


def _drops(node: Node) -> bool:
    attends = op_name(node) == "scaled_dot_product_attention"
    return float(node.kwargs.get("dropout_p") or 0.0) > 0 if attends else is_random(node)  # type: ignore[arg-type]


def without_dropout(gm: GraphModule) -> None:
    """Turn the active dropouts of a training graph off, in place."""
    for node in list(gm.graph.nodes):
        if not _drops(node):
            continue
        if op_name(node) == "scaled_dot_product_attention":
            node.kwargs = {**node.kwargs, "dropout_p": 0.0}
        elif "dropout" in op_name(node) and dropout_of(node) > 0:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def signature(gm: GraphModule) -> str:
    """The graph as text in which nodes are numbered: equal for layers that differ in their parameters alone."""
    number: dict[Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        number[node] = f"%{len(number)}"
        known = value(node)
        form = f"{tuple(known.shape)} {known.dtype} {known.device}" if isinstance(known, Tensor) else ""
        args = map_arg((node.args, node.kwargs), lambda n: number[n])
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append(f"{node.op} {target} {args!r} {form} {node.meta.get('recompute')}")
    return "\n".join(lines)
