"""What a widened residual stream computes, as values: forms, conventions, manifolds, the text that ops carry."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import ClassVar, Literal, get_args

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.installed import installed_names

Manifold = Literal["sinkhorn", "identity", "circulant", "permutations", "kronecker", "transportation", "unconstrained"]
Exit = Literal["mean", "sum", "head", "pre"]
FORM_GROUP = "mhc_compile.forms"
"""The group of entry points in which installed packages name their forms."""
FORM_NAMES = dict.fromkeys(("mhc", "hc", "hc_static"))
"""Those of this package and those registered in this process (`mhc_compile.kernels.forms`), in order."""
MAX_STREAMS = 8
MAX_ITERATIONS = 1000
"""Of Sinkhorn: published systems use 20, and every iteration is an operation of the graph."""
# 6! = 720 permutation matrices a token and site; 7! = 5040 rows of phi would dwarf the branches.
MAX_PERMUTATION_STREAMS = 6
_OF_MHC = ("convention", "manifold", "iterations")
"""Fields of a `StreamSpec` that mean nothing in another form."""


def form_names() -> list[str]:
    """Return the names of all forms, those of installed packages among them."""
    return [*dict.fromkeys([*FORM_NAMES, *installed_names(FORM_GROUP)])]


@dataclass(frozen=True, kw_only=True)
class ConventionFields:
    """The choices in which published mHC systems differ (`n` streams, `C` hidden size; all eps in float32)."""

    rms_eps: float
    """Added to the mean square under the root (`rms_inside`) or to the root mean square itself."""
    rms_inside: bool
    """True: `r = sqrt(ms + eps)`. False: `r = norm / sqrt(nC) + eps`."""
    pre_eps: float
    """Added to `sigmoid` in `pre`."""
    post_scale: float
    """Factor of the sigmoid in `post`."""
    start: Literal["exp_colmax", "softmax_eps", "exp_rowmax"]
    """How Sinkhorn turns logits into a positive matrix."""
    order: Literal["columns_rows", "rows_columns", "columns_then_rows_columns"]
    """What one iteration normalises, in order (`columns_then_...`: one column step, then iterations - 1 pairs)."""
    divisor: Literal["plain", "add_eps", "clamp"]
    """What divides: the sum, the sum plus `sinkhorn_eps`, or the sum clamped from below by it."""
    sinkhorn_eps: float
    transposed: bool
    """The published matrix is the transpose of the `H` in `X' = H X + post y`; our `H` is always the latter."""
    exit: Exit
    """How the streams are reduced at the end, where the system says."""
    post_eps: float = 0.0
    """Added to the scaled sigmoid in `post`."""
    manifold: Manifold = "sinkhorn"
    """What the published mixing matrix is."""
    deferred: bool = False
    """A site's `pre` weighs the streams for the next site, and that of the last one may for the exit. The first site
    reads stream 0."""


class Convention(Enum):
    """A published system's exact equations (arXiv 2512.24880 and the named code bases)."""

    PAPER = "paper"
    DEEPSEEK_V4 = "deepseek_v4"
    GLM5_NEXT = "glm5_next"
    MEGATRON_MAIN = "megatron_main"
    LIGER = "liger"
    HY_V4 = "hy_v4"
    DEEPSEEK_V41 = "deepseek_v41"

    @property
    def fields(self) -> ConventionFields:
        """The convention's choices."""
        return _FIELDS[self]


