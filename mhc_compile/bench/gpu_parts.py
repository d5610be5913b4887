"""The parts of `mhc-compile bench gpu`: each yields what it finds, the most telling first."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mhc_compile.atomic_write import write_whole
from mhc_compile.bench import boundary, engram, gpu_gates, step, ultramem
from mhc_compile.bench.contest import Contender, Row, contest, reason, say, timed
from mhc_compile.bench.gpu_contenders import select
from mhc_compile.conversion import convert
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.in_triton import launcher_of
from mhc_compile.kernels.kernelspec import Direction, KernelSpec
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.triton.launch import Call, arch_of
from mhc_compile.kernels.triton.tiles import TileConfig

TARGETS_MS = {(4096, 16384): (0.35, 0.53), (7168, 32768): (1.23, 1.84)}
"""Target times of the boundary on an H200, in ms, by width and tokens: forward and backward."""


@dataclass
class Setting:
    """The settings that all parts share."""

    console: Console
    device: torch.device
    small: bool
    out: Path
    target: str
    """The target whose kernels are gated and cut: `triton`, or `cpp` where Triton cannot run."""
    until: float = 0.0
    """When the part should end, by `time.monotonic()`."""


@dataclass
class Finding:
    """A row of docs/figures.md."""

    what: str
    figure: str
    """Or "" where the data has it."""
    data: Any = None


def gated(s: Setting) -> Iterator[Finding]:
    """Compare every kernel with float64."""
    what = f"kernels against float64 ({s.target}), values and gradients"
    passed, every = 0, {}
    failed: list[str] = []
    for gate in gpu_gates.gates(small=s.small):
        try:
            errors = gpu_gates.measure(gate, s.device, s.target)
            wrong = gpu_gates.failures(gate, errors, s.device)
        except Exception as error:  # a kernel that does not compile or launch; the others may
            errors, wrong = {}, [reason(error)]
        every[str(gate)] = errors
        passed += not wrong
        if wrong:
            failed.append(f"{gate}: {'; '.join(wrong[:3])}")
            say(s.console, failed[-1])
        total = f"{passed} of {passed + len(failed)} as exact as plain PyTorch"
        yield Finding(what, "; ".join([total, *failed]), every)


def _boundary(width: int, s: Setting, norm: Any = "none") -> Chain:
    dtype = torch.bfloat16 if s.device.type == "cuda" else torch.float32
    return Chain(kind="boundary", stream=StreamSpec(), width=width, streams_dtype=dtype, branch_dtype=dtype, norm=norm)


def boundaries(s: Setting) -> Iterator[Finding]:
    """Time the boundary, ours and copying first, then everybody."""
    shapes = [(32, 64)] if s.small else [*TARGETS_MS]
    packages, left_out = select(s.device)
    for line in left_out:
        say(s.console, line)
    for everybody in (False, True):
        for width, tokens in shapes:
            medians: dict[str, list[float]] = {}
            chain = _boundary(width, s)
            for backward in (False, True):
                names = None if everybody else (boundary.OURS, "copy")
                rows = _contest(s, chain, tokens, packages if everybody else [], names, backward=backward)
                for row in rows:
                    medians.setdefault(row.name, []).append(row.median)
                title = f"boundary {'forward and backward' if backward else 'forward'}, {tokens} tokens, C={width}"
                yield Finding(
                    title + (", every contender" if everybody else ""), _figure(rows), [asdict(r) for r in rows]
                )
            whole = {name: both[1] - both[0] for name, both in medians.items() if len(both) == 2}
            goal = TARGETS_MS.get((width, tokens))
            told = f" (targets on an H200: {goal[0]} and {goal[1]} ms)" if goal else ""
            figure = ", ".join(f"{name} {1e3 * medians[name][0]:.3f} and {1e3 * t:.3f} ms" for name, t in whole.items())
            yield Finding(f"the same, forward and backward alone, {tokens} tokens, C={width}", figure + told, whole)


def _contest(
    s: Setting, chain: Chain, tokens: int, packages: Sequence[Any], names: Sequence[str] | None, *, backward: bool
) -> list[Row]:
    """Check contenders on few tokens, and time those that pass on all."""
    few = min(tokens, 1024)
    found: list[Contender] = []
    for count, checked in ((few, True), (tokens, False)):
        inputs = boundary.random_inputs(chain, count, s.device)
        contenders = boundary.contenders_of(chain, inputs, count, packages, backward=backward, checked=checked)
        found = [replace(c, optional=c.name != boundary.OURS) for c in contenders if names is None or c.name in names]
        if s.small:
            found = [c for c in found if "Inductor" not in c.name]
        shape, rounds = f"{count} tokens, n=4, C={chain.width}", 1 if checked or s.small else 31
        rows = contest(
            s.console, found, ours=boundary.OURS, device=s.device, shape=shape, rounds=rounds, until=s.until
        )  # fmt: skip
        names = [r.name for r in rows]  # those that passed are timed
    return rows


def _figure(rows: Sequence[Row]) -> str:
    return ", ".join(
        f"{r.name} {1e3 * r.median:.3f} ms" + ("" if r.fraction is None else f" ({r.fraction:.0%} of copying)")
        for r in rows
    )


def memories(s: Setting) -> Iterator[Finding]:
    """Time the kernels of memories."""
    for backward in (False, True):
        title, rows = ultramem.sums_contest(s.console, s.device, backward=backward, quick=s.small)
        yield Finding(title, _figure(rows), [asdict(r) for r in rows])
    for tokens in (64,) if s.small else (2048, 16384):
        title, rows = engram.hash_contest(s.console, "v41", tokens, s.device, rounds=1 if s.small else 31)
        yield Finding(title, _figure(rows), [asdict(r) for r in rows])


def launch_counts(s: Setting) -> Iterator[Finding]:
    """Count the kernels that a layer more launches, forward and backward."""
    width, layers = (32, (1, 2)) if s.small else (256, (2, 4))
    ids = torch.randint(0, 8192, (2, 16), device=s.device)
    figures = {}
    for name, streams in (("residual, Inductor", 0), ("4 streams", 4)):
        counts = []
        for count in layers:
            torch.manual_seed(0)
            model = step.llama(count, width).to(s.device)
            compiled = _compiled(model, streams)
            for _ in range(2):
                compiled(ids, labels=ids, use_cache=False).loss.backward()
            counts.append(_launched(s, lambda m=compiled: m(ids, labels=ids, use_cache=False).loss))  # type: ignore[misc]
        per_layer = [(b - a) / (layers[1] - layers[0]) for a, b in zip(*counts, strict=True)]
        figures[name] = per_layer
        yield Finding(
            f"kernels that a layer launches, forward and backward: {name}",
            ", ".join(f"{count:g}" for count in per_layer) + ("" if s.device.type == "cuda" else " (calls of our ops)"),
            {"layers": layers, "counts": counts},
        )


def _compiled(model: nn.Module, streams: int) -> Any:
    torch._dynamo.reset()
    if not streams:
        return torch.compile(model)
    return torch.compile(convert(model, streams=streams), backend="mhc")


def _launched(s: Setting, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Return how many kernels a forward and its backward launch; on a CPU how often they call ops of ours."""
    on_gpu = s.device.type == "cuda"
    counts, loss = [], torch.empty(())
    for backward in (False, True):
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
            if backward:
                loss.backward()
            else:
                loss = forward()
            if on_gpu:
                torch.cuda.synchronize(s.device)
        events = seen.events() or []
        if on_gpu:
            counts.append(sum(str(e.device_type).endswith("CUDA") and not e.name.startswith("Mem") for e in events))
        else:
            counts.append(sum(e.name.startswith("mhc_kernels") for e in events))
    return counts[0], counts[1]


