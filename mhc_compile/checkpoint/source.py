"""Open a checkpoint folder and check that it is complete and supported. No tensor is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_compile.checkpoint.manifest import NAME as MANIFEST
from mhc_compile.checkpoint.shards import Shard, read_json, read_shard
from mhc_compile.checkpoint.shim import NOTICE, SHIM, is_shim
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import names

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERTED_INDEX = "mhc.safetensors.index.json"
"""The index of a converted folder: transformers asks for no such name, whatever configuration and variant it is given,
and reads it where a configuration names it."""
_OWN_MODEL = "give the model that the folder was saved from: mhc_compile.load(model, folder)"
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx",
    ".onnx_data", ".ot", ".npz", ".tflite", ".mlmodel",
}  # fmt: skip
_OTHER_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.index.json", "tf_model.h5", "flax_model.msgpack", "*.gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a configuration and whole safetensors files."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    """In the order of the index."""
    index: Path | None
    """None where one file holds all weights."""
    metadata: dict[str, Any]
    """Of the index."""

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)


def open_checkpoint(
    folder: Path, *, converted: bool = False, configured: bool = True, notice: str = NOTICE
) -> Checkpoint:
    """Read the configuration and the headers of all weight files, of a residual folder or of a `converted` one.

    Without `configured` no configuration is read. `notice` is what it may say in place of a weight file's name.

    Raises MHC401, 402, 403 or 407 for a folder that is none, is incomplete, damaged or pickled, and MHC405 or 406 for a
    configuration that asks for code of its own or is quantised.
    """
    if not folder.is_dir():
        raise MHCError("MHC401", f"{folder} is {'a file' if folder.exists() else 'not there'}")
    weights = [CONVERTED_INDEX] if converted else [WEIGHTS, INDEX]
    path = folder / CONFIG
    config: dict[str, Any] = {}
    if configured and not path.is_file():
        if any((folder / name).exists() for name in weights):
            raise MHCError("MHC402", f"{path} is missing", way_out=_OWN_MODEL if converted else None)
        raise MHCError("MHC401", f"{folder} holds neither {CONFIG} nor {weights[0]}")
    if configured:
        config = read_json(path)
        refuse_config(path, config, notice)
    # transformers prefers the single file where there are both.
    for file in (folder / name for name in weights if not is_index_for_trainer(folder / name)):
        if file.is_file() and file.suffix == ".json":
            shards, metadata = _read_index(file)
            return Checkpoint(folder, config, shards, file, metadata)
        if file.is_file():
            return Checkpoint(folder, config, (read_shard(file),), None, {})
    if not converted and (folder / CONVERTED_INDEX).exists():
        raise MHCError("MHC402", f"{folder} holds a converted model's weights, but {MANIFEST} is missing")
    if pickled := sorted(p.name for pattern in _OTHER_WEIGHTS for p in folder.glob(pattern)):
        raise MHCError("MHC407", f"{folder} holds {names(pickled)}")
    raise MHCError("MHC402", f"{folder} does not hold {' or '.join(weights)}")


def shard_names(count: int, *, converted: bool = False) -> list[str]:
    """Return the names of `count` weight files; of a residual folder a single one has no number."""
    if count == 1 and not converted:
        return [WEIGHTS]
    stem = "model.mhc" if converted else "model"
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_text(metadata: Mapping[str, Any], files: Mapping[str, Shard]) -> str:
    """Return the index of `files`, by their new names, in the format of transformers; `total_size` is counted."""
    size = sum(t.end - t.start for shard in files.values() for t in shard.tensors.values())
    weight_map = {tensor: name for name, shard in files.items() for tensor in shard.tensors}
    content = {"metadata": {**metadata, "total_size": size}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def index_for_trainer(files: Mapping[str, Shard]) -> str:
    """Return what a converted folder has as `INDEX`: by it Trainer fills a converted model that it resumes.

    Trainer reads the `weight_map` alone. `from_pretrained` raises where there is no `metadata`: given a configuration
    from elsewhere, it would load the weights and leave the streams out.
    """
    weight_map = {tensor: name for name, shard in files.items() for tensor in shard.tensors}
    return json.dumps({"note": NOTICE, "weight_map": weight_map}, indent=2) + "\n"


def is_index_for_trainer(path: Path) -> bool:
    """Return whether a file is what `index_for_trainer` returned."""
    return path.name == INDEX and path.is_file() and NOTICE.encode() in path.read_bytes()


def companions(checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """Return the other contents of the folder, as relative paths: files to copy, and files and folders to leave out.

    Weights in any format are left out, because they could be loaded in place of the converted ones, and some are
    pickles. So are sub-folders that hold any (other checkpoints, exports) and hidden ones.
    """
    taken: list[Path] = []
    left: list[Path] = []
    rewritten = {MANIFEST, SHIM, *(shard.path.name for shard in checkpoint.shards)}
    for entry in sorted(checkpoint.folder.iterdir()):
        relative = entry.relative_to(checkpoint.folder)
        if entry.is_dir():
            # Folders are not followed through links; files are: that is how the hub's cache lays out a snapshot.
            inside = [] if entry.is_symlink() else sorted(p for p in entry.rglob("*") if p.is_file())
            if entry.name.startswith(".") or entry.is_symlink() or any(_is_weights(p) for p in inside):
                left.append(relative)
            else:
                taken += [p.relative_to(checkpoint.folder) for p in inside]
        elif entry.name not in rewritten and entry != checkpoint.index and not is_index_for_trainer(entry):
            (taken if entry.is_file() and not _is_weights(entry) else left).append(relative)
    return taken, left


def refuse_links_out(folder: Path, files: Iterable[Path]) -> None:
    """Raise MHC416 where one of `files` is a link out of `folder`, or of the hub's cache around it.

    The cache holds a snapshot `models--x/snapshots/<revision>` as links into `models--x/blobs`.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        allowed.append(root.parents[1] / "blobs")
    for path in files:
        place = path.resolve()
        if not any(place.is_relative_to(above) for above in allowed):
            raise MHCError("MHC416", f"{path} -> {place}")


