"""Samples as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile import palette
from mhc_compile.diagnostics import MHCError
from mhc_compile.probes.sample import ROWS, Sample

_PANELS = 12
"""Heat maps in a row."""
_LEAST = 1e-7
"""Differences of entries below this are shown as this."""


def draw(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Draw PNG files of the samples of every owner in `folder`. Raises MHC233 without matplotlib, MHC413.

    `OWNER-mix.png`: how far the mean H of every site is from I; `-gain.png`: gains and distances along the depth;
    `-streams.png`: norms, gradients, separation and entropies by site; `-gates.png`: histograms of memories' gates; all
    of the last sample. `-history.png`: separation and composite gain of all samples; `-rows.png`: the rows that
    look-ups read in them.

    In a depth form: `-weights.png`, the mean weights of every site's sources, and `-depth.png`, root mean squares and
    gradients along the depth and entropies, of the last sample; `-history.png`: outputs and gradients of all samples.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MHCError("MHC233", str(error)) from error
    of_streams = {"mix": _mixes, "gain": _gains, "streams": _streams, "gates": _gates}
    of_depth = {"weights": _weights, "depth": _depth}
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for owner in dict.fromkeys(sample.owner for sample in samples):
            of_owner = [sample for sample in samples if sample.owner == owner]
            pictures = of_depth if "read" in of_owner[-1].values else of_streams
            parts = [(name, picture, of_owner[-1:]) for name, picture in pictures.items()]
            for name, picture, shown in (*parts, ("history", _history, of_owner), ("rows", _rows, of_owner)):
                figure = Figure(layout="constrained")
                if picture(figure, shown):
                    path = folder / f"{owner or 'model'}-{name}.png"
                    figure.savefig(path, dpi=110)
                    drawn.append(path)
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error
    return drawn


def _mixes(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    mixes = sample.values["mix"]
    # H begins near I, from which its entries differ by less than the eye sees.
    moved = (mixes - torch.eye(mixes.shape[-1])).abs().clamp(min=_LEAST).log10()
    columns = min(_PANELS, len(mixes))
    rows = math.ceil(len(mixes) / columns)
    figure.set_size_inches(1.1 * columns + 1.2, 1.3 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    low, high = float(moved.min()), max(float(moved.max()), math.log10(_LEAST) + 1)
    image = None
    for axis, name, of_site in zip(axes, sample.sites, moved, strict=False):
        image = axis.imshow(of_site, vmin=low, vmax=high, cmap=palette.HEAT)
        axis.set_title(_short(name), fontsize=7)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="log10 of |H - I|")
    title = f"{_title(sample)}: how far the mean H is from I; rows are streams written, columns streams read"
    figure.suptitle(title, fontsize=9, wrap=True)
    return True


def _gains(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    figure.set_size_inches(17, 3.6)
    one, all_, off = figure.subplots(1, 3)
    for axis, which, title in ((one, "gain", "of each site's H"), (all_, "composite", "of all sites up to this one")):
        for i, direction in enumerate(("forward", "backward")):
            for j, what in enumerate(("mean", "max")):
                values = sample.values[f"{which}_{direction}_{what}"]
                axis.plot(values, label=f"{direction}, {what}", **palette.series(i + 2 * j))
        axis.set_title(f"gain {title}", fontsize=9)
    for j, what in enumerate(("mean", "max")):
        off.semilogy(sample.values[f"distance_{what}"].clamp(min=1e-9), label=what, **palette.series(j))
    off.set_title("distance of H from doubly stochastic", fontsize=9)
    _along_depth(figure, (one, all_, off), sample)
    return True


def _streams(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    values = sample.values
    maps = {"streams: root mean square": values["streams"]}
    if "streams_gradient" in values:
        maps["gradient that the mix hands back: 2-norm"] = values["streams_gradient"]
    maps |= {"pre: mean over tokens": values["pre"], "post: mean over tokens": values["post"]}
    figure.set_size_inches(12, 2.6 + 1.5 * len(maps))
    grid = figure.add_gridspec(len(maps) + 1, 2, height_ratios=[*[1.0] * len(maps), 1.8])
    axes = []
    for row, (title, of_streams) in enumerate(maps.items()):
        axis = figure.add_subplot(grid[row, :])
        image = axis.imshow(of_streams.T, aspect="auto", cmap=palette.HEAT, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("stream")
        axis.set_yticks(range(of_streams.shape[1]))
        figure.colorbar(image, ax=axis)
        axes.append(axis)
    apart, entropies = figure.add_subplot(grid[-1, 0]), figure.add_subplot(grid[-1, 1])
    apart.plot(values["separation"], **palette.look("mhc", points=True))
    apart.set_ylim(bottom=0)
    apart.set_title("separation of the streams after each site", fontsize=9)
    for i, name in enumerate(("pre", "post")):
        entropies.plot(values[f"{name}_entropy"], label=name, **palette.series(i))
    entropies.axhline(math.log(values["streams"].shape[1]), color=palette.NEUTRAL, linewidth=1)
    entropies.set_title("entropy in nats; at most log n, the thin line", fontsize=9)
    _along_depth(figure, (*axes, apart, entropies), sample)
    return True


def _gates(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    if "gates" not in sample.values:
        return False
    counts = sample.values["gates"]
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    edges = torch.linspace(0, 1, counts.shape[-1] + 1)
    figure.set_size_inches(1.5 + 4.2 * len(sample.layers), 3.2)
    for axis, layer, streams in zip(
        figure.subplots(1, len(sample.layers), squeeze=False)[0], sample.layers, shares, strict=True
    ):
        for i, of_stream in enumerate(streams):
            axis.plot((edges[1:] + edges[:-1]) / 2, of_stream, label=f"stream {i}", **palette.series(i))
        axis.set(title=layer, xlabel="gate", ylabel="share of tokens")
    palette.finish(figure, values=False)
    figure.suptitle(f"{_title(sample)}: gates of memories", fontsize=9)
    return True


def _weights(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    if "weights" not in sample.values:
        return False
    weights = sample.values["weights"]
    figure.set_size_inches(2.5 + 0.25 * weights.shape[1], 1.5 + 0.25 * len(weights))
    axis = figure.subplots()
    largest = float(weights.abs().max())
    low = -largest if weights.min() < 0 else 0.0
    image = axis.imshow(weights, vmin=low, vmax=largest, cmap=palette.HEAT, interpolation="nearest")
    places = range(0, len(sample.sites), max(1, len(sample.sites) // 16))
    axis.set_yticks(list(places), [_short(sample.sites[i]) for i in places], fontsize=7)
    axis.set(xlabel="output: 0 the entry, k + 1 that of site k", ylabel="site")
    figure.colorbar(image, ax=axis)
    figure.suptitle(f"{_title(sample)}: mean weights of what each site reads", fontsize=9)
    return True


def _depth(figure: Any, samples: Sequence[Sample]) -> bool:
    (sample,) = samples
    values = sample.values
    panels = {
        "root mean squares": {name: name for name in ("read", "newest", "output")},
        "gradients: 2-norm": {"read_gradient": "of what is read", "output_gradient": "of the output"},
        "entropy of the weights in nats": {"weights_entropy": "mean over tokens"},
    }
    shown = {title: lines for title, lines in panels.items() if all(name in values for name in lines)}
    figure.set_size_inches(5.5 * len(shown), 3.6)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, shown.items(), strict=True):
        for i, (name, label) in enumerate(lines.items()):
            axis.plot(values[name], label=label, **palette.series(i, points=True))
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
    _along_depth(figure, axes, sample)
    return True


def _history(figure: Any, samples: Sequence[Sample]) -> bool:
    same = [sample for sample in samples if sample.sites == samples[-1].sites]
    if len(same) < 2:
        return False
    titles = {"separation": "separation of the streams", "composite_backward_max": "largest composite gain, backward"}
    if "read" in same[-1].values:
        titles = {"output": "outputs: root mean square", "output_gradient": "gradients of outputs: 2-norm"}
    shown = {name: title for name, title in titles.items() if all(name in sample.values for sample in same)}
    figure.set_size_inches(6 * len(shown), 4)
    steps = [sample.step for sample in same]
    for axis, (name, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        table: Tensor = torch.stack([sample.values[name] for sample in same], 1)
        image = axis.pcolormesh(steps, range(len(table)), table, shading="nearest", cmap=palette.HEAT)
        axis.set(xlabel="step", ylabel="site")
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis)
    return True


def _rows(figure: Any, samples: Sequence[Sample]) -> bool:
    same = [sample for sample in samples if sample.look_ups == samples[-1].look_ups]
    if not same[-1].look_ups:
        return False
    figure.set_size_inches(14, 3.6)
    steps = [sample.step for sample in same]
    titles = ("different rows that a step reads", "entropy of how often each is read, in nats")
    for axis, name, title in zip(figure.subplots(1, 2), ROWS, titles, strict=True):
        of_look_ups = torch.stack([s.values[name] for s in same], 1)
        for i, (look_up, values) in enumerate(zip(same[-1].look_ups, of_look_ups, strict=True)):
            axis.plot(steps, values, label=look_up, **palette.series(i, points=True))
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    palette.finish(figure)
    figure.suptitle(f"{same[-1].owner or 'model'}: rows of tables", fontsize=9)
    return True


def _along_depth(figure: Any, axes: Sequence[Any], sample: Sample) -> None:
    places = range(0, len(sample.sites), max(1, len(sample.sites) // 8))
    for axis in axes:
        axis.set_xticks(list(places), [_short(sample.sites[i]) for i in places], fontsize=7)
    palette.finish(figure)
    figure.suptitle(_title(sample), fontsize=9)


def _title(sample: Sample) -> str:
    return f"{sample.owner or 'model'}, step {sample.step}"


def _short(name: str) -> str:
    """Return a module path from its last number on: `3.mlp#0` of `layers.3.mlp#0`."""
    parts = name.split(".")
    first = next((i for i in reversed(range(len(parts))) if parts[i].split("#")[0].isdigit()), 0)
    return ".".join(parts[first:])
