"""Find code that runs in training alone, which a check in evaluation would not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mhc_compile.emitting.instrument import Function, Keys, probes
from mhc_compile.modes import in_mode, kept_buffers


def runs_in_training_alone(
    model: nn.Module, functions: Sequence[Function], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Return the places in `functions` where a call has a value in training and none in evaluation, as `file:line`.

    Only values that might be the stream or a branch count, tensors of at least two dimensions: a drawn number that says
    whether a layer runs does not.
    """
    evaluated: dict[bool, set[int]] = {}
    for training in (False, True):
        keys = Keys()  # numbered anew, in the same order
        ran: set[int] = set()

        def probe(key: int, value: Any, ran: set[int] = ran) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                ran.add(key)
            return value

        mode = in_mode(model, training=training)
        with probes(functions, keys, probe), mode, kept_buffers(model), torch.no_grad():
            torch.manual_seed(0)
            model(*args, **kwargs)
        evaluated[training] = ran
    alone = [keys.places[key] for key in sorted(evaluated[True] - evaluated[False])]
    return list(dict.fromkeys(function.line(node) for function, node, _ in alone))
