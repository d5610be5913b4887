"""The forms in which `widen` can write a site: what its parameters are, how they start, which op reads the streams.

A form is a file like `kernels/hc.py`, a name in `spec.FormName` and an entry here. Its op takes the streams
`[..., n, C]`, the parameters of a site in the order of `shapes`, and the specification as text, and gives
pre `[..., n]`, post `[..., n]` and H `[..., n, n]`; `aggregate`, `distribute` and `reduce` are the same in every form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import mhc_compile.kernels.ops  # noqa: F401  (registers the dialect)
from mhc_compile.kernels import hc
from mhc_compile.kernels import start as mhc
from mhc_compile.kernels.spec import FormName, StreamSpec


@dataclass(frozen=True)
class Form:
    """One kind of hyper-connection."""

    op: torch._ops.OpOverload
    """`op(streams, *parameters, spec) -> pre, post, H`."""
    shapes: Callable[[StreamSpec, int], dict[str, tuple[int, ...]]]
    """`shapes(spec, C)`: the parameters of one site by name, in the order of the op's operands."""
    start: Callable[..., dict[str, Tensor]]
    """`start(spec, index of the site, C, scratch=False)`: their values at the start, float32."""


FORMS: dict[FormName, Form] = {
    "mhc": Form(torch.ops.mhc.coefficients.default, mhc.site_shapes, mhc.start_parameters),
    "hc": Form(torch.ops.hc.coefficients.default, hc.shapes, hc.start),
    "hc_static": Form(torch.ops.hc.static_coefficients.default, hc.shapes, hc.start),
}
COEFFICIENTS = frozenset(form.op for form in FORMS.values())
"""The ops with which sites begin."""


def form_of(spec: StreamSpec) -> Form:
    """The form that `spec` names."""
    return FORMS[spec.form]


def width_of(spec: StreamSpec, held: Mapping[str, tuple[int, ...]]) -> int:
    """C, from the shapes `held` of a site's parameters by name; 1 where none of them depends on it."""
    of_one = form_of(spec).shapes(spec, 1)
    return max(held[name][-1] // shape[-1] for name, shape in of_one.items())
