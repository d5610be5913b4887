"""An mHC Transformer written by hand with the fused kernels: no conversion, no graph pass.

Run: python examples/by_hand.py
"""

import torch
from torch import Tensor, nn

from mhc_compile.kernels.functions import boundary, expand, leave, read
from mhc_compile.kernels.spec import StreamSpec

SPEC = StreamSpec(streams=4)


class Site(nn.Module):
    """phi, alpha and bias of one site, from scratch: streams mix a little from the first step on."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        n = SPEC.streams
        self.phi = nn.Parameter(0.02 * torch.randn(SPEC.rows, n * width))
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        mix = torch.full((n, n), -8.0).fill_diagonal_(0.0)
        pre = torch.full((n,), 0.1)
        pre[index % n] = 1 - 0.1 * (n - 1)  # not uniform, or the streams would never separate
        self.bias = nn.Parameter(torch.cat([torch.logit(pre), torch.zeros(n), mix.flatten()]))


class Model(nn.Module):
    """Branches are MLPs; any module from [batch, length, C] to the same would do."""

    def __init__(self, width: int = 64, depth: int = 6, vocabulary: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.sites = nn.ModuleList(Site(width, i) for i in range(depth))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        X = expand(self.embed(ids), SPEC.streams)
        first, *others = self.sites
        h, post, mix = read(X, first.phi, first.alpha, first.bias, SPEC)
        for site, branch in zip(others, self.branches, strict=False):
            X, h, post, mix = boundary(X, branch(h), post, mix, site.phi, site.alpha, site.bias, SPEC)
        return self.head(leave(X, self.branches[-1](h), post, mix, SPEC))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 64, (8, 32))
    for step in range(30):
        logits = model(ids)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
