"""Keep a converted model converted: its stream owners run through the backend however they are called.

An *armed* owner is an instance of a same-named subclass of its class. Called eagerly, it runs its forward through a
`torch.compile(backend="mhc")` of its own. Traced by Dynamo (an outer `torch.compile`), it puts `mhc::mark` in front of
its first tensor; our backend takes the mark out, and under any other backend the mark raises MHC301, so the residual
form never runs by accident. The mark also makes the stream parameters ordinary inputs of the graph.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import mhc_compile.kernels.ops  # noqa: F401  (registers mhc::mark)
from mhc_compile.diagnostics import MHCError
from mhc_compile.engram import carry
from mhc_compile.guard import guard, holds_tensor, unguard, with_first_tensor
from mhc_compile.integrations.transformers import Roles, follow_caches
from mhc_compile.parameters import active_parameters
from mhc_compile.passes.base import PROBE
from mhc_compile.sharded import gathered_layers
from mhc_compile.traceable import install_recorders, leave_fast_path, skip_input_gradients

_OWN_FORWARD = "_mhc_forward"
"""Attribute of an armed owner: the forward that was set on the instance before, which would hide that of the class."""

RECOMPILE_LIMIT = 64
"""Prefill, decode, each batch layout and training are graphs of their own; Dynamo's default of 8 is soon used up."""

_armed: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_compiled: weakref.WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], Callable[[], Callable[[], None]]]] = (
    weakref.WeakKeyDictionary()
)
"""For each owner what runs it, and what puts `tracing_config` into force and returns how to undo that."""


def is_armed(module: nn.Module) -> bool:
    """Whether `module` is a stream owner whose calls go through the backend."""
    # Without parameters it is a residual module that something made from the class of an armed one.
    return hasattr(type(module), "_mhc_base") and "mhc" in module._modules


def refuse_unarmable(owner: nn.Module, path: str) -> None:
    """Raise MHC207 where `owner` has an attribute `mhc` already, or a class that cannot be derived from."""
    if hasattr(owner, "mhc"):
        raise MHCError("MHC207", f"{type(owner).__name__} has an attribute named mhc", module=path)
    if isinstance(owner, torch.fx.GraphModule):
        raise MHCError("MHC207", "each GraphModule has a class of its own", module=path)
    if "_original_forward" in vars(owner):
        # `Accelerator.unwrap_model` would put the residual forward back in front of ours.
        raise MHCError("MHC207", f"accelerate has replaced {type(owner).__name__}.forward", module=path)


def arm(owner: nn.Module) -> None:
    """Swap the class of `owner`, which holds its `StreamParameters` as `owner.mhc`, for the armed subclass."""
    if not hasattr(type(owner), "_mhc_base"):
        owner.__class__ = armed_class(type(owner))
        if "forward" in vars(owner) and not _wraps_own_forward(owner):
            vars(owner)[_OWN_FORWARD] = vars(owner).pop("forward")
        parameters = active_parameters(owner.mhc)  # type: ignore[arg-type]
        guard(owner, parameters.readers)
        if parameters.reads_ids:
            follow_caches(type(owner)._mhc_roles)  # type: ignore[attr-defined]
        leave_fast_path(owner)
        skip_input_gradients(owner)
        _renew_own_forward(owner)


def _wraps_own_forward(owner: nn.Module) -> bool:
    """Whether accelerate replaced `forward` on the instance: it calls the original through `_old_forward`."""
    old = vars(owner).get("_old_forward")
    return isinstance(old, types.MethodType) and old.__self__ is owner


def _renew_own_forward(owner: nn.Module) -> None:
    if _wraps_own_forward(owner):
        vars(owner)["_old_forward"] = types.MethodType(type(owner).forward, owner)


def disarm(owner: nn.Module) -> None:
    """Give `owner` its original class back."""
    base = getattr(type(owner), "_mhc_base", None)
    if base is None:
        return
    owner.__class__ = base
    if _OWN_FORWARD in vars(owner):
        vars(owner)["forward"] = vars(owner).pop(_OWN_FORWARD)
    unguard(owner)
    _compiled.pop(owner, None)
    _renew_own_forward(owner)


def armed_class(base: type) -> type:
    """The armed subclass of `base`: one for each class, with the same name, module and signature."""
    if base in _armed:
        return _armed[base]
    owner_class: Any = base
    base_forward = owner_class.forward
    roles = Roles.of(base_forward)

    def unarmed(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self, _OWN_FORWARD, None)
        return base_forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = active_parameters(self.mhc)
        if not parameters.reads_ids:
            args, kwargs = _mark(self, args, kwargs, {})
            return unarmed(self, *args, **kwargs)
        arguments = roles.named(args, kwargs)
        state = carry.state_of(parameters, roles, arguments)
        given = {**carry.table_inputs(parameters), **carry.call_inputs(roles, arguments, state)}
        args, kwargs = _mark(self, args, kwargs, given)
        output = unarmed(self, *args, **kwargs)
        carry.keep(output, roles, arguments, state)
        return output

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_armed(self):
            return unarmed(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return traced(self, *args, **kwargs)
        held = active_parameters(self.mhc)
        if held.reads_ids:
            carry.refuse_ids(held, roles, roles.named(args, kwargs))
        return _call_compiled(self, traced, args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        _, _, *state = owner_class.__reduce_ex__(self, protocol)
        return (_new_armed, (base, is_armed(self) and active_parameters(self.mhc).reads_ids), *state)

    forward.__signature__ = inspect.signature(base_forward)  # type: ignore[attr-defined]
    # What unwraps a model, as accelerate does, would go past this forward to the residual one.
    del forward.__wrapped__
    armed = type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__reduce_ex__": reduce_ex,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_mhc_base": base,
            "_mhc_roles": roles,
        },
    )
    _armed[base] = armed
    return armed


