"""The hardware of a plan: the published peak rates of accelerators, or rates that the user gives.

Rates are those of the vendors' data sheets for dense matrices; no measurement of ours is among them. Every time that
follows from them is a bound from below: real operations reach a part of these rates, so compare schedules by the
ratios of their times, or give rates that you have measured.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from mhc_compile.diagnostics import MHCError

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its links to others. Nodes hold ranks in their order, `node` each."""

    name: str
    flops: float
    """Multiplications and additions a second of dense bfloat16 matrices."""
    flops_float32: float
    """The same of float32 matrices, in tf32 where the device has it."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To another rank of its node, bytes a second each way."""
    network: float
    """To a rank of another node."""
    memory: int
    """Bytes."""
    node: int = 8
    """Ranks a node."""
    latency: float = 10e-6
    """Of a transfer to another rank, seconds; of this order on every one of them."""

    def rate(self, dtype: str) -> float:
        """Return the operations a second in `dtype`, "bfloat16" or "float32"."""
        return self.flops if dtype == "bfloat16" else self.flops_float32

    def between(self, a: int, b: int, replicas: int) -> float:
        """Return the bytes a second between places `a` and `b` of a pipeline: those of the slowest of its replicas."""
        pairs = ((place * replicas + r) // self.node for r in range(replicas) for place in (a, b))
        return self.link if all(first == second for first, second in zip(pairs, pairs, strict=True)) else self.network

    def among(self, first: int, count: int) -> float:
        """Return the bytes a second of a sum over `count` ranks from the one numbered `first`.

        Between nodes its rings use the adapters of all its ranks in a node.
        """
        nodes = (first + count - 1) // self.node - first // self.node + 1
        return self.link if nodes == 1 else min(self.link, self.network * max(1, count // nodes))


KNOWN = {
    name: Hardware(name, *rates)
    for name, rates in {
        # NVIDIA's data sheets; links: half of NVLink's two-way rate; network: one adapter a device, of 200 Gb/s (a100)
        # or 400 Gb/s, as in DGX systems.
        "a100": (312e12, 156e12, 2.039e12, 300e9, 25e9, 80 * GIB),
        "h100": (989e12, 494e12, 3.35e12, 450e9, 50e9, 80 * GIB),
        "h200": (989e12, 494e12, 4.8e12, 450e9, 50e9, int(141e9)),
        "b200": (2250e12, 1125e12, 8e12, 900e9, 50e9, int(180e9)),
        # AMD's data sheet; link: one of the seven to the other devices of a node.
        "mi300x": (1307e12, 654e12, 5.3e12, 64e9, 50e9, 192 * 10**9),
    }.items()
}
"""By the name that `--hardware` takes."""


def hardware(
    name: str | None,
    *,
    flops: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
    memory: float | None = None,
    network: float | None = None,
    node: int | None = None,
) -> Hardware:
    """Return the hardware called `name`, with its rates replaced by those given, or one of four given rates.

    `flops` holds for every dtype; without a name, `network` is `link` where it is not given. Raises MHC640 for an
    unknown name, for rates that are not above 0, and where neither a name nor all rates are given.
    """
    options = {"flops": flops, "bandwidth": bandwidth, "link": link, "memory": memory}
    given = {**options, "network": network, "node": node}
    rates = {key: value for key, value in given.items() if value is not None}
    if wrong := [key for key, value in rates.items() if not value > 0]:
        raise MHCError("MHC640", f"--{wrong[0]} {rates[wrong[0]]}; a number above 0")
    if name is None:
        if missing := [key for key in options if key not in rates]:
            raise MHCError("MHC640", f"without a name, --{missing[0]} is missing")
        rates.setdefault("network", rates["link"])
        name = next(iter(KNOWN))  # whose rates are all replaced
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, 1)
        raise MHCError("MHC640", f"{name!r}; {f'nearest: {near[0]}; ' if near else ''}known: {', '.join(KNOWN)}")
    if not rates:
        return KNOWN[name]
    changes: dict[str, Any] = {"name": "given", **rates}
    if flops is not None:
        changes["flops_float32"] = flops
    if memory is not None:
        changes["memory"] = int(memory)
    return replace(KNOWN[name], **changes)
