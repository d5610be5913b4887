"""Copy the files of a model's classes beside its emitted source, which then depends on no version of them."""

from __future__ import annotations

import importlib
import inspect
import re
import secrets
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import libcst as cst
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mhc_compile.diagnostics import MHCError


def vendored(model: nn.Module, text: str) -> tuple[str, dict[str, str]]:
    """Return emitted `text`, importing a residual model's classes from copies of their files, and the copies by name.

    The files are those in the package of the model's own class, whole, with licences and comments; their relative
    imports become absolute. Raises MHC701 where a file cannot be read.
    """
    package = type(model).__module__.rpartition(".")[0]
    homes = {type(module).__module__ for module in model.modules()}
    files: dict[str, str] = {}
    for name in sorted(homes):
        line = re.compile(rf"^from {re.escape(name)} import ", re.MULTILINE)
        if name.rpartition(".")[0] == package and line.search(text):
            stem = f"vendored_{name.rpartition('.')[2]}"
            files[f"{stem}.py"] = _absolute(sys.modules[name])
            text = line.sub(f"from .{stem} import ", text)
    return text, files


def refuse_others(model: Any, files: Mapping[str, str], name: str, root: str, inputs: Mapping[str, Any]) -> None:
    """Raise MHC709 unless class `root` of file `name` computes what `model` does in every bit, given its weights."""
    package = f"mhc_compile_{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [folder]
        try:
            again = getattr(importlib.import_module(f"{package}.{name}"), root)(model.config).to(model.dtype).eval()
            again.load_state_dict(model.state_dict())
            with torch.no_grad():
                pairs = zip(tree_leaves(again(**inputs)), tree_leaves(model.eval()(**inputs)), strict=True)
                same = all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
        finally:
            for known in [known for known in sys.modules if known.split(".")[0] == package]:
                del sys.modules[known]
    if not same:
        raise MHCError("MHC709", "with its files copied the model computes something else")


def _absolute(module: ModuleType) -> str:
    """Return the source of a module with absolute imports."""
    try:
        tree = cst.parse_module(inspect.getsource(module))
    except (OSError, TypeError, cst.ParserSyntaxError) as error:
        raise MHCError("MHC701", f"{module.__name__}: {error}") from error
    return tree.visit(_Absolute(module.__package__ or "")).code


class _Absolute(cst.CSTTransformer):
    """Writes `from ..cache import Cache` in package `a.b.c` as `from a.b.cache import Cache`."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self.package = package

    def leave_ImportFrom(self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom) -> Any:  # noqa: N802
        """Return the import with the whole name of its module."""
        if not original_node.relative:
            return updated_node
        module = cst.Module([]).code_for_node(original_node.module) if original_node.module else ""
        name = resolve_name("." * len(original_node.relative) + module, self.package)
        return updated_node.with_changes(
            relative=[], module=cst.parse_expression(name), whitespace_after_from=cst.SimpleWhitespace(" ")
        )