def _new_armed(base: type, reads_ids: bool) -> Any:
    cls: Any = armed_class(base)
    if reads_ids:
        follow_caches(cls._mhc_roles)
    return cls.__new__(cls)


def _mark(
    owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the first tensor argument through `mhc::mark`, with what the call brings for look-ups and probes."""
    _refuse_unmarkable(owner, args, kwargs)
    held = active_parameters(owner.mhc)
    if held.probe_slot is not None:
        given = {**given, PROBE: held.probe_slot}
    carried = (list(held.in_graph().values()), held.signature, list(given.values()), ",".join(given))
    return with_first_tensor(args, kwargs, lambda x: torch.ops.mhc.mark(x, *carried))


def _refuse_unmarkable(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if next(active_parameters(owner.mhc).parameters(), None) is None:
        raise MHCError("MHC212", f"{type(owner).__name__}.mhc has no parameters")
    if not any(holds_tensor(a) for a in (*args, *kwargs.values())):
        raise MHCError("MHC207", f"{type(owner).__name__} was called without a tensor argument")


def _call_compiled(owner: Any, traced: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_exporting():
        raise MHCError("MHC301", "torch.export has no backend")
    _refuse_transforms(owner)
    if owner not in _compiled:
        _compiled[owner] = _compile(owner, traced), torch._dynamo.config._make_closure_patcher(**tracing_config())
    run, configure = _compiled[owner]
    restore = configure()
    try:
        with gathered_layers(owner):
            return run(owner, *args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MHCError):
            raise error.inner_exception from None
        raise
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        # Raised inside the trace, these are breaks to Dynamo like any other.
        _refuse_unmarkable(owner, args, kwargs)
        if active_parameters(owner.mhc).reads_ids:
            roles = type(owner)._mhc_roles
            carry.refuse_foreign_cache(roles, roles.named(args, kwargs))
        hidden = (skip_input_gradients(owner), install_recorders(owner))
        if not any(hidden):
            raise graph_break_error(owner, error) from error
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise MHCError("MHC307", f"{RECOMPILE_LIMIT} of {type(owner).__name__}") from error
    finally:
        restore()
    return _call_compiled(owner, traced, args, kwargs)


def _refuse_transforms(owner: nn.Module) -> None:
    if torch._C._are_functorch_transforms_active():
        raise MHCError("MHC311", "a transform of torch.func is active", module=type(owner).__name__)
    if forward_ad._current_level >= 0:
        raise MHCError("MHC311", "forward-mode differentiation is active", module=type(owner).__name__)


def tracing_config() -> dict[str, Any]:
    """Settings of Dynamo under which an owner is captured as one graph."""
    return {
        # DDP's optimizer would split the owner's graph; its buckets are still reduced as gradients arrive.
        "optimize_ddp": False,
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 4 * RECOMPILE_LIMIT,
        # Hooks put on a layer between two calls must run, as they would in the residual model.
        "skip_nnmodule_hook_guards": False,
        # A model that logs (transformers warns once that checkpointing turns the cache off) is no reason to refuse it.
        _IGNORED: _Functions(set.union(getattr(torch._dynamo.config, _IGNORED), _log_methods())),
    }


_IGNORED = next(k for k in ("ignore_logging_functions", "ignore_logger_methods") if hasattr(torch._dynamo.config, k))


class _Functions(set[Any]):
    """A set of functions that lists itself by name: torch 2.11 sorts this setting and writes it as JSON."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(str(getattr(f, "__qualname__", f)) for f in super().__iter__()))


def _log_methods() -> list[Any]:
    known = (getattr(logging.Logger, name, None) for name in (*_LOG_METHODS, "warning_once"))  # transformers adds this
    return [method for method in known if method is not None]


_LOG_METHODS = ("debug", "info", "warning", "error", "critical")


def graph_break_error(owner: nn.Module, error: Exception) -> MHCError:
    """MHC104 with Dynamo's own account of the break, or the code of what is known to break."""
    account = str(error).replace("\\", "/")
    known = {"/accelerate/hooks.py": "MHC211", "/distributed/fsdp/": "MHC212"}
    for place, code in known.items():
        if place in account:
            return MHCError(code, module=type(owner).__name__)
    return graph_break(str(error), type(owner).__name__)


def call_error(model: nn.Module, error: Exception) -> MHCError:
    """Return MHC111 for an operation of the model's own that rejects what it is given, with its message and place."""
    return _coded("MHC111", str(error), type(model).__name__)


def graph_break(account: str, module: str) -> MHCError:
    """MHC104 from the text by which Dynamo accounts for a break: its explanation, its hints, the user's line."""
    return _coded("MHC104", account, module)


def _coded(code: str, account: str, module: str) -> MHCError:
    lines = [ln.strip() for ln in account.splitlines() if ln.strip()]
    told = [ln for ln in lines if ln.startswith(("Explanation:", "Hint:"))]
    where = [ln for ln in lines if ln.startswith("File ")]
    return MHCError(code, " ".join(told or lines[:1]), module=module, source=where[-1] if where else None)


def _compile(owner: Any, traced: Callable[..., Any]) -> Callable[..., Any]:
    from mhc_compile.backend import Backend

    # Dynamo keeps compiled code by code object: a copy for each owner keeps their recompile counts apart.
    assert isinstance(traced, types.FunctionType)
    own = types.FunctionType(
        traced.__code__.replace(), traced.__globals__, traced.__name__, traced.__defaults__, traced.__closure__
    )
    return torch.compile(own, backend=Backend(active_parameters(owner.mhc).options), fullgraph=True)
