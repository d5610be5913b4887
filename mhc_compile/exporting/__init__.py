"""A converted model as a `torch.export` program that runs without this package, and its MLIR."""

from mhc_compile.exporting.execute import Executable
from mhc_compile.exporting.mlir import to_mlir
from mhc_compile.exporting.program import export

__all__ = ["Executable", "export", "to_mlir"]
