"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.cost import bytes_text
from mhc_compile.runtime.plan.compare import Compared, changes, changes_text
from mhc_compile.runtime.plan.estimate import ROW, Estimate, StageEstimate

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PARTS = {
    "weights": "weights", "gradients": "grads", "moments": "moments", "casts": "casts", "buffers": "buffers",
    "tables": "tables",
    "activations": "kept", "transient": "passing",
}  # fmt: skip
Row = tuple[tuple[str, ...], object, tuple[float, ...]]
_ALIKE = 0.02
"""By which figures of folded rows may differ, relative to the first row's."""


def show(plan: Compared, console: Console) -> None:
    """Print the plan."""
    recipe, counted = plan.recipe, plan.counted
    rows = sum(t.rows * t.width for t in counted.tables)
    tables = f" and {rows / 1e9:.4g} B in rows of tables" if rows else ""
    tokens = recipe.train.batch * counted.length
    sites = f"{len(counted.works)} sites, {counted.streams} streams of C = {counted.hidden}"
    console.print(f"{counted.parameters / 1e9:.4g} B parameters{tables}; {sites}")
    console.print(
        f"{tokens:,} tokens a step, {recipe.microbatches} microbatches on each of {recipe.parallel.world} ranks"
    )
    console.print(f"times at the peak rates of `{plan.hardware.name}`: bounds, not forecasts")
    console.print(_links_text(plan))
    for table in (_stages(plan.chosen), _memory(plan), _schedules(plan), *([_tables(plan)] if counted.tables else [])):
        console.print()
        console.print(table)
    console.print()
    for name, e in plan.others.items():
        console.print(f"{name}: {str(e).splitlines()[0] if isinstance(e, MHCError) else _limit_text(e)}")
    if plan.chosen.host:
        size = bytes_text(plan.chosen.host)
        console.print(f"copies for a checkpoint: {size} of host memory a rank while it is written")
    if plan.nearest is not None:
        text = changes_text(recipe, plan.nearest.recipe)
        console.print(f"fits with {text}: {bytes_text(plan.nearest.fullest)} a rank")


def plain(plan: Compared) -> dict[str, Any]:
    """Return the plan as JSON holds it, in seconds and bytes."""
    return {
        "recipe": plan.recipe.plain(),
        "hardware": asdict(plan.hardware),
        "model": {
            "parameters": plan.counted.parameters,
            "sites": len(plan.counted.works),
            "streams": plan.counted.streams,
            "hidden": plan.counted.hidden,
            "tables": [asdict(t) for t in plan.counted.tables],
        },
        "fits": plan.fits,
        "chosen": _plain(plan.chosen),
        "schedules": {
            name: {"refused": str(e)} if isinstance(e, MHCError) else _plain(e) for name, e in plan.others.items()
        },
        "nearest": None if plan.nearest is None else changes(plan.recipe, plan.nearest.recipe),
    }


def _plain(e: Estimate) -> dict[str, Any]:
    s, recipe = e.simulated, e.recipe
    return {
        **asdict(recipe.parallel),
        "blocks": recipe.recompute.blocks,
        "microbatch": recipe.train.microbatch,
        "batch": recipe.train.batch,
        "seconds": e.seconds,
        "pipeline_seconds": s.seconds,
        "reduction_seconds": e.reduction,
        "optimizer_seconds": e.optimizer,
        "mfu": e.mfu,
        "limiting_rank": e.limit,
        "host_bytes": e.host,
        "bubbles": s.bubbles,
        "stream_bytes": s.sent,
        "residual_bytes": e.residual_bytes,
        "table_bytes": e.table_bytes,
        "live_microbatches": s.live,
        "stages_of": [asdict(stage) for stage in e.stages],
        "memory": [asdict(m) | {"total": m.total} for m in e.memory],
    }


def _stages(e: Estimate) -> Table:
    unit, size = _unit(s.cost.kept for s in e.stages)
    microbatch = e.recipe.train.microbatch
    sequences = "1 sequence" if microbatch == 1 else f"{microbatch} sequences"
    title = f"stages of {e.recipe.parallel.schedule}; a microbatch is {sequences}; times in ms, sizes in {unit}"
    columns = ("stage", "rank", "from", "sites", "blocks", "weights", "fwd", "back", "keeps", "live")
    table = _table(title, columns, left=("from", "blocks"))
    rows: list[Row] = []
    for s in e.stages:
        c, back = s.cost, s.cost.seconds("backward")
        cells = (
            str(s.index), str(s.rank), s.first, str(s.sites), _blocks_text(s), f"{s.parameters / 1e6:,.0f} M",
            _ms(c.forward), _ms(back), size(c.kept), str(e.simulated.live[s.index]),
        )  # fmt: skip
        rows.append((cells, (s.sites, s.blocks), (s.parameters, c.forward, back, c.kept)))
    for folded, _ in _folded(rows, ranging=(0, 1, 9)):
        table.add_row(*folded)
    return table


def _folded(rows: Iterable[Row], ranging: Collection[int]) -> Iterator[tuple[Sequence[str], object]]:
    """Yield cells, and what rows share, of rows of which three or more that follow each other may be folded into one.

    A row is its cells, what must be equal, and figures that may differ by `_ALIKE`. Folded cells are those of the first
    row; the `ranging` ones go to those of the last.
    """
    runs: list[list[Row]] = []
    for row in rows:
        first = runs[-1][0] if runs else row
        near = all(abs(a - b) <= _ALIKE * abs(b) for a, b in zip(row[2], first[2], strict=True))
        if runs and row[1] == first[1] and near:
            runs[-1].append(row)
        else:
            runs.append([row])
    for run in runs:
        if len(run) < 3:
            yield from (row[:2] for row in run)
        else:
            pairs = enumerate(zip(run[0][0], run[-1][0], strict=True))
            yield [f"{a}-{b}" if i in ranging and a != b else a for i, (a, b) in pairs], run[0][1]


