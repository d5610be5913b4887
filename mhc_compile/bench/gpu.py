"""Everything worth knowing of a GPU in a few minutes: one process, the most telling first, each part saved as it ends.

`--minutes` bounds it: every part has a share of what is left, and none begins without time. A part that fails is
recorded with its error, and the next one runs. `--small` computes the same on sizes that tools like compute-sanitizer
finish; with `--device cpu` and `TRITON_INTERPRET=1` the kernels run under Triton's interpreter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mhc_compile.atomic_write import write_whole
from mhc_compile.bench import gpu_parts
from mhc_compile.bench.contest import reason, say
from mhc_compile.bench.gpu_parts import Finding, Setting
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import targets
from mhc_compile.kernels.triton.launch import interprets

COMMAND = "`mhc-compile bench gpu`"


@dataclass(frozen=True)
class Part:
    """One part: a function that yields what it finds, one finding after the other."""

    name: str
    run: Callable[[Setting], Iterator[Finding]]
    share: float
    """The part of the time left that this part may take, relative to the shares of those after it."""
    kernels: bool = False
    """Whether it calls a target by name; the other parts run on the C++ target where there is no GPU."""


PARTS = (
    Part("gates", gpu_parts.gated, 4, kernels=True),
    Part("boundary", gpu_parts.boundaries, 4),
    Part("memory", gpu_parts.memories, 2),
    Part("launches", gpu_parts.launch_counts, 2),
    Part("decode", gpu_parts.decoding, 1),
    Part("step", gpu_parts.training_steps, 4),
    Part("graphs", gpu_parts.graphs, 1),
    Part("one rank", gpu_parts.one_rank, 1),
    Part("tiles", gpu_parts.tiles, 4, kernels=True),
)


@dataclass
class Outcome:
    """A part that ran."""

    name: str
    seconds: float = 0.0
    error: str = ""
    """Why it did not run to its end, or ""."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """By what they are of; a later one of the same replaces an earlier one."""


def run(
    console: Console, *, quick: bool, minutes: float = 8.0, out: Path = Path("bench_gpu"), device: str = "cuda",
    parts: tuple[Part, ...] = PARTS,
) -> dict[str, Any]:  # fmt: skip
    """Run every part; return and write all figures.

    Raises MHC529 without a GPU, and MHC412 for a folder that cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MHCError("MHC529", "torch.cuda.is_available() is False")
    if device == "cpu" and not interprets():
        say(console, "set TRITON_INTERPRET=1 to check Triton kernels: without it those in C++ take their place")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MHCError("MHC412", f"{out}: {error.strerror}") from error
    target = "triton" if device == "cuda" or interprets() else "cpp"
    setting = Setting(console, torch.device(device), quick, out, target)
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for i, part in enumerate(parts):
        now = time.monotonic()
        shares = sum(later.share for later in parts[i:])
        setting.until = now + max(0.0, end - now) * part.share / shares
        outcomes.append(_run(part, setting))
        _save(out, setting, outcomes)
    return {"parts": [asdict(o) for o in outcomes]}


def _run(part: Part, setting: Setting) -> Outcome:
    """Run one part until it ends, fails, or has no time left."""
    console, outcome, begun = setting.console, Outcome(part.name), time.monotonic()
    console.rule(f"{part.name}, {max(0.0, setting.until - begun):.0f} s")
    if begun >= setting.until:
        outcome.error = "no time left"
        return outcome
    on_cpu = setting.device.type == "cpu" and not part.kernels
    try:
        with targets.only("cpp") if on_cpu else nullcontext():
            for finding in part.run(setting):
                outcome.findings[finding.what] = finding
                if time.monotonic() > setting.until:
                    outcome.error = "no time left for the rest"
                    break
    except Exception as error:  # whatever stops one part, the next may run
        outcome.error = reason(error)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    outcome.seconds = time.monotonic() - begun
    for finding in outcome.findings.values():
        console.print(f"{finding.what}: {finding.figure}", markup=False, highlight=False, soft_wrap=True)
    if outcome.error:
        say(console, f"{part.name}: {outcome.error}")
    return outcome


def _save(out: Path, setting: Setting, outcomes: list[Outcome]) -> None:
    """Write what the last part found, and the rows of all parts for docs/figures.md."""
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    last = outcomes[-1]
    text = json.dumps({"device": name, "torch": torch.__version__, **asdict(last)}, indent=2, default=str)
    write_whole(out / f"{len(outcomes):02d}_{last.name.replace(' ', '_')}.json", text + "\n", code="MHC412")
    rows = [f"On {name}, torch {torch.__version__}.", "", "| what | figure | command |", "|---|---|---|"]
    for outcome in outcomes:
        rows += [f"| {f.what} | {f.figure} | {COMMAND} |" for f in outcome.findings.values() if f.figure]
        rows += (
            [f"| {outcome.name} | stopped: {outcome.error.replace('|', '/')} | {COMMAND} |"] if outcome.error else []
        )
    write_whole(out / "figures.md", "\n".join(rows) + "\n", code="MHC412")
