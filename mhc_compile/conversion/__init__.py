"""Convert residual models, in memory (`memory.py`) or as checkpoint folders (`folder.py`), and back."""

from mhc_compile.conversion.folder import convert_folder
from mhc_compile.conversion.memory import convert, to_residual

__all__ = ["convert", "convert_folder", "to_residual"]
