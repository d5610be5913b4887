"""`mhc-compile convert`: convert a checkpoint folder, or take it back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mhc_compile.commands.arguments import Streams
from mhc_compile.diagnostics import MHCError
from mhc_compile.output import PLAIN, Output

if TYPE_CHECKING:
    from mhc_compile.conversion.folder import Converted
    from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
    from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `convert` beside those of the streams."""

    to: Literal["mhc", "residual"] = "mhc"
    """The form of OUT_DIR."""
    strict: bool = False
    """Reject a model if residual adds are left."""
    sites: str | None = None
    """Choose which adds become sites, by patterns of names: model.layers.[4-7],*.mlp; default all."""
    start: Literal["default", "paper"] | None = None
    """How fast the coefficients learn at first; paper: as published, slowly."""
    layout: str | None = None
    """Write the streams as another system has them, or read them: docs/convert.md lists the systems."""
    engram: str | None = None
    """Add n-gram memories as this system has them: paper, v41."""
    engram_layers: str | None = None
    """Layers with a memory: indices from 0 or module paths, separated by commas."""
    engram_rows: int | None = None
    """Rows per head; default the preset's millions."""
    over_encoding: str | None = None
    """Add embeddings of n-grams: default, or fields such as order=3,heads=4,rows=50000."""
    ultramem: str | None = None
    """Add values looked up by content: v1 or v2, and fields such as layers=3+6+9,skip=2,side=400,top=16."""
    standalone: bool = False
    """Write the model's source too: transformers loads OUT_DIR by itself."""
    vendor: bool = False
    """With --standalone: copy the files of the model's classes too, whole."""


_DEFAULT = Flags()


def convert(
    ckpt_dir: Annotated[str, Parameter(help="A folder with config.json and safetensors, or a Hub id.")],
    out_dir: Annotated[Path, Parameter(help="A folder that does not exist yet, or is empty.")],
    /,
    *,
    streams: Streams = None,
    flags: Flags = _DEFAULT,
    output: Output = PLAIN,
) -> int:
    """Convert a checkpoint folder to streams, or back.

    Turn a residual Transformer, saved by transformers as safetensors, into its n-stream mHC form. OUT_DIR computes what
    CKPT_DIR computes until it is trained: the new parameters of every residual site are at their function-preserving
    start. CKPT_DIR is only read, and OUT_DIR appears when it is complete or not at all. Memory for the whole model is
    not needed.

    ```sh
    # four streams at every residual site, the paper's equations
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc
    # the streams, trained or not, under Megatron-Core's names; the same from there reads them
    mhc-compile convert ./Qwen3-0.6B-mhc ./Qwen3-0.6B-megatron --layout megatron
    # two streams, DeepSeek-V4's equations and its learned head at the exit
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --streams 2 --convention deepseek_v4
    # and n-gram memories at the entry of two layers, which add nothing until they are trained
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --engram v41 --engram-layers 1,14 --engram-rows 50000
    # and embeddings of n-grams beside those of tokens, which add nothing until they are trained
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --over-encoding order=3,heads=4,rows=50000
    # and values looked up by content at three layers, which add nothing until they are trained
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --ultramem v1,layers=3+6+9,side=400
    # with the model's source, so that it is loaded where mhc-compile is not installed
    mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-hub --standalone
    # the original weights bit by bit, as long as the streams were not trained
    mhc-compile convert ./Qwen3-0.6B-mhc ./Qwen3-0.6B-again --to residual
    ```

    Then, in Python (AutoModel.from_pretrained of such a folder raises: it would leave the streams out):

    ```python
    model = mhc_compile.from_pretrained("./Qwen3-0.6B-mhc")
    model.save_pretrained("./trained")
    ```
    """
    options: dict[str, Any] = {**(streams or {}), **_memories(flags)}
    options |= {name: value for name in ("strict", "sites", "start", "layout") if (value := getattr(flags, name))}
    if flags.standalone:
        return _standalone(ckpt_dir, out_dir, flags, options, output)
    if flags.vendor:
        raise MHCError("MHC520", "--vendor is for --standalone", way_out="add --standalone")
    from mhc_compile.conversion import convert_folder

    done = convert_folder(ckpt_dir, out_dir, to=flags.to, progress=not output.quiet, **options)
    with output.printing():
        print(_summary(done, flags))
    if done.left_out:
        print(f"left out: {', '.join(map(str, done.left_out))}", file=sys.stderr)
    output.write(done)
    return 0


