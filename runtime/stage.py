"""Pipeline stages: parts of a program as modules, with parameters under the names they have in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mhc_compile.capture import private_copy
from mhc_compile.config import Options
from mhc_compile.integrations.transformers import IDS
from mhc_compile.kernels.memory.engram import layers_of
from mhc_compile.memory.parameters import tables
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.passes.base import Context, value
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.passes.recompute import Recompute
from mhc_compile.passes.stages import Piece, outputs_of, site_nodes, split_graph
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.unit import Compiled, FromPrevious, ModelInput, Owned, Source, Unit

Units = Literal["stage", "blocks"]
TableFactory = Callable[[int, int, torch.dtype, str], MemoryTable]
"""Makes a table of so many rows of such a width, dtype and storage on the meta device."""


class Stage(nn.Module):
    """One pipeline stage.

    Parameters lie in modules nested by their names in the model, floating-point ones as float32 masters; the graph
    computes in the model's own dtypes. They are on the meta device until `materialise`. A stage is one compiled unit,
    or with `units="blocks"` a chain of them, cut where recompute blocks (without recompute: layers) begin, for FSDP to
    wrap: `stage.units` holds them.

    `forward(*crossing, **inputs)`: what crosses from the stage before, and the inputs that the model's forward takes,
    by name; the first stage gets the token ids as its one positional argument. Returns what crosses to the next stage,
    a tuple of `[b, S, n, C]` and of what else later branches read, or the logits `[b, S, V]` of the last one, with the
    auxiliary loss behind them where the model has one.
    """

    def __init__(
        self,
        program: Program,
        piece: Piece,
        *,
        index: int,
        count: int,
        options: Options,
        tied: frozenset[str],
        device: torch.device | str,
        units: Units,
        split: bool,
        make_table: TableFactory,
        made: dict[str, MemoryTable],
    ) -> None:
        super().__init__()
        self.index, self.count, self.options = index, count, options
        self.device = torch.device(device)
        self.piece = piece
        self.tied = tied
        """Names of its parameters and tables that other stages hold as well: their gradients must be summed."""
        self.tables: dict[str, MemoryTable] = {}
        """The tables of its memories by their names in the model."""
        self._program = program
        self._make_table, self._made = make_table, made
        self._blocked = units == "blocks"
        pieces = [piece]
        if self._blocked:
            marked = tagged(piece.graph, options)
            pieces = split_graph(marked, _unit_starts(marked), piece.crosses_in)
            options = replace(options, recompute="off")  # the tags say it already
        users = Counter(name for p in pieces for name in _placeholders(p))
        takes = {
            n.name: value(n).dtype
            for p in pieces
            for n in p.graph.graph.find_nodes(op="placeholder")
            if program.names.get(n.name) in program.parameters
        }
        narrow = min(takes.values(), key=lambda dtype: dtype.itemsize, default=None)
        self._sources: dict[str, Source] = {}
        """Where each placeholder comes from, by its name."""
        shared: dict[str, Compiled] = {}
        units_of_stage = []
        for p in pieces:
            unit = Unit(self._with_own_tables(p), options, split=split, shared=shared)
            for name in _placeholders(p):
                alone = self._blocked and users[name] == 1 and program.names.get(name) not in tied
                alone = alone and takes.get(name, narrow) == narrow  # a unit gathers all it holds in one dtype
                if name not in self._sources:
                    self._sources[name] = self._source(name, _node(p.graph, name), unit if alone else self)
            unit.sources = tuple(
                FromPrevious(name) if name in p.crosses_in else self._sources[name] for name in _placeholders(p)
            )
            units_of_stage.append(unit)
        # In a plain list units are no submodules: the parameters are the stage's.
        self.units: Sequence[Unit] = (
            nn.ModuleList(units_of_stage) if self._blocked else units_of_stage  # type: ignore[assignment]
        )

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        """What balances its experts, by name: parameters without gradient, which the training loop moves."""
        return {name: p for name, p in self.named_parameters() if name in self._program.biases}

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Tensors like its positional arguments, on the meta device."""
        if self.index == 0:
            ids = next(placeholder for placeholder, name in self._program.inputs.items() if name == IDS)
            return (_meta(value(_node(self._program.graph, ids))),)
        return tuple(_meta(value(_node(self.piece.graph, name))) for name in self.piece.crosses_in)

    @property
    def example_outputs(self) -> tuple[Tensor, ...]:
        """Tensors like its results, on the meta device."""
        return tuple(_meta(value(n)) for n in outputs_of(self.piece.graph.graph))

    def forward(self, *crossing: Tensor, **inputs: Tensor) -> Any:
        """Run the stage, see the class."""
        carried: dict[str, Tensor] = {}
        if self.index:
            carried = dict(zip(self.piece.crosses_in, crossing, strict=True))
        elif crossing:
            inputs = {IDS: crossing[0], **inputs}
        for unit in self.units:
            out = unit(carried, inputs)
            carried |= dict(zip(unit.piece.crosses_out or self.piece.crosses_out, out, strict=False))
        if self.index == self.count - 1:
            return out if len(out) > 1 else out[0]
        # Clone what passes through, so that outputs never alias inputs.
        through = set(self.piece.crosses_in)
        return tuple(carried[n].clone() if n in through else carried[n] for n in self.piece.crosses_out)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters as any module does, under the names of the unsplit model."""
        for name, p in super().named_parameters("", recurse, remove_duplicate):
            plain = name.split(".", 2)[2] if self._blocked and name.startswith("units.") else name
            yield f"{prefix}.{plain}" if prefix else plain, p

    def train(self, mode: bool = True) -> Stage:
        """Set the mode as any module does, also for units that are no submodules."""
        for unit in self.units:
            unit.train(mode)
        return super().train(mode)

    def materialise(self) -> None:
        """Allocate the parameters that are on the meta device; their values are not set."""
        self._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t)

    def forget_casts(self) -> None:
        """Cast parameters again at the next call, because their values have changed.

        Changes in place are noticed without it, except those of FSDP when it gathers.
        """
        for source in self._sources.values():
            if isinstance(source, Owned):
                source.casts.clear()

    def prepare(self, **inputs: Tensor) -> None:
        """Compile now, for the mode the stage is in, instead of at the first call."""
        for unit in self.units:
            fakes = [_node(unit.piece.graph, s.name) for s in unit.sources if isinstance(s, FromPrevious)]
            zeros = {n.name: torch.zeros_like(_meta(value(n)), device=self.device) for n in fakes}
            unit.compiled(unit.arguments(zeros, inputs))

    def dw_builder(self) -> Callable[[], None]:
        """Return a function that computes the weights' gradients that the last backward has deferred.

        `PipelineStage` calls both once.
        """
        functions = [f for unit in self.units for f in unit.functions]
        deferred = [work for f in functions for work in f.deferred]
        for f in functions:
            f.deferred.clear()

        def run() -> None:
            for work in deferred:
                work()

        return run

    def take_counted(self) -> dict[str, Tensor]:
        """Return the sums of the stage's counters over the microbatches since the last call, float64, by name."""
        counted = {name: t for unit in self.units for name, t in unit.counted.items()}
        for unit in self.units:
            unit.counted.clear()
        return counted

    def begin_recompute(self) -> None:
        """Recompute what the next backward needs first, before the gradient of its output is there."""
        for unit in self.units:
            for f in unit.functions:
                f.begin_recompute()

    def _with_own_tables(self, piece: Piece) -> Piece:
        """Let the look-ups of `piece` use this stage's tables."""
        for node in piece.graph.graph.nodes:
            position = _HANDLE.get(node.target)
            if position is None:
                continue
            name = self._program.tables.get(node.args[position])
            if name is not None:
                node.update_arg(position, self._table(name).handle)
        piece.graph.recompile()
        return piece

    def _table(self, name: str) -> MemoryTable:
        if name not in self.tables:
            hollow = self._program.model.get_submodule(name)
            assert isinstance(hollow, MemoryTable)
            if name not in self._made:
                self._made[name] = self._make_table(hollow.rows, hollow.width, hollow.dtype, hollow.storage)
                self._made[name].ratio = hollow.ratio
            self.tables[name] = self._made[name]
            _parent(self, name).add_module(name.rpartition(".")[2], self.tables[name])
        return self.tables[name]

    def _source(self, placeholder: str, node: Node, root: nn.Module) -> Source:
        """Return the source of a placeholder's values; a parameter or buffer is registered at its path under `root`."""
        if placeholder in self._program.inputs:
            return ModelInput(self._program.inputs[placeholder])
        if placeholder not in self._program.names:
            return FromPrevious(placeholder)
        name = self._program.names[placeholder]
        table, _, attribute = name.rpartition(".")
        if table in self.tables:
            return Owned(self.tables[table], attribute, value(node).dtype)
        parent = _parent(root, name)
        balances = name in self._program.biases
        if balances or name in self._program.parameters:
            like = self._program.buffers[name] if name in self._program.buffers else self._program.parameters[name]
            dtype = torch.float32 if like.is_floating_point() else like.dtype
            empty = torch.empty(like.shape, dtype=dtype, device="meta")
            learns = like.requires_grad and not balances
            parent.register_parameter(attribute, nn.Parameter(empty, requires_grad=learns))
        else:
            buffer = self._program.buffers[name].to(self.device, copy=True)
            parent.register_buffer(attribute, buffer, persistent=False)
        return Owned(parent, attribute, value(node).dtype)


