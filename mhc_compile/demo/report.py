"""The outcome as a table, a figure and numbers to keep."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from mhc_compile import palette
from mhc_compile.demo.experiment import Outcome
from mhc_compile.measure import CompositeGain, StreamMeasures
from mhc_compile.trial.studies import smooth
from mhc_compile.trial.training import Contender, difference, paired, spread

_SMOOTHED_OVER = 15


def numbers(outcome: Outcome) -> dict[str, Any]:
    """Return the measurements as plain values."""
    residual, streams = outcome.residual, outcome.streams
    pair = {"residual": residual, "streams": streams}
    means = [statistics.fmean(losses) for losses in (*outcome.before, *outcome.after)]
    delta, error = difference(*outcome.after)
    return {
        "settings": asdict(outcome.settings),
        "held_out": {
            "at_conversion": {"residual": means[0], "streams": means[1]},
            "relative_change_by_conversion": max(abs(b - a) / a for a, b in zip(*outcome.before, strict=True)),
            "at_end": {"residual": means[2], "streams": means[3]},
            "difference_at_end": delta,
            "standard_error": error,
        },
        "seconds_per_step": {name: asdict(spread(c.timed)) for name, c in pair.items()},
        "seconds_ratio": asdict(paired(residual, streams)),
        "seconds_to_compile": dict(zip(pair, outcome.compile_seconds, strict=True)),
        "parameters": {name: _size(c) for name, c in pair.items()},
        "gains": {name: {str(step): gain for step, gain in by_step.items()} for name, by_step in outcome.gains.items()},
        "at_conversion": _measured(outcome.measures_before),
        "at_end": _measured(outcome.measures_after),
        "training_loss": {"before": outcome.first, **{name: c.losses for name, c in pair.items()}},
    }


def _measured(measures: StreamMeasures) -> dict[str, Any]:
    return {
        "separation": dict(zip(measures.sites, measures.separation, strict=True)),
        "composite_gain": asdict(measures.gain),
    }


def _size(one: Contender) -> int:
    return sum(p.numel() for p in one.model.parameters())


def table(outcome: Outcome) -> Table:
    """Return a table of the two contenders side by side."""
    figures = numbers(outcome)
    residual, streams, held_out = outcome.residual, outcome.streams, figures["held_out"]
    out = Table(title="The same weights, the same batches: residual against mHC", title_justify="left")
    out.add_column("")
    out.add_column(residual.name, justify="right")
    out.add_column(streams.name, justify="right")
    inner, threads = outcome.settings.inner, outcome.settings.threads
    out.add_row("compiled by", inner, f"mhc with {inner}")
    out.add_row("threads", str(threads), str(threads))
    sizes = _size(residual), _size(streams)
    out.add_row("parameters", f"{sizes[0]:,}", f"{sizes[1]:,} (+{sizes[1] / sizes[0] - 1:.1%})")
    start, end = held_out["at_conversion"], held_out["at_end"]
    change = held_out["relative_change_by_conversion"]
    out.add_row("held-out loss at conversion", f"{start['residual']:.6f}", f"{start['streams']:.6f}")
    out.add_row("  largest change of a batch", "", f"{change:.0e} of it")
    out.add_row(f"after {outcome.settings.steps} more steps", f"{end['residual']:.4f}", f"{end['streams']:.4f}")
    delta, error = held_out["difference_at_end"], held_out["standard_error"]
    out.add_row("  difference, standard error", "", f"{delta:+.4f} ± {error:.4f}", end_section=True)
    out.add_row("time per step (quartiles)", _milliseconds(residual.timed), _milliseconds(streams.timed))
    ratio = paired(residual, streams)
    out.add_row("  ratio of paired steps", "1", f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
    seconds = outcome.compile_seconds
    out.add_row("tracing and compiling", f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s", end_section=True)
    before, after = outcome.measures_before, outcome.measures_after
    out.add_row("stream separation at the exit", "", f"{before.separation[-1]:.1e} -> {after.separation[-1]:.1e}")
    out.add_row("forward gain (mean, max)", "", _gain(after.gain, "forward"))
    out.add_row("backward gain (mean, max)", "", _gain(after.gain, "backward"))
    step, free = list(outcome.gains["free"].items())[-1]
    out.add_row(f"  with a free H, alpha = 1, {step} steps", "", f"{free:.4g}")
    return out


def _milliseconds(values: list[float]) -> str:
    quartiles = spread(values)
    return f"{1e3 * quartiles.median:.0f} ms ({1e3 * quartiles.low:.0f}-{1e3 * quartiles.high:.0f})"


def _gain(gain: CompositeGain, direction: str) -> str:
    gains = asdict(gain)
    return f"{gains[direction + '_mean']:.4f}, {gains[direction + '_max']:.4f}"


def draw(outcome: Outcome, path: Path) -> None:
    """Draw the losses, their paired difference, and the composite gain with and without a manifold."""
    from matplotlib.figure import Figure

    steps = outcome.settings.steps
    residual, streams = outcome.residual, outcome.streams
    later = range(steps, 2 * steps)
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    loss, deltas_axis, gain = figure.subplots(1, 3)

    def smoothed(losses: list[float]) -> list[float]:
        return smooth([losses], _SMOOTHED_OVER)

    looks = {form: palette.look(form) for form in ("residual", "mhc", "free")}
    loss.plot(range(steps), smoothed(outcome.first), color=palette.NEUTRAL, label="before the conversion")
    loss.plot(later, smoothed(outcome.first + residual.losses)[steps:], label=residual.name, **looks["residual"])
    loss.plot(later, smoothed(outcome.first + streams.losses)[steps:], label=streams.name, **looks["mhc"])
    for x, pair in ((steps, outcome.before), (2 * steps, outcome.after)):
        for losses, form in zip(pair, ("residual", "mhc"), strict=True):
            how = {**palette.look(form, points=True), "linestyle": "none"}
            loss.plot(x, statistics.fmean(losses), **how)
    loss.axvline(steps, color=palette.NEUTRAL, linewidth=1)
    loss.set(title="Training loss (held-out: markers)", xlabel="step", ylabel="loss in nats per token")
    deltas = [b - a for a, b in zip(residual.losses, streams.losses, strict=True)]
    deltas_axis.plot(later, deltas, color=palette.NEUTRAL, linewidth=1, alpha=0.4)
    deltas_axis.plot(later, smoothed(deltas), **looks["mhc"])
    deltas_axis.axhline(0, color=palette.NEUTRAL, linewidth=1)
    deltas_axis.set(title="Loss of mHC minus residual, same batch", xlabel="step")
    for name, label in (("mhc", streams.name), ("free", "H free, alpha = 1")):
        by_step = outcome.gains[name]
        how = palette.look(name, points=True)
        gain.plot([steps + step for step in by_step], list(by_step.values()), label=label, **how)
    gain.set(title="Composite gain of all sites, backward", xlabel="step", yscale="log")
    palette.finish(figure)
    figure.savefig(path, dpi=120)


def reading(outcome: Outcome) -> str:
    """Return one sentence on what to look at, made from the measurements."""
    figures, after = numbers(outcome), outcome.measures_after
    held_out, ratio = figures["held_out"], figures["seconds_ratio"]["median"]
    delta, error = held_out["difference_at_end"], held_out["standard_error"]
    if abs(delta) <= 2 * error:
        verdict = "differs by no more than the noise of the held-out text"
    else:
        verdict = f"is {abs(delta):.4f} {'lower' if delta < 0 else 'higher'} with mHC"
    moved, apart = held_out["relative_change_by_conversion"], after.separation[-1]
    gain = max(after.gain.forward_max, after.gain.backward_max)
    return (
        f"What to look at: the conversion moved the held-out loss of no batch by more than {moved:.0e} of it; from "
        f"there the streams came apart by {apart:.1%} of their mean at a composite gain of {gain:.3f} at most, and "
        f"after {outcome.settings.steps} steps, each {ratio:.2f} times as long as the residual one, the held-out loss "
        f"{verdict} (one seed; the error is over held-out batches)."
    )


def samples(outcome: Outcome) -> str:
    """Return what both models wrote."""
    return "\n\n".join(
        f"--- {one.name} ---\n{text}"
        for one, text in zip((outcome.residual, outcome.streams), outcome.samples, strict=True)
    )
