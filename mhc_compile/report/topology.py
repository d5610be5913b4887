"""Name the residual topology of a site by what stands between the stream and its branch, never by module names."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from mhc_compile.passes.base import is_tensor, op_name, shape
from mhc_compile.passes.dataflow import MATMULS, Dataflow
from mhc_compile.passes.residual_sites import branch_mask
from mhc_compile.passes.results import ResidualStream, Site

NORMS = {"layer_norm", "rms_norm", "group_norm", "normalize"}
# What a norm written out cannot do without.
NORM_PARTS = {"rsqrt", "var", "std", "var_mean", "norm", "vector_norm"}
SCALES = {"mul", "multiply", "truediv", "div"}
CARRIES = {"to", "float", "half", "bfloat16", "type_as", "contiguous", "dropout", "view", "reshape", "transpose"}


def topology(flow: Dataflow, stream: ResidualStream, site: Site) -> tuple[str, list[Node]]:
    """Return the topology of `site`, joined by commas, and the nodes of its branches in graph order.

    * pre-norm: the branch begins with a norm; output-norm: it ends with one; sandwich: both.
    * post-norm: the norm stands on the stream after the add; no norm: none of these.
    * parallel: the branch is a sum of branches, attention next to the MLP.
    * scaled branch, scaled carry: multiplied by a constant or a parameter.
    * early read: the branch reads a value of the stream older than its own add.
    """
    branch = _Branch(flow, stream, site)
    begins, ends = _holds_norm(branch.head), _holds_norm(branch.tail)
    norms = {(True, True): "sandwich", (True, False): "pre-norm", (False, True): "output-norm"}
    labels = [norms.get((begins, ends)) or ("post-norm" if _normed_after(stream, site) else "no norm")]
    if len(site.branches) > 1 or branch.is_sum():
        labels.append("parallel")
    if not ends and any(_scales(flow, n) and shape(n)[-1:] == shape(site.add)[-1:] for n in branch.tail):
        labels.append("scaled branch")
    if not _holds_norm(site.chain) and any(_scales(flow, n) for n in site.chain):
        labels.append("scaled carry")
    if not site.reads:
        labels.append("early read")
    return ", ".join(labels), branch.nodes


class _Branch:
    """The nodes of a branch: `head` before its first parameter contractions, `tail` after its last ones."""

    def __init__(self, flow: Dataflow, stream: ResidualStream, site: Site) -> None:
        self.flow, self.site = flow, site
        values = {site.previous, *site.chain}
        below = 0
        for v in site.reads or [stream.entry]:
            below |= flow.descendants[v]
        for v in values:
            below &= ~flow.bit(v)
        self.region = below & branch_mask(flow, site)
        contractions = self.region & flow.matmuls
        self.nodes = flow.members(self.region)
        self.head = [n for n in self.nodes if not flow.ancestors[n] & contractions]
        self.tail = [
            n for n in self.nodes if flow.ancestors[n] & contractions and not flow.descendants[n] & contractions
        ]

    def is_sum(self) -> bool:
        """Return whether the branch ends in an add of two, of which one mixes tokens and the other does not.

        Experts next to a shared expert are a sum too, and neither mixes tokens.
        """
        end = self.site.branches[0]
        while op_name(end) in CARRIES and isinstance(end.args[0], Node):
            end = end.args[0]
        if op_name(end) != "add" or len(end.args) != 2:
            return False
        left, right = end.args
        flow = self.flow
        if not (isinstance(left, Node) and isinstance(right, Node) and {left, right} <= flow.hot):
            return False
        if shape(left) != shape(right) or flow.depends(left, right) or flow.depends(right, left):
            return False
        return self._mixes_tokens(left) != self._mixes_tokens(right)

    def _mixes_tokens(self, end: Node) -> bool:
        flow = self.flow
        for node in flow.members(flow.ancestors[end] & self.region):
            hot = [n for n in flow.inputs[node] if n in flow.hot]
            is_product = op_name(node) in MATMULS and not flow.bit(node) & flow.matmuls
            if op_name(node) == "scaled_dot_product_attention" or (is_product and len(hot) > 1):
                return True
        return False


def _holds_norm(nodes: Iterable[Node]) -> bool:
    return any(
        op_name(n) in NORMS | NORM_PARTS or (op_name(n) == "pow" and len(n.args) > 1 and n.args[1] == -0.5)
        for n in nodes
    )


def _scales(flow: Dataflow, node: Node) -> bool:
    """Return whether `node` multiplies by something that does not come from the stream."""
    return op_name(node) in SCALES and is_tensor(node) and len([n for n in flow.inputs[node] if n in flow.hot]) == 1


def _normed_after(stream: ResidualStream, site: Site) -> bool:
    """Return whether a norm stands on the carry of this site or of the next."""
    position = next(i for i, s in enumerate(stream.sites) if s is site)
    return any(_holds_norm(s.chain) for s in stream.sites[position : position + 2])
