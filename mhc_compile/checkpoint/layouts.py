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
    """What a system calls the parameters of a Transformer with two sites a layer, and which equations it computes.

    In the beginnings of names `{layer}` is the path of a layer's module, `{number}` its number, and `{owner}` the path
    of the module that holds the layers, with its dot.
    """

    convention: Convention
    sites: tuple[str, str]
    """How the names of a layer's first site (attention) and second site (MLP) begin."""
    parameters: Mapping[str, tuple[str, ...]]
    """How they end, by our name; several where the entries lie in as many tensors."""
    head: str = ""
    """How the names of fn, base and scale of the learned head at the exit begin; empty where the exit is a mean."""
    streams: str
    """What the configuration calls n."""
    iterations: str
    eps: str = ""
    """What the configuration calls the convention's eps; empty where it is a constant."""

    @property
    def exit(self) -> Exit:
        """The exit that the system's code has."""
        return "head" if self.head else "mean"

    def spec(self, streams: int, iterations: int) -> StreamSpec:
        """Return what the system's code computes."""
        return StreamSpec(streams=streams, convention=self.convention, iterations=iterations, exit=self.exit)


_DEEPSEEK_V4 = Layout(
    convention=Convention.DEEPSEEK_V4,
    sites=("{layer}.attn_hc.", "{layer}.ffn_hc."),
    parameters={"phi": ("fn",), "alpha": ("scale",), "bias": ("base",)},
    head="{owner}hc_head.hc_",
    streams="hc_mult",
    iterations="hc_sinkhorn_iters",
    eps="hc_eps",
)
_MEGATRON = Layout(
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
LAYOUTS: dict[LayoutName, Layout] = {
    "deepseek_v4": _DEEPSEEK_V4,
    # The names of DeepSeek's own release, which NeMo's loaders translate into those of its modules.
    "nemo": replace(
        _DEEPSEEK_V4, sites=("layers.{number}.hc_attn_", "layers.{number}.hc_ffn_"), head="hc_head_"
    ),
    "megatron": _MEGATRON,
    # The same names and shapes as on the main branch, but of another matrix: DeepSeek-V4's, transposed.
    "megatron_dev": replace(
        _MEGATRON, convention=Convention.DEEPSEEK_V4, head="decoder.hc_head_", streams="num_residual_streams"
    ),
}  # fmt: skip


def find(layout: str) -> Layout:
    """Return a layout by its name. Raises MHC204 for an unknown one."""
    for name, found in LAYOUTS.items():
        if name == layout:
            return found
    raise MHCError("MHC204", f"layout={layout!r}; known: {', '.join(LAYOUTS)}")


def notice(layout: str) -> str:
    """Return what the configuration of a folder in a layout says in place of a weight file's name."""
    return (
        f"streams in the layout {layout}, for code that has them: give it this folder and a configuration without this "
        f"entry, or read the folder with mhc_compile.convert_folder(folder, out, layout='{layout}')"
    )


def entries(layout: str, spec: StreamSpec) -> dict[str, Any]:
    """Return what a layout adds to the configuration of the residual model: the notice, n, iterations and eps."""
    system = find(layout)
    values = {
        "transformers_weights": notice(layout),
        system.streams: spec.streams,
        system.iterations: spec.iterations,
        system.eps: spec.convention.fields.pre_eps,
    }
    return {name: value for name, value in values.items() if name}


def is_of(layout: str, name: str) -> bool:
    """Return whether the name of a weight is one of hyper-connections in the layout."""
    system = find(layout)
    ends = [end for several in system.parameters.values() for end in several]
    heads = [system.head + end for end in HEAD if system.head]
    return _matches([*(begin + end for begin in system.sites for end in ends), *heads], name)


def _matches(texts: Sequence[str], name: str) -> bool:
    """Return whether a name is one of the texts, with anything possible in place of a layer, its number and owner."""
    pattern = "|".join(re.escape(text) for text in texts)
    for place, possible in ((r"\{layer\}", r".+"), (r"\{number\}", r"\d+"), (r"\{owner\}", r"(.+\.)?")):
        pattern = pattern.replace(place, possible)
    return re.fullmatch(pattern, name) is not None


def to_layout(layout: str, owners: Mapping[str, StreamParameters]) -> tuple[dict[str, Tensor], StreamSpec, float]:
    """Return a folder's stream parameters under the layout's names, what is computed from them there, and a difference.

    The difference is the largest of a coefficient between the folder's convention and the layout's, where they are two
    (`Conversion.bound`).

    Raises MHC205 where it exceeds 1e-2, and MHC417 for streams that the layout has no place for.
    """
    owner, parameters = _only_owner(layout, owners)
    _refuse_inexpressible(layout, parameters)
    spec = find(layout).spec(parameters.spec.streams, parameters.spec.iterations)
    values, bound = _in_convention(dict(parameters.named_parameters()), parameters, parameters.spec, spec)
    places = _places(layout, owner, parameters)
    return {
        name: part.clone()
        for ours, several in places.items()
        for name, part in zip(several, values[ours].chunk(len(several)), strict=True)
    }, spec, bound  # fmt: skip


def spec_of(
    layout: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], iterations: int | None
) -> StreamSpec:
    """Return what the layout's code computes with parameters of these shapes, by name, and a configuration.

    `iterations` are those of a configuration that names none; without either they are 20.

    Raises MHC404 where there are none, where their shapes are not those of phi, or the configuration has another n,
    MHC202 where its eps is not the convention's, and MHC204 where it names other iterations.
    """
    system = find(layout)
    of_phi = [begin + system.parameters["phi"][0] for begin in system.sites]
    phi = [tuple(shape) for name, shape in shapes.items() if _matches(of_phi, name)]
    if not phi:
        way_out = f"name the layout that it has: {', '.join(LAYOUTS)}"
        raise MHCError("MHC404", f"no hyper-connections in the layout {layout}", way_out=way_out)
    rows = phi[0][0] if phi[0] else 0
    n = math.isqrt(rows + 1) - 1  # rows = n * n + 2n
    if n < 1 or n * (n + 2) != rows:
        raise MHCError("MHC404", f"phi of shape {list(phi[0])} in the layout {layout}: n * n + 2n rows are expected")
    if config.get(system.streams, n) != n:
        raise MHCError("MHC404", f"{system.streams} is {config[system.streams]}, and the weights have {n} streams")
    eps = system.convention.fields.pre_eps
    if system.eps and config.get(system.eps, eps) != eps:
        raise MHCError("MHC202", f"{system.convention.value} with {system.eps}={config[system.eps]}, not {eps}")
    known = config.get(system.iterations, 20 if iterations is None else iterations)
    if iterations not in (None, known):
        raise MHCError("MHC204", f"iterations={iterations}: {system.iterations} is {known}", way_out="leave it out")
    return system.spec(n, known)


