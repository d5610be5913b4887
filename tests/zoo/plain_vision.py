"""Hand-written models of images: patches, convolutions, stages, and diffusion."""

import torch
from parts import DEPTH, WIDTH, Attention, Feed, Layer, Normed, image, plain
from torch import Tensor, nn
from torch.nn import functional as F


class Patches(nn.Module):
    """An image as tokens, [B, S, C]; `layers` that subclasses run."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.patch(pixels).flatten(2).mT)).mean(1))


@plain(2 * DEPTH, inputs=image)
class ViT(Patches):
    """A class token and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 5, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        return super().run(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions)


@plain(2 * DEPTH, inputs=image)
class DiT(Patches):
    """Adaptive norms: shift, scale and gate of every branch come from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.ModuleList(nn.Linear(WIDTH, 6 * WIDTH) for _ in range(DEPTH))
        self.condition = nn.Parameter(torch.randn(1, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        for layer, modulate in zip(self.layers, self.modulate, strict=True):
            given = modulate(F.silu(self.condition + x.mean(1)))[:, None].chunk(6, -1)
            for branch, (shift, scale, gate) in ((layer.attention, given[:3]), (layer.feed, given[3:])):
                x = x + gate * branch(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
        return x


@plain(2 * DEPTH, inputs=image)
class DiTByAddcmul(DiT):
    """The same with fused gates and modulation."""

    def run(self, x: Tensor) -> Tensor:
        for layer, modulate in zip(self.layers, self.modulate, strict=True):
            given = modulate(self.condition.expand(x.shape[0], -1))[:, None].chunk(6, -1)
            for branch, (shift, scale, gate) in ((layer.attention, given[:3]), (layer.feed, given[3:])):
                x = torch.addcmul(x, gate, branch(torch.addcmul(shift, F.layer_norm(x, (WIDTH,)), 1 + scale)))
        return x


@plain(2 * 4, inputs=image, streams=3)
class SkipProjections(Patches):
    """U-ViT: late layers read the concatenation of the stream and an early value, projected: no add."""

    def __init__(self) -> None:
        super().__init__(4)
        self.joins = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.layers[:2]:
            x = layer(x)
            kept.append(x)
        for layer, join in zip(self.layers[2:], self.joins, strict=True):
            x = layer(join(torch.cat([x, kept.pop()], -1)))
        return x


@plain(DEPTH, inputs=image)
class ConvNeXtChannelsLast(nn.Module):
    """ConvNeXt with the stream in [B, H, W, C]; only the convolution sees channels first."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
            self.feed, self.gamma = Normed(Feed()), nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.feed(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(self.Layer() for _ in range(DEPTH))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


@plain(0, "MHC108", inputs=image)
class ResNet(nn.Module):
    """Channels first, all through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(DEPTH))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for layer in self.layers:
            x = torch.relu(x + layer(x))
        return self.head(x.mean((2, 3)))


@plain(2 * 2 * DEPTH, inputs=image, streams=2)
class Stages(Patches):
    """Swin-like: patches are merged between two stages, each of which is a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.later = nn.ModuleList(
            nn.ModuleList([Normed(Attention(2 * WIDTH), 2 * WIDTH), Normed(Feed(2 * WIDTH), 2 * WIDTH)])
            for _ in range(DEPTH)
        )
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 5)

    def run(self, x: Tensor) -> Tensor:
        x = self.merge(super().run(x).unflatten(1, (-1, 2)).flatten(2))
        for layer in self.later:
            for branch in layer:
                x = x + branch(x)
        return x


@plain(3 + 1 + 3, inputs=image)
class UNet(nn.Module):
    """Stages down and up, channels last; what lies below a skip is the branch of the add that closes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.stages = nn.ModuleList(nn.ModuleList(Normed(Feed()) for _ in range(3)) for _ in range(3))
        self.down, self.up = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def stage(self, x: Tensor, number: int) -> Tensor:
        for branch in self.stages[number]:
            x = x + branch(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        skip = x = self.stage(self.stem(pixels.flatten(2).mT), 0)
        x = self.stage(self.down(x.unflatten(1, (-1, 4)).flatten(2)), 1)
        x = self.up(x).unflatten(-1, (4, -1)).flatten(1, 2)
        return self.head(self.stage(x + skip, 2))


@plain(2 * DEPTH, inputs=image)
class MaskedAutoencoder(Patches):
    """MAE: some tokens are left out before the layers."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(x[:, torch.tensor([0, 2, 3])])


@plain(2 * DEPTH, "MHC109", inputs=image, warns=True)
class CutBatch(Patches):
    """Layers that work on one half of the batch and put it back: a stream for every layer."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([layer(x[:1]), x[1:]])
        return x


@plain(2 * DEPTH, inputs=image)
class Registers(Patches):
    """Register tokens go along and are cut off at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(2, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        return super().run(torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], 1))[:, :-2]
