"""The graph rewrite of a model, run while Dynamo captures it: what an emitted module is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile.attach import graph_inputs, rewrite_with_parameters
from mhc_compile.capture import private_copy, traced
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.identity import identify
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context

PLAIN = Options(inner="eager", recompute="off")
"""The equations as they are: no kernel, nothing computed again."""


def analysed(graph: GraphModule) -> tuple[GraphModule, Context]:
    """Return the graph after the passes up to `residual`, and what they found."""
    context = Context()
    analysis, _ = compile_pipeline(PLAIN).split("residual")
    return analysis.run(graph, context), context


class GraphRewrite:
    """A residual model that is called with n streams, in the dtype of its own parameters.

    The first call fills `inside`, `outside` and `parameters`. Raises MHC1xx as `convert` does.
    """

    def __init__(self, model: nn.Module, spec: StreamSpec) -> None:
        self.model, self.spec = model, spec
        self.inside: list[Node] = []
        """The values of all streams in the residual graph, which keep the source that made them."""
        self.outside: list[Node] = []
        """The nodes that read their last values."""
        self.parameters: dict[str, StreamParameters] = {}
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return traced(self.model, lambda: self._compiled()(*args, **kwargs))

    def _compiled(self) -> Callable[..., Any]:
        if self.compiled is None:
            self.compiled = torch.compile(self.model, backend=self._rewrite, fullgraph=True, dynamic=False)
        return self.compiled

    def _rewrite(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = private_copy(gm)
        identify(graph, example_inputs)
        graph, context = analysed(graph)
        self.inside = [node for stream in context.streams for node in stream.values]
        self.outside = [user for stream in context.streams for user in stream.exit.users]
        self.parameters, rewritten = rewrite_with_parameters(
            self.model, graph, context, self.spec, PLAIN, example_inputs
        )
        dtype = next(p.dtype for p in self.model.parameters())
        for of_owner in self.parameters.values():
            of_owner.to(dtype)
        own = [t for of_owner in self.parameters.values() for t in graph_inputs(of_owner).values()]
        return lambda *inputs: rewritten(*inputs, *own)
