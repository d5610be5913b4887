"""What a toy model may look like: every feature of residual models in the wild, one field each."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from hypothesis import strategies as st

Style = Literal["pre", "post", "sandwich", "parallel", "tree", "single"]
Norms = Literal["layer", "rms", "layer_by_hand", "rms_by_hand"]
Add = Literal["plus", "reversed", "function", "method", "iadd", "add_", "alpha"]
Carry = Literal["plain", "scaled", "affine", "masked", "doubled", "rescaled", "imul"]
BranchScale = Literal["plain", "scaled", "layer_scale", "mul_"]
Layout = Literal["bsc", "sbc", "flat", "flat_feed"]
Extra = Literal[
    "none", "shared_keys", "early", "embedding_in_branch", "embedding_in_stream", "long_skip", "clone", "cast"
]


@dataclass(frozen=True)
class Recipe:
    """Which residual model to make. Field by field what models in the wild do."""

    layers: int = 2
    style: Style = "pre"
    norm: Norms = "layer"
    add: Add = "plus"
    carry: Carry = "plain"
    branch: BranchScale = "plain"
    layout: Layout = "bsc"
    extra: Extra = "none"
    hidden_states: bool = False
    shared: bool = False

    def __str__(self) -> str:
        changed = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return ",".join(changed) or "plain"

    @property
    def in_place(self) -> bool:
        """Whether stream values are overwritten, so that a value to be read later needs a copy."""
        return self.add in ("iadd", "add_") or self.carry == "imul"

    @property
    def sites(self) -> int:
        """How many additions to the stream there are."""
        return self.layers * (1 if self.style in ("parallel", "tree", "single") else 2)


def recipes() -> st.SearchStrategy[Recipe]:
    """Every combination of the features, with the few that no model could have left out."""
    return st.builds(
        Recipe,
        layers=st.integers(1, 3),
        style=st.sampled_from(get_args(Style)),
        norm=st.sampled_from(get_args(Norms)),
        add=st.sampled_from(get_args(Add)),
        carry=st.sampled_from(get_args(Carry)),
        branch=st.sampled_from(get_args(BranchScale)),
        layout=st.sampled_from(get_args(Layout)),
        extra=st.sampled_from(get_args(Extra)),
        hidden_states=st.booleans(),
        shared=st.booleans(),
    ).map(possible)


def possible(recipe: Recipe) -> Recipe:
    """The nearest recipe that makes sense."""
    if recipe.extra == "early" and recipe.style in ("parallel", "tree", "single"):
        recipe = replace(recipe, style="pre")
    if recipe.extra in ("shared_keys", "embedding_in_branch", "long_skip"):
        recipe = replace(recipe, layers=max(2, recipe.layers))
    return recipe


ONE_BY_ONE = [
    Recipe(),
    *(Recipe(**{f: v}) for f, t in (("style", Style), ("norm", Norms), ("add", Add)) for v in get_args(t)[1:]),
    *(Recipe(**{f: v}) for f, t in (("carry", Carry), ("branch", BranchScale)) for v in get_args(t)[1:]),
    *(possible(Recipe(**{f: v})) for f, t in (("layout", Layout), ("extra", Extra)) for v in get_args(t)[1:]),
    Recipe(layers=1),
    Recipe(hidden_states=True),
    Recipe(shared=True),
    Recipe(style="post", hidden_states=True),
    Recipe(style="tree", add="iadd", hidden_states=True),
    Recipe(style="post", carry="scaled", norm="rms_by_hand"),
    Recipe(style="sandwich", layout="flat_feed", add="add_"),
    Recipe(carry="imul", hidden_states=True),
]
"""Each feature alone, and the combinations that went wrong once."""
