"""Load a Hugging Face model from its configuration alone, or with the weights of its folder if there are any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhc_compile.checkpoint.manifest import NAME, is_converted, read_manifest
from mhc_compile.checkpoint.shards import read_json
from mhc_compile.checkpoint.skeleton import model_class, quiet, transformers_module
from mhc_compile.checkpoint.source import open_checkpoint
from mhc_compile.config import STREAM_FIELDS, Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.loading import from_pretrained
from mhc_compile.owner import convert_owners
from mhc_compile.parameters import StreamParameters

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def configured(path: Path, *, device: str = "meta") -> tuple[nn.Module, bool]:
    """Return the model of a folder or a config.json in eval mode, without its weights, and whether it is converted.

    Of a converted folder mhc.json is read as well; code in the folder is never run. Raises `MHCError`: MHC508 where
    there is no model, MHC405 for an architecture that transformers does not have, MHC414 for an `mhc.json` that does
    not fit.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise MHCError("MHC508", f"{file} is not there")
    config = read_json(file)
    transformers = transformers_module()
    with quiet(transformers):
        try:
            settings = transformers.AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)
            cls: Any = model_class(config) if config.get("architectures") else None
            with torch.device(device):
                model: nn.Module = (
                    transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
                    if cls is None
                    else cls(settings)
                )
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
            raise MHCError("MHC508", f"{file}: {error}") from error
    model.eval()
    if not (path / NAME).is_file():
        return model, False
    owners = read_manifest(path).owners
    try:
        parameters = {
            p: StreamParameters(
                o.spec,
                o.sites,
                options=Options(attention=o.attention),
                device=device,
                memories=o.memories,
                partial=o.partial,
                skipped=o.skipped,
            )
            for p, o in owners.items()
        }
        convert_owners(model, parameters)
    except AttributeError as error:
        raise MHCError("MHC414", f"{path / NAME}: {error}") from error
    return model, True


def refuse_stream_options(path: Path, options: Iterable[str]) -> None:
    """Raise MHC304 where fields of `StreamSpec` are among the options of a converted folder."""
    if settled := sorted(STREAM_FIELDS & set(options)):
        raise MHCError("MHC304", f"{settled[0]}; {path / NAME} says how the folder was converted")


def weighted(path: Path, *, seed: int = 0) -> tuple[nn.Module, bool, bool]:
    """Return the model on the CPU, whether it is converted, and whether its weights are those of the folder.

    Without weights in the folder they are drawn from `seed`. Raises `MHCError` as
    `configured` does, and MHC401 to 407 for weights that cannot be read.
    """
    if not path.is_dir() or not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return *configured(path, device="cpu"), False
    if is_converted(path):
        return from_pretrained(path), True, True
    checkpoint = open_checkpoint(path)
    transformers = transformers_module()
    cls = model_class(checkpoint.config)
    with quiet(transformers):
        try:
            model = cls.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
            )
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
            raise MHCError("MHC508", f"{path}: {error}") from error
    return model.eval(), False, True
