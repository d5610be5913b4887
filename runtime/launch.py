"""The processes of a run: who is where in the mesh, the groups they talk in, and what a lost one ends in."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.recipe_tables import ParallelTable
from mhc_compile.runtime.rendezvous import fresh_store
from mhc_compile.runtime.watch import Watch, first_line, lost

DIMS = ("pipe", "data", "engram")
"""Of the mesh, outermost first: rank = (pipe * data + data index) * engram + engram index."""
_LOST = re.compile(r"timed? ?out|connection (was )?(closed|reset|refused)|broken pipe|pair closure|not connected", re.I)


@dataclass(frozen=True)
class World:
    """This process among the others of the run."""

    parallel: ParallelTable
    rank: int
    device: torch.device
    mesh: DeviceMesh
    """Of `DIMS`."""
    replica_mesh: DeviceMesh
    """Of one dimension: the ranks that hold the same stages."""
    patient: dist.ProcessGroup
    """All ranks, on the CPU, with a timeout long enough to compile or to write a checkpoint in."""
    watch: Watch
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def pipe(self) -> int:
        """This rank's place in its pipeline."""
        return self.rank // self.parallel.replicas

    @property
    def replica(self) -> int:
        """Which share of every batch it takes: data index * engram + engram index."""
        return self.rank % self.parallel.replicas

    @property
    def pipe_group(self) -> dist.ProcessGroup:
        """The ranks of this pipeline, in its order."""
        return self.mesh.get_group("pipe")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same stages and the same rows of tables."""
        return self.mesh.get_group("data")

    @property
    def engram_group(self) -> dist.ProcessGroup:
        """The ranks over which the rows of this rank's tables are spread."""
        return self.mesh.get_group("engram")

    def pipe_ranks(self, pipes: Sequence[int]) -> dist.ProcessGroup:
        """Return the group of the ranks at the places `pipes` of this pipeline; all of them call this in one order."""
        ranks = tuple(p * self.parallel.replicas + self.replica for p in sorted(pipes))
        return _group(ranks, self.parallel, self._groups)

    def meet(self) -> None:
        """Wait until all ranks are here, for as long as `parallel.patience`."""
        dist.barrier(group=self.patient)

    def patience(self, action: str) -> AbstractContextManager[None]:
        """Do as `doing`, for actions that may take as long as `parallel.patience`: to compile, to read weights."""
        return self.doing(action, timeout=self.parallel.patience)

    @contextmanager
    def doing(self, action: str, step: int | None = None, *, timeout: float | None = None) -> Iterator[None]:
        """Name the present action for messages. Raises MHC605 where it fails because a peer is lost."""
        begin = time.monotonic()
        with self.watch.over(action, step, timeout or self.parallel.timeout):
            try:
                yield
            except MHCError:
                raise
            except Exception as error:  # whatever a collective raises; raised again if no peer is lost
                if is_lost(error):
                    raise lost(self.rank, self.parallel.world, action, step, time.monotonic() - begin, error) from error
                raise


@contextmanager
def launch(parallel: ParallelTable) -> Iterator[World]:
    """Join the run, as torchrun's environment says or alone without one; leave it at the end.

    Raises MHC603 where the number of processes is not that of the recipe, before anything else happens, and MHC605
    where the others do not come.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    check_world(parallel, world_size)
    device = _device(local)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    timeout = timedelta(seconds=parallel.timeout)
    try:
        alone = "RANK" not in os.environ
        store = dist.HashStore() if alone else fresh_store(rank, world_size, timeout)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        detail = f"rank {rank} of {world_size}: joining the run failed: {first_line(error)}"
        raise MHCError("MHC605", detail) from error
    watch = Watch(rank, world_size, None if alone else store, parallel.timeout)
    try:
        yield world_of(parallel, rank, device, watch)
    finally:
        watch.close()
        # Leaving waits for nobody: a rank that failed must not wait for those that have not.
        dist.destroy_process_group()


def check_world(parallel: ParallelTable, world_size: int) -> None:
    """Raise MHC603 unless the recipe is for so many processes."""
    p = parallel
    if world_size != p.world:
        product = f"{p.stages} x {p.data} x {p.engram} = {p.world}"
        detail = f"{world_size} processes; parallel.stages x data x engram = {product}"
        way_out = f"torchrun --nproc-per-node {p.world} -m mhc_compile train ..., or change [parallel]"
        raise MHCError("MHC603", detail, way_out=way_out)


def is_lost(error: BaseException | None) -> bool:
    """Return whether an error, or a cause of it, says that a peer did not answer or is gone."""
    while error is not None:
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
            return True
        if isinstance(error, RuntimeError | ValueError) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def world_of(parallel: ParallelTable, rank: int, device: torch.device, watch: Watch) -> World:
    """Return this process's place among those that have joined. A collective."""
    shape = (parallel.stages, parallel.data, parallel.engram)
    ranks = torch.arange(parallel.world, dtype=torch.int).view(shape)
    at = (ranks == rank).nonzero()[0].tolist()
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    by_dim = [ranks[:, at[1], at[2]], ranks[at[0], :, at[2]], ranks[at[0], at[1], :]]
    lines = [_group(tuple(line.tolist()), parallel, groups) for line in by_dim]
    mesh = DeviceMesh.from_group(lines, device.type, mesh=ranks, mesh_dim_names=DIMS)
    replicas = _group(tuple(ranks[at[0]].flatten().tolist()), parallel, groups)
    replica_mesh = DeviceMesh.from_group(replicas, device.type, mesh_dim_names=("replica",))
    timeout = timedelta(seconds=parallel.patience)
    patient = dist.new_group(backend="gloo", timeout=timeout, group_desc="patient")
    return World(parallel, rank, device, mesh, replica_mesh, patient, watch, groups)


def _group(
    ranks: tuple[int, ...], parallel: ParallelTable, groups: dict[tuple[int, ...], dist.ProcessGroup]
) -> dist.ProcessGroup:
    """Return the group of `ranks`, which its members alone create when it is first needed."""
    if ranks not in groups:
        timeout = timedelta(seconds=parallel.timeout)
        group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        groups[ranks] = group
    return groups[ranks]


def _device(local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        detail = f"local rank {local} has no GPU of its own: this machine has {torch.cuda.device_count()}"
        raise MHCError("MHC603", detail, way_out='a process for every GPU; CUDA_VISIBLE_DEVICES="" trains on CPUs')
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
