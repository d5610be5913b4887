"""Load a converted folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mhc_compile.checkpoint import hub
from mhc_compile.checkpoint.manifest import Manifest, is_converted, read_manifest
from mhc_compile.checkpoint.saving import prefix
from mhc_compile.checkpoint.shards import Shard, sha256
from mhc_compile.checkpoint.skeleton import (
    configuration,
    is_model_class,
    model_class,
    refuse_misfits,
    transformers_module,
)
from mhc_compile.checkpoint.source import Checkpoint, open_checkpoint
from mhc_compile.checkpoint.tables import check_tokenizer, read_tables
from mhc_compile.config import OPTION_FIELDS, STREAM_FIELDS, Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.tables import Storage
from mhc_compile.owner import convert_owners
from mhc_compile.parameters import StreamParameters, names, owners

STREAM_NAMES = r"(^|\.)mhc\."
"""What matches the names of stream parameters."""
_REFUSED = {
    "variant", "state_dict", "output_loading_info", "trust_remote_code", "subfolder", "gguf_file", "use_safetensors",
    "ignore_mismatched_sizes", "weights_only",
}  # fmt: skip


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    verify: bool = True,
    inner: str | None = None,
    tables: Storage = "device",
    hot_rows: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """Return the converted model of a folder that `convert_folder`, `save_pretrained` or `save` wrote, in eval mode.

    `folder` may be the id of a Hub repository, `org/name`, for which `revision`, `token`, `cache_dir`, `force_download`
    and `local_files_only` mean what they mean for transformers.

    Its class is the one that `config.json` names, of transformers or registered. `model` gives another one: a
    `PreTrainedModel` class; or a residual module, or what makes one, whose own tensors are set to those of the folder.

    `inner`, `mode` and `debug` are those of `convert`: only `attention` is part of the folder. All other keywords
    (`dtype`, `device_map`, `attn_implementation`, ...) are those of transformers' `from_pretrained`. Stream parameters
    keep their own precision, and lie on the device of their owner.

    `verify` compares every weight file with its sha256 in `mhc.json`, for which it is read once more; the streams'
    file is always compared.

    `tables` says where the rows of memories go: to the model's `device`, to the `host`'s memory, or nowhere: `mapped`
    reads those looked up from files of the folder, which must stay. `hot_rows` bounds a cache of rows for those two.

    Raises `MHCError`: MHC204 for a keyword that is refused, MHC208 for a `model` that is converted already, MHC304 for
    a keyword that the folder has settled, MHC401 to 407 for a folder that cannot be read, MHC410 for one that is not
    converted, MHC414 for an `mhc.json` that does not fit, MHC222 to 224 for a tokenizer or a table that is not the
    memory's, MHC417 for a repository that cannot be had.
    """
    download = {name: kwargs.pop(name) for name in hub.OPTIONS & kwargs.keys()}
    path = hub.local_folder(folder, **download)
    options = _options({**kwargs, **({} if inner is None else {"inner": inner})})
    kwargs = {k: v for k, v in kwargs.items() if k not in OPTION_FIELDS}
    by_transformers = model is None or is_model_class(model)
    checkpoint, manifest = open_converted(path, configured=by_transformers)
    if verify:
        base = [shard for shard in checkpoint.shards if shard.path.name != manifest.streams_file]
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock alone
            list(pool.map(refuse_changed, base, repeat(manifest)))
    streams = read_streams(checkpoint, manifest, options)
    for owner, parameters in streams.items():
        check_tokenizer(path, parameters)
        read_tables(path, owner, parameters, storage=tables, hot_rows=hot_rows)
    if by_transformers:
        loaded = _load_base(checkpoint, model or model_class(checkpoint.config), kwargs)
    else:
        loaded = _filled(model, checkpoint, kwargs)
    for owner, parameters in streams.items():
        try:
            first = next(loaded.get_submodule(owner).parameters())
        except (AttributeError, StopIteration) as error:
            raise MHCError("MHC414", f"{checkpoint.folder}: {type(loaded).__name__} has no module {owner!r}") from error
        parameters.to(first.device)
    convert_owners(loaded, streams)
    return loaded


def load(model: nn.Module | Callable[[], nn.Module], folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Return `from_pretrained(folder, model=model, **options)`: what `save` wrote, in the module that you give."""
    return from_pretrained(folder, model=model, **options)


def open_converted(folder: Path, *, configured: bool = True) -> tuple[Checkpoint, Manifest]:
    """Return a converted folder and its manifest, its weight files whole; without `configured` no configuration.

    Raises MHC401 to 407, 410 or 414.
    """
    if not is_converted(folder):
        open_checkpoint(folder)  # whatever else is wrong with it
    manifest = read_manifest(folder)
    checkpoint = open_checkpoint(folder, converted=True, configured=configured)
    if configured and manifest.architecture not in (checkpoint.config.get("architectures") or []):
        raise MHCError("MHC414", f"{folder}: converted as {manifest.architecture}, which config.json does not name")
    return checkpoint, manifest


def refuse_changed(shard: Shard, manifest: Manifest) -> None:
    """Raise MHC414 for a weight file that is not the one that was written."""
    digest = manifest.sha256.get(shard.path.name)
    if digest is not None and digest != sha256(shard.path):
        raise MHCError("MHC414", f"{shard.path} is not the file that was written (sha256)")


def streams_shard(checkpoint: Checkpoint, manifest: Manifest) -> Shard:
    """Return the shard that holds the stream parameters. Raises MHC402 where it is missing."""
    for shard in checkpoint.shards:
        if shard.path.name == manifest.streams_file:
            return shard
    raise MHCError("MHC402", f"{checkpoint.folder / manifest.streams_file} is missing")


