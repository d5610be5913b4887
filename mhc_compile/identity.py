"""Name the modules and inputs of a graph that Dynamo hands over by what they are, not by how its source text reads.

Dynamo describes a module by the expression that leads to it (`L['args'][0].layers[3]`), which changes with every
decorator around a forward. The keys of `nn_module_stack` hold the ids of the modules themselves, and a graph's example
inputs are the parameters and arguments themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mhc_compile import frame
from mhc_compile.passes.ownership import INPUT, OWNED

Stack = Mapping[str, tuple[str, Any]]
"""`node.meta["nn_module_stack"]`: `"<id of the module>[@<number of the call>]"` to path and class, outermost first."""


def identify(gm: GraphModule, example_inputs: Sequence[Any]) -> ModuleNames:
    """Name the modules around every node of `gm`, a private copy, and its inputs; called while Dynamo compiles it."""
    names = ModuleNames(frame.own_module(), frame.traced_modules())
    names.rename(gm)
    owned, arguments = tensor_paths(), argument_names()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, real in zip(placeholders, example_inputs, strict=False):
        node.meta[OWNED] = owned.get(id(real), isinstance(real, nn.Parameter))
        if id(real) in arguments:
            node.meta[INPUT] = arguments[id(real)]
    return names


class ModuleNames:
    """Paths of modules, each from the module in which it begins.

    That is the frame's own module, or, for a module outside of it, the outermost module being called.
    """

    def __init__(self, own: nn.Module | None, traced: Mapping[int, nn.Module]) -> None:
        self.own = own
        self.traced = traced
        self._paths: dict[int, dict[int, str]] = {}

    def rename(self, gm: GraphModule) -> None:
        """Write paths in place of source text into the nodes of `gm` and of the bodies that they call."""
        for graph in (m.graph for m in gm.modules() if isinstance(m, GraphModule)):
            for node in graph.nodes:
                if stack := node.meta.get("nn_module_stack"):
                    node.meta["nn_module_stack"] = self._named(stack)

    def root(self, node: Node) -> nn.Module | None:
        """Return the module in which the paths of `node` begin; the frame's own where nothing is being called."""
        return self._root(node.meta.get("nn_module_stack") or {})

    def _root(self, stack: Stack) -> nn.Module | None:
        outermost = next((_number(key) for key in stack), None)
        if outermost is None or (self.own is not None and outermost in self._below(self.own)):
            return self.own
        return self.traced.get(outermost)

    def _named(self, stack: Stack) -> dict[str, tuple[str, Any]]:
        root = self._root(stack)
        paths = {} if root is None else self._below(root)
        named: dict[str, tuple[str, Any]] = {}
        path = ""
        for key, (_, kind) in stack.items():
            # A module that nothing holds, made in the call: its class tells it from the module around it.
            path = paths.get(_number(key), f"{path}.<{getattr(kind, '__name__', kind)}>".strip("."))
            named[key] = path, kind
        return named

    def _below(self, root: nn.Module) -> dict[int, str]:
        if id(root) not in self._paths:
            self._paths[id(root)] = {id(module): path for path, module in reversed(modules_below(root))}
        return self._paths[id(root)]


def _number(key: str) -> int:
    number = key.partition("@")[0]
    return int(number) if number.isdigit() else -1


def modules_below(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of `root` with their paths, then those in plain attributes, lists and dictionaries."""
    below = list(root.named_modules())
    known = {id(module) for _, module in below}
    for path, module in below:  # grows while it is read
        for place, part in _unregistered(module):
            inside = [
                (f"{path}.{place}.{name}".strip("."), m) for name, m in part.named_modules() if id(m) not in known
            ]
            known |= {id(m) for _, m in inside}
            below += inside
    return below


def _unregistered(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            yield name, value
        elif name != "_modules" and isinstance(value, (tuple, list, dict)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(part, nn.Module):
                    yield f"{name}.{key}", part


def tensor_paths() -> dict[int, str]:
    """Return, by id, the path of each tensor that belongs to a module of the frame: parameters, buffers, attributes."""
    own = frame.own_module()
    roots = [*([] if own is None else [own]), *frame.modules(), *frame.traced_modules().values()]
    paths: dict[int, str] = {}
    for path, module in (pair for root in dict.fromkeys(roots) for pair in modules_below(root)):
        for name, value in _attributes(module):
            for tensor in (value, *frame.parts_of(value)):
                if isinstance(tensor, Tensor):
                    paths.setdefault(id(tensor), f"{path}.{name}".strip("."))
    return paths


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    # FSDP's views of a flat parameter are plain attributes of their modules.
    yield from ((name, value) for name, value in vars(module).items() if name not in ("_parameters", "_buffers"))


def argument_names() -> dict[int, str]:
    """Return, by id, the name of each tensor that the caller passes: its argument's, with its place in containers."""
    own, (arguments, _, plain) = frame.own_module(), frame.arguments()
    names: dict[int, str] = {}
    for i, (name, value) in enumerate(arguments.items()):
        starred = i >= plain
        if starred and isinstance(value, tuple) and own is not None and value and value[0] is own:
            # A decorator's `*args`: the names that the signature it shows gives them.
            kinds = inspect.signature(own.forward).parameters.values()
            known = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            for name, part in zip(known, value[1:], strict=False):
                _name_tensors(names, name, part)
        for key, part in value.items() if starred and isinstance(value, dict) else ((name, value),):
            _name_tensors(names, key, part)
    return names


def _name_tensors(names: dict[int, str], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        names.setdefault(id(value), name)
    elif isinstance(value, (tuple, list, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _name_tensors(names, f"{name}.{key}", part)
