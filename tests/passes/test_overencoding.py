"""Adding embeddings of n-grams: the graph, and that it computes what the equation says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens import graph_text
from inserting import SPEC, Inserted, insert, step
from recipes import Recipe
from stepping import CHECKED, captured, run
from torch import Tensor, nn
from toys import VOCAB, WIDTH, Sites, toy

from mhc_compile.attach import append_parameters, sites_of_owners
from mhc_compile.config import compile_pipeline
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.memory.request import Request
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes, op_name
from mhc_compile.passes.fuse_memory import fuse_memories
from mhc_compile.passes.overencoding import OverEncode
from mhc_compile.passes.pipeline import ANALYSIS, EXPORT
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]
REQUEST = Request(over_encoding=OverEncodingSettings(order=3, heads=1, rows=31))


def inserted(model: nn.Module, ids: Tensor, *, portable: bool = False) -> Inserted:
    """The passes up to `overencoding`."""
    return insert(OverEncode(portable=portable), REQUEST, model, ids)


def by_hand(held: StreamParameters, embedding: Tensor, ids: Tensor) -> Tensor:
    """The equation, in Python's numbers."""
    over = held.memories.over_encoding
    assert over is not None
    table = held.table("over-encoding").weight.detach().double()
    W = held.get_parameter("over_encoding.projection").detach()
    out = embedding.clone()
    for b, row in enumerate(ids.tolist()):
        for t in range(len(row)):
            first = 0
            for j, m in enumerate(over.hash.moduli):
                number = sum(row[t - s] * VOCAB**s for s in range(2 + j) if s <= t)
                columns = slice(j * over.width, (j + 1) * over.width)
                out[b, t] += W[:, columns] @ table[first + number % m]
                first += m
    return out


def check(recipe: Recipe) -> Inserted:
    model, ids = toy(recipe)
    ids = ids.repeat(1, 2)  # longer than an n-gram
    out = inserted(model, ids)
    found = run(out.graph, out.inputs)
    each = ((out.held.get_parameter(f"{s}.{p}").detach() for p in ("phi", "alpha", "bias")) for s in out.sites)
    model.embed.register_forward_hook(lambda _, args, result: by_hand(out.held, result, args[0]))
    with torch.no_grad():
        wanted = model.streams(ids, Sites(SPEC, (tuple(values) for values in each)))  # type: ignore[misc]
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-12
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(out.without, wanted, strict=True))
    return out


# Every reader of the embedding gets the sum: the stream, branches, later layers, and what looks at the input.
READERS = [
    Recipe(),
    Recipe(style="post", hidden_states=True),
    Recipe(style="tree"),
    Recipe(carry="rescaled"),
    Recipe(carry="imul"),
    Recipe(layout="flat_feed"),
    Recipe(extra="embedding_in_branch"),
    Recipe(extra="embedding_in_stream"),
    Recipe(extra="clone"),
]


@pytest.mark.parametrize("recipe", READERS, ids=str)
def test_whatever_reads_the_embedding(recipe: Recipe) -> None:
    out = check(recipe)
    (embedding,) = [n for n in call_nodes(out.graph) if op_name(n) == "embedding"]
    assert [op_name(reader) for reader in embedding.users] == ["add"]


def test_the_graph(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1, style="single"))
    text = graph_text(inserted(model, ids).graph)
    golden(re.sub(r"_\d+_float32_False, \d+,", "_HANDLE_float32_False, HANDLE,", text))


def test_portable_programs_read_the_table_as_an_embedding() -> None:
    model, ids = toy(Recipe())
    ours, portable = (inserted(model, ids, portable=p) for p in (False, True))
    for a, b in zip(run(ours.graph, ours.inputs), run(portable.graph, portable.inputs), strict=True):
        assert torch.equal(a, b)
    assert not [n for n in call_nodes(portable.graph) if "engram_kernels" in str(n.target)]


def test_the_kernel_takes_the_place_of_the_op() -> None:
    model, ids = toy(Recipe())
    out = inserted(model, ids)
    before = run(out.graph, out.inputs)
    assert fuse_memories(out.graph.graph) == ["1 x over-encoding's rows in a kernel"]
    assert all(torch.equal(a, b) for a, b in zip(run(out.graph, out.inputs), before, strict=True))


class Tied(nn.Module):
    """The head reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return (x + self.layer(torch.tanh(x))) @ self.embed.weight.T


def test_a_tied_head_reads_the_weight() -> None:
    out = inserted(Tied().double(), torch.randint(0, VOCAB, (2, 3)))
    (head,) = [n for n in call_nodes(out.graph) if op_name(n) == "matmul"]
    assert "weight" in str(head.args[1].args)  # type: ignore[union-attr]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(run(out.graph, out.inputs), out.without, strict=True))


def test_graphs_without_n_grams_stay_as_they_are() -> None:
    model, ids = toy(Recipe())
    found, context = captured(model, ids), Context()
    gm = ANALYSIS.run(found.graph, context, debug=CHECKED.debug)
    ((owner, sites),) = sites_of_owners(context.streams, SPEC).items()
    context.marks = [append_parameters(gm, owner, StreamParameters(SPEC, sites))]
    gm = step(Widen(), gm, context)
    before = graph_text(gm)
    assert graph_text(step(OverEncode(), gm, context)) == before


def test_the_memory_of_a_model_with_both_reads_the_same_ids() -> None:
    model, ids = toy(Recipe())
    found, context = captured(model, ids), Context()
    ANALYSIS.run(found.graph, context, debug=CHECKED.debug)
    ((owner, sites),) = sites_of_owners(context.streams, SPEC).items()
    chosen = MemorySettings.preset("v41", rows_per_head=31, row_width=2, heads=2, layers=(0,))
    both = replace(REQUEST, engram=chosen)
    held = StreamParameters(SPEC, sites, **both.of(context.streams[0].entry, list(sites)))
    assert set(held.memories.tables) == {"layers.0", "over-encoding"}
    assert held.vocab == VOCAB
    for passes in (compile_pipeline(CHECKED), EXPORT):
        copy, context = captured(model, ids).graph, Context()
        context.marks = [append_parameters(copy, owner, held)]
        copy = passes.run(copy, context, debug=CHECKED.debug)
        names = [op_name(n) for n in call_nodes(copy)]
        assert names.count("over_rows") == names.count("rows") == 1


class Given(nn.Module):
    """Embeds outside of what holds the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), *(Part() for _ in range(2)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(x))


def test_an_owner_that_is_given_embeddings_is_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC225.*body, which holds the stream, is given embeddings") as caught:
        inserted(Given().double(), torch.randint(0, VOCAB, (2, 3)))
    assert caught.value.module == "embed"


@pytest.mark.parametrize("layout", ["sbc", "flat"])
def test_streams_that_are_not_batch_by_sequence_are_refused(layout: Any) -> None:
    model, ids = toy(Recipe(layout=layout))
    with pytest.raises(MHCError, match="MHC225"):
        inserted(model, ids)
