"""The mHC kernels of other packages on a GPU: the boundary's work by calls of their public functions alone.

Each has layouts of its own, made before anything is timed. Its results are compared with the reference of the
convention that has its equations:

    Liger-Kernel       `liger`; phi in the streams' dtype, as it recommends, and the reference takes that phi
    TileKernels 1      `deepseek_v4`; bfloat16 and n = 4, from compute capability 9.0 on
    TileKernels 2      the same; its functions write into given tensors, and PyTorch computes the projection, which it
                       has not, and calls the gradients' functions
    TransformerEngine  `paper`, its matrix transposed (rows first of the one are columns first of the other), but for
                       the eps under the root, 1.2e-7 instead of 1e-6; n = 4, products in TF32 as by default

A package that cannot run is named with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mhc_compile.bench.contest import reason
from mhc_compile.kernels.spec import Convention

Values = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Package:
    """Another package's mHC functions."""

    name: str
    distribution: str
    """As it is installed."""
    functions: tuple[str, ...]
    """The functions that are called, by dotted names."""
    versions: str
    """Which have these functions."""
    convention: Convention
    """Ours that has its equations."""
    theirs: Callable[[Values], Values]
    """Our inputs, or our outputs or their gradients, in its layouts."""
    ours: Callable[[Values], Values]
    """The inverse."""
    boundary: Callable[[SimpleNamespace, Values], Values]
    """Its functions and the inputs in its layouts -> the outputs in its layouts."""
    capability: tuple[int, int] = (0, 0)
    """The least compute capability of the GPU."""
    gradient_attribute: str = ""
    """Under which the streams' storage must carry their gradient, to which its backward adds in place."""


def select(
    device: torch.device, packages: Sequence[Package] | None = None
) -> tuple[list[tuple[Package, SimpleNamespace]], list[str]]:
    """Return the packages that can run on `device` with their functions, and a line for each of the others."""
    able, left_out = [], []
    for package in PACKAGES if packages is None else packages:
        api, why = _functions(package, device)
        if why:
            left_out.append(f"{package.name}: {why}")
        else:
            able.append((package, api))
    return able, left_out


def _functions(package: Package, device: torch.device) -> tuple[SimpleNamespace, str]:
    """Return the functions by name, or why there are none."""
    api = SimpleNamespace()
    if importlib.util.find_spec(package.functions[0].partition(".")[0]) is None:
        return api, "not installed"
    if device.type != "cuda":
        return api, "needs a GPU"
    for path in package.functions:
        module, _, name = path.rpartition(".")
        try:
            setattr(api, name, getattr(importlib.import_module(module), name))
        except Exception as error:  # whatever a package raises that misses something, or is another version
            return api, f"{_version(package)} does not load (wanted: {package.versions}): {reason(error)}"
    if package.capability > (0, 0) and torch.cuda.get_device_capability(device) < package.capability:
        return api, f"needs compute capability {'.'.join(map(str, package.capability))}"
    return api, ""


def _version(package: Package) -> str:
    try:
        return version(package.distribution)
    except PackageNotFoundError:
        return "an unknown version"


class Work:
    """One package doing the boundary's work on inputs, and from gradients, that come in our layouts."""

    def __init__(
        self, package: Package, api: SimpleNamespace, inputs: Values, gradients: Values, *, backward: bool
    ) -> None:
        self._package, self._api, self._backward = package, api, backward
        self._inputs = {k: v.detach().requires_grad_(backward) for k, v in package.theirs(inputs).items()}
        self._gradients = package.theirs(gradients)
        self._consumed: Tensor | None = None
        if backward and package.gradient_attribute:
            self._consumed = self._gradients["next_X"]
            self._gradients["next_X"] = self._consumed.clone()

    def inputs(self) -> Values:
        """Return the inputs in our layouts, with the values that the package gets."""
        return self._package.ours({k: v.detach() for k, v in self._inputs.items()})

    def prepare(self) -> None:
        """Make again what the last run has overwritten."""
        if self._consumed is not None:
            self._gradients["next_X"].copy_(self._consumed)

    def run(self) -> Values:
        """Return the outputs, or with a backward the inputs' gradients, in the package's layouts."""
        if not self._backward:
            with torch.no_grad():
                return self._package.boundary(self._api, self._inputs)
        out = self._package.boundary(self._api, self._inputs)
        if self._consumed is not None:
            setattr(out["next_X"].untyped_storage(), self._package.gradient_attribute, self._gradients["next_X"])
        gradients = torch.autograd.grad(
            list(out.values()), list(self._inputs.values()), [self._gradients[name] for name in out]
        )
        return dict(zip(self._inputs, gradients, strict=True))

    def read(self, results: Values, names: Sequence[str]) -> list[Tensor]:
        """Return the results of `run` by `names`, in our layouts."""
        ours = self._package.ours(results)
        return [ours[name] for name in names]


Layout = Callable[[Values], Values]
Change = Callable[[Tensor], Tensor]


