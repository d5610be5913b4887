"""Tables cut by rows over the ranks of a process group: look-ups and gradients travel, rows stay where they lie.

    look-up     this rank's distinct rows -> their owners -> values back      three all-to-alls: how many, which, values
    gradient    sums over this rank's passes -> the owners, who add them      the same three, once a step

With R rows and D ranks, rank r holds the rows `r * ceil(R / D)` to before `(r + 1) * ceil(R / D)`, as far as there are
any: ranks at the end may hold fewer, or none. A look-up of m distinct rows sends `8 m` bytes of row numbers and gets m
rows back, whatever the number of ranks; duplicates do not travel.

Every method that travels is a collective: all ranks of the group call it for the same tables in the same order, each
with its own rows, which may be none. Graphs do so by themselves where the ranks run the same graphs on microbatches of
the same shapes, in the same order. Backward passes exchange nothing: `accumulate` only adds to this rank's sum, and
`take_gradient`, which an optimizer calls, exchanges the sums. So threads of autograd never meet a collective, unless a
graph recomputes a look-up.
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
    """Values on their way."""

    work: dist.Work
    values: Tensor
    """`[distinct rows, width]`; there when `work` is done."""
    sent: Tensor
    """Kept until then."""
    places: Tensor
    """Of each row that was asked for among the distinct ones."""
    shape: tuple[int, ...]

    def result(self, dtype: torch.dtype) -> Tensor:
        """`[..., H * width]` in `dtype`; waits for the values."""
        self.work.wait()
        found = self.values.to(dtype).index_select(0, self.places)
        return found.reshape(*self.shape[:-1], self.shape[-1] * found.shape[-1])


class ShardedTable(MemoryTable):
    """A `MemoryTable` of `rows` rows, of which the ranks of `group` hold a run each.

    This rank's are `begin` to before `end`; `weight` `[end - begin, width]` holds them, and optimizers and `state_dict`
    see no others. `fill` and `block` take row numbers of the whole table: `fill` keeps what belongs here, `block` gives
    no others (MHC223). `start` draws the same rows as for a table in one piece.

    `take_gradient` gives the mean over the ranks of the group, as if each had a copy of the table that DDP averages:
    where each rank's loss is the mean over its own tokens, that is the gradient of the mean over all of them. Its rows
    are numbers in `weight`. An optimizer with a `process_group` of the ranks that hold the same rows (data parallelism
    around the shards) averages over that again, which makes the mean over all. The sum over ranks is float32, in the
    order of the ranks: equal bit by bit from run to run, and to the gradient of a table in one piece up to the rounding
    of a sum in another order. `gradient` is this rank's part of the sum, with row numbers of the whole table.

    `prefetch` sends the rows that are asked for to their owners, who look them up at once and begin to send them;
    `collect` waits for them. As an optimizer's step changes rows, a look-up that began before it is not good after it.

    Constructed by all ranks of the group together, for the same table: MHC630 where they differ. `storage` is `device`
    or `host`; mapped files need no shards, and raise MHC228. Look-ups raise IndexError on the rank that asks for a row
    that there is not, and MHC631 on the others; MHC631 everywhere where ranks call different methods or tables.
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
        # In front of the rest, which makes as many rows as lie here.
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.each = -(-rows // self.size)
        super().__init__(
            rows, width, dtype=dtype, storage=storage, device=device, trainable=trainable, hot_rows=hot_rows
        )
        self.early = True
        self._steps = 0
        self._edges: Tensor | None = None
        said = (rows, width, str(dtype), self.trainable)
        agreed = self._agree({"rows, width, dtype, trainable": said}, self.handle)
        self._number: int = agreed[0]
        """By which the ranks know the table among all: its handle on the first of them."""

    @property
    def begin(self) -> int:
        """The first row that lies here."""
        return min(self.rank * self.each, self.rows)

    @property
    def end(self) -> int:
        """Behind the last row that lies here."""
        return min((self.rank + 1) * self.each, self.rows)

    # Lookups.

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """As of any table. A collective."""
        return self._ask(rows).result(dtype)

    def prefetch(self, rows: Tensor) -> int:
        """Begin `gather`; returns the ticket. A collective, which `collect` is not where its ticket is good."""
        return desk().keep(self._ask(rows), self._key(rows))

    def _key(self, rows: Tensor) -> tuple[object, ...]:
        # The same on all ranks, so that they agree whether a ticket is good: not the state of the rows that lie here.
        return (self.handle, self._steps, tuple(rows.shape), rows.device)

    def _ask(self, rows: Tensor) -> _Answer:
        """Send `rows` to their owners, answer what the others ask, and begin to exchange the values."""
        self._filled()
        found, places = distinct(rows.reshape(-1))
        asks = self._counts(found)
        given, wanted, wrong = self._announce(_LOOKUP, asks, (found[:1] < 0).any() | (found[-1:] >= self.rows).any())
        if wrong:
            self._refuse(found, wrong)
        asked = _exchange(found, given, wanted, self.group)
        values = self._own(asked - self.begin)
        received = values.new_empty(len(found), self.width)
        work = dist.all_to_all_single(received, values, given, wanted, group=self.group, async_op=True)
        assert work is not None
        return _Answer(work, received, values, places, tuple(rows.shape))

    def _own(self, rows: Tensor) -> Tensor:
        """Values of rows that lie here, `[m, width]`."""
        if not len(rows):
            return torch.empty(0, self.width, dtype=self.result_dtype, device=rows.device)
        return super().gather(rows[:, None], self.result_dtype)

    def _refuse(self, found: Tensor, wrong: list[int]) -> NoReturn:
        if self.rank in wrong:
            raise IndexError(f"rows from {int(found[0])} to {int(found[-1])} of a table with {self.rows} rows")
        raise MHCError("MHC631", f"rank {wrong[0]} of the group asks for rows outside of {self}")

    # Gradients.

    def take_gradient(self) -> RowGradient | None:
        """The mean of `gradient` over the group's ranks, of the rows that lie here; None where no rank has any.

        A collective. `gradient` is None afterwards.
        """
        self._steps += 1
        own, device = super().take_gradient(), self.anchor.device
        has = torch.tensor(own is not None, device=device)
        if own is None:
            own = RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, self.width))
        rows, values = own.rows.to(device), own.values.to(device)
        given, wanted, having = self._announce(_GRADIENT, self._counts(rows), has)
        if not having:
            return None
        numbers = _exchange(rows, given, wanted, self.group)
        parts = _exchange(values, given, wanted, self.group)
        # They lie in the order of the ranks, and are added in the order in which they lie.
        total = coalesce(numbers - self.begin, parts)
        return RowGradient(total.rows, total.values / self.size)

    # Values.

    def start(self, seed: int, deviation: float = 0.02) -> ShardedTable:
        """Draw the rows that lie here, as they are in the whole table. A collective; MHC630 for different seeds."""
        self._agree({"seed, deviation": (seed, deviation)})
        # Where no row lies here, too, the weight is made.
        self.fill(0, torch.empty(0, self.width, device="cpu" if self.weight.is_meta else self.weight.device))
        super().start(seed, deviation)
        return self

    # What the ranks say to each other.

    def _counts(self, found: Tensor) -> Tensor:
        """How many of the ascending rows `found` lie on each rank, [D]."""
        if self._edges is None or self._edges.device != found.device:
            edges = [min(r * self.each, self.rows) for r in range(self.size + 1)]
            self._edges = torch.tensor(edges, device=found.device)
        return torch.searchsorted(found, self._edges).diff()

    def _announce(self, purpose: int, counts: Tensor, flag: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Tell every rank how many rows it will get: how many it gives, how many they give, who has set the flag."""
        said = counts.new_empty(self.size, 4)
        said[:, 0], said[:, 1] = self._number, purpose
        said[:, 2], said[:, 3] = counts, flag
        heard = torch.empty_like(said)
        dist.all_to_all_single(heard, said, group=self.group)
        given, wanted = torch.stack([said, heard]).tolist()  # one wait for the device
        for rank, (number, other, *_) in enumerate(wanted):
            if (number, other) != (self._number, purpose):
                what = f"{_PURPOSES[other]} {'this table' if number == self._number else 'another one'}"
                detail = f"rank {self.rank} of the group {_PURPOSES[purpose]} {self} while rank {rank} {what}"
                raise MHCError("MHC631", detail)
        return [g[2] for g in given], [w[2] for w in wanted], [r for r, w in enumerate(wanted) if w[3]]

    def _agree(self, said: dict[str, Any], private: Any = None) -> list[Any]:
        """What every rank gives as `private`. Raises MHC630, on every rank, where they say different things."""
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, (said, private), group=self.group)
        for rank, (other, _) in enumerate(heard):
            for name, value in heard[0][0].items():
                if other.get(name) != value:
                    detail = f"{name}: {value} on rank 0 of the group, {other.get(name)} on rank {rank}"
                    raise MHCError("MHC630", detail)
        return [p for _, p in heard]

    # What modules do.

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a sharded table cannot be copied or pickled: its ranks construct another one together")

    def extra_repr(self) -> str:
        """As of any table, and which rows lie here."""
        return f"{super().extra_repr()}, rows {self.begin} to {self.end} here"


def _exchange(tensor: Tensor, given: list[int], wanted: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give rank r the next `given[r]` of `tensor`; returns what the ranks give, `wanted[r]` each, in their order."""
    out = tensor.new_empty(sum(wanted), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), wanted, given, group=group)
    return out
