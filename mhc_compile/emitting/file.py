"""Put the rewritten functions of a model into one Python file."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import textwrap
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.changes import Changes, changes
from mhc_compile.emitting.edits import Edits
from mhc_compile.emitting.imports import WIDTH, Imports
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.mixing import mixing_imports
from mhc_compile.emitting.naming import Names, class_name
from mhc_compile.emitting.places import Key, method_name
from mhc_compile.emitting.rewrite import rewritten
from mhc_compile.emitting.streams import stream_modules
from mhc_compile.integrations.transformers import base_model, records_outputs
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.results import ResidualStream

HEAD = '''\
"""{root} with {streams} residual streams: manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

Written by mhc-compile from the source of the model. `{root}` is used as the class that it derives from;
`add_streams(model)` gives a residual model its streams, which leave its function as it is until they are trained.
"""
'''
ADD_STREAMS = '''\
def add_streams(model):
    """Give the modules of a residual `model` their n-stream classes and their sites; return it."""
    count = 0
    for module in model.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
{register}        for name, rounds in getattr(module, "mhc_sites", {{}}).items():
            sites = [HyperConnection({hidden}, count + k) for k in range(rounds or 1)]
            count += len(sites)
            if not hasattr(module, name):
                module.add_module(name, sites[0] if rounds is None else nn.ModuleList(sites))
{last}    return model
'''
REGISTER = """\
        if hasattr(module, "_can_record_outputs"):
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
"""
LAST = "    [m for m in {owner}.modules() if isinstance(m, HyperConnection)][-1].last = True\n"
ROOT = """\
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_streams(self)
"""
READ_CONVERTED = '''
def read_converted(module, state, prefix, *_):
    """Take weights under the names of `mhc_compile.convert`: those of the first site of layer 3 as `mhc.layers.3#0`."""
    for key in [key for key in state if key.startswith(f"{prefix}mhc.")]:
        path, number, name = re.fullmatch(r"(.*)#(\\d+)\\.(.*)", key.removeprefix(f"{prefix}mhc.")).groups()
        site = list(module.get_submodule(path).mhc_sites)[int(number)]
        state[prefix + ".".join([*path.split("."), site, name]).strip(".")] = state.pop(key)
'''
HOOK = "    {owner}.register_load_state_dict_pre_hook(read_converted)\n"
INIT = '''
class Initialise:
    """Make a model with its streams, and let transformers start sites as it starts other modules."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_streams(self)

    def _init_weights(self, module):
        if isinstance(module, HyperConnection):
            module.reset_parameters()
        else:
            super()._init_weights(module)
