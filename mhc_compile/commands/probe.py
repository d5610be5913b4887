"""`mhc-compile probe FILE`: what probes sampled, as a table and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mhc_compile.output import PLAIN, Output

if TYPE_CHECKING:
    from rich.table import Table

    from mhc_compile.probes.sample import Sample


def probe(
    file: Annotated[Path, Parameter(help="One line of JSON per sample, as `Probes.write` writes it.")],
    /,
    *,
    plots: Annotated[Path | None, Parameter(help="Draw all samples into PNG files in this folder.")] = None,
    output: Output = PLAIN,
) -> int:
    """Show what the streams did in the steps that probes sampled.

    Print the last sample of every stream owner, a line per site: the largest gain over tokens, forward or backward, of
    the site's H and of all sites up to it (composite), how far off doubly stochastic H is, how far the streams are
    apart, the entropies of pre and post in nats, and the gradient of the branch's output. Of a depth form: root mean
    squares of what the site reads, of the newest output before it and of its own, the entropy of the weights, and the
    gradient of the output. Of look-ups: how many different rows they read, and the entropy of how often, in nats.
    """
    from rich.console import Console

    from mhc_compile.probes.plots import draw
    from mhc_compile.probes.sample import read_samples

    console = Console()
    samples = read_samples(file)
    last = {sample.owner: sample for sample in samples}.values()
    with output.printing():
        for sample in last:
            console.print(_table(sample))
            if sample.look_ups:
                console.print(_rows(sample))
        console.print(f"{len(samples)} samples from step {samples[0].step} to {samples[-1].step}")
        for path in () if plots is None else draw(samples, plots):
            console.print(f"drawn: {path}", soft_wrap=True, highlight=False, markup=False)
    output.write([json.loads(sample.line()) for sample in last])
    return 0


def _table(sample: Sample) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{sample.owner or 'model'}, step {sample.step}, {sample.tokens} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("site", no_wrap=True)
    columns = sample.figures()
    for title in columns:
        table.add_column(title, justify="right")
    for site, *figures in zip(sample.sites, *columns.values(), strict=True):
        table.add_row(site, *(f"{figure:.4g}" if abs(figure) >= 0.1 else f"{figure:.1e}" for figure in figures))
    return table


def _rows(sample: Sample) -> Table:
    from rich import box
    from rich.table import Table

    from mhc_compile.probes.sample import ROWS

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("look-up", no_wrap=True)
    for title in ("rows used", "entropy"):
        table.add_column(title, justify="right")
    for name, used, entropy in zip(sample.look_ups, *(sample.values[n].tolist() for n in ROWS), strict=True):
        table.add_row(name, f"{used:,.0f}", f"{entropy:.4g}")
    return table
