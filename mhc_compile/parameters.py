"""The trainable parameters of converted streams, kept in float32 under their owner as `owner.mhc`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.forms import form_of, head_values, start_values
from mhc_compile.kernels.memory.engram import ROOT as ENGRAM
from mhc_compile.kernels.memory.memories import NONE, Memories
from mhc_compile.kernels.memory.overencoding_settings import ROOT as OVER_ENCODING
from mhc_compile.kernels.memory.ultramem_settings import ROOT as ULTRAMEM
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT, Start, StartName, start_of
from mhc_compile.memory.optimizer import table_groups
from mhc_compile.memory.parameters import CONTENT_RATIO, lookup_values, new_table
from mhc_compile.memory.parameters import Start as MemoryStart
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.passes.marks import Signature

Model = TypeVar("Model", bound=nn.Module)
DECAYED = (".phi", ".key", ".value", ".projection", ".query", ".keys", ".input")
"""Ends of the names of parameters of ours to which weight decay applies."""
_ADDED = {ENGRAM: (".value", ".conv"), OVER_ENCODING: (".projection",), ULTRAMEM: (".projection",)}
"""By the module of a memory the ends of the names of its parameters that scale what it adds."""


class Started(nn.Module):
    """A module whose tensors know their initial values; or a container of such modules."""

    start: Callable[[], Mapping[str, Tensor]] | None = None
    """Returns those values by name."""

    def __repr__(self) -> str:
        """Return the tensors and the children; equal ones that follow one another in one line."""
        tensors = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        own = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        return "\n".join([own] * bool(own) + _folded(self))

    def reset_parameters(self) -> None:
        """Set the module's own tensors to their initial values, as needed after `to_empty()`."""
        for name, values in (self.start() if self.start is not None else {}).items():
            _set(getattr(self, name), values)


def _folded(module: nn.Module) -> list[str]:
    """Return the lines of the children's `repr`; those of equal ones that follow one another once."""
    lines = []
    texts = [(name, repr(child)) for name, child in module.named_children()]
    for text, group in groupby(texts, key=itemgetter(1)):
        names = [name for name, _ in group]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        first, *rest = text.splitlines()
        # A container's lines are indented below it.
        holds = first.startswith("(")
        count = f" {len(names)} x" if len(names) > 1 else ""
        lines += [f"({name}):{count}" + ("" if holds else f" {first}")]
        lines += [f"  {line}" for line in ([first, *rest] if holds else rest)]
    return lines


