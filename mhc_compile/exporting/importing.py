"""Exported programs in the torch dialect, as torch-mlir's importer writes it, each chain a function."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from mhc_compile.diagnostics import MHCError
from mhc_compile.exporting.functions import split
from mhc_compile.passes.base import shape

ENTRY = "main"
"""Name of the function that is the program."""


def torch_mlir(name: str) -> Any:
    """Return the module `torch_mlir.<name>`. Raises MHC505 where torch-mlir is not installed."""
    try:
        return importlib.import_module(f"torch_mlir.{name}")
    except ImportError as error:
        raise MHCError("MHC505") from error


def imported(exported: ExportedProgram) -> Any:
    """Return the program as a `torch_mlir.ir.Module` of `main` and the functions it calls.

    Raises `MHCError`: MHC505 without torch-mlir, MHC506 where its importer has no form for an operation.
    """
    ir, importing = torch_mlir("ir"), torch_mlir("extras.fx_importer")
    program = _importable(exported)
    paths = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    _give_arguments(program)
    functions = split(program.graph_module, paths)
    context = ir.Context()
    torch_mlir("dialects.torch").register_dialect(context)
    importer = importing.FxImporter(context=context, graph_node_importer_cls=_node_importer())
    try:
        for f in functions:
            function = importer.import_stateless_graph(f.body.graph, func_name=f.name, func_visibility="private")
            _name(function, "arg_attrs", f.arguments)
            _name(function, "res_attrs", f.results)
        main = importer.import_frozen_program(program, func_name=ENTRY)
    except (NotImplementedError, AssertionError) as error:
        raise MHCError("MHC506", str(error)) from error
    inputs = [n.name for n in program.graph.find_nodes(op="placeholder")]
    _name(main, "arg_attrs", [paths.get(name, name) for name in inputs])
    return importer.module


def _node_importer() -> Any:
    """Return torch-mlir's importer class, extended to calls of functions."""
    ir, func = torch_mlir("ir"), torch_mlir("dialects.func")

    class Importer(torch_mlir("extras.fx_importer").GraphNodeImporter):  # type: ignore[misc]
        def _import_hop_mhc_call(self, loc: Any, node: Node, hop: Any) -> None:  # noqa: ARG002
            name, *arguments = node.args
            operands = [self._import_argument(loc, a) for a in arguments]
            types = [self._cc.value_info_to_type(v) for v in node.meta["val"]]
            call = func.CallOp(types, ir.FlatSymbolRefAttr.get(name), operands, loc=loc)
            self._multi_result_nodes.add(node)
            for i, result in enumerate(call.results):
                self.bind_node_value(node, result, i)

    return Importer


def _name(function: Any, attribute: str, names: list[str]) -> None:
    """Name a function's arguments or results."""
    ir = torch_mlir("ir")
    with function.context:
        named = [ir.DictAttr.get({"mhc.name": ir.StringAttr.get(name)} if name else {}) for name in names]
        function.attributes[attribute] = ir.ArrayAttr.get(named)


def _importable(exported: ExportedProgram) -> ExportedProgram:
    """Return a copy in torch-mlir's operations, with what its importer does not know rewritten.

    It looks for every buffer in the state dict, where the non-persistent ones (rotary frequencies) are not: they become
    constants. Inputs that are numbers, flags or None have their values in the program already and are dropped.
    """
    table = torch_mlir("extras.fx_decomp_util").get_decomposition_table()
    aten = torch.ops.aten
    rewritten = {aten.view.default: _view, aten.cumsum.default: _cumsum, aten.cummax.default: _cummax}
    program = exported.run_decompositions({**table, **rewritten})
    graph = program.graph_module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # what the types say
    for node in graph.nodes:
        # MLIR has no devices, and torch-mlir no lowering of what is made on "meta".
        node.args, node.kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (node.args, node.kwargs))
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        _say_collapse(node)
    kept = []
    for spec in program.graph_signature.input_specs:
        if isinstance(spec.arg, ConstantArgument) and not placeholders[spec.arg.name].users:
            graph.erase_node(placeholders[spec.arg.name])
            continue
        if spec.kind is InputKind.BUFFER and spec.target in program.constants:
            spec = dataclasses.replace(spec, kind=InputKind.CONSTANT_TENSOR, persistent=None)
        kept.append(spec)
    program.graph_signature.input_specs[:] = kept
    return program


def _give_arguments(program: ExportedProgram) -> None:
    """Make an argument of every parameter and buffer that has no values."""
    specs = program.graph_signature.input_specs
    for i, spec in enumerate(specs):
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target)) if spec.target else None
        if isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor)):
            specs[i] = dataclasses.replace(spec, kind=InputKind.USER_INPUT, target=None, persistent=None)


def _view(x: Tensor, shape: list[int]) -> Any:
    """Decompose `x.view(shape)` for any layout: torch-mlir's attention returns another one than was traced."""
    return NotImplemented if x.is_contiguous() else x.contiguous().view(shape)


def _say_collapse(view: Node) -> None:
    """Write `view` as the collapse of two sizes of which none is known, where it is that.

    torch-mlir takes one of two such sizes for 1, and the lowered module writes where it should not.
    """
    x = view.args[0]
    assert isinstance(x, Node)
    old, new = shape(x), shape(view)
    for i in range(len(old) - 1):
        merged = (*old[:i], old[i] * old[i + 1], *old[i + 2 :])
        if merged == new and not any(isinstance(size, int) for size in old[i : i + 2]):
            view.target, view.args = torch.ops.prims.collapse.default, (x, i, i + 1)
            return


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Decompose without `tm_tensor.scan`, which only torch-mlir reads: every element sees all others."""
    if not x.dim():
        return NotImplemented
    x = x.movedim(dim, -1)
    return torch.where(_up_to(x), x.unsqueeze(-2), 0).sum(-1, dtype=dtype).movedim(-1, dim)


def _cummax(x: Tensor, dim: int) -> Any:
    """Decompose in the same way: torch-mlir has no form of it, and a memory finds where documents begin by it."""
    if not x.dim():
        return NotImplemented
    x = x.movedim(dim, -1)
    lowest = torch.finfo(x.dtype).min if x.is_floating_point() else torch.iinfo(x.dtype).min
    values = torch.where(_up_to(x), x.unsqueeze(-2), lowest).amax(-1)
    at = torch.arange(x.shape[-1], device=x.device)
    last = torch.where(_up_to(x) & (x.unsqueeze(-2) == values.unsqueeze(-1)), at, -1).amax(-1)
    return values.movedim(-1, dim), last.movedim(-1, dim)


def _up_to(x: Tensor) -> Tensor:
    """Return a mask `[S, S]` of the elements of the last dimension up to each."""
    at = torch.arange(x.shape[-1], device=x.device)
    return at <= at.unsqueeze(-1)
