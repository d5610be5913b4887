"""`mhc-compile convert`: convert a checkpoint folder, or take it back."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mhc_compile.checkpoint.layouts import LAYOUTS
from mhc_compile.conversion.folder import Converted, Form, convert_folder
from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting import emit_folder
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import PRESETS as VERSIONS
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.kernels.spec import MAX_STREAMS, Convention, Exit, Manifold, form_names
from mhc_compile.kernels.start import StartName

_OPTIONS = ("streams", "convention", "manifold", "iterations", "exit", "form", "start", "strict")
_DESCRIPTION = """\
Turn a residual Transformer, saved by transformers as safetensors, into its n-stream mHC form.

OUT_DIR computes what CKPT_DIR computes until it is trained: the new parameters of every residual
site are at their function-preserving start. CKPT_DIR is only read, and OUT_DIR appears when it is
complete or not at all. Memory for the whole model is not needed.
"""
_EXAMPLES = """\
examples:
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc
      four streams at every residual site, the paper's equations
  mhc-compile convert ./Qwen3-0.6B-mhc ./Qwen3-0.6B-megatron --layout megatron
      the streams, trained or not, under Megatron-Core's names; the same from there reads them
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --streams 2 --convention deepseek_v4
      two streams, DeepSeek-V4's equations and its learned head at the exit
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --engram v41 --engram-layers 1,14 --engram-rows 50000
      and n-gram memories at the entry of two layers, which add nothing until they are trained
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --over-encoding order=3,heads=4,rows=50000
      and embeddings of n-grams beside those of tokens, which add nothing until they are trained
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-mhc --ultramem v1,layers=3+6+9,side=400
      and values looked up by content at three layers, which add nothing until they are trained
  mhc-compile convert ./Qwen3-0.6B ./Qwen3-0.6B-hub --standalone
      with the model's source, so that it is loaded where mhc-compile is not installed
  mhc-compile convert ./Qwen3-0.6B-mhc ./Qwen3-0.6B-again --to residual
      the original weights bit by bit, as long as the streams were not trained

then, in Python:
  model = mhc_compile.from_pretrained("./Qwen3-0.6B-mhc")
  model.save_pretrained("./trained")
  (AutoModel.from_pretrained of such a folder raises: it would leave the streams out)