class StreamParameters(nn.Module):
    """`phi` [rows, n*C], `alpha` [3] and `bias` [rows] for every site of one stream owner, in float32.

    Those are mHC's; other forms have others (`mhc_compile.kernels.form`).

    Each site's parameters sit in modules nested by its name: `layers.3#0` -> `mhc.layers.3#0.phi`. With the exit
    `head` there are also `head.fn` [n, n*C], `head.base` [n] and `head.scale` [1].

    Parameters of `memories` (`mhc_compile.memory.parameters`) lie at `engram.<layer>`, each with its `table`, and
    `engram.compression` [V] where ids are compressed; at `over_encoding`, W and a table; at `ultramem.<layer>` for each
    layer that reads, and `ultramem` holds their table.

    `sites` maps each site's name, in the order of the stream, to C. `partial` has the smaller sets of them that the
    model's graphs in one mode, training or evaluation, hold; `skipped` names the adds that were not chosen as sites.
    """

    def __init__(
        self,
        spec: StreamSpec,
        sites: Mapping[str, int],
        *,
        options: Options | None = None,
        start: Start = DEFAULT,
        device: torch.device | str | None = None,
        memories: Memories = NONE,
        compression: Tensor | None = None,
        memory_start: MemoryStart = "zero",
        tables_on: torch.device | str | None = None,
        readers: Iterable[str] = (),
        partial: Iterable[Iterable[str]] = (),
        skipped: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.own_readers = tuple(readers)
        """Paths below the owner of the modules in the branches of sites that its own forward adds."""
        self.probe_slot: Tensor | None = None
        """Set in a sampled step, which Dynamo guards on (`mhc_compile.probes`): no buffer, and never saved."""
        self.spec = spec
        self.memories = memories
        self.table_places = {name: table.place for name, table in memories.tables.items()}
        """Where every table lies, by what names it: its layer, `over-encoding` or `ultra-mem`."""
        self.sites = dict(sites)
        self.partial = tuple(frozenset(names) for names in partial)
        self.skipped = tuple(skipped)
        self.options = options or Options()
        self.start = start
        for index, (name, hidden) in enumerate(self.sites.items()):
            self._place(name, functools.partial(start_values, spec, index, hidden, start), device)
        self.hidden = next(iter(self.sites.values()), 0)
        if form_of(spec).head(spec, len(self.sites), self.hidden, start):
            self._place("head", functools.partial(head_values, spec, len(self.sites), self.hidden, start), device)
        for place, start_of_place in lookup_values(memories, spec.streams, self.hidden, start=memory_start).items():
            self._place(place, start_of_place, device)
        for table in memories.tables.values():
            new = new_table(table.rows, table.width, tables_on or device)
            new.ratio = CONTENT_RATIO if table.place == ULTRAMEM else new.ratio
            self.get_submodule(table.place).add_module("table", new)
        if memories.engram is not None and memories.engram.compressed:
            self._place_compression(memories.engram.vocab, compression, device)
        # What `mhc::mark` carries into a graph: static, so that Dynamo reads one string.
        names = tuple(self.in_graph())
        self.signature = str(Signature(str(spec), names, tuple(self.sites), memories, self.partial, self.skipped))

    def _place(
        self, path: str, start: Callable[[], Mapping[str, Tensor]], device: torch.device | str | None
    ) -> nn.Module:
        module: nn.Module = self
        for part in path.split("."):
            if part not in module._modules:
                module.add_module(part, Started())
            module = module.get_submodule(part)
        module.start = start  # type: ignore[assignment]
        with torch.device("meta") if torch.empty(0, device=device).is_meta else nullcontext():
            values = start()
        for name, tensor in values.items():
            module.register_parameter(name, nn.Parameter(tensor.to(device)))
        return module

    def _place_compression(self, vocab: int, ids: Tensor | None, device: torch.device | str | None) -> None:
        empty = torch.empty(vocab, dtype=torch.int64, device=device)
        root = self.get_submodule(ENGRAM)
        root.register_buffer("compression", empty if ids is None else ids.to(device))
        if ids is not None:
            root.start = functools.partial(dict, compression=ids.cpu())  # type: ignore[assignment]

    @property
    def readers(self) -> tuple[str, ...]:
        """Paths below the owner of the modules that compute a site, which may run in the owner's forward only."""
        return (*dict.fromkeys(p for name in self.sites if (p := name.rpartition("#")[0])), *self.own_readers)

    @property
    def reads_ids(self) -> bool:
        """Whether calls look n-grams of token ids up."""
        return self.vocab is not None

    @property
    def vocab(self) -> int | None:
        """V: look-ups reject ids at or above it; None without look-ups."""
        engram, over = self.memories.engram, self.memories.over_encoding
        known = [] if engram is None else [engram.vocab]
        return min(known if over is None else [*known, over.hash.vocab], default=None)

    def in_graph(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are inputs of graphs, by name: all but the rows of tables, which are looked up."""
        return {name: p for name, p in self.named_parameters() if ".table." not in name}

    def kept(self) -> dict[str, Tensor]:
        """Return the tensors of the streams' file in checkpoints: all but tables, which have files of their own."""
        buffers = {name: t for name, t in self.named_buffers() if ".table." not in name}
        return {**self.in_graph(), **buffers}

    def table(self, name: str) -> MemoryTable:
        """Return the table of the memory at the layer `name`, or another of `memories.tables`."""
        table = self.get_submodule(f"{self.table_places[name]}.table")
        assert isinstance(table, MemoryTable)
        return table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamParameters:
        # `model.to(torch.bfloat16)` moves these parameters but leaves them in float32: so are coefficients computed.
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return t.to(out.device) if narrowed else out

        return super()._apply(keep_precision, recurse)

    def reset_parameters(self) -> None:
        """Set every parameter to its start and draw tables anew, as needed after `to_empty()`.

        Every submodule has the method, too, for its own tensors. Rows in files are unchanged.
        """
        for module in self.modules():
            if isinstance(module, (Started, MemoryTable)):
                module.reset_parameters()

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """Return `x`: an owner that calls its children in turn, as `nn.Sequential` does, calls this one too."""
        return x

    def __repr__(self) -> str:
        """Return what `extra_repr` does, and what every site and memory holds."""
        lines = [self.extra_repr(), *_folded(self)]
        return "\n".join(["StreamParameters(", *(f"  {line}" for line in lines), ")"])

    def extra_repr(self) -> str:
        """Return the specification, the number of sites, the layers with a memory, and other look-ups."""
        m = self.memories
        layers = "" if m.engram is None else f", memory at {', '.join(m.engram.paths)}"
        over = "" if m.over_encoding is None else f", over-encoding of n-grams up to {m.over_encoding.hash.order}"
        values = "" if m.ultramem is None else f", {m.ultramem.rows} values looked up by content"
        skipped = f" of {len(self.sites) + len(self.skipped)} adds" if self.skipped else ""
        return f"{self.spec}, {len(self.sites)} sites{skipped}{layers}{over}{values}"


def _set(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor; of a sharded one every rank sets its part, to the values of the first rank."""
    with torch.no_grad():
        if hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(values)


def active_parameters(state: nn.Module) -> StreamParameters:
    """Return the parameters in `owner.mhc`: with PEFT those of the active adapter.

    `modules_to_save=["mhc"]` puts a wrapper in their place, with the original and a trained copy for each adapter.
    """
    if isinstance(state, StreamParameters):
        return state
    wrapper: Any = state
    chosen = [] if wrapper.disable_adapters else [a for a in wrapper.active_adapters if a in wrapper.modules_to_save]
    parameters = wrapper.modules_to_save[chosen[0]] if chosen else wrapper.original_module
    assert isinstance(parameters, StreamParameters)
    return parameters


def stream_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all streams of `model` by full name: with PEFT those of the active adapter.

    They include the parameters of memories, but not the rows of tables: see `mhc_compile.table_groups`.
    """
    ours = {id(p) for parameters in owners(model).values() for p in parameters.in_graph().values()}
    return {name: p for name, p in model.named_parameters() if id(p) in ours}


def stream_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that hold the parameters of streams, of a converted or an emitted model.

    They are for the exclusion lists of quantisers that go by the shape of a parameter. Those that replace `nn.Linear`
    leave the streams alone without a list: `phi` is a parameter of the site.
    """
    converted = [f"{name}.mhc".strip(".") for name in owners(model)]
    sites = ((name, site) for name, module in model.named_modules() for site in getattr(module, "mhc_sites", ()))
    return converted + [f"{name}.{site}".strip(".") for name, site in sites]


def freeze_backbone(model: Model) -> Model:
    """Freeze everything but the parameters of streams and memories, in place, and return the model.

    `model.requires_grad_(True)` undoes it. Raises MHC410 for a model that is not converted.
    """
    converted = owners(model)
    if not converted:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    ours = {id(p) for parameters in converted.values() for p in parameters.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in ours)
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of `model` are trained, and how many of those are streams', tables' and its own."""
    converted = owners(model)
    streams = {id(p) for parameters in converted.values() for p in parameters.in_graph().values()}
    tables = {id(p) for parameters in converted.values() for p in parameters.parameters()} - streams
    trained: Counter[str] = Counter()
    for p in model.parameters():
        kind = "streams" if id(p) in streams else "tables" if id(p) in tables else "backbone"
        trained[kind] += p.numel() if p.requires_grad else 0
    total, every = trained.total(), sum(p.numel() for p in model.parameters())
    share = 100 * total / max(every, 1)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in trained.items() if count)
    print(f"trained: {total:,} of {every:,} parameters ({share:.2f} %){': ' if kinds else ''}{kinds}")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.01,
    lr: float | None = None,
    coefficient_lr: float | None = None,
    steps: int = 0,
) -> list[dict[str, Any]]:
    """Return optimizer groups without weight decay on `alpha` and `bias`, on the head, and on the model's vectors.

    `weight_decay` applies to everything of two and more dimensions, `phi` and the projections of rows included. Without
    `lr` the optimizer's own learning rate is used. `coefficient_lr` is that of the streams' coefficients (`phi`,
    `alpha`, `bias`, the head); without it they have the model's, which the default start suits: they learn in
    proportion to `alpha`. Tables are groups of their own with 5 x `lr`, for `mhc_compile.TableAdamW`; values that are
    looked up by content have 4 x `lr`, which falls to `lr` over so many `steps` of the optimizer (0: it does not fall).

    Raises MHC204 for a model with tables and no `lr`.
    """
    ours = stream_parameters(model)
    coefficients = {
        id(p)
        for of_owner in owners(model).values()
        for name, p in of_owner.in_graph().items()
        if coefficient_lr is not None and name.split(".")[0] not in _ADDED
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(c, d): [] for c in (False, True) for d in (True, False)}
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = name in ours and not name.endswith(DECAYED)
            groups[id(p) in coefficients, not free and p.ndim >= 2].append(p)
    rows = table_groups(model, 1.0 if lr is None else lr, steps=steps)
    if rows and lr is None:
        raise MHCError("MHC204", "tables are trained with 5 x lr", way_out="parameter_groups(model, lr=...)")
    rates = {False: lr, True: coefficient_lr}
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0}
        | ({} if (rate := rates[separate]) is None else {"lr": rate})
        for (separate, decayed), parameters in groups.items()
        if parameters or not separate
    ] + rows


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `torch.compile` and DDP."""
    while isinstance(model, (torch._dynamo.OptimizedModule, nn.parallel.DistributedDataParallel)):
        model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module
    return model


def is_converted(module: nn.Module) -> bool:
    """Return whether `module` is a stream owner whose calls go through the backend (`mhc_compile.owner`)."""
    # Without parameters it is a residual module that something made from the class of a converted one.
    return hasattr(type(module), "_mhc_base") and "mhc" in module._modules


def owners(model: nn.Module) -> dict[str, StreamParameters]:
    """Return the stream parameters of every converted owner in `model`, by the owner's module path."""
    return {
        name: active_parameters(module.get_submodule("mhc"))
        for name, module in model.named_modules(remove_duplicate=False)
        if is_converted(module)
    }


