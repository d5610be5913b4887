"""Exported programs in MLIR, by way of torch-mlir."""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal, get_args

from torch.export import ExportedProgram

from mhc_compile.diagnostics import MHCError
from mhc_compile.exporting.importing import imported, torch_mlir

Dialect = Literal["torch", "linalg"]
# What is left out of torch-mlir's own pipelines: the inliner would dissolve the functions, and the check at the end
# knows no calls.
_TO_TORCH = ("torchdynamo-export-to-torch-backend-pipeline", r"inline(\{[^}]*\})?,")
_TO_LINALG = ("torch-backend-to-linalg-on-tensors-backend-pipeline", ",torch-verify-linalg-on-tensors-backend-contract")
_TO_MATCH = "func.func(torch-match-quantized-custom-ops)"
MAX_REASON = 300
"""Characters of MLIR's account, which quotes whole operations."""


def to_mlir(exported: ExportedProgram, dialect: Dialect = "torch") -> Any:
    """Return `exported` as a `torch_mlir.ir.Module`, in the torch dialect or in linalg on tensors.

    The function `main` is the program: its arguments are the program's tensor inputs, its results the program's
    tensors, in order. What one fused kernel would compute is a private function that `main` calls, named
    `@mhc_<chain>_n<streams>_c<width>_<dtype>` or `@engram_...`; chains that compute the same share one, and so do
    their Sinkhorn projections. The attribute `mhc.name` says what an argument is.

    Parameters and buffers are constants of the module where they have values, and arguments of `main` before the
    inputs where they have none (meta and fake tensors). `str(module)` is the text with all values,
    `module.operation.get_asm(large_resource_limit=8)` the text without.

    Raises `MHCError`: MHC204 for an unknown dialect, MHC505 without torch-mlir, MHC506 where torch-mlir has no form for
    an operation.
    """
    if dialect not in get_args(Dialect):
        raise MHCError("MHC204", f"dialect={dialect!r}; known: {', '.join(get_args(Dialect))}")
    torch_mlir("fx")
    with warnings.catch_warnings():
        # torch's own copying of programs uses a class that it deprecates.
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        module = imported(exported)
    run_mlir_passes(module, _TO_MATCH)
    run_mlir_passes(module, _without(module, *_TO_TORCH))
    if dialect == "linalg":
        run_mlir_passes(module, _without(module, *_TO_LINALG))
        _refuse_leftovers(module)
    return module


def run_mlir_passes(module: Any, passes: str) -> None:
    """Run a pass pipeline over `module` in place. Raises MHC506 with MLIR's own words where one fails."""
    with module.context:
        try:
            torch_mlir("passmanager").PassManager.parse(f"builtin.module({passes})").run(module.operation)
        except torch_mlir("ir").MLIRError as error:
            told = [d.message for d in error.error_diagnostics] or [error.message]
            where = [str(d.location) for d in error.error_diagnostics]
            raise MHCError("MHC506", told[0][:MAX_REASON], source=where[0] if where else None) from error


def _without(module: Any, pipeline: str, unwanted: str) -> str:
    """Return the passes of one of torch-mlir's pipelines without the `unwanted` one."""
    with module.context:
        passes = str(torch_mlir("passmanager").PassManager.parse(f"builtin.module({pipeline})"))
    return re.sub(unwanted, "", passes).removeprefix("builtin.module(").removesuffix(")")


def _refuse_leftovers(module: Any) -> None:
    """Raise MHC506 for an operation of the torch dialect."""
    walk = torch_mlir("ir").WalkResult

    def look(op: Any) -> Any:
        if op.name.startswith(("torch.", "torch_c.")):
            raise MHCError("MHC506", f"{op.name} has no form in linalg", source=str(op.location))
        return walk.ADVANCE

    module.operation.walk(look)