def _is_weights(path: Path) -> bool:
    is_index = path.suffix == ".json" and ".index" in path.name and bool(set(path.suffixes) & _WEIGHT_SUFFIXES)
    return path.suffix in _WEIGHT_SUFFIXES or is_index


def _read_index(path: Path) -> tuple[tuple[Shard, ...], dict[str, Any]]:
    content = read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise MHCError("MHC402", f"{path} holds no weight_map")
    shards: dict[str, Shard] = {}
    weight_map = {tensor: str(name) for tensor, name in weight_map.items()}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MHCError("MHC402", f"{path} names {name!r}, which is not a safetensors file beside it")
        if not (path.parent / name).is_file():
            raise MHCError("MHC402", f"{path} names the shard {name}, which is missing")
        shards[name] = read_shard(path.parent / name)
    if lost := [tensor for tensor, name in weight_map.items() if tensor not in shards[name].tensors]:
        raise MHCError("MHC402", f"{path} names tensors that are not in their shard: {names(lost)}")
    seen: set[str] = set()
    for name, shard in shards.items():
        if twice := seen & set(shard.tensors):
            raise MHCError("MHC402", f"{path.parent / name} repeats tensors of another shard: {names(sorted(twice))}")
        seen |= set(shard.tensors)
    return tuple(shards.values()), metadata


def refuse_config(path: Path, config: Mapping[str, Any], notice: str = NOTICE) -> None:
    """Raise MHC405 or 406 for a model that needs code of its own, is quantised, or has a weight file but `notice`."""
    for key, value in _items(config):
        if key == "auto_map" and value and not is_shim(value):
            raise MHCError("MHC405", f"{path} names code of its own (auto_map: {names(map(str, value))})")
        if key == "transformers_weights" and value and value != notice:
            raise MHCError("MHC405", f"{path} chooses its weight file itself (transformers_weights: {value})")
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", "unknown method") if isinstance(value, dict) else value
            raise MHCError("MHC406", f"{path} has a {key}: {method}")
    if (path.parent / "adapter_config.json").is_file():
        raise MHCError(
            "MHC405",
            f"{path.parent} holds a PEFT adapter beside the model",
            way_out="merge it into the weights (peft's merge_and_unload), save the model, and convert that",
        )


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a configuration and of nested ones."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _items(value)
