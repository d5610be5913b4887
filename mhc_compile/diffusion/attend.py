"""Change what the calls of a model see, residual or converted."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile.backend import Compiled, compile_inner
from mhc_compile.capture import private_copy
from mhc_compile.config import Options, split_options
from mhc_compile.diagnostics import MHCError
from mhc_compile.identity import identify
from mhc_compile.owner import compile_anew
from mhc_compile.parameters import attention_of, owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.tracing import tracing_config

Model = TypeVar("Model", bound=nn.Module)
_attends: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def attend(model: Model, attention: str, **options: Any) -> Model:
    """Let calls of `model` see `attention`, in place, and return it: `block:16` or `bidirectional`.

    A residual model stays residual, a converted one keeps its streams. Parameters, gradients and folders are those of
    the model. `options` are fields of `Options` by name (`inner="eager"`).

    A residual model is compiled whole, as by `model.compile`: copies of it, and what another `torch.compile` makes of
    it, see what they saw before.

    Raises MHC204 for other values, and for options of streams. The first call raises MHC113 where the model has no
    causal attention, and Dynamo's error where its forward is not one graph.
    """
    stream, compiling = split_options(options)
    if stream:
        way_out = "convert the model first: mhc_compile.convert(model, streams=...)"
        raise MHCError("MHC204", f"attend changes no streams: {min(stream)}", way_out=way_out)
    chosen = Options(**compiling, attention=attention)
    if not chosen.masking:
        raise MHCError("MHC204", "attend without attention", way_out='name one: attend(model, "block:16")')
    for path, parameters in owners(model).items():
        parameters.options = replace(parameters.options, **compiling, attention=attention)
        compile_anew(model.get_submodule(path))
    if not owners(model):
        model._compiled_call_impl = _compiled(model, _Residual(chosen))
    _attends[model] = attention
    return model


def block_of(model: nn.Module) -> int:
    """Return the size of the blocks that calls of `model` see, 0 where they see everything.

    Raises MHC204 for a model whose attention is its own.
    """
    attention = _attends.get(model, attention_of(model.modules()))
    if attention is None:
        way_out = 'call mhc_compile.diffusion.attend(model, "block:16") first'
        raise MHCError("MHC204", f"{type(model).__name__} sees what its own masks say", way_out=way_out)
    return Options(attention=attention).masking[0].size


def _compiled(model: nn.Module, backend: _Residual) -> Callable[..., Any]:
    """Return what runs calls of `model`. Each model's compiled code is its own: Dynamo limits it by code object."""

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    own = types.FunctionType(call.__code__.replace(), globals(), call.__name__)
    run = torch.compile(own, backend=backend, fullgraph=True)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(tracing_config()):
            try:
                return run(model, *args, **kwargs)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, MHCError):
                    raise error.inner_exception from None
                raise

    return compiled


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
