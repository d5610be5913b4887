"""What each rank does in tests of the guard."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist

from mhc_compile import MHCError
from mhc_compile.runtime.guard import Guard


def steps(policy: str, folder: str) -> list[str]:
    """What each of three steps ends in here; the loss of the second one is NaN."""
    guard = Guard(policy, folder, explode=3.0)  # type: ignore[arg-type]
    batch = {"input_ids": torch.full((2, 3), dist.get_rank())}
    said = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, loss in enumerate((2.0, math.nan, 2.0)):
            try:
                said.append(guard.check(step, loss, 1.0, batch, {"step": step}))
            except MHCError as error:
                said.append(error.code)
                break
    return [*said, *(str(w.message).split(" ")[0] for w in told), str(guard.state())]
