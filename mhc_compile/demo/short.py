"""The demonstration in two minutes: convert a trained checkpoint, watch the streams' gain, train on, look inside."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import webbrowser
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from mhc_compile.conversion import convert, convert_folder
from mhc_compile.demo.chart import Series, chart
from mhc_compile.demo.experiment import residual_model, set_alpha, stage, watched
from mhc_compile.demo.output import OutputFolder
from mhc_compile.demo.settings import Settings
from mhc_compile.demo.text import Corpus, divided_by_name, encoded, held_out_batches, named_sources, training_batches
from mhc_compile.loading import from_pretrained
from mhc_compile.report import inspect
from mhc_compile.trial.training import Contender, contender, difference, train

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""A trained residual Llama and its tokenizer; examples/demo_checkpoint.py made it."""
PROMPTS = ("def __init__(self, name", "    if not isinstance(", "    for i in range(")
RESIDUAL, MHC, FREE = "residual", "mHC", "any H"
LABELS = {RESIDUAL: "residual", MHC: "mHC: H doubly stochastic", FREE: "any H: no constraint"}
SIGNS = {MHC: ("o", "cyan"), FREE: ("x", "yellow")}
GAINS = 20
"""How often gains are measured."""
SMOOTHED = 10
PLAIN_LINES = 5
"""How often progress is printed where there is no terminal."""


@dataclass(frozen=True)
class Conversion:
    """The largest difference after the conversion, and the texts of both models."""

    difference: float
    """The largest difference of a logit, relative to the largest logit."""
    texts: tuple[list[str], list[str]]
    """The continuations of the residual and of the converted model, one per prompt."""


def run_short(settings: Settings, out: OutputFolder, console: Console) -> dict[str, Any]:
    """Run everything; return the measurements."""
    residual, corpus = _given(settings, out, console)
    console.rule("1  Convert it", align="left")
    streams, conversion = _convert(residual, corpus, settings, out, console)
    console.rule("2  Train three models", align="left")
    contenders = _contenders(settings, corpus, console)
    held_out = held_out_batches(corpus, settings)
    before = contenders[0].held_out(held_out)
    gains = _train(contenders, corpus, settings, held_out[0], console)
    after = {one.name: one.held_out(held_out) for one in contenders}
    console.print(_table(contenders, before, after, gains))
    console.print(_reading(after, gains, settings), highlight=False)
    console.rule("3  Look inside", align="left")
    _report(streams, out / "report.html", console)
    delta, error = difference(after[RESIDUAL], after[MHC])
    return {
        "settings": asdict(settings),
        "largest_difference": conversion.difference,
        "texts": dict(zip((RESIDUAL, MHC), conversion.texts, strict=True)),
        "held_out": {"before": statistics.fmean(before), **{name: statistics.fmean(v) for name, v in after.items()}},
        "difference": {"mean": delta, "standard_error": error},
        "gains": {name: {str(step): gain for step, gain in by_step.items()} for name, by_step in gains.items()},
        "training_loss": {one.name: one.losses for one in contenders},
        "parameters": {one.name: sum(p.numel() for p in one.model.parameters()) for one in contenders},
    }


