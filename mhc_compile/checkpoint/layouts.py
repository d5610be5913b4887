"""Layouts in which other systems keep the parameters of hyper-connections: what each system calls them, as data.

A layout is a convention, whose equations the system's code computes, and names. A parameter has the shape and the order
of rows that it has here in that convention, except where the system keeps its entries in several tensors. What is left
to do, a transposition of the rows of H between two conventions, is `mhc_compile.conventions`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mhc_compile.conventions import convert_head, convert_site
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import Convention, Exit, StreamSpec
from mhc_compile.parameters import StreamParameters, names

LayoutName = Literal["deepseek_v4", "nemo", "megatron", "megatron_dev"]
HEAD = ("fn", "base", "scale")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names that a system gives the parameters of a Transformer with two sites a layer, and its equations.

    In the beginnings of names `{layer}` is the path of a layer's module, `{number}` its number, and `{owner}` the path
    of the module that holds the layers, with its dot.
    """

    name: LayoutName
    convention: Convention
    sites: tuple[str, str]
    """How the names of a layer's first site (attention) and second site (MLP) begin."""
    parameters: Mapping[str, tuple[str, ...]]
    """How they end, by our name; several where the entries lie in as many tensors."""
    head: str = ""
    """How the names of fn, base and scale of the learned head at the exit begin; empty where the exit is a mean."""
    streams: str
    """The entry of `config.json` that holds n."""
    iterations: str
    eps: str = ""
    """The entry of `config.json` that holds the convention's eps; empty where the system has a constant."""

    @property
    def exit(self) -> Exit:
        """The exit that the system's code has."""
        return "head" if self.head else "mean"

    def spec(self, streams: int, iterations: int) -> StreamSpec:
        """Return what the system's code computes."""
        return StreamSpec(streams=streams, convention=self.convention, iterations=iterations, exit=self.exit)


_DEEPSEEK_V4 = Layout(
    name="deepseek_v4",
    convention=Convention.DEEPSEEK_V4,
    sites=("{layer}.attn_hc.", "{layer}.ffn_hc."),
    parameters={"phi": ("fn",), "alpha": ("scale",), "bias": ("base",)},
    head="{owner}hc_head.hc_",
    streams="hc_mult",
    iterations="hc_sinkhorn_iters",
    eps="hc_eps",
)
_MEGATRON = Layout(
    name="megatron",
    convention=Convention.MEGATRON_MAIN,
    sites=(
        "decoder.layers.{number}.self_attention_hyper_connection.",
        "decoder.layers.{number}.mlp_hyper_connection.",
    ),
    parameters={
        "phi": ("mapping_proj.weight",),
        "alpha": ("alpha_pre", "alpha_post", "alpha_res"),
        "bias": ("bias",),
    },
    streams="mhc_num_residual_streams",
    iterations="mhc_sinkhorn_iterations",
)
# The names of DeepSeek's own release, which NeMo's loaders translate into those of its modules.
_NEMO = replace(
    _DEEPSEEK_V4, name="nemo", sites=("layers.{number}.hc_attn_", "layers.{number}.hc_ffn_"), head="hc_head_"
)
# The same names and shapes as on the main branch, but of another matrix: DeepSeek-V4's, transposed.
_MEGATRON_DEV = replace(
    _MEGATRON,
    name="megatron_dev",
    convention=Convention.DEEPSEEK_V4,
    head="decoder.hc_head_",
    streams="num_residual_streams",
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (_DEEPSEEK_V4, _NEMO, _MEGATRON, _MEGATRON_DEV)}


