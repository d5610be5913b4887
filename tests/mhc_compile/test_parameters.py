"""What `print(model)` shows of streams, and freezing everything else."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ids, llama

import mhc_compile
from mhc_compile import MemorySettings, MHCError


def test_repr_shows_what_every_site_holds() -> None:
    model = mhc_compile.convert(llama(), streams=2, inner="eager")
    assert repr(model.model.mhc) == (
        "StreamParameters(\n"
        "  streams=2 convention=paper manifold=sinkhorn iterations=20 exit=mean, 4 sites\n"
        "  (layers):\n"
        "    (0#0 to 1#1): 4 x phi [8, 64], alpha [3], bias [8]\n"
        ")"
    )
    depth = mhc_compile.convert(llama(), form="denseformer", inner="eager")
    assert "(0#0): " in repr(depth.model.mhc)


def test_a_frozen_backbone_trains_streams_and_tables_alone(capsys: pytest.CaptureFixture[str]) -> None:
    settings = MemorySettings(layers=(1,), rows_per_head=50, heads=2, order=2, row_width=8, compress=False)
    model = mhc_compile.convert(llama(), streams=2, inner="eager", engram=settings)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if "mhc" not in name}
    assert mhc_compile.freeze_backbone(model) is model
    mhc_compile.print_trainable_parameters(model)
    streams = sum(p.numel() for p in mhc_compile.stream_parameters(model).values())
    tables = model.model.mhc.table(model.model.mhc.memories.engram.paths[0]).weight.numel()
    every = sum(p.numel() for p in model.parameters())
    share = 100 * (streams + tables) / every
    counts = {f"streams {streams:,}", f"tables {tables:,}"}
    total, kinds = capsys.readouterr().out.strip().split("): ")
    assert total == f"trained: {streams + tables:,} of {every:,} parameters ({share:.2f} %"
    assert set(kinds.split(", ")) == counts
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in own.items())
    assert not mhc_compile.parameters.at_start(model.model.mhc)


def test_a_residual_model_has_nothing_to_leave_trainable() -> None:
    with pytest.raises(MHCError, match="MHC410"):
        mhc_compile.freeze_backbone(llama())
