"""The streams of a graph: linked, checked, named; and every refusal with the place it means."""

from collections.abc import Callable

import pytest
import torch
from goldens import graph_text, streams_text
from layers import IDS, TOKENS, WIDTH, Layers
from recipes import Recipe
from stepping import analysed, captured, site_names, stepped
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Layer, Memory, toy

from mhc_compile.kernels.spec import StreamSpec

Golden = Callable[[str], None]


def found(model: nn.Module, *args: object) -> str:
    gm, streams = analysed(model, *args)
    return f"{graph_text(gm)}\n\n{streams_text(gm, streams)}"


# --- golden texts -------------------------------------------------------------------------------------------------


def test_pre_norm(golden: Golden) -> None:
    golden(found(*toy(Recipe(layers=1))))


def test_post_norm(golden: Golden) -> None:
    golden(found(*toy(Recipe(layers=1, style="post", norm="rms"))))


def test_hidden_states(golden: Golden) -> None:
    golden(found(*toy(Recipe(style="single", hidden_states=True, shared=True))))


def test_keys_of_an_earlier_layer(golden: Golden) -> None:
    golden(found(*toy(Recipe(style="single", extra="shared_keys"))))


def test_long_skip(golden: Golden) -> None:
    golden(found(*toy(Recipe(style="single", extra="long_skip"))))


# --- owners and names ---------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Attention with keys and values of earlier calls, dropout, and blocks of which one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH)}) for _ in range(2))
        self.head = nn.Linear(WIDTH, 11)

    def forward(
        self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embed(ids)
        cache = []
        for i in (0, 1, 0):
            q, k, v = self.blocks[i]["qkv"](F.layer_norm(x, (WIDTH,))).chunk(3, -1)
            if past is not None:
                k, v = (torch.cat([old, new], 1) for old, new in zip(past[len(cache)], (k, v), strict=True))
            cache.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + F.dropout(y, 0.1, self.training)
        return self.head(x), cache


class Stack(nn.Module):
    """Blocks that hold their own adds, the first of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = nn.ModuleList(Layer(Recipe()) for _ in range(2))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        memory = Memory(x, torch.ones(1))
        for i in (0, 1, 0):
            x = self.body[i](x, memory)
        return self.head(x)


def test_names_are_the_same_in_every_graph_of_a_model() -> None:
    model = Cached()
    names = site_names(model.eval(), IDS)
    assert names == ["#0", "#1", "#2"]
    with torch.no_grad():
        _, cache = model(IDS)
    assert site_names(model.train(), IDS) == names
    assert site_names(model.eval(), torch.cat([IDS, IDS])) == names
    assert site_names(model.eval(), IDS[:, :1], cache) == names
    gm = captured(model, IDS[:, :1], cache).graph
    assert str(gm.graph) != str(captured(model, IDS).graph.graph)


def test_ordinals_count_the_calls_of_shared_modules() -> None:
    assert site_names(Stack(), IDS) == [
        "body.0#0", "body.0#1", "body.1#0", "body.1#1", "body.0#2", "body.0#3"
    ]  # fmt: skip
    model, ids = toy(Recipe(layers=3, style="single", shared=True))
    assert site_names(model, ids) == ["layers.0#0", "layers.0#1", "layers.0#2"]


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(11, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.model(ids))


def test_the_owner_is_the_module_that_holds_the_stream_from_end_to_end() -> None:
    _, (stream,) = analysed(Wrapped(Stack()), IDS)
    assert stream.owner == "model"
    assert stream.sites[0].name == "body.0#0"
    assert stream.hidden == WIDTH
    assert stream.exit is stream.sites[-1].add


class Loop(nn.Module):
    """One layer over and over, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x)
        return x

    def step(self, x: Tensor) -> Tensor:
        return x + self.layer[0](x)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class LoopOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x)
        return x


@pytest.mark.parametrize(("model", "names"), [(Loop(), "#"), (LoopOfModules(), "step#")])
def test_a_layer_called_again_and_again_does_not_own_the_stream(model: nn.Module, names: str) -> None:
    _, (stream,) = analysed(model, torch.randn(2, TOKENS, WIDTH))
    assert stream.owner == ""
    assert [s.name for s in stream.sites] == [f"{names}{i}" for i in range(3)]


class Twice(nn.Module):
    """A module with a stream, called twice: two streams with the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Stack()

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(ids) @ self.tower(ids.flip(1)).transpose(1, 2)


def test_an_owner_called_twice_has_two_streams_of_the_same_names() -> None:
    _, streams = analysed(Twice(), IDS)
    assert [s.owner for s in streams] == ["tower", "tower"]
    assert streams[0].call != streams[1].call
    assert [s.name for s in streams[0].sites] == [s.name for s in streams[1].sites]


class Siamese(nn.Module):
    """A body called twice on embeddings from outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(11, WIDTH), Body()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.body(x).sin() + self.body(x.flip(1)).sin()


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 0):
            x = self.steps[i](x)
        return x


def test_a_body_called_twice_has_the_same_names_each_time() -> None:
    names = ["body.steps.0#0", "body.steps.1#0", "body.steps.0#1"]
    out = stepped(Siamese().double(), StreamSpec(streams=3), IDS)
    assert [[s.name for s in stream.sites] for stream in out.streams] == [names, names]
    assert [stream.owner for stream in out.streams] == ["", ""]
    torch.testing.assert_close(out.at_start, out.outputs["captured"], rtol=1e-6, atol=1e-6)


class Stages(Layers):
    """Two streams one behind the other in one forward, of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(WIDTH, 2 * WIDTH)
        self.wide = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers[:2]:
            x = x + layer(x)
        x = self.between(x)
        for layer in self.wide:
            x = x + layer(x)
        return x


def test_two_streams_of_one_call_share_no_names() -> None:
    out = stepped(Stages().double(), StreamSpec(streams=3), IDS)
    assert [[s.name for s in stream.sites] for stream in out.streams] == [["#0", "#1"], ["#2", "#3"]]
    assert [stream.hidden for stream in out.streams] == [WIDTH, 2 * WIDTH]
    torch.testing.assert_close(out.at_start, out.outputs["captured"], rtol=1e-6, atol=1e-6)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Layers(2)
        self.cross = nn.Linear(11, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        memory = self.cross(self.encoder(ids))
        x = self.decoder.embed(ids)
        for layer in self.decoder.layers:
            x = x + layer(x)
            x = x + F.scaled_dot_product_attention(layer(x), memory, memory)
        return self.decoder.head(x)


def test_encoder_and_decoder_are_streams_of_their_own() -> None:
    names = site_names(EncoderDecoder(), IDS)
    assert len(names) == 10
    assert names[:2] == ["encoder:body.0#0", "encoder:body.0#1"]
    assert names[6:] == ["#0", "#1", "#2", "#3"]
