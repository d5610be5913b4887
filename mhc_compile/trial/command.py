"""`mhc-compile trial`: which residual connection a model trains best with."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.config import Inner
from mhc_compile.configured import configured
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import form_names
from mhc_compile.trial import studies
from mhc_compile.trial.run import RESIDUAL, Arm, Result, Settings
from mhc_compile.trial.run import run as run_trial
from mhc_compile.trial.text import read_tokens
from mhc_compile.trial.training import LEAST_STEPS, threads

COMMAND = "trial"
_DESCRIPTION = """\
Train a causal language model with several residual connections from the same weights on the same batches, in turn, and
compare held-out losses, times and memory. MODEL is a checkpoint folder, or a config.json whose weights are drawn anew
for every seed. A tenth of the text, its end, is held out.
"""
_EXAMPLES = f"""\
forms: {RESIDUAL}, {", ".join(form_names())}; each with options of `convert` after colons

examples:
  mhc-compile trial ./Llama-3.2-1B --data corpus.txt --steps 200
  mhc-compile trial ./config.json --data corpus.txt --forms residual,mhc,mhc:streams=2,attnres --seeds 3 --lr 3e-3
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        COMMAND,
        help="train a model with several residual connections and compare them",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=str, help="a checkpoint folder, a config.json, or the id of a Hub repository"
    )
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument(
        "--forms", default="residual,hc,mhc,attnres,mudd", help="separated by commas (default: %(default)s)"
    )
    for name, least, default, meaning in (
        ("steps", LEAST_STEPS, 200, "optimizer steps of every form"),
        ("seeds", 1, 1, "repetitions with other batches, and other weights where the model has none"),
        ("batch", 1, 8, "sequences in a batch"),
        ("length", 2, 128, "tokens in a sequence"),
        ("threads", 1, 1, "of torch"),
    ):
        number = studies.at_least(least)
        parser.add_argument(
            f"--{name}", metavar="N", type=number, default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate, of all forms (default 1e-3)")
    parser.add_argument("--inner", choices=get_args(Inner), default="inductor", help="what compiles every form")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("trial"), help="default: ./trial")


def run(args: argparse.Namespace) -> int:
    """Run the trial; print its table and write table, JSON and plot. Raises `MHCError` as `run_trial` does."""
    path = local_folder(args.model)
    settings = Settings(
        model=path,
        arms=[Arm.parse(text) for text in args.forms.split(",")],
        steps=args.steps,
        seeds=args.seeds,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        inner=args.inner,
    )
    if importlib.util.find_spec("matplotlib") is None:  # said before anything is trained
        raise MHCError("MHC233", "trial draws its losses")
    model: Any = configured(path)[0]
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise MHCError("MHC528", f"{type(model).__name__} reads no tokens", way_out="name a causal language model")
    tokens = read_tokens(args.data, path if path.is_dir() else path.parent, embeddings.num_embeddings)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with threads(args.threads), Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("Training in turn", total=settings.steps * settings.seeds, loss="compiling")
        results = run_trial(settings, tokens, lambda loss: bar.update(task, advance=1, loss=loss))
    text = table(settings, results)
    print(text)
    studies.write(args.out, "trial", text, {"results": [asdict(r) for r in results]}, draw(results))
    return 0


def table(settings: Settings, results: Sequence[Result]) -> str:
    """Return the comparison as markdown: the first form is what the others are compared with."""
    base, rows = results[0], []
    for result in results:
        apart = [a - b for a, b in zip(result.held_out, base.held_out, strict=True)]
        ratio = statistics.median(a / b for a, b in zip(result.seconds, base.seconds, strict=True))
        rows.append(
            (
                result.form, f"{result.parameters:,}", studies.plus_minus(result.held_out),
                "–" if result is base else studies.plus_minus(apart, sign=True),
                f"{1e3 * statistics.median(result.seconds):.1f}", f"{ratio:.2f}", f"{result.saved / 2**20:.1f}",
                f"{max(result.gain):.3g}" if result.gain else "–",
            )
        )  # fmt: skip
    heads = ("form", "parameters", "held-out loss", f"minus {base.form}", "ms per step", "ratio", "MiB kept", "gain")
    return "\n\n".join(
        (
            f"{settings.steps} steps of {settings.batch} x {settings.length} tokens, learning rate {settings.lr:g}, "
            f"{settings.seeds} seed{'s' * (settings.seeds > 1)}; losses in nats per token. Kept: for the backward "
            "pass, beside parameters. Gain: how much all sites together amplify a gradient, mean over tokens.",
            studies.markdown(heads, rows),
        )
    )


def draw(results: Sequence[Result]) -> Any:
    """Draw the training losses minus those of the first form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in results[1:]:
        pairs = zip(result.losses, results[0].losses, strict=True)
        axes.plot(studies.smooth([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]), label=result.form)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(xlabel="step", ylabel=f"training loss minus {results[0].form}, nats")
    if results[1:]:
        axes.legend()
    return figure
