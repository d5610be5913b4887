"""Let transformers' `init_weights` start stream parameters that have no values yet, as after `to_empty()`."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from mhc_compile.kernels.engram.tables import MemoryTable
from mhc_compile.parameters import Started, owners

_METHOD = "_init_weights"
"""What a model of transformers starts each of its modules with."""


def start_with_streams(root: nn.Module) -> None:
    """Make every transformers model of `root` that holds streams start them, too, where they have no values now."""
    for held in owners(root).values():
        for module in held.modules():
            # transformers passes by modules that are marked so: what was made or loaded is not drawn again.
            values: Any = not any(t.is_meta for t in module.parameters(recurse=False))
            module._is_hf_initialized = values
    transformers = sys.modules.get("transformers")
    for module in root.modules():
        if transformers is not None and isinstance(module, transformers.PreTrainedModel) and owners(module):
            # On the instance: it is copied and pickled with the module, and leaves classes alone.
            module.__dict__[_METHOD] = functools.partial(_start, module)


def start_without_streams(root: nn.Module) -> None:
    """Undo `start_with_streams`."""
    for module in root.modules():
        own = module.__dict__.get(_METHOD)
        if isinstance(own, functools.partial) and own.func is _start:
            del module.__dict__[_METHOD]


def _start(model: Any, module: nn.Module) -> None:
    if isinstance(module, (Started, MemoryTable)):
        module.reset_parameters()
    else:
        getattr(type(model), _METHOD)(model, module)
