"""`mhc-compile inspect --mlir`: a whole model in MLIR, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.checkpoint.skeleton import transformers_module
from mhc_compile.configured import configured
from mhc_compile.conversion import convert
from mhc_compile.exporting import export, to_mlir
from mhc_compile.exporting.mlir import Dialect
from mhc_compile.parameters import stream_parameters


def mlir_of(path: Path, dialect: Dialect, **options: Any) -> str:
    """Return the model of a folder or a config.json as MLIR, converted with `options` where the folder is not.

    Its parameters are arguments of `main`, named as in the checkpoint and in the dtype of config.json; buffers, which
    the model computes from the configuration (rotary frequencies), are constants. Sizes are those of the example call,
    two sequences of eight tokens. Raises what `configured`, `convert`, `export` and `to_mlir` raise.
    """
    transformers_module()  # brings accelerate, or says what is missing
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model, converted = configured(path, device="cpu")
    if not converted:
        convert(model, **options)
    _fake_parameters(model)
    return str(to_mlir(export(model), dialect))


def _fake_parameters(model: nn.Module) -> None:
    """Make CPU tensors without values of the parameters on the meta device, in the dtype of the configuration."""
    dtype = getattr(model.config, "dtype", None) or torch.float32
    ours = {id(p) for p in stream_parameters(model).values()}
    fakes: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays tied
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if p not in fakes:
                kept = id(p) in ours or not p.is_floating_point()
                with mode:
                    fakes[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype if kept else dtype), p.requires_grad)
            module._parameters[name] = fakes[p]