def find(name: str) -> Layout:
    """Return the layout of a name. Raises MHC204 for an unknown one."""
    if name not in LAYOUTS:
        raise MHCError("MHC204", f"layout={name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def notice(layout: Layout) -> str:
    """Return what the configuration of a folder in a layout says in place of a weight file's name."""
    return (
        f"streams in the layout {layout.name}, for code that has them: give it this folder and a configuration without "
        f"this entry, or read the folder with mhc_compile.convert_folder(folder, out, layout='{layout.name}')"
    )


def with_entries(layout: Layout, spec: StreamSpec, config: bytes) -> bytes:
    """Return the text of a residual model's `config.json` with the notice, n, iterations and eps after its first brace.

    Raises MHC418 where it has others of these.
    """
    known: dict[str, Any] = json.loads(config)
    added = b""
    for name, value, text in _entries(layout, spec):
        if known.get(name, value) != value:
            raise _no_place(layout, f"config.json has {name}={known[name]!r}, not {value!r}")
        added += b"" if name in known else text
    return config.replace(b"{", b"{" + added, 1)


def without_entries(layout: Layout, spec: StreamSpec, config: bytes) -> bytes:
    """Return the text that `with_entries` was given, byte for byte."""
    for _, _, text in _entries(layout, spec):
        config = config.replace(b"{" + text, b"{", 1)
    return config


def _entries(layout: Layout, spec: StreamSpec) -> list[tuple[str, Any, bytes]]:
    values = {
        "transformers_weights": notice(layout),
        layout.streams: spec.streams,
        layout.iterations: spec.iterations,
        layout.eps: spec.convention.fields.pre_eps,
    }
    return [(k, v, f"\n  {json.dumps(k)}: {json.dumps(v)},".encode()) for k, v in values.items() if k]


def is_of(layout: Layout, name: str) -> bool:
    """Return whether the name of a weight is one of hyper-connections in the layout."""
    ends = [end for several in layout.parameters.values() for end in several]
    heads = [layout.head + end for end in HEAD if layout.head]
    return _matches([*(begin + end for begin in layout.sites for end in ends), *heads], name)


def _matches(texts: Sequence[str], name: str) -> bool:
    """Return whether a name is one of the texts, with anything possible in place of a layer, its number and owner."""
    pattern = "|".join(re.escape(text) for text in texts)
    for place, possible in ((r"\{layer\}", r".+"), (r"\{number\}", r"\d+"), (r"\{owner\}", r"(.+\.)?")):
        pattern = pattern.replace(place, possible)
    return re.fullmatch(pattern, name) is not None


def to_layout(layout: Layout, owners: Mapping[str, StreamParameters]) -> tuple[dict[str, Tensor], StreamSpec, float]:
    """Return a folder's stream parameters under the layout's names, what is computed from them there, and a difference.

    The difference is the largest of a coefficient between the folder's convention and the layout's, where they are two
    (`Conversion.bound`).

    Raises MHC205 where it exceeds 1e-2, and MHC418 for streams that the layout has no place for.
    """
    owner, parameters = _only_owner(layout, owners)
    _refuse_inexpressible(layout, parameters)
    spec = layout.spec(parameters.spec.streams, parameters.spec.iterations)
    values, bound = _in_convention(dict(parameters.named_parameters()), parameters, parameters.spec, spec)
    places = _places(layout, owner, parameters)
    return {
        name: part.clone()
        for ours, several in places.items()
        for name, part in zip(several, values[ours].chunk(len(several)), strict=True)
    }, spec, bound  # fmt: skip


def spec_of(
    layout: Layout, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], iterations: int | None
) -> StreamSpec:
    """Return what the layout's code computes with parameters of these shapes, by name, and a configuration.

    `iterations` are those of a configuration that names none; without either they are 20.

    Raises MHC404 where there are none, where their shapes are not those of phi, or the configuration has another n,
    MHC202 where its eps is not the convention's, and MHC204 where it names other iterations.
    """
    of_phi = [begin + layout.parameters["phi"][0] for begin in layout.sites]
    phi = [tuple(shape) for name, shape in shapes.items() if _matches(of_phi, name)]
    if not phi:
        way_out = f"name the layout that it has: {', '.join(LAYOUTS)}"
        raise MHCError("MHC404", f"no hyper-connections in the layout {layout.name}", way_out=way_out)
    rows = phi[0][0] if phi[0] else 0
    n = math.isqrt(rows + 1) - 1  # rows = n * n + 2n
    if n < 1 or n * (n + 2) != rows:
        raise MHCError(
            "MHC404", f"phi of shape {list(phi[0])} in the layout {layout.name}: n * n + 2n rows are expected"
        )
    if config.get(layout.streams, n) != n:
        raise MHCError("MHC404", f"{layout.streams} is {config[layout.streams]}, and the weights have {n} streams")
    eps = layout.convention.fields.pre_eps
    if layout.eps and config.get(layout.eps, eps) != eps:
        raise MHCError("MHC202", f"{layout.convention.value} with {layout.eps}={config[layout.eps]}, not {eps}")
    known = config.get(layout.iterations, 20 if iterations is None else iterations)
    if iterations not in (None, known):
        raise MHCError("MHC204", f"iterations={iterations}: {layout.iterations} is {known}", way_out="leave it out")
    return layout.spec(n, known)


def from_layout(
    layout: Layout, tensors: Mapping[str, Tensor], theirs: StreamSpec, owners: Mapping[str, StreamParameters]
) -> float:
    """Set the parameters of a converted model to those of `tensors`, under the layout's names, which compute `theirs`.

    Returns the difference of the conventions as `to_layout` does.

    Raises MHC404 where the tensors are not those of the model's sites or of a type that float32 does not hold, MHC205
    and 418 as `to_layout` does, and MHC408 for NaN and infinities.
    """
    owner, parameters = _only_owner(layout, owners)
    _refuse_inexpressible(layout, parameters)
    ours = dict(parameters.named_parameters())
    places = _places(layout, owner, parameters)
    _refuse_misfits(layout, tensors, {
        name: part.shape
        for name, several in places.items()
        for name, part in zip(several, ours[name].chunk(len(several)), strict=True)
    })  # fmt: skip
    stored = {name: torch.cat([tensors[part].float() for part in several]) for name, several in places.items()}
    values, bound = _in_convention(stored, parameters, theirs, parameters.spec)
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(values[name])
    return bound