"""


def add_parser(subparsers: Any) -> None:
    """Register the command with argparse."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint folder to streams, or back",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="CKPT_DIR", type=str, help="a folder with config.json and safetensors, or a Hub id"
    )
    parser.add_argument("target", metavar="OUT_DIR", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--to", choices=get_args(Form), default="mhc", help="the form of OUT_DIR (default: mhc)")
    parser.add_argument("--streams", metavar="N", type=int, help=f"streams a site, 1 to {MAX_STREAMS} (default: 4)")
    parser.add_argument("--iterations", metavar="K", type=int, help="Sinkhorn iterations (default: 20)")
    for option, choices, meaning in (
        ("--convention", [c.value for c in Convention], "whose equations (default: paper, arXiv 2512.24880)"),
        ("--manifold", get_args(Manifold), "of the matrices (default: the convention's)"),
        ("--exit", get_args(Exit), "how the streams are reduced to one (default: the convention's)"),
        ("--form", form_names(), "mHC (default), or unconstrained Hyper-Connections, dynamic or static"),
        ("--start", get_args(StartName), "how fast the coefficients learn at first: paper as published, slowly"),
        ("--layout", sorted(LAYOUTS), "write the streams as this system has them, or read them: see docs/convert.md"),
        ("--engram", sorted(PRESETS), "add n-gram memories as this system has them"),
    ):
        parser.add_argument(option, choices=choices, help=meaning)
    parser.add_argument(
        "--standalone", action="store_true", help="write the model's source too: transformers loads OUT_DIR by itself"
    )
    parser.add_argument(
        "--vendor", action="store_true", help="with --standalone: copy the files of the model's classes too, whole"
    )
    parser.add_argument("--strict", action="store_true", default=None, help="reject a model if residual adds are left")
    parser.add_argument(
        "--engram-layers", metavar="L", help="layers with a memory: 0-based indices or module paths, by commas"
    )
    parser.add_argument("--engram-rows", metavar="N", type=int, help="rows a head (default: the preset's millions)")
    parser.add_argument(
        "--over-encoding",
        metavar="FIELDS",
        help="add embeddings of n-grams: default, or fields such as order=3,heads=4,rows=50000",
    )
    parser.add_argument(
        "--ultramem",
        metavar="FIELDS",
        help="add values looked up by content: v1 or v2, and fields such as layers=3+6+9,skip=2,side=400,top=16",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the folder. Raises `MHCError` as `convert_folder` does."""
    options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    if args.vendor and not args.standalone:
        raise MHCError("MHC520", "--vendor is for --standalone", way_out="add --standalone")
    if args.standalone:
        return _standalone(args, options)
    if (memory := _memory(args)) is not None:
        options["engram"] = memory
    if args.over_encoding is not None:
        options["over_encoding"] = _over_encoding(args.over_encoding)
    if args.ultramem is not None:
        options["ultramem"] = _ultramem(args.ultramem)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        done = convert_folder(args.source, args.target, to=args.to, layout=args.layout, progress=progress, **options)
    print(_summary(done, args))
    if done.left_out:
        print(f"left out: {', '.join(map(str, done.left_out))}", file=sys.stderr)
    return 0


def _standalone(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Write a folder with the emitted source. Raises MHC520 for options that it has no place for."""
    others = {
        name: getattr(args, name)
        for name in ("engram", "engram_layers", "engram_rows", "over_encoding", "ultramem", "start", "layout")
    }
    if args.to != "mhc" or args.strict or any(value is not None for value in others.values()):
        detail = "--standalone takes --streams, --convention, --manifold, --iterations, --exit and --vendor alone"
        raise MHCError("MHC520", detail, way_out="leave the others out, or convert without --standalone")
    folder = emit_folder(args.source, args.target, vendor=args.vendor, **options)
    print(f'{folder}: load it with AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')
    return 0


def _memory(args: argparse.Namespace) -> MemorySettings | None:
    """Return the settings that the arguments describe; raise MHC220 for impossible ones."""
    changes: dict[str, Any] = {}
    if args.engram_layers is not None:
        changes["layers"] = _layers(args.engram_layers, ",")
    if args.engram_rows is not None:
        changes["rows_per_head"] = args.engram_rows
    if args.engram is None:
        if changes:
            raise MHCError("MHC220", "--engram-layers and --engram-rows need --engram", way_out="add --engram v41")
        return None
    return MemorySettings.preset(args.engram, **changes)


def _over_encoding(text: str) -> OverEncodingSettings:
    """Parse settings written as `field=number,...`. Raise MHC220 for other text."""
    parts = [] if text == "default" else [part.partition("=") for part in text.split(",")]
    known = {f.name for f in fields(OverEncodingSettings)}
    if wrong := [name for name, _, number in parts if name not in known or not number.isdigit()]:
        detail = f"--over-encoding: {wrong[0]!r} with no number; fields: {', '.join(sorted(known))}"
        raise MHCError("MHC220", detail, way_out="--over-encoding order=3,heads=4,rows=50000, or default")
    return OverEncodingSettings(**{name: int(number) for name, _, number in parts})


def _ultramem(text: str) -> UltraMemSettings:
    """Parse a version and fields written as `v1,field=number,layers=0+2`. Raise MHC220 for other text."""
    version, *given = text.split(",")
    parts = [part.partition("=") for part in given]
    known = {f.name for f in fields(UltraMemSettings) if str(f.type) == "int"}
    values: dict[str, Any] = {name: int(number) for name, _, number in parts if name in known and number.isdigit()}
    values |= {name: _layers(named, "+") for name, _, named in parts if name == "layers" and named}
    if wrong := [name for name, _, _ in parts if name not in values] or [version] * (version not in VERSIONS):
        detail = f"--ultramem: {wrong[0]!r}; a version ({', '.join(VERSIONS)}) first, then {', '.join(sorted(known))}"
        raise MHCError("MHC220", f"{detail} with a number, or layers", way_out="--ultramem v1,layers=3+6+9,side=400")
    return UltraMemSettings.preset(version, **values)


def _layers(text: str, separator: str) -> tuple[int | str, ...]:
    return tuple(int(x) if x.isdigit() else x for x in text.split(separator))


def _summary(done: Converted, args: argparse.Namespace) -> str:
    if args.to == "residual":
        return f"{done.folder}: residual again, {done.parameters:,} stream parameters removed"
    differs = f"; the conventions differ by up to {done.difference:.0e} in a coefficient" if done.difference else ""
    if args.layout is not None and not done.adds:
        return f"{done.folder}: {done.parameters:,} stream parameters in the layout {args.layout}{differs}"
    return (
        f"{done.folder}: streams at {done.sites} sites, {done.adds}, "
        f"{done.parameters:,} stream parameters added{differs}\n"
        f'load it with mhc_compile.from_pretrained("{done.folder}")'
    )
