"""Hand-written models of public designs: equal with all adds converted, or a code; no stream without a gradient."""

import copy
import re
import warnings
from typing import Any

import parts
import plain  # noqa: F401 - enters its models into the table
import plain_mixing  # noqa: F401
import plain_spellings  # noqa: F401
import plain_vision  # noqa: F401
import pytest
import torch
from parts import TABLE, Plain
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MHCError, MHCWarning
from mhc_compile.config import overridden
from mhc_compile.conversion.memory import convert_streams
from mhc_compile.passes.results import Coverage

STREAMS = 2
OPTIONS: dict[str, Any] = {"streams": STREAMS, "inner": "eager", "kernels": "none"}
CONVERTED = [name for name, row in TABLE.items() if row.warns or not row.code]
REFUSED = [name for name in TABLE if name not in CONVERTED]
JOINED = [name for name in CONVERTED if not TABLE[name].code]


def made(row: Plain) -> nn.Module:
    torch.manual_seed(0)
    return row.model().eval()


def converted(row: Plain) -> tuple[nn.Module, Coverage, list[str]]:
    """The model with streams, what they cover, and the codes of its warnings."""
    model = made(row)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coverage = convert_streams(model, row.inputs(), {}, *overridden(None, None, OPTIONS))
    return model, coverage, [w.message.code for w in caught if isinstance(w.message, MHCWarning)]


def tensors(out: object) -> list[Tensor]:
    values = out if isinstance(out, Tensor) else vars(out)
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mhc_compile.stream_parameters(model).values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


def without_gradient(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """What of every site a random loss does not reach: `site pre`, `site post`, `site H`."""
    generator = torch.Generator().manual_seed(2)
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors(model(*inputs))).backward()  # type: ignore[union-attr]
    dead = set()
    rows = {"pre": slice(0, STREAMS), "post": slice(STREAMS, 2 * STREAMS), "H": slice(2 * STREAMS, None)}
    for name, p in mhc_compile.stream_parameters(model).items():
        site, _, kind = name.rpartition(".")
        if kind in ("phi", "bias"):
            assert p.grad is not None
            dead |= {
                f"{site} {part}" for part, at in rows.items() if p.grad[at].abs().max() < 1e-6 * p.grad.abs().max()
            }
    return dead


def test_the_table_is_large() -> None:
    assert len(TABLE) >= 60
    assert len(JOINED) >= 50


@pytest.mark.parametrize("name", CONVERTED)
def test_converts(name: str) -> None:
    row = TABLE[name]
    inputs, (model, coverage, codes) = row.inputs(), converted(row)
    assert (coverage.sites, codes) == (row.adds, [row.code] if row.code else [])
    assert bool(coverage.problem) == bool(row.code)
    for ours, theirs in zip(tensors(model(*inputs)), tensors(made(row)(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    if row.code:
        return
    shake(model)
    dead = without_gradient(model, inputs)
    count = {part: sum(d.endswith(f" {part}") for d in dead) for part in ("pre", "post", "H")}
    # Of each stream, the first H meets equal copies, of which `pre` is no more than a scale, and the last H is lost in
    # the mean.
    assert count["pre"] <= row.streams
    assert count["post"] == 0
    assert count["H"] <= 2 * row.streams
    assert count["H"] < sum(len(m.mhc.sites) for m in model.modules() if hasattr(m, "mhc"))


@pytest.mark.parametrize("name", ["PreNorm", "UNet"])
def test_sites_are_the_same_with_dynamic_sizes(name: str) -> None:
    """The U-Net adds `4 * (S // 4)` tokens to S: equal by a guard, and not as expressions."""
    row = TABLE[name]
    model, _, _ = converted(row)
    (x,) = row.inputs()
    for dimension in range(x.ndim):
        torch._dynamo.maybe_mark_dynamic(x, dimension)
    torch.testing.assert_close(model(x), made(row)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    row = TABLE[name]
    model = made(row)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MHCError) as error:
        mhc_compile.convert(model, *row.inputs(), **OPTIONS)
    assert error.value.code == row.code
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", [name for name in CONVERTED if TABLE[name].warns])
def test_strict_refuses_what_is_degenerate(name: str) -> None:
    model = made(TABLE[name])
    with pytest.raises(MHCError, match=r"MHC109.* \d+ of \d+ adds"):
        mhc_compile.convert(model, *TABLE[name].inputs(), strict=True, **OPTIONS)
    assert not mhc_compile.stream_parameters(model)


def test_layers_compiled_one_by_one_are_reported() -> None:
    row = TABLE["PreNorm"]
    model = made(row)
    wanted = model(*row.inputs())
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="mhc", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(model(*row.inputs()), wanted)
    codes = [w.message.code for w in caught if isinstance(w.message, MHCWarning)]
    assert codes.count("MHC109") == parts.DEPTH
    assert any(re.search("one layer compiled by itself", str(w.message)) for w in caught)
