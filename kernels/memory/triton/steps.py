"""Launch the generated Triton by which a memory enters the streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.kernelspec import Direction, Values, laid_out
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.memory.triton import convolution, tokens
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton.launch import Call, Launcher
from mhc_compile.kernels.triton.tiles import TileConfig, tried_with

# Programs of a backward that add up the gradients of the gains, each in rows of its own.
PROGRAMS = 256


class StepLauncher(Launcher):
    """The kernels `forward` and `backward`; of a convolution `statistics`, `forward`, `walk` and `finish`."""

    SCRATCH = ("r", "dv", "sums", "partial")

    def source(self, spec: MemoryStep, direction: Direction) -> Source:
        """Generate the Python file of one direction."""
        emits = convolution if spec.convolves else tokens
        return (emits.forward_source if direction == "forward" else emits.backward_source)(spec)

    def kernels(self, spec: MemoryStep, direction: Direction) -> tuple[str, ...]:
        """Return the kernels of one direction, in the order of their launches."""
        if not spec.convolves:
            return (direction,)
        return ("statistics", "forward") if direction == "forward" else ("statistics", "walk", "finish")

    def pointers(self, spec: MemoryStep, kernel: str) -> tuple[str, ...]:
        """Return the tensors that a kernel takes, in order."""
        if spec.convolves:
            return convolution.POINTERS[kernel]
        return tokens.forward_pointers(spec) if kernel == "forward" else tokens.backward_pointers(spec)

    def tiles(self, spec: MemoryStep, kernel: str, arch: int | str) -> list[TileConfig]:  # noqa: ARG002
        """Return what measuring tries, first the choice without measuring: no registers spilled for n = 4."""
        wide = spec.n <= 4
        if kernel == "walk":  # one warp, so that sums over the columns stay in it
            first = TileConfig(tokens=64, columns=64 if wide else 32, warps=1)
            return tried_with(first, (32, 64, 128), (32, 64), warps=(1,), largest=8192)
        if kernel == "forward" and spec.convolves:
            first = TileConfig(tokens=8, columns=128, warps=4)
        elif kernel == "backward" and spec.kind == "gate":
            first = TileConfig(tokens=2, columns=256 if wide else 128, warps=4)
        elif spec.gates:
            first = TileConfig(tokens=4, columns=128 if wide else 64, warps=4)
        else:
            first = TileConfig(tokens=4, columns=256 if wide else 128, warps=4)
        return tried_with(first, (2, 4, 8, 16), (64, 128, 256), warps=(4, 8), largest=2048)

    def constants(self, spec: MemoryStep, kernel: str, backend: str, tile: TileConfig) -> dict[str, Any]:  # noqa: ARG002
        """Return the sizes of a tile; of `walk` its steps."""
        return {"STEPS" if kernel == "walk" else "BT": tile.tokens, "BK": tile.columns}

    def run(self, spec: MemoryStep, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Launch the kernels of one direction; return its outputs by name."""
        sizes, like = spec.sizes(values), next(iter(values.values()))
        out = {n: like.new_empty(spec.shape(n, sizes), dtype=spec.dtype(n)) for n in spec.outputs(direction)}
        inputs, stride = laid_out(spec, values)
        numbers = {**spec.numbers(sizes), "x_stride": stride}
        if spec.convolves:
            self._convolve(spec, direction, inputs, out, numbers)
        elif direction == "forward":
            self._over_rows(spec, direction, "forward", {**inputs, **out}, numbers["tokens"], numbers)
        else:
            self._tokens_back(spec, inputs, out, numbers)
            if numbers["before"]:  # history takes no part in `add`
                for t in out.values():
                    t[:, : numbers["before"]].zero_()
        return out

    def _over_rows(
        self, spec: MemoryStep, direction: Direction, kernel: str, values: dict[str, Tensor], rows: int,
        numbers: dict[str, int],
    ) -> None:  # fmt: skip
        """Launch a program for each block of rows."""
        device = next(iter(values.values())).device
        self.launch(
            spec, direction, kernel, device, lambda tile: Call(values, numbers, (-(-rows // tile.tokens),))
        )  # fmt: skip

    def _tokens_back(
        self, spec: MemoryStep, inputs: dict[str, Tensor], out: dict[str, Tensor], numbers: dict[str, int]
    ) -> None:
        like = next(iter(inputs.values()))

        def call(tile: TileConfig) -> Call:
            count = -(-numbers["tokens"] // tile.tokens)
            per_program = -(-count // PROGRAMS) if spec.gates else 1
            programs, values = -(-count // per_program), {**inputs, **out}
            if spec.gates:
                values["sums"] = like.new_empty((programs, spec.n, spec.width), dtype=torch.float32)
            return Call(values, {**numbers, "per_program": per_program}, (programs,))

        launched = self.launch(spec, "backward", "backward", like.device, call)
        if spec.gates:
            both = launched.values["sums"].sum(0)
            torch.mul(both, inputs["key_gain"], out=out["d_query_gain"])
            torch.mul(both, inputs["query_gain"], out=out["d_key_gain"])

    def _convolve(
        self, spec: MemoryStep, direction: Direction, inputs: dict[str, Tensor], out: dict[str, Tensor],
        numbers: dict[str, int],
    ) -> None:  # fmt: skip
        n, C = spec.n, spec.width
        batch, length = numbers["tokens"] // numbers["length"], numbers["length"] + numbers["before"]
        rows = batch * length
        fresh, device = inputs["a"].new_empty, inputs["a"].device
        values = {**inputs, **out, "r": fresh((rows, n))}
        self._over_rows(spec, direction, "statistics", values, rows, {"rows": rows})
        if direction == "forward":

            def tile_of(tile: TileConfig) -> Call:
                return Call(values, numbers, (-(-numbers["tokens"] // tile.tokens), -(-C // tile.columns)))

            self.launch(spec, direction, "forward", device, tile_of)
            return
        values["dv"] = fresh((rows, C))

        def walk(tile: TileConfig) -> Call:
            blocks, chunks = -(-C // tile.columns), -(-length // (spec.spec.dilation * tile.tokens))
            programs = batch * chunks * spec.spec.dilation
            scratch = {"partial": fresh((programs, n, spec.spec.taps, C)), "sums": fresh((blocks, rows, 2 * n))}
            sizes = {"length": numbers["length"], "before": numbers["before"], "chunks": chunks, "total_rows": rows}
            return Call({**values, **scratch}, sizes, (programs, blocks))

        walked = self.launch(spec, direction, "walk", device, walk)
        last = {"rows": rows, "column_blocks": walked.grid[1]}
        self._over_rows(spec, direction, "finish", walked.values, rows, last)
        dw = walked.values["partial"].sum(0).transpose(1, 2)
        torch.mul(dw, inputs["conv_gain"].unsqueeze(-1), out=out["d_conv"])
        torch.sum(dw * inputs["conv"], -1, out=out["d_conv_gain"])