def from_layout(
    layout: str, tensors: Mapping[str, Tensor], theirs: StreamSpec, owners: Mapping[str, StreamParameters]
) -> float:
    """Set the parameters of a converted model to those of `tensors`, under the layout's names, which compute `theirs`.

    Returns the difference of the conventions as `to_layout` does.

    Raises MHC404 where the tensors are not those of the model's sites or of a type that float32 does not hold, MHC205
    and 417 as `to_layout` does, and MHC408 for NaN and infinities.
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


def _only_owner(layout: str, owners: Mapping[str, StreamParameters]) -> tuple[str, StreamParameters]:
    if len(owners) != 1:
        raise _no_place(layout, f"{len(owners)} modules hold streams ({names(owners)}), and the layout is of one")
    return next(iter(owners.items()))


def _refuse_inexpressible(layout: str, parameters: StreamParameters) -> None:
    """Raise MHC417 for streams that the layout's code does not compute, whatever its parameters are."""
    spec, exit_ = parameters.spec, find(layout).exit
    reasons = {
        f"form {spec.form}": spec.form != "mhc",
        f"manifold {spec.manifold}: its matrices are sinkhorn's": spec.manifold != "sinkhorn",
        f"{spec.convention.value} reads with the pre of the site before": spec.convention.fields.deferred,
        f"exit {spec.exit}: its exit is {exit_}": spec.exit != exit_,
        "0 iterations": spec.iterations < 1,
        "a memory": parameters.memory is not None,
        "an over-encoding": parameters.over is not None,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise _no_place(layout, reason)


def _places(layout: str, owner: str, parameters: StreamParameters) -> dict[str, tuple[str, ...]]:
    """Return the layout's names of every parameter, by our name below the owner."""
    system, prefix = find(layout), f"{owner}." if owner else ""
    places: dict[str, tuple[str, ...]] = {}
    for position, site in enumerate(parameters.sites):
        layer, number = _layer(site)
        if number != position // 2:
            detail = f"{site} is the stream's site {position}, and layer {position // 2} has two sites in the layout"
            raise _no_place(layout, detail)
        begin = system.sites[position % 2].format(layer=prefix + layer, number=number)
        for name, several in system.parameters.items():
            places[f"{site}.{name}"] = tuple(begin + end for end in several)
    if len(parameters.sites) % 2:
        raise _no_place(layout, f"{len(parameters.sites)} sites, and the layout has two a layer")
    if system.head:
        places |= {f"head.{end}": (system.head.format(owner=prefix) + end,) for end in HEAD}
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


def _refuse_misfits(layout: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
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
        raise MHCError("MHC404", f"hyper-connections in the layout {layout}: {detail}", way_out=way_out)
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise MHCError("MHC408", names(broken))


def _no_place(layout: str, reason: str) -> MHCError:
    return MHCError("MHC417", f"{layout}: {reason}")


def guard(layout: str, spec: StreamSpec) -> bytes:
    """Return the text with which `source.guarded` begins the configuration of a folder in a layout."""
    return "".join(f"\n  {json.dumps(k)}: {json.dumps(v)}," for k, v in entries(layout, spec).items()).encode()
