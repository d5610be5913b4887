"""The cost model: the paper's equation as a special case; whole numbers against formulas and against all choices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy import Expr, ceiling, simplify, sqrt

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.cost import (
    Plan,
    SiteCost,
    bytes_text,
    optimal_block,
    parse_blocks,
)

n, C, L, Lr = sympy.symbols("n C L L_r", positive=True, integer=True)
sizes = st.integers(1, 50)
costs = st.builds(SiteCost, sizes, sizes, sizes, st.integers(0, 5), st.booleans())
runs = st.lists(st.lists(costs, min_size=1, max_size=5).map(tuple), min_size=1, max_size=2).map(tuple)

# --- the formulas for equal sites -------------------------------------------------------------------------------------


def paper(streams: Expr, width: Expr) -> SiteCost:
    """Elements a token as arXiv 2512.24880 counts them (Eq. 20): X; h and the branch norm; F's output."""
    return SiteCost(state=streams * width, made=2 * width, branch=width)


def kept(site: SiteCost, sites: Expr, block: Expr) -> Expr:
    """Bytes that `sites` equal sites keep for the backward pass in blocks of `block`."""
    return sites * site.branch + sympy.ceiling(sites / block) * site.begin


def transient(site: SiteCost, block: Expr) -> Expr:
    """Bytes that a block makes again."""
    return block * (site.state + site.made) - site.begin


def peak(site: SiteCost, sites: Expr, block: Expr) -> Expr:
    """Bytes at the beginning of the backward pass: all that is kept, and the last block."""
    return kept(site, sites, block) + transient(site, block)


def extra(site: SiteCost, sites: Expr, block: Expr) -> Expr:
    """Bytes moved more than without recomputation, where `block` divides `sites`."""
    blocks = sites / block
    return blocks * site.first + (sites - blocks) * site.again


def best_block(site: SiteCost, sites: Expr) -> Expr:
    """The block size at which the peak is smallest, were it no whole number: `sqrt(n*L/(n+2))` in the paper's count."""
    block = sympy.Symbol("L_r", positive=True)
    smooth = peak(site, sites, block).replace(sympy.ceiling, lambda x: x)
    slope = sympy.diff(smooth, block)
    return sympy.solve(slope, block)[0]


# --- arXiv 2512.24880, Eq. 20 -----------------------------------------------------------------------------------------


def test_the_peak_is_equation_20_and_what_no_block_size_changes() -> None:
    equation = n * C * ceiling(L / Lr) + (n + 2) * C * Lr
    apart = sympy.expand(peak(paper(n, C), L, Lr) - equation)
    # F's outputs, and the streams of a block's first site, which are kept and not made.
    assert apart == sympy.expand(L * C - n * C)
    assert Lr not in apart.free_symbols


def test_the_optimum_of_equation_20() -> None:
    assert simplify(best_block(paper(n, C), L) - sqrt(n * L / (n + 2))) == 0


def test_the_optimum_where_what_begins_a_block_is_kept() -> None:
    assert simplify(best_block(replace(paper(n, C), joined=True), L) - sqrt(L)) == 0


def test_48_sites_of_4_streams_as_the_paper_counts_them() -> None:
    site = paper(sympy.Integer(4), sympy.Integer(1))
    assert 48 * site.whole == 336
    plan = optimal_block([[site] * 48])
    assert plan.block == 6
    assert plan.kept + 6 * (site.state + site.made) == 116
    assert plan.peak == 116 - 4


# --- whole numbers against the formulas -------------------------------------------------------------------------------


@given(costs, st.integers(1, 6), st.integers(1, 8))
def test_equal_sites_follow_the_formulas(site: SiteCost, blocks: int, block: int) -> None:
    plan = Plan(((site,) * (blocks * block),), block)
    count, size = sympy.Integer(blocks * block), sympy.Integer(block)
    assert plan.whole == count * site.whole
    assert plan.kept == kept(site, count, size)
    assert plan.transient == transient(site, size)
    assert plan.peak == peak(site, count, size)
    assert plan.extra == extra(site, count, size)