def _layouts(changes: Mapping[str, tuple[Change, Change]]) -> tuple[Layout, Layout]:
    """Return functions to a package's layouts and back, from those for values by their names, separated by spaces."""
    by_name = {name: both for names, both in changes.items() for name in names.split()}

    def all_changed(way: int) -> Layout:
        return lambda values: {name: by_name[name][way](v) if name in by_name else v for name, v in values.items()}

    return all_changed(0), all_changed(1)


# Liger-Kernel: streams [T, n, C] as ours, phi [n*C, rows], three scalars for alpha, X' = mix @ X.


def _to_liger(values: Values) -> Values:
    changed = dict(values)
    if "phi" in values:
        changed["phi"] = values["phi"].t().to(values["X"].dtype).contiguous()
        changed |= {f"alpha_{k}": a.clone() for k, a in enumerate(changed.pop("alpha"))}
    return changed


def _from_liger(values: Values) -> Values:
    changed = dict(values)
    if "phi" in values:
        changed["phi"] = values["phi"].t()
        changed["alpha"] = torch.stack([changed.pop(f"alpha_{k}") for k in range(3)])
    return changed


def _liger(api: SimpleNamespace, v: Values) -> Values:
    X = api.liger_mhc_post_res(v["X"], v["y"], v["post"], v["mix"])
    pre, post, mix = api.liger_mhc_coeffs(X, v["phi"], v["bias"], v["alpha_0"], v["alpha_1"], v["alpha_2"])
    return {"next_X": X, "h": api.liger_mhc_pre(X, pre), "next_post": post, "next_mix": mix}


# TileKernels: streams [1, T, n, C], post [1, T, n, 1], X'[j] = sum of mix[i, j] X[i].


_TILE_LAYOUTS = _layouts({
    "X y next_X h": (lambda v: v[None], lambda v: v[0]),
    "post next_post": (lambda v: v[None, ..., None], lambda v: v[0, ..., 0]),
    "mix next_mix": (lambda v: v.mT.contiguous()[None], lambda v: v[0].mT),
})  # fmt: skip


def _tile(api: SimpleNamespace, v: Values) -> Values:
    X = api.mhc_post(v["y"], v["X"], v["post"], v["mix"])
    h, (post, mix) = api.mhc_pre(X, v["phi"], v["alpha"], v["bias"], post_mult_value=2.0, sinkhorn_repeat=20)
    return {"next_X": X, "h": h, "next_post": post, "next_mix": mix}


