"""`mhc-compile bench`: the figures it prints come with a correctness gate, and depth is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memories import with_memory
from rich.console import Console
from tiny_models import ids, llama, shake
from torch import Tensor

from mhc_compile import convert
from mhc_compile.bench import boundary, decode, engram, engram_step, passes, ultramem
from mhc_compile.bench.gpu_contenders import PACKAGES, Package, Work, select
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.memory.tables import MemoryTable


def test_time_of_the_passes_is_part_of_dynamos_own_account() -> None:
    shallow, deep = passes.pass_time(1, 1), passes.pass_time(2, 1)
    assert deep.nodes > shallow.nodes > 50
    assert 0 < shallow.low <= shallow.median <= shallow.high


def test_no_figure_without_equal_results() -> None:
    expected = torch.ones(3)
    passes._check(expected, expected + 1e-7)
    with pytest.raises(MHCError, match="MHC110"):
        passes._check(expected, expected + 1e-3)
    with pytest.raises(MHCError, match="MHC110"):
        passes._check(expected, expected * float("nan"))


@pytest.mark.slow
def test_command_writes_all_figures(tmp_path: Path) -> None:
    assert main(["bench", "passes", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["layers"] for row in figures["passes"]] == [2, 4, 8]
    assert 0 < figures["share"] < 1
    assert figures["compile"]["passes"] < figures["compile"]["total"]


def test_no_figure_of_tokens_of_another_model() -> None:
    model, prompt = llama(), ids()
    streams = convert(llama(), inner="eager")
    decode._check(model, streams, prompt)
    shake(streams)
    with pytest.raises(MHCError, match="MHC110"):
        decode._check(model, streams, prompt)


@pytest.mark.slow
def test_decoding_is_measured_by_batch(tmp_path: Path) -> None:
    assert main(["bench", "decode", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["what"] for row in figures["first"]] == ["2 layers, cold", "2 layers, warm"]
    assert [row["what"] for row in figures["decode"]] == ["batch 1", "batch 4", "batch 16"]
    assert all(row["ratio"] > 0 for row in figures["decode"])


@pytest.mark.slow
def test_recomputation_holds_what_it_says_and_changes_no_gradient(tmp_path: Path) -> None:
    assert main(["bench", "recompute", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    for held in figures["bytes"].values():
        assert held["kept"] == pytest.approx(held["predicted"], rel=0.05)
    assert 0 < figures["fraction"] < 1
    (rows,) = figures["groups"].values()
    assert [row["error"] for row in rows] == [0, 0]


def test_nothing_to_draw_is_wrong_usage(tmp_path: Path) -> None:
    assert main(["bench", "passes", "--quick", "--png", str(tmp_path / "bars.png")]) == 2
    assert not list(tmp_path.iterdir())


def test_unknown_benchmark_is_wrong_usage() -> None:
    assert main(["bench", "nothing"]) == 2


CPU, GPU = torch.device("cpu"), torch.device("cuda")  # what is refused before the GPU is asked is refused without one
LIGER, TILE, TILE2, ENGINE = PACKAGES


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of modules."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def only(path: str) -> Package:
    """A package of the one function `path`."""
    return replace(LIGER, name="Other", distribution="no-such-distribution", functions=(path,), versions="3")


def test_packages_that_cannot_run_are_named_with_the_reason(installed: Path) -> None:
    (installed / "raises_at_import.py").write_text('raise OSError("libcuda.so.1: cannot open\\nmany more lines")\n')
    (installed / "other_version.py").write_text("def newer(): ...\n")
    for path, device, line in (
        ("never_installed.f", GPU, "Other: not installed"),
        ("raises_at_import.f", CPU, "Other: needs a GPU"),
        (
            "raises_at_import.f", GPU,
            "Other: an unknown version does not load (wanted: 3): OSError: libcuda.so.1: cannot open",
        ),
        (
            "other_version.f", GPU,
            "Other: an unknown version does not load (wanted: 3): "
            "AttributeError: module 'other_version' has no attribute 'f'",
        ),
    ):  # fmt: skip
        assert select(device, [only(path)]) == ([], [line])


def test_a_package_that_loads_is_selected_with_its_functions(installed: Path) -> None:
    (installed / "third_version.py").write_text("def f(): return 3\n")
    [(package, api)], left_out = select(GPU, [only("never_installed.f"), only("third_version.f")])
    assert (package.functions, api.f()) == (("third_version.f",), 3)
    assert left_out == ["Other: not installed"]


def test_without_a_gpu_every_package_is_named_in_a_line() -> None:
    found, left_out = select(CPU)
    assert found == []
    assert [line.partition(":")[0] for line in left_out] == [package.name for package in PACKAGES]


# What the packages' documentation says that their functions compute, here for tensors of any dtype: not their kernels.


def sinkhorn(logits: Tensor) -> Tensor:
    eps = 1e-6
    H = logits.softmax(-1) + eps
    for axis in (-2, *(-1, -2) * 19):
        H = H / (H.sum(axis, keepdim=True) + eps)
    return H


def normalised(X: Tensor, eps: float) -> Tensor:
    return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + eps)


def liger_coeffs(
    x: Tensor, phi: Tensor, b: Tensor, a_pre: Tensor, a_post: Tensor, a_res: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-2]
    pre, post, res = (normalised(x.flatten(-2), 1e-6) @ phi).split([n, n, n * n], -1)
    b_pre, b_post, b_res = b.split([n, n, n * n])
    mixed = (res * a_res + b_res).unflatten(-1, (n, n))
    return torch.sigmoid(pre * a_pre + b_pre), 2 * torch.sigmoid(post * a_post + b_post), sinkhorn(mixed)


def tile_pre(
    residual: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, post_mult_value: float, sinkhorn_repeat: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    assert sinkhorn_repeat == 20
    pre, post, comb = liger_coeffs(residual, fn.t(), base, *scale)
    return ((pre + 1e-6)[..., None] * residual).sum(-2), (post[..., None] * (post_mult_value / 2), comb)


def engine_pre(x: Tensor, phi: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    scale = alpha.repeat_interleave(torch.tensor([n, n, n * n]))
    z = normalised(x.flatten(-2), torch.finfo(torch.float32).eps) @ phi.t() * scale + beta[0]
    H = z[..., 2 * n :].unflatten(-1, (n, n)).exp()
    for axis in (-1, -2) * 20:
        H = H / H.sum(axis, keepdim=True)
    return (x @ z[..., :n, None].sigmoid())[..., 0], 2 * z[..., n : 2 * n].sigmoid(), H


def engine_post(f: Tensor, bias: None, post: Tensor, x: Tensor, res: Tensor, n: int) -> Tensor:
    assert (bias, n) == (None, x.shape[-1])
    return f[..., None] @ post[..., None, :] + x @ res


# TileKernels 2: outputs, and gradients, are written into given tensors.


def gradients_of(function: Any, inputs: tuple[Tensor, ...], flows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, flows)


def write(to: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value.view_as(tensor))


def tile_norm(size: int, eps: float) -> Any:
    return lambda product, total: (product * (total / size + eps).rsqrt()[..., None]).sum(1)


def tile_split(mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    n = round((mixes.shape[-1] + 1) ** 0.5) - 1
    pre, post, comb = (mixes * scale.repeat_interleave(torch.tensor([n, n, n * n])) + base).split([n, n, n * n], -1)
    return pre.sigmoid() + 1e-6, 2 * post.sigmoid(), comb


def tile_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return torch.einsum("abmn,abmc->abnc", comb, x) + post * y[..., None, :]


def tile_norm_fwd(
    partial: Tensor, squares: Tensor, product: Tensor, total: Tensor, mixes: Tensor, *, rms_group_size: int,
    rms_eps: float, n_splits: int,
) -> None:  # fmt: skip
    assert n_splits == len(partial) == 1
    write((product, total), (partial[0], squares[0]))
    write((mixes,), (tile_norm(rms_group_size, rms_eps)(product, total),))


def tile_apply_bwd(flow: Tensor, x: Tensor, mix: Tensor, d_x: Tensor) -> Tensor:
    d_x += mix[..., None] * flow[:, None]
    return (flow[:, None] * x).sum(-1)


TILE2_DOCUMENTED = SimpleNamespace(
    mhc_post_fwd=tile_post,
    mhc_post_bwd=lambda *v: gradients_of(tile_post, v[:4], v[4:]),
    mhc_reduce_partials_and_rmsnorm_fwd=tile_norm_fwd,
    mhc_reduce_partials_and_rmsnorm_bwd=lambda flow, *v, rms_group_size, rms_eps: write(
        v[2:], gradients_of(tile_norm(rms_group_size, rms_eps), v[:2], (flow,))
    ),
    mhc_pre_split_mixes_fwd=lambda *v: write(v[3:6], tile_split(*v[:3])),
    mhc_pre_split_mixes_bwd=lambda *v, **_: write(v[7:], gradients_of(tile_split, (v[3], *v[5:7]), v[:3])),
    mhc_sinkhorn_fwd=lambda x, out, *_: write((out,), (sinkhorn(x),)),
    mhc_sinkhorn_bwd=lambda flow, x, out, *_: write((out,), gradients_of(sinkhorn, (x,), (flow,))),
    mhc_pre_apply_mix_fwd=lambda x, mix, out: write((out,), ((mix[..., None] * x).sum(-2),)),
    mhc_pre_apply_mix_bwd=tile_apply_bwd,
)
DOCUMENTED = {
    LIGER.name: SimpleNamespace(
        liger_mhc_coeffs=liger_coeffs,
        liger_mhc_pre=lambda x, pre: (pre[..., None] * x).sum(-2),
        liger_mhc_post_res=lambda x, f, post, res: res @ x + post[..., None] * f[..., None, :],
    ),
    TILE.name: SimpleNamespace(
        mhc_pre=tile_pre,
        mhc_post=tile_post,
    ),
    TILE2.name: TILE2_DOCUMENTED,
    ENGINE.name: SimpleNamespace(mhc_fused_expand_combine=engine_post, mhc_generate_mix_and_aggregate=engine_pre),
}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
@pytest.mark.parametrize("backward", [False, True])
def test_layouts_and_documented_equations_give_the_conventions_results(package: Package, backward: bool) -> None:
    chain = Chain(kind="boundary", stream=StreamSpec(convention=package.convention), width=6)
    names, wanted = chain.inputs(), chain.outputs()[:4]
    inputs = [v.double() for v in boundary.random_inputs(chain, 5, CPU)]
    inputs[names.index("phi")] *= 40  # where the order of rows and columns matters, after 20 iterations, too
    gradients = [torch.randn(chain.shape(name, (5,))).double() for name in wanted]
    work = Work(
        package, DOCUMENTED[package.name], dict(zip(names, inputs, strict=True)),
        dict(zip(wanted, gradients, strict=True)), backward=backward,
    )  # fmt: skip
    assert all(torch.equal(work.inputs()[name], v) for name, v in zip(names, inputs, strict=True))
    exact = boundary._exactly(chain, inputs, gradients, backward=backward)
    allowed = 1e-5 if package is ENGINE else 1e-10  # its eps under the root is another one
    for _ in range(2):
        work.prepare()
        for found, want in zip(work.read(work.run(), names if backward else wanted), exact, strict=True):
            torch.testing.assert_close(found, want, rtol=allowed, atol=allowed)


class SumInPlace(torch.autograd.Function):
    """A sum of the streams whose backward adds to the gradient that their storage holds."""

    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        return X.sum(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        (X,) = ctx.saved_tensors
        X.untyped_storage().held.add_(gradient[..., None, :])
        del X.untyped_storage().held


def test_a_gradient_that_is_added_to_in_place_is_new_in_every_run() -> None:
    def steps(api: SimpleNamespace, v: dict[str, Tensor]) -> dict[str, Tensor]:
        X = 2 * v["X"]
        return {"next_X": X, "h": SumInPlace.apply(X)}

    package = replace(LIGER, theirs=dict, ours=dict, boundary=steps, gradient_attribute="held")
    gradients = {"next_X": torch.ones(5, 4, 6), "h": torch.ones(5, 6)}
    work = Work(package, SimpleNamespace(), {"X": torch.randn(5, 4, 6)}, gradients, backward=True)
    for _ in range(3):
        work.prepare()
        assert torch.equal(work.run()["X"], torch.full((5, 4, 6), 4.0))
    assert torch.equal(gradients["next_X"], torch.ones(5, 4, 6))


def quiet() -> Console:
    return Console(quiet=True)


def test_hashes_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    title, rows = engram.hash_contest(quiet(), "v41", 64, CPU, rounds=2)
    assert title.endswith("64 tokens")
    assert [(r.name, r.error) for r in rows] == [
        (name, 0.0) for name in (engram.OURS, engram.COPY, "Inductor", "eager")
    ]
    assert rows[0].bytes == 64 * 8 * (2 + 24), "an id, its reach, and 24 rows"
    hashing = engram.hashing.rows
    monkeypatch.setattr(engram.hashing, "rows", lambda *inputs: hashing(*inputs) + 1)
    with pytest.raises(MHCError, match=f"MHC110.*{engram.OURS}"):
        engram.hash_contest(quiet(), "paper", 64, CPU, rounds=2)


def test_gathering_is_compared_and_some_rows_are_hot() -> None:
    _, rows, rates = engram.gather_contest(quiet(), CPU, quick=True)
    assert list(rates) == [r.name for r in rows] == ["in memory", "mapped", "mapped, 512 hot rows"]
    assert {r.error for r in rows} == {0.0}
    memory, other = (MemoryTable(8, 2, trainable=False).start(seed) for seed in (0, 1))
    calls = [torch.arange(8)]
    contender = engram._gathering("other", other, calls, [memory(calls[0])], 0)
    assert contender.check is not None
    assert contender.check(None) > contender.tolerance


def test_calls_follow_zipfs_law() -> None:
    first, second = engram.zipf_calls(1000, 5000, 2, CPU)
    counts = torch.bincount(first, minlength=1000).sort(descending=True).values
    assert counts[0] > 5 * counts[9] > 0
    assert first.mode().values == second.mode().values
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_step_with_its_rows_given_computes_the_same_without_a_look_up(tmp_path: Path) -> None:
    model = with_memory(llama())
    model.save_pretrained(tmp_path / "model")
    batches = [ids(seed=0), ids(seed=1)]
    steps = engram_step.contenders(tmp_path / "model", batches, "eager")
    losses = {name: [float(step()) for _ in batches] for name, step in steps.items()}
    assert losses[engram_step.MAPPED] == losses[engram_step.FIXED] == losses[engram_step.TRAINED]
    given, mapped = losses[engram_step.GIVEN], losses[engram_step.MAPPED]
    assert given[0] == mapped[0]
    assert given[1] != mapped[1], "the rows are the first batch's"
    assert all(len(step.seconds) == 2 for step in steps.values())


@pytest.mark.slow
def test_all_of_a_memory_is_measured_and_drawn(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "bars.png")]
    assert main(["bench", "engram", "--quick", *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [len(rows) for rows in figures["groups"].values()] == [4, 4, 3, 4]
    assert set(figures["added_share"]) == {engram_step.MAPPED, engram_step.FIXED, engram_step.TRAINED}
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sampled_step_is_measured_with_equal_results(tmp_path: Path) -> None:
    assert main(["bench", "probes", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    (rows,) = figures["groups"].values()
    assert [(row["name"], row["error"]) for row in rows] == [("plain step", 0), ("sampled step", 0)]
    assert figures["overhead"] == pytest.approx((49 + figures["ratio"]) / 50 - 1)


def test_look_ups_by_content_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # what is compared is ours
    for backward in (False, True):
        _, rows = ultramem.sums_contest(quiet(), CPU, backward=backward, quick=True)
        assert [r.name for r in rows] == [ultramem.OURS, "Inductor", "Inductor, rows by our op", "eager"]
        assert all(r.error is not None and r.error < 1e-5 for r in rows)
    right = ultramem.expand
    monkeypatch.setattr(ultramem, "expand", lambda *a: right(*a) * 1.01)
    with pytest.raises(MHCError, match=f"MHC110.*{ultramem.OURS}"):
        ultramem.sums_contest(quiet(), CPU, backward=False, quick=True)


@pytest.mark.slow
def test_what_is_found_by_content_is_measured_in_a_step(tmp_path: Path) -> None:
    assert main(["bench", "ultramem", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    *_, steps = figures["groups"].values()
    assert [row["name"] for row in steps] == ["without a memory", "v1", "v1, sums given", "v2", "v2, sums given"]
    assert [row["error"] is None for row in steps] == [False, False, True, False, True]
    assert set(figures["added_share"]) == {f"{v}, {what}" for v in ("v1", "v2") for what in ("memory", "look-ups")}
