"""Match the streams of a graph with the parameters that converted owners brought into it, by site name."""

from __future__ import annotations

from dataclasses import replace

from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.attention import written
from mhc_compile.passes.base import Mark, refuse
from mhc_compile.passes.results import ResidualStream


def pair_with_marks(streams: list[ResidualStream], marks: list[Mark]) -> list[tuple[ResidualStream, Mark]]:
    """Return each stream of a converted owner with its mark, its sites named relative to that owner.

    Streams of modules that are not converted stay residual, and so do the adds that a mark skips. Raises MHC206 where
    the sites found and the parameters held differ, showing both lists; a graph may hold a smaller set that is the
    owner's in one mode.
    """
    marked = [(stream, mark) for stream in streams if (mark := _mark_for(stream, marks)) is not None]
    pairs = [(part, mark) for stream, mark in marked for part in _parts(_named_below(stream, mark), mark)]
    for mark in marks:
        expected = set(sites_of(mark))
        calls = [s for s, m in pairs if m is mark]
        present = {site.name for s in calls for site in written(s, mark.spec)} - {*mark.skipped}
        if present != expected and present not in mark.partial:
            raise refuse(
                "MHC206",
                f"sites without parameters: {sorted(present - expected)}; "
                f"parameters without a site: {sorted(expected - present)}; "
                f"found in the graph: {sorted(present)}; held by the model: {sorted(expected)}",
                calls[0].exit if calls else None,
            )
    return pairs


def sites_of(mark: Mark) -> list[str]:
    """Return the names of the sites that a mark has parameters for, in order."""
    named = dict.fromkeys(name.rpartition(".")[0] for name in mark.parameters if "#" in name)
    return [*(mark.sites or named)]


def _parts(stream: ResidualStream, mark: Mark) -> list[ResidualStream]:
    # Where attentions share values, the first one of the whole stream gives them; the sums are the model's own.
    shares_values = form_of(StreamSpec.parse(mark.spec)).later_attentions
    return [stream] if shares_values else stream.without(mark.skipped)


def full_name(owner: str, site: str) -> str:
    """Return the name of an owner's site from the module around it: `model.layers.3#0` of `model` and `layers.3#0`."""
    return f"{owner}.{site}".replace(".#", "#").strip(".")


def _mark_for(stream: ResidualStream, marks: list[Mark]) -> Mark | None:
    owner = stream.owner
    around = [m for m in marks if not m.owner or f"{owner}.".startswith(f"{m.owner}.")]
    if not around:
        return None
    depth = max(len(m.owner) for m in around)
    # An owner called several times is marked at each call: ours is the last one before the stream.
    order = {n: i for i, n in enumerate(stream.exit.graph.nodes)}
    calls = [m for m in around if len(m.owner) == depth]
    before = [m for m in calls if m.node is None or order[m.node] <= order[stream.sites[0].add]]
    return (before or calls)[-1]


def _named_below(stream: ResidualStream, mark: Mark) -> ResidualStream:
    below = stream.owner.removeprefix(mark.owner).strip(".")
    names = (full_name(below, site.name) for site in stream.sites)
    return replace(stream, sites=tuple(replace(s, name=n) for s, n in zip(stream.sites, names, strict=True)))
