"""Let the processes of a run find each other after every restart, without keys that an earlier attempt has left.

torchrun keeps one key-value store for all its restarts (torch 2.11 to 2.13), and gloo and NCCL write the addresses of
processes under the same keys every time. After a restart a rank could thus read where a dead process listened, and
never reach the living one. Here the first rank makes a new prefix for the keys, and tells it to those who are alive.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PAUSE = 0.01
"""Seconds between looks of the first rank for the others."""


def fresh_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return a store for `torch.distributed.init_process_group` without keys of earlier attempts. All ranks call it.

    The environment says where it is (`MASTER_ADDR`, `MASTER_PORT`). Each rank draws a number and stores it; the first
    rank answers each number with its prefix until the rank has been seen under that prefix. Numbers of earlier attempts
    are answered, too, but nobody reads the answers.

    Raises torch.distributed.DistError where a rank does not come within `timeout`.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    number = secrets.token_hex(8)
    if rank:
        store.set(f"mhc/hello/{rank}", number)
        prefix: str = store.get(f"mhc/answer/{number}").decode()
        store.set(f"{prefix}/here/{rank}", "")
        return PrefixStore(prefix, store)
    prefix = f"mhc/{number}"
    missing, answered = set(range(1, size)), set()
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/here/{other}"]):
                missing.remove(other)
            elif store.check([f"mhc/hello/{other}"]):
                hello = store.get(f"mhc/hello/{other}").decode()
                if hello not in answered:
                    store.set(f"mhc/answer/{hello}", prefix)
                    answered.add(hello)
        if missing and time.monotonic() > end:
            raise DistStoreError(f"timed out: ranks {sorted(missing)} of {size} did not come")
        time.sleep(PAUSE if missing else 0)
    return PrefixStore(prefix, store)