@given(costs, st.integers(1, 30), st.integers(1, 30))
def test_the_last_block_of_a_run_may_be_shorter(site: SiteCost, count: int, block: int) -> None:
    plan = Plan(((site,) * count,), block)
    assert sum(plan.sizes[0]) == count
    assert len(plan.blocks) == -(-count // block)
    assert plan.kept == kept(site, sympy.Integer(count), sympy.Integer(block))


@given(runs)
def test_no_block_size_has_a_smaller_peak(found: tuple[tuple[SiteCost, ...], ...]) -> None:
    best = optimal_block(found)
    assert best.rest == 0
    assert all(best.peak <= Plan(found, b).peak for b in range(1, max(map(len, found)) + 1))


@given(runs, st.data())
def test_a_budget_is_kept_at_the_least_time(found: tuple[tuple[SiteCost, ...], ...], data: st.DataObject) -> None:
    count = sum(map(len, found))
    every = [Plan(found, b, rest) for b, rest in itertools.product(range(1, 6), range(count + 1))]
    least = min(p.peak for p in every)
    budget = data.draw(st.integers(least, Plan(found, 1).whole + 1))
    plan = optimal_block(found, budget)
    assert plan.peak <= budget
    assert plan.extra == min(p.extra for p in every if p.peak <= budget)


@given(runs)
def test_what_cannot_fit_is_refused_with_the_least_possible(found: tuple[tuple[SiteCost, ...], ...]) -> None:
    count = sum(map(len, found))
    every = [Plan(found, b, rest) for b, rest in itertools.product(range(1, 6), range(count + 1))]
    least = min(p.peak for p in every)
    with pytest.raises(MHCError, match=rf"MHC626 .*the least possible is {bytes_text(least)}\n"):
        optimal_block(found, least - 1)


def test_a_budget_for_all_computes_nothing_again() -> None:
    found = [[SiteCost(4, 2, 1)] * 3]  # type: ignore[arg-type]
    plan = optimal_block(found, 21)
    assert (plan.kept, plan.transient, plan.extra, plan.rest) == (21, 0, 0, 3)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [2, 4])
def test_what_is_moved_is_what_the_kernels_move(streams: int) -> None:
    tokens, width = 4096, 1024
    spec = StreamSpec(streams=streams)
    chains = {kind: Chain(kind=kind, stream=spec, width=width) for kind in ("read", "boundary")}  # type: ignore[arg-type]

    def held(name: str) -> int:
        count = 1
        for size in chains["boundary"].shape(name, (tokens,)):
            count *= size
        return 4 * count

    made = sum(held(name) for name in chains["boundary"].outputs() if name != "next_X")
    site = SiteCost(held("X"), made, held("y"), 4 * spec.rows * streams * width)  # type: ignore[arg-type]
    assert site.again == pytest.approx(chains["boundary"].bytes_moved(tokens), rel=0.01)
    assert site.first == pytest.approx(chains["read"].bytes_moved(tokens), rel=0.01)


def test_what_sites_alone_move_does_not_depend_on_their_blocks() -> None:
    site = SiteCost(0, 3, 2, 7, alone=True)  # type: ignore[arg-type]
    plans = [Plan(((site,) * 4,), block) for block in (1, 2, 4)]
    assert [plan.extra for plan in plans] == [4 * 10] * 3
    assert [plan.kept for plan in plans] == [4 * 2] * 3
    assert [plan.transient for plan in plans] == [3, 6, 12]
    assert optimal_block([[site] * 4]).block == 1


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("off", ("off", None)), ("auto", ("auto", None)), ("stage", ("stage", None)), (6, ("sites", 6)),
        ("2GiB", ("bytes", 2 << 30)), ("1.5 MiB", ("bytes", 3 << 19)), ("64kB", ("bytes", 64000)), ("9B", ("bytes", 9)),
    ],
)  # fmt: skip
def test_what_may_be_asked_for(text: str | int, means: tuple[str, int | None]) -> None:
    assert parse_blocks(text) == means


@pytest.mark.parametrize("text", ["", "on", "6", 0, -1, True, 1.5, None, "2 gigabytes", "GiB", "1kiB", "-1MiB"])
def test_what_may_not(text: object) -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*known: off, auto, stage"):
        parse_blocks(text)  # type: ignore[arg-type]


def test_bytes_for_a_reader() -> None:
    assert [bytes_text(b) for b in (12, 1536, 3 << 20, 5 << 31)] == ["12 B", "1.5 KiB", "3 MiB", "10 GiB"]
