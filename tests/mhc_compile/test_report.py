"""The report's data: the drawing, every pass's code, blocks and stages, of models of all states."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from memories import with_memory
from test_inspect import Three
from tiny_models import HIDDEN, chain, code_of, ids, llama, t5
from torch import Tensor, nn
from torch.fx import GraphModule

import mhc_compile
from mhc_compile import MHCError, OverEncodingSettings, Report
from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options, compile_pipeline
from mhc_compile.kernels.cpp import build
from mhc_compile.passes.base import Context, Pass
from mhc_compile.passes.cost import bytes_text
from mhc_compile.passes.observer import Debug, Observer
from mhc_compile.runtime.balance import cuts
from mhc_compile.runtime.program import capture_program

Data = dict[str, Any]
KINDS = {"outside", "stream", "layer", "site", "branch", "memory", "exit"}
needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


def check(report: Report) -> Data:
    """Return the JSON of a report, of which this holds: it reads back, numbers are in range, elements a forest."""
    data: Data = json.loads(report.json())
    assert Report.of(data) == report
    elements, lines, sources = data["elements"], data["lines"], data["sources"]
    children = [c for e in elements for c in e["children"]]
    assert sorted([*children, *data["roots"]]) == list(range(len(elements)))
    for e in elements:
        assert e["kind"] in KINDS
        assert e["name"]
        assert e["source"] is None or 0 <= e["source"] < len(sources)
        for name, parts in (("block", data["blocks"]), ("stage", data["stages"])):
            assert e[name] is None or 0 <= e[name] < len(parts)
        assert all(0 <= k < len(data["kernels"]) for k in e["kernels"])
        assert e["parameters"] >= sum(elements[c]["parameters"] for c in e["children"])
    for text, element, source, form in lines:
        assert text
        assert 0 <= element < len(elements)
        assert source is None or 0 <= source < len(sources)
        assert form == "" or re.fullmatch(r"\w+\[.*\]", form)
    assert len({tuple(line) for line in lines}) == len(lines)
    for code in (data["captured"], *(p["code"] for p in data["passes"])):
        assert all(0 <= i < len(lines) for i in code)
    for k, kernel in enumerate(data["kernels"]):
        assert kernel["elements"]
        assert all(k in elements[i]["kernels"] for i in kernel["elements"])
    sites = [i for i in in_order(data) if elements[i]["kind"] == "site"]
    for name in ("block", "stage"):
        ranges = [(sites.index(p["first"]), sites.index(p["last"])) for p in data[f"{name}s"]]
        for k, (first, last) in enumerate(ranges):
            assert {elements[i][name] for i in sites[first : last + 1]} == {k}
            assert first == (ranges[k - 1][1] + 1 if k else 0)
        assert not ranges or ranges[-1][1] == len(sites) - 1
    return data


def in_order(data: Data) -> list[int]:
    """All elements from the input to the output, each in front of what lies in it."""
    stack, found = data["roots"][::-1], []
    while stack:
        number = stack.pop()
        found.append(number)
        stack += data["elements"][number]["children"][::-1]
    return found


def named(data: Data, kind: str) -> list[str]:
    return [data["elements"][i]["name"] for i in in_order(data) if data["elements"][i]["kind"] == kind]


def code(data: Data, after: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The lines behind a pass, or of the captured graph, each with its element."""
    numbers = next((p["code"] for p in data["passes"] if p["name"] == after), data["captured"])
    return [(data["lines"][i][0], data["elements"][data["lines"][i][1]]) for i in numbers]


@pytest.fixture(scope="module")
def converted() -> Data:
    torch._dynamo.reset()
    model = mhc_compile.convert(llama(num_hidden_layers=3))
    return check(mhc_compile.inspect(model, ids(), recompute=2, stages=2))


