"""Take a converted model back to its residual form, in memory."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mhc_compile.conversion.folder import refuse_trained
from mhc_compile.diagnostics import MHCError
from mhc_compile.owner import restore_owners
from mhc_compile.parameters import owners

Model = TypeVar("Model", bound=nn.Module)


def to_residual(model: Model) -> Model:
    """Undo `convert`, in place; returns the model. Its weights are those it has now, and nothing else of it is changed.

    Raises `MHCError`: MHC410 for a model that is not converted, MHC411 once its stream parameters were trained; it is
    then left as it was.
    """
    made = owners(model)
    if not made:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    refuse_trained(made)
    restore_owners(model)
    return model
