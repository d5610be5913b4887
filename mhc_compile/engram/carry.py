"""What a call of an owner that looks ids up brings into its graph beside parameters, and what a cached call carries on.

By name, in the order in which `mhc::mark` gets them:

    attention_mask, position_ids     of the call, where they are two-dimensional
    compression                      the projection of ids [V]
    table:<name>:<handle>:<dtype>:near|far    the anchor of a table; far: looked up ahead
    weight:<name>                    a table's rows, for programs that run without this package
    state.ids [B, N-1], state.reach [B], state.gate:<layer> [B, P, n], state.value:<layer> [B, P, C]
    state.over.ids [B, n-1], state.over.reach [B]

Tables are named by a memory's layer, or `over-encoding`.
The state lies in the cache that transformers hands from call to call, as `cache.mhc_memory`, and follows what is done
to it: beams are reordered, batches repeated and selected. Dynamo traces this module.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.engram.parameters import ROOT
from mhc_compile.kernels.engram.hashing import check_ids

STATE = "mhc_memory"
EXPORTING = False
"""Whether `mhc_compile.export` is tracing: torch 2.11 says so of every trace."""
CACHES = ("past_key_values", "cache_params")
"""What transformers calls the argument and the output that hold a cache."""


def call_arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def ids_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """The call's token ids: `input_ids`, or else its first two-dimensional tensor of integers."""
    for name in ("input_ids", *arguments):
        found = arguments.get(name)
        if isinstance(found, Tensor) and found.ndim == 2 and found.dtype in (torch.int64, torch.int32):
            return found
    return None


def given_of(parameters: Any, arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `mhc::mark` is given beside the parameters, by name."""
    found: dict[str, Tensor] = {}
    for name in ("attention_mask", "position_ids"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim == 2:
            found[name] = value
    if parameters.memory is not None and parameters.memory.compressed:
        found["compression"] = parameters.get_submodule(ROOT).compression
    for name in parameters.table_places:
        table = parameters.table(name)
        place = "far" if table.early else "near"
        dtype = "float32" if table.dtype == torch.float32 else "bfloat16"
        if not EXPORTING:  # an exported program has no look-up of ours
            found[f"table:{name}:{table.handle}:{dtype}:{place}"] = table.anchor
        weight = getattr(table, "weight", None)
        if weight is not None and table.dtype.itemsize > 1:
            found[f"weight:{name}"] = weight
    for name in state:
        found[f"state.{name}"] = state[name]
    return found


def state_of(parameters: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state that this call reads and writes: of its cache, new for an empty one, none where nothing is cached.

    Raises MHC229 for a cache that was filled without it.
    """
    cache = cache_of(arguments)
    if cache is not None:
        held: dict[str, Tensor] | None = getattr(cache, STATE, None)
        if held is None:
            refuse_foreign_cache(arguments)
            held = new_state(parameters, arguments)
            setattr(cache, STATE, held)
        return held
    # The owner makes a cache itself where it is to use one and gets none.
    if torch.is_grad_enabled() or arguments.get("use_cache") is False:
        return {}
    return new_state(parameters, arguments)


def refuse_ids(parameters: Any, arguments: Mapping[str, Any]) -> None:
    """Raise MHC221 for ids outside the vocabulary; on a CPU, where looking at them makes nothing wait."""
    ids = ids_of(arguments)
    if ids is not None and ids.device.type == "cpu":
        check_ids(ids, parameters.vocab)


def refuse_foreign_cache(arguments: Mapping[str, Any]) -> None:
    """Raise MHC229 for a cache that was filled without the state."""
    cache = cache_of(arguments)
    if cache is not None and getattr(cache, STATE, None) is None and _filled(cache):
        raise MHCError("MHC229", "the cache holds tokens whose ids and convolution inputs are not known")


def keep(output: Any, arguments: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Hand `state` on with the cache that the owner made itself."""
    if not state or cache_of(arguments) is not None:
        return
    for name in CACHES:
        cache = getattr(output, name, None)
        if cache is not None:
            setattr(cache, STATE, state)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache that the call gets."""
    for name in CACHES:
        found = arguments.get(name)
        if found is not None:
            return found
    return None


def new_state(parameters: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state in front of the first token; empty for a call without ids, which the pass refuses."""
    ids = ids_of(arguments)
    if ids is None:
        return {}
    batch, device = ids.shape[0], ids.device
    state: dict[str, Tensor] = {}
    if parameters.memory is not None:
        before, past = (batch, parameters.memory_order - 1), parameters.memory_history
        state["ids"] = torch.full(before, parameters.memory_fill, dtype=torch.int64, device=device)
        state["reach"] = torch.zeros(batch, dtype=torch.int64, device=device)
        streams, hidden, dtype = parameters.spec.streams, parameters.hidden, parameters.memory_dtype
        for layer in parameters.memory_layers if past else ():
            state[f"gate:{layer}"] = torch.zeros(batch, past, streams, dtype=dtype, device=device)
            state[f"value:{layer}"] = torch.zeros(batch, past, hidden, dtype=dtype, device=device)
    if parameters.over is not None:
        state["over.ids"] = torch.zeros(batch, parameters.over_order - 1, dtype=torch.int64, device=device)
        state["over.reach"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return state


def _filled(cache: Any) -> bool:
    """Whether the cache holds tokens, as far as that is known without waiting for a device."""
    length = cache.get_seq_length() if getattr(cache, "layers", True) else 0
    if isinstance(length, Tensor):
        return not torch.compiler.is_dynamo_compiling() and bool(length > 0)
    return bool(length)


def follow_caches() -> None:
    """Let transformers' caches take the state along when their rows are reordered, repeated, selected or reset."""
    caches: Any = sys.modules.get("transformers.cache_utils")
    for cls in () if caches is None else (caches.Cache, caches.EncoderDecoderCache):
        for name, change in _CHANGES.items():
            method = vars(cls).get(name)
            if method is not None and not hasattr(method, STATE):
                setattr(cls, name, _followed(method, change))


def _followed(method: Callable[..., Any], change: Callable[..., Tensor]) -> Callable[..., Any]:
    @functools.wraps(method)
    def followed(cache: Any, *args: Any, **kwargs: Any) -> Any:
        state = vars(cache).get(STATE)
        if state is not None:
            vars(cache)[STATE] = {name: change(tensor, *args, **kwargs) for name, tensor in state.items()}
        return method(cache, *args, **kwargs)

    setattr(followed, STATE, True)
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
