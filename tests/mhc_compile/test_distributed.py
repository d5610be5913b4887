"""Two processes over gloo on the loopback interface: DDP and FSDP around converted and unconverted models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
EXPECTED = {
    # The gradients of a step, against the mean over the ranks' batches computed in one process.
    "ddp_eager": "same",
    "ddp_aot": "same",
    "ddp_probes": "same",
    "ddp_compiled": "same",
    "compiled_in_ddp": "same",
    "ddp_no_sync": "same",
    "fsdp1": "same",
    "fsdp2": "same",
    # The same twice, and the layers' weights are sharded again after each; without gradients, too.
    "fsdp2_layers": "same",
    "fsdp2_layers_aot": "same",
    # Stream parameters after three steps, one rank against the other.
    "ddp_trains": "same",
    # All parameters after three steps, against one process.
    "fsdp2_layers_train": "same",
    # Refusals: those of torch.compile first, then those of convert.
    "ddp_split_graphs": "MHC306",
    "ddp_unconverted": "MHC303 MHC303",
    "fsdp_unconverted": "MHC303 MHC303 MHC303 MHC303",
    "fsdp1_flat": "MHC212",
    "fsdp2_layers_alone": "MHC212 MHC212",
}


SOME = ("ddp_trains", "fsdp2_layers", "ddp_unconverted", "fsdp2_layers_alone")


@pytest.mark.parametrize("checks", [SOME, pytest.param(tuple(EXPECTED), marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_processes(checks: tuple[str, ...], tmp_path: Path) -> None:
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), ",".join(checks), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=400)
            answers = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
            assert answers == {check: EXPECTED[check] for check in checks}, errors
    finally:
        for rank in ranks:
            rank.kill()
