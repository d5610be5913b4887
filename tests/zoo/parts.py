"""What the hand-written models of `plain*.py` are made of, and the table that they enter themselves into."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, VOCAB, LENGTH, BATCH, HEADS, DEPTH = 8, 13, 4, 2, 2, 3


@dataclass(frozen=True)
class Plain:
    """One model and what must come of its conversion."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    adds: int
    """Residual adds that become sites."""
    code: str
    """The error that refuses the model or the warning that reports it; empty where it converts with all its adds."""
    warns: bool
    """Whether `code` is a warning: the model converts and computes what it did."""
    streams: int
    """Streams that begin and end on their own: an encoder and a decoder, stages of different sizes."""


TABLE: dict[str, Plain] = {}


def plain(
    adds: int = 0,
    code: str = "",
    *,
    inputs: Callable[[], tuple[Tensor, ...]] | None = None,
    warns: bool = False,
    streams: int = 1,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a model class, made without arguments, into the table."""

    def enter(model: type[nn.Module]) -> type[nn.Module]:
        assert model.__name__ not in TABLE
        TABLE[model.__name__] = Plain(model, inputs or tokens, adds, code, warns, streams)
        return model

    return enter


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)),)


def features() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)),)


def image() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def pairs() -> tuple[Tensor, ...]:
    return (*tokens(), torch.randint(VOCAB, (BATCH, 3), generator=torch.Generator().manual_seed(1)))


class Attention(nn.Module):
    """Attention of `x` to `memory` (itself, if there is none)."""

    def __init__(self, width: int = WIDTH, causal: bool = False) -> None:
        super().__init__()
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.causal = causal

    def forward(self, x: Tensor, memory: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.key_value(memory).chunk(2, -1))
        if value is not None:
            v = v + value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    """A feed-forward network."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Normed(nn.Sequential):
    """A branch behind its norm."""

    def __init__(self, branch: nn.Module, width: int = WIDTH) -> None:
        super().__init__(nn.LayerNorm(width), branch)


class Language(nn.Module):
    """An embedding, `layers` that subclasses run, a norm and a head."""

    def __init__(self, layer: Callable[[], nn.Module] | None = None, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList((layer or Layer)() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm; `add` says how they join the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Normed(Attention()), Normed(Feed())
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attention(x))
        return self.add(x, self.feed(x))
