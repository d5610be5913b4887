"""Lookups that run ahead: the worker, its tickets, and what a lookup asks of its device."""

from __future__ import annotations

import multiprocessing
import re
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_compile.memory import lanes, prefetch
from mhc_compile.memory.lanes import Lookup
from mhc_compile.memory.tables import MemoryTable

ops = torch.ops.engram_kernels
ROWS, WIDTH, HEADS = 60, 6, 4


def table(storage: str = "device", **options: Any) -> MemoryTable:
    return MemoryTable(ROWS, WIDTH, storage=storage, **options).start(0, 1.0)


def inputs(t: MemoryTable) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, ROWS, (2, 5, HEADS)), t.anchor, torch.randn(HEADS * WIDTH, 3)


def test_prefetched_rows_are_read_once_and_by_the_worker() -> None:
    t = table("host")
    readers: list[str] = []
    plain_read = t._read
    t._read = lambda rows: (readers.append(threading.current_thread().name), plain_read(rows))[1]
    rows, a, _ = inputs(t)
    ticket = ops.prefetch(rows, t.handle)
    found = ops.collect(ticket, rows, a, t.handle, WIDTH)
    assert torch.equal(found, t.weight[rows].flatten(-2))
    assert readers == ["mhc-prefetch"]
    # A ticket is good once: what is recomputed reads by itself.
    assert torch.equal(ops.collect(ticket, rows, a, t.handle, WIDTH), found)
    assert readers == ["mhc-prefetch", threading.current_thread().name]


def test_tickets_that_are_out_of_date() -> None:
    t, other = table("host"), table("host")
    rows, a, _ = inputs(t)
    ticket = ops.prefetch(rows, t.handle)
    t.fill(0, torch.randn(ROWS, WIDTH))
    assert torch.equal(ops.collect(ticket, rows, a, t.handle, WIDTH), t.weight[rows].flatten(-2))
    ticket = ops.prefetch(rows, t.handle)
    other.fill(0, torch.randn(ROWS, WIDTH))
    found = ops.collect(ticket, rows, other.anchor, other.handle, WIDTH)
    assert torch.equal(found, other.weight[rows].flatten(-2))
    ticket = ops.prefetch(rows, t.handle)
    assert ops.collect(ticket, rows[:1], a, t.handle, WIDTH).shape == (1, 5, HEADS * WIDTH)
    assert int(ops.prefetch(rows, table().handle)) == 0


def test_ids_that_change_after_the_prefetch() -> None:
    t = table("host")
    rows, a, _ = inputs(t)
    before = rows.clone()
    hold = threading.Event()
    prefetch.desk().submit(Waiting(hold), "nobody")  # the worker is busy
    ticket = ops.prefetch(rows, t.handle)
    rows.zero_()
    hold.set()
    assert torch.equal(ops.collect(ticket, rows, a, t.handle, WIDTH), t.weight[before].flatten(-2))


class Waiting(Lookup):
    """Work that lasts until it is told."""

    def __init__(self, hold: threading.Event) -> None:
        self.hold = hold

    def run(self) -> Lookup:
        self.hold.wait(30)
        return self


def test_lookups_that_nobody_collects() -> None:
    t = table("host")
    rows, a, _ = inputs(t)
    first = ops.prefetch(rows, t.handle)
    for _ in range(prefetch.KEPT):
        ops.prefetch(rows, t.handle)
    assert len(prefetch.desk()) == prefetch.KEPT
    assert prefetch.desk().claim(int(first), t._key(rows)) is None
    assert torch.equal(ops.collect(first, rows, a, t.handle, WIDTH), t.weight[rows].flatten(-2))


def test_errors_of_the_worker_reach_the_caller() -> None:
    t = table("host")
    rows = torch.tensor([[0, ROWS]])
    ticket = ops.prefetch(rows, t.handle)
    with pytest.raises(IndexError, match=f"{ROWS} rows"):
        ops.collect(ticket, rows, t.anchor, t.handle, WIDTH)
    rows = rows - 1 + 1 - ROWS // 2 * torch.tensor([0, 1])
    ticket = ops.prefetch(rows, t.handle)  # the worker is still there
    assert torch.equal(ops.collect(ticket, rows, t.anchor, t.handle, WIDTH), t.weight[rows].flatten(-2))


