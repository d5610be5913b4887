"""A graph cut from a program, compiled, with where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mhc_compile.backend import compile_inner
from mhc_compile.capture import private_copy
from mhc_compile.config import Options, lowering
from mhc_compile.passes.base import Context, op_name, value
from mhc_compile.passes.stages import Piece, counters_of, dropout_of, is_random
from mhc_compile.runtime.split import SplitFunction, compile_split

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class FromPrevious:
    """An input that crosses from the unit before."""

    name: str


@dataclass(frozen=True)
class ModelInput:
    """An input of the model's forward, by its name there."""

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
        """The module's present tensor."""
        tensor = getattr(self.module, self.attribute)
        assert isinstance(tensor, Tensor)
        return tensor

    def cast(self) -> Tensor:
        """Return the tensor in `dtype`; one copy serves all microbatches until the master or `casts` changes.

        Every microbatch keeps its copy for its backward pass: as many copies would be larger than the master.
        """
        master = self.tensor
        if master.dtype == self.dtype:
            return master
        key = (master.data_ptr(), master._version)
        if key not in self.casts:
            self.casts.clear()
            self.casts[key] = master.detach().to(self.dtype)
        cast: Tensor = _Cast.apply(master, self.casts[key])
        return cast


class _Cast(torch.autograd.Function):
    """Give a master's gradient the master's dtype; its cast was computed before."""

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
        self.counted: dict[str, Tensor] = {}
        """The sums of its counters over the training forward passes since they were last taken, float64."""

    def forward(self, crossing: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what crosses out of the piece, in its order, or the model's outputs, each contiguous.

        Counters stay here. Only a forward pass counts: what a backward pass recomputes is no output.
        """
        arguments = self.arguments(crossing, inputs)
        out = self.compiled(arguments)(*arguments)
        counters = counters_of(self.piece.graph.graph)
        if self.training:
            for name, count in zip(counters, out[len(out) - len(counters) :], strict=True):
                self.counted[name] = self.counted.get(name, 0) + count.double()
        return tuple(t.contiguous() for t in out[: len(out) - len(counters)])

    def arguments(self, crossing: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the values of the graph's placeholders, each in the dtype in which the graph takes it."""
        return [
            source.cast()
            if isinstance(source, Owned)
            else (crossing if isinstance(source, FromPrevious) else inputs)[source.name]
            for source in self.sources
        ]

    def compiled(self, arguments: Sequence[Tensor]) -> Compiled:
        """Return the function that runs the graph in the present mode, compiled at the first call."""
        trains = self.training or not self._random
        if trains not in self._compiled:
            # What an evaluation compiles first must have gradients when training uses it.
            with torch.set_grad_enabled(trains):
                self._compiled[trains] = self._compile(arguments, trains)
        return self._compiled[trains]

    def _compile(self, arguments: Sequence[Tensor], trains: bool) -> Compiled:
        gm = private_copy(self.piece.graph) if trains else without_dropout(self.piece.graph)
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
        compiled = compile_inner(gm, examples, self.options)
        if text:
            self._shared[text] = compiled
        return compiled

    def _accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a deferred gradient to the parameter at the placeholder `index`."""
        source = self.sources[index]
        assert isinstance(source, Owned)
        parameter = source.tensor
        if parameter.requires_grad:
            gradient = gradient.to(parameter.dtype)
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            else:  # laid out as autograd does: a fused optimizer takes both in the order of their memory
                same = gradient.stride() == parameter.stride()
                parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)


def _example(argument: Tensor, source: Source) -> Tensor:
    """Return a tensor like `argument` that requires a gradient where training computes one."""
    learns = source.tensor.requires_grad if isinstance(source, Owned) else isinstance(source, FromPrevious)
    return argument.detach().requires_grad_(learns and argument.is_floating_point())


def _drops(node: Node) -> bool:
    attends = op_name(node) == "scaled_dot_product_attention"
    return float(node.kwargs.get("dropout_p") or 0.0) > 0 if attends else is_random(node)  # type: ignore[arg-type]


def without_dropout(gm: GraphModule) -> GraphModule:
    """Return a copy of a training graph without its active dropouts."""
    gm = private_copy(gm)
    for node in list(gm.graph.nodes):
        if not _drops(node):
            continue
        if op_name(node) == "scaled_dot_product_attention":
            node.kwargs = {**node.kwargs, "dropout_p": 0.0}
        elif "dropout" in op_name(node) and dropout_of(node) > 0:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return gm


def signature(gm: GraphModule) -> str:
    """Return the graph as text with numbered nodes: equal for layers that differ in their parameters alone."""
    number: dict[Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        number[node] = f"%{len(number)}"
        fake = value(node)
        form = f"{tuple(fake.shape)} {fake.dtype} {fake.device}" if isinstance(fake, Tensor) else ""
        args = map_arg((node.args, node.kwargs), lambda n: number[n])
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append(f"{node.op} {target} {args!r} {form} {node.meta.get('recompute')}")
    return "\n".join(lines)
