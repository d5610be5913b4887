"""Convert stream owners and restore them: a converted owner runs through the backend however it is called.

A converted owner is an instance of a same-named subclass of its class. Called eagerly, it runs its forward through a
`torch.compile(backend="mhc")` of its own. Traced by Dynamo (an outer `torch.compile`), it inserts `mhc::mark` before
its first tensor; our backend removes the mark, and under any other backend the mark raises MHC301, so the residual
form never runs by accident. The mark also makes the stream parameters ordinary inputs of the graph.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import mhc_compile.kernels.ops  # noqa: F401  (registers mhc::mark)
from mhc_compile import carry
from mhc_compile.diagnostics import MHCError
from mhc_compile.guard import guard, holds_tensor, unguard, with_first_tensor
from mhc_compile.integrations import accelerate, peft, saving, transformers
from mhc_compile.integrations.attributes import replace_attribute, restore_attributes
from mhc_compile.parameters import StreamParameters, active_parameters, is_converted, owners
from mhc_compile.passes.marks import Described, inputs_as_text
from mhc_compile.sharded import gathered_layers
from mhc_compile.tracing import RECOMPILE_LIMIT, graph_break_error, traced_error, tracing_patcher

_ON_CONVERT = (accelerate.on_convert, peft.on_convert, transformers.on_convert, saving.on_convert)
_ON_RESTORE = (transformers.on_restore, peft.on_restore, accelerate.on_restore)
"""Called with the model to prepare other libraries, and to undo it; replaced attributes are restored afterwards."""
BACKEND = "mhc_compile"
"""The name under which `mhc_compile.backend` registers itself with Dynamo."""
_OWN_FORWARD = "_mhc_forward"
"""Attribute of a converted owner: the forward that was set on the instance before, which would hide that of the class.
"""

_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_Runs = tuple[Callable[..., Any], Callable[[], Callable[[], None]]]
_compiled: weakref.WeakKeyDictionary[nn.Module, _Runs] = weakref.WeakKeyDictionary()
"""For each owner what runs it, and what puts `tracing_config` into force and returns how to undo that."""


def refuse_unconvertible(owner: nn.Module, path: str) -> None:
    """Raise MHC207 where `owner` has an attribute `mhc` already, or a class that cannot be derived from."""
    if hasattr(owner, "mhc"):
        raise MHCError("MHC207", f"{type(owner).__name__} has an attribute named mhc", module=path)
    if isinstance(owner, torch.fx.GraphModule):
        raise MHCError("MHC207", "each GraphModule has a class of its own", module=path)
    accelerate.refuse_unconvertible(owner, path)


def convert_owners(root: nn.Module, parameters: Mapping[str, StreamParameters]) -> None:
    """Convert the owners at the paths in `parameters`; all or nothing.

    Raises MHC207 where one of them cannot be converted.
    """
    for path in parameters:
        refuse_unconvertible(root.get_submodule(path), path)
    for path, own in parameters.items():
        owner = root.get_submodule(path)
        owner.add_module("mhc", own)
        _convert(owner, own)
    for on_convert in _ON_CONVERT:
        on_convert(root)


def restore_owners(root: nn.Module) -> None:
    """Undo `convert_owners`: nothing of it is left."""
    for on_restore in _ON_RESTORE:
        on_restore(root)
    for path in owners(root):
        _restore(root.get_submodule(path))
    for module in root.modules():
        restore_attributes(module)


def _convert(owner: Any, parameters: StreamParameters) -> None:
    """Swap the class of `owner`."""
    # The class may be that of another converted owner: `type(model)(...)` made this one.
    owner.__class__ = converted_class(getattr(type(owner), "_mhc_base", type(owner)))
    if "forward" in vars(owner) and not accelerate.wraps_forward(owner):
        vars(owner)[_OWN_FORWARD] = vars(owner).pop("forward")
    guard(owner, parameters.readers)
    if parameters.reads_ids:
        transformers.follow_caches(owner, type(owner)._mhc_roles)
    # Without gradients, torch runs a whole `nn.TransformerEncoderLayer` as one operator that hides its sites, if it
    # knows the activation; the ordinary path computes the same from the module's own.
    for module in owner.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            replace_attribute(module, "activation_relu_or_gelu", 0)


def _restore(owner: Any) -> None:
    """Give `owner` its own class back."""
    if not is_converted(owner):  # a second path to one that was restored
        return
    owner.__class__ = type(owner)._mhc_base
    if _OWN_FORWARD in vars(owner):
        vars(owner)["forward"] = vars(owner).pop(_OWN_FORWARD)
    del owner._modules["mhc"]
    unguard(owner)
    transformers.leave_caches(owner)
    _compiled.pop(owner, None)


def compile_anew(owner: nn.Module) -> None:
    """Forget what runs `owner`: its next call is compiled with the options that its parameters have by then."""
    _compiled.pop(owner, None)


def converted_class(base: type) -> type:
    """Return the subclass for converted owners of class `base`: one for each, with the same name and signature."""
    if base in _classes:
        return _classes[base]
    owner_class: Any = base
    base_forward = owner_class.forward
    roles = transformers.Roles.of(base_forward)

    def residual(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self, _OWN_FORWARD, None)
        return base_forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = active_parameters(self.mhc)
        if not parameters.reads_ids:
            args, kwargs = _mark(self, args, kwargs, carry.table_inputs(parameters))
            return residual(self, *args, **kwargs)
        arguments = roles.named(args, kwargs)
        state = carry.state_of(parameters, roles, arguments)
        inputs = {**carry.table_inputs(parameters), **carry.call_inputs(roles, arguments, state)}
        args, kwargs = _mark(self, args, kwargs, inputs)
        output = residual(self, *args, **kwargs)
        carry.keep(output, roles, arguments, state)
        return output

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_converted(self):
            return residual(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return traced(self, *args, **kwargs)
        parameters = active_parameters(self.mhc)
        if parameters.reads_ids:
            carry.refuse_ids(parameters, roles, roles.named(args, kwargs))
        return _call_compiled(self, traced, args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        _, _, *state = owner_class.__reduce_ex__(self, protocol)
        return (_new_owner, (base, is_converted(self) and active_parameters(self.mhc).reads_ids), *state)

    forward.__signature__ = inspect.signature(base_forward)  # type: ignore[attr-defined]
    # Code that unwraps a model, such as accelerate, would follow it past this forward to the residual one.
    del forward.__wrapped__
    converted = type(
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
    _classes[base] = converted
    return converted


def _new_owner(base: type, reads_ids: bool) -> Any:
    cls: Any = converted_class(base)
    owner = cls.__new__(cls)
    if reads_ids:
        transformers.follow_caches(owner, cls._mhc_roles)
    return owner


def _mark(
    owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: dict[Described, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the first tensor argument through `mhc::mark`, with what the call brings for look-ups and probes."""
    _refuse_unmarkable(owner, args, kwargs)
    parameters = active_parameters(owner.mhc)
    if parameters.probe_slot is not None:
        inputs = {**inputs, ("ProbeSlot",): parameters.probe_slot}
    own = list(parameters.in_graph().values())
    carried = (own, parameters.signature, list(inputs.values()), inputs_as_text(inputs))
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
        _compiled[owner] = _compile(owner, traced)
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
        hidden = (transformers.skip_input_gradients(owner), transformers.install_recorders(owner))
        if not any(hidden):
            raise graph_break_error(owner, error) from error
    except torch._dynamo.exc.TorchRuntimeError as error:
        raise traced_error("MHC111", str(error), type(owner).__name__) from error
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


def _compile(owner: Any, traced: Callable[..., Any]) -> _Runs:
    # Dynamo keeps compiled code by code object: a copy for each owner keeps their recompile counts apart.
    assert isinstance(traced, types.FunctionType)
    own = types.FunctionType(
        traced.__code__.replace(), traced.__globals__, traced.__name__, traced.__defaults__, traced.__closure__
    )
    # By the name under which it registers itself when it is imported, here: the backend converts models at their first
    # call, and so imports this module. The entry point `mhc` is there only where the package is installed.
    import_module("mhc_compile.backend")
    given = active_parameters(owner.mhc).options
    options = given.for_calls()
    # From the first trace on: the next prompt has another length, and its cache another one at every token.
    dynamic = None if options is given else True
    run = torch.compile(own, backend=BACKEND, options=dict(vars(options)), fullgraph=True, dynamic=dynamic)
    return run, tracing_patcher(dynamic=bool(dynamic))
