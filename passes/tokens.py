"""Find the token ids of a stream: the indices of the embedding that it begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.passes.base import is_tensor, op_name, refuse, shape, value
from mhc_compile.passes.dataflow import EMBEDDINGS
from mhc_compile.passes.graphs import ancestors, reachable
from mhc_compile.passes.ownership import is_owned


@dataclass(frozen=True)
class Embedding:
    """An embedding of what a caller passes in."""

    node: Node
    """[B, S, C]."""
    ids: Node
    """[B, S]."""
    rows: int
    """Of its table."""


def token_ids(entry: Node, vocab: int, told: Node | None = None) -> Node:
    """Return the ids [B, S] of `token_embedding`."""
    return token_embedding(entry, vocab, told).ids


def token_embedding(entry: Node, vocab: int | None = None, told: Node | None = None) -> Embedding:
    """Return the embedding that becomes the stream at `entry`: of several, the one whose table fits `vocab` best.

    Without `vocab` it is the largest. Embeddings of `told`, which the caller says are the ids, go before others. Raises
    MHC225 where there are none.
    """
    embeddings = _embeddings(entry)
    rows = max(e.rows for e in embeddings) if vocab is None else vocab
    others = {e.node for e in embeddings if told is None or not reaches(told, e.ids)}
    return min(embeddings, key=lambda e: (e.node in others, abs(e.rows - rows), e.ids, e.node))


def reaches(node: Node, goal: Node | Callable[..., Any]) -> bool:
    """Return whether `goal`, or a call of it, is computed from `node`."""
    return any(n is goal or n.target is goal for n in reachable([node], lambda n: n.users))


def embedded(entry: Node) -> dict[Node, int]:
    """Return the ids [B, S] of every embedding of a caller's tensor on the way to `entry`, with the table's rows.

    Raises MHC225 where there are none.
    """
    return {e.ids: e.rows for e in reversed(_embeddings(entry))}


def _embeddings(entry: Node) -> list[Embedding]:
    embeddings: list[Embedding] = []
    above = reachable([entry], lambda n: [m for m in n.all_input_nodes if m.op != "placeholder" or not is_owned(m)])
    for node in sorted(above, reverse=True):
        ids = _ids(node)
        if ids is not None and shape(ids[0]) == shape(entry)[:-1] and len(shape(entry)) == len(shape(node)) == 3:
            embeddings.append(Embedding(node, *ids))
    if not embeddings:
        detail = f"{entry.name} {list(shape(entry))} is made from no embedding of ids [batch, sequence] passed in"
        raise refuse("MHC225", detail, entry)
    return embeddings


def _ids(node: Node) -> tuple[Node, int] | None:
    """Return the indices and the number of rows, where `node` embeds what a caller passes in."""
    if op_name(node) not in EMBEDDINGS:
        return None
    tensors = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and is_tensor(a)]
    ids = next((a for a in tensors if not value(a).is_floating_point()), None)
    table = next((a for a in tensors if value(a).is_floating_point()), None)
    if ids is None or table is None or value(ids).dtype == torch.bool or not _passed_in(ids):
        return None
    return ids, int(value(table).shape[0])


def _passed_in(ids: Node) -> bool:
    """Return whether a caller's tensor reaches `ids`."""
    return any(n.op == "placeholder" and not is_owned(n) and is_tensor(n) for n in ancestors([ids]))
