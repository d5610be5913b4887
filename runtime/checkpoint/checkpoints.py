"""Save and load the state of a run: while it goes on, whole or not at all, for any number of ranks."""

from __future__ import annotations

import functools
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.runtime.checkpoint.folder import RunFolder
from mhc_compile.runtime.checkpoint.format import Description, read_description, verify_file
from mhc_compile.runtime.checkpoint.pieces import LoadPlanner, Piece, SavePlanner, copied, piece_of
from mhc_compile.runtime.checkpoint.storage import Reader, Writer

T = TypeVar("T")
State = dict[str, Any]
"""`model`, `optimizer` and `tables`: this rank's Tensors, DTensors and `Piece`s by name. `progress`: plain JSON, the
first rank's is kept."""
SECTIONS = ("model", "optimizer", "tables")

# One process without a group is meant here, and not worth torch's warning at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of a run in `folder`, which all ranks see; all ranks call every method, in one order.

    `every`: optimizer steps between two (`due`); `keep`: how many stay; `asynchronous`: `save` returns when the values
    are copied, and they are written while training goes on. `timeout` (seconds): how long ranks wait for the slowest to
    write or read its part, in a gloo group apart from training's messages.

    A save that fails (a full disk) warns with MHC616 when the next one begins or in `wait`; earlier checkpoints stay.
    `close` raises MHC616 if the last save failed. The constructor raises MHC619, on all ranks, where another run writes
    to `folder`.
    """

    def __init__(
        self, folder: str | Path, *, every: int = 0, keep: int = 2, asynchronous: bool = True, timeout: float = 600.0
    ) -> None:
        self.folder = RunFolder(Path(folder))
        self.every, self.keep, self.asynchronous = every, keep, asynchronous
        self._parallel = dist.is_available() and dist.is_initialized()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self._parallel else None
        self.rank = dist.get_rank() if self._parallel else 0
        self.world = dist.get_world_size() if self._parallel else 1
        self._pending: tuple[int, Callable[[], None]] | None = None
        self._saved: int | None = None
        self._failed: str | None = None
        self._agree(self.folder.claim)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be saved after `step` optimizer steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, the same on all ranks; None without one."""
        steps = self._agree(self.folder.steps)
        return steps[-1] if steps else None

    def save(self, step: int, state: State) -> None:
        """Save `state` as the checkpoint of `step`; a second call for the same step does nothing."""
        self.wait()
        if step == self._saved:
            return
        self._failed = None
        pieces: dict[str, Any] = self._own(_pieces(state))
        if self.rank == 0:
            self.folder.discard(step)
        writer = Writer(
            self.folder.partial(step),
            step=step,
            rank=self.rank,
            world=self.world,
            # A copy: it is written while training changes the original.
            progress=json.loads(json.dumps(state.get("progress", {}), allow_nan=False)),
            publish=lambda: self.folder.publish(step, self.keep),
        )
        options: dict[str, Any] = {
            "storage_writer": writer,
            "planner": SavePlanner(),
            "process_group": self._group,
            "no_dist": not self._parallel,
        }
        if self.asynchronous:
            copies: dict[str, Any] = {**copied(pieces)}
            self._pending = (step, _in_background(lambda: save(copies, **options)))
        else:
            self._finish(step, lambda: save(pieces, **options))

    def _own(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Return the pieces that this rank writes; of the holders of one, that with the least to write does."""
        mine = {name: (p.offsets, tuple(p.tensor.shape), p.tensor.nbytes) for name, p in pieces.items()}
        holders: dict[Any, list[int]] = {}
        for rank, boxes in enumerate(self.gather(mine)):
            for name, box in boxes.items():
                holders.setdefault((name, *box), []).append(rank)
        load, writers = [0] * self.world, {}
        for box, ranks in sorted(holders.items(), key=lambda item: (-item[0][-1], item[0])):
            writers[box] = min(ranks, key=lambda rank: load[rank])
            load[writers[box]] += box[-1]
        return {name: p for name, p in pieces.items() if writers[(name, *mine[name])] == self.rank}

    def wait(self) -> None:
        """Wait until the present save is done."""
        if self._pending is not None:
            (step, wait), self._pending = self._pending, None
            self._finish(step, wait)

    def close(self) -> None:
        """Wait, and release the folder for other runs. Raises MHC616 if the last save failed."""
        try:
            self.wait()
        finally:
            if self.rank == 0:
                self.folder.release()
        if self._failed is not None:
            raise MHCError("MHC616", self._failed)

    def open(self) -> Description | None:
        """Return the description of the newest whole checkpoint, its files checked by their hashes; None without any.

        The ranks share the reading. A damaged one is set aside with a warning, MHC615, where there is an older one;
        the last one is an error on all ranks, MHC615, and stays. Raises MHC619 for one of another format.
        """
        steps = self._agree(self.folder.steps)
        while steps:
            step = steps.pop()
            try:
                return self._read(step)
            except MHCError as error:
                if error.code != "MHC615" or not steps:
                    raise
                aside = self._agree(functools.partial(self.folder.set_aside, step))
                if self.rank == 0:
                    detail = f"{error.detail}; it is now {aside.name}, and step {steps[-1]} is tried"
                    warn("MHC615", detail, stacklevel=3)
        return None

    def _read(self, step: int) -> Description:
        folder = self.folder.whole(step)

        def check() -> Description:
            description = read_description(folder)
            if description.step != step:
                raise MHCError("MHC615", f"{folder} holds step {description.step}")
            for name in sorted(description.files)[self.rank :: self.world]:
                verify_file(folder, description, name)
            return description

        return self._together(check)

    def load(self, description: Description, state: State) -> None:
        """Fill the tensors of `state`, in place, from the checkpoint that `open` has described.

        Names and shapes must be there (`mhc_compile.runtime.state.restore` checks them). Raises MHC615 where the
        checkpoint is damaged.
        """
        pieces: dict[str, Any] = _pieces(state)
        try:
            load(
                pieces,
                storage_reader=Reader(self.folder.whole(description.step), description),
                planner=LoadPlanner(),
                process_group=self._group,
                no_dist=not self._parallel,
            )
        except (CheckpointException, OSError, SafetensorError) as error:
            raise _coded("MHC615", error) from error
        self._saved = description.step

    def gather(self, value: T) -> list[T]:
        """Return `value` of every rank."""
        if not self._parallel:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _finish(self, step: int, result: Callable[[], Any]) -> None:
        try:
            result()
        except (CheckpointException, OSError) as error:
            coded = _coded("MHC616", error)
            if self.rank == 0:
                self.folder.discard(step)
                warn("MHC616", coded.detail, stacklevel=3)
            self._failed = coded.detail
        else:
            self._saved = step

    def _agree(self, fn: Callable[[], T]) -> T:
        """Return what `fn` returns on the first rank, or raise its coded error, on all ranks."""
        answer: list[Any] = [None]
        if self.rank == 0:
            answer = [_attempt(fn)]
        if self._parallel:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        return _unwrap(answer)

    def _together(self, fn: Callable[[], T]) -> T:
        """Return what `fn` returns here; raise the first coded error of any rank on all of them."""
        answers = self.gather(_attempt(fn))
        _unwrap(answers)
        answer: T = answers[self.rank]
        return answer


def _pieces(state: Mapping[str, Any]) -> dict[str, Piece]:
    """Return the pieces by full name, in the order of names, so that all ranks agree on who writes what."""
    tensors = {f"{section}/{name}": t for section in SECTIONS for name, t in state.get(section, {}).items()}
    return {name: piece_of(t) for name, t in sorted(tensors.items())}


def _in_background(work: Callable[[], Any]) -> Callable[[], None]:
    """Run `work` in a thread, and return a function that waits for it and raises its error.

    Unlike the thread of torch's `async_save`, it keeps no process alive: when a peer hangs in the midst of a save, the
    others end with an error, and must not wait for it then.
    """
    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:  # CheckpointException is no Exception
            errors.append(error)

    thread = threading.Thread(target=run, args=(work,), name="mhc-checkpoint", daemon=True)
    thread.start()
    del work  # what was saved goes with the thread

    def wait() -> None:
        thread.join()  # a thread that still frees its tensors while the process ends would abort it
        if errors:
            raise errors[0]

    return wait


def _attempt(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except MHCError as error:
        return error


def _unwrap(answers: list[Any]) -> Any:
    for answer in answers:
        if isinstance(answer, MHCError):
            raise answer
    return answers[0]


def _coded(code: str, error: BaseException) -> MHCError:
    """Return `error` as a coded error where the file system or a damaged file caused it; raise it otherwise."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if not isinstance(cause, (OSError, SafetensorError)):
            raise RuntimeError(str(error)) from error  # CheckpointException is no Exception
    return MHCError(code, "; ".join(sorted({str(cause) for cause in causes})))
