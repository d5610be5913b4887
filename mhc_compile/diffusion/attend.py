"""Change what the calls of a model see, residual or converted."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

from torch import nn
from torch.fx import GraphModule

from mhc_compile.backend import Compiled, compile_inner
from mhc_compile.capture import private_copy
from mhc_compile.config import Options, split_options
from mhc_compile.diagnostics import MHCError
from mhc_compile.identity import identify
from mhc_compile.owner import BACKEND
from mhc_compile.parameters import attention_of, owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.pipeline import Pipeline

Model = TypeVar("Model", bound=nn.Module)
_attends: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def attend(model: Model, attention: str, **options: Any) -> Model:
    """Compile `model` in place so that its calls see `attention`, and return it: `block:16` or `bidirectional`.

    A residual model stays residual, a converted one keeps its streams. Parameters, gradients and folders are those of
    the model. `options` are fields of `Options` by name (`inner="eager"`).

    Raises MHC204 for other values, and for options of streams. The first call raises MHC113 where the model has no
    causal attention, and MHC104 where its forward is not one graph.
    """
    stream, compiling = split_options(options)
    if stream:
        way_out = "convert the model first: mhc_compile.convert(model, streams=...)"
        raise MHCError("MHC204", f"attend changes no streams: {min(stream)}", way_out=way_out)
    chosen = Options(**compiling, attention=attention)
    if not chosen.masking:
        raise MHCError("MHC204", "attend without attention", way_out='name one: attend(model, "block:16")')
    if owners(model):
        model.compile(backend=BACKEND, options=dict(vars(chosen)), fullgraph=True)
    else:
        model.compile(backend=_Residual(chosen), fullgraph=True)
    _attends[model] = attention
    return model


def block_of(model: nn.Module) -> int:
    """Return the size of the blocks that calls of `model` see, 0 where they see everything.

    Raises MHC204 for a model whose attention is its own.
    """
    attention = _attends.get(model, attention_of([model]))
    if attention is None:
        way_out = 'call mhc_compile.diffusion.attend(model, "block:16") first'
        raise MHCError("MHC204", f"{type(model).__name__} sees what its own masks say", way_out=way_out)
    return Options(attention=attention).masking[0].size


class _Residual:
    """A backend that rewrites masks alone."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Compiled:
        """Rewrite one graph and compile it. The caller's graph is not touched."""
        copy = private_copy(gm)
        identify(copy, example_inputs)
        passes = Pipeline((Normalize(), *self.options.masking))
        copy = passes.run(copy, Context(), debug=bool(self.options.debug))
        return compile_inner(copy, example_inputs, self.options)
