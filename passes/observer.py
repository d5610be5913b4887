"""Watch passes run: verification, timing, comparison, logging and snapshots, which no pass does itself."""

from __future__ import annotations

import difflib
import logging
import time
from dataclasses import dataclass, field
from typing import Literal

from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from mhc_compile.passes.base import Context, Pass
from mhc_compile.passes.blockmask import BlockMask
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.numeric import compare, run_float64
from mhc_compile.passes.text import describe
from mhc_compile.passes.verify import verify

log = logging.getLogger("mhc_compile")
Debug = Literal[False, True, "numeric"]
"""What is checked after each pass: see `mhc_compile.Options`."""


@dataclass
class Record:
    """What the observer saw of one pass."""

    name: str
    nodes_before: int
    nodes_after: int
    seconds: float
    verify_seconds: float
    before: str
    """Graph text before the pass; empty unless snapshots were asked for."""
    after: str
    notes: list[str]


@dataclass
class Observer:
    """Times, verifies and logs each pass; keeps graph text where `snapshots` is set or debug logging is on."""

    snapshots: bool = False
    records: list[Record] = field(default_factory=list)

    def run(self, step: Pass, gm: GraphModule, context: Context, debug: Debug) -> GraphModule:
        """Apply one pass under observation."""
        keep = self.snapshots or log.isEnabledFor(logging.DEBUG) or _tracing()
        before, size = (str(gm.graph) if keep else ""), len(gm.graph.nodes)
        # The one pass that is asked for another function than the graph's.
        numeric = debug == "numeric" and bool(context.inputs) and not isinstance(step, BlockMask)
        reference = run_float64(gm, context.inputs) if numeric else []
        if isinstance(step, Fuse):
            step.prepare(gm)
        start = time.perf_counter()
        gm = step.apply(gm, context)
        gm.graph.lint()
        middle = time.perf_counter()
        verify(gm, whole=bool(debug), after=step.name)
        if numeric:
            compare(reference, run_float64(gm, context.inputs), step.name)
        end = time.perf_counter()
        after = str(gm.graph) if keep else ""
        record = Record(
            step.name, size, len(gm.graph.nodes), middle - start, end - middle, before, after, context.notes
        )
        context.notes = []
        self.records.append(record)
        self._report(step, record)
        return gm

    def _report(self, step: Pass, record: Record) -> None:
        log.info(
            "pass %s: %d -> %d nodes, %.1f ms (+ %.1f ms to verify)",
            describe(step), record.nodes_before, record.nodes_after, 1e3 * record.seconds, 1e3 * record.verify_seconds,
        )  # fmt: skip
        for note in record.notes:
            log.debug("  %s", note)
        if log.isEnabledFor(logging.DEBUG) and record.before != record.after:
            log.debug("%s", diff_of(record))
        if record.after:
            trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": f"mhc_{record.name}", "encoding": "string"},
                payload_fn=lambda: record.after,
            )


def _tracing() -> bool:
    return bool(logging.getLogger("torch.__trace").handlers)


def diff_of(record: Record) -> str:
    """Return what the pass changed, as a unified diff of graph text."""
    return "\n".join(
        difflib.unified_diff(
            record.before.splitlines(), record.after.splitlines(), f"before {record.name}", f"after {record.name}",
            lineterm="", n=1,
        )
    )  # fmt: skip
