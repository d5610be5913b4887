"""Small residual models made from a recipe, each with its n-stream form written by hand beside it.

`Toy.forward` is the residual network in the spelling that the recipe asks for; `Toy.streams` computes what a correct
rewriting must give, with the mathematics of `mhc_compile.kernels.reference` and no graph in sight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from recipes import Norms, Recipe
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile.kernels import hc, reference
from mhc_compile.kernels.spec import StreamSpec

BATCH, LENGTH, WIDTH, VOCAB = 2, 3, 8, 11


class Norm(nn.Module):
    """A norm over the last dimension, as one operation or written out."""

    def __init__(self, kind: Norms) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(WIDTH))
        self.bias = nn.Parameter(0.2 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (WIDTH,), self.weight, self.bias)
        if self.kind == "rms":
            return F.rms_norm(x, (WIDTH,), self.weight)
        if self.kind == "rms_by_hand":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-6) * self.weight + self.bias


class Mixer(nn.Module):
    """Mixes tokens: the running sum of gated values, from this layer or an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, flat: bool, axis: int, values: Tensor | None) -> tuple[Tensor, Tensor]:
        if flat:
            h = h.unflatten(0, (BATCH, LENGTH))
        if values is None:
            values = self.values(h)
        y = self.out(torch.cumsum(values, axis) * torch.sigmoid(self.gate(h)))
        return (y.flatten(0, 1) if flat else y), values


