"""Convert a checkpoint folder, one piece of a weight file in memory at a time, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

from torch import nn

from mhc_compile.checkpoint import layouts
from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.checkpoint.layouts import Layout, LayoutName
from mhc_compile.checkpoint.manifest import Manifest, Owner, is_converted
from mhc_compile.checkpoint.saving import prefix
from mhc_compile.checkpoint.shards import (
    Shard,
    copy_file,
    copy_shard,
    read_shard,
    read_tensors,
    sync,
    write_shard,
    write_text,
)
from mhc_compile.checkpoint.shim import SHIM, SHIM_TEXT, guarded, unguarded
from mhc_compile.checkpoint.skeleton import auto_classes, skeleton
from mhc_compile.checkpoint.source import (
    CONFIG,
    CONVERTED_INDEX,
    INDEX,
    Checkpoint,
    companions,
    index_text,
    open_checkpoint,
    refuse_links_out,
    shard_names,
)
from mhc_compile.checkpoint.staging import check_target, staged
from mhc_compile.checkpoint.tables import read_tokenizer, write_tables
from mhc_compile.config import STREAM_FIELDS, Options, overridden, split_options
from mhc_compile.conversion.memory import convert_streams, refuse_attention, refuse_trained
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.kernels.start import Start, StartName, start_of
from mhc_compile.loading import open_converted, read_streams, streams_shard
from mhc_compile.memory.parameters import tables as tables_of
from mhc_compile.memory.request import requested
from mhc_compile.overrides import StreamOverrides
from mhc_compile.parameters import owners
from mhc_compile.progress import Progress, reported

Form = Literal["mhc", "residual"]


@dataclass(frozen=True)
class Converted:
    """What `convert_folder` wrote."""

    folder: Path
    sites: int
    """Residual sites that have streams now; 0 for a residual folder."""
    adds: str
    """How many residual adds of a forward have streams: `48 of 48 adds`; empty where no streams were added."""
    parameters: int
    """Stream parameters added, removed, or written in a layout."""
    left_out: tuple[Path, ...]
    """Files and folders of the input that were not copied: weights in other formats, folders with weights."""
    difference: float = 0.0
    """The largest of a coefficient that the conventions of a layout and of the folder make; 0 where they are one."""


class FolderOverrides(StreamOverrides, TypedDict, total=False):
    """The options of a folder as keywords: the fields of `StreamSpec`, `strict`, and what chooses sites."""

    strict: bool
    sites: str
    filter_fn: Callable[[nn.Module, str], bool] | None


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Form = "mhc",
    progress: bool | Progress = False,
    spec: StreamSpec | None = None,
    start: StartName | None = None,
    engram: str | MemorySettings | None = None,
    over_encoding: str | OverEncodingSettings | None = None,
    ultramem: str | UltraMemSettings | None = None,
    layout: LayoutName | None = None,
    **overrides: Unpack[FolderOverrides],
) -> Converted:
    """Convert a folder that transformers saved into a new one; `source` is only read. It may be a Hub id, `org/name`.

    The weights are copied file by file and never held in memory. The stream parameters, at their function-preserving
    start, become a further shard; `config.json`, the tokenizer and the like are copied. Load the result with
    `mhc_compile.from_pretrained`; a plain `from_pretrained` of it raises. `target` appears when everything in it is
    on the disk, or not at all.

    `engram`, `over_encoding` and `ultramem` add look-ups as `convert` does, with the folder's own tokenizer where ids
    are to be compressed. Their tables are files of their own, written a block at a time.

    `progress=True` shows a bar; a function is called with the bytes written, their total, and the current step instead.

    `spec` describes the streams; `overrides` are its fields by name, `strict`, `sites` and `filter_fn`; `start` is that
    of `convert`. With
    `to="residual"` the folder of a converted model becomes the residual checkpoint again, bit by bit, as long as its
    stream parameters are at their start.

    With `layout` a converted folder, trained or not, becomes one whose stream parameters have the names, shapes and
    order of rows of another system: `deepseek_v4` those of Hugging Face's modules, `nemo` those of DeepSeek's release,
    `megatron` and `megatron_dev` those of two branches of Megatron-Core (docs/convert.md). A folder that has them
    becomes a converted one, in the layout's `convention` or the one given, with the `iterations` of the configuration
    or those given.

    Raises `MHCError`: MHC1xx where the model's streams cannot be followed, MHC2xx for options, MHC401 to 408 for a
    folder that cannot be converted, MHC409 to 411 for one in the other form already or with trained streams, MHC412
    and 413 where the result cannot be written, MHC414 for a damaged `mhc.json` or changed weights, MHC416 for a link to
    a file outside of the folder, MHC418 for streams that a layout has no place for.
    """
    if to not in get_args(Form):
        raise MHCError("MHC204", f"to={to!r}; known: {', '.join(get_args(Form))}")
    _refuse_options_of_loading(overrides)
    stream, options = overridden(spec, None, overrides)
    lookups = {"engram": engram, "over_encoding": over_encoding, "ultramem": ultramem}
    arguments = {"spec": spec, "start": start, **lookups, **overrides}
    source, target = local_folder(source), Path(target)
    try:
        with reported(progress, in_bytes=True) as report:
            if layout is not None:
                return _in_layout(source, target, layouts.find(layout), {"to": to, **arguments}, options, report)
            if to == "mhc":
                return _to_streams(source, target, stream, options, start_of(start or "default"), lookups, report)
            if meaningless := [name for name, value in arguments.items() if value is not None]:
                raise MHCError("MHC204", f"{meaningless[0]} has no meaning for to='residual'", way_out="leave it out")
            return _to_residual(source, target, report)
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error


def _refuse_options_of_loading(overrides: Mapping[str, Any]) -> None:
    """Raise MHC204 for options that are not those of a folder."""
    known = {*STREAM_FIELDS, "strict", "sites", "filter_fn"}
    if unknown := min(split_options(overrides)[1].keys() - known, default=None):
        detail = f"{unknown} is chosen when the folder is loaded; known here: {', '.join(sorted(known))}"
        raise MHCError("MHC204", detail)


def _in_layout(
    source: Path,
    target: Path,
    layout: Layout,
    arguments: Mapping[str, Any],
    options: Options,
    progress: Progress,
) -> Converted:
    """Write a converted folder in a layout, or read one that is in it. Raises MHC204 for options that mean nothing."""
    converted = is_converted(source)
    meant = {"convention", "iterations", "strict"} if not converted else set()
    given = {name: value for name, value in arguments.items() if value is not None and (name, value) != ("to", "mhc")}
    if meaningless := [name for name in given if name not in meant]:
        where = f"is that of {source} and cannot be chosen" if converted else "is not chosen but read"
        raise MHCError("MHC204", f"{meaningless[0]} beside layout={layout.name!r} {where}", way_out="leave it out")
    if converted:
        return _to_layout(source, target, layout, progress)
    return _from_layout(source, target, layout, given, options, progress)


def _to_streams(
    source: Path,
    target: Path,
    spec: StreamSpec,
    options: Options,
    start: Start,
    lookups: Mapping[str, Any],
    progress: Progress,
) -> Converted:
    if is_converted(source):
        raise MHCError("MHC409", str(source))
    checkpoint = open_checkpoint(source)
    others = _companions(checkpoint)
    target = check_target(target, source, size=checkpoint.size)
    progress(0, checkpoint.size, "finding the streams")
    model = skeleton(checkpoint)
    request = requested(model, **lookups, tokenizer=lambda: read_tokenizer(source), tables_on="meta")
    coverage = convert_streams(model, (), {}, spec, options, request, start=start)
    return _write_streams(checkpoint, others, model, str(coverage), target, progress)


def _from_layout(
    source: Path,
    target: Path,
    layout: Layout,
    arguments: Mapping[str, Any],
    options: Options,
    progress: Progress,
) -> Converted:
    """Read the hyper-connections of `source` in a layout into the streams of its residual model."""
    whole = open_checkpoint(source, notice=layouts.notice(layout))
    others = _companions(whole)
    stored = {name: s for s in whole.shards for name in s.tensors if layouts.is_of(layout, name)}
    shapes = {name: shard.tensors[name].shape for name, shard in stored.items()}
    theirs = layouts.spec_of(layout, shapes, whole.config, arguments.get("iterations"))
    shards = tuple(shard.without(stored) for shard in whole.shards)
    removed = sum(math.prod(shape) for shape in shapes.values())
    checkpoint = replace(whole, shards=shards, metadata=_count_parameters(whole.metadata, -removed))
    target = check_target(target, source, size=whole.size)
    progress(0, checkpoint.size, "finding the streams")
    spec = replace(theirs, convention=Convention(arguments.get("convention", theirs.convention)))
    model = _skeleton_below(checkpoint, whole)
    coverage = convert_streams(model, (), {}, spec, options)
    difference = layouts.from_layout(layout, read_tensors(stored), theirs, owners(model))

    def edit(config: bytes) -> bytes:
        return layouts.without_entries(layout, theirs, config)

    done = _write_streams(checkpoint, others, model, str(coverage), target, progress, edit=edit)
    return replace(done, difference=difference)


def _skeleton_below(checkpoint: Checkpoint, whole: Checkpoint) -> nn.Module:
    """Return the model of a checkpoint without the hyper-connections that lie in the whole one.

    Where they are the model's own, it is the whole one's, which is no residual model.
    """
    try:
        return skeleton(checkpoint)
    except MHCError as error:
        try:
            return skeleton(whole)
        except MHCError:
            raise error from None


def _write_streams(
    checkpoint: Checkpoint,
    others: tuple[list[Path], list[Path]],
    model: nn.Module,
    adds: str,
    target: Path,
    progress: Progress,
    *,
    edit: Callable[[bytes], bytes] = bytes,
) -> Converted:
    """Write the folder of a converted skeleton: the checkpoint's weights and `_companions`, and the streams' shard."""
    taken, left = others
    parameters = owners(model)
    tables = sum(t.weight.nbytes for of_owner in parameters.values() for _, t in tables_of(of_owner))
    check_target(target, checkpoint.folder, size=checkpoint.size + tables)
    streams = {f"{prefix(owner)}{name}": t for owner, p in parameters.items() for name, t in p.kept().items()}
    shards = [shard for shard in checkpoint.shards if shard.tensors or not shard.partial]
    _refuse_clash(streams, shards)
    *base_names, streams_file = shard_names(len(shards) + 1, converted=True)
    added = sum(p.numel() for p in streams.values())
    with staged(target) as staging:
        files, sha256 = _copy(checkpoint, shards, base_names, staging, progress, refuse_nonfinite=True)
        sha256[streams_file] = write_shard(staging / streams_file, streams)
        files[streams_file] = read_shard(staging / streams_file)
        if tables:
            progress(checkpoint.size, checkpoint.size, "writing tables")
            write_tables(staging, parameters)
        write_text(staging / CONVERTED_INDEX, index_text(_count_parameters(checkpoint.metadata, added), files))
        autos = auto_classes(checkpoint.config)
        _copy_companions(checkpoint, taken, staging, lambda config: guarded(edit(config), autos))
        write_text(staging / SHIM, SHIM_TEXT)
        Manifest(
            architecture=type(model).__name__,
            owners={owner: Owner.of(p) for owner, p in parameters.items()},
            streams_file=streams_file,
            sha256=sha256,
        ).write(staging)
        progress(checkpoint.size, checkpoint.size, "finishing")
    sites = sum(len(p.sites) for p in parameters.values())
    return Converted(target, sites, adds, added, tuple(left))


def _to_residual(source: Path, target: Path, progress: Progress) -> Converted:
    checkpoint, manifest = open_converted(source)
    taken, left = _companions(checkpoint)
    target = check_target(target, source, size=checkpoint.size)
    progress(0, checkpoint.size, "reading the streams")
    parameters = read_streams(checkpoint, manifest, Options())
    refuse_trained(parameters)
    refuse_attention(parameters, "a residual folder")
    removed = sum(t.numel() for p in parameters.values() for t in p.kept().values())
    names = shard_names(len(checkpoint.shards) - 1)
    with staged(target) as staging:
        files = _copy_base(checkpoint, manifest, names, staging, progress)
        if len(files) > 1:
            write_text(staging / INDEX, index_text(_count_parameters(checkpoint.metadata, -removed), files))
        _copy_companions(checkpoint, taken, staging, unguarded)
        progress(checkpoint.size, checkpoint.size, "finishing")
    return Converted(target, 0, "", removed, tuple(left))


def _to_layout(source: Path, target: Path, layout: Layout, progress: Progress) -> Converted:
    """Write the weights of a converted folder as they are, and its stream parameters in a layout."""
    checkpoint, manifest = open_converted(source)
    taken, left = _companions(checkpoint)
    target = check_target(target, source, size=checkpoint.size)
    progress(0, checkpoint.size, "reading the streams")
    parameters = read_streams(checkpoint, manifest, Options())
    refuse_attention(parameters, f"a folder in the layout {layout.name}")
    streams, spec, difference = layouts.to_layout(layout, parameters)
    *base_names, streams_file = shard_names(len(checkpoint.shards))
    with staged(target) as staging:
        files = _copy_base(checkpoint, manifest, base_names, staging, progress)
        _refuse_clash(streams, list(files.values()))
        write_shard(staging / streams_file, streams)
        files[streams_file] = read_shard(staging / streams_file)
        write_text(staging / INDEX, index_text(checkpoint.metadata, files))
        _copy_companions(checkpoint, taken, staging, lambda c: layouts.with_entries(layout, spec, unguarded(c)))
        progress(checkpoint.size, checkpoint.size, "finishing")
    sites = sum(len(p.sites) for p in parameters.values())
    return Converted(target, sites, "", sum(t.numel() for t in streams.values()), tuple(left), difference)


def _refuse_clash(streams: Iterable[str], shards: Iterable[Shard]) -> None:
    if clash := set(streams) & {name for shard in shards for name in shard.tensors}:
        raise MHCError("MHC207", f"a weight is named {min(clash)}")


def _copy_base(
    checkpoint: Checkpoint, manifest: Manifest, file_names: Sequence[str], folder: Path, progress: Progress
) -> dict[str, Shard]:
    """Copy the weight files of a converted folder but that of the streams; return them by new name.

    Raises MHC414 for a file that is not the one that was written.
    """
    streams = streams_shard(checkpoint, manifest)
    shards = [shard for shard in checkpoint.shards if shard is not streams]
    files, sha256 = _copy(checkpoint, shards, file_names, folder, progress)
    for shard, digest in zip(shards, sha256.values(), strict=True):
        if manifest.sha256.get(shard.path.name, digest) != digest:
            raise MHCError("MHC414", f"{shard.path} is not the file that was written (sha256)")
    return files


def _copy(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    file_names: Sequence[str],
    folder: Path,
    progress: Progress,
    *,
    refuse_nonfinite: bool = False,
) -> tuple[dict[str, Shard], dict[str, str]]:
    """Copy weight files under new names; return the files and their hashes by new name."""
    files: dict[str, Shard] = {}
    sha256: dict[str, str] = {}
    done = 0
    for name, shard in zip(file_names, shards, strict=True):

        def moved(count: int, what: str = shard.path.name) -> None:
            nonlocal done
            done += count
            progress(done, checkpoint.size, what)

        sha256[name] = copy_shard(shard, folder / name, moved, refuse_nonfinite=refuse_nonfinite)
        files[name] = shard
    return files, sha256


def _companions(checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """Return `companions`; raise MHC416 where a file to be copied is a link out of the folder."""
    taken, left = companions(checkpoint)
    files = [*(checkpoint.folder / relative for relative in taken), *(shard.path for shard in checkpoint.shards)]
    refuse_links_out(checkpoint.folder, files)
    return taken, left


def _copy_companions(
    checkpoint: Checkpoint, taken: Sequence[Path], folder: Path, edit: Callable[[bytes], bytes]
) -> None:
    """Copy tokenizer and the like as they are, and the configuration as `edit` changes it."""
    for relative in taken:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(checkpoint.folder / relative, folder / relative)
    config = folder / CONFIG
    config.write_bytes(edit(config.read_bytes()))
    with config.open("rb+") as file:
        sync(file)


def _count_parameters(metadata: Mapping[str, Any], more: int) -> dict[str, Any]:
    """Return the index's metadata with `more` parameters, if it counts them."""
    total = metadata.get("total_parameters")
    return {**metadata, "total_parameters": total + more} if isinstance(total, int) else dict(metadata)
