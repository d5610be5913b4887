"""Toy models cut into stages: what the tests of split backwards and of overlapping begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile import MemorySettings, convert, stream_parameters
from mhc_compile.config import Options
from mhc_compile.passes.split_backward import Part
from mhc_compile.runtime.program import Program, capture_program
from mhc_compile.runtime.split import SplitFunction
from mhc_compile.runtime.stage import Stage, build_stages, materialise_all

LENGTH, VOCABULARY = 8, 64


def ids(sequences: int, seed: int = 0) -> Tensor:
    """`[sequences, LENGTH]`, none of them padding."""
    return torch.randint(2, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


class Branch(nn.Module):
    """Mixes tokens by a running sum, and channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(nn.functional.silu(self.up(h + h.cumsum(1))))


class Tiny(nn.Module):
    """Embedding, one branch a site, a tied head."""

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Branch(width) for _ in range(sites)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def tiny(sites: int = 4, width: int = 16) -> nn.Module:
    """A converted model, the same at every call."""
    torch.manual_seed(0)
    return shaken(convert(Tiny(sites, width), ids(1), inner="eager"))


def memory() -> nn.Module:
    """A converted model of one layer with a memory at its entry."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    settings = MemorySettings.preset("paper", rows_per_head=97, row_width=4, layers=(1,), compress=False)
    return shaken(convert(LlamaForCausalLM(config), inner="eager", engram=settings))


def shaken(model: nn.Module) -> nn.Module:
    """The model with what conversion added off its start."""
    with torch.no_grad():
        for p in stream_parameters(model).values():
            p.add_(0.2 * torch.randn(p.shape))
        for name, p in model.named_parameters():
            if ".engram." in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return model


def program_of(model: nn.Module, sequences: int = 1) -> Program:
    """The model on microbatches of so many sequences."""
    return capture_program(model, {"input_ids": ids(sequences)})


def stages_of(
    model: nn.Module, program: Program, starts: list[int], indices: list[int], options: Options, *, split: bool
) -> list[Stage]:
    """The stages numbered `indices` of the model cut in front of the sites `starts`, with the model's values."""
    made = build_stages(program, starts, indices=indices, options=options, split=split)
    materialise_all(made)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for stage in made:
            for name, p in stage.named_parameters():
                p.copy_(values[name])
    return made


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(stages: list[Stage]) -> dict[str, Tensor]:
    """By parameter and by table; a parameter that stages share is the first one's."""
    found: dict[str, Tensor] = {}
    for stage in reversed(stages):
        found |= {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        for name, table in stage.tables.items():
            if table.gradient is not None:
                found |= {f"{name} {i}": t for i, t in enumerate(table.gradient)}
    return found


def functions(stage: Stage) -> list[SplitFunction]:
    """The compiled functions of a stage whose backward is split."""
    return [f for unit in stage.units for f in unit.functions]


def operations(part: Part | None) -> dict[str, int]:
    """How often a part of a backward calls each operation."""
    counts: dict[str, int] = {}
    for node in part.graph.graph.nodes if part is not None else ():
        if node.op == "call_function":
            name = str(node.target)
            counts[name] = counts.get(name, 0) + 1
    return counts


def run(stages: list[Stage], tokens: Tensor, *, early: bool = False, deferred: bool = True) -> Any:
    """One forward and backward through all stages, the last first; `early`: with recomputation begun before."""
    crossing: list[tuple[Tensor, ...]] = []
    out: Any = (tokens,)
    for stage in stages:
        arguments = out if stage.index == 0 else tuple(t.detach().requires_grad_() for t in out)
        crossing.append(arguments)
        out = stage(*arguments, **({} if stage.index == 0 else {"input_ids": tokens}))
        crossing[-1] = (arguments, out)  # type: ignore[assignment]
    found = loss_of(out, tokens)
    gradient: Any = None
    for stage, (arguments, results) in zip(reversed(stages), reversed(crossing), strict=True):
        if early:
            stage.begin_recompute()
        if gradient is None:
            found.backward()
        else:
            torch.autograd.backward(results, gradient)
        gradient = tuple(t.grad for t in arguments)
        if deferred:
            stage.dw_builder()()
    return found.detach()
