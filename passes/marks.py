"""What `mhc::mark` says of the tensors that it carries into a graph: frozen dataclasses, in the graph as JSON.

While Dynamo traces, an input is described by a tuple: the name of its class here, then the fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from mhc_compile.kernels.memory.memories import NONE, Memories

Role = Literal["ids", "mask", "positions"]
Part = Literal["ids", "reach", "gate", "value"]
Described = tuple[str | int | bool, ...]


@dataclass(frozen=True)
class Argument:
    """An argument of the owner's call: ids [B, S], mask [B, T >= S], positions [B or 1, S]."""

    role: Role


@dataclass(frozen=True)
class Unknown:
    """An argument that may be ids, a mask or positions, as far as the call tells."""

    argument: str


@dataclass(frozen=True)
class Compression:
    """The projection of ids [V]."""


@dataclass(frozen=True)
class Table:
    """The anchor of a table, which makes its look-ups differentiable."""

    of: str
    """What the table belongs to: the layer of a memory, `over-encoding`, or `ultra-mem`."""
    handle: int
    dtype: str
    """Of what look-ups give: `float32` or `bfloat16`."""
    early: bool
    """Whether look-ups begin as soon as their rows are known."""


@dataclass(frozen=True)
class Weight:
    """The rows of a table, for programs that run without this package."""

    of: str


@dataclass(frozen=True)
class State:
    """A tensor of the state that a cached call carries on.

    Of all memories (`of=""`) and of the over-encoding `ids` [B, N-1] and `reach` [B]; of a memory's layer `gate`
    [B, P, n] and `value` [B, P, C].
    """

    part: Part
    of: str = ""


@dataclass(frozen=True)
class ProbeSlot:
    """What a sampled step brings for gradients (`mhc_compile.passes.probe`)."""


Input = Argument | Unknown | Compression | Table | Weight | State | ProbeSlot
_CLASSES: dict[str, Callable[..., Input]] = {c.__name__: c for c in get_args(Input)}


def inputs_as_text(described: Iterable[Described]) -> str:
    """Return the JSON that a mark carries for described inputs; Dynamo traces this, which it cannot do with `json`."""
    return "[" + ", ".join(["[" + ", ".join([_literal(field) for field in one]) + "]" for one in described]) + "]"


def _literal(field: str | int | bool) -> str:
    if isinstance(field, str):
        return '"' + field.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(field, bool):
        return "true" if field else "false"
    return str(field)


def inputs_of(described: Iterable[Described]) -> list[Input]:
    """Return the inputs that the tuples describe."""
    return [_CLASSES[str(name)](*fields) for name, *fields in described]


def parse_inputs(text: str) -> list[Input]:
    """Return the inputs in the text of a mark."""
    return inputs_of(json.loads(text))


@dataclass(frozen=True)
class Signature:
    """What every mark of one owner carries beside tensors."""

    spec: str
    """The owner's `StreamSpec` as text."""
    names: tuple[str, ...]
    """Of the parameters, relative to the owner's `mhc` module."""
    sites: tuple[str, ...]
    """In the order of the stream, by which their parameters start."""
    memories: Memories = NONE
    """The owner's memories."""
    partial: tuple[frozenset[str], ...] = ()
    """The smaller sets of sites that the owner's graphs in one mode, training or evaluation, hold."""
    skipped: tuple[str, ...] = ()
    """Adds that could be sites and were not chosen: they stay residual."""

    def __str__(self) -> str:
        """Return the text that the mark carries, which `parse` reads."""
        fields = {
            "spec": self.spec,
            "names": self.names,
            "sites": self.sites,
            "memories": self.memories.plain(),
            "partial": [sorted(names) for names in self.partial],
            "skipped": self.skipped,
        }
        return json.dumps(fields)

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Return the signature in the text of a mark."""
        fields = json.loads(text)
        return cls(
            fields["spec"],
            tuple(fields["names"]),
            tuple(fields["sites"]),
            Memories.parse(fields["memories"]),
            tuple(frozenset(names) for names in fields["partial"]),
            tuple(fields["skipped"]),
        )
