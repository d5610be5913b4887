"""What a trial found, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mhc_compile import palette
from mhc_compile.trial import studies
from mhc_compile.trial.run import Result, Settings


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
    for result, how in zip(results[1:], palette.looks([r.form for r in results])[1:], strict=True):
        pairs = zip(result.losses, results[0].losses, strict=True)
        apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        axes.plot(studies.smooth(apart), label=result.form, **how)
    axes.axhline(0, color=palette.NEUTRAL, linewidth=1)
    axes.set(xlabel="step", ylabel=f"training loss minus {results[0].form}, nats")
    palette.finish(figure)
    return figure
