"""`mhc-compile inspect`: show a Hugging Face model's residual streams from its configuration alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from mhc_compile.commands.arguments import Compiling, Model, Passes
from mhc_compile.diagnostics import MHCError
from mhc_compile.output import PLAIN, Output


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `inspect` beside those of compiling."""

    layer: str | None = None
    """Show this module's graph before and after: model.layers.0."""
    passes: Passes = None
    stages: int | None = None
    """Show the model in this many pipeline stages."""
    source: bool = False
    """Print the generated code of the fused kernels, too."""
    html: Path | None = None
    """Write the report as a page."""
    time: bool = False
    """Run a step, forward and backward, and show what every part takes. Reads the weights if there are any."""
    trace: Path | None = None
    """Write that step as a timeline for ui.perfetto.dev; implies --time."""
    probes: Path | None = None
    """Show what probes sampled of this model, from the file that Probes.write wrote."""
    outputs: bool = False
    """With --json: also run the model, on its weights, for diff to compare."""
    mlir: Literal["torch", "linalg"] | None = None
    """Print the converted model in MLIR, in place of the report."""
    out: Path | None = None
    """Write the MLIR to a file."""


_DEFAULT = Flags()
_BESIDE = ("layer", "passes", "stages", "source", "html", "time", "trace", "probes", "outputs")
"""Flags of the report, which has no MLIR."""


def inspect(model: Model, /, *, options: Compiling = None, flags: Flags = _DEFAULT, output: Output = PLAIN) -> int:
    """Show a model's residual streams.

    Show what mhc-compile sees in a Hugging Face model: its residual streams and sites, what each pass does, or where a
    stream is lost. Only config.json is read (and mhc.json of a converted folder), with --time the weights, too; no code
    from the folder is run.

    ```sh
    mhc-compile inspect ./Llama-3.2-1B
    mhc-compile inspect ./Llama-3.2-1B --layer model.layers.0 --streams 2
    mhc-compile inspect ./Llama-3.2-1B --passes "normalize,residual,widen,fuse{kinds=boundary},lower"
    mhc-compile inspect ./config.json --recompute auto --stages 4 --html report.html
    mhc-compile inspect ./Llama-3.2-1B --time --trace step.json
    mhc-compile inspect ./converted --probes probes.jsonl --html report.html
    mhc-compile inspect ./Llama-3.2-1B --mlir linalg --out llama.mlir
    ```
    """
    if flags.outputs and output.json is None:
        raise MHCError("MHC520", "--outputs go into the file that --json names")
    if flags.mlir is not None or flags.out is not None:
        return _mlir(model, options or {}, flags, output)
    return _report(model, {**(options or {})}, flags, output)


def _report(source: str, options: dict[str, Any], flags: Flags, output: Output) -> int:
    """Print the report and write its files; return 3 for a model that cannot be converted.

    Raises `MHCError`: MHC508 where there is no model, MHC405 for an architecture that transformers does not have,
    MHC414 for an `mhc.json` that does not fit, MHC304 for streams of a converted folder, MHC509 for a file that cannot
    be written, and what `inspect` raises for a layer, blocks and stages.
    """
    if flags.time or flags.trace is not None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is loaded: the profiler tells of every start

    from mhc_compile.atomic_write import write_whole
    from mhc_compile.checkpoint.hub import local_folder
    from mhc_compile.configured import configured, refuse_stream_options, weighted
    from mhc_compile.diff.outputs import outputs_of
    from mhc_compile.report.examine import inspect

    runs = flags.time or flags.trace is not None
    folder = local_folder(source, weights=flags.outputs or runs)
    model, converted, *own = weighted(folder) if runs else configured(folder)
    if converted:
        refuse_stream_options(folder, options)
    if flags.passes is not None:
        options["pipeline"] = flags.passes
    more = {name: getattr(flags, name) for name in ("layer", "stages", "trace", "probes")}
    report = inspect(model, time=runs, **more, **options)
    with output.printing():
        report.show()
        if report.step is not None and not all(own):
            print("\nthe folder has no weights: the step ran on random ones")
        for kernel in report.kernels if flags.source else ():
            for direction, code in (("forward", kernel.forward), ("backward", kernel.backward)):
                if code is not None:
                    print(f"\n===== {kernel.name}, {direction} =====\n{code}")
    if flags.outputs:
        report = replace(report, outputs=outputs_of(weighted(folder)[0], 0, **options))
    if flags.html is not None:
        write_whole(flags.html, report.html())
    with output.printing():
        for file in filter(None, (flags.html, flags.trace if report.step else None, output.json)):
            print(f"\nwritten to {file}")
    if output.json is not None:
        output.write(report.json())
    return 3 if report.refusal else 0


def _mlir(source: str, options: Any, flags: Flags, output: Output) -> int:
    """Print the model in MLIR, or write it to `--out`. Raises as `convert`, `export` and `to_mlir` do, and MHC520."""
    from mhc_compile.atomic_write import write_whole
    from mhc_compile.checkpoint.hub import local_folder
    from mhc_compile.checkpoint.manifest import NAME
    from mhc_compile.configured import refuse_stream_options
    from mhc_compile.report.mlir import mlir_of

    if flags.mlir is None:
        raise MHCError("MHC520", "--out is for --mlir; --html and --json name the report's files")
    beside = {name: getattr(flags, name) for name in _BESIDE}
    beside["json"] = output.json
    others = [name for name, value in (*beside.items(), *options.items()) if value not in (None, False)]
    if others := [name for name in others if name != "streams"]:
        raise MHCError("MHC520", f"--mlir and --{others[0]}")
    folder = local_folder(source, weights=False)
    if (folder / NAME).is_file():
        refuse_stream_options(folder, options)
    text = mlir_of(folder, flags.mlir, **options)
    if flags.out is None:
        print(text)
    else:
        write_whole(flags.out, text)
        print(f"written to {flags.out}")
    return 0
