"""Write a model's own source with the streams in it."""

from mhc_compile.emitting.emit import emit
from mhc_compile.emitting.folder import emit_folder

__all__ = ["emit", "emit_folder"]
