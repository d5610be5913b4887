"""Choose which residual adds become sites: by patterns of their names, or by a function."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.match_marks import full_name
from mhc_compile.passes.results import ENDS, Coverage, ResidualStream


def skipped_sites(root: nn.Module, sites: Mapping[str, Iterable[str]], options: Options) -> dict[str, tuple[str, ...]]:
    """Return by owner the names in `sites` that `options.sites` and `options.filter_fn` do not choose.

    Raises MHC204 for a pattern that names no site, and where nothing is chosen.
    """
    names = {(owner, site): full_name(owner, site) for owner, of_owner in sites.items() for site in of_owner}
    patterns = [pattern.strip() for pattern in options.sites.split(",") if pattern.strip()]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names.values()):
            known = [*names.values(), *(name.partition("#")[0] for name in names.values())]
            close = get_close_matches(pattern, known, n=1) or list(names.values())[:1]
            raise MHCError(
                "MHC204", f"sites={pattern!r} names no site", way_out=f"the sites have names like {close[0]!r}"
            )

    def is_chosen(name: str) -> bool:
        if patterns and not any(_matches(name, pattern) for pattern in patterns):
            return False
        return options.filter_fn is None or options.filter_fn(root.get_submodule(name.partition("#")[0]), name)

    chosen = {key for key, name in names.items() if is_chosen(name)}
    if not chosen:
        raise MHCError("MHC204", f"none of {len(names)} sites is chosen", way_out="leave sites= and filter_fn= out")
    return {owner: tuple(site for site in of_owner if (owner, site) not in chosen) for owner, of_owner in sites.items()}


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern is that of a site's name, of its module's path, or of a module around that."""
    path = name.partition("#")[0]
    parts = path.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(text, pattern) for text in (name, *around))


def chosen_coverage(
    coverage: Coverage, streams: Sequence[ResidualStream], skipped: Mapping[str, Collection[str]]
) -> Coverage:
    """Return what `coverage` becomes when the sites named in `skipped`, by owner, stay residual adds."""
    if not any(skipped.values()):
        return coverage
    # The owner of a stream in this call may be a module inside the converted one.
    names = {full_name(owner, site) for owner, of_owner in skipped.items() for site in of_owner}
    parts = [
        part
        for stream in streams
        for part in stream.without([s.name for s in stream.sites if full_name(stream.owner, s.name) in names])
    ]
    sites = sum(len(part.sites) for part in parts)
    return replace(
        coverage,
        sites=sites,
        skipped=coverage.sites - sites,
        short=all(len(part.sites) <= ENDS for part in parts),
        alone=0,
    )