def _standalone(source: str, target: Path, flags: Flags, options: dict[str, Any], output: Output) -> int:
    """Write a folder with the emitted source. Raises MHC520 for options that it has no place for."""
    if flags.to != "mhc" or options.keys() - {"streams", "convention", "manifold", "iterations", "exit"}:
        detail = "--standalone takes --streams, --convention, --manifold, --iterations, --exit and --vendor alone"
        raise MHCError("MHC520", detail, way_out="leave the others out, or convert without --standalone")
    from mhc_compile.emitting import emit_folder

    folder = emit_folder(source, target, vendor=flags.vendor, **options)
    with output.printing():
        print(f'{folder}: load it with AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')
    output.write({"folder": folder})
    return 0


def _memories(flags: Flags) -> dict[str, Any]:
    """Return the settings of memories that the flags describe, by keyword; raise MHC220 for impossible ones."""
    from mhc_compile.kernels.memory.settings import MemorySettings

    changes: dict[str, Any] = {}
    if flags.engram_layers is not None:
        changes["layers"] = _layers(flags.engram_layers, ",")
    if flags.engram_rows is not None:
        changes["rows_per_head"] = flags.engram_rows
    if changes and flags.engram is None:
        raise MHCError("MHC220", "--engram-layers and --engram-rows need --engram", way_out="add --engram v41")
    memories: dict[str, Any] = {}
    if flags.engram is not None:
        memories["engram"] = MemorySettings.preset(flags.engram, **changes)
    if flags.over_encoding is not None:
        memories["over_encoding"] = _over_encoding(flags.over_encoding)
    if flags.ultramem is not None:
        memories["ultramem"] = _ultramem(flags.ultramem)
    return memories


def _over_encoding(text: str) -> OverEncodingSettings:
    """Parse settings written as `field=number,...`. Raise MHC220 for other text."""
    from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings

    parts = [] if text == "default" else [part.partition("=") for part in text.split(",")]
    known = {f.name for f in fields(OverEncodingSettings)}
    if wrong := [name for name, _, number in parts if name not in known or not number.isdigit()]:
        detail = f"--over-encoding: {wrong[0]!r} with no number; fields: {', '.join(sorted(known))}"
        raise MHCError("MHC220", detail, way_out="--over-encoding order=3,heads=4,rows=50000, or default")
    return OverEncodingSettings(**{name: int(number) for name, _, number in parts})


def _ultramem(text: str) -> UltraMemSettings:
    """Parse a version and fields written as `v1,field=number,layers=0+2`. Raise MHC220 for other text."""
    from mhc_compile.kernels.memory.ultramem_settings import PRESETS, UltraMemSettings

    version, *given = text.split(",")
    parts = [part.partition("=") for part in given]
    known = {f.name for f in fields(UltraMemSettings) if str(f.type) == "int"}
    values: dict[str, Any] = {name: int(number) for name, _, number in parts if name in known and number.isdigit()}
    values |= {name: _layers(named, "+") for name, _, named in parts if name == "layers" and named}
    if wrong := [name for name, _, _ in parts if name not in values] or [version] * (version not in PRESETS):
        detail = f"--ultramem: {wrong[0]!r}; a version ({', '.join(PRESETS)}) first, then {', '.join(sorted(known))}"
        raise MHCError("MHC220", f"{detail} with a number, or layers", way_out="--ultramem v1,layers=3+6+9,side=400")
    return UltraMemSettings.preset(version, **values)


def _layers(text: str, separator: str) -> tuple[int | str, ...]:
    return tuple(int(x) if x.isdigit() else x for x in text.split(separator))


def _summary(done: Converted, flags: Flags) -> str:
    if flags.to == "residual":
        return f"{done.folder}: residual again, {done.parameters:,} stream parameters removed"
    differs = f"; the conventions differ by up to {done.difference:.0e} in a coefficient" if done.difference else ""
    if flags.layout is not None and not done.adds:
        return f"{done.folder}: {done.parameters:,} stream parameters in the layout {flags.layout}{differs}"
    return (
        f"{done.folder}: streams at {done.sites} sites, {done.adds}, "
        f"{done.parameters:,} stream parameters added{differs}\n"
        f'load it with mhc_compile.from_pretrained("{done.folder}")'
    )
