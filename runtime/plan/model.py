"""A recipe's model, captured and counted: what a plan needs of it, for any number of stages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch

from mhc_compile.checkpoint.manifest import is_converted
from mhc_compile.checkpoint.tables import TOKENIZER
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.forms import StreamForm, form_of
from mhc_compile.kernels.memory.ultramem_settings import TABLE as ULTRAMEM_TABLE
from mhc_compile.kernels.memory.ultramem_settings import last_sites
from mhc_compile.memory.parameters import tables
from mhc_compile.parameters import owners
from mhc_compile.passes.base import value
from mhc_compile.passes.cost import Plan, choose_blocks
from mhc_compile.passes.stages import balanced, site_nodes
from mhc_compile.runtime.balance import site_costs
from mhc_compile.runtime.engine import capture
from mhc_compile.runtime.plan.repeats import Repeats, leave_out
from mhc_compile.runtime.plan.work import SiteWork, crossing_bytes, kinds, parameters_of_sites, site_works
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.recipe import Recipe


@dataclass(frozen=True)
class Table:
    """The table of a memory."""

    name: str
    sites: tuple[int, ...]
    """Those in which its rows are read; every stage with one of them holds it."""
    rows: int
    width: int
    reads: int
    """Rows that a token reads in each of them."""

    def look_ups(self, sites: tuple[int, int]) -> int:
        """Return how many of the sites from the first of `sites` to before the second read rows."""
        return sum(sites[0] <= site < sites[1] for site in self.sites)


@dataclass(frozen=True)
class Counted:
    """A captured model, without weights."""

    program: Program
    """Of a long run of equal layers it has a few (`runtime.plan.repeats`); all else here is of the whole model."""
    works: list[SiteWork]
    names: list[set[str]]
    """The parameters that each site's part of the graph reads."""
    sizes: Mapping[str, int]
    """Values of every parameter."""
    cast: frozenset[str]
    """Parameters that the graph takes in another dtype than float32, in which they are kept."""
    tables: tuple[Table, ...]
    tokens: int
    """Of a microbatch."""
    length: int
    """S, tokens a sequence."""
    streams: int
    """n."""
    hidden: int
    """C."""
    itemsize: int
    """Bytes of one value of a stream."""
    costs: list[float]
    """What `parallel.balance = "model"` weighs sites by, as a run on accelerators does."""
    crossing: list[int]
    """Bytes of one microbatch that cross a cut before each site but the first."""

    @cached_property
    def starts(self) -> Callable[[int], tuple[int, ...]]:
        """The first site of every stage but the first, of so many balanced ones. Raises MHC620."""
        return cache(lambda stages: tuple(balanced(self.costs, stages)))

    @cached_property
    def blocks(self) -> Callable[[int, int, str | int], Plan]:
        """The recompute blocks of a stage from one site to another, as the pass `recompute` chooses them. MHC626."""
        return cache(self._blocks)

    def _blocks(self, begin: int, end: int, blocks: str | int) -> Plan:
        first, *others = self.works[begin:end]
        return choose_blocks(((first.streams, *(w.joined for w in others)),), blocks)

    @property
    def logits(self) -> tuple[int, int]:
        """How many logits a microbatch has, and their bytes."""
        logits = value(self.program.graph.graph.output_node().all_input_nodes[0])
        return logits.numel(), logits.nbytes

    @property
    def parameters(self) -> int:
        """Values of all parameters, rows of tables not counted."""
        return sum(self.sizes.values())


def count(recipe: Recipe, *, whole: bool = False) -> Counted:
    """Capture the recipe's model on one microbatch and count it; of a residual folder only config.json is read.

    Of a long run of equal layers a few are captured; with `whole`, or with memories, all. Without a tokenizer in the
    folder, a memory takes ids as they are; its tables have the same sizes. Raises what `hollow_model` and
    `capture_program` raise.
    """
    folder = Path(recipe.model.folder)
    if not is_converted(folder):
        recipe = replace(recipe, model=replace(recipe.model, start="scratch"))
    if recipe.memory is not None and not (folder / TOKENIZER).is_file():
        recipe = replace(recipe, memory=replace(recipe.memory, compress=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Dynamo says of transformers' own caches
        shortened: list[Repeats | None] = []
        whole = whole or recipe.memory is not None or recipe.ultramem is not None
        shorten = None if whole else lambda model: shortened.append(leave_out(model))
        program = capture(recipe, torch.device("cpu"), shorten)
    for parameters in owners(program.model).values():
        if not isinstance(form_of(parameters.spec), StreamForm):
            detail = f"a plan counts n streams, which form={parameters.spec.form!r} does not have"
            raise MHCError("MHC602", detail, way_out="measure it: mhc-compile plan --measure, or train a few steps")
    repeats, numbers = next(iter(shortened), None), kinds(program)
    captured = [str(n.meta["mhc_site"]) for n in site_nodes(program.graph.graph)]
    if repeats is not None and not repeats.holds(captured, numbers):
        return count(recipe, whole=True)
    works = site_works(program, numbers)
    rows = {f"{path}.{name}" for path, t in tables(program.model) for name, _ in t.named_parameters()}
    sizes = {name: p.numel() for name, p in program.parameters.items() if name not in rows}
    names = [names & sizes.keys() for names in parameters_of_sites(program)]
    cast = {name for name, p in program.parameters.items() if p.is_floating_point() and p.dtype != torch.float32}
    costs, crossing = site_costs(program, accelerated=True), [0, *crossing_bytes(program, range(1, len(works)))]
    if repeats is not None:
        order = list(repeats.order(captured))
        works = [
            replace(works[i], name=repeats.renamed(works[i].name, k) if k >= 0 else works[i].name) for i, k in order
        ]
        names = [{repeats.renamed(n, k) for n in names[i]} if k >= 0 else names[i] for i, k in order]
        costs, crossing = [costs[i] for i, _ in order], [crossing[i] for i, _ in order]
        sizes, cast = repeats.expanded(sizes), set(repeats.expanded(dict.fromkeys(cast)))
    streams = value(site_nodes(program.graph.graph)[0].args[0])  # type: ignore[arg-type]
    *batch, length, n, hidden = streams.shape
    return Counted(
        program, works, names, sizes, frozenset(cast), _tables(program, works),
        tokens=math.prod(batch) * length, length=length, streams=n, hidden=hidden, itemsize=streams.dtype.itemsize,
        costs=costs, crossing=crossing[1:],
    )  # fmt: skip


def _tables(program: Program, works: list[SiteWork]) -> tuple[Table, ...]:
    """Return the tables with the sites before which memories are added, or whose branch has values added to it."""
    made = []
    numbers = {w.name: i for i, w in enumerate(works)}
    last = last_sites(list(numbers))
    for owner, parameters in owners(program.model).items():
        m = parameters.memories
        read_at: dict[str, tuple[int, ...]] = {}
        read_at |= {layer.layer: (numbers[layer.site],) for layer in (m.engram.layers if m.engram else ())}
        if m.ultramem is not None:
            read_at[ULTRAMEM_TABLE] = tuple(numbers[last[later]] for _, later in m.ultramem.layers)
        for name, spec in m.tables.items():
            sites = read_at.get(name, (0,))
            table = Table(f"{owner}.{name}".strip("."), sites, spec.rows, spec.width, spec.reads // len(sites))
            made.append(table)
    return tuple(made)