class Feed(nn.Module):
    """A feed-forward network, which may read a second input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.up = nn.Linear(inputs * WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h)))


class Layer(nn.Module):
    """One layer: a mixer and a feed-forward network around the stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.mixer = Mixer()
        self.norm = Norm(recipe.norm)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(0.1 * torch.randn(WIDTH))
        if recipe.style != "single":
            self.feed = Feed(2 if recipe.extra == "embedding_in_branch" else 1)
            self.feed_norm = Norm(recipe.norm)
        if recipe.style == "sandwich":
            self.norm_after = Norm(recipe.norm)
            self.feed_norm_after = Norm(recipe.norm)
        if recipe.extra == "early":
            self.shortcut = Feed(1)

    # --- spellings of the residual form ---------------------------------------------------------------------------

    def rescale(self, x: Tensor) -> Tensor:
        if self.recipe.carry == "imul":
            x *= 0.75
        return x * 0.75 if self.recipe.carry == "rescaled" else x

    def carried(self, x: Tensor, mask: Tensor) -> Tensor:
        carry = self.recipe.carry
        if carry == "scaled":
            return 0.8 * x
        if carry == "affine":
            return x * self.scale + self.shift
        if carry == "masked":
            return x * mask
        return x + x if carry == "doubled" else x

    def scaled(self, y: Tensor) -> Tensor:
        branch = self.recipe.branch
        if branch == "scaled":
            return y * 0.5
        if branch == "layer_scale":
            return self.scale * y
        return y.mul_(0.5) if branch == "mul_" else y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        add = self.recipe.add
        if add == "reversed":
            return y + x
        if add == "function":
            return torch.add(x, y)
        if add == "method":
            return x.add(y)
        if add == "alpha":
            return torch.add(x, y, alpha=0.7)
        if add == "add_":
            return x.add_(y)
        if add == "iadd":
            x += y
            return x
        return x + y

    def factor(self, y: Tensor) -> Tensor:
        """What the spelling of the add does to the branch."""
        return 0.7 * y if self.recipe.add == "alpha" else y

    # --- the layer ------------------------------------------------------------------------------------------------

    def mixed(self, h: Tensor, memory: "Memory") -> Tensor:
        flat, axis = self.recipe.layout == "flat", 0 if self.recipe.layout == "sbc" else 1
        h = h if self.recipe.style == "post" else self.norm(h)
        y, values = self.mixer(h, flat, axis, memory.values)
        if self.recipe.extra == "shared_keys":
            memory.values = values
        return self.norm_after(y) if self.recipe.style == "sandwich" else y

    def fed(self, h: Tensor, memory: "Memory", late: Tensor | None) -> Tensor:
        h = h if self.recipe.style == "post" else self.feed_norm(h)
        if self.recipe.extra == "embedding_in_branch":
            h = torch.cat([h, memory.first.reshape(h.shape)], -1)
        y = self.feed(h)
        y = self.feed_norm_after(y) if self.recipe.style == "sandwich" else y
        return y if late is None else y + late

    def forward(self, x: Tensor, memory: "Memory") -> Tensor:
        style, mask = self.recipe.style, memory.mask
        x = self.rescale(x)
        if style in ("parallel", "tree"):
            mixed, fed = self.scaled(self.mixed(x, memory)), self.scaled(self.fed(x, memory, None))
            if style == "parallel":
                return self.add(self.carried(x, mask), mixed + fed)
            return self.add(self.add(self.carried(x, mask), mixed), fed)
        late = self.shortcut(self.norm(x)) if self.recipe.extra == "early" else None
        x = self.add(self.carried(x, mask), self.scaled(self.mixed(x, memory)))
        if style == "single":
            return x
        x = self.norm(x) if style == "post" else x
        x = self.rescale(x)
        shape = x.shape
        if self.recipe.layout == "flat_feed":
            x, mask = x.reshape(-1, WIDTH), mask.reshape(-1, 1)
            late = None if late is None else late.reshape(-1, WIDTH)
        x = self.add(self.carried(x, mask), self.scaled(self.fed(x, memory, late)))
        if self.recipe.layout == "flat_feed":
            x = x.view(shape)
        return self.feed_norm(x) if style == "post" else x

    def streams(self, X: Tensor, memory: "Memory", sites: "Sites") -> Tensor:
        """The same on n streams `[..., n, C]`."""
        style, mask = self.recipe.style, memory.mask
        X = sites.enter(self.wide_rescale(X))
        h, post, H = sites.read(X)
        if style in ("parallel", "tree"):
            embedded = memory.first
            if sites.taken == 1 and self.recipe.carry not in ("rescaled", "imul"):
                memory.first = h  # the first site reads the embedding as it reads the stream
            y = self.scaled(self.mixed(h, memory)) + self.scaled(self.fed(h, memory, None))
            if not self.recipe.in_place:  # else all layers read one copy
                memory.first = embedded
            return sites.write(self.wide_carried(X, mask), self.factor(y), post, H)
        # What later layers read of the stream's entry is the embedding itself.
        early = X[..., 0, :] if sites.taken == 1 else h
        late = self.shortcut(self.norm(early)) if self.recipe.extra == "early" else None
        y = self.factor(self.scaled(self.mixed(h, memory)))
        X = sites.write(self.wide_carried(X, mask), y, post, H)
        if style == "single":
            return X
        X = self.norm(X) if style == "post" else X
        X = self.wide_rescale(X)
        lead = X.shape[:-2]
        if self.recipe.layout == "flat_feed":
            X, mask = X.flatten(0, 1), mask.reshape(-1, 1)
            late = None if late is None else late.reshape(-1, WIDTH)
        h, post, H = sites.read(X)
        y = self.factor(self.scaled(self.fed(h, memory, late)))
        X = sites.write(self.wide_carried(X, mask), y, post, H)
        return X.unflatten(0, lead) if self.recipe.layout == "flat_feed" else X

    def wide_rescale(self, X: Tensor) -> Tensor:
        return X * 0.75 if self.recipe.carry in ("rescaled", "imul") else X

    def wide_carried(self, X: Tensor, mask: Tensor) -> Tensor:
        return self.carried(X, mask.unsqueeze(-2))


@dataclass
class Memory:
    """What layers pass on beside the stream."""

    first: Tensor
    mask: Tensor
    values: Tensor | None = None