def _only_owner(layout: Layout, owners: Mapping[str, StreamParameters]) -> tuple[str, StreamParameters]:
    if len(owners) != 1:
        raise _no_place(layout, f"{len(owners)} modules hold streams ({names(owners)}), and the layout is of one")
    return next(iter(owners.items()))


def _refuse_inexpressible(layout: Layout, parameters: StreamParameters) -> None:
    """Raise MHC418 for streams that the layout's code does not compute, whatever its parameters are."""
    spec, exit_ = parameters.spec, layout.exit
    reasons = {
        f"form {spec.form}": spec.form != "mhc",
        f"manifold {spec.manifold}, where the layout has sinkhorn": spec.manifold != "sinkhorn",
        f"{spec.convention.value} reads with the pre of the site before": spec.convention.fields.deferred,
        f"exit {spec.exit}, where the layout has {exit_}": spec.exit != exit_,
        "0 iterations": spec.iterations < 1,
        f"no streams at {names(parameters.skipped)}": bool(parameters.skipped),
        f"look-ups: {', '.join(parameters.memories.kinds).replace('_', '-')}": bool(parameters.memories.kinds),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise _no_place(layout, reason)


def _places(layout: Layout, owner: str, parameters: StreamParameters) -> dict[str, tuple[str, ...]]:
    """Return the layout's names of every parameter, by our name below the owner."""
    prefix = f"{owner}." if owner else ""
    places: dict[str, tuple[str, ...]] = {}
    for position, site in enumerate(parameters.sites):
        layer, number = _layer(site)
        if number != position // 2:
            detail = f"{site} is the stream's site {position}, and layer {position // 2} has two sites in the layout"
            raise _no_place(layout, detail)
        begin = layout.sites[position % 2].format(layer=prefix + layer, number=number)
        for name, several in layout.parameters.items():
            places[f"{site}.{name}"] = tuple(begin + end for end in several)
    if len(parameters.sites) % 2:
        raise _no_place(layout, f"{len(parameters.sites)} sites, and the layout has two a layer")
    if layout.head:
        places |= {f"head.{end}": (layout.head.format(owner=prefix) + end,) for end in HEAD}
    return places


def _layer(site: str) -> tuple[str, int]:
    """Return the path below the owner of the layer that a site belongs to and its number, -1 where there is none."""
    path = re.match(r"(?:[^#]*?\.)?(\d+)(?=[.#])", site)
    return (path[0], int(path[1])) if path else ("", -1)


def _in_convention(
    values: Mapping[str, Tensor], parameters: StreamParameters, source: StreamSpec, target: StreamSpec
) -> tuple[dict[str, Tensor], float]:
    """Return the values with which `target` computes what `source` does, and a coefficient's largest difference."""
    moved, bound = {name: t.detach() for name, t in values.items()}, 0.0
    if source == target:
        return moved, bound
    for site in parameters.sites:
        phi, alpha, bias = (moved[f"{site}.{name}"] for name in ("phi", "alpha", "bias"))
        phi, alpha, bias, conversion = convert_site(phi, alpha, bias, source, target)
        moved |= {f"{site}.phi": phi, f"{site}.alpha": alpha, f"{site}.bias": bias}
        bound = max(bound, conversion.bound)
    if source.exit == "head":
        fn, base, scale = (moved[f"head.{name}"] for name in HEAD)
        bound = max(bound, convert_head((fn, base, scale), source, target, hidden=parameters.hidden)[1].bound)
    return moved, bound


def _refuse_misfits(layout: Layout, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    wrong = [name for name in tensors.keys() & shapes.keys() if tensors[name].shape != shapes[name]]
    wide = [name for name, t in tensors.items() if not t.is_floating_point() or t.dtype == torch.float64]
    misfits = {
        "missing": shapes.keys() - tensors.keys(),
        "unexpected": tensors.keys() - shapes.keys(),
        "of another shape": [f"{n} {list(tensors[n].shape)} for {list(shapes[n])}" for n in wrong],
        "not of a type that float32 holds": wide,
    }
    if detail := "; ".join(f"{kind}: {names(sorted(which))}" for kind, which in misfits.items() if which):
        way_out = "docs/convert.md lists the names and shapes of two sites a layer"
        raise MHCError("MHC404", f"hyper-connections in the layout {layout.name}: {detail}", way_out=way_out)
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise MHCError("MHC408", names(broken))


def _no_place(layout: Layout, reason: str) -> MHCError:
    return MHCError("MHC418", f"{layout.name}: {reason}")
