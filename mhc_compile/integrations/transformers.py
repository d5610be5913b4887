"""Transformers: what the arguments of a forward are for, and what its models are to know of streams.

The only module that knows what transformers calls its arguments. A cache is told by its class, whatever the argument is
called (`past_key_values` and `cache_params` up to transformers 5.23, `cache` from 5.24 on). Ids, masks and positions
share dtypes and shapes, so that names decide between them where a forward has transformers' names; of other forwards
only a call with a single two-dimensional tensor of integers tells its ids by itself, and `unknown_of` returns the rest.

Dynamo traces what takes a `Roles`; annotations are read once for every class, before. What is set on models is set on
instances: it is copied and pickled with them, and leaves classes alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.attributes import replace_attribute
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import Started, is_converted, owners

IDS, DECODER_IDS, MASK, POSITIONS = "input_ids", "decoder_input_ids", "attention_mask", "position_ids"
PIXELS, FEATURES, LABELS = "pixel_values", "input_features", "labels"
USE_CACHE = "use_cache"
STATE = "mhc_memory"
"""The attribute of a cache that holds what a memory carries from call to call."""

_cache_types: tuple[Any, ...] = ()
"""`transformers.Cache`, once `follow_caches` has run and where transformers is installed."""
_followers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_methods: dict[tuple[type, str], Callable[..., Any]] = {}
"""The original methods of the cache classes, which `follow_caches` replaced."""


@dataclass(frozen=True)
class Roles:
    """What the signature of one forward says about its arguments."""

    names: tuple[str, ...]
    """Of the arguments that a call may give by position."""
    conventional: bool
    """Whether it has transformers' name for token ids: the names of the others count as well."""
    carried: tuple[str, ...]
    """The arguments that it also returns, by the same name, as transformers' models return what they cache."""
    caches: tuple[type, ...]
    """The classes in which it carries what it caches: not all of transformers' are a `transformers.Cache`."""

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Roles:
        """Read the signature and the annotations of the method `forward`."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        declared = [p.name for p in parameters]
        hints = _hints(forward)
        returned = {field for kind in _parts(hints.get("return")) for field in _fields(kind)}
        carried = tuple(name for name in declared if name in returned)
        return cls(
            tuple(p.name for p in parameters if p.kind in positional),
            IDS in declared,
            carried,
            tuple({kind for name in carried for kind in _parts(hints.get(name)) if _is_cache_class(kind)}),
        )

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the call's arguments by name; those of a `*args` are called `*0`, `*1`, ..."""
        rest = args[len(self.names) :]
        extra = {f"*{i}": argument for i, argument in enumerate(rest)}
        return {**dict(zip(self.names, args, strict=False)), **extra, **kwargs}


def _hints(forward: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(forward))
    except Exception:  # annotations are evaluated, and those of other people's code need not be evaluable
        return {}


def _parts(hint: Any) -> list[Any]:
    """Return the alternatives of a union, or the annotation itself."""
    return list(typing.get_args(hint)) or [hint]


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _is_cache_class(kind: Any) -> bool:
    return inspect.isclass(kind) and kind.__module__ not in ("builtins", "torch") and not issubclass(kind, Tensor)


# --- the roles of one call's arguments --------------------------------------------------------------------------------


def ids_of(roles: Roles, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the token ids [B, S]; None without any, or where several arguments may be the ids."""
    if _conventional(roles, arguments):
        ids = arguments.get(IDS)
        return ids if _is_integers(ids) else None
    integers = _integers(arguments)
    return integers[0] if len(integers) == 1 else None


def mask_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the mask [B, T >= S] that is 0 for padding."""
    mask = arguments.get(MASK)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def positions_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the positions [B or 1, S]."""
    positions = arguments.get(POSITIONS)
    return positions if _is_integers(positions) else None


def unknown_of(roles: Roles, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the two-dimensional arguments that may be ids, a mask or positions, and neither name nor dtype tells."""
    if _conventional(roles, arguments):
        return {}
    integers = len(_integers(arguments))
    return {
        name: value
        for name, value in arguments.items()
        if name not in (MASK, POSITIONS)
        and ((_is_integers(value) and integers > 1) or (isinstance(value, Tensor) and _is_flags(value)))
    }


def batch_of(roles: Roles, arguments: Mapping[str, Any]) -> tuple[int, torch.device] | None:
    """Return the batch size and the device of the token ids; None without ids."""
    ids = ids_of(roles, arguments)
    if ids is not None:
        return ids.shape[0], ids.device
    # Whichever of them are the ids, others are as many, or one for all.
    integers = [] if _conventional(roles, arguments) else _integers(arguments)
    return (max(t.shape[0] for t in integers), integers[0].device) if integers else None


def _conventional(roles: Roles, arguments: Mapping[str, Any]) -> bool:
    return roles.conventional or IDS in arguments


def _integers(arguments: Mapping[str, Any]) -> list[Tensor]:
    return [t for name, t in arguments.items() if name not in (MASK, POSITIONS) and _is_integers(t)]


def _is_integers(value: Any) -> typing.TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)


