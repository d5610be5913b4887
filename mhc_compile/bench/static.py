"""Estimate what bounds each Triton kernel from its machine code. No GPU is needed; nothing is measured.

A kernel is compiled for an architecture and disassembled. Its loops are those of Triton's own intermediate text, whose
bounds are known, so that every instruction counts as often as a program executes it. A launch's grid is recorded by
launching with tensors that have no storage. From both follow, per token, the work of every unit of a multiprocessor
and the time that the unit needs for it alone; the largest is the bound. Nothing waits for anything in this model:
latencies, and what two units cannot do at once, come on top.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.in_triton import launcher_of
from mhc_compile.kernels.kernelspec import DIRECTIONS, Direction, KernelSpec
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.triton.build import Compiled
from mhc_compile.kernels.triton.launch import Call
from mhc_compile.kernels.triton.tiles import TileConfig

TOKENS = 16384
K = TypeVar("K")


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU, per clock or per second, from the vendor's documents; two are marked as assumed."""

    name: str
    multiprocessors: int
    clock: float
    """Hz."""
    memory: float
    """Bytes per second."""
    cache: int
    """Bytes of the level-2 cache."""
    integer: int
    """Threads of a multiprocessor that an integer, logic or comparing instruction serves in a clock."""
    tensor: Mapping[str, int]
    """Products (fused multiply-adds) of a multiprocessor in a clock, by the dtype of the factors."""


GPUS = {
    90: Gpu("H200", 132, 1.83e9, 4.8e12, 50 << 20, 64, {"bf16": 2048, "f16": 2048, "f32": 1024}),
    100: Gpu("B200", 148, 1.86e9, 8.0e12, 126 << 20, 128, {"bf16": 4096, "f16": 4096, "f32": 2048}),
}
_WARP, _QUARTERS = 32, 4
_FLOATS, _SPECIAL = 128, 16
"""Threads that a multiprocessor serves in a clock: float32 arithmetic; special functions and single conversions
(assumed, as no document has it for F2F)."""
_NEAR_BYTES, _CACHE_BYTES = 128, 64
"""Bytes in a clock between a multiprocessor and its shared memory or first cache, and the level-2 cache (assumed)."""
_REGISTERS, _SHARED, _THREADS, _PROGRAMS = 65536, 233472, 2048, 32
"""The capacity of a multiprocessor: registers, bytes of shared memory, threads, programs."""