_HANDLE = {
    torch.ops.engram_kernels.gather.default: 2,
    torch.ops.engram_kernels.prefetch.default: 1,
    torch.ops.engram_kernels.collect.default: 3,
}
"""Where an operation carries the number of its table."""


def build_stages(
    program: Program,
    starts: Sequence[int],
    *,
    indices: Sequence[int],
    options: Options,
    device: torch.device | str = "cpu",
    units: Units = "stage",
    split: bool = False,
    make_table: TableFactory | None = None,
    kind: type[Stage] = Stage,
) -> list[Stage]:
    """Return the stages numbered `indices` of the program cut before the sites `starts`, on the meta device.

    A table that several of these stages hold is one, and parameters are one and the same once `materialise_all` has
    run. `kind`: a subclass for them. Raises MHC620 and MHC621 as `mhc_compile.passes.stages.split_graph`.
    """
    pieces = split_graph(program.graph, starts)
    shared = tied(program, pieces)
    made: dict[str, MemoryTable] = {}
    return [
        kind(
            program, pieces[i], index=i, count=len(pieces), options=options,
            tied=frozenset(name for name, holders in shared.items() if i in holders),
            device=device, units=units, split=split, make_table=make_table or plain_table, made=made,
        )
        for i in indices
    ]  # fmt: skip


