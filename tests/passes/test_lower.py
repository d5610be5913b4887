"""Lowering: the coefficients get the op with the opaque Sinkhorn loop, all else stays."""

from collections.abc import Callable

import torch
from goldens import graph_text
from recipes import Recipe
from stepping import apply, normal, stepped
from torch import nn
from toys import toy

from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, call_nodes
from mhc_compile.passes.lower import Lower

Golden = Callable[[str], None]


def test_coefficients(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1, style="single"))
    out = stepped(model, StreamSpec(streams=4), ids)
    golden(f"{out.texts['widen']}\n\n{out.texts['lower']}")


def test_only_coefficients_change() -> None:
    model, ids = toy(Recipe())
    out = stepped(model, StreamSpec(streams=4), ids)
    before, after = out.texts["widen"].splitlines(), out.texts["lower"].splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 4
    assert all(a.replace("mhc.coefficients", "mhc_kernels.reference_coefficients") == b for a, b in changed)
    assert "4 sites: coefficients with an opaque Sinkhorn, the rest in plain PyTorch" in out.notes
    targets = {n.target for n in call_nodes(out.graph)}
    assert torch.ops.mhc_kernels.reference_coefficients.default in targets
    assert torch.ops.mhc.coefficients.default not in targets


def test_a_graph_without_the_dialect_stays_as_it_is() -> None:
    gm = normal(nn.Linear(4, 4), torch.randn(2, 4))
    before = graph_text(gm)
    context = Context()
    assert graph_text(apply(Lower(), gm, context)) == before
    assert context.notes[0].startswith("0 sites")