class _TileKernels2(torch.autograd.Function):
    """The functions of TileKernels 2 in their order, and those of their gradients; all of one batch."""

    @staticmethod
    def forward(
        ctx: Any, api: SimpleNamespace, X: Tensor, y: Tensor, post: Tensor, mix: Tensor, phi: Tensor, alpha: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return X', h, and the next post and mix."""
        next_X = api.mhc_post_fwd(y, X, post, mix)
        streams = next_X[0]
        (T, n, C), rows = streams.shape, len(phi)
        flat = streams.flatten(1).to(phi.dtype)
        partial, squares = (flat @ phi.t())[None, :, None], flat.square().sum(-1)[None, :, None]
        product, total, mixes = phi.new_empty(T, 1, rows), phi.new_empty(T, 1), phi.new_empty(T, rows)
        sizes = {"rms_group_size": n * C, "rms_eps": 1e-6}
        api.mhc_reduce_partials_and_rmsnorm_fwd(partial, squares, product, total, mixes, **sizes, n_splits=1)
        pre, next_post, logits = (phi.new_empty(T, size) for size in (n, n, n * n))
        api.mhc_pre_split_mixes_fwd(mixes, alpha, bias, pre, next_post, logits, 2.0, 1e-6)
        next_mix, h = phi.new_empty(T, n, n), streams.new_empty(T, C)
        api.mhc_sinkhorn_fwd(logits.view(T, n, n), next_mix, 20, 1e-6)
        api.mhc_pre_apply_mix_fwd(streams, pre, h)
        ctx.api, ctx.sizes = api, sizes
        ctx.save_for_backward(
            X, y, post, mix, phi, alpha, bias, streams, product, total, mixes, pre, next_post, logits
        )  # fmt: skip
        return next_X, h[None], next_post[None, ..., None], next_mix[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs but the functions."""
        X, y, post, mix, phi, alpha, bias, streams, product, total, mixes, pre, next_post, logits = ctx.saved_tensors
        d_next, d_h, d_post, d_mix = (g[0].contiguous() for g in gradients)
        T, n, _ = streams.shape
        d_streams = d_next.clone()
        d_pre = ctx.api.mhc_pre_apply_mix_bwd(d_h, streams, pre, d_streams)  # adds to d_streams
        d_logits, d_mixes, d_alpha, d_bias = (torch.empty_like(t) for t in (d_mix, mixes, alpha, bias))
        ctx.api.mhc_sinkhorn_bwd(d_mix, logits.view(T, n, n), d_logits, 20, 1e-6)
        ctx.api.mhc_pre_split_mixes_bwd(
            d_pre, d_post[..., 0], d_logits.flatten(1), mixes, next_post, alpha, bias, d_mixes, d_alpha, d_bias,
            mhc_post_mult_value=2.0,
        )  # fmt: skip
        d_product, d_total = torch.empty_like(product), torch.empty_like(total)
        ctx.api.mhc_reduce_partials_and_rmsnorm_bwd(d_mixes, product, total, d_product, d_total, **ctx.sizes)
        flat = streams.flatten(1).to(phi.dtype)
        d_streams += (d_product[:, 0] @ phi + 2 * d_total * flat).view_as(streams)
        d_y, d_X, d_old_post, d_old_mix = ctx.api.mhc_post_bwd(y, X, post, mix, d_streams[None])
        return None, d_X, d_y, d_old_post, d_old_mix, d_product[:, 0].t() @ flat, d_alpha, d_bias


def _tile2(api: SimpleNamespace, v: Values) -> Values:
    X, h, post, mix = _TileKernels2.apply(api, v["X"], v["y"], v["post"], v["mix"], v["phi"], v["alpha"], v["bias"])
    return {"next_X": X, "h": h, "next_post": post, "next_mix": mix}


# TransformerEngine: streams [T, 1, C, n] with the n values of a channel together, as in phi's columns, bias [1, rows],
# X'[j] = sum of mix[i, j] X[i].


def _matrix_transposed(rows: Tensor, n: int) -> Tensor:
    """Return rows (or values) pre | post | mix with those of the n x n matrix in the transpose's order."""
    mix = rows[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows[: 2 * n], mix])


def _streams(rows: int) -> int:
    """Return n, where phi has n*n + 2n rows."""
    return round((rows + 1) ** 0.5) - 1


def _to_engine_phi(phi: Tensor) -> Tensor:
    n = _streams(len(phi))
    return _matrix_transposed(phi, n).unflatten(1, (n, -1)).transpose(1, 2).flatten(1).contiguous()


def _from_engine_phi(phi: Tensor) -> Tensor:
    n = _streams(len(phi))
    return _matrix_transposed(phi, n).unflatten(1, (-1, n)).transpose(1, 2).flatten(1)


_ENGINE_LAYOUTS = _layouts({
    "X next_X mix next_mix": (lambda v: v.mT.contiguous()[:, None], lambda v: v[:, 0].mT),
    "y h post next_post": (lambda v: v[:, None], lambda v: v[:, 0]),
    "phi": (_to_engine_phi, _from_engine_phi),
    "bias": (
        lambda v: _matrix_transposed(v, _streams(len(v)))[None],
        lambda v: _matrix_transposed(v[0], _streams(v.shape[1])),
    ),
})  # fmt: skip


def _engine(api: SimpleNamespace, v: Values) -> Values:
    X = api.mhc_fused_expand_combine(v["y"], None, v["post"], v["X"], v["mix"], v["X"].shape[-1])
    h, post, mix = api.mhc_generate_mix_and_aggregate(X, v["phi"], v["alpha"], v["bias"])
    return {"next_X": X, "h": h, "next_post": post, "next_mix": mix}


_LIGER = "liger_kernel.transformers.functional."
_TILE = "tile_kernels.modeling.mhc."
_ENGINE = "transformer_engine.pytorch.triton.mhc."
PACKAGES = (
    Package(
        name="Liger-Kernel", distribution="liger-kernel", versions="0.8",
        functions=(_LIGER + "liger_mhc_coeffs", _LIGER + "liger_mhc_pre", _LIGER + "liger_mhc_post_res"),
        convention=Convention.LIGER, theirs=_to_liger, ours=_from_liger, boundary=_liger,
    ),
    Package(
        name="TileKernels 1", distribution="tile-kernels", versions="1",
        functions=(_TILE + "mhc_pre", _TILE + "ops.mhc_post"),
        convention=Convention.DEEPSEEK_V4, theirs=_TILE_LAYOUTS[0], ours=_TILE_LAYOUTS[1], boundary=_tile,
        capability=(9, 0), gradient_attribute="grad_from_mhc_post",
    ),
    Package(
        name="TileKernels 2, projection by PyTorch", distribution="tile-kernels", versions="2",
        functions=tuple(
            f"tile_kernels.mhc.{module}_kernel.{name}_{way}"
            for module, name in (
                ("norm_fn", "mhc_reduce_partials_and_rmsnorm"), ("post", "mhc_post"), ("sinkhorn", "mhc_sinkhorn"),
                ("pre_split_mixes", "mhc_pre_split_mixes"), ("pre_apply_mix", "mhc_pre_apply_mix"),
            )
            for way in ("fwd", "bwd")
        ),
        convention=Convention.DEEPSEEK_V4, theirs=_TILE_LAYOUTS[0], ours=_TILE_LAYOUTS[1], boundary=_tile2,
        capability=(9, 0),
    ),
    Package(
        name="TransformerEngine", distribution="transformer-engine", versions="2.19",
        functions=(_ENGINE + "mhc_fused_expand_combine", _ENGINE + "mhc_generate_mix_and_aggregate"),
        convention=Convention.PAPER, theirs=_ENGINE_LAYOUTS[0], ours=_ENGINE_LAYOUTS[1], boundary=_engine,
    ),
)  # fmt: skip
