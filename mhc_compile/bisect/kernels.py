"""Judge the generated kernels of a graph, each by itself: forward and backward against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mhc_compile.bisect.values import Difference, Values, difference, named, of_dtypes
from mhc_compile.kernels import plain, providers, signature
from mhc_compile.kernels.chain import Chain

FACTOR = 10.0
"""How much larger than that of plain PyTorch in the same dtype the error of a kernel, a rewritten graph or the inner
compiler's code may be."""


@dataclass(frozen=True)
class Judged:
    """One result of one kernel."""

    name: str
    """As `mhc_compile.kernels.signature` names it: `next_X`, `h`, ...; gradients `d_X`, `d_phi`, ..."""
    kernel: Difference
    """From plain PyTorch in float64."""
    plain: Difference
    """The same of plain PyTorch in the kernel's own dtype."""
    allowed: float
    """What the kernel's error may be: see `allowed`."""

    @property
    def mixes(self) -> bool:
        """Whether it belongs to the site whose branch the chain adds, rather than to the one that it reads for."""
        return self.name in ("next_X", "d_X", "d_y", "d_post", "d_mix")

    @property
    def ratio(self) -> float:
        """The error over what it may be."""
        return self.kernel.error / max(self.allowed, 1e-300)


def allowed(error: Difference, dtype: torch.dtype, terms: int = 1) -> float:
    """Return what an error may be where that of plain PyTorch is `error`: `FACTOR` times it.

    Where it is smaller than half a unit in the last place of the largest value, that counts in its place, times the
    square root of the `terms` that each value sums: their roundings add up like a random walk.
    """
    floor = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
    return FACTOR * max(error.error, floor * error.scale * max(terms, 1) ** 0.5)


def fused_calls(gm: GraphModule) -> Iterator[tuple[Node, Chain]]:
    """The fused chains of a graph, in order."""
    for node in gm.graph.nodes:
        if isinstance(chain := node.meta.get("mhc_chain"), Chain):
            yield node, chain


def judge(chain: Chain, args: Sequence[Any]) -> list[Judged]:
    """Every result of the kernel that computes `chain` on `args`, forward and backward, from seeded gradients.

    `args` are the op's own. Empty where the chain has no kernel on their device, or they are not finite.
    """
    values = {name: t.detach() for name, t in named(chain, args).items()}
    chain = of_dtypes(chain, values)
    device = values["X"].device.type
    finite = all(bool(t.isfinite().all()) for t in values.values())
    if not finite or providers.choose(chain, device)[0] == "reference":
        return []
    gradients = _seeded(chain, values)
    wide = {name: t.double() for name, t in values.items()}
    wanted = _results(plain.run, of_dtypes(chain, wide), wide, {n: g.double() for n, g in gradients.items()})
    by_plain = _results(plain.run, chain, values, gradients)
    by_kernel = _results(providers.run, chain, values, gradients)
    found = []
    for name, t in by_kernel.items():
        if name == "z":
            continue  # the kernel's own note for its backward
        rounding = difference(wanted[name], by_plain[name])
        terms = values["X"].numel() // t.numel()
        limit = allowed(rounding, by_plain[name].dtype, terms)
        found.append(Judged(name, difference(wanted[name], t), rounding, limit))
    return found


def worst(found: Sequence[Judged]) -> Judged:
    """The result that is furthest beyond what it may be; the first where several are not finite."""
    return max(found, key=lambda j: j.ratio)


def _results(run: Any, chain: Chain, values: Values, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    lead = tuple(values["X"].shape[:-2])
    with torch.no_grad():
        out = dict(run(chain, "forward", values, signature.outputs(chain), lead))
        held = {**values, **out, **gradients}
        wanted = tuple(f"d_{name}" for name in signature.inputs(chain))
        given = {**{n: held[n] for n in signature.saved(chain)}, **gradients}
        return out | dict(run(chain, "backward", given, wanted, lead))


def _seeded(chain: Chain, values: dict[str, Tensor]) -> dict[str, Tensor]:
    lead, device = tuple(values["X"].shape[:-2]), values["X"].device
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in signature.gradients_in(chain):
        made = torch.randn(signature.shape(chain, name, lead), generator=generator)
        found[f"d_{name}"] = made.to(device, signature.dtype(chain, name))
    return found
