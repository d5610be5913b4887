"""When messages and collectives of several ranks end: what each rank posts and waits for, in its order, is replayed.

The model is NCCL's. Work is posted to a channel, in which it runs in the order of posting: one channel for every pair
of ranks whose messages are posted alone, one for every group's batches and collectives. A message is over on both sides
when both have come to it; nothing is buffered. Work that is posted after a wait begins after what was waited for.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

Peers = frozenset[int]


@dataclass(frozen=True)
class Message:
    """A send, or a receive."""

    sends: bool
    peer: int
    shape: tuple[int, ...]


@dataclass(eq=False)
class Post:
    """Messages of one batch, or one collective, on its way."""

    channel: Hashable
    """The ranks that it connects, and what else tells it from others."""
    messages: list[Message] = field(default_factory=list)
    collective: tuple[str, tuple[int, ...], Peers] | None = None
    """Its name, its shape and its ranks."""

    @property
    def over(self) -> bool:
        return not self.messages and self.collective is None


@dataclass
class Wait:
    """Go on when this is over."""

    post: Post


def meets(programs: dict[int, list[Post | Wait]]) -> bool:
    """Whether all ranks come to the end of their programs, and all that they have posted is over."""
    at = dict.fromkeys(programs, 0)
    queues: dict[int, dict[Hashable, list[Post]]] = {rank: {} for rank in programs}
    moved = True
    while moved:
        moved = False
        for rank, program in programs.items():
            while at[rank] < len(program):
                event = program[at[rank]]
                if isinstance(event, Post):
                    queues[rank].setdefault(event.channel, []).append(event)
                elif not event.post.over:
                    break
                at[rank] += 1
                moved = True
        for rank, channels in queues.items():
            for channel, queue in channels.items():
                while queue and queue[0].over:
                    queue.pop(0)
                if queue:
                    moved |= _advance(rank, channel, queues)
    ended = all(at[rank] == len(program) for rank, program in programs.items())
    return ended and all(post.over for channels in queues.values() for queue in channels.values() for post in queue)


def _advance(rank: int, channel: Hashable, queues: dict[int, dict[Hashable, list[Post]]]) -> bool:
    """End what this rank and others have come to, of the first in its queue."""

    def first(other: int) -> Post | None:
        queue = queues[other].get(channel, [])
        while queue and queue[0].over:
            queue.pop(0)
        return queue[0] if queue else None

    post = queues[rank][channel][0]
    if post.collective is not None:
        everyone = [first(other) for other in post.collective[2]]
        if not all(p is not None and p.collective is not None for p in everyone):
            return False
        assert {p.collective for p in everyone if p is not None} == {post.collective}, "collectives that do not fit"
        for p in everyone:
            assert p is not None
            p.collective = None
        return True
    moved = False
    for message in [m for m in post.messages if m.sends]:
        there = first(message.peer)
        partner = next((m for m in there.messages if not m.sends and m.peer == rank), None) if there else None
        if there is not None and partner is not None:
            assert partner.shape == message.shape, f"{message} meets {partner}"
            post.messages.remove(message)
            there.messages.remove(partner)
            moved = True
    return moved
