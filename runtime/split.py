"""Compiled functions whose backward runs in halves: the gradients of activations at once, those of weights later."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mhc_compile.backend import compile_inner
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import value
from mhc_compile.passes.split_backward import Part, SplitBackward, split_backward

Values = dict[str, Any]
Run = Callable[[Values], Values]
Accumulate = Callable[[int, Tensor], None]

RECOMPUTED = "_mhc_recomputed"
"""The attribute of an autograd node that holds what was recomputed for its backward: it lives as long as the node."""


class SplitFunction:
    """A compiled graph, called like one, with control over its backward.

    While `defer` is set, a backward returns None for the gradients that only its weights' half computes, and leaves a
    closure in `deferred` that computes them and hands each to `accumulate(position of the input, gradient)`.
    """

    def __init__(self, accumulate: Accumulate) -> None:
        self.defer = True
        self.deferred: list[Callable[[], None]] = []
        """What backwards left to do, the oldest first."""
        self.forward: Callable[..., Any] | None = None
        self.parts: Parts | None = None
        self._accumulate = accumulate
        self._pending: deque[weakref.ref[Any]] = deque()

    def __call__(self, *args: Any) -> Any:
        """Return what the graph returns."""
        assert self.forward is not None
        out = self.forward(*args)
        if self.parts is not None and self.parts.split.recompute is not None:
            self._remember(out)
        return out

    def begin_recompute(self) -> None:
        """Recompute what the next backward reads first; nothing where there is no such backward, or nothing to do.

        Backwards are expected in the order of their forwards. One that comes in another order recomputes for itself.
        """
        while self._pending and self.parts is not None:
            node = self._pending.popleft()()
            # A result that nobody holds any more has no backward to come.
            if node is not None:
                saved = (*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ()))
                values = dict(zip(self.parts.split.placeholders, saved, strict=False))  # but for the gradients
                setattr(node, RECOMPUTED, self.parts.recompute(values))
                return

    def _remember(self, out: Any) -> None:
        results = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        node = next((t.grad_fn for t in results if type(t.grad_fn).__name__ == "CompiledFunctionBackward"), None)
        while self._pending and self._pending[0]() is None:
            self._pending.popleft()
        if node is not None:
            self._pending.append(weakref.ref(node))

    def _recomputed(self) -> Values | None:
        """Return what was recomputed already for the current backward."""
        node = torch._C._current_autograd_node()
        self._pending = deque(r for r in self._pending if r() not in (None, node))
        values: Values | None = getattr(node, RECOMPUTED, None)
        if values is not None:
            delattr(node, RECOMPUTED)
        return values

    def run_backward(self, args: list[Any]) -> list[Any]:
        """Return the gradient of each input, from the values saved for the backward and the outputs' gradients."""
        assert self.parts is not None
        split = self.parts.split
        values: Values = dict(zip(split.placeholders, args, strict=True))
        args.clear()
        begun = self._recomputed()
        values |= self.parts.recompute(values) if begun is None else begun
        values |= self.parts.activations(values)
        if split.weights is not None and self.defer:
            self.deferred.append(partial(self._finish, {name: values[name] for name in split.weights.inputs}))
        else:
            values |= self.parts.weights(values)
        return [None if name is None else values.get(name) for name in split.gradients]

    def _finish(self, kept: Values) -> None:
        assert self.parts is not None
        with torch.no_grad():
            gradients = self.parts.weights(kept)
            for position in self.parts.split.deferred:
                name = self.parts.split.gradients[position]
                assert name is not None
                self._accumulate(position, gradients[name])


def compile_split(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    weights: Collection[int],
    accumulate: Accumulate,
) -> SplitFunction:
    """Compile the lowered graph `gm` as `mhc_compile.backend.compile_inner`, its backward in parts.

    `weights` are the positions of the inputs that are parameters. Both directions are compiled now. Raises MHC635 where
    `options.inner` makes no backward graph, and MHC636 for one tensor as two of the inputs that want a gradient.
    """
    if options.inner == "eager":
        raise MHCError("MHC635", "inner='eager'")
    learning = [t for t in example_inputs if isinstance(t, Tensor) and t.requires_grad]
    if (count := len({id(t) for t in learning})) < len(learning):
        raise MHCError("MHC636", f"{len(learning)} inputs, {count} tensors")
    function = SplitFunction(accumulate)

    def backward(bw: GraphModule, inputs: Sequence[Any], compile: Callable[..., Any]) -> Callable[..., Any]:
        split = split_backward(bw, weights)
        assert len(split.gradients) == len(example_inputs)
        function.parts = _compile_parts(split, inputs, compile)

        run = partial(function.run_backward)
        run._boxed_call = True  # type: ignore[attr-defined]  # takes its arguments as a list, which it empties
        return run

    function.forward = compile_inner(gm, example_inputs, options, backward=backward)
    return function


@dataclass(frozen=True)
class Parts:
    """The compiled parts. Each is a function of the values by name, of which it removes what no later one reads."""

    split: SplitBackward
    recompute: Run
    activations: Run
    weights: Run


def _compile_parts(split: SplitBackward, inputs: Sequence[Any], compile_one: Callable[..., Any]) -> Parts:
    examples = dict(zip(split.placeholders, inputs, strict=True))
    kept = {name for name in split.gradients if name is not None}
    compiled = []
    for part in (split.weights, split.activations, split.recompute):
        compiled.append(_compile_part(part, examples, frozenset(kept), compile_one))
        kept |= set(part.inputs if part is not None else ())
    return Parts(split, *reversed(compiled))


def _compile_part(
    part: Part | None, examples: Mapping[str, Any], kept: frozenset[str], compile_one: Callable[..., Any]
) -> Run:
    if part is None:
        return lambda _: {}
    graph = part.graph.graph
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    inputs = [examples[name] if name in examples else value(placeholders[name]) for name in part.inputs]
    # Inductor: with the strides that the next part was promised.
    graph.output_node().meta["user_visible_output_idxs"] = list(range(len(part.outputs)))
    compiled = compile_one(part.graph, inputs)

    def run(values: Values) -> Values:
        arguments = [values[name] if name in kept else values.pop(name) for name in part.inputs]
        with torch.no_grad():
            return dict(zip(part.outputs, compiled(arguments), strict=True))

    return run
