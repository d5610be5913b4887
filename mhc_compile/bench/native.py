"""The hand-written hyper-connections of DeepSeek-V4, as Hugging Face ships them: Inductor against the backend `mhc`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mhc_compile.bench.contest import Contender, contest, distance, show

OURS = "mhc-compile"


class Sites(nn.Module):
    """Hugging Face's hyper-connection modules around small MLPs (hidden size C / 8), wired as in its layers."""

    def __init__(self, sites: int, width: int) -> None:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        super().__init__()
        config = DeepseekV4Config(hidden_size=width, hc_mult=4, num_hidden_layers=1)
        self.connections = nn.ModuleList(DeepseekV4HyperConnection(config) for _ in range(sites))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width // 8), nn.SiLU(), nn.Linear(width // 8, width))
            for _ in range(sites)
        )
        connection: Any
        for connection in self.connections:
            nn.init.normal_(connection.fn, std=0.02)
            nn.init.normal_(connection.base, std=0.5)
            nn.init.constant_(connection.scale, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [batch, length, C] after all sites."""
        streams = x.unsqueeze(2).expand(-1, -1, 4, -1).contiguous()
        for connection, branch in zip(self.connections, self.branches, strict=True):
            post, comb, h = connection(streams)
            y = branch(h)
            streams = post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
        return streams.mean(2)


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure forward and backward; print the table and return all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sites, width, tokens = (2, 32, 16) if quick else (24, 512, 1024)
    torch.manual_seed(0)
    model = Sites(sites, width).to(device)
    x = torch.randn(1, tokens, width, device=device)
    weights = torch.randn(1, tokens, width, device=device)
    exact = gradients(copy.deepcopy(model).double(), x.double(), weights.double())()

    def contender(name: str, compile_: Callable[[nn.Module], Any]) -> Contender:
        work = gradients(compile_(copy.deepcopy(model)), x, weights)
        return Contender(name, work, None, lambda results: distance(results, exact), 1e-3)

    contenders = [
        contender(OURS, lambda m: torch.compile(m, backend="mhc")),
        contender("Inductor", torch.compile),
        contender("eager", lambda m: m),
    ]
    shape = f"{sites} sites, n=4, C={width}, {tokens} tokens, float32"
    rows = contest(console, contenders, ours=OURS, device=device, shape=shape, rounds=3 if quick else 9)
    title = f"DeepSeek-V4 hyper-connections around MLPs, forward and backward, {shape}"
    return {"groups": {title: show(console, title, rows)}}


def gradients(model: nn.Module, x: Tensor, weights: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Return a function that runs forward and backward, and returns the output and the gradients of all parameters."""
    parameters = list(model.parameters())

    def work() -> Sequence[Tensor]:
        out = model(x)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), parameters)]

    return work