def tied(program: Program, pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """Return the trained parameters, and the tables, that several stages hold, with those stages, in the model's order.

    Layers that look values up by content share a table; one of n-grams belongs to a single layer.
    """
    names_of = [
        {program.names.get(name, "") for name in _placeholders(p)}
        | {program.tables.get(n.args[_HANDLE[n.target]], "") for n in p.graph.graph.nodes if n.target in _HANDLE}
        for p in pieces
    ]
    trained = [name for name, p in program.parameters.items() if p.requires_grad]
    trained += [name for name, table in tables(program.model) if table.trainable]
    holders = {name: tuple(i for i, names in enumerate(names_of) if name in names) for name in trained}
    return {name: stages for name, stages in holders.items() if len(stages) > 1}


def materialise_all(stages: Sequence[Stage]) -> None:
    """Allocate the parameters of one rank's stages; a parameter that two of them hold becomes one."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        stage.materialise()
        for name in stage.tied - stage.tables.keys():
            parent, attribute = _parent(stage, name), name.rpartition(".")[2]
            if name in first:
                parent._parameters[attribute] = first[name]
            else:
                first[name] = parent._parameters[attribute]  # type: ignore[assignment]


def plain_table(rows: int, width: int, dtype: torch.dtype, storage: str) -> MemoryTable:
    """Return a table that one rank holds as a whole."""
    return MemoryTable(rows, width, dtype=dtype, storage=storage, device="meta")  # type: ignore[arg-type]


def tagged(graph: GraphModule, options: Options) -> GraphModule:
    """Return a copy of a stage's graph with its recompute blocks chosen. Raises MHC626 for bytes that nothing fits."""
    passes = () if options.recompute == "off" else (Recompute(options.recompute, options.kinds),)
    return Pipeline(passes).run(private_copy(graph), Context(), debug=options.debug, provided=("dialect",))


def _unit_starts(graph: GraphModule) -> list[int]:
    """Return the sites, counted in the stage, at which units after the first begin: those of blocks, or of layers."""
    coefficient_calls = site_nodes(graph.graph)
    blocks = [n.meta.get("ac_graph_id") for n in coefficient_calls]
    if any(blocks):
        return [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]]
    names = [str(n.meta["mhc_site"]) for n in coefficient_calls]
    first = set(layers_of(names).values())
    return [i for i, name in enumerate(names) if i and name in first]


def _parent(root: nn.Module, name: str) -> nn.Module:
    """Return the module that is to hold `name`; create it where it is missing."""
    module = root
    for part in name.split(".")[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _placeholders(piece: Piece) -> list[str]:
    return [n.name for n in piece.graph.graph.find_nodes(op="placeholder")]


def _node(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def _meta(fake: Any) -> Tensor:
    return torch.empty(tuple(int(d) for d in fake.shape), dtype=fake.dtype, device="meta")
