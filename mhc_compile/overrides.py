"""The options of streams and of compiling as keywords: what `convert` takes, and what commands make flags of.

Without PyTorch, so that a command's help appears at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypedDict

from mhc_compile.kernels.spec import Convention, Exit, Manifold

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.passes.pipeline import Pipeline

Inner = Literal["inductor", "aot_eager", "eager"]


class StreamOverrides(TypedDict, total=False):
    """The fields of `StreamSpec` as keywords."""

    streams: int
    """Residual streams, 1 to 8; default 4."""
    convention: Convention | str
    """Whose equations; default paper (arXiv 2512.24880)."""
    manifold: Manifold
    """The kind of mixing matrix; default the convention's."""
    iterations: int
    """Sinkhorn iterations; default 20."""
    exit: Exit
    """How the streams are reduced to one; default the convention's."""
    form: str
    """mhc (default); hc or hc_static, unconstrained Hyper-Connections; or an installed one: docs/choose.md."""


class CompileOverrides(StreamOverrides, total=False):
    """The fields of `StreamSpec` and those of `Options` that are plain values."""

    inner: Inner
    """The compiler of the rewritten graph; default inductor in torch.compile, none in plain calls."""
    mode: str | None
    """Inductor's mode: default, reduce-overhead, max-autotune, ..."""
    kernels: str
    """Which fused kernels may be used: auto (default), all, none, or kinds separated by commas."""
    recompute: int | str
    """Recompute stream activations in the backward pass: off (default), auto, stage, sites per block, or 2GiB."""
    attention: str | None
    """Replace causal attention: block:16, or bidirectional."""
    strict: bool
    """Reject a model if residual adds are left."""
    debug: Literal[False, True, "numeric"]
    """Verify the graph after each pass; numeric: also compare what it computes."""
    disable: str
    """Passes to leave out, separated by commas: recompute, fuse."""
    sites: str
    """Choose which adds become sites, by patterns of names: model.layers.[4-7],*.mlp; default all."""


class Overrides(CompileOverrides, total=False):
    """The fields of `StreamSpec` and of `Options` as keywords."""

    pipeline: Pipeline | str | Callable[[Pipeline], Pipeline] | None
    """The passes in place of the usual ones."""
    filter_fn: Callable[[nn.Module, str], bool] | None
    """Choose which adds become sites, by a function of the module that adds and the name of the site."""
