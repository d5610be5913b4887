"""Small models whose source says the residual stream in one way each."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, DEPTH = 11, 8, 3


def ids() -> Tensor:
    return torch.arange(10).remainder(VOCAB).view(2, 5)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """Two branches, each behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.feed = Branch(), Branch()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.norms[0](x))  # the first branch
        return x + self.feed(self.norms[1](x))


class Model(nn.Module):
    """An embedding, layers, a norm and a head."""

    layer: type[nn.Module] = Layer

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


class DroppingLayer(Layer):
    """Drops what its branches add, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in zip(self.norms, (self.mixing, self.feed), strict=True):
            y = branch(norm(x))
            if self.training:
                y = F.dropout(y, 0.5)
            x = x + y
        return x


class OtherwiseTrainedLayer(Layer):
    """Has an add of its own in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.norms[0](x))
        if self.training:
            return x + F.dropout(self.feed(self.norms[1](x)), 0.1)
        return x + self.feed(self.norms[1](x))


class AveragingLayer(DroppingLayer):
    """Has a norm of the batch, whose averages training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2))


class Dropping(Model):
    layer = DroppingLayer


class Averaging(Model):
    layer = AveragingLayer


class OtherwiseTrained(Model):
    layer = OtherwiseTrainedLayer


class InPlaceLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.mixing(self.norms[0](x))
        return torch.add(x, self.feed(self.norms[1](x)), alpha=0.5)


class InPlace(Model):
    """`x += branch(x)` and `torch.add`."""

    layer = InPlaceLayer


class PostNormLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.mixing(x))
        return self.norms[1](x + self.feed(x))


class PostNorm(Model):
    """The norms are between the sites, and the last one behind them."""

    layer = PostNormLayer


class ScaledLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = 0.9 * x + self.mixing(self.norms[0](x))
        return self.feed(self.norms[1](x)) + x


class Scaled(Model):
    """The add carries another value than the branch reads."""

    layer = ScaledLayer


class ParallelLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixing(self.norms[0](x)) + self.feed(self.norms[1](x))


class Parallel(Model):
    """A tree of adds."""

    layer = ParallelLayer


def join(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """A function that adds."""
    return x + scale * y


class JoiningLayer(Layer):
    def both(self, x: Tensor, y: Tensor) -> Tensor:
        return join(x, y, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x, self.mixing(self.norms[0](x)))
        return self.both(x, self.feed(self.norms[1](x)))


class Joining(Model):
    """A method adds by a function, and is called twice."""

    layer = JoiningLayer


class FlattenedLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.norms[0](x))
        shape = x.shape
        x = x.reshape(-1, WIDTH)
        return (x + self.feed(self.norms[1](x))).view(shape)


class Flattened(Model):
    """The stream is laid out anew between two sites, and behind the last one."""

    layer = FlattenedLayer


class ByHand(Model):
    """The layers are run by a loop in one forward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer.mixing(layer.norms[0](x))
            x = x + layer.feed(layer.norms[1](x))
        return self.head(self.norm(x))


class Again(Model):
    """One layer, called again and again."""

    def run(self, x: Tensor) -> Tensor:
        for _ in range(DEPTH):
            x = self.layers[0](x)
        return x


class Collecting(Model):
    """Every layer's value is put away, and returned if a caller asks."""

    def forward(self, ids: Tensor, every: bool = False) -> tuple[Tensor, ...]:  # type: ignore[override]
        x = self.embed(ids)
        seen = ()
        for layer in self.layers:
            if every:
                seen = (*seen, x)
            x = layer(x)
        return (self.head(self.norm(x)), *seen)


SPELLINGS = [Model, InPlace, PostNorm, Scaled, Parallel, Joining, Flattened, ByHand, Again, Collecting]


# --- what cannot be rewritten ----------------------------------------------------------------------------------------


class AboveLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Above(Model):
    """What adds is called by `super()`."""

    layer = AboveLayer


class Identities(Model):
    """The first norm is none: there the branch reads the stream elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].norms[0] = nn.Identity()


class InLoop(Model):
    """The stream begins with a value that a loop makes."""

    def run(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(torch.cat([x[:, :2], first[:, 2:]], 1))
        return x


class Scale(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return 0.9 * x, None


class Packed(Model):
    """What changes the stream between two layers returns it in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = self.scale(layer(x))
        return x


class GatedLayer(Layer):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return x + gate * self.feed(self.norms[1](x))


class GatedAbove(Model):
    """The model computes from the stream what a layer adds."""

    layer = GatedLayer

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def run(self, x: Tensor) -> Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = layer(x, gate(x))
        return x


class BroadcastLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(self.norms[1](x)).mean(1, keepdim=True)


class Broadcast(Model):
    layer = BroadcastLayer


class NamedLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, [x + self.feed(self.norms[1](x))])


class Named(Model):
    """A function of the source has a name that the emitted file defines."""

    layer = NamedLayer


def local() -> Model:
    class Local(Model):
        pass

    return Local()


REFUSED = [
    ("MHC701", Above), ("MHC702", Identities), ("MHC703", InLoop), ("MHC704", Packed), ("MHC705", GatedAbove),
    ("MHC706", Broadcast), ("MHC707", local),
]  # fmt: skip