def attention_of(modules: Iterable[nn.Module]) -> str | None:
    """Return the option `attention` of the first converted owner among `modules` that has one."""
    chosen = (active_parameters(m.get_submodule("mhc")).options.attention for m in modules if is_converted(m))
    return next((attention for attention in chosen if attention is not None), None)


def at_start(parameters: StreamParameters) -> bool:
    """Return whether every value is still at a function-preserving start, where look-ups add zero."""
    current = parameters.in_graph()
    if any(current[name].any() for name in added_by_lookups(current)):
        return False
    starts = (StreamParameters(parameters.spec, parameters.sites, start=start_of(n)) for n in get_args(StartName))
    return any(
        all(torch.equal(current[name].detach().cpu().float(), q.detach()) for name, q in start.named_parameters())
        for start in starts
    )


def added_by_lookups(parameters: Iterable[str]) -> list[str]:
    """Return the parameters that scale what look-ups add: a memory's W_V and convolution, others' W."""
    return [name for name in parameters if name.endswith(_ADDED.get(name.split(".")[0], ()))]


def names(items: Iterable[str]) -> str:
    """Return a short list for messages: the first five items and a count."""
    items = list(items)
    return ", ".join(items[:5]) + (f", ... ({len(items)} in all)" if len(items) > 5 else "")
