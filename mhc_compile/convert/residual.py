"""Take a converted model back to its residual form, in memory."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mhc_compile.arm import disarm
from mhc_compile.checkpoint.saving import save_without_streams
from mhc_compile.convert.folder import refuse_trained
from mhc_compile.diagnostics import MHCError
from mhc_compile.initialise import start_without_streams
from mhc_compile.parameters import owners
from mhc_compile.traceable import restore_generation

Model = TypeVar("Model", bound=nn.Module)


def to_residual(model: Model) -> Model:
    """Undo `convert`, in place; returns the model. Its weights are those it has now.

    Raises `MHCError`: MHC410 for a model that is not converted, MHC411 once its stream parameters were trained; it is
    then left as it was.
    """
    made = owners(model)
    if not made:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    refuse_trained(made)
    save_without_streams(model)
    start_without_streams(model)
    restore_generation(model)
    for path in made:
        owner = model.get_submodule(path)
        disarm(owner)
        owner._modules.pop("mhc", None)
    return model
