"""A trial: every form of one model from the same start, on the same batches, in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.config import parse_options, stream_spec
from mhc_compile.configured import weighted
from mhc_compile.conversion import convert
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.forms import StreamForm, form_of
from mhc_compile.kernels.spec import StreamSpec, form_names
from mhc_compile.kernels.start import start_of
from mhc_compile.measure import measure_streams
from mhc_compile.overrides import Inner
from mhc_compile.trial.training import Contender, contender, even_windows, random_windows, train

RESIDUAL = "residual"
HELD_OUT_SHARE = 0.1
"""The last part of the text, which is not trained on."""
HELD_OUT_BATCHES = 16


@dataclass(frozen=True)
class Arm:
    """One form: its text on the command line, and the options of `convert`; None for the residual model itself."""

    text: str
    options: Mapping[str, Any] | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read `residual`, `mhc`, or `hc:streams=2:start=paper`. Raises MHC204."""
        form, *settings = text.split(":")
        if form == RESIDUAL:
            if settings:
                raise MHCError("MHC204", f"{text!r}: the residual model has no options")
            return cls(text, None)
        if form not in form_names():
            raise MHCError("MHC204", f"{form!r}; known: {', '.join((RESIDUAL, *form_names()))}")
        starts = [s.removeprefix("start=") for s in settings if s.startswith("start=")]
        options = parse_options(s for s in settings if not s.startswith("start="))
        stream_spec({"form": form, **options})
        start_of(starts[-1] if starts else "default")  # type: ignore[arg-type]
        return cls(text, {"form": form, **options, **({"start": starts[-1]} if starts else {})})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Name the model, its forms and the length of a trial."""

    model: Path
    """A checkpoint folder, whose weights are used if there are any, or a `config.json`."""
    arms: Sequence[Arm]
    steps: int
    seeds: int
    batch: int
    length: int
    lr: float
    inner: Inner

    def __post_init__(self) -> None:
        if len({arm.text for arm in self.arms}) < len(self.arms):
            raise MHCError("MHC204", "a form is named twice")


@dataclass
class Result:
    """Hold the measurements of one form, seed by seed."""

    form: str
    parameters: int = 0
    held_out: list[float] = field(default_factory=list)
    """The loss after the last step, in nats per token."""
    losses: list[list[float]] = field(default_factory=list)
    """Training losses of every step."""
    seconds: list[float] = field(default_factory=list)
    """Median duration of a step after compilation."""
    saved: int = 0
    """Bytes that a step keeps for its backward pass."""
    gain: list[float] = field(default_factory=list)
    """The mean backward gain of all sites, for forms with streams."""


def split(tokens: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the tokens to train on and those held out. Raises MHC528 for a text too short for one batch."""
    border = round(len(tokens) * (1 - HELD_OUT_SHARE))
    parts = tokens[:border], tokens[border:]
    if min(map(len, parts)) <= settings.length:
        raise MHCError("MHC528", f"{len(tokens)} tokens are too few for windows of {settings.length}")
    return parts


def run(settings: Settings, tokens: Tensor, tick: Callable[[str], None]) -> list[Result]:
    """Train every form with every seed; call `tick` with the losses after each step of all.

    Raises what `weighted` raises for the model, and `convert` for its forms, before anything is trained.
    """
    training, held_out = split(tokens, settings)
    tests = even_windows(held_out, HELD_OUT_BATCHES, settings.batch, settings.length)
    results = [Result(arm.text) for arm in settings.arms]
    for seed in range(settings.seeds):
        start, converted, _ = weighted(settings.model, seed=seed)
        if converted:
            raise MHCError("MHC208", f"{settings.model} is converted", way_out="give the residual folder")
        batches = random_windows(training, settings.steps, settings.batch, settings.length, seed)
        _check_loss(start, batches[0])
        contenders = [_contender(copy.deepcopy(start), arm, settings) for arm in settings.arms]

        def told(contenders: Sequence[Contender] = contenders) -> None:
            tick("loss " + " | ".join(f"{c.losses[-1]:.3f}" for c in contenders))

        saved = [saved_bytes(c, batches[0]) for c in contenders]
        train(contenders, batches, settings.lr, told)
        for result, arm, one, kept in zip(results, settings.arms, contenders, saved, strict=True):
            _note(result, arm, one, tests, kept)
    return results


def _check_loss(model: nn.Module, batch: Tensor) -> None:
    """Raise MHC528 where the model itself, before anything is compiled, gives no loss for a batch."""
    with torch.no_grad():
        try:
            loss = model(input_ids=batch, labels=batch).loss
        except Exception as error:  # of the model's own code: another signature, more positions than it has
            reason = next(iter(str(error).splitlines()), "")
            shape, kind = tuple(batch.shape), type(error).__name__
            text = f"{type(model).__name__} gives no loss for {shape} tokens: {kind}: {reason}"
            raise MHCError("MHC528", text, way_out="name a causal language model, or a shorter --length") from error
    if not isinstance(loss, Tensor) or not loss.isfinite():
        raise MHCError("MHC528", f"{type(model).__name__} gives the loss {loss}")


def _contender(model: nn.Module, arm: Arm, settings: Settings) -> Contender:
    model.train()
    if arm.options is None:
        return contender(arm.text, model, backend=RESIDUAL, inner=settings.inner)
    return contender(arm.text, convert(model, **arm.options), backend="mhc", inner=settings.inner)


def saved_bytes(one: Contender, batch: Tensor) -> int:
    """Return the bytes that autograd keeps between a forward and its backward, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in one.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = one.program(input_ids=batch, labels=batch).loss
    del loss
    return sum(kept.values())


def _note(result: Result, arm: Arm, one: Contender, tests: Sequence[Tensor], saved: int) -> None:
    result.parameters = sum(p.numel() for p in one.model.parameters())
    result.losses.append(one.losses)
    result.held_out.append(statistics.fmean(one.held_out(tests)))
    result.seconds.append(statistics.median(one.timed))
    result.saved = saved
    if arm.options is not None and isinstance(form_of(StreamSpec(form=arm.options["form"])), StreamForm):
        measures = measure_streams(one.model, {"input_ids": tests[0], "use_cache": False})
        result.gain.append(max(m.gain.backward_mean for m in measures.values()))
