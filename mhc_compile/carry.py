"""Pass extra graph inputs to owners with memories, and keep the state of a cached call.

Each tensor comes under a tuple that describes it as in `mhc_compile.passes.marks`. The state is kept in the cache that
transformers passes from call to call, as `cache.mhc_memory`, and changes with it when beams are reordered or batches
repeated and selected. Dynamo traces this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import (
    STATE,
    USE_CACHE,
    Roles,
    batch_of,
    cache_of,
    caches_in,
    ids_of,
    is_filled,
    mask_of,
    positions_of,
    unknown_of,
)
from mhc_compile.kernels.memory.engram import ROOT
from mhc_compile.kernels.memory.hashing import check_ids
from mhc_compile.kernels.memory.overencoding_settings import TABLE as OVER_TABLE
from mhc_compile.passes.marks import Described

State = dict[tuple[str, str], Tensor]
"""The state of a cached call, by the fields of its `mhc_compile.passes.marks.State`."""
EXPORTING = False
"""Whether `mhc_compile.export` is tracing: torch 2.11 says so of every trace."""


def call_inputs(roles: Roles, arguments: Mapping[str, Any], state: State) -> dict[Described, Tensor]:
    """Return the inputs of `mhc::mark` that belong to the call."""
    inputs: dict[Described, Tensor] = {}
    ids, mask, positions = ids_of(roles, arguments), mask_of(arguments), positions_of(arguments)
    if ids is not None:
        inputs["Argument", "ids"] = ids
    if mask is not None:
        inputs["Argument", "mask"] = mask
    if positions is not None:
        inputs["Argument", "positions"] = positions
    for name, value in unknown_of(roles, arguments).items():
        inputs["Unknown", name] = value
    for part, of in state:
        inputs["State", part, of] = state[part, of]
    return inputs


def table_inputs(parameters: Any) -> dict[Described, Tensor]:
    """Return the inputs of `mhc::mark` that belong to the owner, besides its parameters."""
    inputs: dict[Described, Tensor] = {}
    engram = parameters.memories.engram
    if engram is not None and engram.compressed:
        inputs["Compression",] = parameters.get_submodule(ROOT).compression
    for name in parameters.table_places:
        table = parameters.table(name)
        dtype = "float32" if table.dtype == torch.float32 else "bfloat16"
        if not EXPORTING:  # an exported program has no look-up of ours
            inputs["Table", name, table.handle, dtype, table.early] = table.anchor
        weight = getattr(table, "weight", None)
        if weight is not None and table.dtype.itemsize > 1:
            inputs["Weight", name] = weight
    return inputs


def state_of(parameters: Any, roles: Roles, arguments: Mapping[str, Any]) -> State:
    """Return the state that this call reads and writes: its cache's, new for an empty one, {} if nothing is cached.

    Raises MHC229 for a cache that was filled without it.
    """
    cache = cache_of(roles, arguments)
    if cache is not None:
        state: State | None = getattr(cache, STATE, None)
        if state is None:
            refuse_foreign_cache(roles, arguments)
            state = new_state(parameters, roles, arguments)
            setattr(cache, STATE, state)
        return state
    # The owner may make a cache itself.
    if torch.is_grad_enabled() or arguments.get(USE_CACHE) is False:
        return {}
    return new_state(parameters, roles, arguments)


def refuse_ids(parameters: Any, roles: Roles, arguments: Mapping[str, Any]) -> None:
    """Raise MHC221 for ids outside the vocabulary on a CPU; on a GPU, checking would force a synchronisation."""
    ids = ids_of(roles, arguments)
    if ids is not None and ids.device.type == "cpu":
        check_ids(ids, parameters.vocab)


def refuse_foreign_cache(roles: Roles, arguments: Mapping[str, Any]) -> None:
    """Raise MHC229 for a cache that was filled without the state, and MHC236 for two."""
    cache = cache_of(roles, arguments)
    if cache is not None and getattr(cache, STATE, None) is None and is_filled(cache):
        raise MHCError("MHC229", "the cache holds tokens whose ids and convolution inputs are not known")


def keep(output: Any, roles: Roles, arguments: Mapping[str, Any], state: State) -> None:
    """Attach `state` to the cache that the owner made itself."""
    if state and cache_of(roles, arguments) is None:
        for cache in caches_in(roles, output):
            setattr(cache, STATE, state)


def new_state(parameters: Any, roles: Roles, arguments: Mapping[str, Any]) -> State:
    """Return the state before the first token; empty for a call without ids, which the pass rejects."""
    placed = batch_of(roles, arguments)
    if placed is None:
        return {}
    batch, device = placed
    state: State = {}
    engram, over = parameters.memories.engram, parameters.memories.over_encoding
    if engram is not None:
        before, past = (batch, engram.order - 1), engram.history
        state["ids", ""] = torch.full(before, engram.fill, dtype=torch.int64, device=device)
        state["reach", ""] = torch.zeros(batch, dtype=torch.int64, device=device)
        streams, hidden = parameters.spec.streams, parameters.hidden
        dtype = parameters.get_parameter(f"{ROOT}.{engram.paths[0]}.key").dtype
        for layer in engram.paths if past else ():
            state["gate", layer] = torch.zeros(batch, past, streams, dtype=dtype, device=device)
            state["value", layer] = torch.zeros(batch, past, hidden, dtype=dtype, device=device)
    if over is not None:
        state["ids", OVER_TABLE] = torch.zeros(batch, over.hash.order - 1, dtype=torch.int64, device=device)
        state["reach", OVER_TABLE] = torch.zeros(batch, dtype=torch.int64, device=device)
    return state
