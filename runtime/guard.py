"""What happens when the loss is not finite or explodes: stop with the step's data on the disk, or skip the step."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.checkpoint.shards import sync
from mhc_compile.diagnostics import MHCError, warn

HISTORY = 64
"""Losses that the running median is taken of."""
BEGIN = 8
"""Losses before the median means anything: the first ones fall quickly."""
PATIENCE = 10
"""Steps left out in a row after which a run that skips stops all the same."""


class Guard:
    """Judges each step before its update, the same on all ranks.

    `policy`: "stop" or "skip". `explode`: a loss above so many times the median of the last 64 is bad as well; 0: only
    NaN and infinity are. `folder` gets `failed-step-N` when a run stops. `group`: all ranks, talking on the CPU or on
    `device`; None where every rank is given the same figures anyhow.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        folder: str | os.PathLike[str],
        *,
        explode: float = 0.0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.policy, self.folder, self.explode = policy, Path(folder), explode
        self.group, self.device = group, device
        self.skipped = 0
        """Steps left out since the run began."""
        self._row = 0
        self._losses: list[float] = []

    def check(
        self,
        step: int,
        loss: float | None,
        grad_norm: float | None,
        batch: Mapping[str, Tensor] | None,
        position: Mapping[str, Any] | None = None,
    ) -> Literal["ok", "skip"]:
        """ "ok" to make the update of `step`, "skip" to leave it out; a collective over `group`.

        `loss` and `grad_norm`: of this rank, None where it does not know them; the largest loss of all ranks is judged.
        `batch`: what the step read, token ids above all; None on ranks whose batch another rank has, too. `position`:
        plain JSON, where in the data that was.

        Raises MHC618 on all ranks where the policy is to stop, and after 10 steps left out in a row: every rank first
        writes its batch and figures to `folder/failed-step-N/`.
        """
        known = [v for v in (loss, grad_norm) if v is not None]
        finite = all(map(math.isfinite, known))
        # NaN has no place in a maximum.
        vote = torch.tensor(
            [0.0 if finite else 1.0, loss if finite and loss is not None else -math.inf],
            dtype=torch.float64,
            device=self.device,
        )
        if self.group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group)
        bad, worst = vote.tolist()
        said = "the loss or the gradient is not finite" if bad else self._exploded(worst)
        if said is None:
            self._row = 0
            if math.isfinite(worst):
                self._losses = [*self._losses, worst][-HISTORY:]
            return "ok"
        self._row += 1
        if self.policy == "skip" and self._row <= PATIENCE:
            self.skipped += 1
            if self._rank == 0:
                warn("MHC618", f"step {step} is left out: {said}")
            return "skip"
        where = self._record(step, loss, grad_norm, batch, position, said)
        row = f", after {PATIENCE} steps left out in a row" if self.policy == "skip" else ""
        raise MHCError("MHC618", f"step {step}{row}: {said}; its data are in {where}")

    def state(self) -> dict[str, Any]:
        """Plain JSON for checkpoints: a resumed run judges as an unbroken one does."""
        return {"skipped": self.skipped, "row": self._row, "losses": self._losses}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state()` of an earlier process."""
        self.skipped, self._row = int(state["skipped"]), int(state["row"])
        self._losses = [float(v) for v in state["losses"]]

    def _exploded(self, loss: float) -> str | None:
        if not self.explode or len(self._losses) < BEGIN or not math.isfinite(loss):
            return None
        usual = statistics.median(self._losses)
        if loss <= self.explode * usual:
            return None
        return f"the loss is {loss:.4g}, {loss / usual:.3g} times the median of the last {len(self._losses)}"

    @property
    def _rank(self) -> int:
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def _record(
        self,
        step: int,
        loss: float | None,
        grad_norm: float | None,
        batch: Mapping[str, Tensor] | None,
        position: Mapping[str, Any] | None,
        said: str,
    ) -> Path:
        """Write what a report of the step needs; the files of an earlier stop at the same step are replaced."""
        where = self.folder / f"failed-step-{step}"
        content = {
            "step": step,
            "reason": said,
            # JSON has no NaN.
            "loss": None if loss is None else repr(loss),
            "grad_norm": None if grad_norm is None else repr(grad_norm),
            "position": dict(position or {}),
        }
        try:
            where.mkdir(parents=True, exist_ok=True)
            path = where / f"rank-{self._rank:05d}.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            with path.open("rb+") as file:
                sync(file)
            if batch is not None:
                plain = {name: t.detach().cpu().contiguous() for name, t in batch.items()}
                path = path.with_suffix(".safetensors")
                safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
                with path.open("rb+") as file:
                    sync(file)
        except (OSError, safetensors.SafetensorError) as error:
            # The step has failed already; that it cannot be recorded must not hide why.
            return Path(f"{where} (not written: {error})")
        return where
