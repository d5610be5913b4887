"""Run a graph under torch's profiler: milliseconds of every part of a model in a step, and the timeline of one."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType, _get_sequence_nr
from torch.autograd.profiler_util import FunctionEvent
from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from mhc_compile.atomic_write import write_whole
from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.passes.fuse import kernels_in
from mhc_compile.passes.fuse_memory import prepare_hashes
from mhc_compile.report.report import Time

WARM_UP, RUNS = 2, 5
_BACKWARD = "autograd::engine::evaluate_function: "

Parts = dict[int, Time]


def measure(
    gm: GraphModule,
    inputs: Sequence[Any],
    shared: Collection[Node],
    place: Callable[[Node], int],
    names: Sequence[str],
    trace: Path | None,
) -> tuple[Parts, Time]:
    """Return the times of a step of `gm` by number of its part, and of the whole; write the last run to `trace`.

    A step is a forward on `inputs` and, where something requires gradients, the backward. Every operation runs by
    itself, as under `inner="eager"`; what is counted is what operations take, without the Python between them.
    `inputs` are neither changed nor given gradients; those of the placeholders `shared` are not copied.
    """
    for spec, device in kernels_in(gm):
        targets.prepare(spec, device, DIRECTIONS)
    prepare_hashes(gm.graph)
    copied = [n not in shared for n in gm.graph.nodes if n.op == "placeholder"]
    parts = {node: place(node) for node in gm.graph.nodes if node.op not in ("placeholder", "output")}
    of_runs: list[dict[int, list[float]]] = []
    cuda = [t.device for t in inputs if isinstance(t, Tensor) and t.device.type == "cuda"]
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.random.fork_rng(list(dict.fromkeys(cuda))), torch.enable_grad():
        for _ in range(WARM_UP + RUNS):
            values = [_own(t, copy=copy) for t, copy in zip(inputs, copied, strict=True)]
            run = _Run(gm, parts, names)
            with profile(activities=kinds) as profiler:
                run.step(values)
            of_runs.append(run.times(profiler.events(), on_device=bool(cuda)))
    if trace is not None:
        _write(trace, profiler, run)
    numbers = sorted({number for times in of_runs for number in times})
    kept = of_runs[WARM_UP:]
    whole = _time([[sum(times[k][i] for k in times) for i in (0, 1)] for times in kept])
    return {number: _time([times.get(number, [0.0, 0.0]) for times in kept]) for number in numbers}, whole


@contextmanager
def kept_gradients(model: nn.Module) -> Iterator[None]:
    """Give the tables of `model` back, afterwards, the gradients that they hold now: a backward adds to them itself."""
    held = [(m, m.gradient) for m in model.modules() if isinstance(m, MemoryTable)]
    for table, _ in held:
        table.drop_gradient()
    try:
        yield
    finally:
        for table, gradient in held:
            table.drop_gradient()
            if gradient is not None:
                table.accumulate(*gradient, summed=True)


def device_name(inputs: Sequence[Any]) -> str:
    """Return what a step on `inputs` runs on: a GPU's name, or the threads of the CPU."""
    device = next((t.device for t in inputs if isinstance(t, Tensor)), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} {'thread' if threads == 1 else 'threads'}"


def _own(value: Any, *, copy: bool) -> Any:
    """Return an input that may get a gradient and be written to."""
    if not isinstance(value, Tensor):
        return value
    fresh = value.detach() if value.requires_grad or not copy else value.detach().clone()
    return fresh.requires_grad_(value.requires_grad)


def _time(runs: Sequence[Sequence[float]]) -> Time:
    forward, backward = zip(*runs, strict=True)
    sums = [a + b for a, b in runs]
    return Time(median(sums), median(forward), median(backward), min(sums), max(sums))


class _Run(Interpreter):
    """One run of a graph, in which what follows each other in one part is a range of the profiler."""

    def __init__(self, gm: GraphModule, parts: dict[Node, int], names: Sequence[str]) -> None:
        super().__init__(gm)
        self.parts, self.names = parts, names
        self.range: record_function | None = None
        self.ranges: list[int] = []
        """The part of every range."""
        self.ends: list[int] = []
        """The sequence number behind every range: autograd's nodes have numbers in the order of the forward."""

    def step(self, inputs: Sequence[Any]) -> None:
        """Run forward, and backward from all outputs that have gradients."""
        with record_function("forward"):
            out = self.run(*inputs)
            self._end()
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if outputs:
            with record_function("backward"):
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    def run_node(self, n: Node) -> Any:
        """Run one node inside its part's range."""
        part = self.parts.get(n)
        if part is None:
            return super().run_node(n)
        if self.range is None or self.ranges[-1] != part:
            self._end()
            self.ranges.append(part)
            self.range = record_function(self.names[part])
            self.range.__enter__()
        return super().run_node(n)

    def _end(self) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.ends.append(_get_sequence_nr())
            self.range = None

    def part_of(self, sequence: int, before: int | None) -> int | None:
        """Return the part whose forward made the autograd node with this sequence number.

        A node without one sums up a gradient that the node `before` it has computed.
        """
        at = bisect_right(self.ends, sequence)
        return before if sequence < 0 or at == len(self.ends) else self.ranges[at]

    def times(self, events: Sequence[FunctionEvent], *, on_device: bool) -> dict[int, list[float]]:
        """Return milliseconds forward and backward by part."""
        times: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        waiting, part = deque(self.ranges), None
        for event in sorted(events, key=lambda e: e.time_range.start):
            if event.device_type != DeviceType.CPU:
                continue
            if waiting and event.is_user_annotation and event.name == self.names[waiting[0]]:
                number = waiting.popleft()
                times[number][0] += sum(_milliseconds(e, on_device=on_device) for e in event.cpu_children)
            elif event.name.startswith(_BACKWARD):
                part = self.part_of(event.sequence_nr, part)
                if part is not None:
                    times[part][1] += _milliseconds(event, on_device=on_device)
        return times


def _milliseconds(event: FunctionEvent, *, on_device: bool) -> float:
    return (event.device_time_total if on_device else event.cpu_time_total) / 1e3


def _write(file: Path, profiler: profile, run: _Run) -> None:
    """Write a run as Chrome's JSON, which Perfetto opens, with ranges of the parts in the backward, too."""
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        trace = json.loads(exported.read_text(encoding="utf-8"))
    events = [e for e in trace["traceEvents"] if e["name"].startswith(_BACKWARD)]
    ranges: list[dict[str, Any]] = []
    part = None
    for event in sorted(events, key=lambda e: e["ts"]):
        before, part = part, run.part_of(event["args"].get("Sequence number", -1), part)
        if part is None:
            continue
        if part != before or ranges[-1]["tid"] != event["tid"]:
            about = {"ph": "X", "cat": "user_annotation", "name": run.names[part]}
            ranges.append({**about, **{key: event[key] for key in ("pid", "tid", "ts")}})
        ranges[-1]["dur"] = event["ts"] + event["dur"] - ranges[-1]["ts"]
    # In front of what they hold: of slices that begin at one time the first is the outer one.
    trace["traceEvents"] = [*ranges, *trace["traceEvents"]]
    write_whole(file, json.dumps(trace))