def _blocks_text(stage: StageEstimate) -> str:
    """Return the blocks' sites as text, equal ones together, and how many sites keep everything."""
    runs = [(size, len(list(group))) for size, group in groupby(stage.blocks)]
    text = " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)
    rest = stage.sites - sum(stage.blocks)
    return (f"{text}, {rest} keep all" if rest else text) if text else "off"


def _memory(plan: Compared) -> Table:
    unit, size = _unit(m.total for m in plan.chosen.memory)
    shown = {part: name for part, name in _PARTS.items() if any(getattr(m, part) for m in plan.chosen.memory)}
    there = size(plan.hardware.memory)
    title = f"memory of each rank of a pipeline, in {unit}; there are {there}; buffers when nothing is kept"
    table = _table(title, ("rank", *shown.values(), "total"))
    rows: list[Row] = []
    for rank, m in enumerate(plan.chosen.memory):
        cells = (str(rank), *(size(getattr(m, p)) for p in shown), size(m.total))
        constant = tuple(getattr(m, p) for p in shown if p != "activations")
        rows.append((cells, m.total > plan.hardware.memory, constant))
    kept = [*shown].index("activations") + 1
    for folded, is_too_much in _folded(rows, ranging=(0, kept, len(shown) + 1)):
        table.add_row(*folded, style="red" if is_too_much else "")
    return table


def _links_text(plan: Compared) -> str:
    """Return over which links ranks exchange what."""
    p, hardware = plan.recipe.parallel, plan.hardware
    owners = [p.place_of(index) for index in range(p.stage_count)]
    hops = [hardware.between(a, b, p.replicas) for a, b in pairwise(owners) if a != b]
    parts = []
    for name, speed in (("within a node", hardware.link), ("between nodes", hardware.network)):
        if count := hops.count(speed):
            parts.append(f"streams {name} at {speed / 1e9:,.0f} GB/s over {count} of {len(hops)} cuts")
        if hardware.link == hardware.network:
            break
    if p.replicas > 1:
        speeds = sorted({hardware.among(rank * p.replicas, p.replicas) for rank in range(p.stages)})
        parts.append(f"gradients at {' or '.join(f'{speed / 1e9:,.0f}' for speed in speeds)} GB/s")
    return f"nodes of {hardware.node} ranks: {'; '.join(parts) or 'one rank sends nothing'}"


def _limit_text(e: Estimate) -> str:
    """Return for which rank the others wait, and which of its stages takes longest."""
    busy, mine = e.simulated.busy, [s for s in e.stages if s.rank == e.limit]
    longest = max(mine, key=lambda s: s.cost.forward + s.cost.seconds("backward"))
    text = f"limited by stage {longest.index} (from {longest.first})"
    return f"{text}: rank {e.limit} computes for {_ms(max(busy))} ms, the mean rank for {_ms(sum(busy) / len(busy))}"


def _schedules(plan: Compared) -> Table:
    estimates = {name: e for name, e in plan.others.items() if not isinstance(e, MHCError)}
    unit, size = _unit(e.fullest for e in estimates.values())
    title = f"schedules with as many ranks; step in ms, sizes in {unit}; sent: the most by one rank in a step"
    columns = ("schedule", "stages", "step", "to 1f1b", "MFU", "bubbles", "memory", "sent", "residual")
    table = _table(title, columns, left=("schedule",))
    for name, e in estimates.items():
        ratio = f"{e.seconds / estimates['1f1b'].seconds:.3f}" if "1f1b" in estimates else ""
        table.add_row(
            name, str(len(e.stages)), _ms(e.seconds), ratio, f"{e.mfu:.1%}", f"{e.simulated.bubble:.1%}",
            size(e.fullest), size(e.stream_bytes), size(e.residual_bytes),
            style="bold" if name == plan.recipe.parallel.schedule else "",
        )  # fmt: skip
    return table


def _tables(plan: Compared) -> Table:
    parallel = plan.recipe.parallel
    exchanged = bytes_text(plan.chosen.table_bytes)
    more = f"; one rank exchanges {exchanged} of rows a step" if parallel.engram > 1 else ""
    columns = ("table", "stage", "ranks", "rows", "width", "a rank holds")
    table = _table(f"tables, each spread over {parallel.engram} ranks{more}", columns, left=("table",))
    for s in plan.chosen.stages:
        for t in s.tables:
            ranks = f"{s.rank * parallel.replicas} to {(s.rank + 1) * parallel.replicas - 1}"
            share = bytes_text(ROW * -(-t.rows * t.width // parallel.engram))
            table.add_row(t.name, str(s.index), ranks, f"{t.rows:,}", str(t.width), share)
    return table


def _table(title: str, columns: Iterable[str], left: Collection[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _unit(sizes: Iterable[int]) -> tuple[str, Callable[[int], str]]:
    """Return one unit for all of `sizes`, and the function that writes a size in it."""
    power = min(len(_UNITS) - 1, max(0, (int(max(sizes)).bit_length() - 1) // 10))

    def text(size: int) -> str:
        return _short(size / 1024**power)

    return _UNITS[power], text


def _ms(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
