"""Tables split by rows over the ranks of a process group: look-ups and gradients travel, rows stay where they are.

    look-up     this rank's distinct rows -> their owners -> values back    three all-to-alls: counts, rows, values
    gradient    sums over this rank's passes -> the owners, who add them    the same three, once a step

With R rows and D ranks, rank r holds the rows from `r * ceil(R / D)` to before `(r + 1) * ceil(R / D)`; ranks at the
end may hold fewer, or none. A look-up of m distinct rows sends `8 m` bytes of row numbers and receives m rows, whatever
the number of ranks.

Every method that communicates is a collective: all ranks of the group call it for the same tables in the same order,
each with its own rows, which may be none. Graphs do so if the ranks run the same graphs on microbatches of the same
shapes. Backward passes do not communicate: `accumulate` adds to this rank's sum, and `take_gradient`, which an
optimizer calls, exchanges the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.gradient import RowGradient, coalesce, distinct
from mhc_compile.memory.prefetch import desk
from mhc_compile.memory.tables import MemoryTable, Storage

_LOOKUP, _GRADIENT = 0, 1
_PURPOSES = ("looks up", "sends gradients of")


@dataclass
class _Answer:
    """Values that are being sent."""

    work: dist.Work
    values: Tensor
    """`[distinct rows, width]`; complete when `work` is."""
    sent: Tensor
    """The values sent to others, kept until then."""
    places: Tensor
    """The index of each requested row among the distinct ones."""
    shape: tuple[int, ...]

    def result(self, dtype: torch.dtype) -> Tensor:
        """Wait for the values and return them as `[..., H * width]` in `dtype`."""
        self.work.wait()
        values = self.values.to(dtype).index_select(0, self.places)
        return values.reshape(*self.shape[:-1], self.shape[-1] * values.shape[-1])


class ShardedTable(MemoryTable):
    """A `MemoryTable` of `rows` rows, of which the ranks of `group` hold a run each.

    This rank's are `begin` to before `end`; `weight` `[end - begin, width]` holds them, and optimizers and `state_dict`
    see no others. `fill` and `block` take row numbers of the whole table: `fill` keeps the rows of this rank, `block`
    raises MHC223 for others. `start` draws the same rows as for a table in one piece.

    `take_gradient` returns the mean over the ranks, as if DDP averaged copies of the table: where each rank's loss is
    the mean over its own tokens, that is the gradient of the mean over all of them. Its rows are numbers in `weight`.
    An optimizer with a `process_group` of the ranks that hold the same rows (data parallelism around the shards)
    averages over that as well. The sum over ranks is float32, in the order of the ranks: bit-identical from run to run.
    `gradient` is this rank's part of the sum, with row numbers of the whole table.

    `prefetch` sends the requested rows to their owners, who look them up at once and begin to send them; `collect`
    waits for them. A look-up that began before an optimizer's step is not used after it.

    Constructed by all ranks of the group together, for the same table: MHC630 where they differ. `storage` is `device`
    or `host`; mapped files need no shards, and raise MHC228. A look-up of a row that does not exist raises IndexError
    on its rank and MHC631 on the others; MHC631 everywhere where ranks call different methods or tables.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        group: dist.ProcessGroup,
        *,
        dtype: torch.dtype = torch.float32,
        storage: Storage = "device",
        device: torch.device | str | None = None,
        trainable: bool | None = None,
        hot_rows: int = 0,
    ) -> None:
        if storage == "mapped":
            way_out = 'every rank can map the same files as a whole: MemoryTable(..., storage="mapped")'
            raise MHCError("MHC228", "a sharded table has its rows in memory", way_out=way_out)
        # Before the base class, which allocates the rows of this rank.
        self.group, self.rank, self.size = group, group.rank(), group.size()
        super().__init__(
            rows, width, dtype=dtype, storage=storage, device=device, trainable=trainable, hot_rows=hot_rows
        )
        self.early = True
        self._steps = 0
        self._edges: Tensor | None = None
        kind = (rows, width, str(dtype), self.trainable)
        self._number: int = self._agree({"rows, width, dtype, trainable": kind}, self.handle)[0]
        """The number of the table that all ranks use: its handle on the first rank."""

    # Lookups.

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up values like any table. A collective."""
        return self._ask(rows).result(dtype)

    def prefetch(self, rows: Tensor) -> int:
        """Begin `gather` and return its ticket. A collective; `collect` with a valid ticket is not."""
        return desk().keep(self._ask(rows), self._key(rows))

    def _key(self, rows: Tensor) -> tuple[object, ...]:
        # Equal on all ranks, so that they agree whether a ticket is valid; the state of the rows of one rank is not.
        return (self.handle, self._steps, tuple(rows.shape), rows.device)

    def _ask(self, rows: Tensor) -> _Answer:
        """Send `rows` to their owners, answer the others' requests, and begin to exchange the values."""
        self._filled()
        unique, places = distinct(rows.reshape(-1))
        outside = (unique[:1] < 0).any() | (unique[-1:] >= self.rows).any()
        sends, receives, wrong = self._announce(_LOOKUP, self._counts(unique), outside)
        if wrong:
            self._refuse(unique, wrong)
        requested = _exchange(unique, sends, receives, self.group)
        values = self._own(requested - self.begin)
        received = values.new_empty(len(unique), self.width)
        work = dist.all_to_all_single(received, values, sends, receives, group=self.group, async_op=True)
        assert work is not None
        return _Answer(work, received, values, places, tuple(rows.shape))

    def _own(self, rows: Tensor) -> Tensor:
        """Return the values of rows of this rank, `[m, width]`."""
        if not len(rows):
            return torch.empty(0, self.width, dtype=self.result_dtype, device=rows.device)
        return super().gather(rows[:, None], self.result_dtype)

    def _refuse(self, rows: Tensor, wrong: list[int]) -> NoReturn:
        if self.rank in wrong:
            raise IndexError(f"rows from {int(rows[0])} to {int(rows[-1])} of a table with {self.rows} rows")
        raise MHCError("MHC631", f"rank {wrong[0]} of the group asks for rows outside of {self}")

    # Gradients.

    def take_gradient(self) -> RowGradient | None:
        """Return the mean of `gradient` over the group's ranks, of this rank's rows; None where no rank has any.

        A collective. `gradient` is None afterwards.
        """
        self._steps += 1
        local, device = super().take_gradient(), self.anchor.device
        has = torch.tensor(local is not None, device=device)
        if local is None:
            local = RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, self.width))
        rows, values = local.rows.to(device), local.values.to(device)
        sends, receives, having = self._announce(_GRADIENT, self._counts(rows), has)
        if not having:
            return None
        numbers = _exchange(rows, sends, receives, self.group)
        parts = _exchange(values, sends, receives, self.group)
        # Duplicates are added in the order of the ranks.
        total = coalesce(numbers - self.begin, parts)
        return RowGradient(total.rows, total.values / self.size)

    # Values.

    def start(self, seed: int, deviation: float = 0.02) -> ShardedTable:
        """Draw the rows of this rank as in the whole table. A collective; MHC630 for different seeds."""
        self._agree({"seed, deviation": (seed, deviation)})
        # The weight is allocated also on a rank without rows.
        self.fill(0, torch.empty(0, self.width, device="cpu" if self.weight.is_meta else self.weight.device))
        super().start(seed, deviation)
        return self

    # Communication.

    def _counts(self, rows: Tensor) -> Tensor:
        """Return how many of the ascending `rows` are on each rank, [D]."""
        if self._edges is None or self._edges.device != rows.device:
            edges = [min(r * self.each, self.rows) for r in range(self.size + 1)]
            self._edges = torch.tensor(edges, device=rows.device)
        return torch.searchsorted(rows, self._edges).diff()

    def _announce(self, purpose: int, counts: Tensor, flag: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Tell every rank how many rows it will get; return the numbers sent and received, and who has set the flag."""
        sent = counts.new_empty(self.size, 4)
        sent[:, 0], sent[:, 1] = self._number, purpose
        sent[:, 2], sent[:, 3] = counts, flag
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        sends, receives = torch.stack([sent, received]).tolist()  # one synchronisation with the device
        for rank, (number, other, *_) in enumerate(receives):
            if (number, other) != (self._number, purpose):
                what = f"{_PURPOSES[other]} {'this table' if number == self._number else 'another one'}"
                detail = f"rank {self.rank} of the group {_PURPOSES[purpose]} {self} while rank {rank} {what}"
                raise MHCError("MHC631", detail)
        return [s[2] for s in sends], [r[2] for r in receives], [rank for rank, r in enumerate(receives) if r[3]]

    def _agree(self, shared: dict[str, Any], private: Any = None) -> list[Any]:
        """Return every rank's `private`. Raises MHC630 on every rank where `shared` differs."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (shared, private), group=self.group)
        for rank, (other, _) in enumerate(gathered):
            for name, value in gathered[0][0].items():
                if other.get(name) != value:
                    detail = f"{name}: {value} on rank 0 of the group, {other.get(name)} on rank {rank}"
                    raise MHCError("MHC630", detail)
        return [p for _, p in gathered]

    # The interface of modules.

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a sharded table cannot be copied or pickled: its ranks construct another one together")

    def extra_repr(self) -> str:
        """Return the text of any table, and the rows of this rank."""
        return f"{super().extra_repr()}, rows {self.begin} to {self.end} here"


def _exchange(tensor: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send rank r the next `sends[r]` rows of `tensor`; return `receives[r]` rows from each rank, in their order."""
    out = tensor.new_empty(sum(receives), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), receives, sends, group=group)
    return out
