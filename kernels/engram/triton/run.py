"""Call the generated Triton by which a memory enters the streams, on a GPU or under `TRITON_INTERPRET=1` on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from mhc_compile.kernels.engram.entry import Direction, Entry, Sizes
from mhc_compile.kernels.engram.triton import convolution, tokens
from mhc_compile.kernels.signature import token_stride
from mhc_compile.kernels.triton.blocks import Blocks
from mhc_compile.kernels.triton.build import Compiled, compile_kernel, module_of
from mhc_compile.kernels.triton.run import FLOATS

Kernel = Literal["forward", "backward", "statistics", "walk", "finish"]
# Programs of a backward that add up the gradients of the gains, each in rows of its own.
PROGRAMS = 256
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def unsupported(entry: Entry) -> str | None:
    """Why there is no generated Triton for `entry`; None where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    others = [t for t in entry.dtypes() if t not in FLOATS]
    if others:
        return f"Triton: kernels are for {', '.join(map(str, FLOATS))}, not {others[0]}"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "Triton kernels are for GPUs of compute capability 8.0 and later"
    return None


def source(entry: Entry, direction: Direction) -> str:
    """The generated Python file of one direction."""
    of = convolution if entry.convolves else tokens
    return (of.forward_source if direction == "forward" else of.backward_source)(entry)


@cache
def load(entry: Entry, direction: Direction) -> ModuleType:
    """The generated file as a module. Raises ImportError where there is no Triton."""
    return module_of(f"{entry.name}_{direction}", source(entry, direction))


def kernels(entry: Entry, direction: Direction) -> tuple[Kernel, ...]:
    """The kernels of one direction, in the order of their launches."""
    if not entry.convolves:
        return (direction,)
    return ("statistics", "forward") if direction == "forward" else ("statistics", "walk", "finish")


def pointers(entry: Entry, kernel: Kernel) -> tuple[str, ...]:
    """The tensors that a kernel takes, in order."""
    if entry.convolves:
        return convolution.POINTERS[kernel]
    return tokens.forward_pointers(entry) if kernel == "forward" else tokens.backward_pointers(entry)


def blocks(entry: Entry, kernel: Kernel) -> Blocks:
    """How a kernel's work is cut: no registers spilled for n = 4. Of `walk`, `tokens` are its steps."""
    if kernel == "walk":  # one warp, so that sums over the columns stay in it
        return Blocks(tokens=64, columns=64 if entry.streams <= 4 else 32, warps=1)
    if kernel == "forward" and entry.convolves:
        return Blocks(tokens=8, columns=128, warps=4)
    if kernel == "backward" and entry.kind == "gate":
        return Blocks(tokens=2, columns=256 if entry.streams <= 4 else 128, warps=4)
    if entry.gates:
        return Blocks(tokens=4, columns=128 if entry.streams <= 4 else 64, warps=4)
    return Blocks(tokens=4, columns=256 if entry.streams <= 4 else 128, warps=4)


def compile_for(
    entry: Entry, direction: Direction, kernel: Kernel, backend: Literal["cuda", "hip"], arch: int | str
) -> Compiled:
    """Compile one kernel for an architecture (`("cuda", 90)`, `("hip", "gfx942")`) on any machine.

    Raises ImportError without Triton and what its compiler raises.
    """
    fn, cut, names = getattr(load(entry, direction), kernel), blocks(entry, kernel), pointers(entry, kernel)
    constants = {"STEPS" if kernel == "walk" else "BT": cut.tokens, "BK": cut.columns}
    scratch = ("r", "dv", "sums", "partial")
    types = {
        name: _POINTERS[torch.float32 if name in scratch else entry.dtype(name)]
        if name in names
        else "constexpr" if name in constants else "i64"
        for name in fn.arg_names
    }  # fmt: skip
    aligned = [i for i, name in enumerate(fn.arg_names) if name in names]
    if entry.streams * entry.width % 16 == 0 and "x_stride" in fn.arg_names:
        aligned.append(fn.arg_names.index("x_stride"))
    return compile_kernel(fn, types, constants, aligned, backend, arch, cut)


