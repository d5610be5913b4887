"""Export a converted model ahead of time."""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export import _trace as torch_export
from torch.fx import GraphModule, Node

from mhc_compile import carry
from mhc_compile.capture import find_marks
from mhc_compile.config import Options
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.exporting.decompose import Decompose, leftovers
from mhc_compile.exporting.outline import Outline, noting_sinkhorn
from mhc_compile.identity import ModuleNames
from mhc_compile.parameters import attention_of, owners
from mhc_compile.passes.base import Context, op_name
from mhc_compile.passes.pipeline import EXPORT, Pipeline
from mhc_compile.tracing import graph_break_error, replaced, tracing_config

_NO_PROGRAM = ("unrecognized type", "attempts to add additional input")
"""Dynamo's words for an output of a class that pytree does not know, and for a number from Python's `random`."""
_one_at_a_time = threading.RLock()


def export(
    model: nn.Module,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Return the n-stream program of a converted model as a `torch.export.ExportedProgram`.

    The program consists of ATen operations alone: saved with `torch.export.save`, it loads and runs where this package
    is not installed. Its state dict has the model's names and shares the model's storage. Inputs, outputs and
    `dynamic_shapes` are those of `torch.export.export`, except that arguments left out of a `dynamic_shapes`
    dictionary are static. Hugging Face models need no example. The model is exported in the mode it is in
    (`model.eval()` for inference), and the program can be trained on.

    Raises `MHCError`: MHC501 for a model that is not converted, MHC104 for a graph break, MHC503 for dynamic shapes
    that the model does not allow, MHC504 for inputs or outputs that no exported program can have. Warns MHC502 where
    the program drops values at random.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not owners(model):
        raise MHCError("MHC501", f"{type(model).__name__} holds no stream parameters")
    args, kwargs = example_args, dict(example_kwargs or {})
    if not args and not kwargs:
        kwargs = example_inputs(model)
    shapes = _complete(model, args, kwargs, dynamic_shapes)
    with _one_at_a_time, _rewriting(model), _quietly():
        program = _export(model, args, kwargs, shapes)
    assert not leftovers(program.graph_module), leftovers(program.graph_module)
    _erase_dead_queries(program)
    if dropping := _first_random(program):
        warn("MHC502", f"{dropping} is active")
    return program


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True)
    except torch._dynamo.exc.UserError as error:
        kinds = torch._dynamo.exc.UserErrorType
        if error.error_type is kinds.CONSTRAINT_VIOLATION:
            raise MHCError("MHC503", _first_paragraph(error)) from error
        if error.error_type in (kinds.INVALID_INPUT, kinds.INVALID_OUTPUT):
            raise MHCError("MHC504", _first_paragraph(error)) from error
        raise graph_break_error(model, error) from error  # a loop or a branch over data
    except torch._dynamo.exc.Unsupported as error:
        raise graph_break_error(model, error) from error
    except AssertionError as error:
        if any(words in str(error) for words in _NO_PROGRAM):
            raise MHCError("MHC504", str(error)) from error
        raise


@contextmanager
def _rewriting(model: nn.Module) -> Iterator[None]:
    """Let our passes rewrite the graph that `torch.export` captures with Dynamo, before it traces that to ATen."""
    capture: Callable[..., GraphModule] = torch_export._export_to_torch_ir

    def captured_and_rewritten(*args: Any, **kwargs: Any) -> GraphModule:
        gm = capture(*args, **kwargs)
        ModuleNames(model, {}).rename(gm)
        context = Context(marks=find_marks(gm))
        if not context.marks:
            raise MHCError("MHC501", "this call reaches none of the model's stream owners")
        masking = Options(attention=attention_of(model.modules())).masking
        return Pipeline((*EXPORT, *masking, Outline(), Decompose())).run(gm, context)

    with (
        torch._dynamo.config.patch(tracing_config()),
        replaced(torch_export, "_export_to_torch_ir", captured_and_rewritten),
        replaced(carry, "EXPORTING", True),
        noting_sinkhorn(),
    ):
        yield


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what torch logs about a guard that it also raises, and about side effects inside transformers."""
    log = logging.getLogger("torch._guards")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
            yield
    finally:
        log.setLevel(level)


def _complete(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """Return `dynamic_shapes` with every argument of the call named. Raises MHC503 for an unknown name."""
    if not isinstance(shapes, Mapping):
        return shapes
    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    if unknown := [name for name in shapes if name not in names]:
        raise MHCError("MHC503", f"no argument {unknown[0]!r} in this call; its arguments: {', '.join(names)}")
    return {name: shapes.get(name) for name in names}


def _first_paragraph(error: Exception) -> str:
    """Return torch's message without its advice on its own functions and the user's stack."""
    text = str(error).split("\n\nThe error above occurred")[0].split("For more information about this error")[0]
    head, _, rest = text.partition("\n\nUser stack:")
    _, fixes, advice = rest.partition("Suggested fixes:")
    return f"{head}\n{fixes}{advice}".strip()


def _graphs(program: ExportedProgram) -> Iterator[GraphModule]:
    """Return the program's graph and those of its regions."""
    return (m for m in program.graph_module.modules() if isinstance(m, GraphModule))


def _erase_dead_queries(program: ExportedProgram) -> None:
    """Erase what the dialect's kernels asked about dtypes: recorded as nodes, read by nobody."""
    for gm in _graphs(program):
        for node in reversed(gm.graph.nodes):
            if not node.users and op_name(node) in ("promote_types", "result_type"):
                gm.graph.erase_node(node)
        gm.recompile()


def _first_random(program: ExportedProgram) -> str | None:
    """Return the first active dropout of the program, by its module path."""
    for node in (n for gm in _graphs(program) for n in gm.graph.nodes):
        if _drops(node):
            stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            return f"{op_name(node)} in {stack[-1][0] or 'the model itself'}"
    return None


def _drops(node: Node) -> bool:
    target = node.target
    if target is torch.ops.aten.dropout.default:
        return bool(node.args[2]) and float(node.args[1]) > 0  # type: ignore[arg-type]
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        p = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return float(p) > 0  # type: ignore[arg-type]
    return False