def _is_flags(value: Tensor) -> bool:
    return value.ndim == 2 and value.dtype == torch.bool


# --- caches -----------------------------------------------------------------------------------------------------------


def cache_of(roles: Roles, arguments: Mapping[str, Any]) -> Any:
    """Return the cache that the call is given, or None.

    Raises MHC229 for tensors in a list or tuple that the call carries on without a cache, and MHC236 for two caches.
    """
    cache = None
    for name, value in arguments.items():
        if isinstance(value, (*_cache_types, *roles.caches)):
            if cache is not None and cache is not value:
                raise MHCError("MHC236", f"{name} is a second cache", way_out="call it with one cache")
            cache = value
        elif name in roles.carried and isinstance(value, (list, tuple)) and len(value) > 0:
            raise MHCError("MHC229", f"{name} is a {type(value).__name__}, which cannot hold it")
    return cache


def caches_in(roles: Roles, output: Any) -> list[Any]:
    """Return the caches among the values of a call's output, whatever they are called."""
    if isinstance(output, (*_cache_types, *roles.caches)):
        return [output]
    if output is None or isinstance(output, (Tensor, bool, int, float, str)):
        return []  # torch 2.11 cannot trace what is asked below of built-in classes
    parts: Iterable[Any] = ()
    if isinstance(output, dict):  # transformers' outputs are dicts as well
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [cache for part in parts for cache in caches_in(roles, part)]


