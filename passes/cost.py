"""What the streams cost between the forward and the backward pass, and which blocks of sites to recompute.

For `L` sites in blocks of `Lr`, with the bytes of one site (`SiteCost`), all of them sympy expressions:

    whole     = L * (state + made + branch)                   kept without recomputation
    kept      = L * branch + ceiling(L / Lr) * begin          kept with it: F's outputs, and what begins a block
    transient = Lr * (state + made) - begin                   what a block recomputes just before its backward pass
    peak      = kept + transient

Where a block begins with the streams alone (`begin = state`) and counted as the paper does (`paper`: streams n*C; h and
its norm 2C; F's output C), the peak is Eq. 20 of arXiv 2512.24880, `n*C*ceil(L/Lr) + (n+2)*C*Lr`, and a constant: its
optimum is at `Lr = sqrt(n*L/(n+2))`. Our kernels keep less: the norm of h lies inside them. Where the boundary into a
block is one kernel, all its results are kept (`begin = state + made`), so that nothing of it is computed otherwise than
without recomputation and gradients are equal bit by bit; the optimum is then at `sqrt(L)`.

Time is traffic: the stream part is bound by memory, so recomputation takes the time of moving its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import sympy
from sympy import Expr

from mhc_compile.diagnostics import MHCError

_UNITS = {"B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("kMGT")}}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
Mode = Literal["off", "auto", "stage"]


@dataclass(frozen=True)
class SiteCost:
    """Bytes of one site, for all tokens of the graph: integers, or expressions in its sizes."""

    state: Expr
    """The streams after the previous site (the streams' start for the first): kept at the beginning of a block."""
    made: Expr
    """What else the site keeps of the stream part, all of which can be recomputed: h or its norm, coefficients, and
    streams that are changed between two sites (a norm of each stream, a memory)."""
    branch: Expr
    """F's output, which is never recomputed."""
    parameters: Expr = sympy.S.Zero
    """Bytes read to recompute the site besides: phi, whatever the number of tokens; in a depth form the earlier
    outputs."""
    joined: bool = False
    """Whether one kernel computes the streams and the site: at the beginning of a block all its results are kept."""
    alone: bool = False
    """Whether the site is recomputed from what is kept anyway, so that no other is recomputed for it: of a depth form,
    the earlier outputs."""

    @property
    def begin(self) -> Expr:
        """Kept where the site begins a block, besides F's output."""
        return self.state + self.made if self.joined else self.state

    @property
    def whole(self) -> Expr:
        """Kept without recomputation."""
        return self.state + self.made + self.branch

    @property
    def first(self) -> Expr:
        """Moved to recompute a block's first site: the streams read, the rest written; nothing where it is kept."""
        return sympy.S.Zero if self.joined else self.state + self.made + self.parameters

    @property
    def again(self) -> Expr:
        """Moved to recompute any other site: the streams and the previous branch read, streams and the rest written."""
        return self.first if self.alone else 2 * self.state + self.branch + self.made + self.parameters


# --- the sites of a graph: whole numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Blocks for the sites of a graph, and what they cost. Bytes."""

    runs: tuple[tuple[SiteCost, ...], ...]
    """Sites in order, one run for every piece of a stream whose sites may share blocks."""
    block: int
    """Sites per block; the last of a run may have fewer."""
    rest: int = 0
    """The number of sites at the end of the graph that keep everything: the backward pass finishes them first."""

    @property
    def count(self) -> int:
        """All sites."""
        return sum(map(len, self.runs))

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of sites of the blocks of every run; those of the `rest` are in none."""
        left, sizes = self.count - self.rest, []
        for run in self.runs:
            sites = min(max(0, left), len(run))
            sizes.append(tuple(min(self.block, sites - i) for i in range(0, sites, self.block)))
            left -= len(run)
        return tuple(sizes)

    @cached_property
    def blocks(self) -> tuple[tuple[SiteCost, ...], ...]:
        """The sites of every block."""
        blocks = []
        for run, sizes in zip(self.runs, self.sizes, strict=True):
            blocks += [run[i : i + size] for i, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]
        return tuple(blocks)

    @cached_property
    def whole(self) -> int:
        """Kept without recomputation."""
        return int(sum(site.whole for run in self.runs for site in run))

    @cached_property
    def kept(self) -> int:
        """Kept for the backward pass."""
        return self._kept_by_blocks + self._kept_by_rest

    @cached_property
    def transient(self) -> int:
        """The most that one block recomputes."""
        recomputed = (sum(s.made + s.state for s in block) - block[0].begin for block in self.blocks)
        return int(max(recomputed, default=0))

    @property
    def peak(self) -> int:
        """The most that the stream part holds at a time; the last sites are finished before a block is recomputed."""
        return max(self.kept, self.held_by_blocks)

    @property
    def held_by_blocks(self) -> int:
        """What the sites in blocks hold while the largest of them is recomputed."""
        return self._kept_by_blocks + self.transient

    @cached_property
    def extra(self) -> int:
        """Bytes moved more than without recomputation."""
        return int(sum(block[0].first + sum(s.again for s in block[1:]) for block in self.blocks))

    @cached_property
    def _kept_by_blocks(self) -> int:
        return int(sum(sum(s.branch for s in block) + block[0].begin for block in self.blocks))

    @cached_property
    def _kept_by_rest(self) -> int:
        return int(sum(s.whole for run, n in zip(self.runs, map(sum, self.sizes), strict=True) for s in run[n:]))


def optimal_block(runs: Sequence[Sequence[SiteCost]], budget: int | None = None) -> Plan:
    """Return the blocks with the smallest peak; under a `budget` in bytes those that fit and take the least time.

    The costs must be whole numbers. Raises MHC626, with the smallest possible peak, where nothing fits.
    """
    costs = tuple(tuple(run) for run in runs)
    longest = max(map(len, costs), default=0)
    plans = [Plan(costs, block) for block in range(1, longest + 1)] or [Plan(costs, 1)]
    smallest = min(plans, key=lambda p: (p.peak, p.extra))
    if budget is None:
        return smallest
    if smallest.whole <= budget:
        return Plan(costs, 1, rest=smallest.count)
    # The more sites keep everything, the less is recomputed.
    tried = [Plan(costs, plan.block, _last(plan, lambda p: p.kept <= budget)) for plan in plans]
    if fitting := [plan for plan in tried if plan.peak <= budget]:
        return min(fitting, key=lambda p: (p.extra, p.peak))
    least = bytes_text(min(_least(plan) for plan in plans))
    raise MHCError("MHC626", f"{bytes_text(budget)} for {smallest.count} sites; the least possible is {least}")


def choose_blocks(runs: tuple[tuple[SiteCost, ...], ...], blocks: str | int) -> Plan:
    """Return the blocks that the option `recompute` asks for. Raises MHC204, and MHC626 for bytes that nothing fits."""
    mode, number = parse_blocks(blocks)
    if mode == "off":
        return Plan(runs, 1, rest=sum(map(len, runs)))
    if mode == "stage":
        return Plan(runs, max(map(len, runs), default=1))
    if mode == "sites":
        assert number is not None
        return Plan(runs, number)
    return optimal_block(runs, number)


def _least(plan: Plan) -> int:
    """Return the smallest peak with this block size and any number of sites that keep everything."""
    # What is kept grows with that number, and what is held while a block is recomputed shrinks.
    rest = _last(plan, lambda p: p.kept <= p.held_by_blocks)
    return min(Plan(plan.runs, plan.block, r).peak for r in (rest, min(rest + 1, plan.count)))


def _last(plan: Plan, holds: Callable[[Plan], bool]) -> int:
    """Return the largest number of sites that keep everything up to which `holds`."""
    low, high = 0, plan.count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(Plan(plan.runs, plan.block, middle)) else (low, middle - 1)
    return low


# --- the option -----------------------------------------------------------------------------------------------------


def parse_blocks(blocks: str | int) -> tuple[Mode, int | None] | tuple[Literal["sites", "bytes"], int]:
    """Parse the option `recompute`: ("off" | "auto" | "stage", None), ("sites", n) or ("bytes", n).

    Raises MHC204 for anything else.
    """
    if blocks in ("off", "auto", "stage"):
        return blocks, None  # type: ignore[return-value]
    if isinstance(blocks, int) and not isinstance(blocks, bool) and blocks >= 1:
        return "sites", blocks
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?i?B)", blocks) if isinstance(blocks, str) else None
    if size is not None and size[2] in _UNITS:
        return "bytes", int(float(size[1]) * _UNITS[size[2]])
    raise MHCError("MHC204", f"recompute={blocks!r}; known: off, auto, stage, sites a block (6), bytes ('2GiB')")


def bytes_text(size: int) -> str:
    """Return bytes as text for a reader."""
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if size >= _UNITS[u]), "B")
    return f"{size / _UNITS[unit]:.4g} {unit}"
