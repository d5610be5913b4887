"""Reduce each idiom to one spelling, so that later passes handle one case where the models have many."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.base import Context, copy_meta, erase_unused, is_tensor, op_name, value
from mhc_compile.passes.dataflow import METADATA_OPS, in_place_option, storage_root
from mhc_compile.passes.spellings import unify_spellings

# In-place spelling -> its out-of-place function.
FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "iadd": operator.add, "add_": torch.add, "isub": operator.sub, "sub_": torch.sub, "imul": operator.mul,
    "mul_": torch.mul, "itruediv": operator.truediv, "div_": torch.div, "subtract_": torch.sub, "multiply_": torch.mul,
    "divide_": torch.div, "addcmul_": torch.addcmul, "addcdiv_": torch.addcdiv, "lerp_": torch.lerp,
}  # fmt: skip
# As above, but only where what is written into is no fresh buffer (the sum over experts), which stays as it is.
FUNCTIONAL_ACCUMULATION: dict[str, Callable[..., Any]] = {
    "index_add_": torch.index_add, "scatter_add_": torch.scatter_add, "index_put_": torch.index_put,
}  # fmt: skip
# As above, but not under autocast, which treats the two spellings differently.
FUNCTIONAL_CONTRACTIONS: dict[str, Callable[..., Any]] = {
    "addmm_": torch.addmm, "baddbmm_": torch.baddbmm, "addbmm_": torch.addbmm,
}  # fmt: skip
FRESH = METADATA_OPS | {"zeros", "ones", "empty", "full"}


@dataclass(frozen=True)
class Normalize:
    """Inlines and tags activation-checkpoint bodies, makes in-place arithmetic functional, unifies residual adds."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ("normal-form",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        inline_checkpoints(gm, context)
        drop_requires_grad(gm)
        functionalise(gm, context)
        for node in gm.graph.nodes:
            unify_add(gm, node)
        unify_spellings(gm)
        return gm


def inline_checkpoints(gm: GraphModule, context: Context) -> None:
    """Replace each `tag_activation_checkpoint(body, ...)` by the body's nodes, tagged for recomputation.

    The tags are those that AOTAutograd's partitioner reads, so memory is saved as before under the compiling inner
    compilers; `inner="eager"` keeps the activations. Without gradients there is no backward pass to recompute for.
    """
    training = torch.is_grad_enabled() and any(
        value(n).requires_grad for n in gm.graph.nodes if n.op == "placeholder" and is_tensor(n)
    )
    block = 0
    while bodies := [
        n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) == "tag_activation_checkpoint"
    ]:
        for node in bodies:
            block += 1
            _inline_body(gm, node, block if training else None)
            context.notes.append(f"checkpointed block {block} inlined" + (" and tagged for recomputation" * training))
    erase_unused(gm)


def _inline_body(gm: GraphModule, call: Node, block: int | None) -> None:
    handle, *operands = call.args
    assert isinstance(handle, Node)
    assert isinstance(handle.target, str)
    body = gm.get_submodule(handle.target)
    assert isinstance(body, GraphModule)
    env: dict[Node, Node] = {}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for formal, actual in zip(placeholders, operands, strict=True):
        env[formal] = actual  # type: ignore[assignment]
    results: object = None
    with gm.graph.inserting_before(call):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                results = inner.args[0]
                continue
            new = gm.graph.node_copy(inner, lambda n: env[n])
            if inner.op == "get_attr":
                # A nested body lives in its parent body: give it a name of its own in the outer graph.
                name = f"{handle.target}_{str(inner.target).replace('.', '_')}"
                setattr(gm, name, getattr(body, str(inner.target)))
                new.target = name
            elif block is not None:
                new.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                new.meta.setdefault("ac_graph_id", block)
            env[inner] = new
    assert isinstance(results, (tuple, list))
    for use in list(call.users):
        assert op_name(use) == "getitem", use.format_node()
        result = results[use.args[1]]  # type: ignore[index]
        use.replace_all_uses_with(env[result] if isinstance(result, Node) else result)
        gm.graph.erase_node(use)
    gm.graph.erase_node(call)


