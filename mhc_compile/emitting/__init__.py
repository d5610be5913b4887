"""Write a model's own source with the streams in it."""

from mhc_compile.emitting.emit import emit

__all__ = ["emit"]
