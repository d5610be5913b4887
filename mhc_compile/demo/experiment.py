"""The experiment: train a residual model, convert its folder, go on training both forms side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from mhc_compile.conversion import convert, convert_folder
from mhc_compile.demo.output import OutputFolder
from mhc_compile.demo.settings import Settings
from mhc_compile.demo.text import Corpus, build_corpus, held_out_batches, training_batches
from mhc_compile.loading import from_pretrained
from mhc_compile.measure import StreamMeasures, measure_streams, measuring
from mhc_compile.parameters import stream_parameters
from mhc_compile.report import inspect
from mhc_compile.trial.training import Contender, contender, renewed, train

PROMPT = "def read("
FREE_STEPS = 100
"""Steps of the streams whose H is free: their gain shows in so few."""
MEASURES = 10
"""How often the gain is measured in them."""
SECOND_PEAK = 0.5
"""The second phase starts from a trained model: half the learning rate."""


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured, for the report."""

    settings: Settings
    corpus: Corpus
    first: list[float]
    """Training losses of the residual model before the conversion."""
    residual: Contender
    streams: Contender
    before: tuple[list[float], list[float]]
    """Held-out losses at the conversion, residual and converted, batch by batch."""
    after: tuple[list[float], list[float]]
    gains: dict[str, dict[int, float]]
    """The mean backward gain of all sites by the steps after the conversion: `mhc`, and `free` without the manifold."""
    measures_before: StreamMeasures
    measures_after: StreamMeasures
    samples: tuple[str, str]
    inspection: str
    compile_seconds: tuple[float, float]


def run_experiment(settings: Settings, out: OutputFolder, console: Console) -> Outcome:
    """Run everything; the three checkpoint folders are written to `out`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are shown
    torch.manual_seed(settings.seed)
    with stage(console, "Reading the standard library and training a tokenizer on it"):
        corpus = build_corpus(settings)
    console.print(
        f"  {corpus.files} files, {corpus.size / 1e6:.1f} MB, {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.held_out):,} held out"
    )
    model = residual_model(settings, corpus)
    residual = contender("residual", model, backend="residual", inner=settings.inner)
    held_out = held_out_batches(corpus, settings)
    train_shown(console, "Training a residual Llama", [residual], corpus, settings, phase=0)
    first = residual.losses
    residual_compile = residual.seconds[0]
    _save(model, corpus, out / "residual")

    with stage(console, f"Converting the folder to {settings.streams} streams"):
        converted = _converted(out / "residual", out / "mhc", settings)
    streams = contender(f"mHC, {settings.streams} streams", converted, backend="mhc", inner=settings.inner)
    residual = renewed(residual)
    with stage(console, "Held-out loss of both"):
        begin = time.perf_counter()
        streams.held_out(held_out[:1])
        streams_compile = time.perf_counter() - begin
        before = residual.held_out(held_out), streams.held_out(held_out)
    console.print(f"  {statistics.fmean(before[0]):.6f} residual, {statistics.fmean(before[1]):.6f} with streams")
    example = {"input_ids": held_out[0], "use_cache": False}
    (measures_before,) = measure_streams(converted, example).values()

    gains: dict[str, dict[int, float]] = {"mhc": {}, "free": {}}
    watch = watched(converted, example, gains["mhc"], settings.steps)
    train_shown(console, "Training both on the same batches", [residual, streams], corpus, settings, watch, phase=1)
    streams_compile += streams.seconds[0]
    free = contender("H free", free_streams(out / "residual", settings), backend="mhc", inner="eager")
    few = replace(settings, steps=min(settings.steps, FREE_STEPS))
    watch = watched(free.model, example, gains["free"], few.steps)
    train_shown(console, "Training streams whose H is free", [free], corpus, few, watch, phase=1)
    _save(converted, corpus, out / "mhc-trained")
    with stage(console, "Held-out loss of both, the state of the streams, samples"):
        after = residual.held_out(held_out), streams.held_out(held_out)
        (measures_after,) = measure_streams(converted, example).values()
        samples = _sample(model, corpus, settings), _sample(converted, corpus, settings)
        inspection = inspect(converted).text()
    return Outcome(
        settings, corpus, first, residual, streams, before, after, gains, measures_before, measures_after, samples,
        inspection,
        (residual_compile, streams_compile),
    )  # fmt: skip


def residual_model(settings: Settings, corpus: Corpus) -> nn.Module:
    """Return a small Llama at its random start."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(model_config(settings, corpus.tokenizer))
    return model


def model_config(settings: Settings, tokenizer: Any) -> Any:
    """Return the `LlamaConfig` of that model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )


def _save(model: Any, corpus: Corpus, folder: Path) -> None:
    model.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)


def _converted(source: Path, target: Path, settings: Settings) -> nn.Module:
    """Return the n-stream form of the checkpoint in `source`. Outside `torch.compile` (sampling) it is not compiled."""
    convert_folder(source, target, streams=settings.streams)
    return from_pretrained(target, inner="eager", local_files_only=True).train()


def free_streams(folder: Path, settings: Settings) -> nn.Module:
    """Return the folder's model with n streams and any H, whose alpha is 1: the function is the residual model's."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    convert(model, streams=settings.streams, manifold="unconstrained", inner="eager")
    set_alpha(model, 1.0)
    return model.train()


def set_alpha(model: nn.Module, value: float) -> None:
    """Set alpha of all sites: how fast their coefficients learn. While phi is zero, the function is unchanged."""
    with torch.no_grad():
        for name, parameter in stream_parameters(model).items():
            if name.endswith(".alpha"):
                parameter.fill_(value)


def watched(
    model: nn.Module, example: dict[str, Any], gains: dict[int, float], steps: int, times: int = MEASURES
) -> Callable[[int], None]:
    """Return a function of the step that so many `times` notes the mean backward gain of all sites of `model`."""
    measure = measuring(model, example)

    def note(step: int) -> None:
        if step % max(1, steps // times) == 0:
            (measures,) = measure().values()
            gains[step] = measures.gain.backward_mean

    note(0)
    return note


def train_shown(
    console: Console,
    text: str,
    contenders: list[Contender],
    corpus: Corpus,
    settings: Settings,
    watch: Callable[[int], None] | None = None,
    *,
    phase: int,
) -> None:
    """Train on the batches of a phase with a progress bar; after the conversion at half the learning rate."""
    batches = training_batches(corpus, settings, stream=phase)
    peak = settings.learning_rate * (SECOND_PEAK if phase else 1.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(text, total=len(batches), loss="compiling")

        def tick() -> None:
            if watch is not None:
                watch(len(contenders[-1].losses))
            progress.update(task, advance=1, loss="loss " + " | ".join(f"{c.losses[-1]:.3f}" for c in contenders))

        train(contenders, batches, peak, tick)


def _sample(model: nn.Module, corpus: Corpus, settings: Settings) -> str:
    """Return the prompt continued, with the same random numbers for every model."""
    ids = corpus.tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(settings.seed)
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=settings.sampled_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
        )
    return str(corpus.tokenizer.decode(out[0], skip_special_tokens=True)).rstrip()


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Show a spinner, then one line with the duration. A recording would keep every frame: it has none."""
    begin = time.perf_counter()
    with nullcontext() if console.record else console.status(text):
        yield
    console.print(f"{text}: {time.perf_counter() - begin:.1f} s")
