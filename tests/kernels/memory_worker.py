"""Run the Triton kernel of `engram_kernels::rows` under its interpreter, in a process of its own; prints JSON."""

from __future__ import annotations

import json
import random

import torch

from mhc_compile.kernels.memory import hash_ops, hashing, rows_triton
from mhc_compile.kernels.memory.spec import HashSpec

EXTREMES = [0, 1, -1, 2, 2**63 - 1, -(2**63), 2**62, -(2**62) - 1, 2**32, 99_091]
SPECS = [
    HashSpec(multipliers=(1, 1), moduli=(1, 2, 3, 8191, 8192, 2**31, 2**62 + 1), fill=0),
    HashSpec(multipliers=(76632096046245, 4839876093313, 35959672319349), moduli=(646403, 646411), fill=2),
    HashSpec(multipliers=(2**63 - 1, -3, 2**61 + 1, 5), moduli=tuple(range(5, 14)), fill=7),
]


def compare(spec: HashSpec, given: bool, shape: tuple[int, int], seed: int) -> bool:
    draw = random.Random(seed)
    B, S = shape
    length = B * (S + spec.order - 1)
    values = [draw.choice([draw.choice(EXTREMES), draw.randrange(-(2**63), 2**63)]) for _ in range(length)]
    held = torch.tensor(values).view(B, -1)
    before, ids = held[:, : spec.order - 1], held[:, spec.order - 1 :]  # not contiguous
    reach = torch.tensor([draw.randrange(6) for _ in range(B * S)]).view(B, S)
    before = before if given else None
    found = torch.ops.engram_kernels.rows(ids, reach, before, str(spec))
    return torch.equal(found, hashing.rows(ids, reach, before, spec))


if __name__ == "__main__":
    found = [
        compare(spec, given, shape, seed)
        for seed, spec in enumerate(SPECS)
        for given in (False, True)
        for shape in ((1, 1), (3, 7), (2, 40), (2, 0))
    ]
    asked: list[int] = []
    run = rows_triton.run
    hash_ops.RUN["triton"] = lambda *args: asked.append(1) or run(*args)
    found.append(compare(SPECS[0], True, (2, 3), 0))
    print(json.dumps({"equal": found, "through the op": asked == [1]}))
