"""Stages whose tables are sharded over ranks: the same logits and gradients as with tables in one piece."""

from pathlib import Path

import torch
from ranks import run_ranks
from small import llama
from table_worker import both


def test_ranks_share_the_tables_of_a_stage(tmp_path: Path) -> None:
    model = llama(memory=True)
    model.save_pretrained(tmp_path / "model")
    whole = next(p for n, p in model.named_parameters() if n.endswith(".table.weight"))
    torch.save(whole.detach(), tmp_path / "model.pt")
    (first, rows), (second, others) = run_ranks(2, both, tmp_path, str(tmp_path / "model"))
    # Nothing is looked up again in the backward, where collectives could meet in another order.
    assert first == second == 2
    assert (rows[0], rows[1], others[1]) == (0, others[0], len(whole))