def drop_requires_grad(gm: GraphModule) -> None:
    """Erase `h.requires_grad_()`, by which checkpointing made gradients flow into blocks that hold the parameters."""
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "requires_grad_":
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def functionalise(gm: GraphModule, context: Context) -> None:
    """Rewrite `x += y` to `x2 = x + y`, read by later uses of x, unless another view of x is read afterwards."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    group: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        group.setdefault(storage_root(node), []).append(node)
    for node in list(gm.graph.nodes):
        target = node.args[0] if node.args else None
        if not isinstance(target, Node) or not is_tensor(target) or not _has_functional_form(node):
            continue
        root = storage_root(node)
        if root.op in ("placeholder", "get_attr"):
            continue  # The caller sees this mutation.
        aliases = [n for n in group[root] if n is not target and n is not node]
        at = order[node]
        if any(order[n] < at and any(order[u] > at for u in n.users) for n in aliases):
            context.notes.append(f"in-place {node.format_node()} kept: another view of its operand is read afterwards")
            continue
        with gm.graph.inserting_before(node):
            replacements = _functional(gm, node)
        new = replacements[-1]
        node.replace_all_uses_with(new)
        for user in list(target.users):
            if order.get(user, -1) > at:
                user.replace_input_with(target, new)
        order.update(dict.fromkeys(replacements, at))
        # What viewed the mutated value from here on views the new one.
        later = [n for n in group[root] if order[n] > at]
        group[root] = [n for n in group[root] if order[n] < at]
        group.setdefault(storage_root(new), []).extend([*replacements, *later])
        gm.graph.erase_node(node)


def _has_functional_form(node: Node) -> bool:
    if "out" in node.kwargs:
        return False
    name = op_name(node)
    if name in FUNCTIONAL_ACCUMULATION:
        return op_name(storage_root(node)) not in FRESH
    if name in FUNCTIONAL_CONTRACTIONS:
        return not any("enter_autocast" in op_name(n) for n in node.graph.nodes)
    return name in FUNCTIONAL or in_place_option(node) is not None


def _functional(gm: GraphModule, node: Node) -> list[Node]:
    """Insert nodes that compute out of place what `node` computes in place; the last holds the result, in its dtype."""
    spellings = FUNCTIONAL | FUNCTIONAL_ACCUMULATION | FUNCTIONAL_CONTRACTIONS
    function, option = spellings.get(op_name(node)), in_place_option(node)
    if function is None:
        new = copy_meta(gm.graph.node_copy(node), node)
        if isinstance(option, int):
            new.update_arg(option, False)
        else:
            new.update_kwarg("inplace", False)
        return [new]
    new = copy_meta(gm.graph.call_function(function, node.args, dict(node.kwargs)), node)
    new.meta["example_value"] = value(node)
    if not _promotes(node):
        return [new]
    new.meta["example_value"] = value(node).to(_promoted(node))
    back = copy_meta(gm.graph.call_method("to", (new, value(node).dtype)), node)
    back.meta["example_value"] = value(node)
    return [new, back]


def _promoted(node: Node) -> torch.dtype:
    left, *others = node.args
    assert isinstance(left, Node)
    promoted = value(left)
    for other in others:
        if isinstance(other, Node) and is_tensor(other) and value(other).is_floating_point():
            promoted = promoted.to(torch.result_type(promoted, value(other)))
    dtype: torch.dtype = promoted.dtype
    return dtype


def _promotes(node: Node) -> bool:
    return len(node.args) > 1 and _promoted(node) != value(node).dtype


def unify_add(gm: GraphModule, node: Node) -> None:
    """Rewrite `torch.add(x, y)` and `x.add(y)` to `x + y`; with `alpha=a`, to `x + y * a`."""
    if op_name(node) != "add" or node.target is operator.add or node.op not in ("call_function", "call_method"):
        return
    arguments = dict(zip(("input", "other"), node.args, strict=False)) | node.kwargs
    if len(node.args) > 2 or not set(arguments) <= {"input", "other", "alpha"}:
        return
    left, right, alpha = arguments["input"], arguments["other"], arguments.get("alpha", 1)
    if alpha != 1:
        if not isinstance(right, Node):
            return
        with gm.graph.inserting_before(node):
            scaled = copy_meta(gm.graph.call_function(operator.mul, (right, alpha)), node)
        scaled.meta["example_value"] = value(right)
        right = scaled
    node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (left, right), {}
