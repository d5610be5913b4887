"""The table of a memory: storage of its rows, look-ups and gradients.

    storage    rows are                         moved by `.to()`    trained
    device     on the compute device            yes                 float32, bfloat16
    host       in memory, read by the CPU       no                  float32, bfloat16
    mapped     in safetensors files, read-only  no                  no

Rows are float32, bfloat16, or float8_e4m3fn with scales (`mhc_compile.memory.quantise`), whatever the dtype of the
model: `.to(dtype)` does not change a table. Lookups return float32 for float32 tables and bfloat16 for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

import mhc_compile.kernels.memory.gather  # noqa: F401  (registers the ops)
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.registry import enroll
from mhc_compile.memory.gradient import PendingGradient, RowGradient, coalesce
from mhc_compile.memory.hot import HotRows, Planes, Rows
from mhc_compile.memory.lanes import Lookup
from mhc_compile.memory.prefetch import desk
from mhc_compile.memory.quantise import FP8, blocks, dequantise, quantise
from mhc_compile.memory.rows import MappedRows, MemoryRows

Storage = Literal["device", "host", "mapped"]
DTYPES = (torch.float32, torch.bfloat16, FP8)
# Rows that `start` draws from one generator: another number would change the values for a seed.
START_BLOCK = 1 << 14


def row_bytes(width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bytes of a row's planes: its weight and, for float8, its scales."""
    return (width, 4 * blocks(width)) if dtype == FP8 else (width * dtype.itemsize,)


