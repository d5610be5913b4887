"""Find the nodes that a depth form computes at each site, and the earlier outputs that it reads.

To a site belong the reads of earlier outputs, what they are split into, and the branch's entry norms. All of it can be
recomputed from the outputs, which are kept for the backward pass as they are: later sites read them, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Graph, Node

from mhc_compile.kernels.forms import READS
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.passes.base import op_name, shape, value
from mhc_compile.passes.cost import SiteCost
from mhc_compile.passes.dialect_sites import size_of
from mhc_compile.passes.graphs import VIEWS, reachable
from mhc_compile.passes.norms import BranchNorm, match_norm
from mhc_compile.passes.stages import SITE


@dataclass
class DepthSite:
    """One site of a depth form in a dialect graph."""

    reads: list[Node]
    """Its calls of the form's op, in order: one, or one for each value of the stream that it reads."""
    sources: list[Node]
    """The earlier outputs that they read, in order."""
    output: Node | None = None
    """The first output that a later read has and no earlier one: this site's."""
    begins: bool = False
    """Whether the site is the first to read its oldest output: the list begins there."""
    norms: list[BranchNorm] = field(default_factory=list)
    """The entry norms of the branch."""
    stream: list[Node] = field(default_factory=list)
    """Nodes that can be recomputed from `sources`, in order: the reads, views of them, the norms."""

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes that get the tags of the site."""
        yield from self.stream
        yield from self.sources

    def cost(self, *, fused: bool) -> SiteCost:
        """Return the bytes that the site keeps for the backward pass, in the sizes of the graph.

        `fused`: whether kernels compute the reads, whose further results are kept. Where none does, what the form's
        plain PyTorch keeps inside a read is not counted.
        """
        wide = (*self.reads, *(norm.out for norm in self.norms))
        kept = sum(map(size_of, wide), sympy.S.Zero)
        tokens = shape(self.sources[0])[:-1]
        for spec in map(kernel_of, self.reads if fused else ()):
            if spec is not None:
                kept += sum(sympy.prod(spec.shape(x, tokens)) * spec.dtype(x).itemsize for x in spec.outputs()[1:])
        state = size_of(self.sources[0]) if self.begins else sympy.S.Zero
        parameters = sum((size_of(p) for p in parameters_of(self.reads[0])), sympy.S.Zero)
        read = sum(map(size_of, self.sources), sympy.S.Zero) - state + parameters
        branch = sympy.S.Zero if self.output is None else size_of(self.output)
        return SiteCost(state, kept, branch, read, alone=True)


def parameters_of(read: Node) -> list[Node]:
    """Return the parameters of a read."""
    return [p for p in read.args[2:] if isinstance(p, Node)]


def sources_of(read: Node) -> list[Node]:
    """Return the outputs that a read is given."""
    outputs: Any = read.args[0]
    return list(outputs)


def kernel_of(read: Node) -> KernelSpec | None:
    """Return the fused kernel of a read; None where its form has none."""
    sources = sources_of(read)
    first = value(sources[0])
    return READS[read.target].kernel(sources=len(sources), width=int(first.shape[-1]), sources_dtype=first.dtype)


def depth_sites(graph: Graph) -> list[list[DepthSite]]:
    """Return the sites of depth forms, in runs whose lists of outputs have an output in common.

    Exits, which read as sites do, are none.
    """
    runs: list[list[DepthSite]] = []
    run_of: dict[Node, list[DepthSite]] = {}
    last: DepthSite | None = None
    for read in (n for n in graph.nodes if n.target in READS):
        sources = sources_of(read)
        run = next((run_of[source] for source in sources if source in run_of), None)
        if run is None:
            run = []
            runs.append(run)
        unseen = [source for source in sources if source not in run_of]
        run_of |= dict.fromkeys(sources, run)
        if run and unseen:
            run[-1].output = unseen[-1]
        if SITE in read.meta:
            last = DepthSite([read], sources, begins=sources[0] in unseen)
            run.append(last)
        elif last is not None and parameters_of(read) == parameters_of(last.reads[0]):  # the site reads several values
            last.reads.append(read)
            last.sources += [source for source in sources if source not in last.sources]
        else:
            last = None
    for site in (site for run in runs for site in run):
        parts = _views(site.reads)
        site.norms = [norm for part in sorted(parts) if (norm := _entry_norm(part)) is not None]
        site.stream = sorted({*parts, *(node for norm in site.norms for node in norm.nodes)})
    return [run for run in runs if run]


def _entry_norm(read: Node) -> BranchNorm | None:
    """Return the norm of what is read, to which the branch may be added, too."""
    return match_norm(read, [user for user in read.users if SITE in user.meta])


def _views(reads: Iterable[Node]) -> set[Node]:
    """Return the reads and all views of them."""

    def further(node: Node) -> list[Node]:
        return [u for u in node.users if op_name(u) in VIEWS and u.all_input_nodes == [node]]

    return reachable(reads, further)