def test_the_drawing_of_a_converted_llama(converted: Data) -> None:
    assert (converted["model"], converted["state"], converted["coverage"]["sites"]) == (
        "LlamaForCausalLM", "converted", 6,
    )  # fmt: skip
    assert converted["parameters"] == sum(p.numel() for p in llama(num_hidden_layers=3).parameters())
    added = sum(e["added"] for e in converted["elements"])
    assert added == sum(
        {"stream": e["parameters"], "branch": -e["parameters"]}.get(e["kind"], 0) for e in converted["elements"]
    )
    assert [converted["elements"][r]["name"] for r in converted["roots"]] == [
        "inputs", "model.embed_tokens", "model", "model.rotary_emb", "model", "exit of model", "model.norm",
        "LlamaForCausalLM", "lm_head", "output",
    ]  # fmt: skip
    assert named(converted, "layer") == [f"model.layers.{i}" for i in range(3)]
    assert named(converted, "site") == [f"layers.{i}#{k}" for i in range(3) for k in range(2)]
    assert named(converted, "branch") == ["input_layernorm, self_attn", "post_attention_layernorm, mlp"] * 3
    total = sum(converted["elements"][r]["parameters"] for r in converted["roots"])
    assert total == converted["parameters"] + added
    for e in converted["elements"]:
        if e["kind"] == "site":
            assert (e["topology"], e["dtype"], e["shape"]) == ("pre-norm", "float32", f"[2, 8, {HIDDEN}]")
            source = converted["sources"][e["source"]]
            assert source["file"].startswith("transformers/models/llama/")
            assert source["text"] == "hidden_states = residual + hidden_states"
            assert source["function"] == "forward"


def test_every_line_of_a_converted_llama_is_where_it_is_computed(converted: Data) -> None:
    for text, element in code(converted):
        if "self_attn.q_proj.weight" in text or "mlp.down_proj.weight" in text:
            assert element["kind"] == "branch"
            assert f"{element['module']}." in text
    for after in ("widen", "lower"):
        for text, element in code(converted, after):
            if re.search(r"= mhc(_kernels)?\.(coefficients|aggregate|distribute|read|boundary)", text):
                assert element["kind"] == "site"
            if " = mhc.expand" in text:
                assert element["kind"] == "stream"
            if "= mhc.reduce" in text or "= mhc_kernels.leave" in text:
                assert element["kind"] == "exit"
            if match := re.match(r"mhc\.(.*)\.(phi|alpha|bias) = parameter\(\)", text):
                assert element["name"] == match[1]
            if text.startswith("logits = linear("):
                assert element["name"] == "lm_head"
    coefficients = Counter(e["name"] for text, e in code(converted, "widen") if "= mhc.coefficients(" in text)
    assert coefficients == dict.fromkeys(named(converted, "site"), 1)


