"""A checkpoint's model without its weights, checked against their names and shapes."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.checkpoint.shards import DTYPES
from mhc_compile.checkpoint.source import Checkpoint
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import names


def transformers_module() -> ModuleType:
    """Return the package; raise MHC415 where it, or accelerate, which its loaders need, is not installed."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        raise MHCError("MHC415", str(error)) from error
    return transformers


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the class that `config.json` names: one registered with an Auto class, or one inside transformers.

    Raises MHC405 where there is none.
    """
    transformers = transformers_module()
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise MHCError("MHC405", "config.json names no architectures", way_out='add "architectures": ["<class name>"]')
    name = str(architectures[0])
    registered = [cls for _, cls in _registered(transformers, config.get("model_type"))]
    for cls in (*registered, getattr(transformers, name, None)):
        if is_model_class(cls) and cls.__name__ == name:
            return cls
    raise MHCError("MHC405", f"transformers {transformers.__version__} has no model {name}")


def is_model_class(value: Any) -> bool:
    """Return whether `value` is a model class of transformers or a subclass of one; imports nothing."""
    transformers = sys.modules.get("transformers")
    return isinstance(value, type) and transformers is not None and issubclass(value, transformers.PreTrainedModel)


def auto_classes(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the Auto classes that make the model which `config.json` names."""
    transformers = transformers_module()
    wanted = (config.get("architectures") or [None])[0]
    pairs = _registered(transformers, config.get("model_type"))
    return sorted({auto for auto, cls in pairs if hasattr(transformers, auto) and cls.__name__ == wanted})


def _registered(transformers: ModuleType, model_type: Any) -> Iterator[tuple[str, Any]]:
    """Yield the classes that Auto classes know for a configuration's type, including those that a user registered."""
    auto: Any = transformers.models.auto
    if not isinstance(model_type, str) or model_type not in auto.CONFIG_MAPPING:
        return
    config_class = auto.CONFIG_MAPPING[model_type]
    for name, factory in vars(auto.modeling_auto).items():
        mapping = getattr(factory, "_model_mapping", None)
        if isinstance(factory, type) and mapping is not None:
            classes = mapping.get(config_class, ())
            yield from ((name, cls) for cls in (classes if isinstance(classes, tuple) else (classes,)) if cls)


def configuration(cls: Any, folder: Path, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of a folder for `cls`, without its guard, and the keywords that are not its own.

    It is the keyword `config` where that is given.
    """
    rest = dict(kwargs)
    config = copy.deepcopy(rest.pop("config", None))
    if config is None:
        config, rest = cls.config_class.from_pretrained(
            folder, **{**rest, "return_unused_kwargs": True, "trust_remote_code": False, "local_files_only": True}
        )
    for name in ("transformers_weights", "auto_map"):
        vars(config).pop(name, None)
    return config, rest


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with weights that take no memory, to be traced and never run.

    Raises MHC404 where the weights do not fit, MHC405 for an architecture or a configuration that transformers does not
    build, and MHC406 for weights in a type that only quantised checkpoints have.
    """
    transformers = transformers_module()
    cls = model_class(checkpoint.config)
    weights = dict(_on_meta(checkpoint))
    with quiet(transformers) as messages:
        try:
            config = transformers.AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=False, local_files_only=True
            )
            vars(config).pop("transformers_weights", None)  # the notice of a folder in a layout
            with torch.device("meta"):
                cls(config)
        except Exception as error:  # whatever a class in transformers raises for values it cannot work with
            raise MHCError("MHC405", f"{cls.__name__} cannot be built from {checkpoint.folder}: {error}") from error
        try:
            # transformers' own loader applies its renamings and merges to the names and shapes.
            model, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype="auto",
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError as error:
            merged = {line.split()[0] for text in messages for line in text.splitlines() if "| CONVERSION" in line}
            detail = f"the parts of {names(sorted(merged))} do not fit together" if merged else str(error)
            raise MHCError("MHC404", f"{checkpoint.folder}: {detail}") from error
    refuse_misfits(str(checkpoint.folder), report)
    return _hollow(model.eval())


def refuse_misfits(folder: str, report: Mapping[str, Iterable[Any]]) -> None:
    """Raise MHC404 for weights that transformers' loading report lists as missing, unexpected or of another shape."""
    misfits = {
        "missing": sorted(set(report["missing_keys"])),
        "unexpected": sorted(set(report["unexpected_keys"])),
        "of another shape": [f"{n} {list(a)} for {list(b)}" for n, a, b in sorted(report["mismatched_keys"])],
    }
    kinds = [kind for kind, keys in misfits.items() if keys]
    way_out = "load it with transformers and save it again, which drops what the architecture does not have"
    if kinds:
        detail = "; ".join(f"{kind}: {names(misfits[kind])}" for kind in kinds)
        raise MHCError("MHC404", f"{folder}: {detail}", way_out=way_out if kinds == ["unexpected"] else None)


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[list[str]]:
    """Disable transformers' progress bars, and collect its log messages instead of printing them."""
    log = transformers.logging
    messages: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    bar = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    library = log.get_logger()
    handlers, library.handlers = library.handlers, [keep]
    try:
        yield messages
    finally:
        library.handlers = handlers
        if bar:
            log.enable_progress_bar()


def weightless(like: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a fake tensor on `device` like `like`: it takes no memory, and tracing may mix it with real tensors.

    Its strides are those of real weights, because grouped matrix products depend on them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def _hollow(model: nn.Module) -> nn.Module:
    """Move a model from the meta device to the CPU: parameters as fake tensors, buffers as one zero at every index.

    Tracing runs what a model computes from constants, and mixes of real and meta tensors fail there.
    """
    replaced: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight stays tied
    for module in model.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
        for tensors in places:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    if tensor not in replaced:
                        zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                        is_weight = isinstance(tensor, nn.Parameter)
                        replaced[tensor] = nn.Parameter(weightless(tensor)) if is_weight else zero
                    tensors[name] = replaced[tensor]
    return model


def _on_meta(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in checkpoint.shards:
        for name, tensor in shard.tensors.items():
            if tensor.dtype not in DTYPES:
                raise MHCError("MHC406", f"{name} in {shard.path} is stored as {tensor.dtype}")
            yield name, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
