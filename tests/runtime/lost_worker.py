"""One rank of two, of which the second is lost in the way that the command line names; run by path."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.launch import launch
from mhc_compile.runtime.recipe_tables import ParallelTable


def main(how: str, timeout: float) -> None:
    with launch(ParallelTable(stages=2, timeout=timeout)) as world:
        dist.all_reduce(torch.ones(1), group=world.pipe_group)
        begin = time.monotonic()
        if world.pipe == 1:
            if how == "dies":
                os._exit(0)
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        if how == "stops":
            with world.patience("compiling"):
                time.sleep(60)  # waits for nobody
        try:
            with world.doing("forward and backward passes", 7):
                if how == "blocks":
                    time.sleep(60)  # in a library that has no timeout of its own
                dist.recv(torch.empty(4), group=world.pipe_group, group_src=1)
        except MHCError as error:
            print(f"{error}\nafter {time.monotonic() - begin:.1f} s", flush=True)
            os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