def _loaded(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model


def _given(settings: Settings, out: OutputFolder, console: Console) -> tuple[nn.Module, Corpus]:
    """Return the checkpoint, written in float32 to `out` as well, and text for it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    with stage(console, "Reading the checkpoint and Python's standard library"):
        model, tokenizer = _loaded(CHECKPOINT), PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
        model.save_pretrained(out / "residual")  # type: ignore[operator]
        tokenizer.save_pretrained(out / "residual")
        texts = named_sources(settings.text_bytes)
        tokens, held_out = (encoded(tokenizer.backend_tokenizer, part) for part in divided_by_name(texts))
    corpus = Corpus(tokenizer, tokens, held_out, len(texts), sum(len(text.encode()) for text in texts.values()))
    size = sum(p.numel() for p in model.parameters())
    trained = f"  a Llama of {settings.layers} layers and {size:,} parameters, trained on such text"
    console.print(trained, highlight=False)
    return model, corpus


def _convert(
    residual: nn.Module, corpus: Corpus, settings: Settings, out: OutputFolder, console: Console
) -> tuple[nn.Module, Conversion]:
    """Convert the folder of the residual model; compare logits and what both write."""
    console.print(
        f"$ mhc-compile convert {out / 'residual'} {out / 'mhc'} --streams {settings.streams}",
        style="bold",
        soft_wrap=True,
    )
    with stage(console, f"One stream became {settings.streams}"):
        convert_folder(out / "residual", out / "mhc", streams=settings.streams)
        streams = from_pretrained(out / "mhc", inner="eager", local_files_only=True)
    with stage(console, "Both wrote on from the same prompts"):
        residual.eval()
        ids, other_ids = (greedy(model, corpus, settings) for model in (residual, streams))
        with torch.no_grad():
            expected, logits = (model(input_ids=ids).logits for model in (residual, streams))
    texts, others = (
        [corpus.tokenizer.decode(row, skip_special_tokens=True).rstrip() for row in rows] for rows in (ids, other_ids)
    )
    conversion = Conversion(float((logits - expected).abs().max() / expected.abs().max()), (texts, others))
    console.print(Text("\n\n".join(map(_indented, texts)), style="green"))
    if texts == others:
        console.print("The converted model wrote the same.")
    else:
        console.print("The converted model wrote, where two tokens are as likely as one another:")
        console.print(Text("\n\n".join(map(_indented, others)), style="cyan"))
    console.print(f"Largest difference of a logit: {conversion.difference:.0e} of the largest logit.", highlight=False)
    return streams, conversion


def greedy(model: nn.Module, corpus: Corpus, settings: Settings) -> Tensor:
    """Return the prompts continued by the likeliest tokens, as ids `[prompts, S]`.

    Texts grow in a window of one length, so that a converted model is compiled for one shape.
    """
    prompts = [corpus.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ids = torch.full((len(prompts), settings.sampled_tokens), corpus.tokenizer.pad_token_id)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        for at in range(min(map(len, prompts)), settings.sampled_tokens):
            chosen = model(input_ids=ids).logits[:, at - 1].argmax(-1)
            for row, prompt, token in zip(ids, prompts, chosen, strict=True):
                if at >= len(prompt):
                    row[at] = token
    return ids


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _contenders(settings: Settings, corpus: Corpus, console: Console) -> list[Contender]:
    """Return three models with the same random weights: residual, mHC, and the equations of mHC with any H."""
    torch.manual_seed(settings.seed)
    models = [residual_model(settings, corpus)]
    with stage(console, "Three models with the same random weights"):
        for manifold in (None, "unconstrained"):
            streams: Any = {} if manifold is None else {"manifold": manifold}
            models.append(convert(copy.deepcopy(models[0]), streams=settings.streams, inner=settings.inner, **streams))
            set_alpha(models[-1], 1.0)
    backends = (("residual", RESIDUAL), ("mhc", MHC), ("mhc", FREE))
    return [
        contender(name, model.train(), backend=backend, inner=settings.inner)
        for (backend, name), model in zip(backends, models, strict=True)
    ]


def _train(
    contenders: list[Contender], corpus: Corpus, settings: Settings, example: Tensor, console: Console
) -> dict[str, dict[int, float]]:
    """Train all on the same batches while the gain is drawn; return the gains by step."""
    gains: dict[str, dict[int, float]] = {one.name: {} for one in contenders[1:]}
    inputs = {"input_ids": example, "use_cache": False}
    notes = [watched(one.model, inputs, gains[one.name], settings.steps, GAINS) for one in contenders[1:]]
    series = [Series(f"gain of {name}", *SIGNS[name], values) for name, values in gains.items()]
    live = console.is_terminal and not console.record

    def drawn() -> Group:
        return Group(chart(series, settings.steps), Text(_progress(contenders, settings.steps)))

    with Live(console=console, auto_refresh=False) if live else nullcontext() as shown:

        def tick() -> None:
            step = len(contenders[0].losses)
            for note in notes:
                note(step)
            if shown is not None:
                shown.update(drawn(), refresh=True)
            elif step % max(1, settings.steps // PLAIN_LINES) == 0:
                console.print(_progress(contenders, settings.steps), highlight=False)

        train(contenders, training_batches(corpus, settings, stream=0), settings.learning_rate, tick)
    if not live:
        console.print(chart(series, settings.steps))
    return gains


def _progress(contenders: list[Contender], steps: int) -> str:
    """Return the step and the training losses, each a mean over the last few batches."""
    means = (f"{one.name} {statistics.fmean(one.losses[-SMOOTHED:]):.3f}" for one in contenders)
    return f"step {len(contenders[0].losses)} of {steps}; training loss: {', '.join(means)}"


def _table(
    contenders: list[Contender], before: list[float], after: dict[str, list[float]], gains: dict[str, dict[int, float]]
) -> Table:
    """Return held-out losses and gains, a row for each model."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("", "held-out loss", "minus residual", "composite gain"):
        table.add_column(head, justify="right" if head else "left")
    table.add_row("random weights", f"{statistics.fmean(before):.4f}", "", "1", end_section=True)
    for one in contenders:
        delta, error = difference(after[RESIDUAL], after[one.name])
        compared = "" if one.name == RESIDUAL else f"{delta:+.4f} ± {error:.4f}"
        gain = f"{list(gains[one.name].values())[-1]:,.4g}" if one.name in gains else "1"
        table.add_row(LABELS[one.name], f"{statistics.fmean(after[one.name]):.4f}", compared, gain)
    return table


def _reading(after: dict[str, list[float]], gains: dict[str, dict[int, float]], settings: Settings) -> str:
    """Return what the measurements say, whichever way they turned out."""
    delta, error = difference(after[RESIDUAL], after[MHC])
    if abs(delta) <= 2 * error:
        verdict = "no different from the residual model's beyond the noise of the held-out text"
    else:
        verdict = f"{abs(delta):.4f} nats {'below' if delta < 0 else 'above'} the residual model's"
    kept, free = (list(gains[name].values())[-1] for name in (MHC, FREE))
    return (
        f"After {settings.steps} steps from the same weights, any H amplifies a gradient {free:,.3g} times; a doubly "
        f"stochastic H, {kept:.2f} times. The held-out loss of mHC is {verdict} (one seed)."
    )


def _report(model: nn.Module, file: Path, console: Console) -> None:
    """Write the report of `model`; open it where a browser shows it beside the terminal."""
    with stage(console, "What the compiler sees, as a page"):
        inspect(model).html(file)
    console.print(f"  {file}", highlight=False, soft_wrap=True)
    windows = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if console.is_terminal and not console.record and windows:
        webbrowser.open(file.absolute().as_uri())


def next_commands(out: OutputFolder) -> list[str]:
    """Return three commands to go on with."""
    return [
        f"mhc-compile inspect {out / 'mhc'} --layer model.layers.0",
        f"mhc-compile convert {out / 'mhc'} {out.path / 'back'} --to residual",
        "mhc-compile demo --full",
    ]
