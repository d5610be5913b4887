"""What each rank does in tests of the guard: steps whose figures differ, known to the last rank alone."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist

from mhc_compile import MHCError
from mhc_compile.runtime.engine import over_ranks
from mhc_compile.runtime.guard import Guard


def steps(policy: str, folder: str) -> list[str]:
    """What each of four steps ends in here; in the second one the last rank's loss is NaN, in the fourth its norm."""
    guard = Guard(policy, folder, explode=3.0)  # type: ignore[arg-type]
    last = dist.get_rank() == dist.get_world_size() - 1
    batch = {"input_ids": torch.full((2, 3), dist.get_rank())}
    said = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, (loss, norm) in enumerate(((2.0, 1.0), (math.nan, 1.0), (2.0, 1.0), (2.0, math.inf))):
            own = (torch.tensor([loss]), torch.tensor(norm)) if last else (torch.zeros(1), torch.tensor(1.0))
            (total,), agreed, _ = over_ranks(*own, stop=False)
            try:
                said.append(guard.check(step, total, agreed, batch, {"step": step}))
            except MHCError as error:
                said.append(error.code)
                break
    return [*said, *(str(w.message).split(" ")[0] for w in told), str(guard.state())]
