"""The inspector: sites and their topology, what passes changed, where a stream was lost, and the command."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from tiny_models import HIDDEN, VOCAB, Block, Late, chain, code_of, gpt2, ids, llama, state, t5
from torch import Tensor, nn

import mhc_compile
from mhc_compile.cli import app
from mhc_compile.diagnostics import TABLE
from mhc_compile.report.fold import fold, ranges

SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8,
    "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64,
}  # fmt: skip


def tiny(architecture: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{architecture}Config")
    known = {k: v for k, v in SIZES.items() if hasattr(config(), k)}
    auto = transformers.AutoModelForMaskedLM if architecture == "Bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config(**(known | more))).eval()


def test_sites_of_an_unconverted_model_which_stays_as_it_was() -> None:
    model = llama()
    before, keys = state(model), [sorted(m.__dict__) for m in model.modules()]
    found = mhc_compile.inspect(model, ids())
    assert state(model) == before
    assert [sorted(m.__dict__) for m in model.modules()] == keys
    assert found.model == "LlamaForCausalLM"
    assert found.state == "not converted"
    assert found.refusal is None
    (stream,) = found.streams
    assert stream.module == "model"
    sites = list(found.sites_in(stream))
    assert [s.name for s in sites] == ["layers.0#0", "layers.0#1", "layers.1#0", "layers.1#1"]
    assert [s.module for s in sites] == ["model.layers.0"] * 2 + ["model.layers.1"] * 2
    for site in sites:
        assert (site.topology, site.shape) == ("pre-norm", f"[2, 8, {HIDDEN}]")
        assert site.source is not None
        source = found.sources[site.source]
        assert source.file.endswith("modeling_llama.py")
        assert source.text == "hidden_states = residual + hidden_states"
    assert "model.embed_tokens" in stream.place
    assert [r.name for r in found.passes][:3] == ["normalize", "residual", "widen"]
    widen = next(r for r in found.passes if r.name == "widen")
    assert widen.nodes_after > widen.nodes_before
    before_widen, after_widen = ([found.lines[i][0] for i in p.code] for p in (found.passes[1], widen))
    assert any("mhc.distribute" in line for line in after_widen)
    assert not any("mhc.distribute" in line for line in before_widen)


@pytest.mark.parametrize("options", [{}, {"streams": 2, "convention": "deepseek_v4"}], ids=str)
def test_counts_are_those_of_the_conversion(options: dict[str, Any]) -> None:
    model = gpt2()
    own = sum(p.numel() for p in model.parameters())
    found = mhc_compile.inspect(model, **options)
    mhc_compile.convert(model, inner="eager", **options)
    after = mhc_compile.inspect(model)
    added = sum(p.numel() for p in mhc_compile.stream_parameters(model).values())
    assert (found.added, found.parameters) == (after.added, after.parameters) == (added, own)
    assert after.state == "converted"
    assert [(e.module, e.spec, e.place) for e in after.streams] == [(e.module, e.spec, e.place) for e in found.streams]
    assert [s.added for s in after.sites] == [s.added for s in found.sites]
    assert f"{added:,} parameters" in str(after)


def test_a_converted_model_stays_as_it_was() -> None:
    model = t5()
    call = {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}
    mhc_compile.convert(model, example_kwargs=call, inner="eager")
    before = state(model)
    found = mhc_compile.inspect(model, example_kwargs=call)
    assert state(model) == before
    assert [s.module for s in found.streams] == ["encoder", "decoder"]
    assert [len(list(found.sites_in(s))) for s in found.streams] == [4, 6]
    assert "2 streams, 10 sites" in str(found)
    assert "decoder.block.0-1.layer.2#0" in str(found)


def test_a_stream_that_stays_residual_beside_a_converted_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = chain(), chain()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = Two()
    mhc_compile.convert(model.b, ids(), inner="eager")
    found = mhc_compile.inspect(model, ids())
    assert {s.module: bool(s.spec) for s in found.streams} == {"a": False, "b": True}
    assert found.added == sum(p.numel() for p in mhc_compile.stream_parameters(model).values())
    assert "stream of a: stays residual" in str(found)


@pytest.mark.parametrize(
    ("architecture", "topology"),
    [("Bert", "post-norm"), ("GPTJ", "pre-norm, parallel"), ("Cohere", "pre-norm, parallel"), ("Gemma2", "sandwich"),
     ("Olmo2", "output-norm"), ("Granite", "pre-norm, scaled branch"), ("Doge", "pre-norm, scaled carry")],
)  # fmt: skip
def test_topology(architecture: str, topology: str) -> None:
    more = {"residual_multiplier": 0.5} if architecture == "Granite" else {}
    found = mhc_compile.inspect(tiny(architecture, **more))
    assert found.refusal is None, found
    assert {s.topology for s in found.sites} == {topology}


def test_experts_beside_a_shared_expert_are_not_parallel_layers() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routed, self.shared = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.routed.up(x)[..., :HIDDEN] + self.shared.up(x)[..., :HIDDEN])

    found = mhc_compile.inspect(nn.Sequential(Experts(), Experts()), torch.randn(2, 4, HIDDEN))
    assert [s.topology for s in found.sites] == ["no norm", "no norm"]


def test_a_model_without_a_residual_stream_is_refused_with_the_reason() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            return self.c(torch.relu(y))

    model = Plain()
    before = state(model)
    found = mhc_compile.inspect(model, torch.randn(2, 3, 8))
    assert state(model) == before
    assert found.refusal is not None
    assert found.refusal.code == "MHC101"
    assert found.reach is not None
    assert found.reach.layers == ("c", "a")
    assert found.reach.sites == ()
    assert (found.reach.node, found.reach.reason) == ("x", "an input")
    ((where, why),) = found.reach.dismissed
    assert where.endswith("y = self.a(x) + self.b(x)")
    assert why == "neither operand comes from the other"
    text = str(found)
    assert "refused: MHC101 no residual stream" in text
    assert TABLE["MHC101"].way_out[:40] in text
    assert "layers passed: 2 (c, a)" in text


def test_a_lost_stream_shows_how_far_it_was_followed() -> None:
    found = mhc_compile.inspect(Late(), torch.randn(2, 3, HIDDEN))
    assert found.refusal is not None
    assert found.refusal.code == "MHC103"
    assert found.reach is not None
    assert found.reach.sites == ("layers.1", "layers.0")
    assert found.reach.module == "first.11"
    assert found.reach.reason.startswith("made by a layer with parameters")
    assert found.reach.source is not None
    assert found.reach.source.endswith("x = torch.tanh(linear(x))")
    assert [r.name for r in found.passes] == ["normalize"]


def test_a_graph_break_is_shown_with_its_place() -> None:
    found = mhc_compile.inspect(chain(breaks="inside"), ids())
    assert found.refusal is not None
    assert found.refusal.code == "MHC104"
    assert found.reach is None
    assert "tiny_models.py" in str(found)


def test_a_loop_over_data_is_a_break() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for i in (x.sum((0, 1)) > 0).nonzero():
                x = x + self.layers[i](x)
            return x

    found = mhc_compile.inspect(Experts(), torch.randn(2, 3, HIDDEN))
    assert found.refusal is not None
    assert found.refusal.code == "MHC104"


def test_layer_before_and_after() -> None:
    model = llama()
    found = mhc_compile.inspect(model, ids(), layer="model.layers.1")
    assert found.layer is not None
    before, after = found.layer.before, found.layer.after
    assert not any("mhc." in line for line in before)
    assert sum("= mhc.distribute(" in line for line in after) == 2
    assert any("mhc.layers.1#0.phi" in line for line in after)
    assert any("model.layers.1.self_attn.q_proj.weight" in line for line in before)
    assert all("layers.0." not in line for line in (*before, *after))
    assert any(line.endswith("float32[2, 8, 64]") for line in before)
    text = str(found)
    assert "model.layers.1 before widen" in text
    assert "\n+ distribute_default" in text
    mhc_compile.convert(model, inner="eager")
    assert mhc_compile.inspect(model, ids(), layer="model.layers.1").layer is not None
    with pytest.raises(mhc_compile.MHCError, match=r"model\.layers\.7") as caught:
        mhc_compile.inspect(model, ids(), layer="model.layers.7")
    assert code_of(caught.value) == "MHC507"


def test_options_and_inputs_are_checked() -> None:
    with pytest.raises(mhc_compile.MHCError) as caught:
        mhc_compile.inspect(chain(), ids(), strams=2)
    assert code_of(caught.value) == "MHC204"
    with pytest.raises(mhc_compile.MHCError) as caught:
        mhc_compile.inspect(chain())
    assert code_of(caught.value) == "MHC209"


def test_ninety_six_layers_are_two_lines() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(96))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    with torch.device("meta"):
        found = mhc_compile.inspect(Deep(), torch.randn(2, 3, HIDDEN))
    text = str(found)
    assert "#0-95" in text  # one module's forward holds them all
    assert len(text.splitlines()) < 30


def test_terminal_page_and_text_say_the_same() -> None:
    found = mhc_compile.inspect(chain(depth=3), ids())
    console = Console(record=True, width=150, file=io.StringIO(), force_terminal=True)
    console.print(found)
    words = console.export_text().split()
    assert words == found.text().split()
    assert "layers.2#0" in found.html()
    assert max(map(len, found.text(100).splitlines())) <= 100


def test_folding() -> None:
    assert ranges([3, 0, 1, 2, 9]) == "0-3,9"
    names = [f"h.{i}.{part}#0" for i in range(4) for part in ("attn", "mlp")]
    assert [label for label, _ in fold(names, str, lambda _: None)] == ["h.0-3.attn#0", "h.0-3.mlp#0"]
    stages = [f"stages.{s}.blocks.{b}#0" for s in range(2) for b in range(6)]
    assert [label for label, _ in fold(stages, str, lambda _: None)] == [f"stages.{s}.blocks.0-5#0" for s in range(2)]
    kinds = {"l.0": "a", "l.1": "b", "l.2": "a"}
    assert [label for label, _ in fold(list(kinds), str, kinds.__getitem__)] == ["l.0,2", "l.1"]
    assert fold(["norm"], str, lambda _: None) == [("norm", ["norm"])]


def run(*arguments: str) -> int:
    return app()(["inspect", *arguments], exit_on_error=False, result_action="return_value")


def config(folder: Path, **more: Any) -> None:
    made = llama(**more).config
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(folder)


def test_command_reads_a_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path, num_hidden_layers=3)
    page = tmp_path / "report.html"
    assert run(str(tmp_path), "--layer", "model.layers.0.mlp", "--streams", "2", "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM (not converted)" in out
    assert "model.layers.0-2#0" in out
    assert "streams=2" in out
    assert "model.layers.0.mlp after widen" in out
    assert "layers.2#0" in page.read_text()
    assert run(str(tmp_path / "config.json")) == 0
    assert "streams=4" in capsys.readouterr().out


def test_command_on_a_converted_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "residual")
    mhc_compile.convert_folder(tmp_path / "residual", tmp_path / "mhc", streams=3)
    for weights in (tmp_path / "mhc").glob("*.safetensors"):
        weights.unlink()  # nothing but the two JSON files is read
    assert run(str(tmp_path / "mhc")) == 0
    out = capsys.readouterr().out
    assert "(converted)" in out
    assert "streams=3" in out
    with pytest.raises(mhc_compile.MHCError, match=r"mhc\.json") as caught:
        run(str(tmp_path / "mhc"), "--streams", "2")
    assert code_of(caught.value) == "MHC304"


def test_command_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mhc_compile.MHCError, match="is not there") as caught:
        run(str(tmp_path / "nowhere"))
    assert code_of(caught.value) == "MHC508"
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(mhc_compile.MHCError, match="unheard of") as caught:
        run(str(tmp_path))
    assert code_of(caught.value) == "MHC508"
    # A model that has no residual stream: the report says so, and so does the exit code.
    made = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made.architectures = ["ResNetForImageClassification"]
    made.image_size = 32
    made.save_pretrained(tmp_path / "resnet")
    assert run(str(tmp_path / "resnet")) == 3
    assert "refused: MHC10" in capsys.readouterr().out


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_the_kernels_are_named_and_their_code_is_printed() -> None:
    found = mhc_compile.inspect(Three(), torch.randn(2, 3, HIDDEN))
    names = {kernel.kind: kernel for kernel in found.kernels}
    assert set(names) == {"read", "boundary", "leave"}
    assert names["boundary"].calls == 2
    assert "boundary_n4" in str(found)
    assert 'extern "C" void backward' in (names["boundary"].backward or "")


def test_no_kernels_where_none_are_wanted() -> None:
    assert mhc_compile.inspect(Three(), torch.randn(2, 3, HIDDEN), kernels="none").kernels == ()


def test_parameters_have_their_paths_whatever_forward_calls_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(model, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
            for block in model.blocks:
                x = block(x)
            return x

    lines = [line[0] for line in mhc_compile.inspect(Named(), torch.randn(2, 3, HIDDEN)).lines]
    assert "blocks.0.up.weight = parameter()" in lines
    assert not any("model." in line for line in lines)
