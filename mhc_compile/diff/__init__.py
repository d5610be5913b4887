"""Compare two compiled forms of a model: sites, nodes, bytes moved, numerics."""

from mhc_compile.diff.comparison import Comparison, compare
from mhc_compile.diff.form import Form, form_of, read_form

__all__ = ["Comparison", "Form", "compare", "form_of", "read_form"]
