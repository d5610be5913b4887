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
    """One rank's device and its link to others."""

    name: str
    flops: float
    """Multiplications and additions a second of dense bfloat16 matrices."""
    flops_float32: float
    """The same of float32 matrices, in tf32 where the device has it."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To another rank, bytes a second each way."""
    memory: int
    """Bytes."""
    latency: float = 10e-6
    """Of a transfer to another rank, seconds; of this order on every one of them."""

    def rate(self, dtype: str) -> float:
        """Return the operations a second in `dtype`, "bfloat16" or "float32"."""
        return self.flops if dtype == "bfloat16" else self.flops_float32


KNOWN = {
    name: Hardware(name, *rates)
    for name, rates in {
        # NVIDIA's data sheets; links: half of NVLink's two-way rate, or one 400 Gb/s adapter a device.
        "a100": (312e12, 156e12, 2.039e12, 300e9, 80 * GIB),
        "h100": (989e12, 494e12, 3.35e12, 450e9, 80 * GIB),
        "h100-ib": (989e12, 494e12, 3.35e12, 50e9, 80 * GIB),
        "h200": (989e12, 494e12, 4.8e12, 450e9, int(141e9)),
        "h200-ib": (989e12, 494e12, 4.8e12, 50e9, int(141e9)),
        "b200": (2250e12, 1125e12, 8e12, 900e9, int(180e9)),
        # AMD's data sheet; link: one of the seven to the other devices of a node.
        "mi300x": (1307e12, 654e12, 5.3e12, 64e9, 192 * 10**9),
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
) -> Hardware:
    """Return the hardware called `name`, with its rates replaced by those given, or one of four given rates.

    `flops` holds for every dtype. Raises MHC640 for an unknown name, for rates that are not above 0, and where neither
    a name nor all rates are given.
    """
    options = {"flops": flops, "bandwidth": bandwidth, "link": link, "memory": memory}
    rates = {key: value for key, value in options.items() if value is not None}
    if wrong := [key for key, value in rates.items() if not value > 0]:
        raise MHCError("MHC640", f"--{wrong[0]} {rates[wrong[0]]}; a number above 0")
    if name is None:
        if missing := [key for key in options if key not in rates]:
            raise MHCError("MHC640", f"without a name, --{missing[0]} is missing")
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
