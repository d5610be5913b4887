"""Launch the generated Triton of chains."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.kernelspec import Direction, Values, laid_out
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton import norm
from mhc_compile.kernels.triton.backward import backward_pointers, backward_source
from mhc_compile.kernels.triton.coefficients import bias_row
from mhc_compile.kernels.triton.forward import forward_source
from mhc_compile.kernels.triton.launch import Call, Launcher, arch_of
from mhc_compile.kernels.triton.tiles import MAX_SPLITS, NARROW, TileConfig, candidates


class ChainLauncher(Launcher):
    """The kernels `forward` and `backward`, and `phi_gradient` where a chain projects."""

    SCRATCH = ("dlogits", "du", "sums", "norm_sums", "partial")

    def source(self, spec: Chain, direction: Direction) -> Source:
        """Generate the Python file of one direction."""
        return (forward_source if direction == "forward" else backward_source)(spec)

    def kernels(self, spec: Chain, direction: Direction) -> tuple[str, ...]:
        """Return the kernels of one direction, in the order of their launches."""
        return (direction, "phi_gradient") if direction == "backward" and spec.projects else (direction,)

    def pointers(self, spec: Chain, kernel: str) -> tuple[str, ...]:
        """Return the tensors that a kernel takes, in order."""
        if kernel == "forward":
            return (*spec.inputs(), *spec.outputs())
        if kernel == "backward":
            return backward_pointers(spec)
        return ("X", *(("y", "post", "mix") if spec.mixes else ()), "du", "partial")

    def tiles(self, spec: Chain, kernel: str, arch: int | str) -> list[TileConfig]:
        """Return what measuring tries, first the choice without measuring."""
        return candidates(spec, kernel, arch)

    def constants(self, spec: Chain, kernel: str, backend: str, tile: TileConfig) -> dict[str, Any]:
        """Return the sizes of a tile, and how float32 products are formed on tensor cores.

        That is as three TF32 products on NVIDIA, in float32 elsewhere. What the backward adds to a gradient that is
        rounded to half precision is one TF32 product; to a float32 gradient it is added without tensor cores where the
        tile is too narrow for their layout.
        """
        backward = kernel == "backward"
        float32 = spec.streams_dtype == torch.float32
        exact = backend != "cuda" or (backward and float32 and tile.columns < NARROW)
        precision = "ieee" if exact else "tf32" if backward and not float32 else "tf32x3"
        return {"BT": tile.tokens, "BK": tile.columns, "PRECISION": precision}

    def run(self, spec: Chain, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Launch the kernels of one direction; return its outputs by name."""
        sizes, like = spec.sizes(values), values["X"]
        out = {n: like.new_empty(spec.shape(n, sizes), dtype=spec.dtype(n)) for n in spec.outputs(direction)}
        arguments, stride = laid_out(spec, values)
        numbers = {**spec.numbers(sizes), "x_stride": stride}
        tokens, device = numbers["tokens"], like.device
        every = {**arguments, **out}
        if direction == "backward" and spec.projects:
            every["dlogits"], every["du"] = (
                arguments["z"].new_empty(tokens, spec.groups * spec.rows) for _ in range(2)
            )

        def call(tile: TileConfig) -> Call:
            programs = -(-tokens // tile.tokens)
            scratch = _sums(spec, arguments["z"], programs) if direction == "backward" and spec.projects else {}
            return Call({**every, **scratch}, numbers, (programs, 1))

        launched = self.launch(spec, direction, direction, device, call)
        if direction == "backward" and spec.projects:
            self._parameters(spec, launched, out)
        return out

    def _parameters(self, spec: Chain, launched: Call, out: dict[str, Tensor]) -> None:
        """Add up what each block of tokens adds to the parameters' gradients, in one order."""
        values, numbers = launched.values, launched.numbers
        biases, per_row = values["sums"].sum(0)
        order, of_alpha = _places(spec, per_row.device)
        out["d_bias"].copy_(biases[order] if spec.is_hyper_connection else biases)
        torch.sum(torch.where(of_alpha, per_row, 0.0), -1, out=out["d_alpha"])
        if spec.norm != "none":
            for name, gradient in zip(("d_norm_weight", "d_norm_bias"), values["norm_sums"].sum(0), strict=False):
                out[name].copy_(gradient)
        # Each program adds up a fixed range of tokens; the ranges' sums are added in one order.
        tokens, device = numbers["tokens"], values["X"].device
        step = self.tiles(spec, "phi_gradient", arch_of(device))[0].tokens * 16
        splits = min(MAX_SPLITS, -(-tokens // step))
        per_split = -(-tokens // (splits * step)) * step
        splits = -(-tokens // per_split)
        partial = values["z"].new_empty(splits, spec.rows, spec.span)

        def call(tile: TileConfig) -> Call:
            grid = (-(-spec.width // tile.columns), splits)
            return Call({**values, "partial": partial}, {**numbers, "per_split": per_split}, grid)

        self.launch(spec, "backward", "phi_gradient", device, call)
        torch.sum(partial, 0, out=out["d_phi"])


@cache
def _places(chain: Chain, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, on the device, where each entry of the bias lies among the projections, and which each alpha scales.

    They are kept, because copying them to a GPU for every backward would wait for it.
    """
    n, every = chain.n, range(chain.groups * chain.rows)
    if chain.is_hyper_connection:
        scaled = [[(at % chain.rows == 1) == post for at in every] for post in (False, True)]
        order = sorted(every, key=lambda at: bias_row(chain, at))
    else:
        bounds = [0, chain.rows] if chain.weights == "head" else [0, n, 2 * n, chain.rows]
        scaled = [[first <= at < last for at in every] for first, last in itertools.pairwise(bounds)]
        order = [*every]
    return torch.tensor(order, device=device), torch.tensor(scaled, device=device)


def _sums(chain: Chain, like: Tensor, programs: int) -> dict[str, Tensor]:
    """Return room for what each block of tokens adds to the gradients of the parameters but phi."""
    sums = {"sums": like.new_empty(programs, 2, chain.groups * chain.rows)}
    if chain.norm != "none":
        sums["norm_sums"] = like.new_empty(programs, norm.gradients(chain), chain.width)
    return sums
