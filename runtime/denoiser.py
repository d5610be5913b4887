"""The objective of a run with `[diffusion]`: corrupt batches, alike on all ranks and for every cut of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.diffusion.objective import Corrupted, corrupt
from mhc_compile.integrations.transformers import IDS
from mhc_compile.runtime.data.tokenizer import has_tokenizer, model_vocabulary, read_tokenizer
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.weights import seed_of


class Denoiser:
    """Corrupts the batches of one replica.

    A row's corruption depends on `train.seed`, the step and the row's place in the whole batch alone: it is the same on
    the first and the last stage, on any number of replicas, and in a run that is resumed.

    Raises MHC602 where the model's folder names no mask token, or one that the model has no embedding for, and MHC614
    for a tokenizer that cannot be read.
    """

    def __init__(self, recipe: Recipe, replica: int) -> None:
        assert recipe.diffusion is not None
        self.mask_token, self.vocabulary = _tokens(Path(recipe.model.folder), recipe.diffusion.mask_token)
        self.train = recipe.train
        share = recipe.train.batch // recipe.parallel.replicas
        self.own = slice(replica * share, (replica + 1) * share)

    def inputs(self, batch: Mapping[str, Tensor], step: int, *, evaluates: bool) -> list[dict[str, Tensor]]:
        """Return the replica's rows of a step's `batch` as they are to be restored: `input_ids`, `labels`, `weights`.

        With `evaluates` it is the number of a batch to evaluate on, whose tokens are masked. Raises MHC204 for a batch
        with mask tokens.
        """
        ids = batch[IDS]
        seed = seed_of(self.train.seed, "evaluation" if evaluates else "corruption", step)
        progress = 0.0 if evaluates else (step - 1) / self.train.steps
        return [
            {**batch, IDS: c.ids[self.own].contiguous(), "labels": ids, "weights": c.weights[self.own]}
            for c in self._corrupted(ids, progress, torch.Generator().manual_seed(seed))
        ]

    def _corrupted(self, ids: Tensor, progress: float, generator: torch.Generator) -> list[Corrupted]:
        """Return the corruptions of the whole batch, of which other replicas' rows are left as they are."""
        shape = self.train.batch, ids.shape[1]
        whole, valid = ids[:1].repeat(shape[0], 1), torch.zeros(shape, dtype=torch.bool)
        whole[self.own], valid[self.own] = ids, True
        how = {"mask_token": self.mask_token, "vocabulary": self.vocabulary}
        return corrupt(whole, progress, **how, valid=valid, generator=generator)


def _tokens(folder: Path, mask_token: int | None) -> tuple[int, int]:
    """Return the mask token, and how many ids edits may draw."""
    known, tokenizer = model_vocabulary(folder), read_tokenizer(folder) if has_tokenizer(folder) else None
    chosen = mask_token if mask_token is not None or tokenizer is None else tokenizer.mask
    if chosen is None:
        way_out = "add one: mhc_compile.integrations.diffusion.add_mask_token(model, tokenizer), and save both"
        raise MHCError("MHC602", f"[diffusion]: {folder} names no mask token", way_out=way_out)
    if known is not None and chosen >= known:
        raise MHCError("MHC602", f"diffusion.mask_token = {chosen}; wanted: below {known}, the model's vocabulary")
    ids = tokenizer.vocabulary if tokenizer is not None else known or 0
    return chosen, max(ids, chosen + 1)