class Sites:
    """The parameters of the sites, taken in order."""

    def __init__(self, spec: StreamSpec, parameters: Iterator[tuple[Tensor, ...]]) -> None:
        self.spec, self.parameters, self.taken = spec, parameters, 0

    def enter(self, X: Tensor) -> Tensor:
        """What a layer's first site reads and carries on, from what there is in front of it."""
        return X

    def read(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.taken += 1
        values = next(self.parameters)
        match self.spec.form:
            case "mhc":
                pre, post, H = reference.coefficients(X, *values, self.spec)
            case "hc":
                pre, post, H = hc.dynamic(X, *values)
            case "hc_static":
                pre, post, H = hc.static(X, *values)
        return reference.aggregate(X, pre), post, H

    def write(self, X: Tensor, y: Tensor, post: Tensor, H: Tensor) -> Tensor:
        return reference.distribute(X, y, post, H)


class Toy(nn.Module):
    """Embedding, layers, final norm and head; returns the logits and, where asked for, the hidden states."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(1 if recipe.shared else recipe.layers))
        self.norm = Norm(recipe.norm)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.mixture = nn.Parameter(torch.rand(recipe.layers, 2) + 0.3)

    def start(self, ids: Tensor) -> tuple[Tensor, Memory]:
        x = self.embed(ids)
        mask = (ids > 1).unsqueeze(-1).to(x.dtype)
        if self.recipe.layout == "sbc":
            x, mask = x.transpose(0, 1), mask.transpose(0, 1)
        if self.recipe.layout == "flat":
            x, mask = x.flatten(0, 1), mask.flatten(0, 1)
        return x, Memory(x.clone() if self.recipe.in_place else x, mask)

    def stack(self) -> list[Layer]:
        return [self.layers[0 if self.recipe.shared else i] for i in range(self.recipe.layers)]

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        recipe = self.recipe
        x, memory = self.start(ids)
        hidden = []
        skip = None
        for i, layer in enumerate(self.stack()):
            if recipe.extra == "embedding_in_stream":
                x = self.mixture[i, 0] * x + self.mixture[i, 1] * memory.first
            if recipe.extra == "clone":
                x = x.clone()
            if recipe.extra == "cast":
                x = x.to(torch.float64)
            if i == 1 and recipe.extra == "long_skip":
                skip = x.clone() if recipe.in_place else x
            x = layer(x, memory)
            if recipe.hidden_states:
                hidden.append(x.clone() if recipe.in_place else x)
        if skip is not None:
            x = x + skip
        return (self.head(self.norm(x)), *hidden)

    def streams(self, ids: Tensor, sites: Sites) -> tuple[Tensor, ...]:
        """The n-stream form of `forward`."""
        recipe, spec = self.recipe, sites.spec
        x, memory = self.start(ids)
        first = memory.first.unsqueeze(-2)
        if recipe.extra == "embedding_in_stream":
            # The first mixture belongs to the embedding: the stream starts behind it.
            x = (self.mixture[0, 0] + self.mixture[0, 1]) * x
        X = reference.expand(x, spec.streams)
        mean = replace(spec, exit="mean")
        hidden = []
        skip = None
        for i, layer in enumerate(self.stack()):
            if recipe.extra == "embedding_in_stream" and i:
                X = self.mixture[i, 0] * X + self.mixture[i, 1] * first
            if i == 1 and recipe.extra == "long_skip":
                skip = reference.reduce(X, mean)
            X = layer.streams(X, memory, sites)
            last = i == recipe.layers - 1
            # What follows the last site works on the reduced stream; between sites it works on every stream.
            post = layer.feed_norm if recipe.style == "post" else nn.Identity()
            if last:
                x = post(reference.reduce(X, spec))
                hidden.append(x)
            else:
                X = post(X)
                hidden.append(reference.reduce(X, mean))
        if skip is not None:
            x = x + skip
        return (self.head(self.norm(x)), *(hidden if recipe.hidden_states else ()))


def toy(recipe: Recipe) -> tuple[Toy, Tensor]:
    """The model of a recipe in float64 with random weights, and token ids for it."""
    torch.manual_seed(3)
    model = Toy(recipe).double().eval()
    return model, torch.randint(0, VOCAB, (BATCH, LENGTH))
