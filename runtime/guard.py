"""What happens when the loss is not finite or explodes: stop with the step's data on the disk, or skip the step."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch.distributed as dist
from torch import Tensor

from mhc_compile.checkpoint.shards import write_shard, write_text
from mhc_compile.diagnostics import MHCError, warn

HISTORY = 64
"""Losses that the running median is taken of."""
BEGIN = 8
"""Losses before the median means anything: the first ones fall quickly."""
PATIENCE = 10
"""Steps left out in a row after which a run that skips stops all the same."""


class Guard:
    """Judges each step before its update; all ranks pass the same figures and judge alike.

    `policy`: "stop" or "skip". `explode`: a loss above so many times the median of the last 64 is bad as well; 0: only
    NaN and infinity are. `folder` gets `failed-step-N` when a run stops.
    """

    def __init__(
        self, policy: Literal["stop", "skip"], folder: str | os.PathLike[str], *, explode: float = 0.0
    ) -> None:
        self.policy, self.folder, self.explode = policy, Path(folder), explode
        self.skipped = 0
        """Steps left out since the run began."""
        self._row = 0
        self._losses: list[float] = []

    def check(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        batch: Mapping[str, Tensor] | None,
        position: Mapping[str, Any] | None = None,
    ) -> Literal["ok", "skip"]:
        """Return "ok" to make the update of `step`, "skip" to leave it out.

        `batch`: what the step read, token ids above all; None on ranks whose batch another rank has, too. `position`:
        plain JSON, where in the data that was.

        Raises MHC618 where the policy is to stop, and after 10 steps left out in a row: every rank first writes its
        batch and figures to `folder/failed-step-N/`.
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self._row = 0
            self._losses = [*self._losses, loss][-HISTORY:]
            return "ok"
        self._row += 1
        if self.policy == "skip" and self._row <= PATIENCE:
            self.skipped += 1
            if _rank() == 0:
                warn("MHC618", f"step {step} is left out: {reason}")
            return "skip"
        report = {
            "step": step,
            "reason": reason,
            # JSON has no NaN.
            "loss": repr(loss),
            "grad_norm": repr(grad_norm),
            "position": dict(position or {}),
        }
        folder = self._record(report, batch)
        row = f", after {PATIENCE} steps left out in a row" if self.policy == "skip" else ""
        raise MHCError("MHC618", f"step {step}{row}: {reason}; its data are in {folder}")

    def state(self) -> dict[str, Any]:
        """Return plain JSON for checkpoints: a resumed run judges as an unbroken one does."""
        return {"skipped": self.skipped, "row": self._row, "losses": self._losses}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state()` of an earlier process."""
        self.skipped, self._row = int(state["skipped"]), int(state["row"])
        self._losses = [float(v) for v in state["losses"]]

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step; None where nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "the loss or the gradient is not finite"
        if not self.explode or len(self._losses) < BEGIN:
            return None
        median = statistics.median(self._losses)
        if loss <= self.explode * median:
            return None
        return f"the loss is {loss:.4g}, {loss / median:.3g} times the median of the last {len(self._losses)}"

    def _record(self, report: Mapping[str, Any], batch: Mapping[str, Tensor] | None) -> str:
        """Write what a report of the step needs; the files of an earlier stop at the same step are replaced."""
        folder = self.folder / f"failed-step-{report['step']}"
        path = folder / f"rank-{_rank():05d}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            write_text(path, json.dumps(report, indent=1) + "\n")
            if batch is not None:
                write_shard(path.with_suffix(".safetensors"), batch)
        except (OSError, safetensors.SafetensorError) as error:
            # The step has failed already; that it cannot be recorded must not hide why.
            return f"{folder} (not written: {error})"
        return str(folder)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
