"""How Dynamo is set to trace a stream owner as one graph, and the coded errors for what it cannot trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic

from mhc_compile.diagnostics import MHCError

RECOMPILE_LIMIT = 64
"""Prefill, decode, each batch layout and training are graphs of their own; Dynamo's default of 8 is soon used up."""


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module or object meanwhile."""
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def tracing_config() -> dict[str, Any]:
    """Return the settings of Dynamo under which an owner is captured as one graph."""
    return {
        # DDP's optimizer would split the owner's graph; its buckets are still reduced as gradients arrive.
        "optimize_ddp": False,
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 4 * RECOMPILE_LIMIT,
        # Hooks put on a layer between two calls must run, as they would in the residual model.
        "skip_nnmodule_hook_guards": False,
        # A model that logs (transformers warns once that checkpointing turns the cache off) is no reason to refuse it.
        _IGNORED: _Functions(set.union(getattr(torch._dynamo.config, _IGNORED), _log_methods())),
    }


def tracing_patcher(*, dynamic: bool) -> Callable[[], Callable[[], None]]:
    """Return what puts `tracing_config` into force, and returns how to undo that.

    Traced for all sizes (`dynamic`), sizes that are equal now, such as a batch and the heads of a cache, stay apart:
    PyTorch would give them one variable, and trace anew where they differ.
    """
    # Numbers of modules, an eps or a scale, stay constants; as variables each costs a guard in Python at every call.
    constants = {"specialize_float": True} if dynamic else {}
    of_dynamo = torch._dynamo.config._make_closure_patcher(**tracing_config(), **constants)
    if not dynamic:
        return of_dynamo
    of_shapes = symbolic._make_closure_patcher(use_duck_shape=False)  # type: ignore[attr-defined]

    def patch() -> Callable[[], None]:
        undo_dynamo, undo_shapes = of_dynamo(), of_shapes()

        def undo() -> None:
            undo_shapes()
            undo_dynamo()

        return undo

    return patch


_IGNORED = next(k for k in ("ignore_logging_functions", "ignore_logger_methods") if hasattr(torch._dynamo.config, k))


class _Functions(set[Any]):
    """A set of functions that lists itself by name: torch 2.11 sorts this setting and writes it as JSON."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(str(getattr(f, "__qualname__", f)) for f in super().__iter__()))


def _log_methods() -> list[Any]:
    names = ("debug", "info", "warning", "error", "critical", "warning_once")  # the last one is transformers'
    return [getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)]


def graph_break_error(owner: nn.Module, error: Exception) -> MHCError:
    """Return MHC104 with Dynamo's own account of the break, or the code of a known cause."""
    account = str(error).replace("\\", "/")
    for place, code in {"/accelerate/hooks.py": "MHC211", "/distributed/fsdp/": "MHC212"}.items():
        if place in account:
            return MHCError(code, module=type(owner).__name__)
    return traced_error("MHC104", str(error), type(owner).__name__)


def traced_error(code: str, account: str, module: str) -> MHCError:
    """Return an error with what Dynamo says of it in `account`: its explanation, its hints, the user's line."""
    lines = [ln.strip() for ln in account.splitlines() if ln.strip()]
    explained = [ln for ln in lines if ln.startswith(("Explanation:", "Hint:"))]
    places = [ln for ln in lines if ln.startswith("File ")]
    return MHCError(code, " ".join(explained or lines[:1]), module=module, source=places[-1] if places else None)
