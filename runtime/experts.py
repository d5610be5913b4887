"""The loads of experts: what balances them, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.program import Program


def check_biases(program: Program, rate: float) -> None:
    """Raise MHC623 where `rate` would move biases, and what of the model balances its experts is not clear."""
    if rate and program.unclear:
        raise MHCError("MHC623", f"{', '.join(program.unclear)}; train.balance_rate = {rate}")


@torch.no_grad()
def balance(bias: Tensor, load: Tensor, rate: float) -> None:
    """Move every expert's `bias` by `rate` towards the mean load, in place (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    `load`: the tokens that each expert got in a step, `[experts]`.
    """
    if rate:
        bias.add_((load.mean() - load).sign().view(bias.shape).to(bias.dtype), alpha=rate)


def imbalance(loads: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how many times the mean load the busiest expert of each router has, under the names of metrics."""
    return {f"expert_imbalance/{name}": float(load.max() / load.mean()) for name, load in loads.items()}
