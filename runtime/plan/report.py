"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.plan.compare import Compared, changes
from mhc_compile.runtime.plan.estimate import ROW, Estimate, StageEstimate

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PARTS = {
    "weights": "weights", "gradients": "grads", "moments": "moments", "casts": "casts", "tables": "tables",
    "activations": "kept", "transient": "passing",
}  # fmt: skip


def show(plan: Compared, console: Console) -> None:
    """Print the plan."""
    way, counted = plan.chosen.way, plan.counted
    rows = sum(t.rows * t.width for t in counted.tables)
    tables = f" and {rows / 1e9:.4g} B in rows of tables" if rows else ""
    tokens = way.batch * counted.length
    sites = f"{len(counted.works)} sites, {counted.streams} streams of C = {counted.hidden}"
    console.print(f"{counted.parameters / 1e9:.4g} B parameters{tables}; {sites}")
    console.print(f"{tokens:,} tokens a step, {way.microbatches} microbatches on each of {way.ranks} ranks")
    console.print(f"times at the peak rates of `{plan.hardware.name}`: bounds, not forecasts")
    for table in (_stages(plan.chosen), _memory(plan), _schedules(plan), *([_tables(plan)] if counted.tables else [])):
        console.print()
        console.print(table)
    for name, e in plan.others.items():
        if isinstance(e, MHCError):
            console.print(f"{name}: {str(e).splitlines()[0]}")
    if plan.nearest is not None:
        console.print(f"fits with {_changed(plan, plan.nearest)}: {_size(plan.nearest.fullest)} a rank")


def plain(plan: Compared) -> dict[str, Any]:
    """The plan as JSON holds it. Seconds and bytes."""
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
        "nearest": None if plan.nearest is None else changes(plan.chosen.way, plan.nearest.way),
    }


def _plain(e: Estimate) -> dict[str, Any]:
    s = e.simulated
    return {
        **asdict(e.way),
        "seconds": e.seconds,
        "pipeline_seconds": s.seconds,
        "reduction_seconds": e.reduction,
        "optimizer_seconds": e.optimizer,
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
    sequences = "1 sequence" if e.way.microbatch == 1 else f"{e.way.microbatch} sequences"
    table = _table(f"stages of {e.way.schedule}; a microbatch is {sequences}; times in ms, sizes in {unit}")
    left = ("from", "blocks")
    for name in ("stage", "rank", "from", "sites", "blocks", "weights", "forward", "back", "keeps", "live"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for s in e.stages:
        c = s.cost
        table.add_row(
            str(s.index), str(s.rank), s.first, str(s.sites), blocks_text(s), f"{s.parameters / 1e6:,.0f} M",
            _ms(c.forward), _ms(c.seconds("backward")), size(c.kept), str(e.simulated.live[s.index]),
        )  # fmt: skip
    return table


def blocks_text(stage: StageEstimate) -> str:
    """The blocks' sites, equal ones together, and how many sites keep everything."""
    runs = [(size, len(list(group))) for size, group in groupby(stage.blocks)]
    text = " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)
    rest = stage.sites - sum(stage.blocks)
    return (f"{text}, {rest} keep all" if rest else text) if text else "off"


def _memory(plan: Compared) -> Table:
    unit, size = _unit(m.total for m in plan.chosen.memory)
    table = _table(f"memory of each rank of a pipeline, in {unit}; there are {size(plan.hardware.memory)}")
    table.add_column("rank", justify="right", no_wrap=True)
    shown = {part: name for part, name in _PARTS.items() if any(getattr(m, part) for m in plan.chosen.memory)}
    for name in (*shown.values(), "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, m in enumerate(plan.chosen.memory):
        style = "red" if m.total > plan.hardware.memory else ""
        table.add_row(str(rank), *(size(getattr(m, p)) for p in shown), size(m.total), style=style)
    return table


def _schedules(plan: Compared) -> Table:
    made = {name: e for name, e in plan.others.items() if not isinstance(e, MHCError)}
    unit, size = _unit(e.fullest for e in made.values())
    table = _table(f"schedules with as many ranks; step in ms, sizes in {unit}; sent: the most by one rank in a step")
    for name in ("schedule", "stages", "step", "to 1f1b", "bubbles", "kept", "memory", "sent", "residual"):
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for name, e in made.items():
        ratio = f"{e.seconds / made['1f1b'].seconds:.3f}" if "1f1b" in made else ""
        table.add_row(
            name, str(len(e.stages)), _ms(e.seconds), ratio, f"{e.simulated.bubble:.1%}",
            size(max(e.simulated.held)), size(e.fullest), size(e.stream_bytes), size(e.residual_bytes),
            style="bold" if name == plan.chosen.way.schedule else "",
        )  # fmt: skip
    return table


def _tables(plan: Compared) -> Table:
    way = plan.chosen.way
    exchanged = f"; one rank exchanges {_size(plan.chosen.table_bytes)} of rows a step" if way.engram > 1 else ""
    table = _table(f"tables, each spread over {way.engram} ranks{exchanged}")
    for name in ("table", "stage", "ranks", "rows", "width", "a rank holds"):
        table.add_column(name, justify="left" if name == "table" else "right", no_wrap=True)
    first = 0
    for s in plan.chosen.stages:
        for t in plan.counted.tables:
            if first <= t.site < first + s.sites:
                ranks = f"{s.rank * way.replicas} to {(s.rank + 1) * way.replicas - 1}"
                held = _size(ROW * -(-t.rows * t.width // way.engram))
                table.add_row(t.name, str(s.index), ranks, f"{t.rows:,}", str(t.width), held)
        first += s.sites
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)


def _unit(sizes: Iterable[int]) -> tuple[str, Callable[[int], str]]:
    """One unit for all of `sizes`, and how to write a size in it."""
    largest = max(sizes, default=0)
    power = min(len(_UNITS) - 1, max(0, (int(largest).bit_length() - 1) // 10))

    def text(size: int) -> str:
        return _short(size / 1024**power)

    return _UNITS[power], text


def _size(count: int) -> str:
    unit, text = _unit([count])
    return f"{text(count)} {unit}"


def _ms(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _changed(plan: Compared, other: Estimate) -> str:
    return " ".join(f"{name}={value}" for name, value in changes(plan.chosen.way, other.way).items())
