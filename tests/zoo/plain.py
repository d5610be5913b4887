"""Hand-written language models of public designs, each with what must come of its conversion."""

from dataclasses import dataclass
from functools import reduce

import torch
from parts import BATCH, DEPTH, VOCAB, WIDTH, Attention, Feed, Language, Layer, plain, tokens
from torch import Tensor, nn
from torch.nn import functional as F

# --- where the norms are ------------------------------------------------------------------------------------------


@plain(2 * DEPTH)
class PreNorm(Language):
    """GPT-2."""


@plain(2 * DEPTH)
class PostNorm(Language):
    """The Transformer of 2017, BERT."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.feed = Attention(), Feed()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](x + self.attention(x))
            return self.norms[1](x + self.feed(x))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class DeepNorm(Language):
    """DeepNet: the carry is scaled up before the add."""

    class Layer(PostNorm.Layer):
        def forward(self, x: Tensor) -> Tensor:
            alpha = (2 * DEPTH) ** 0.25
            x = self.norms[0](x * alpha + self.attention(x))
            return self.norms[1](torch.add(self.feed(x), x, alpha=alpha))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class Sandwich(Language):
    """CogView, Gemma 2: a norm before and one after each branch."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Sequential(self.attention, nn.LayerNorm(WIDTH))
            self.feed = nn.Sequential(self.feed, nn.LayerNorm(WIDTH))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(DEPTH)
class Parallel(Language):
    """GPT-J, PaLM: attention and feed-forward read one value."""

    class Layer(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x) + self.feed(x)

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class ReZero(Language):
    """ReZero, SkipInit: a learned number before every branch."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.tensor(0.3))

        def add(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.alpha * y

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class ScaledNorms(Language):
    """nGPT-like: values are normalised to length 1 after every add."""

    class Layer(Layer):
        def add(self, x: Tensor, y: Tensor) -> Tensor:
            return F.normalize(x + self.scale * y, dim=-1)

    def __init__(self) -> None:
        super().__init__(self.Layer)


# --- what layers share or carry -----------------------------------------------------------------------------------


@plain(2 * DEPTH)
class ValueResiduals(Language):
    """ResFormer: every layer adds the first layer's values to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        values = self.first(x)
        for layer in self.layers:
            norm, attention = layer.attention
            x = x + attention(norm(x), value=values)
            x = x + layer.feed(x)
        return x


@plain(2 * DEPTH)
class EmbeddingAgain(Language):
    """modded-nanogpt: the embedding is mixed into the stream before every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(DEPTH, 2))

    def run(self, x: Tensor) -> Tensor:
        first = x
        for layer, weights in zip(self.layers, self.weights, strict=True):
            x = layer(weights[0] * x + weights[1] * first)
        return x


@plain(2 * 4)
class LongSkips(Language):
    """U-ViT, Hunyuan-DiT without projections: late layers add what early ones gave."""

    def __init__(self) -> None:
        super().__init__(depth=4)

    def run(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.layers[:2]:
            x = layer(x)
            kept.append(x)
        for layer in self.layers[2:]:
            x = layer(x + kept.pop())
        return x


@plain(2 * DEPTH)
class Shared(Language):
    """ALBERT: one layer, called again and again."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def run(self, x: Tensor) -> Tensor:
        for _ in range(DEPTH):
            x = self.layers[0](x)
        return x


@plain(2 * DEPTH)
class Universal(Shared):
    """The Universal Transformer: a shared layer, told the step by an embedding added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.randn(DEPTH, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = self.layers[0](x + step)
        return x


@plain(2 * DEPTH, inputs=lambda: (*tokens(), torch.randn(DEPTH, BATCH, 2, WIDTH)))
class RecurrentMemory(Language):
    """Transformer-XL: attention also reads what the layer read in the segment before."""

    def forward(self, ids: Tensor, memories: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer, memory in zip(self.layers, memories, strict=True):
            norm, attention = layer.attention
            x = x + attention(norm(x), norm(torch.cat([memory, x], 1)))
            x = x + layer.feed(x)
        return self.head(self.norm(x))


@plain(2 * DEPTH)
class DenseAverages(Language):
    """DenseFormer: after every layer a weighted average of all values so far."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(i + 2) for i in range(DEPTH))

    def run(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer, weights in zip(self.layers, self.weights, strict=True):
            seen.append(layer(x))
            x = reduce(torch.add, (w * value for w, value in zip(weights, seen, strict=True)))
        return x


@plain(2 * DEPTH)
class TupleCarrying(Language):
    """Layers take and return the stream and a count beside it."""

    class Layer(Layer):
        def forward(self, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x, count = carried
            return super().forward(x), count + 1

    def __init__(self) -> None:
        super().__init__(self.Layer)

    def forward(self, ids: Tensor) -> Tensor:
        x, count = self.embed(ids), torch.zeros(())
        for layer in self.layers:
            x, count = layer((x, count))
        return self.head(self.norm(x)) + count


@dataclass
class Output:
    """What a model returns."""

    logits: Tensor
    hidden: list[Tensor]


@plain(2 * DEPTH)
class DataclassOutput(Language):
    """Returns an object with every layer's value."""

    def forward(self, ids: Tensor) -> Output:  # type: ignore[override]
        hidden = [self.embed(ids)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        return Output(self.head(self.norm(hidden[-1])), hidden[-1:])


@plain(2 * DEPTH)
class TiedWeights(Language):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight


@plain(2 * DEPTH, "MHC104")
class EarlyExit(Language):
    """CALM, DeeBERT: stops where a classifier is sure enough, which depends on data."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.head(self.norm(x)).softmax(-1).amax() > 0.99:
                break
        return x


@plain(2 * DEPTH)
class EarlyExits(Language):
    """LayerSkip: logits of every depth, for a loss on all of them."""

    def forward(self, ids: Tensor) -> Tensor:
        x, logits = self.embed(ids), []
        for layer in self.layers:
            x = layer(x)
            logits.append(self.head(self.norm(x)))
        return torch.stack(logits)
