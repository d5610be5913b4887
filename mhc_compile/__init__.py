"""Rewrite any residual Transformer into manifold-constrained hyper-connections (mHC).

    model = mhc_compile.convert(model, streams=4)      # same outputs, new trainable parameters
    step = torch.compile(model, backend="mhc")         # faster; plain calls of `model` work as well
    print(mhc_compile.inspect(model))                  # what was found and changed

`StreamSpec` has the options of the streams, `Options` those of compiling; both go into `convert` by keyword.
`convert_folder`, `from_pretrained` and `save_pretrained` are for checkpoint folders, `save` and `load` for modules of
your own, `emit` and `emit_folder` write the model's own source with the streams in it, `parameter_groups` is for
optimizers, `MemorySettings` and `OverEncodingSettings` for tables of n-grams, `UltraMemSettings` for one that is looked
up by content. What is refused raises `MHCError` with a code.

Further modules: `mhc_compile.measure` and `mhc_compile.probes` (what the streams of a model do),
`mhc_compile.diff` and `mhc_compile.bisect` (two forms side by side, what goes wrong where),
`mhc_compile.conventions` and `mhc_compile.parameters`, `mhc_compile.memory` (memories),
`mhc_compile.diffusion` (parallel generation), `mhc_compile.kernels.functions` (the kernels by hand),
`mhc_compile.runtime` (training); and the compiler: `mhc_compile.backend`, `mhc_compile.capture`, `mhc_compile.passes`
(pipelines: `mhc_compile.passes.pipeline`), `mhc_compile.kernels`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mhc_compile.versions import VERSION, warn_of_newer

if TYPE_CHECKING:
    from mhc_compile.checkpoint.saving import save, save_pretrained
    from mhc_compile.config import Options
    from mhc_compile.conversion import convert, convert_folder, to_residual
    from mhc_compile.diagnostics import MHCError, MHCWarning
    from mhc_compile.emitting.emit import emit
    from mhc_compile.emitting.folder import emit_folder
    from mhc_compile.exporting import export, to_mlir
    from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
    from mhc_compile.kernels.memory.settings import MemorySettings
    from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
    from mhc_compile.kernels.spec import Convention, StreamSpec
    from mhc_compile.loading import from_pretrained, load
    from mhc_compile.memory.optimizer import TableAdamW, table_groups
    from mhc_compile.parameters import (
        freeze_backbone,
        parameter_groups,
        print_trainable_parameters,
        stream_modules,
        stream_parameters,
    )
    from mhc_compile.probes import Probes
    from mhc_compile.report import Report, inspect

__all__ = [
    "Convention",
    "MHCError",
    "MHCWarning",
    "MemorySettings",
    "Options",
    "OverEncodingSettings",
    "Probes",
    "Report",
    "StreamSpec",
    "TableAdamW",
    "UltraMemSettings",
    "convert",
    "convert_folder",
    "emit",
    "emit_folder",
    "export",
    "freeze_backbone",
    "from_pretrained",
    "inspect",
    "load",
    "parameter_groups",
    "print_trainable_parameters",
    "save",
    "save_pretrained",
    "stream_modules",
    "stream_parameters",
    "table_groups",
    "to_mlir",
    "to_residual",
]
__version__ = VERSION
_MODULES = {
    "checkpoint.saving": ("save", "save_pretrained"),
    "config": ("Options",),
    "conversion": ("convert", "convert_folder", "to_residual"),
    "diagnostics": ("MHCError", "MHCWarning"),
    "emitting.emit": ("emit",),
    "emitting.folder": ("emit_folder",),
    "exporting": ("export", "to_mlir"),
    "kernels.memory.overencoding_settings": ("OverEncodingSettings",),
    "kernels.memory.settings": ("MemorySettings",),
    "kernels.memory.ultramem_settings": ("UltraMemSettings",),
    "kernels.spec": ("Convention", "StreamSpec"),
    "loading": ("from_pretrained", "load"),
    "memory.optimizer": ("TableAdamW", "table_groups"),
    "parameters": (
        "freeze_backbone",
        "parameter_groups",
        "print_trainable_parameters",
        "stream_modules",
        "stream_parameters",
    ),
    "probes": ("Probes",),
    "report": ("Report", "inspect"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of this package, when it is first used. Dynamo alone takes a second."""
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_newer()
