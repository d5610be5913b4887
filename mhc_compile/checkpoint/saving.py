"""Save a converted model so that nothing loads it as a residual one.

The streams go into a shard of their own. The index has a name that transformers does not look for, and every plain
`from_pretrained` of the folder raises and says what loads it, instead of leaving the streams out (`shim`). A second
index is for transformers' Trainer, which fills a converted model by it (`source.index_for_trainer`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.checkpoint.manifest import NAME as MANIFEST
from mhc_compile.checkpoint.manifest import Manifest, Owner
from mhc_compile.checkpoint.shards import read_shard, sha256, sync, write_shard, write_text
from mhc_compile.checkpoint.shim import SHIM, SHIM_TEXT, guarded
from mhc_compile.checkpoint.skeleton import auto_classes, is_model_class
from mhc_compile.checkpoint.source import (
    CONFIG,
    CONVERTED_INDEX,
    INDEX,
    WEIGHTS,
    index_for_trainer,
    index_text,
    is_index_for_trainer,
    open_checkpoint,
    shard_names,
)
from mhc_compile.checkpoint.staging import check_target, staged, sync_folder
from mhc_compile.checkpoint.table_files import SHARD_BYTES
from mhc_compile.checkpoint.tables import TABLES, write_tables
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import StreamParameters, names, owners, unwrapped

_REFUSED = {
    "push_to_hub": "call model.push_to_hub(repository)",
    "distributed_checkpoint": "gather the weights and pass them as state_dict",
}


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    variant: str | None = None,
    table_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """Save a converted Hugging Face model: transformers' files, the streams' shard, and `mhc.json`.

    The same as the model's own `save_pretrained`, whose arguments it takes, except that weights keep the names that
    they have in memory (else pass `save_original_format=True`): transformers' Trainer resumes by them. A folder with
    other files in it (a trainer's) is added to; an earlier save there is replaced. Load it with
    `mhc_compile.from_pretrained`. A model of `mhc_compile.integrations.trainer.shard` is gathered: all ranks call this,
    and the first one writes. The tables of memories are written in `table_dtype` where it is given: bfloat16, or
    float8_e4m3fn for inference.

    Raises `MHCError`: MHC204 for an argument that would lose the streams, MHC405 for a model that is not from
    transformers, MHC410 for one that is not converted, MHC412 or 413 where the folder cannot be written.
    """
    model = unwrapped(model)
    parameters = distinct_owners(model)
    if not parameters:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    base_save = getattr(type(model), "save_pretrained", None)
    if base_save is None:
        way_out = "mhc_compile.save(model, folder), and mhc_compile.load(model, folder) to load it"
        raise MHCError("MHC405", f"{type(model).__name__} has no save_pretrained", way_out=way_out)
    if variant is not None:
        raise MHCError("MHC204", f"variant={variant!r}: a converted folder has none", way_out="leave it out")
    for name, instead in _REFUSED.items():
        if kwargs.pop(name, False):
            raise MHCError("MHC204", f"{name}=True", way_out=instead)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MHCError("MHC204", "adapters are loaded, and they alone would be saved", way_out="merge or unload them")
    tensors = model.state_dict() if state_dict is None else state_dict
    if getattr(model, "is_distributed_loading_by_transformers", False):  # all ranks are here
        is_main_process &= torch.distributed.get_rank() == 0
        tensors = _gathered(tensors, is_main_process)
    if not is_main_process:
        return
    base, streams = _split(model, parameters, tensors)
    kwargs = {"save_original_format": False, **kwargs}
    # Rows of tables are in files that Trainer does not read: it would go on with others.
    for_trainer = not (kwargs["save_original_format"] or any(p.memories.kinds for p in parameters.values()))

    def write_base(folder: Path) -> Base:
        base_save(model, folder, state_dict=base, **kwargs)
        saved = open_checkpoint(folder)
        if saved.index is not None:
            saved.index.unlink()
        config = (folder / CONFIG).read_bytes()
        (folder / CONFIG).write_bytes(guarded(config, auto_classes(saved.config)))
        write_text(folder / SHIM, SHIM_TEXT)
        # As transformers wrote it: FSDP2 renames the class.
        return saved.config["architectures"][0], [shard.path for shard in saved.shards], saved.metadata

    _write(Path(save_directory), write_base, parameters, streams, table_dtype, for_trainer=for_trainer)


def save(model: nn.Module, folder: str | os.PathLike[str], *, table_dtype: torch.dtype | None = None) -> None:
    """Save any converted module into `folder`: its state dict, the streams' shard, and `mhc.json`.

    Load it with `mhc_compile.load`, which takes the module's code from you. A model of transformers is saved as by
    `save_pretrained`, for which `table_dtype` and what is said of folders in use hold as well.

    Raises `MHCError`: MHC204 for a state dict with anything but tensors, MHC410 for a model that is not converted,
    MHC412 or 413 where the folder cannot be written.
    """
    model = unwrapped(model)
    if is_model_class(type(model)):
        save_pretrained(model, folder, table_dtype=table_dtype)
        return
    parameters = distinct_owners(model)
    if not parameters:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    base, streams = _split(model, parameters, model.state_dict())
    if foreign := [name for name, t in base.items() if not isinstance(t, Tensor)]:
        way_out = "give such values to the module's constructor: only tensors are saved"
        raise MHCError("MHC204", f"the state dict holds {names(foreign)}, no tensors", way_out=way_out)
    _refuse_sharded(base.values())

    def write_base(staging: Path) -> Base:
        paths = []
        for number, tensors in enumerate(_shards(base)):
            paths.append(staging / f"{number}.safetensors")
            write_shard(paths[-1], tensors)
        return type(model).__name__, paths, {}

    _write(Path(folder), write_base, parameters, streams, table_dtype)


def _split(
    model: nn.Module, parameters: Mapping[str, StreamParameters], state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the residual model's weights and the streams' parameters."""
    everything = dict(state_dict)
    of_streams = [f"{prefix(owner)}{name}" for owner, p in parameters.items() for name in p.kept()]
    if lost := [name for name in of_streams if name not in everything]:
        raise MHCError("MHC404", f"the state dict lacks stream parameters: {names(lost)}")
    streams = {name: everything.pop(name) for name in of_streams}
    for owner in owners(model):  # a second path to the same module
        everything = {name: t for name, t in everything.items() if not name.startswith(prefix(owner))}
    _refuse_sharded(streams.values())
    return everything, streams


def _gathered(tensors: Mapping[str, Any], keeps: bool) -> dict[str, Any]:
    """Return a state dict with sharded tensors as whole ones on the CPU, where this rank `keeps` them. A collective."""
    wholes: dict[str, Any] = {}
    for name, t in tensors.items():  # one after the other: a device need not hold the whole model
        whole = t.full_tensor() if hasattr(t, "full_tensor") else t
        if keeps:
            wholes[name] = whole if whole is t else whole.cpu()
    return wholes


def _refuse_sharded(tensors: Iterable[Tensor]) -> None:
    if any(hasattr(t, "full_tensor") for t in tensors):
        raise MHCError("MHC204", "sharded parameters", way_out=_REFUSED["distributed_checkpoint"])


def prefix(owner: str) -> str:
    """Return the prefix of the names of an owner's stream parameters."""
    return f"{owner}.mhc." if owner else "mhc."


def distinct_owners(model: nn.Module) -> dict[str, StreamParameters]:
    """Return `owners`, an owner with several paths by its first."""
    first: dict[int, str] = {}
    parameters = owners(model)
    for path, of_owner in parameters.items():
        first.setdefault(id(of_owner), path)
    return {path: parameters[path] for path in first.values()}


def _refuse_residual_weights(folder: Path) -> None:
    others = [folder / name for name in (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")]
    if present := [path.name for path in others if path.exists() and not is_index_for_trainer(path)]:
        detail = f"{folder} holds {names(present)}, which transformers would load in place of these weights"
        raise MHCError("MHC412", detail)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Divide tensors into files of at most `SHARD_BYTES`, or of one tensor; a tied one has its first name."""
    places: set[tuple[Any, ...]] = set()
    shard: dict[str, Tensor] = {}
    size = 0
    for name, t in tensors.items():
        place = (t.data_ptr(), t.device, t.shape, t.stride(), t.dtype)
        if t.numel() and place in places:
            continue
        places.add(place)
        if shard and size + t.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        # The format takes no two tensors that share memory.
        shard[name] = t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
        size += t.nbytes
    yield shard


Base = tuple[str, list[Path], dict[str, Any]]
"""The residual model's part of a folder: its architecture, its weight files, and the metadata of their index."""


def _write(
    folder: Path,
    write_base: Callable[[Path], Base],
    parameters: Mapping[str, StreamParameters],
    streams: Mapping[str, Tensor],
    table_dtype: torch.dtype | None,
    *,
    for_trainer: bool = False,
) -> None:
    """Write a folder whole or not at all, beginning with the files of `write_base`."""
    folder = folder.absolute().resolve()
    target = folder
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied:
        # The finished files are moved in; a folder that does not hold any is renamed as a whole.
        _refuse_residual_weights(folder)
        target = folder / ".mhc-finished"
        shutil.rmtree(target, ignore_errors=True)  # of a process that was killed
    target = check_target(target)
    with staged(target) as staging:
        _add_streams(staging, write_base(staging), parameters, streams, table_dtype, for_trainer=for_trainer)
    if occupied:
        _move_in(target, folder)


def _add_streams(
    folder: Path,
    base: Base,
    parameters: Mapping[str, StreamParameters],
    streams: Mapping[str, Tensor],
    table_dtype: torch.dtype | None,
    *,
    for_trainer: bool,
) -> None:
    """Renumber the base's weight files, with the streams' file as the last, and write indices and manifest."""
    architecture, paths, metadata = base
    *base_names, streams_file = shard_names(len(paths) + 1, converted=True)
    for name, path in zip(base_names, paths, strict=True):
        path.rename(folder / name)
    digests = {name: sha256(folder / name) for name in base_names}
    digests[streams_file] = write_shard(folder / streams_file, streams)
    write_tables(folder, parameters, dtype=table_dtype)
    files = {name: read_shard(folder / name) for name in digests}
    write_text(folder / CONVERTED_INDEX, index_text(metadata, files))
    if for_trainer:
        write_text(folder / INDEX, index_for_trainer(files))
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb+") as file:
                sync(file)
    Manifest(
        architecture=architecture,
        owners={path: Owner.of(p) for path, p in parameters.items()},
        streams_file=streams_file,
        sha256=digests,
    ).write(folder)


def _move_in(finished: Path, folder: Path) -> None:
    """Move finished files into a folder in use; `mhc.json` is removed first and moved last, as it marks a whole one."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        for name in ("model.mhc*.safetensors", CONVERTED_INDEX, INDEX, *TABLES):
            for old in folder.glob(name):
                old.unlink()
        for path in sorted(finished.iterdir(), key=lambda p: p.name == MANIFEST):
            path.replace(folder / path.name)
        finished.rmdir()
        sync_folder(folder)
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error
