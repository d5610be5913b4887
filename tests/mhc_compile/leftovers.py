"""What a model, its classes and the modules of other libraries are made of, to be compared before and after."""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import nn

LIBRARIES = ("transformers", "peft", "accelerate")
LIBRARY = "library"


def parts_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return every attribute of the modules of `model`, of their classes, and of `LIBRARIES`, by owner and name."""
    parts: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        parts[f"module {path}", "its class"] = type(module)
        parts |= {(f"module {path}", name): _copied(value) for name, value in vars(module).items()}
        for name, config in getattr(module, "peft_config", {}).items():
            parts |= {(f"adapter {path} {name}", key): _copied(value) for key, value in vars(config).items()}
    for cls in _classes(model):
        parts |= {(f"class {cls.__module__}.{cls.__qualname__}", name): value for name, value in vars(cls).items()}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in LIBRARIES and type(module) is types.ModuleType:
            parts |= {(f"{LIBRARY} {name}", key): value for key, value in vars(module).items()}
    return parts


def _classes(model: nn.Module) -> set[type]:
    own = {base for module in model.modules() for base in type(module).__mro__}
    libraries = (m for name, m in list(sys.modules.items()) if name.split(".")[0] in LIBRARIES)
    public = {v for m in libraries if type(m) is types.ModuleType for v in vars(m).values() if isinstance(v, type)}
    # Dynamo patches `nn.Module` itself when it first traces.
    return {cls for cls in own | public if cls.__module__.split(".")[0] not in ("builtins", "torch")}


def _copied(value: Any) -> Any:
    """Containers change in place."""
    if isinstance(value, dict):
        return [*value.items()]
    return list(value) if isinstance(value, (list, set, tuple)) else value


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """Return what is not the same any more, or new; libraries load parts of theirs when they are first asked for."""
    return [
        key
        for key in {**before, **after}
        if (key not in before and not key[0].startswith((LIBRARY, "class")))
        or (key not in before and key[0].startswith("class") and any(other[0] == key[0] for other in before))
        or (key in before and not _same(before[key], after.get(key)))
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, types.MethodType):
        return bool(a == b)
    return a is b or (isinstance(a, (str, int, float, bool, type(None))) and type(a) is type(b) and a == b)