class Edges(Observer):
    """The names of all nodes and of their operands, before the first pass and after every one."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[list[tuple[str, set[int]]]] = []

    def keep(self, gm: GraphModule) -> None:
        at = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.graphs.append([(n.name, {at[a] for a in n.all_input_nodes}) for n in gm.graph.nodes])

    def run(self, step: Pass, gm: GraphModule, context: Context, debug: Debug) -> GraphModule:
        if not self.graphs:
            self.keep(gm)
        gm = super().run(step, gm, context, debug)
        self.keep(gm)
        return gm


def test_the_code_is_the_graph_node_for_node(converted: Data) -> None:
    model = mhc_compile.convert(llama(num_hidden_layers=3))
    with torch.no_grad():
        graph = capture(model, (ids(),), {}).graph
    edges, options = Edges(), Options(recompute=2)
    compile_pipeline(options).run(graph, Context(marks=find_marks(graph)), edges, debug=options.debug)
    codes = [converted["captured"], *(p["code"] for p in converted["passes"])]
    assert len(edges.graphs) == len(codes) == 10
    for wanted, numbers, step in zip(edges.graphs, codes, [None, *converted["passes"]], strict=True):
        texts = [converted["lines"][i][0] for i in numbers]
        names = [t.partition(" = ")[0] for t in texts]
        assert len(set(names)) == len(names) == len(wanted)
        assert step is None or step["nodes_after"] == len(names)
        position = {name: i for i, name in enumerate(names)}
        for (name, operands), text, own in zip(wanted, texts, names, strict=True):
            assert own == name or re.search(r" = (parameter|buffer|input)\(\)$", text)
            inside = re.sub(r"'[^']*'", "", text.partition(" = ")[2].partition("(")[2])
            read = re.findall(r"(?<![\w.#])[\w.#]+(?![\w.#=])", inside)
            assert {position[r] for r in read if r in position} == operands, text


def test_passes_have_times_and_notes(converted: Data) -> None:
    names = ["normalize", "residual", "widen", "overencoding", "engram", "ultramem", "recompute", "fuse", "lower"]
    assert [p["name"] for p in converted["passes"]] == names
    recompute = converted["passes"][6]
    assert recompute["text"].startswith("recompute{blocks=2")
    assert recompute["purpose"].startswith("Choose blocks of sites whose streams are recomputed")
    assert all(p["purpose"] for p in converted["passes"])
    assert all(p["ms"] >= 0 and p["verify_ms"] >= 0 for p in converted["passes"])
    assert converted["options"]["recompute"] == "2"
    assert converted["options"]["stages"] == "2"
    assert "manifold=sinkhorn" in converted["options"]["streams"]


def test_blocks_are_those_of_the_pass(converted: Data) -> None:
    assert len(converted["blocks"]) == 3
    kept = bytes_text(sum(b["kept"] for b in converted["blocks"]))
    again = bytes_text(max(b["recomputed"] for b in converted["blocks"]))
    notes = converted["passes"][6]["notes"]
    assert any(f"keeps {kept} for the backward pass" in n for n in notes)
    assert any(n.startswith(f"{again} are made again") for n in notes)


def test_stages_are_those_of_training() -> None:
    model = mhc_compile.convert(llama(tie_word_embeddings=True))
    for count in (3,):
        data = check(mhc_compile.inspect(model, ids(), stages=count))
        sites = [e for e in data["elements"] if e["kind"] == "site"]
        starts = [next(i for i, s in enumerate(sites) if s["stage"] == k) for k in range(1, count)]
        assert starts == cuts(capture_program(model, {"input_ids": ids()}), count)
        model.eval()
        # The tied embedding is read by the first stage and by the last.
        tied = model.get_input_embeddings().weight.numel()
        buffer = model.model.rotary_emb.inv_freq.numel()
        total = sum(p.numel() for p in model.parameters())
        assert sum(s["parameters"] for s in data["stages"]) == total + tied
        assert buffer not in (0, tied)


def test_what_cannot_be_is_refused() -> None:
    model = mhc_compile.convert(chain(), ids())
    for wrong, expected in (
        ({"stages": 0}, "MHC204"), ({"stages": 3}, "MHC620"), ({"recompute": "1B"}, "MHC626"),
        ({"recompute": "much"}, "MHC204"),
    ):  # fmt: skip
        with pytest.raises(mhc_compile.MHCError) as caught:
            mhc_compile.inspect(model, ids(), **wrong)
        assert code_of(caught.value) == expected


def test_an_unconverted_model_is_drawn_like_the_converted_one(converted: Data) -> None:
    data = check(mhc_compile.inspect(llama(num_hidden_layers=3), ids(), recompute=2, stages=2))
    assert (data["model"], data["state"], data["parameters"]) == (
        converted["model"], "not converted", converted["parameters"],
    )  # fmt: skip
    shown = ("kind", "name", "module", "place", "shape", "topology", "spec", "parameters", "added", "block", "stage")
    for a, b in zip(in_order(data), in_order(converted), strict=True):
        one, other = data["elements"][a], converted["elements"][b]
        assert [one[s] for s in shown] == [other[s] for s in shown]


def test_two_owners_and_exits_with_parameters() -> None:
    call = {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}
    model = mhc_compile.convert(t5(), example_kwargs=call, inner="eager", exit="head")
    data = check(mhc_compile.inspect(model, example_kwargs=call, stages=3))
    assert named(data, "stream") == ["encoder", "decoder"]
    assert named(data, "layer") == [f"{o}.block.{i}" for o in ("encoder", "decoder") for i in range(2)]
    assert [len(data["elements"][i]["children"]) for i in in_order(data) if data["elements"][i]["kind"] == "layer"] == [
        2, 2, 3, 3,
    ]  # fmt: skip
    exits = [e for e in data["elements"] if e["kind"] == "exit"]
    assert [e["parameters"] for e in exits] == [4 * 4 * HIDDEN + 4 + 1] * 2
    attention = next(e for e in data["elements"] if e["kind"] == "branch" and "EncDecAttention" in e["name"])
    assert attention["module"] == "decoder.block.0.layer.1.EncDecAttention"


def test_an_owner_that_is_called_twice_is_drawn_once() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = chain()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.tower(a) + self.tower(b)

    data = check(mhc_compile.inspect(Pair(), ids(), ids(seed=1)))
    assert named(data, "stream") == ["tower"]
    assert {e["calls"] for e in data["elements"] if e["kind"] in ("stream", "site", "branch", "exit")} == {2}
    reads = Counter(e["name"] for text, e in code(data, "widen") if "= mhc.coefficients(" in text)
    assert reads == {"layers.0#0": 2, "layers.1#0": 2}


def test_a_stream_that_stays_residual_and_one_without_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Three(), Three()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(2, 3, HIDDEN)
    model = Two()
    mhc_compile.convert(model.b, x, inner="eager")
    data = check(mhc_compile.inspect(model, x))
    specs = {e["module"]: e["spec"] is not None for e in data["elements"] if e["kind"] == "stream"}
    assert specs == {"a": False, "b": True}
    assert named(data, "layer") == []
    assert named(data, "site") == ["#0", "#1", "#2"] * 2
    assert named(data, "branch") == [f"layers.{i}" for i in range(3)] * 2


@pytest.mark.parametrize("preset", ["paper", "v41"])
def test_memories(preset: str) -> None:
    model = with_memory(llama(), preset, layers=(0, 1))
    data = check(mhc_compile.inspect(model, kernels="all"))
    assert named(data, "memory") == ["memory at model.layers.0", "memory at model.layers.1"]
    for text, element in code(data, "engram"):
        if re.search(r"= engram\.(rows|gate|inject)", text):
            assert element["kind"] == "memory"
        if match := re.match(r"mhc\.engram\.(.*)\.(key|value) = parameter", text):
            assert element["module"] == f"model.{match[1]}"
    layer = next(e for e in data["elements"] if e["name"] == "model.layers.1")
    assert [data["elements"][c]["kind"] for c in layer["children"]] == ["memory", "site", "site"]
    used = {k["kind"] for k in data["kernels"] for i in k["elements"] if data["elements"][i]["kind"] == "memory"}
    assert used
    assert used <= {"gate", "inject", "add", "remember"}
    assert [m["layer"] for m in data["memories"]] == ["model.layers.0", "model.layers.1"]


def test_an_over_encoding_is_shown() -> None:
    settings = OverEncodingSettings(order=3, heads=2, rows=97)
    model = mhc_compile.convert(llama(eos_token_id=5), over_encoding=settings, inner="eager")
    found = mhc_compile.inspect(model)
    (memory,) = found.memories
    assert (memory.layer, memory.orders, memory.parameters) == ("model.over-encoding", "2..3 x 2", HIDDEN * 4 * 5)
    assert memory.rows == (97 + 99 + 101 + 103) * 5
    assert "model.over-encoding" in str(found)
    data = check(found)
    assert named(data, "memory") == ["over-encoding of model"]
    assert [data["elements"][r]["kind"] for r in data["roots"]].index("memory") == 4  # right in front of the stream
    for text, element in code(data, "overencoding"):
        if "engram.over_rows" in text or text.startswith("mhc.over_encoding.projection ="):
            assert element["kind"] == "memory"
        if text.startswith("inputs_embeds = embedding("):
            assert element["name"] == "model.embed_tokens"


def test_why_a_site_is_not_fused_and_an_add_is_no_site() -> None:
    model = mhc_compile.convert(chain(), ids(), inner="eager")
    found = mhc_compile.inspect(
        model, ids(), kernels="none", pipeline="normalize,residual,widen,fuse{kinds=read},lower"
    )
    reasons = [reason for site in found.sites for reason in site.unfused]
    assert "boundary not fused: switched off" in reasons
    assert "boundary not fused: switched off" in str(found)
    found = mhc_compile.inspect(Joined(), torch.randn(2, 5, HIDDEN))
    assert found.coverage is not None
    assert [where.partition(" in ")[0] for where in found.coverage.left] == ["where", "maximum", "add"]
    assert found.coverage.why == (
        "where of 3 values that depend on the input: a site adds two",
        "maximum of 2 values that depend on the input: a site adds two",
        f"adds [2, 1, {HIDDEN}] to [2, 5, {HIDDEN}]",
    )
    lines = [line.strip() for line in found.text(300).splitlines()]
    for where, why in zip(found.coverage.left, found.coverage.why, strict=True):
        assert lines[lines.index(where) + 1] == why


class Joined(nn.Module):
    """Three sites, and three places where a value meets its branch in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            x = x + torch.tanh(layer(x))
        x = torch.where(x > 0, x, self.layers[3](x))
        x = torch.maximum(x, self.layers[4](x))
        return x[:, :1] + self.layers[5](x)


@dataclass(frozen=True)
class Refuses:
    """A pass of somebody else's, whose error says how its own case is fixed."""

    name: ClassVar[str] = "refuses"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        raise MHCError("MHC105", "eight tokens", way_out="give it nine")


def test_an_error_shows_its_own_fix() -> None:
    found = mhc_compile.inspect(chain(), ids(), pipeline=lambda usual: usual.after("widen", Refuses()))
    assert found.refusal is not None
    assert (found.refusal.code, found.refusal.way_out) == ("MHC105", "give it nine")
    assert "give it nine" in str(found)