# The first of these that an instruction's name begins with gives its kind.
_KINDS = (
    ("tensor", ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "DMMA")),
    ("float32", ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")),
    ("special", ("MUFU", "F2F.", "I2F", "F2I", "POPC", "FLO", "BREV", "I2FP")),
    ("shuffle", ("SHFL",)),
    ("sync", ("BAR", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS", "UTCBAR", "NOP", "BRA",
              "EXIT", "CALL", "BSSY", "BSYNC", "ERRBAR", "CCTL", "NANOSLEEP")),
    ("shared", ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDTM", "STTM", "MOVM")),
    ("global", ("LDG", "STG", "ATOMG", "RED.", "LDL", "STL", "UTMA", "UBLK")),
    ("uniform", ("U", "R2UR", "S2UR", "REDUX", "VOTEU")),
    ("move", ("MOV", "IMAD.MOV", "CS2R", "S2R", "LDC")),
    ("multiply", ("IMAD", "IMUL")),
)  # fmt: skip
KINDS = (*(kind for kind, _ in _KINDS), "integer")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8|4|2)\b")
_BYTES = {"128": 16, "4": 16, "64": 8, "2": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes that one thread accesses, by the suffix of the instruction; .4 and .2 count matrices."""


def kind_of(name: str) -> str:
    """Return the kind of an instruction."""
    return next((kind for kind, starts in _KINDS if name.startswith(starts)), "integer")


@dataclass(frozen=True)
class Stage:
    """A loop of a kernel, or what lies outside of loops: what one token costs there."""

    name: str
    instructions: dict[str, float]
    """Instructions that a warp executes, by kind."""
    loads: dict[int, float]
    """Bytes of global memory read and written, by the bytes of a thread's access."""
    clocks: float
    """Instructions for the load-store unit: accesses of global and shared memory, and shuffles."""


@dataclass(frozen=True)
class Model:
    """A kernel on one GPU."""

    kernel: str
    gpu: str
    tile: str
    registers: int
    shared: int
    """Bytes of a program."""
    programs: int
    """Resident on a multiprocessor at once."""
    stages: tuple[Stage, ...]
    bytes_least: float
    """That must travel between memory and processor, per token."""
    bytes_memory: float
    """With what is read again, as far as the level-2 cache does not hold it."""
    times: dict[str, float]
    """Nanoseconds per token that each unit of the whole GPU needs."""

    @property
    def bound(self) -> str:
        """The unit that needs the longest."""
        return max(self.times, key=lambda unit: self.times[unit])


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Model every kernel for sm_90 and sm_100; print the table and return all figures."""
    models = []
    for arch, gpu in GPUS.items():
        title = f"{gpu.name} (sm_{arch}), {TOKENS} tokens"
        table = Table(
            "kernel", "tile", "registers, shared, programs", "warp instructions a token, by stage",
            "global bytes a token, by access", "ns a token: memory", "issue", "next unit", "bound", title=title,
        )  # fmt: skip
        for spec in subjects(quick=quick):
            for model in kernels_of(spec, arch):
                models.append(model)
                table.add_row(*_row(model))
        console.print(table)
    return {"kernels": [{**asdict(m), "bound": m.bound} for m in models]}


def subjects(*, quick: bool) -> list[KernelSpec]:
    """Return the kernels' specifications."""
    if quick:
        return [Chain(kind="distribute", stream=StreamSpec(), width=128)]
    half: dict[str, Any] = {"streams_dtype": torch.bfloat16, "branch_dtype": torch.bfloat16}
    specs: list[KernelSpec] = [
        Chain(kind="boundary", stream=StreamSpec(), width=4096, **half),
        Chain(kind="boundary", stream=StreamSpec(), width=7168, **half),
        Chain(kind="boundary", stream=StreamSpec(), width=4096, norm="rms", norm_eps=1e-6, **half),
        Chain(kind="boundary", stream=StreamSpec(), width=4096),
        Chain(kind="read", stream=StreamSpec(), width=4096, **half),
        Chain(kind="distribute", stream=StreamSpec(), width=4096, **half),
        Attend(sources=5, width=4096, sources_dtype=torch.bfloat16),
    ]
    dtypes: dict[str, Any] = dict.fromkeys(("streams_dtype", "keys_dtype", "value_dtype"), torch.bfloat16)
    specs.append(MemoryStep(kind="remember", streams=4, width=4096, spec=FusionSpec(), **dtypes))
    return specs


def kernels_of(spec: KernelSpec, arch: int, tokens: int = TOKENS, tile: TileConfig | None = None) -> list[Model]:
    """Return the models of a specification's kernels, with its default tiles or one for all."""
    models = []
    for direction in DIRECTIONS:
        for kernel, call in launches(spec, direction, tokens, arch, tile).items():
            used = tile or launcher_of(spec).tiles(spec, kernel, arch)[0]
            compiled = launcher_of(spec).compile_for(spec, direction, kernel, "cuda", arch, used)
            models.append(model_of(spec, direction, kernel, compiled, used, call, GPUS[arch], tokens))
    return models


def launches(
    spec: KernelSpec, direction: Direction, tokens: int, arch: int, tile: TileConfig | None = None
) -> dict[str, Call]:
    """Return the launches of one direction by kernel, recorded with tensors without storage."""
    launcher, calls = copy.copy(launcher_of(spec)), {}

    def record(spec: KernelSpec, _: Direction, kernel: str, device: torch.device, call: Any) -> Call:  # noqa: ARG001
        calls[kernel] = call(tile or launcher.tiles(spec, kernel, arch)[0])
        return calls[kernel]

    launcher.launch = record  # type: ignore[method-assign, assignment]
    values = {
        name: torch.empty(spec.shape(name, (tokens,)), dtype=spec.dtype(name), device="meta")
        for name in spec.inputs(direction)
    }
    launcher.run(spec, direction, values)
    return calls


def model_of(
    spec: KernelSpec, direction: Direction, kernel: str, compiled: Compiled, tile: TileConfig, call: Call, gpu: Gpu,
    tokens: int,
) -> Model:  # fmt: skip
    """Return the model of one compiled kernel and its launch."""
    registers, shared, warps = compiled.registers()[0], compiled.shared, tile.warps
    programs = resident(registers, shared, warps)
    # The number of iterations of a loop over tokens is known at launch, not from the code.
    turns = call.numbers.get("per_split", 0) // tile.tokens or call.numbers.get("per_program", 1)
    stages = stages_of(compiled, turns, warps * math.prod(call.grid) / tokens)
    least, most = _bytes(spec, direction, kernel)
    held = programs * gpu.multiprocessors * tokens / math.prod(call.grid) * (most - least)
    memory = least + (most - least) * max(0.0, 1 - gpu.cache / max(held, 1))
    products = {dtype: n * math.prod(call.grid) / tokens for dtype, n in products_of(compiled, turns).items()}
    times = {"memory": 1e9 * memory / gpu.memory, **times_of(stages, products, gpu)}
    return Model(
        f"{spec.name}, {kernel}", gpu.name, f"{tile.tokens} x {tile.columns}, {warps} warps", registers, shared,
        programs, tuple(stages), least, memory, times,
    )  # fmt: skip


def _bytes(spec: KernelSpec, direction: Direction, kernel: str) -> tuple[float, float]:
    """Return what a kernel moves per token, each value once, and with every pass of it.

    Of the backward of a chain, phi's gradient is a kernel of its own, which reads streams and branch. Raises ValueError
    for a memory's convolution, whose kernels share the passes.
    """
    if len(launcher_of(spec).kernels(spec, direction)) > 1 and not isinstance(spec, Chain):
        raise ValueError(f"{spec.name}: what each of its kernels moves is not known")
    passes = dict(launcher_of(spec).source(spec, direction).passes)
    sizes = {name: math.prod(spec.shape(name, spec.one_token)) * spec.dtype(name).itemsize for name in passes}
    inputs = [name for name in passes if name in ("X", "y")]
    if kernel == "phi_gradient":
        return (float(sum(sizes[name] for name in inputs)),) * 2
    least = spec.bytes_token(direction)
    if direction == "backward" and "phi_gradient" in launcher_of(spec).kernels(spec, direction):
        passes |= {name: passes[name] - 1 for name in inputs}
    return float(least), float(least + sum((count - 1) * sizes[name] for name, count in passes.items()))


def resident(registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at once."""
    threads = warps * _WARP
    of_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(of_registers, _SHARED // (shared + 1024), _THREADS // threads, _PROGRAMS)


def parse(text: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Return the instructions (name, whole text) of a disassembly up to the end of the kernel's main part, and the
    loops in it by their first and last one.

    What lies behind the end waits again where a first look at a barrier failed.
    """
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            words = match[1].split()
            name = words[1] if words[0].startswith("@") else words[0]
            if jump := re.search(r"BRA\b.*`\((\.L_\S+?)\)", match[1]):
                jumps.append((len(instructions), jump[1]))
            instructions.append((name, match[1]))
            if match[1] == "EXIT":
                break
    loops = [(labels[to], at) for at, to in jumps if labels.get(to, at) < at]
    return instructions, sorted(loops, key=lambda loop: (loop[0], -loop[1]))


def turns_of(ttgir: str, dynamic: float) -> list[tuple[int, float]]:
    """Return the depth and the number of turns of every loop, in the order of the text.

    A bound that is not a number is that of a loop over tokens, with `dynamic` turns; inside another loop it grows by
    one each turn, as where Sinkhorn's steps are walked back.
    """
    loops: list[tuple[int, float]] = []
    outer: list[tuple[int, float]] = []  # indentation, turns
    for line in ttgir.splitlines():
        match = re.match(r"( *)(?:%\S+ = )?scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)", line)
        if not match:
            continue
        outer = [loop for loop in outer if loop[0] < len(match[1])]
        known = [re.match(r"%c(-?\d+)_i\d+", bound) for bound in match.groups()[1:]]
        if all(known):
            first, last, step = (int(k[1]) for k in known if k)
            turns = float(max(0, -(-(last - first) // step)))
        else:
            turns = (outer[-1][1] - 1) / 2 if outer else dynamic
        loops.append((len(outer), turns))
        outer.append((len(match[1]), turns))
    return loops


def stages_of(compiled: Compiled, dynamic: float, share: float) -> list[Stage]:
    """Return the stages of a kernel; `share` is the number of warps per token."""
    instructions, loops = parse(compiled.disassembly())
    loops, turns = matched(loops, turns_of(compiled.texts["ttgir"], dynamic))
    every: dict[str, tuple[dict[str, float], dict[int, float], list[float]]] = {}
    for at, (name, text) in enumerate(instructions):
        around = [i for i, (first, last) in enumerate(loops) if first <= at <= last]
        top = [i for i in around if turns[i][0] == 0]
        stage = f"loop {1 + [i for i, t in enumerate(turns) if t[0] == 0].index(top[0])}" if top else "outside"
        kinds, widths, clocks = every.setdefault(stage, (defaultdict(float), defaultdict(float), []))
        weight = share * math.prod(turns[i][1] for i in around)
        kind = "sync" if text.startswith("@!PT") else kind_of(name)
        kinds[kind] += weight
        if kind in ("global", "shared", "shuffle"):
            width = _WIDTH.search(name)
            size = _BYTES[width[1]] if width else 4
            clocks.append(weight * max(1.0, size * _WARP / _NEAR_BYTES))
            if kind == "global":
                widths[size] += weight * size * _WARP
    return [Stage(name, dict(kinds), dict(widths), sum(clocks)) for name, (kinds, widths, clocks) in every.items()]


def matched(
    loops: list[tuple[int, int]], turns: list[tuple[int, float]]
) -> tuple[list[tuple[int, int]], list[tuple[int, float]]]:
    """Return the loops of the machine code with those of Triton's text, one for one.

    Left out are short loops that wait for a part of the GPU, which Triton's text does not have, and loops of few turns
    that the compiler has written out, whose instructions count as they stand.
    """
    longest = sorted(loops, key=lambda loop: loop[0] - loop[1])[: len(turns)]
    loops = sorted(longest, key=lambda loop: (loop[0], -loop[1]))
    depths = [sum(a <= first and last <= b for a, b in loops) - 1 for first, last in loops]
    least = sorted(range(len(turns)), key=lambda i: turns[i][1])[:12]
    for gone in itertools.combinations(least, len(turns) - len(loops)):
        left = []
        for i, (depth, count) in enumerate(turns):
            above = [max(j for j in range(i) if turns[j][0] == d) for d in range(depth)]
            if i not in gone:
                left.append((depth - len(set(above) & set(gone)), count))
        if [depth for depth, _ in left] == depths:
            return loops, left
    raise AssertionError(f"the loops {loops} of the machine code are not those of Triton's text, {turns}")


def products_of(compiled: Compiled, dynamic: float) -> dict[str, float]:
    """Return the products of a program on tensor cores, by the dtype of the factors."""
    products: dict[str, float] = defaultdict(float)
    for weight, line in _weighted(compiled.texts["ttgir"], dynamic):
        if re.search(r"warp_group_dot %|tt\.dot %|tc_gen5_mma %", line) and "parent = #blocked" not in line:
            shapes = re.findall(r"(?:tensor|memdesc)<(\d+)x(\d+)x(\w+),", line)
            (m, k, dtype), (_, n, _) = shapes[0], shapes[1]
            products[dtype] += weight * int(m) * int(k) * int(n)
    return dict(products)


def _weighted(ttgir: str, dynamic: float) -> Iterator[tuple[float, str]]:
    """Return the lines of a text with how often each runs."""
    turns = iter(turns_of(ttgir, dynamic))
    outer: list[tuple[int, float]] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        outer = [loop for loop in outer if loop[0] < indent]
        yield math.prod(t for _, t in outer), line
        if "scf.for" in line:
            outer.append((indent, next(turns)[1]))


def times_of(stages: list[Stage], products: Mapping[str, float], gpu: Gpu) -> dict[str, float]:
    """Return nanoseconds per token of every unit, were it alone."""
    kinds, widths = _total(s.instructions for s in stages), _total(s.loads for s in stages)
    clocks = {
        "issue": sum(kinds.values()) / _QUARTERS,
        "float32": (kinds["float32"] + kinds["multiply"]) * _WARP / _FLOATS,
        "integer": (kinds["integer"] + kinds["multiply"] * (gpu.integer == 64)) * _WARP / gpu.integer,
        "special": kinds["special"] * _WARP / _SPECIAL,
        "load-store": sum(s.clocks for s in stages),
        "level 2": sum(widths.values()) / _CACHE_BYTES,
        "tensor": sum(n / gpu.tensor[dtype] for dtype, n in products.items()),
    }
    return {unit: 1e9 * c / (gpu.clock * gpu.multiprocessors) for unit, c in clocks.items()}


def _total(parts: Iterable[Mapping[K, float]]) -> dict[K, float]:
    total: dict[K, float] = defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return total


def _row(m: Model) -> list[str]:
    widths = _total(s.loads for s in m.stages)
    others = {unit: t for unit, t in m.times.items() if unit not in ("memory", "issue")}
    worst = max(others, key=lambda unit: others[unit])
    stages = ", ".join(f"{s.name} {sum(s.instructions.values()):.0f}" for s in m.stages)
    accesses = ", ".join(f"{8 * width} bits {b:.0f}" for width, b in sorted(widths.items(), reverse=True))
    return [
        m.kernel, m.tile, f"{m.registers}, {m.shared // 1024} KiB, {m.programs}", stages, accesses,
        f"{m.times['memory']:.1f}", f"{m.times['issue']:.1f}", f"{worst} {others[worst]:.1f}", m.bound,
    ]  # fmt: skip