'''


@dataclass(frozen=True)
class Source:
    """An emitted file."""

    text: str
    root: str
    """The name of the class of the whole model."""
    base: str
    """That of transformers' base model, where that is a part of the model and has every site in it; else ""."""
    sites: dict[Key, str]
    """By owner and site name the path of the module with its parameters."""
    difference: float = 0.0
    """The largest relative difference of outputs from those of the graph rewrite, once it was compared."""


class Writer:
    """Writes the file for one model."""

    def __init__(self, model: nn.Module, streams: Sequence[ResidualStream], edits: Edits) -> None:
        self.model, self.streams, self.edits = model, list(streams), edits
        self.names = Names(model, self.streams, edits)
        self.base = base_model(model)
        """The path of transformers' base model; "" where that is the whole model, or there is none."""
        self.imports = Imports()
        self.used: set[str] = set()
        """Kinds of edits, for the functions that they call."""

    def source(self, spec: StreamSpec) -> Source:
        """Return the file. Raises MHC701, 702, 706, 707 or 708."""
        functions, methods = self._rewrite()
        root = type(self.model)
        methods.setdefault(root, [])
        base = type(self.model.get_submodule(self.base))
        within = self.base != "" and all(path.startswith(f"{self.base}.") for path in self.names.paths().values())
        if within:
            methods.setdefault(base, [])
        own = [class_name(cls) for cls in methods]
        if len(set(own)) < len(own):
            raise MHCError("MHC707", f"two classes have one name: {', '.join(sorted(own))}")
        classes = [self._class(cls, texts) for cls, texts in methods.items()]
        pairs = [f"{self.imports.base(cls)}: {class_name(cls)}" for cls in methods]
        table = f"CLASSES = {{{', '.join(pairs)}}}\n"
        if len(table) > WIDTH:
            table = "CLASSES = {\n" + "".join(f"    {pair},\n" for pair in pairs) + "}\n"
        hidden, widths = self._widths()
        reading, hooks = self._reading()
        adding = ADD_STREAMS.format(hidden=hidden, last=self._last() + hooks, register=self._register())
        modules = stream_modules(spec, self.used)
        self.imports.lines.update(mixing_imports(spec))
        initialise = INIT if any(hasattr(cls, "_init_weights") for cls in methods) else ""
        parts = [modules, initialise, *functions, *classes, widths, reading, table, adding]
        head = HEAD.format(root=class_name(root), streams=spec.streams)
        body = "\n\n".join(part.strip("\n") + "\n" for part in parts if part)
        text = f"{head}\n{self.imports.text(own)}\nSTREAMS = {spec.streams}\n\n\n{body}"
        compile(text, "<emitted>", "exec")
        return Source(text, class_name(root), class_name(base) if within else "", self.names.paths())

    def _rewrite(self) -> tuple[list[str], dict[type, list[str]]]:
        """Return the sources of functions that are no methods, and of methods by class."""
        functions: list[str] = []
        methods: dict[type, list[str]] = {}
        for function, recorded in self.edits.of.items():
            changed = changes(recorded)
            if not changed:
                continue
            self.used.update(edit.kind for edits in changed.values() for edit in edits)
            for module in {r.call.module: None for records in recorded.values() for r in records}:
                cls = type(self.model.get_submodule(module))
                if method_name(self.model.get_submodule(module), function) is None:
                    functions.append(self._code(function, changed, ""))
                    break
                code = textwrap.indent(self._code(function, changed, self.imports.base(cls)), "    ")
                if code not in methods.setdefault(cls, []):
                    methods[cls].append(code)
        for cls in self.names.sites:
            methods.setdefault(cls, [])
        return functions, methods

    def _code(self, function: Function, changed: Changes, base: str) -> str:
        """Return the source of a rewritten function, for a class whose base the file calls `base`."""
        if free := set(function.code.co_freevars) - {"__class__"}:
            raise MHCError("MHC701", f"{function.code.co_qualname} reads {', '.join(sorted(free))} from around it")
        tree = rewritten(function, changed, self.names, base)
        space = function.objects[0].__globals__
        calls = [getattr(d.decorator, "func", d.decorator) for d in tree.decorators]
        if any(isinstance(n, cst.Name) and records_outputs(space.get(n.value)) for n in calls):
            self.used.add("recorded")
            self.imports.lines.add("import functools")
            tree = tree.with_changes(decorators=[cst.Decorator(cst.Name("reduce_recorded")), *tree.decorators])
        self.imports.read_by(function)
        return cst.Module([tree.with_changes(leading_lines=())]).code

    def _class(self, cls: type, methods: list[str]) -> str:
        parts = []
        if names := self.names.sites.get(cls):
            rounds = ", ".join(f'"{name}": {self.names.rounds.get((cls, name))}' for name in names.values())
            parts.append(f"    mhc_sites = {{{rounds}}}\n")
        bases = self.imports.base(cls)
        if hasattr(cls, "_init_weights"):
            bases = f"Initialise, {bases}"
        elif cls is type(self.model):
            parts.append(ROOT)
        return f"class {class_name(cls)}({bases}):\n" + "\n".join([*parts, *methods] or ["    pass\n"])

    def _register(self) -> str:
        """Return the lines of `add_streams` that tell transformers what the new classes record, if any is asked."""
        recording = sys.modules.get("transformers.utils.output_capturing")
        if "recorded" not in self.used or not hasattr(recording, "_CAN_RECORD_REGISTRY"):
            return ""
        self.imports.names.setdefault("transformers.utils.output_capturing", set()).add("_CAN_RECORD_REGISTRY")
        return REGISTER

    def _reading(self) -> tuple[str, str]:
        """Return the function that reads the names of converted models, and the lines of `add_streams` that set it.

        Empty where a site does not live in the module that adds, in the order of the stream.
        """
        for (owner, site), path in self.names.paths().items():
            module, _, number = site.rpartition("#")
            holder = ".".join(part for part in (owner, module) if part)
            names = list(self.names.sites.get(type(self.model.get_submodule(holder)), {}).values())
            if int(number) >= len(names) or f"{holder}.{names[int(number)]}".strip(".") != path:
                return "", ""
        self.imports.lines.add("import re")
        owners = dict.fromkeys(self._owner(stream) for stream in self.streams)
        return READ_CONVERTED, "".join(HOOK.format(owner=owner) for owner in owners)

    def _owner(self, stream: ResidualStream) -> str:
        """Return how `add_streams` says the owner of a stream, for the whole model and for its base model alone."""
        if self.base and f"{stream.owner}.".startswith(f"{self.base}."):
            return f"model.base_model{stream.owner.removeprefix(self.base)}"
        return f"model.{stream.owner}".rstrip(".")

    def _widths(self) -> tuple[str, str]:
        """Return the expression for C of site `count + k` in `add_streams`, and the table that it reads, if any."""
        of = {self.names.path(self.edits.places[s.owner, t.name]): s.hidden for s in self.streams for t in s.sites}
        sizes = [of[path] for path in self.names.in_order(self.model)]
        if len(set(sizes)) > 1:
            return "WIDTHS[count + k]", f"WIDTHS = {tuple(sizes)}\n"
        config = getattr(self.model, "config", None)
        return ("model.config.hidden_size" if getattr(config, "hidden_size", None) == sizes[0] else str(sizes[0])), ""

    def _last(self) -> str:
        """Return the lines of `add_streams` that mark the last site of each stream, where code asks for it."""
        if not {"leave", "leave_each"} & self.used:
            return ""
        lines: dict[str, None] = {}
        for stream in self.streams:
            owner = self._owner(stream)
            last = self.names.path(self.edits.places[stream.owner, stream.sites[-1].name])
            if self.names.in_order(self.model.get_submodule(stream.owner), stream.owner)[-1] != last:
                raise MHCError("MHC702", f"the last site of {owner} is not that of its last module")
            lines[LAST.format(owner=owner)] = None
        return "".join(lines)


def load(path: Path) -> types.ModuleType:
    """Import an emitted file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_text(text: str, name: str) -> types.ModuleType:
    """Import emitted text from a file of its own, with whatever Python writes beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return load(path)