def run(entry: Entry, direction: Direction, values: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Run one direction on `values`; results by name. Raises what Triton raises where it cannot compile or launch."""
    like = next(iter(values.values()))
    out = {name: like.new_empty(entry.shape(name, sizes), dtype=entry.dtype(name)) for name in entry.outputs(direction)}
    count = sizes.batch * sizes.tokens
    if not count:
        return {name: t.zero_() for name, t in out.items()}
    stride = token_stride(values["X"]) if "X" in values else None
    held = {k: v if k == "X" and stride is not None else v.to(entry.dtype(k)).contiguous() for k, v in values.items()}
    numbers = {
        "tokens": count, "length": sizes.tokens, "before": sizes.before,
        "x_stride": entry.streams * entry.width if stride is None else stride,
    }  # fmt: skip
    if entry.convolves:
        _convolve(entry, direction, held, out, sizes, numbers)
    elif direction == "forward":
        grid = (-(-count // blocks(entry, "forward").tokens),)
        _launch(entry, direction, "forward", {**held, **out}, numbers, grid)
    else:
        _tokens_back(entry, held, out, numbers)
        if sizes.before:  # history takes no part in `add`
            for t in out.values():
                t[:, : sizes.before].zero_()
    return out


def _tokens_back(entry: Entry, held: dict[str, Tensor], out: dict[str, Tensor], numbers: dict[str, int]) -> None:
    count = -(-numbers["tokens"] // blocks(entry, "backward").tokens)
    per_program = -(-count // PROGRAMS) if entry.gates else 1
    programs, values = -(-count // per_program), {**held, **out}
    if entry.gates:
        values["sums"] = held["X"].new_empty((programs, entry.streams, entry.width), dtype=torch.float32)
    _launch(entry, "backward", "backward", values, {**numbers, "per_program": per_program}, (programs,))
    if entry.gates:
        both = values["sums"].sum(0)
        torch.mul(both, held["key_gain"], out=out["d_query_gain"])
        torch.mul(both, held["query_gain"], out=out["d_key_gain"])


def _convolve(
    entry: Entry, direction: Direction, held: dict[str, Tensor], out: dict[str, Tensor], sizes: Sizes,
    numbers: dict[str, int],
) -> None:  # fmt: skip
    n, C, taps, rows = entry.streams, entry.width, entry.spec.taps, sizes.batch * sizes.rows
    fresh = held["a"].new_empty
    values = {**held, **out, "r": fresh((rows, n))}
    _launch(entry, direction, "statistics", values, {"rows": rows}, (-(-rows // blocks(entry, "statistics").tokens),))
    if direction == "forward":
        cut = blocks(entry, "forward")
        grid = (-(-numbers["tokens"] // cut.tokens), -(-C // cut.columns))
        _launch(entry, direction, "forward", values, numbers, grid)
        return
    cut, dilation = blocks(entry, "walk"), entry.spec.dilation
    column_blocks, chunks = -(-C // cut.columns), -(-sizes.rows // (dilation * cut.tokens))
    programs = sizes.batch * chunks * dilation
    values["dv"], values["partial"] = fresh((rows, C)), fresh((programs, n, taps, C))
    values["sums"] = fresh((column_blocks, rows, 2 * n))
    walk = {"length": sizes.tokens, "before": sizes.before, "chunks": chunks, "total_rows": rows}
    _launch(entry, direction, "walk", values, walk, (programs, column_blocks))
    last = {"rows": rows, "column_blocks": column_blocks}
    _launch(entry, direction, "finish", values, last, (-(-rows // blocks(entry, "finish").tokens),))
    dw = values["partial"].sum(0).transpose(1, 2)
    torch.mul(dw, held["conv_gain"].unsqueeze(-1), out=out["d_conv"])
    torch.sum(dw * held["conv"], -1, out=out["d_conv_gain"])


def _launch(
    entry: Entry, direction: Direction, kernel: Kernel, values: dict[str, Tensor], numbers: dict[str, int],
    grid: tuple[int, ...],
) -> None:  # fmt: skip
    fn, cut = getattr(load(entry, direction), kernel), blocks(entry, kernel)
    device = next(iter(values.values())).device
    options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    if device.type == "cpu":  # the interpreter
        options = {}
    constants = {"STEPS" if kernel == "walk" else "BT": cut.tokens, "BK": cut.columns}
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        fn[grid](*(values[name] for name in pointers(entry, kernel)), **numbers, **constants, **options)
