"""Hand-written models whose residual adds are spelt in another way, or are no adds at all."""

from collections.abc import Callable

import torch
from parts import BATCH, DEPTH, LENGTH, WIDTH, Attention, Feed, Language, Layer, Normed, plain
from torch import Tensor, nn
from torch.nn import functional as F

Add = Callable[[Layer, Tensor, Tensor], Tensor]


def spelt(name: str, add: Add, adds: int = 2 * DEPTH, code: str = "", *, warns: bool = False) -> None:
    """Enter a pre-norm model whose layers add by `add(layer, x, y)`."""

    class Spelt(Layer):
        def add(self, x: Tensor, y: Tensor) -> Tensor:
            return add(self, x, y)

    def make(self: Language) -> None:
        Language.__init__(self, Spelt)

    plain(adds, code, warns=warns)(type(name, (Language,), {"__init__": make}))


def in_place(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    x = x * 1.0
    return x.addcmul_(layer.scale, y)


def rows(layer: Layer, x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] * x.shape[1])


def by_index(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(0, 1).index_add(0, rows(layer, x), y.flatten(0, 1), alpha=0.5).view_as(x)


def by_scatter(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x.scatter_add(1, torch.arange(LENGTH)[None, :, None].expand(*x.shape), y)


def by_put(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x.index_put((torch.arange(BATCH),), y, accumulate=True)


def masked(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(torch.arange(LENGTH)[:, None] < LENGTH - 1, x + y, x)


def masked_else(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x.where(torch.arange(LENGTH)[:, None] == 0, x - y)


def halves(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([a + b for a, b in zip(x.chunk(2, -1), y.chunk(2, -1), strict=True)], -1)


def gated(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(y)
    return (1 - gate) * x + gate * y


spelt("Subtracted", lambda _, x, y: x - y)
spelt("SubtractedScaled", lambda _, x, y: torch.sub(x, y, alpha=0.5))
spelt("SubtractedFrom", lambda _, x, y: torch.rsub(x, y))
spelt("LayerScaleByAddcmul", lambda layer, x, y: torch.addcmul(x, layer.scale, y, value=0.5))
spelt("AddcmulInPlace", in_place)
spelt("DividedByAddcdiv", lambda layer, x, y: x.addcdiv(y, layer.scale))
spelt("Interpolated", lambda _, x, y: torch.lerp(x, y, 0.3))
spelt("InterpolatedByWeights", lambda layer, x, y: y.lerp(x, torch.sigmoid(layer.scale)))
spelt("IndexAdd", by_index)
spelt("ScatterAdd", by_scatter)
spelt("IndexPut", by_put)
spelt("StackSum", lambda _, x, y: torch.stack([x, y]).sum(0))
spelt("StackMean", lambda _, x, y: torch.stack((y, x), dim=-1).mean(-1))
spelt("WhereMasked", masked)
spelt("WhereElse", masked_else)
spelt("InPlaceAdds", lambda _, x, y: x.mul(0.9).add_(y, alpha=0.5))
spelt("Halves", halves, 0, "MHC101")
spelt("Largest", lambda _, x, y: torch.maximum(x, y), 0, "MHC101")
spelt("Highway", gated, 0, "MHC101")


@plain(2 * DEPTH)
class FusedProjections(Language):
    """The last projection of every branch is fused with the add by `addmm` and `baddbmm`."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
            self.up = nn.Linear(WIDTH, 2 * WIDTH)
            self.down, self.mix = nn.Parameter(torch.randn(2 * WIDTH, WIDTH)), nn.Parameter(torch.randn(LENGTH, LENGTH))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.baddbmm(x, self.mix.expand(x.shape[0], -1, -1), self.norms[0](x), beta=0.9, alpha=0.5)
            h = F.gelu(self.up(self.norms[1](x)))
            return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), self.down).view_as(x)

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2, "MHC109", warns=True)
class GatedAttention(Language):
    """Attention joins the stream through a gate; only the feed-forward is added."""

    class Layer(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = gated(self, x, self.attention(x))
            return x + self.feed(x)

    def __init__(self) -> None:
        super().__init__(self.Layer, 2)


@plain(0, "MHC103")
class GatedRecurrentUnits(Language):
    """GTrXL: attention joins the stream through a gated recurrent unit."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.update, self.reset, self.new = (nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x)
            both = torch.cat([x, y], -1)
            z, r = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
            x = (1 - z) * x + z * torch.tanh(self.new(torch.cat([r * x, y], -1)))
            return x + self.feed(x)

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH, "MHC109", warns=True)
class MaskedLayers(Language):
    """LayerDrop as an operation: what a whole layer gives is taken or not, so the stream restarts at every layer."""

    def run(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.where(torch.arange(BATCH)[:, None, None] >= i - 1, layer(x), x)
        return x


@plain(2 * DEPTH)
class SkippedLayers(Language):
    """LayerDrop: in training layers are left out, in evaluation none."""

    def run(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if self.training and i == 1:
                continue
            x = layer(x)
        return x


@plain(2 * DEPTH)
class StochasticDepth(Language):
    """Drop path for each example: the branch is multiplied by 0 or by 1 over its probability."""

    class Layer(Layer):
        def add(self, x: Tensor, y: Tensor) -> Tensor:
            if self.training:
                y = y * (torch.rand(x.shape[0], 1, 1) < 0.9) / 0.9
            return x + y

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(0, "MHC105")
class SubsetOfTheBatch(Language):
    """DINOv2's drop path: the branch is computed for a part of the batch and added to its flattened rows."""

    class Layer(Layer):
        def forward(self, x: Tensor) -> Tensor:
            for branch in (self.attention, self.feed):
                at = torch.arange(1)
                y = branch(x[at]).flatten(1)
                x = torch.index_add(x.flatten(1), 0, at, y, alpha=2.0).view_as(x)
            return x

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class MixtureOfDepths(Language):
    """A router picks the tokens that a layer works on; the others pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(DEPTH))

    def run(self, x: Tensor) -> Tensor:
        for layer, router in zip(self.layers, self.router, strict=True):
            for branch in (layer.attention, layer.feed):
                weights, at = router(x).topk(2, dim=1)
                at = at.expand(-1, -1, WIDTH)
                x = torch.scatter_add(x, 1, at, torch.sigmoid(weights) * branch(x.gather(1, at)))
        return x


@plain(DEPTH + 1)
class Reversible(Language):
    """RevNet, Reformer: two streams, each adding a branch of the other; one is the other's branches."""

    def run(self, x: Tensor) -> Tensor:
        a = b = x
        for layer in self.layers:
            a = a + layer.attention(b)
            b = b + layer.feed(a)
        return a + b


@plain(0, "MHC107")
class HyperConnections(Language):
    """Hyper-connections by hand: four streams with static weights."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Parameter(torch.rand(2 * DEPTH, 4)), nn.Parameter(torch.rand(2 * DEPTH, 4))

    def run(self, x: Tensor) -> Tensor:
        streams = x.unsqueeze(-2).expand(-1, -1, 4, -1)
        branches = [b for layer in self.layers for b in (layer.attention, layer.feed)]
        for branch, read, write in zip(branches, self.read, self.write, strict=True):
            y = branch((streams * read[:, None]).sum(-2))
            streams = streams + write[:, None] * y.unsqueeze(-2)
        return streams.mean(-2)


@plain(2 * DEPTH)
class SequenceFirst(Language):
    """fairseq: [S, B, C] inside."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            x = x + self.attention(h, h, h, need_weights=False)[0]
            return x + self.feed(x)

    def __init__(self) -> None:
        super().__init__(self.Layer)

    def run(self, x: Tensor) -> Tensor:
        return super().run(x.transpose(0, 1)).transpose(0, 1)


class Residual(nn.Module):
    """A wrapper that adds."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@plain(2 * DEPTH)
class SequentialWrappers(nn.Sequential):
    """Everything is a `Sequential` of wrapped branches."""

    def __init__(self) -> None:
        language = Language()
        layers = (Residual(Normed(branch)) for _ in range(DEPTH) for branch in (Attention(), Feed()))
        super().__init__(language.embed, *layers, language.norm, language.head)


@plain(2 * DEPTH)
class ModuleDicts(Language):
    """Modules in dictionaries in lists; the forward of the model holds every add."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.ModuleDict({"in": Normed(Attention())}), "feed": Normed(Feed())})
            for _ in range(DEPTH)
        )

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for branch in (layer["mix"]["in"], layer["feed"]):
                x = x + branch(x)
        return x


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.add(branch(x), x)


@plain(2 * DEPTH)
class HelperFunctions(Language):
    """The adds are in a function that is given the branch as a closure."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = add_residual(x, lambda h, layer=layer: layer.attention(h))
            x = add_residual(x, lambda h, layer=layer: layer.feed(h) * 0.5)
        return x
