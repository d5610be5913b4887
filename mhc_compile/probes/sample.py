"""One sample of one stream owner: its figures by name, put together from all calls of a step, and as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.measures import entropy
from mhc_compile.kernels.probe_ops import BINS, DEPTH_GRADIENTS, depth_layout, gradient_layout, layout
from mhc_compile.probes.recording import Record, Shapes, layouts

FORMAT = 1
_DIGITS = 6
"""Significant ones in a file."""
MATRICES = ("mix", "weights")
"""Means over tokens that are for files and plots."""
ROWS = ("rows_used", "rows_entropy")
"""The names of values that a sample has for each of its look-ups."""
FIGURES = {
    "gain": ("gain_forward_max", "gain_backward_max"),
    "composite": ("composite_forward_max", "composite_backward_max"),
    "off": ("distance_max",),
    "apart": ("separation",),
    "pre": ("pre_entropy",),
    "post": ("post_entropy",),
    "read": ("read",),
    "newest": ("newest",),
    "output": ("output",),
    "entropy": ("weights_entropy",),
    "gradient": ("branch_gradient", "output_gradient"),
}
"""The columns of a site's figures, each the largest of the named values."""
_SQUARED = ("streams", "branch", "read", "newest", "output")
"""Figures recorded as mean squares; a sample holds their roots."""


@dataclass(frozen=True)
class Sample:
    """The figures of one owner's streams in one step, over all its calls and tokens (including padding).

    `values` holds float32 tensors on the CPU, the first dimension L counting the sites in the order of the stream, `n`
    streams:

        gain_forward_mean, _max        [L]       largest row sum of the site's `|H|`, over tokens
        gain_backward_mean, _max       [L]       largest column sum of it
        composite_forward_mean, _max   [L]       the same of `H_l ... H_1`, the sites up to this one (arXiv 2512.24880)
        composite_backward_mean, _max  [L]       (sites after a transposed stream begin a new product)
        distance_mean, _max            [L]       of H from doubly stochastic: `|row or column sum - 1|` or `-entry`
        pre_entropy, post_entropy      [L]       in nats, of the shares of the streams in pre and post: 0 to log n
        separation                     [L]       after the site, the streams' deviation from their mean, relative
        streams, branch                [L, n], [L]   root mean squares: of the streams after the site, of its branch
        pre, post, mix                 [L, n], [L, n], [L, n, n]   means over tokens
        streams_gradient               [L, n]    2-norm over all tokens of the gradient that the site's mix hands back
        branch_gradient                [L]       2-norm over all tokens of the gradient of the branch's output
        gates                          [M, n, bins]   memories: how many tokens have a gate in each part of 0 to 1
        rows_used                      [T]       look-ups: how many different rows of their table they read
        rows_entropy                   [T]       in nats, of how often each was read: 0 to log rows_used

    Of a depth form, with S = L + 1 places (0 the entry, k + 1 the output of site k):

        read, newest, output           [L]       root mean squares: of what the site reads, of the newest output before
                                                 it, and of its own, in the form's terms (DenseFormer's is the stream)
        weights                        [L, S]    means over tokens of the weights of the outputs, 0 for those not read
        weights_entropy                [L]       in nats, of the shares of the outputs in them
        read_gradient, output_gradient [L]       2-norms over all tokens

    Weights are there where the form tells them (`DepthForm.weights`).

    Gradients are there where a backward pass ran inside the step (of several, the norm of all together), gates where
    the owner has memories of n-grams, rows where it looks any up.
    """

    step: int
    owner: str
    """Module path, `""` for the model itself."""
    tokens: int
    sites: tuple[str, ...]
    layers: tuple[str, ...]
    """The M layers with a memory."""
    values: dict[str, Tensor]
    look_ups: tuple[str, ...] = ()
    """The T look-ups: a layer of n-grams, `over-encoding`, or `ultra-mem` and the layer that reads."""

    def line(self) -> str:
        """Return the sample as one line of JSON; a value that is not finite is null."""
        about = {"format": FORMAT, "step": self.step, "owner": self.owner, "tokens": self.tokens}
        names = {"sites": self.sites, "layers": self.layers, "look_ups": self.look_ups}
        values = {name: _plain(t.tolist()) for name, t in self.values.items()}
        return json.dumps({**about, **names, "values": values}, allow_nan=False)

    def summary(self) -> dict[str, float]:
        """Return one figure for each quantity: the largest over the sites of a maximum, the mean over them of the rest.

        Matrices and histograms are left out.
        """
        return {
            name: float(values.max() if name.endswith("_max") else values.mean())
            for name, values in self.values.items()
            if name not in (*MATRICES, "gates")
        }

    def figures(self) -> dict[str, list[float]]:
        """Return figures of every site by their short names: the larger one of forward and backward."""
        values = {title: [self.values[n] for n in names if n in self.values] for title, names in FIGURES.items()}
        return {title: torch.stack(of).amax(0).tolist() for title, of in values.items() if of}

    def gates(self) -> list[float]:
        """Return the mean gate of every layer in `layers`, over tokens and streams."""
        counts = self.values["gates"].sum(1) if self.layers else torch.zeros(0, BINS)
        middles = (torch.arange(BINS) + 0.5) / BINS
        return ((counts * middles).sum(-1) / counts.sum(-1)).tolist()