def read_streams(checkpoint: Checkpoint, manifest: Manifest, options: Options) -> dict[str, StreamParameters]:
    """Return the stream parameters by owner, tables of memories without rows.

    Raises MHC414 where the shard is not the one that `mhc.json` describes, and MHC304 for another `attention` than the
    folder's.
    """
    shard = streams_shard(checkpoint, manifest)
    streams: dict[str, StreamParameters] = {}
    # Only shapes: what mhc.json says is compared with the file before anything of that size is allocated.
    with torch.device("meta"):
        for path, owner in manifest.owners.items():
            streams[path] = StreamParameters(
                owner.spec,
                owner.sites,
                options=_attending(options, owner.attention),
                memories=owner.memories,
                readers=owner.readers,
                partial=owner.partial,
                skipped=owner.skipped,
            )
    wanted = {f"{prefix(path)}{name}": p.shape for path, owned in streams.items() for name, p in owned.kept().items()}
    stored = {name: torch.Size(tensor.shape) for name, tensor in shard.tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)):
        raise MHCError("MHC414", f"{shard.path} and mhc.json differ in {names(wrong)}")
    refuse_changed(shard, manifest)
    with safe_open(shard.path, framework="pt") as file:
        for path, parameters in streams.items():
            values: dict[str, Tensor] = {
                name: file.get_tensor(f"{prefix(path)}{name}").clone() for name in parameters.kept()
            }
            parameters.load_state_dict(values, assign=True, strict=False)
    return streams


def _attending(options: Options, attention: str | None) -> Options:
    """Return `options` with the `attention` of a folder. Raises MHC304 where both have one and they differ."""
    if attention is not None and options.attention not in (None, attention):
        detail = f"attention={options.attention!r}, and {attention!r} is the folder's"
        way_out = f"leave it out; mhc_compile.diffusion.attend(model, {options.attention!r}) changes the loaded model"
        raise MHCError("MHC304", detail, way_out=way_out)
    return options if attention is None else replace(options, attention=attention)


def _options(kwargs: Mapping[str, Any]) -> Options:
    for name in kwargs:
        if name in STREAM_FIELDS:
            raise MHCError("MHC304", f"{name} was chosen when the folder was converted")
        if name in _REFUSED:
            raise MHCError("MHC204", f"{name} cannot be chosen for a converted folder", way_out="leave it out")
    return Options(**{name: value for name, value in kwargs.items() if name in OPTION_FIELDS})


def _load_base(checkpoint: Checkpoint, cls: Any, kwargs: dict[str, Any]) -> nn.Module:
    """Load the residual model. Raises MHC204 for a `device_map` of several devices, MHC404 for weights that misfit."""
    model, report = load_by_transformers(checkpoint, cls, kwargs)
    refuse_misfits(str(checkpoint.folder), report)
    if len(spread := set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise MHCError(
            "MHC204",
            f"device_map spreads the model over {names(sorted(map(str, spread)))}",
            way_out="choose one device: accelerate's hooks at the others would break the stream into pieces",
        )
    return model


def load_by_transformers(checkpoint: Checkpoint, cls: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the residual model of a folder and transformers' loading report.

    The folder may be converted: its index is named to transformers, and stream parameters are not reported.
    """
    transformers_module()
    ignored = [*(cls._keys_to_ignore_on_load_unexpected or []), STREAM_NAMES]
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    reader: Any = type(cls.__name__, (cls,), body)
    config, kwargs = configuration(cls, checkpoint.folder, kwargs)
    if checkpoint.index is not None:
        config.transformers_weights = checkpoint.index.name
    try:
        model, report = reader.from_pretrained(
            checkpoint.folder,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    finally:
        vars(config).pop("transformers_weights", None)
    vars(model.config).pop("transformers_weights", None)
    model.__class__ = cls
    return model, report


def _filled(model: Any, checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> nn.Module:
    """Return the residual module that `model` is or makes, its tensors set to those of the folder, by name.

    Of tied tensors the folder holds one. Raises MHC204 or 208 for a module that cannot be filled, MHC404 where the
    weights do not fit; it is then left as it was.
    """
    if kwargs:
        raise MHCError("MHC204", f"{next(iter(kwargs))} is for models that transformers makes", way_out="leave it out")
    if not isinstance(model, nn.Module):
        model = model() if callable(model) else model
    if not isinstance(model, nn.Module):
        raise MHCError("MHC204", f"model is {type(model).__name__}", way_out="give a module, or what makes one")
    if owners(model):
        raise MHCError("MHC208", f"{type(model).__name__} holds stream parameters", way_out="give a residual model")
    targets = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if empty := [name for name, t in targets.items() if t.is_meta]:
        raise MHCError(
            "MHC204", f"{names(empty)} on the meta device", way_out='call model.to_empty(device="cpu") first'
        )
    files = {
        name: shard for shard in checkpoint.shards for name in shard.tensors if re.search(STREAM_NAMES, name) is None
    }
    tied = {id(targets[name]) for name in files if name in targets}
    shapes = {name: (files[name].tensors[name].shape, tuple(targets[name].shape)) for name in files.keys() & targets}
    report = {
        "missing_keys": [name for name, t in targets.items() if name not in files and id(t) not in tied],
        "unexpected_keys": files.keys() - targets.keys(),
        "mismatched_keys": [(name, *pair) for name, pair in shapes.items() if pair[0] != pair[1]],
    }
    refuse_misfits(str(checkpoint.folder), report)
    for shard in checkpoint.shards:
        with safe_open(shard.path, framework="pt") as file:
            values = {name: file.get_tensor(name) for name in shard.tensors if name in files}
            model.load_state_dict(values, strict=False)
    return model.eval()
