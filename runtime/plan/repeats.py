"""Layers that repeat: a plan captures a few of them, and counts the others as it counts those.

Capturing takes most of a plan's time, and takes it for every layer. Layers are equal where their modules are, by class,
shapes and plain attributes, but for numbers that are their places; what was captured must agree (`Repeats.holds`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
LEADING = 3
"""Layers of a run that are captured before the last one: the second and the third must give equal sites."""


@dataclass(frozen=True)
class Repeats:
    """A run of equal layers of a model, most of which `leave_out` has taken out."""

    path: str
    """Of their list in the model."""
    places: tuple[int, ...]
    """Of those that are left, in order."""
    left_out: tuple[int, ...]

    @property
    def template(self) -> int:
        """The place of the layer that stands for those left out."""
        return self.left_out[0] - 1

    def layer(self, name: str) -> int | None:
        """Return the place of the layer in whose path the name of a site or parameter lies."""
        match = re.search(rf"(?:^|\.){re.escape(self.path.rpartition('.')[2])}\.(\d+)(?=[.#])", name)
        return int(match[1]) if match else None

    def holds(self, sites: Sequence[str], kinds: Sequence[int]) -> bool:
        """Return whether the template's sites are of the same kinds as those of the layer before it, at least one."""
        one, other = (
            [kind for name, kind in zip(sites, kinds, strict=True) if self.layer(name) == place]
            for place in (self.template - 1, self.template)
        )
        return bool(other) and one == other

    def renamed(self, name: str, place: int) -> str:
        """Return `name` with the template's place replaced by `place`."""
        own = re.escape(self.path.rpartition(".")[2])
        return re.sub(rf"((?:^|\.){own}\.){self.template}(?=[.#])", rf"\g<1>{place}", name)

    def order(self, sites: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield, for every site of the whole model in order, the one captured and the place of its layer, or -1."""
        own = [i for i, name in enumerate(sites) if self.layer(name) == self.template]
        for i in range(len(sites)):
            yield i, -1
            if own and i == own[-1]:
                yield from ((k, place) for place in self.left_out for k in own)

    def expanded(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return values by the names of parameters with those of the layers left out."""
        own = {name: v for name, v in values.items() if self.layer(name) == self.template}
        return {**values, **{self.renamed(n, place): v for place in self.left_out for n, v in own.items()}}


def leave_out(model: nn.Module) -> Repeats | None:
    """Take most layers of the model's longest run of equal ones out, in place; None where there is no long run."""
    lists = [  # lists in layers are none of layers
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+(\.|$)", path)
    ]
    runs = [(end - begin, path, begin, end) for path, layers in lists for begin, end in _runs(layers)]
    length, path, begin, end = max(runs, default=(0, "", 0, 0))
    names = [other.rpartition(".")[2] for other, _ in lists]  # by which `Repeats.layer` knows the list
    if length <= LEADING + 2 or names.count(path.rpartition(".")[2]) > 1:
        return None
    layers = model.get_submodule(path)
    left_out = tuple(range(begin + LEADING, end - 1))
    places = tuple(i for i in range(len(layers._modules)) if i not in left_out)
    if not _listed_alike(getattr(model, "config", None), len(layers._modules), places, left_out):
        return None
    layers._modules = {str(i): layers._modules[str(i)] for i in places}  # under the names that they have
    return Repeats(path, places, left_out)


def _listed_alike(config: Any, count: int, places: Sequence[int], left_out: Sequence[int]) -> bool:
    """Return whether lists of the configuration, one value a layer, give every layer what it is given without others.

    A model may read them by the number of the layer among those that are there.
    """
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == count] if config else []
    return all(
        all(v[i] == v[left_out[0]] for i in left_out) and all(v[at] == v[i] for at, i in enumerate(places))
        for v in lists
    )


def _runs(layers: Sequence[nn.Module]) -> Iterator[tuple[int, int]]:
    """Yield where runs of equal layers begin and end."""
    bounds = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(layers)) if not _alike(a, i, b, i + 1)), len(layers)]
    yield from pairwise(bounds)


def _alike(a: nn.Module, i: int, b: nn.Module, k: int) -> bool:
    """Return whether the layers `a` and `b` at the places `i` and `k` are equal."""
    one, other = dict(a.named_modules()), dict(b.named_modules())
    return one.keys() == other.keys() and all(_equal(m, i, other[name], k) for name, m in one.items())


def _equal(a: nn.Module, i: int, b: nn.Module, k: int) -> bool:
    plain = bool, int, float, str, tuple, type(None)
    mine, others = ({n: v for n, v in vars(m).items() if isinstance(v, plain)} for m in (a, b))
    return (
        type(a) is type(b)
        and mine.keys() == others.keys()
        and all(v == others[n] or (v == i and others[n] == k) for n, v in mine.items())
        and _shapes(a) == _shapes(b)
    )


def _shapes(module: nn.Module) -> list[tuple[Any, ...]]:
    tensors = {**module._parameters, **module._buffers}
    return [(n, None if t is None else (t.shape, t.dtype, t.requires_grad)) for n, t in tensors.items()]
