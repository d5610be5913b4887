"""Name what an emitted file has of its own: the attributes of sites, classes, and how code says them."""

from __future__ import annotations

import libcst as cst
from torch import nn
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.edits import Edits
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.places import Key, Nodes, Place
from mhc_compile.passes.base import module_path
from mhc_compile.passes.results import ResidualStream


class Names:
    """The names for one model."""

    def __init__(self, model: nn.Module, streams: list[ResidualStream], edits: Edits) -> None:
        self.model, self.edits = model, edits
        self.sites: dict[type, dict[Nodes, str]] = {}
        """The attribute of each place, by the class of the module that holds it, in the order of the stream."""
        self.rounds: dict[tuple[type, str], int] = {}
        """How many sites the attribute of a loop has."""
        for stream in streams:
            for site in stream.sites:
                place = edits.places[stream.owner, site.name]
                cls = type(model.get_submodule(place.module))
                names = self.sites.setdefault(cls, {})
                if place.nodes not in names:
                    name = "mhc_" + self._branch(site.add)
                    names[place.nodes] = name if name not in names.values() else f"{name}_{len(names)}"
                if place.count > 1:
                    self.rounds[cls, names[place.nodes]] = place.count

    def _branch(self, add: Node) -> str:
        """Return the name of the module in which the branch before `add` ends, below the module that adds."""
        module = module_path(add)
        prefix = f"{module}." if module else ""
        node = add.prev
        while node.op not in ("placeholder", "root"):
            path = module_path(node)
            if path.startswith(prefix) and path != module:
                child = path[len(prefix) :].split(".")[0]
                if child.isidentifier() and any(True for _ in self.model.get_submodule(prefix + child).parameters()):
                    return child
            node = node.prev
        return "site"

    def attribute(self, place: Place) -> str:
        """Return the name of the attribute in which a module holds the site, or the sites of a loop."""
        return self.sites[type(self.model.get_submodule(place.module))][place.nodes]

    def path(self, place: Place) -> str:
        """Return the full name of a site."""
        row = f".{place.row}" if place.count > 1 else ""
        return f"{place.module}.{self.attribute(place)}{row}".strip(".")

    def paths(self) -> dict[Key, str]:
        """Return the full names of all sites by owner and site name."""
        return {key: self.path(place) for key, place in self.edits.places.items()}

    def expression(self, place: Place, module: str, node: cst.CSTNode) -> str:
        """Return how the code of the module at a path says the site in what becomes of `node`."""
        name = self.attribute(place)
        if place.count > 1:
            if (row := self.edits.fixed.get((place.nodes, node))) is not None:
                return f"self.{name}[{row}]"
            return f"({name} := next({name}_sites))" if self.edits.first[place.nodes] is node else name
        relative = place.module.removeprefix(module).strip(".")
        return ".".join(part for part in ("self", relative, name) if part)

    def loop(self, place: Place) -> str:
        """Return the statement that begins to go through the sites of a loop."""
        name = self.attribute(place)
        return f"{name}_sites = iter(self.{name})\n"

    def argument(self, function: Function, nodes: Nodes) -> str:
        """Return the name of the argument by which a function gets the site for some expressions."""
        every = self.edits.arguments[function]
        return f"mhc_{every.index(nodes)}" if len(every) > 1 else "mhc"

    def arguments(self, function: Function) -> list[str]:
        """Return the names of all sites that a function gets as arguments."""
        return [self.argument(function, nodes) for nodes in self.edits.arguments.get(function, ())]

    def in_order(self, module: nn.Module, path: str = "") -> list[str]:
        """Return the full names of all sites below the module at `path`, in the order of `modules()`."""
        prefix = f"{path}." if path else ""
        found = [site for name, child in module.named_children() for site in self.in_order(child, prefix + name)]
        for name in self.sites.get(type(module), {}).values():
            rounds = self.rounds.get((type(module), name))
            found += [prefix + name] if rounds is None else [f"{prefix}{name}.{k}" for k in range(rounds)]
        return found


def class_name(cls: type) -> str:
    """Return the name of the n-stream class for a class of the model."""
    return cls.__qualname__.replace(".", "_")


def refuse_local(cls: type) -> None:
    """Raise MHC707 for a class that no module has under its name."""
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise MHCError("MHC707", f"{cls.__module__}.{cls.__qualname__}")