def _in_child(t: MemoryTable, rows: Tensor, out: Any) -> None:
    ticket = ops.prefetch(rows, t.handle)
    out.put(ops.collect(ticket, rows, t.anchor, t.handle, WIDTH).detach().numpy())


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    t = table("host")
    rows = torch.randint(0, ROWS, (3, 2))
    ops.collect(ops.prefetch(rows, t.handle), rows, t.anchor, t.handle, WIDTH)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=_in_child, args=(t, rows, out))
    child.start()
    assert np.array_equal(out.get(timeout=60), t.weight[rows].flatten(-2).numpy())
    child.join(60)


def test_a_lane_moves_ids_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a lookup in their order, as a device with transfers sees them."""
    seen: list[str] = []

    class Traced(lanes.Lane):
        def send_ids(self, rows: Tensor) -> None:
            seen.append(f"send_ids {threading.current_thread().name}")
            super().send_ids(rows)

        def ids(self) -> Tensor:
            seen.append(f"ids {threading.current_thread().name}")
            return super().ids()

        def send(self, tensors: list[Tensor]) -> None:
            seen.append(f"send {threading.current_thread().name}")
            super().send(tensors)

        def receive(self) -> list[Tensor]:
            seen.append(f"receive {threading.current_thread().name}")
            return super().receive()

    monkeypatch.setattr(lanes, "lane_for", lambda _: Traced())
    t = table("host")
    rows, a, _ = inputs(t)
    ops.collect(ops.prefetch(rows, t.handle), rows, a, t.handle, WIDTH)
    main = threading.current_thread().name
    assert seen == [f"send_ids {main}", "ids mhc-prefetch", "send mhc-prefetch", f"receive {main}"]


class Stream:
    """Writes down what is asked of a CUDA stream and of everything on it."""

    log: list[str]

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records ready")
        return "ready"


def test_the_order_of_a_cuda_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the calls, on stand-ins for streams, events and pinned memory."""
    log: list[str] = []
    own, compute = Stream("own", log), Stream("compute", log)

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Stream) -> None:
            log.append(f"{stream.name} records arrived")

        def synchronize(self) -> None:
            log.append(f"{threading.current_thread().name} synchronizes with arrived")

    empty = torch.empty

    def pinned_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        log.extend(["pinned"] * pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(lanes, "_stream", lambda _: own)
    monkeypatch.setattr(lanes, "lane_for", lanes.CudaLane)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: log.append(f"used on {stream.name}"))
    t = table("host")
    rows, a, _ = inputs(t)
    found = ops.collect(ops.prefetch(rows, t.handle), rows, a, t.handle, WIDTH)
    assert torch.equal(found, t.weight[rows].flatten(-2))
    ids = ["own waits for compute", "on own", "pinned", "used on own", "own records arrived"]
    back = ["mhc-prefetch synchronizes with arrived", "on own", "own records ready"]
    assert log == [*ids, *back, "compute waits for ready", "used on compute", "used on compute"]


def test_inductor_keeps_a_prefetch_early() -> None:
    torch._dynamo.reset()
    t = table("host")
    weights = [torch.randn(16, 16) for _ in range(3)]
    out = torch.randn(HEADS * WIDTH, 16)

    def run(rows: Tensor, a: Tensor, x: Tensor) -> Tensor:
        ticket = ops.prefetch(rows, t.handle)
        for w in weights:
            x = torch.tanh(x @ w)
        return x + ops.collect(ticket, rows, a, t.handle, WIDTH) @ out

    args = (torch.randint(0, ROWS, (7, HEADS)), t.anchor, torch.randn(7, 16))
    compiled = torch.compile(run, fullgraph=True, options=dict(prefetch.INDUCTOR))
    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    with torch.no_grad(), uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        found, (code,) = torch._inductor.utils.run_and_get_code(compiled, *args)
        assert torch.allclose(found, run(*args), atol=1e-5)
    order = re.findall(r"= torch\.ops\.engram_kernels\.(\w+)\.default\(|extern_kernels\.(mm)\(", code)
    assert ["".join(o) for o in order][:5] == ["prefetch", "mm", "mm", "mm", "collect"]
