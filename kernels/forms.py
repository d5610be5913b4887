"""The forms by name: those of this package, those given to `register`, those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import mhc_compile.kernels.ops  # noqa: F401  (registers the dialect)
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import hc, reference
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.depth import AttentionResiduals, BlockAttentionResiduals, DenseFormer
from mhc_compile.kernels.form import NEXT_PRE, DepthForm, Form, Parameter, SiteWriter, State, StreamForm
from mhc_compile.kernels.installed import load_installed
from mhc_compile.kernels.mudd import MUDDFormer, NormedMUDDFormer
from mhc_compile.kernels.spec import FORM_GROUP, FORM_NAMES, StreamSpec, form_names
from mhc_compile.kernels.start import DEFAULT, Start, start_alpha, start_bias, start_head, start_phi
from mhc_compile.kernels.value_residual import ValueResidual


class ManifoldConstrained(StreamForm):
    """mHC (arXiv 2512.24880) in all its conventions."""

    name = "mhc"
    op = torch.ops.mhc.coefficients.default

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return phi `[rows, n*C]`, alpha `[3]` and bias `[rows]`."""
        phi = (spec.rows, spec.streams * hidden)
        return {
            "phi": Parameter(phi, lambda: start_phi(phi, start)),
            "alpha": Parameter((3,), lambda: start_alpha(spec, hidden, start)),
            "bias": Parameter((spec.rows,), lambda: start_bias(spec, index)),
        }

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return fn `[n, n*C]`, base `[n]` and scale `[1]` where the exit is learned."""
        if spec.exit != "head":
            return {}
        n = spec.streams
        return {
            "fn": Parameter((n, n * hidden), lambda: start_head(spec, hidden, start)[0]),
            "base": Parameter((n,), lambda: start_head(spec, hidden)[1]),
            "scale": Parameter((1,), lambda: start_head(spec, hidden)[2]),
        }

    def coefficients(self, X: Tensor, spec: StreamSpec, **parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three maps of a site."""
        return reference.coefficients(X, parameters["phi"], parameters["alpha"], parameters["bias"], spec)

    def rewrite(self, site: SiteWriter) -> State:
        """Write aggregate, branch, distribute; where the convention defers `pre`, with that of the site before."""
        if not StreamSpec.parse(site.text).convention.fields.deferred:
            return super().rewrite(site)
        assert isinstance(site.read_state, Node)
        arguments = (site.read_state, *site.parameters, site.text)
        later, post, mixing = site.compute(self.op, *arguments, ranks=(1, 1, 2))
        if (pre := site.read_state.meta.get(NEXT_PRE)) is not None:
            site.read(torch.ops.mhc.aggregate.default, pre)
        else:
            site.read(torch.select, -2, 0)
        streams = site.write(torch.ops.mhc.distribute.default, post, mixing)
        streams.meta[NEXT_PRE] = later
        return streams

    def kernel(self, spec: StreamSpec, **fields: Any) -> Chain | None:
        """Return the fused chain."""
        return Chain(stream=spec, **fields)


class StaticHyperConnections(StreamForm):
    """Hyper-Connections (arXiv 2409.19606) whose coefficients are parameters."""

    name = "hc_static"
    reads_streams = False

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return bias `[2n + n^2]`."""
        n = spec.streams
        return {"bias": Parameter((2 * n + n * n,), lambda: hc.start_bias(n, index))}

    def coefficients(self, X: Tensor, spec: StreamSpec, **parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """Return the same three maps for every token."""
        return hc.static(X, **parameters)


class HyperConnections(StaticHyperConnections):
    """Hyper-Connections whose coefficients depend on the streams."""

    name = "hc"
    reads_streams = True

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return phi `[n + 2, C]`, alpha `[2]` and bias `[2n + n^2]`."""
        phi = (spec.streams + 2, hidden)
        dynamic = {
            "phi": Parameter(phi, lambda: torch.zeros(phi)),
            "alpha": Parameter((2,), lambda: torch.full((2,), hc.SCALE)),
        }
        return dynamic | super().parameters(spec, index, hidden, start)

    def coefficients(self, X: Tensor, spec: StreamSpec, **parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """Return the three maps of a site."""
        return hc.dynamic(X, **parameters)

    def kernel(self, spec: StreamSpec, **fields: Any) -> Chain | None:
        """Return the fused chain."""
        return Chain(stream=spec, **fields)


FORMS: dict[str, Form] = {}
"""Those that have been used or registered."""
COEFFICIENTS: set[object] = set()
"""The ops with which the sites of stream forms begin."""
READS: dict[object, DepthForm] = {}
"""The ops by which depth forms read earlier outputs."""


def register(form: Form) -> None:
    """Make a form known by its name to this process. Raises MHC204 for a name that is taken or no identifier."""
    if form.name in FORMS:
        raise MHCError("MHC204", f"there is a form {form.name!r} already")
    if not form.name.isidentifier():
        raise MHCError("MHC204", f"a form's name is an identifier, which {form.name!r} is not")
    FORM_NAMES[form.name] = None
    FORMS[form.name] = form
    if isinstance(form, StreamForm):
        COEFFICIENTS.add(form.op)
    elif isinstance(form, DepthForm):
        READS[form.op] = form


for _form in (
    ManifoldConstrained(),
    HyperConnections(),
    StaticHyperConnections(),
    AttentionResiduals(),
    BlockAttentionResiduals(),
    DenseFormer(),
    MUDDFormer(),
    NormedMUDDFormer(),
    ValueResidual(),
):
    register(_form)


def form_of(spec: StreamSpec) -> Form:
    """Return the form that `spec` names; that of an installed package is imported now. Raises MHC204."""
    if spec.form not in FORMS:
        if spec.form not in form_names():
            raise MHCError("MHC204", f"form={spec.form!r}; known: {', '.join(form_names())}")
        cls, place = load_installed(FORM_GROUP, spec.form, "MHC204")
        if not (isinstance(cls, type) and issubclass(cls, Form)) or getattr(cls, "name", None) != spec.form:
            raise MHCError("MHC204", f"{place} is no subclass of StreamForm or DepthForm of the name {spec.form!r}")
        register(cls())
    return FORMS[spec.form]


def start_values(spec: StreamSpec, index: int, hidden: int, start: Start = DEFAULT) -> dict[str, Tensor]:
    """Return the values with which the parameters of site `index` start: float32, whatever the default dtype is."""
    return _values(form_of(spec).parameters(spec, index, hidden, start))


def head_values(spec: StreamSpec, sites: int, hidden: int, start: Start = DEFAULT) -> dict[str, Tensor]:
    """Return the values with which the exit's parameters start; none where the form or the exit has none."""
    return _values(form_of(spec).head(spec, sites, hidden, start))


def _values(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return {name: parameter.start() for name, parameter in parameters.items()}
    finally:
        torch.set_default_dtype(default)


def width_of(spec: StreamSpec, index: int, site: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return C of a site from the shapes of all sites' parameters (`site.phi`); 1 where none of them depends on it."""
    of_one = form_of(spec).parameters(spec, index, 1, DEFAULT)
    return max(shapes[f"{site}.{name}"][-1] // p.shape[-1] for name, p in of_one.items())


__all__ = [
    "COEFFICIENTS", "FORMS", "DepthForm", "Form", "Parameter", "StreamForm", "form_of", "head_values", "register",
    "start_values", "width_of",
]  # fmt: skip
