"""Which graph inputs belong to the model (parameters, buffers) and which a caller passes in."""

from __future__ import annotations

import torch
from torch.fx import Node

from mhc_compile.passes.base import value

OWNED = "mhc_owned"
"""Node metadata set by who sees the real inputs: the path of a parameter or buffer (or True), else False."""
INPUT = "mhc_input"
"""Node metadata: the name of the argument by which the caller passes this tensor."""


def is_owned(node: Node) -> bool:
    """Return whether a placeholder is a parameter or buffer of the model."""
    return bool(node.meta.get(OWNED, isinstance(value(node), torch.nn.Parameter)))