def decoding(s: Setting) -> Iterator[Finding]:
    """Time the boundary's forward for few tokens, called and replayed from a CUDA graph."""
    chain = _boundary(32 if s.small else 4096, s, norm="none")
    for tokens in (1, 4) if s.small else (1, 4, 16, 64):
        inputs = boundary.random_inputs(chain, tokens, s.device)
        with torch.no_grad():
            called = lambda inputs=inputs: boundary.ours(chain)(*inputs)  # noqa: E731
            figures = {"called": _median(called, s), "replayed": _median(_replayed(called, s.device)[0], s)}
        figure = ", ".join(f"{name} {1e6 * t:.1f} us" for name, t in figures.items())
        yield Finding(f"boundary forward, {tokens} tokens, C={chain.width}", figure, figures)


def _median(run: Callable[[], Any], s: Setting) -> float:
    run()
    return statistics.median(timed(run, s.device) for _ in range(3 if s.small else 51))


def _replayed(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """Return what replays the work from a CUDA graph, and the results that a replay writes; a CPU computes again."""
    if device.type != "cuda":
        return run, run()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def graphs(s: Setting) -> Iterator[Finding]:
    """Capture the boundary's forward and backward in a CUDA graph: equal results, and the time."""
    chain = _boundary(32 if s.small else 4096, s)
    inputs = [t.requires_grad_() for t in boundary.random_inputs(chain, 32 if s.small else 2048, s.device)]

    def work() -> tuple[Tensor, ...]:
        out = boundary.ours(chain)(*inputs)
        return torch.autograd.grad(out, inputs, [torch.ones_like(t) for t in out])

    expected = [t.clone() for t in work()]
    replay, results = _replayed(work, s.device)
    replay()
    equal = all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    figures = {"equal": equal, "called": _median(work, s), "replayed": _median(replay, s)}
    figure = (
        f"gradients {'equal bit by bit' if equal else 'DIFFER'}; called {1e3 * figures['called']:.3f} ms, replayed "
    )
    yield Finding(
        "boundary forward and backward from a CUDA graph", f"{figure}{1e3 * figures['replayed']:.3f} ms", figures
    )


def training_steps(s: Setting) -> Iterator[Finding]:
    """Time a training step, residual and with 4 streams, and the share of a large matmul's rate that it reaches."""
    from torch.utils.flop_counter import FlopCounterMode

    base, ids, shape = step.subject(quick=s.small, device=s.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base(ids, labels=ids, use_cache=False)
    operations, rate = 3 * counter.get_total_flops(), _matmul_rate(s, base.dtype)
    rows: dict[str, float] = {}
    for name, streams in (("residual, Inductor", 0), ("4 streams", 4)):
        work = step.training(_compiled(copy.deepcopy(base), streams), ids)
        work()
        times = [timed(work, s.device)]
        while len(times) < (2 if s.small else 15) and time.monotonic() < s.until:
            times.append(timed(work, s.device))
        rows[name] = statistics.median(times)
        used = operations / rows[name] / rate
        yield Finding(
            f"training step, {shape}: {name}",
            f"{1e3 * rows[name]:.1f} ms, {ids.numel() / rows[name]:.0f} tokens a second, {used:.1%} of the rate of a "
            f"large matmul, {rate / 1e12:.3g} TFLOP/s (MFU)",
            {"seconds": times, "operations": operations, "matmul_rate": rate},
        )
    overhead = rows["4 streams"] / rows["residual, Inductor"] - 1
    yield Finding(f"what 4 streams add to a training step, {shape}", f"{overhead:+.1%}", overhead)


def _matmul_rate(s: Setting, dtype: torch.dtype) -> float:
    """Measure the operations per second of a matrix product."""
    size = 8192 if s.device.type == "cuda" and not s.small else 512
    a, b = (torch.randn(size, size, device=s.device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, s)


def one_rank(s: Setting) -> Iterator[Finding]:
    """Train one step with DistributedDataParallel on one rank: the gradients are those without."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if s.device.type == "cuda" else "gloo"
    torch.manual_seed(0)
    model = convert(step.llama(2, 64).to(s.device), streams=4)
    compiled = torch.compile(model, backend="mhc")
    ids = torch.randint(0, 8192, (2, 16), device=s.device)

    def gradients(module: Any) -> list[Tensor]:
        model.zero_grad()
        module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = gradients(compiled)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        together = gradients(DistributedDataParallel(compiled, device_ids=[0] if s.device.type == "cuda" else None))
        total = torch.ones(1 << (10 if s.small else 26), device=s.device)
        taken = _median(lambda: dist.all_reduce(total), s)
    finally:
        dist.destroy_process_group()
    equal = len(alone) == len(together) and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    figure = f"gradients {'equal bit by bit' if equal else 'DIFFER'}; all-reduce of {total.nbytes >> 10} KiB "
    yield Finding(
        f"a step with one rank of {backend}", f"{figure}{1e6 * taken:.0f} us", {"equal": equal, "all_reduce": taken}
    )


def tiles(s: Setting) -> Iterator[Finding]:
    """Measure the tiles of the boundary's kernels in the time left; write the fastest in the format that is shipped."""
    if s.target != "triton":
        say(s.console, "only Triton kernels have tiles")
        return
    winners: dict[str, dict[str, int]] = {}
    for width in (32,) if s.small else (4096, 7168):
        chain = _boundary(width, s)
        values = dict(
            zip(chain.inputs(), boundary.random_inputs(chain, 32 if s.small else 16384, s.device), strict=True)
        )
        for direction in ("backward", "forward"):
            for kernel, figures in _tuned(s, chain, direction, values).items():
                best = min(figures, key=lambda tile: figures[tile])
                default = launcher_of(chain).tiles(chain, kernel, arch_of(s.device))[0]
                winners[launcher_of(chain).key(chain, direction, kernel, s.device)] = asdict(best)
                write_whole(s.out / "tiles.json", json.dumps(winners, indent=1) + "\n", code="MHC412")
                figure = f"{best} {1e3 * figures[best]:.3f} ms, default {default} {1e3 * figures[default]:.3f} ms"
                tried = {str(tile): t for tile, t in figures.items()}
                yield Finding(f"fastest of {len(figures)} tiles, {chain.name}, {kernel}", figure, tried)


def _tuned(
    s: Setting, chain: Chain, direction: Direction, values: dict[str, Tensor]
) -> dict[str, dict[TileConfig, float]]:
    """Run one direction, and time every kernel with the tiles for which there is time, the default first."""
    launcher, figures = copy.copy(launcher_of(chain)), {}
    out = {} if direction == "forward" else launcher_of(chain).run(chain, "forward", values)

    def measured(spec: KernelSpec, direction: Direction, kernel: str, device: torch.device, call: Any) -> Call:
        took: dict[TileConfig, float] = {}
        for tile in launcher.tiles(spec, kernel, arch_of(device))[: 2 if s.small else None]:
            try:
                launch = call(tile)
                took[tile] = _median(lambda t=tile, c=launch: launcher.start(spec, direction, kernel, t, c), s)  # type: ignore[misc]
            except Exception as error:  # too much shared memory, say
                say(s.console, f"{kernel}, {tile}: {reason(error)}")
            if took and time.monotonic() > s.until:
                break
        figures[kernel] = took
        best = min(took, key=lambda tile: took[tile])
        launcher.start(spec, direction, kernel, best, launched := call(best))
        return launched

    launcher.launch = measured  # type: ignore[method-assign]
    every = {**values, **out}
    flows = {f"d_{name}": torch.ones_like(out[name]) for name in out}
    launcher.run(chain, direction, {name: {**every, **flows}[name] for name in chain.inputs(direction)})
    return figures
