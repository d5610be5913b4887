"""Hand-written language models by what mixes their tokens, and encoders with decoders."""

import math

import torch
from parts import DEPTH, LENGTH, VOCAB, WIDTH, Attention, Feed, Language, Layer, Normed, features, pairs, plain
from torch import Tensor, nn
from torch.nn import functional as F

# --- what mixes tokens or channels ----------------------------------------------------------------------------------


@plain(4 * DEPTH)
class Conformer(Language):
    """Macaron halves around attention and a convolution over time."""

    class Layer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm, self.last = Normed(Feed()), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.5 * self.before(x)
            x = x + self.attention(x)
            x = x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)
            return self.last(x + 0.5 * self.feed(x))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(DEPTH)
class StateSpace(Language):
    """Mamba-like: a gated scan, written as a loop over time."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inside, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            value, decay, gate = self.inside(self.norm(x)).chunk(3, -1)
            decay, state, states = torch.sigmoid(decay), torch.zeros_like(value[:, 0]), []
            for t in range(value.shape[1]):
                state = decay[:, t] * state + (1 - decay[:, t]) * value[:, t]
                states.append(state)
            return x + self.out(torch.stack(states, 1) * F.silu(gate))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class Retention(Language):
    """RetNet-like: decayed linear attention with a group norm."""

    class Retain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.gate, self.out = (
                nn.Linear(WIDTH, 3 * WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, WIDTH),
            )

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            at = torch.arange(x.shape[1])
            decay = (0.9 ** (at[:, None] - at)).tril()
            y = (q @ k.transpose(-1, -2) * decay / math.sqrt(WIDTH)) @ v
            return self.out(F.layer_norm(y, (WIDTH,)) * F.silu(self.gate(x)))

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attention = Normed(self.Retain())


@plain(2 * DEPTH)
class TokenShift(Language):
    """RWKV-like: branches read a mixture of each token and the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.rand(DEPTH, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        for layer, mu in zip(self.layers, self.mu, strict=True):
            for norm, branch in (layer.attention, layer.feed):
                h = norm(x)
                x = x + branch(torch.lerp(F.pad(h, (0, 0, 1, -1)), h, mu))
        return x


@plain(DEPTH)
class Fourier(Language):
    """FNet: tokens are mixed without parameters, which is no branch."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.feed = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)), Feed()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](x + torch.cumsum(x, 1))
            return self.norms[1](x + self.feed(x))

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class Mixer(Language):
    """MLP-Mixer: one feed-forward over tokens, one over channels."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feed = Feed(LENGTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.feed(x.mT).mT

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attention = Normed(self.Across())


@plain(DEPTH)
class GatedMLP(Language):
    """gMLP: a spatial gating unit."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.Linear(2 * WIDTH, WIDTH),
            )
            self.spatial = nn.Linear(LENGTH, LENGTH)

        def forward(self, x: Tensor) -> Tensor:
            u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
            return x + self.down(u * self.spatial(F.layer_norm(v, v.shape[-1:]).mT).mT)

    def __init__(self) -> None:
        super().__init__(self.Layer)


@plain(2 * DEPTH)
class Experts(Language):
    """A mixture of experts, each computed for all tokens and weighted."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(Feed() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                y = y + weights[..., i, None] * expert(x)
            return y

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.feed = Normed(self.Mixture())


@plain(2 * DEPTH)
class ChunkedFeed(Language):
    """Reformer: the feed-forward runs over parts of the sequence, one after the other."""

    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feed = Feed()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.feed(part) for part in x.chunk(2, 1)], 1)

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.feed = Normed(self.Chunked())


# --- encoder and decoder --------------------------------------------------------------------------------------------


@plain(2 * DEPTH + 3 * DEPTH, inputs=pairs, streams=2)
class EncoderDecoder(nn.Module):
    """T5, BART."""

    class Decoder(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.cross = nn.LayerNorm(WIDTH), Attention()

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            x = x + self.attention(x)
            x = x + self.cross(self.norm(x), memory)
            return x + self.feed(x)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.embed = Language(), nn.Embedding(VOCAB, WIDTH)
        self.decoder, self.head = nn.ModuleList(self.Decoder() for _ in range(DEPTH)), nn.Linear(WIDTH, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder.norm(self.encoder.run(self.encoder.embed(source)))
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(x)


@plain(2 * DEPTH - 1, inputs=features)
class Latents(nn.Module):
    """Perceiver: learned latents read the input by cross attention; the stream begins behind their first reading."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.project = nn.Parameter(torch.randn(1, 3, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.cross, self.feeds = (nn.ModuleList(f() for _ in range(DEPTH)) for f in (Attention, Feed))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * DEPTH))

    def forward(self, inputs: Tensor) -> Tensor:
        seen = self.project(inputs)
        x = self.latents.expand(inputs.shape[0], -1, -1)
        for i, (cross, feed) in enumerate(zip(self.cross, self.feeds, strict=True)):
            x = x + cross(self.norms[2 * i](x), seen)
            x = x + feed(self.norms[2 * i + 1](x))
        return x.mean(1)


@plain(4 + 1 + 4)
class Hourglass(Language):
    """A shorter sequence in the middle, whose result is spread and added: all of it is the branch of one add."""

    def __init__(self) -> None:
        super().__init__(depth=6)
        self.shorten, self.lengthen = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        short = self.shorten(x.unflatten(1, (-1, 2)).flatten(2))
        for layer in self.layers[2:4]:
            short = layer(short)
        x = x + self.lengthen(short).unflatten(-1, (2, -1)).flatten(1, 2)
        for layer in self.layers[4:]:
            x = layer(x)
        return x