def drawn_rows(
    rows: int, width: int, seed: int, deviation: float, begin: int = 0, end: int | None = None
) -> Iterator[Tensor]:
    """Yield the rows of a table at its start, N(0, `deviation`), float32 on the CPU, block by block.

    With `begin` and `end` only those rows, with the same values as in the whole table.
    """
    end = rows if end is None else end
    generator = torch.Generator()
    for number in range(begin // START_BLOCK, -(-end // START_BLOCK) if begin < end else 0):
        first = number * START_BLOCK
        generator.manual_seed((seed * 1_000_003 + number) & (2**63 - 1))
        # A block is always drawn whole: a shorter draw would give different values.
        size = (min(START_BLOCK, rows - first), width)
        block = torch.empty(size, device="cpu").normal_(0.0, deviation, generator=generator)
        yield block[max(begin - first, 0) : end - first]


class MemoryTable(nn.Module):
    """`rows` rows of `width` channels.

    `weight` `[rows, width]` (and `scale` `[rows, blocks(width)]` for float8) are parameters that never require a
    gradient: gradients are sparse and lie in `gradient`, where ordinary optimizers, clipping and DDP do not look.
    `anchor` is the 0-dim float32 leaf that makes lookups differentiable; it follows the model to its device and
    requires a gradient where the table is `trainable` (default: where it can be). `handle` names the table in graphs.
    Values are not initialised: `start`, `fill` or `load_state_dict` sets them. `hot_rows` bounds a cache in front of
    host and mapped rows.

    A mapped table reads its rows from `files`, and has no parameters. Raises MHC223 for invalid sizes, dtypes and
    storages, and MHC228 where `trainable` is not possible.
    """

    anchor: Tensor
    weight: nn.Parameter
    scale: nn.Parameter
    rank, size = 0, 1
    """The rank of this process among those that share the rows, and their number."""
    ratio: float | None = None
    """The rows' learning rate over the model's, where it is another than that of n-gram memories."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        storage: Storage = "device",
        device: torch.device | str | None = None,
        trainable: bool | None = None,
        files: MappedRows | None = None,
        hot_rows: int = 0,
    ) -> None:
        super().__init__()
        if rows < 1 or width < 1 or dtype not in DTYPES or storage not in get_args(Storage):
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            detail = (
                f"{rows} x {width} {dtype} in {storage!r}; dtypes: {known}; storages: {', '.join(get_args(Storage))}"
            )
            raise MHCError("MHC223", detail)
        sizes = row_bytes(width, dtype)
        if (storage == "mapped") != (files is not None) or (files and (files.rows, files.row_bytes) != (rows, sizes)):
            raise MHCError("MHC223", f"{rows} rows of {sizes} bytes from {files and (files.rows, files.row_bytes)}")
        self.rows, self.width, self.dtype, self.storage = rows, width, dtype, storage
        self.each = -(-rows // self.size)
        self.handle = enroll(self)
        self.early = storage != "device"
        """Whether graphs captured from now on begin a look-up as soon as its rows are known."""
        self.has_optimizer = False
        """Whether an optimizer consumes the gradients."""
        self._pending = PendingGradient()
        self._files = files
        self.hot = HotRows(hot_rows, sizes) if hot_rows and storage != "device" else None
        self._hot_state: tuple[int, int] | None = None
        place = torch.empty(0, device=device).device  # `with torch.device(...)` included
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float32, device=place), persistent=False)
        if storage != "mapped":
            self._allocate(place)
        self.trainable = self._can_train if trainable is None else trainable

    def _allocate(self, device: torch.device) -> None:
        """Make the parameters on `device`, or on the CPU for a host table."""
        if self.storage == "host" and device.type != "meta":
            device = torch.device("cpu")
        values = {"weight": torch.empty(self.held, self.width, dtype=self.dtype, device=device)}
        if self.dtype == FP8:
            values["scale"] = torch.empty(self.held, blocks(self.width), device=device)
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    @property
    def begin(self) -> int:
        """The first row of this process."""
        return min(self.rank * self.each, self.rows)

    @property
    def end(self) -> int:
        """The end of the rows of this process."""
        return min((self.rank + 1) * self.each, self.rows)

    @property
    def held(self) -> int:
        """The number of rows of this process, which `weight` has."""
        return self.end - self.begin

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of lookups."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    @property
    def _can_train(self) -> bool:
        return self.storage != "mapped" and self.dtype != FP8

    @property
    def trainable(self) -> bool:
        """Whether lookups leave gradients. Raises MHC228 when it is switched on for mapped or float8 rows."""
        return self.anchor.requires_grad

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        """Enable or disable gradients of later lookups."""
        if trainable and not self._can_train:
            raise MHCError("MHC228", f"{self}")
        self.anchor.requires_grad_(trainable)

    def requires_grad_(self, requires_grad: bool = True) -> MemoryTable:
        """Set `trainable`; the parameters never require a gradient."""
        self.trainable = requires_grad
        return self

    # Lookups. The ops of `mhc_compile.kernels.memory.gather` call these.

    def forward(self, rows: Tensor) -> Tensor:
        """Look up `rows` `[..., H]` int64: `[..., H * width]` in `result_dtype`, differentiable where `trainable`."""
        return torch.ops.engram_kernels.gather(rows, self.anchor, self.handle, self.width, self.result_dtype)

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values on the device of `rows`, without a gradient. Raises IndexError for a row out of range."""
        if self.storage != "device":
            return self._lookup(rows).run().result(dtype)
        self._filled()
        flat = rows.reshape(-1)
        values = self.weight.detach().index_select(0, flat)
        is_fp8 = self.dtype == FP8
        values = dequantise(values, self.scale.index_select(0, flat), dtype) if is_fp8 else values.to(dtype)
        return values.reshape(*rows.shape[:-1], rows.shape[-1] * self.width)

    def prefetch(self, rows: Tensor) -> int:
        """Begin `gather` in the worker and return its ticket, 0 for a table on the compute device."""
        return 0 if self.storage == "device" else desk().submit(self._lookup(rows), self._key(rows))

    def collect(self, ticket: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `gather(rows, dtype)`, from the lookup that `prefetch` began if it is still valid."""
        lookup = desk().claim(ticket, self._key(rows)) if ticket else None
        return self.gather(rows, dtype) if lookup is None else lookup.result(dtype)

    def _lookup(self, rows: Tensor) -> Lookup:
        return Lookup(rows, self.held, self.width, self._read, self._finish)

    def _key(self, rows: Tensor) -> tuple[object, ...]:
        return (self.handle, self._state(), tuple(rows.shape), rows.device)

    def _state(self) -> tuple[int, int]:
        """Return a value that differs after every change of the rows."""
        if self.storage == "mapped":
            return (0, 0)
        weight = self.weight
        return (weight.data_ptr(), 0 if weight.is_inference() else weight._version)

    def _read(self, rows: Rows) -> list[Tensor]:
        if self.hot is None:
            planes = self._source().read(rows)
        else:
            if (state := self._state()) != self._hot_state:
                self.hot.clear()
                self._hot_state = state
            planes = self.hot.fetch(rows, lambda missing: self._source().read(missing))
        return self._typed(planes)

    def _typed(self, planes: Planes) -> list[Tensor]:
        dtypes = (self.dtype, torch.float32)
        # Flat between the two views: an array without rows has odd strides.
        return [
            torch.from_numpy(p.reshape(-1)).view(dtype).view(len(p), p.shape[1] // dtype.itemsize)
            for p, dtype in zip(planes, dtypes, strict=False)
        ]

    def _source(self) -> MappedRows | MemoryRows:
        if self._files is not None:
            return self._files
        self._filled()
        return MemoryRows([p for _, p in self.named_parameters()])

    def _filled(self) -> None:
        if self.weight.is_meta:
            raise MHCError("MHC223", f"{self} has no rows yet", way_out="fill it, or load its state_dict, first")

    def _finish(self, planes: list[Tensor]) -> Tensor:
        return dequantise(planes[0], planes[1], self.result_dtype) if self.dtype == FP8 else planes[0]

    # Gradients.

    @property
    def gradient(self) -> RowGradient | None:
        """The sum over backward passes since an optimizer took it, float32, on the device they ran on."""
        return self._pending.peek()

    def accumulate(self, rows: Tensor, values: Tensor, *, summed: bool = False) -> None:
        """Add the gradient of one lookup: `values` `[m, width]` of the m `rows` (any shape). Raises MHC228.

        `summed`: the rows ascend and are all different, and nothing else holds the values, which are float32.
        """
        if not self._can_train:
            raise MHCError("MHC228", f"{self}")
        part = RowGradient(rows, values) if summed else coalesce(rows.reshape(-1), values)
        self._pending.add(part, "" if self.has_optimizer else str(self))

    def take_gradient(self) -> RowGradient | None:
        """Return `gradient` and set it to None; its rows are those of `weight`."""
        self.anchor.grad = None
        return self._pending.take()

    def drop_gradient(self) -> None:
        """Set `gradient` to None."""
        self.anchor.grad = None
        self._pending = PendingGradient()

    # Values.

    @torch.no_grad()
    def fill(self, start: int, values: Tensor, scale: Tensor | None = None) -> MemoryTable:
        """Set the rows from `start` on to `values` `[r, width]`; float8 tables take floats, or float8 with its `scale`.

        Of a sharded table, those of this process. A table on the meta device is allocated at its first `fill`: on the
        CPU, or on the device of `values` where its storage is `device`. Raises MHC223 for values that do not fit and
        MHC228 for a mapped table.
        """
        if self.storage == "mapped":
            raise MHCError("MHC228", f"{self}")
        if values.ndim != 2 or values.shape[1] != self.width or start < 0 or start + len(values) > self.rows:
            raise MHCError("MHC223", f"{list(values.shape)} at row {start} of {self}")
        if self.weight.is_meta:
            self.to_empty(device=values.device)
        first, last = max(start, self.begin), min(start + len(values), self.end)
        if first >= last:
            return self
        values = values[first - start : last - start]
        here = slice(first - self.begin, last - self.begin)
        if self.dtype == FP8 and scale is None:
            values, scale = quantise(values)
        elif scale is not None:
            scale = scale[first - start : last - start]
        self.weight[here] = values.to(self.weight.device)
        if scale is not None:
            self.scale[here] = scale.to(self.scale.device)
        return self

    def block(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows from `begin` to before `end` as they are stored, on the CPU, and the scales of float8 ones.

        Raises MHC223 for a table on the meta device, and for rows of other processes.
        """
        if not self.begin <= begin <= end <= self.end:
            way_out = "ask the rank that holds these rows for them"
            detail = f"rows {begin} to {end}; those from {self.begin} to {self.end} of {self} lie here"
            raise MHCError("MHC223", detail, way_out=way_out)
        if self._files is not None:
            planes = self._typed(self._files.read(np.arange(begin, end)))
        else:
            self._filled()
            planes = [p[begin - self.begin : end - self.begin].detach().cpu() for _, p in self.named_parameters()]
        return planes[0], planes[1] if len(planes) > 1 else None

    def start(self, seed: int, deviation: float = 0.02) -> MemoryTable:
        """Draw all rows from N(0, `deviation`): the same for a seed on every device, in every storage."""
        begin = self.begin
        for block in drawn_rows(self.rows, self.width, seed, deviation, self.begin, self.end):
            self.fill(begin, block if self.weight.is_meta else block.to(self.weight.device))
            begin += len(block)
        return self

    def reset_parameters(self) -> None:
        """Draw all rows from torch's default generator, as after `to_empty()`; rows in files are unchanged."""
        if self.storage != "mapped":
            self.start(int(torch.randint(2**31, (), device="cpu")))

    # The interface of modules.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryTable:
        def move(t: Tensor) -> Tensor:
            # An empty tensor shows the device: `fn` must not copy a table only to change its dtype.
            device = fn(t.new_empty(0)).device
            if t is not self.anchor and self.storage == "host" and device.type != "meta":
                device = torch.device("cpu")
            if device == t.device:
                return t
            if t is self.anchor:
                return torch.zeros((), device=device).requires_grad_(t.requires_grad)
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        for name, p in self._parameters.items():
            values = state_dict.get(prefix + name)
            if not isinstance(values, Tensor) or p is None:
                continue
            if values.dtype != p.dtype and FP8 in (values.dtype, p.dtype):
                detail = f"{prefix}{name} is {values.dtype} and the table {p.dtype}"
                error_msgs.append(str(MHCError("MHC223", detail)))
                return
            if local_metadata.get("assign_to_params_buffers"):
                device = "cpu" if self.storage == "host" else values.device
                state_dict[prefix + name] = values.detach().to(device, p.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.anchor.is_meta and self._parameters and not self.weight.is_meta:
            anchor = torch.zeros((), device=self.weight.device).requires_grad_(self.trainable)
            super()._apply(lambda t: t if t is not self.anchor else anchor)

    def __getstate__(self) -> dict[str, Any]:
        # float8 as bytes: torch's pickles do not know the dtype.
        values = {n: p.detach().view(torch.uint8) if p.dtype == FP8 else p for n, p in self.named_parameters()}
        return {**self.__dict__, "_parameters": values, "handle": 0, "_hot_state": None, "has_optimizer": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = state["_parameters"]
        if state["dtype"] == FP8 and values:
            values["weight"] = nn.Parameter(values["weight"].view(FP8), requires_grad=False)
        super().__setstate__(state)
        self.handle = enroll(self)

    def extra_repr(self) -> str:
        """Return size, dtype, storage, and the cache's hit rate."""
        text = f"{self.rows} x {self.width}, {str(self.dtype).removeprefix('torch.')}, {self.storage}"
        return f"{text}, {self.hot.capacity} hot rows hit {self.hot.hit_rate:.0%}" if self.hot else text