def read_samples(path: str | Path) -> list[Sample]:
    """Read the samples in a file that `Probes.write` made. Raises MHC232 for invalid files, MHC413."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MHCError("MHC413", str(error)) from error
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(_parsed(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise MHCError("MHC232", f"line {number} of {path}: {type(error).__name__}: {error}") from error
    if not samples:
        raise MHCError("MHC232", f"{path} is empty")
    return samples


def sample_of(record: Record, step: int) -> Sample:
    """Combine all calls of a record: means over all tokens, maxima, and sums of counts and squared gradients."""
    calls = [call for call in record.calls if call.figures is not None]
    sites = tuple(dict.fromkeys(name for call in calls for name in call.sites))
    layers = tuple(dict.fromkeys(name for call in calls for name in call.layers))
    rows = _by_name(sites, ((call.sites, call.figures) for call in calls))
    weights = [r[:, :1] / r[:, 0].sum() for r in rows]
    shapes, of_gradients = layouts(record.parameters)
    means = _split(torch.stack([(w * r).sum(0) for w, r in zip(weights, rows, strict=True)]), shapes)
    largest = _split(torch.stack([r.amax(0) for r in rows]), shapes)
    tokens = int(max(r[:, 0].sum() for r in rows))
    figures = {name: largest[name] if name.endswith("_max") else mean for name, mean in means.items()}
    del figures["tokens"]
    values = {name: (t.sqrt() if name in _SQUARED else t).float() for name, t in figures.items()}
    gradients = _by_name(sites, ((call.rows, call.squares) for call in calls if call.squares is not None))
    if all(len(g) for g in gradients):
        norms = torch.stack([g.sum(0) for g in gradients]).sqrt().float()
        values |= _split(norms, of_gradients)
    if layers:
        counts = _by_name(layers, ((call.layers, call.counts) for call in calls if call.counts is not None))
        values["gates"] = torch.stack([c.sum(0) for c in counts]).float()
    look_ups = tuple(dict.fromkeys(name for call in calls for name in call.look_ups))
    if look_ups:
        read = [[t for c in calls for of, t in zip(c.look_ups, c.found, strict=True) if of == x] for x in look_ups]
        used = [torch.cat([t.flatten() for t in rows]).unique(return_counts=True)[1].double() for rows in read]
        values["rows_used"] = torch.tensor([float(len(counts)) for counts in used])
        values["rows_entropy"] = torch.tensor([float(entropy(counts)) for counts in used])
    return Sample(step, record.owner, tokens, sites, layers, values, look_ups)


def _split(table: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Return the parts of a table `[L, values]` by name, `[L, ...]` each."""
    parts = table.split([torch.Size(shape).numel() for shape in shapes.values()], 1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _by_name(names: Sequence[str], calls: Iterable[tuple[Sequence[str], Tensor | None]]) -> list[Tensor]:
    """Return the rows of every name in all calls, `[calls, ...]`, in float64 on the CPU."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for of_call, tensor in calls:
        assert tensor is not None
        for name, row in zip(of_call, tensor.cpu().double(), strict=False):
            rows[name].append(row)
    return [torch.stack(r) if r else torch.empty(0) for r in rows.values()]


def _plain(values: Any) -> Any:
    """Return nested lists with rounded numbers."""
    if isinstance(values, list):
        return [_plain(v) for v in values]
    return float(f"{values:.{_DIGITS}g}") if math.isfinite(values) else None


def _parsed(line: Any) -> Sample:
    if not isinstance(line, dict) or line.get("format") != FORMAT:
        raise ValueError("not a sample in a format that this version knows")
    sites, layers, look_ups = (tuple(_text(name) for name in line[key]) for key in ("sites", "layers", "look_ups"))
    values = {_text(name): torch.tensor(_numbers(v)) for name, v in line["values"].items()}
    if "read" in values:
        of_weights = values.get("weights")
        columns = 1 if of_weights is None else of_weights.shape[-1]
        of_sites, of_gradients, gates = depth_layout(columns, weights=of_weights is not None), DEPTH_GRADIENTS, {}
    else:
        n = values["streams"].shape[-1]
        of_sites, of_gradients, gates = layout(n), gradient_layout(n), {"gates": (len(layers), n, BINS)}
    required = {name: (len(sites), *shape) for name, shape in of_sites.items() if name != "tokens"}
    optional = {**{name: (len(sites), *shape) for name, shape in of_gradients.items()}, **gates}
    optional |= {name: (len(look_ups),) for name in ROWS}
    for name in {**required, **values}:
        if values[name].shape != (required | optional)[name] or not sites:
            raise ValueError(f"{name} has the shape {list(values[name].shape)}")
    return Sample(int(line["step"]), _text(line["owner"]), int(line["tokens"]), sites, layers, values, look_ups)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return math.nan if value is None else float(value)