_FIELDS: dict[Convention, ConventionFields] = {
    Convention.PAPER: ConventionFields(
        rms_eps=1e-6, rms_inside=True, pre_eps=0.0, post_scale=2.0, start="exp_colmax", order="columns_rows",
        divisor="plain", sinkhorn_eps=0.0, transposed=False, exit="mean",
    ),
    Convention.DEEPSEEK_V4: ConventionFields(
        rms_eps=1e-6, rms_inside=True, pre_eps=1e-6, post_scale=2.0, start="softmax_eps",
        order="columns_then_rows_columns", divisor="add_eps", sinkhorn_eps=1e-6, transposed=True, exit="head",
    ),
    Convention.MEGATRON_MAIN: ConventionFields(
        rms_eps=1e-6, rms_inside=False, pre_eps=0.0, post_scale=2.0, start="exp_rowmax", order="rows_columns",
        divisor="clamp", sinkhorn_eps=1e-6, transposed=False, exit="mean",
    ),
    Convention.LIGER: ConventionFields(
        rms_eps=1e-6, rms_inside=True, pre_eps=0.0, post_scale=2.0, start="softmax_eps",
        order="columns_then_rows_columns", divisor="add_eps", sinkhorn_eps=1e-6, transposed=False, exit="mean",
    ),
}  # fmt: skip
# DeepSeek-V4's equations with the model's own eps under the root, and a mean at the exit.
_FIELDS[Convention.GLM5_NEXT] = replace(_FIELDS[Convention.DEEPSEEK_V4], rms_eps=1e-5, exit="mean")
# Hy-V4 follows DeepSeek-V4 without a mixing matrix (H = I); a matrix that it is given is computed as DeepSeek-V4's.
_FIELDS[Convention.HY_V4] = replace(_FIELDS[Convention.DEEPSEEK_V4], rms_eps=1e-5, post_eps=1e-6, manifold="identity")
# DeepSeek-V4's equations one site ahead: what a branch reads is known before the streams that it reads.
_FIELDS[Convention.DEEPSEEK_V41] = replace(_FIELDS[Convention.DEEPSEEK_V4], exit="pre", deferred=True)


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """Everything static about a widened stream. Prints to text and parses back: dialect ops carry the text.

    Raises `MHCError` MHC201 (streams), MHC202 (unknown convention), MHC203 (unknown or impossible manifold),
    MHC204 (iterations, exit or form; a convention, manifold, iterations or head for a form that has none).
    """

    streams: int = 4
    """n, 1 to 8."""
    convention: Convention = Convention.PAPER
    manifold: Manifold = "sinkhorn"
    iterations: int = 20
    """Sinkhorn iterations, 0 to 1000."""
    exit: Exit = "mean"
    """`mean`, `sum`, `head`: a learned sigmoid head (DeepSeek-V4), or `pre`: that of the last site, where the
    convention computes it one site ahead (DeepSeek-V4.1)."""
    form: str = "mhc"
    """`mhc`; or their ancestor, unconstrained Hyper-Connections (arXiv 2409.19606): `hc`, whose coefficients depend on
    the streams, and `hc_static`, whose coefficients are parameters; or one of yours (docs/write_a_form.md).
    Conventions, manifolds and iterations are mHC's."""

    _text: ClassVar[str]

    def __post_init__(self) -> None:
        n = self.streams
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_STREAMS:
            raise MHCError("MHC201", f"streams={n!r}")
        if not isinstance(self.convention, Convention):
            try:
                object.__setattr__(self, "convention", Convention(self.convention))
            except ValueError:
                known = ", ".join(c.value for c in Convention)
                raise MHCError("MHC202", f"{self.convention!r}; known: {known}") from None
        if self.manifold not in get_args(Manifold):
            raise MHCError("MHC203", f"{self.manifold!r}; known: {', '.join(get_args(Manifold))}")
        if self.manifold == "permutations" and n > MAX_PERMUTATION_STREAMS:
            raise MHCError("MHC203", f"permutations need n! = {math.factorial(n)} rows at n = {n}")
        if self.manifold == "kronecker" and n & (n - 1):
            raise MHCError("MHC203", f"kronecker needs a power of two streams, not {n}")
        if (
            not isinstance(self.iterations, int)
            or isinstance(self.iterations, bool)
            or not (0 <= self.iterations <= MAX_ITERATIONS)
        ):
            raise MHCError("MHC204", f"iterations={self.iterations!r}; 0 to {MAX_ITERATIONS}")
        if self.exit not in get_args(Exit):
            raise MHCError("MHC204", f"exit={self.exit!r}; known: {', '.join(get_args(Exit))}")
        if self.exit == "pre" and not (self.form == "mhc" and self.convention.fields.deferred):
            which = self.convention.value if self.form == "mhc" else self.form
            raise MHCError("MHC204", f"exit='pre': {which} does not compute pre one site ahead")
        if self.form not in FORM_NAMES and self.form not in form_names():
            raise MHCError("MHC204", f"form={self.form!r}; known: {', '.join(form_names())}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.form == "mhc":
            del values["form"]
        else:
            chosen = [f.name for f in fields(self) if f.name in _OF_MHC and values.pop(f.name) != f.default]
            if self.exit == "head":
                chosen.append("exit=head")
            if chosen:
                raise MHCError("MHC204", f"{chosen[0]} is one of mHC's choices, form={self.form!r} does not have it")
        text = " ".join(f"{name}={v.value if isinstance(v, Enum) else v}" for name, v in values.items())
        object.__setattr__(self, "_text", text)  # built once: Dynamo reads it where it could not trace its construction

    @property
    def mix_rows(self) -> int:
        """Rows of `phi` that produce `H`."""
        n = self.streams
        return {
            "sinkhorn": n * n,
            "identity": 0,
            "circulant": n,
            "permutations": math.factorial(n),
            "kronecker": 2 * (n.bit_length() - 1),
            "transportation": (n - 1) ** 2,
            "unconstrained": n * n,
        }[self.manifold]

    @property
    def rows(self) -> int:
        """Rows of `phi` and length of `bias`: pre (n), post (n), then `mix_rows`."""
        return 2 * self.streams + self.mix_rows

    def __str__(self) -> str:
        return self._text

    @classmethod
    def parse(cls, text: str) -> StreamSpec:
        """Parse the text of `str`. Raises `MHCError` MHC204 for text that is not `field=value ...` of known fields."""
        parts = [part.partition("=") for part in text.split()]
        if broken := [name for name, equals, value in parts if not (equals and value)]:
            raise MHCError("MHC204", f"{broken[0]!r} in {text!r} is not field=value")
        values = {name: value for name, _, value in parts}
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise MHCError("MHC204", f"unknown field {sorted(unknown)[0]!r} in {text!r}")
        whole: dict[str, int] = {}
        for name in {"streams", "iterations"} & set(values):
            try:
                whole[name] = int(values.pop(name))
            except ValueError:
                raise MHCError("MHC204", f"{name} in {text!r} is not a whole number") from None
        return cls(**whole, **values)  # type: ignore[arg-type]
