"""`mhc-compile emit`: write the source of a Hugging Face model with the streams in it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.configured import refuse_stream_options, weighted
from mhc_compile.emitting.emit import emit

FILE = "modeling_mhc.py"
_DESCRIPTION = """\
Write the source of a Hugging Face model with n streams in it: the classes whose methods add to the residual stream,
with these adds and reads rewritten and all else kept. The file needs PyTorch and transformers, not mhc-compile.

It is written only if it computes what the converted model does, outputs and gradients, in float64.
"""
_EXAMPLES = """\
examples:
  mhc-compile emit ./Llama-3.2-1B --out ./source
  mhc-compile emit ./config.json --out ./source --streams 2 --convention liger

then, in Python:
  import modeling_mhc
  model = modeling_mhc.add_streams(AutoModelForCausalLM.from_pretrained("./Llama-3.2-1B"))
"""
_OPTIONS = ("streams", "convention", "manifold", "iterations", "exit")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "emit",
        help="write a model's source with the streams in it",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=str, help="a checkpoint folder, a config.json, or the id of a Hub repository"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"the folder for {FILE}")
    for name in _OPTIONS:
        kind = int if name in ("streams", "iterations") else str
        parser.add_argument(f"--{name}", type=kind, metavar=name.upper(), help=f"{name} of an unconverted model")


def run(args: argparse.Namespace) -> int:
    """Write the file. Raises `MHCError` as `emit` does, and MHC304 for options of a converted folder."""
    options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    folder = local_folder(args.model)
    model, converted, _ = weighted(folder)
    if converted:
        refuse_stream_options(folder, options)
    file = args.out / FILE
    emit(model, file, **options)
    print(f"{file}: {len(file.read_text(encoding='utf-8').splitlines())} lines")
    return 0