def without_cache(model: Any) -> dict[str, Any]:
    """Return the keyword argument by which a model with a cache is told to do without it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {USE_CACHE: False} if hasattr(config, USE_CACHE) or hasattr(text, USE_CACHE) else {}


def is_filled(cache: Any) -> bool:
    """Return whether the cache holds tokens, as far as that is known without waiting for a device."""
    if not isinstance(cache, _cache_types):
        return True  # nothing says that it does not
    if not getattr(cache, "layers", True):
        return False
    try:
        length = cache.get_seq_length()
    except ValueError:  # it has layers of linear attention alone, which do not count
        length = cache.has_previous_state()
    if isinstance(length, Tensor):
        return not torch.compiler.is_dynamo_compiling() and bool(length > 0)
    return bool(length)


def follow_caches(owner: nn.Module, roles: Roles) -> None:
    """Let caches take the state along when their rows are reordered, repeated, selected or reset.

    Their classes are changed for as long as there is such an `owner`; `leave_caches` takes one out.
    """
    global _cache_types
    _followers.add(owner)
    classes = roles.caches
    with contextlib.suppress(ImportError):
        from transformers import Cache, EncoderDecoderCache

        _cache_types = (Cache,)
        classes = (Cache, EncoderDecoderCache, *classes)
    for cls in classes:
        for name, change in _CHANGES.items():
            method = vars(cls).get(name)
            if method is not None and (cls, name) not in _methods:
                _methods[cls, name] = method
                setattr(cls, name, _followed(method, change))


def leave_caches(owner: nn.Module) -> None:
    """Undo `follow_caches` for `owner`, and with the last one for the classes."""
    _followers.discard(owner)
    while _methods and not _followers:
        (cls, name), method = _methods.popitem()
        setattr(cls, name, method)


def _followed(method: Callable[..., Any], change: Callable[..., Tensor]) -> Callable[..., Any]:
    @functools.wraps(method)
    def followed(cache: Any, *args: Any, **kwargs: Any) -> Any:
        state = vars(cache).get(STATE)
        if state is not None:
            vars(cache)[STATE] = {name: change(tensor, *args, **kwargs) for name, tensor in state.items()}
        return method(cache, *args, **kwargs)

    return followed


def _crop(_: Tensor, tokens_to_remove: Any) -> Tensor:
    raise MHCError("MHC229", f"{tokens_to_remove} tokens are to be taken back, as assisted decoding does")


_CHANGES: dict[str, Callable[..., Tensor]] = {
    "reset": torch.zeros_like,
    "reorder_cache": lambda t, beam_idx: t.index_select(0, beam_idx.to(t.device)),
    "batch_repeat_interleave": lambda t, repeats: t.repeat_interleave(repeats, 0),
    "batch_select_indices": lambda t, indices: t[indices],
    "crop": _crop,
}


# --- models -----------------------------------------------------------------------------------------------------------

_INIT, _COMPILED_CALL = "_init_weights", "get_compiled_call"
_RECORDERS, _RECORDED = "_mhc_recorders", "_output_capturing_hooks_installed"


def on_convert(root: nn.Module) -> None:
    """Tell the models of `root` of the streams that they have just been given.

    `generate()` compiles them with this backend (on a GPU it compiles static caches by itself), and `init_weights`
    starts stream parameters that have no values yet, as after `to_empty()`.
    """
    for parameters in owners(root).values():
        for module in parameters.modules():
            # transformers passes by modules that are marked so: what was made or loaded is not drawn again.
            values: Any = not any(t.is_meta for t in module.parameters(recurse=False))
            module._is_hf_initialized = values
    for module in _models(root):
        if hasattr(module, _COMPILED_CALL):
            replace_attribute(module, _COMPILED_CALL, functools.partial(_compiled_call, module))
        if owners(module):
            replace_attribute(module, _INIT, functools.partial(_start, module))
    for owner in root.modules():
        if is_converted(owner):
            skip_input_gradients(owner)


def on_restore(root: nn.Module) -> None:
    """Take off what this package did to hooks; attributes are put back by `mhc_compile.owner`."""
    remove_recorders(root)
    for module in root.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, _EagerOnly):
                module._forward_hooks[key] = hook.hook


def _models(root: nn.Module) -> list[Any]:
    transformers = sys.modules.get("transformers")
    return [m for m in root.modules() if transformers is not None and isinstance(m, transformers.PreTrainedModel)]


def _start(model: Any, module: nn.Module) -> None:
    if isinstance(module, (Started, MemoryTable)):
        module.reset_parameters()
    else:
        getattr(type(model), _INIT)(model, module)


def _compiled_call(model: Any, compile_config: Any) -> Callable[..., Any]:
    from transformers import CompileConfig

    config = CompileConfig() if compile_config is None else copy.copy(compile_config)
    if config.backend == "inductor":
        config.backend = "mhc"
    return type(model).get_compiled_call(model, config)


def skip_input_gradients(owner: nn.Module) -> bool:
    """Skip while tracing the hooks by which transformers and peft make embeddings of frozen weights need gradients.

    Checkpointed blocks need that in eager mode alone: a graph holds the parameters of its blocks. Returns whether
    there was a hook to change.
    """
    changed = False
    for module in owner.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", "") in ("make_inputs_require_grad", "make_inputs_require_grads"):
                module._forward_hooks[key] = _EagerOnly(hook)
                changed = True
    return changed


class _EagerOnly:
    """A forward hook that does nothing while Dynamo traces."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *call: Any) -> Any:
        return None if torch.compiler.is_dynamo_compiling() else self.hook(*call)


def install_recorders(root: nn.Module) -> bool:
    """Install the hooks by which transformers records hidden states. Returns whether they were missing.

    It does so itself when they are first asked for, under a lock that Dynamo cannot trace. They cannot be pickled, so
    a model that is never asked does not get them.
    """
    install = getattr(sys.modules.get("transformers.utils.output_capturing"), "maybe_install_capturing_hooks", None)
    if install is None or root not in _models(root) or getattr(root, _RECORDED, False):
        return False
    before = {module: set(module._forward_hooks) for module in root.modules()}
    marked = {module for module in before if _RECORDED in vars(module)}
    install(root)
    for module, keys in before.items():
        added = [key for key in module._forward_hooks if key not in keys]
        if added or (_RECORDED in vars(module) and module not in marked):
            vars(module)[_RECORDERS] = added
    return True


def records_outputs(decorator: object) -> bool:
    """Return whether a decorator is that by which transformers adds what hooks recorded to the output of a forward."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return decorator is not None and decorator is getattr(module, "capture_outputs", None)


def base_model(model: nn.Module) -> str:
    """Return the path of what transformers calls the base model of `model`; "" where that is `model`, or none is."""
    base = getattr(model, "base_model", None)
    return next((path for path, module in model.named_modules() if module is base), "")


def remove_recorders(root: nn.Module) -> None:
    """Undo `install_recorders` below `root`."""
    for module in root.modules():
        added = vars(module).pop(_RECORDERS, None)
        for key in added or ():
            module._forward_hooks.pop(key, None)
        if added is not None:
            vars(module).pop(_RECORDED, None)
