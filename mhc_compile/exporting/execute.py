"""Run a linalg module on this CPU with torch-mlir's own passes and execution engine: a check of what was lowered."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.exporting.importing import ENTRY, torch_mlir
from mhc_compile.exporting.mlir import run_mlir_passes

_DTYPES = {"f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i1": torch.bool}
_PASSES = (
    "func.func(refback-generalize-tensor-concat,refback-generalize-tensor-pad,tm-tensor-bufferize)",
    "one-shot-bufferize{bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map "
    "copy-before-write}",
    "canonicalize",
    # From here on a result belongs to the caller, constants are copied when returned.
    "buffer-deallocation-pipeline",
    "func.func(refback-munge-memref-copy,tm-tensor-to-loops)",
    "convert-bufferization-to-memref",
    "func.func(convert-linalg-to-loops,lower-affine,llvm-request-c-wrappers)",
    "convert-scf-to-cf",
    "expand-strided-metadata",
    "lower-affine",
    "func.func(refback-expand-ops-for-llvm,arith-expand,convert-math-to-llvm)",
    "convert-math-to-libm",
    "finalize-memref-to-llvm",
    "convert-cf-to-llvm",
    "convert-arith-to-llvm",
    "convert-func-to-llvm",
    "reconcile-unrealized-casts",
)


class Executable:
    """A linalg module from `to_mlir(program, "linalg")`, compiled for this CPU; called with its tensor inputs.

    Raises MHC505 without torch-mlir and MHC506 where a result is no tensor of a dtype that NumPy has, or where the
    module cannot be lowered. The module passed in is not changed.
    """

    def __init__(self, module: Any) -> None:
        ir, runtime = torch_mlir("ir"), torch_mlir("runtime")
        with module.context:
            copy = ir.Module.parse(str(module))
            functions = {
                op.attributes["sym_name"].value: op for op in copy.body.operations if "sym_name" in op.attributes
            }
            kinds = [_kind(ir, t) for t in functions[ENTRY].type.results]
        run_mlir_passes(copy, ",".join(_PASSES))
        self._engine = torch_mlir("execution_engine").ExecutionEngine(copy, opt_level=0)
        self._descriptor = runtime.get_ranked_memref_descriptor
        self._dtypes = [dtype for dtype, _ in kinds]
        # The function writes its results' descriptors one after the other.
        fields = [(f"result{i}", _descriptor_of(rank)) for i, (_, rank) in enumerate(kinds)]
        self._results: type[ctypes.Structure] = type("Results", (ctypes.Structure,), {"_fields_": fields})

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the module's results for `inputs`, as new tensors."""
        arrays = [t.detach().contiguous().numpy() for t in inputs]
        results = self._results()
        arguments = [ctypes.pointer(ctypes.pointer(x)) for x in (results, *map(self._descriptor, arrays))]
        self._engine.invoke(ENTRY, *arguments)
        return [_take(getattr(results, f"result{i}"), dtype) for i, dtype in enumerate(self._dtypes)]


class _Scalar(ctypes.Structure):
    """MLIR's descriptor of a buffer of rank 0."""

    _fields_ = (("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("offset", ctypes.c_int64))


@functools.cache
def _descriptor_of(rank: int) -> type[ctypes.Structure]:
    """Return MLIR's descriptor of a buffer of `rank` dimensions."""
    if rank == 0:
        return _Scalar
    sizes = ctypes.c_int64 * rank
    return type(f"Rank{rank}", (_Scalar,), {"_fields_": (("shape", sizes), ("strides", sizes))})


def _take(result: Any, dtype: torch.dtype) -> Tensor:
    """Return a copy of a result buffer, which is freed."""
    shape, strides = list(getattr(result, "shape", ())), list(getattr(result, "strides", ()))
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        buffer = (ctypes.c_char * (extent * dtype.itemsize)).from_address(
            result.aligned + result.offset * dtype.itemsize
        )
        out.copy_(torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides))
    _free(result.allocated)
    return out


_free = ctypes.CDLL(None).free
_free.argtypes, _free.restype = [ctypes.c_void_p], None


def _kind(ir: Any, result: Any) -> tuple[torch.dtype, int]:
    """Return dtype and rank of a result type."""
    if isinstance(result, ir.RankedTensorType) and (dtype := _DTYPES.get(str(result.element_type))) is not None:
        return dtype, result.rank
    raise MHCError("MHC506", f"a result of type {result}")
