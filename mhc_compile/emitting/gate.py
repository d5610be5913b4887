"""Compare an emitted module with the graph rewrite of the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.file import Source
from mhc_compile.emitting.graph_rewrite import GraphRewrite
from mhc_compile.modes import in_mode, kept_buffers

TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-3)}
"""Largest differences of outputs and of gradients by dtype, relative to the largest entry of each tensor."""
FLOOR = 1e-2
"""The least size that errors are relative to, as a part of the largest gradient: that of a key's bias is rounding."""
WHEN = ("at the start", "with perturbed streams")
NOISE = 0.3
"""Standard deviation of what perturbs the parameters of streams."""


class Results:
    """The outputs of one call and the gradients of a random function of them."""

    def __init__(self, call: Callable[[], Any], parameters: Mapping[Any, Tensor]) -> None:
        torch.manual_seed(0)
        self.outputs = [t for t in _tensors(call()) if t.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        total = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in self.outputs
        )
        wanted = {name: p for name, p in parameters.items() if p.requires_grad}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)  # type: ignore[arg-type]
        self.outputs = [t.detach() for t in self.outputs]
        self.gradients = dict(zip(wanted, found, strict=True))

    def difference(self, other: Results, when: str) -> float:
        """Return the largest relative difference of outputs from `other`, the same of the graph rewrite.

        Raises MHC709 where an output or a gradient is not equal to rounding.
        """
        if [t.shape for t in self.outputs] != [t.shape for t in other.outputs]:
            raise MHCError("MHC709", f"{when}, outputs have other shapes")
        errors = [0.0]
        for k, (one, two) in enumerate(zip(self.outputs, other.outputs, strict=True)):
            tolerance = TOLERANCE.get(one.dtype, TOLERANCE[torch.float32])[0]
            errors.append(_compare(f"{when}, output {k}", one, two, tolerance))
        largest = max((float(g.abs().max()) for g in other.gradients.values() if g is not None), default=0.0)
        for name, expected in other.gradients.items():
            found = self.gradients[name]
            if found is None or expected is None:
                if (found is None) != (expected is None):
                    raise MHCError("MHC709", f"{when}, {name} gets a gradient in one of them alone")
                continue
            tolerance = TOLERANCE.get(found.dtype, TOLERANCE[torch.float32])[1]
            _compare(f"{when}, the gradient of {name}", found, expected, tolerance, floor=FLOOR * largest)
        return max(errors)


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float, *, floor: float = 1e-30) -> float:
    size = max(float(expected.abs().max()), floor) if found.numel() else 1.0
    error = float((found - expected).abs().max()) / size if found.numel() else 0.0
    if not error <= tolerance:
        raise MHCError("MHC709", f"{what} differs by {error:.1e} relative, {tolerance:.0e} are allowed")
    return error


class Expected:
    """Holds what the graph rewrite of a model computes, at the start and with perturbed streams.

    Raises MHC1xx where the model's streams are not found, in training as in evaluation.
    """

    def __init__(
        self, rewrite: GraphRewrite, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool = False
    ) -> None:
        self.model, self.args, self.kwargs, self.training = rewrite.model, args, kwargs, training
        self.own = dict(rewrite.model.named_parameters())
        self._results(rewrite, self.own)  # makes the streams
        self.sites = {
            (owner, site): dict(of_owner.get_submodule(site).named_parameters())
            for owner, of_owner in rewrite.parameters.items()
            for site in of_owner.sites
        }
        streams = {(*key, name): p for key, of_site in self.sites.items() for name, p in of_site.items()}
        self.values: list[dict[Any, Tensor]] = []
        """The parameters of sites, at the start and perturbed."""
        self.results: list[Results] = []
        for _ in range(2):
            self.results.append(self._results(rewrite, {**self.own, **streams}))
            self.values.append({key: p.detach().clone() for key, p in streams.items()})
            perturb(list(streams.values()))

    def _results(self, program: Callable[..., Any], parameters: Mapping[Any, Tensor]) -> Results:
        with in_mode(self.model, training=self.training), kept_buffers(self.model):
            return Results(lambda: program(*self.args, **self.kwargs), parameters)

    def difference(self, source: Source, module: Any) -> float:
        """Return the largest relative difference of outputs of the model with the emitted module's streams.

        Raises MHC709 unless all outputs and gradients are equal to rounding.
        """
        model, errors = self.model, [0.0]
        names = {
            f"{path}.{name}": (*key, name) for key, path in source.sites.items() for name in self.sites.get(key, ())
        }
        try:
            module.add_streams(model).to(next(iter(self.own.values())).dtype)
            emitted = dict(model.named_parameters())
            # Sites of layers that training leaves out are in the module alone.
            absent = [f"{path}." for key, path in source.sites.items() if self.training and key not in self.sites]
            found_names = {name for name in emitted if not name.startswith(tuple(absent))}
            if found_names != {*self.own, *names}:
                raise MHCError("MHC709", f"parameters {sorted(found_names ^ {*self.own, *names})[:3]}")
            ours: dict[Any, Tensor] = {names.get(name, name): p for name, p in emitted.items()}
            for when, values, expected in zip(WHEN, self.values, self.results, strict=True):
                with torch.no_grad():
                    for key, value in values.items():
                        ours[key].copy_(value)
                found = self._results(model, ours)
                errors.append(found.difference(expected, when))
        except MHCError:
            raise
        except Exception as error:  # whatever a wrong rewrite does
            raise MHCError("MHC709", f"it fails: {type(error).__name__}: {error}") from error
        return max(errors)


def perturb(parameters: Sequence[Tensor]) -> None:
    """Move every parameter by noise."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.add_((NOISE * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p))


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor) and hasattr(leaves[0], "__dict__"):
        leaves = tree_leaves(dict(vars(leaves[0])))  # an object that pytree does not know
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def runs_in(model: nn.Module, dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether `model` computes outputs and gradients in `dtype`."""
    try:
        Results(lambda: model(*cast(args, dtype), **cast(kwargs, dtype)), dict(model.named_parameters()))
    except Exception:  # an operation without a kernel for it, in whatever way it says so
        return False
    return True


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Return `values` with floating tensors in `dtype`."""
    return torch.utils._pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )
