"""A form is a way to write the sites of a residual stream: what their parameters are and what the graph computes.

    stream forms   the state is n streams X [..., n, C]; a site reads pre @ X and leaves H @ X + outer(post, y)
    depth forms    the state is the list of earlier outputs [..., C]; a site reads a weighted sum and adds its own

A new form is a subclass of `StreamForm` or `DepthForm`, found by its name (`mhc_compile.kernels.forms`).
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT, Start

LIBRARY = torch.library.Library("mhc_forms", "DEF")
"""One op for each form but mHC's, under the form's name."""

State = Node | tuple[Node, ...]
"""The state at one place of a rewritten graph: the node of the n streams, or the nodes of the earlier outputs."""


NEXT_PRE = "mhc_next_pre"
"""Key in the `meta` of streams of the weights by which the next reader weighs them, where a convention defers them."""
ENTRY = "mhc_entry"
"""Key in the `meta` of the value with which the stream of a depth form begins."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a site."""

    shape: tuple[int, ...]
    start: Callable[[], Tensor]
    """Returns its values at the start, float32."""


class SiteWriter(Protocol):
    """One site of a graph that is being rewritten, as a form sees it (`mhc_compile.passes.widen`)."""

    parameters: list[Node]
    """The site's parameters, in the order of `Form.parameters`."""
    text: str
    """The specification as text, which ops carry."""
    read_state: State
    """The state where the branch first reads it."""
    carried_state: State
    """The state to which the branch is added."""
    index: int
    """The number of the site in its model, counted from 0."""
    count: int
    """How many sites the model has."""

    def compute(self, op: Any, *arguments: Any, ranks: Sequence[int]) -> list[Node]:
        """Call an op before all readers; return its results, of `ranks` dimensions after those of the tokens."""
        ...

    def read(self, op: Any, *arguments: Any) -> None:
        """Make the branch read `op(state, *arguments)`; a list of outputs is followed by the places of each."""
        ...

    def read_apart(self, op: Any, *arguments: Any) -> Node:
        """Make the branch read the first three rows of `op(state, *arguments)` `[4, ..., C]`; return the fourth.

        The query of the branch's attention is computed from the first row, its key from the second, all else from the
        third.
        """
        ...

    def mix_values(self, op: Any, *arguments: Any) -> None:
        """Make the branch's attention read `op([first values, own values], [0, 1], *arguments)` as its values."""
        ...

    def sum(self) -> Node:
        """Return the model's own sum."""
        ...

    def carried(self, op: Any, *arguments: Any) -> Node:
        """Return `op(carried_state, *arguments)`: the node that the branch reads, where it is the same."""
        ...

    def branch(self) -> Node:
        """Return the branch's output y."""
        ...

    def write(self, op: Any, *arguments: Any) -> Node:
        """Return `op(carried_state, y, *arguments)`."""
        ...

    def add(self, value: Node) -> Node:
        """Return `value + y`."""
        ...


class Form(ABC):
    """One way to write sites."""

    name: ClassVar[str]
    """By which specifications know it: an identifier."""
    later_attentions: ClassVar[bool] = False
    """Whether its sites are the attentions of a stream after the first one; all other adds stay as they are."""

    @abstractmethod
    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return the parameters of site `index` (counted from 0) of a stream of size `hidden` by name.

        Names and their order are the same for all sites; where the shape depends on `hidden`, the last dimension does.
        They start so that the residual network's function is kept;
        with `start.scratch` they may start otherwise.
        """

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return the parameters with which the exit of a stream of `sites` sites reads the state; none by default."""
        return {}

    @abstractmethod
    def enter(self, call: Callable[..., Node], entry: Node, spec: StreamSpec) -> State:
        """Return the state with which a stream begins; `call(op, *arguments)` inserts a node."""

    @abstractmethod
    def rewrite(self, site: SiteWriter) -> State:
        """Write a site; return the state after it."""

    @cached_property
    def op(self) -> torch._ops.OpOverload:
        """The op that a site calls; it decomposes into the form's own PyTorch, with autocast off."""
        names = tuple(self.parameters(StreamSpec(form=self.name), 0, 1, DEFAULT))
        LIBRARY.define(self._schema(names), tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._kernel(names), "CompositeImplicitAutograd")
        return getattr(torch.ops.mhc_forms, self.name).default

    @abstractmethod
    def _schema(self, names: Sequence[str]) -> str: ...

    @abstractmethod
    def _kernel(self, names: Sequence[str]) -> Callable[..., Any]: ...


class StreamForm(Form):
    """A form whose state is n streams: a subclass says what its parameters are and what a site's coefficients."""

    reads_streams: ClassVar[bool] = True
    """Whether the coefficients depend on the values of the streams, not on their shape alone."""

    @abstractmethod
    def coefficients(self, X: Tensor, spec: StreamSpec, **parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pre `[..., n]`, post `[..., n]` and H `[..., n, n]` of X `[..., n, C]`, in max(float32, X's dtype).

        The branch reads `pre @ X`; the next streams are `H @ X + outer(post, y)`.
        """

    def kernel(self, spec: StreamSpec, **fields: Any) -> Chain | None:  # noqa: ARG002
        """Return the fused chain for a site, whose other `fields` are given; None where no target generates any."""
        return None

    def enter(self, call: Callable[..., Node], entry: Node, spec: StreamSpec) -> State:
        """Return n equal streams."""
        return call(torch.ops.mhc.expand.default, entry, spec.streams)

    def rewrite(self, site: SiteWriter) -> State:
        """Write aggregate, branch, distribute with the coefficients."""
        arguments = (site.read_state, *site.parameters, site.text)
        pre, post, mixing = site.compute(self.op, *arguments, ranks=(1, 1, 2))
        site.read(torch.ops.mhc.aggregate.default, pre)
        return site.write(torch.ops.mhc.distribute.default, post, mixing)

    def _schema(self, names: Sequence[str]) -> str:
        operands = "".join(f"Tensor {name}, " for name in names)
        return f"{self.name}(Tensor streams, {operands}str spec) -> (Tensor, Tensor, Tensor)"

    def _kernel(self, names: Sequence[str]) -> Callable[..., Any]:
        def kernel(streams: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            *values, text = arguments
            with without_autocast(streams):
                return self.coefficients(streams, StreamSpec.parse(text), **dict(zip(names, values, strict=True)))

        return kernel


class DepthForm(Form):
    """A form whose state is the list of earlier outputs: a subclass says its parameters and what a site reads.

    An operation of the model between two sites (a norm of the stream) begins a new list with its result. What reads the
    stream outside all branches reads `total` of the list; the exit, where the form has a `head`, is read as a site is,
    with the head's parameters. `StreamSpec.streams` has no meaning.
    """

    @abstractmethod
    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:
        """Return what a branch reads, `[..., C]` in the outputs' dtype, from the earlier outputs, each `[..., C]`.

        `places` numbers the outputs: 0 is the stream's entry, k + 1 the output of site k. In a model whose stream
        begins anew, or that leaves layers out, they are not all there.
        """

    def weights(
        self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor  # noqa: ARG002
    ) -> Tensor | None:  # fmt: skip
        """Return by how much each of the N outputs counts in what is read, which probes record.

        `[..., N]`, or `[N]` where it is the same for all tokens; None in a form that does not tell.
        """
        return None

    @property
    def tells_weights(self) -> bool:
        """Whether the form overrides `weights`."""
        return type(self).weights is not DepthForm.weights

    def kernel(self, **fields: Any) -> KernelSpec | None:  # noqa: ARG002
        """Return the fused `read`, whose `fields` are given; None where no target generates any.

        Its inputs are the outputs, then the parameters in their order; its first output is what the branch reads.
        """
        return None

    def total(self, call: Callable[..., Node], outputs: tuple[Node, ...]) -> Node:
        """Return the stream itself; `call(op, *arguments)` inserts a node."""
        return functools.reduce(lambda total, output: call(operator.add, total, output), outputs)

    def enter(self, call: Callable[..., Node], entry: Node, spec: StreamSpec) -> State:  # noqa: ARG002
        """Return the entry alone."""
        return (entry,)

    def rewrite(self, site: SiteWriter) -> State:
        """Read earlier outputs; append the branch's."""
        site.read(self.op, *site.parameters, site.text)
        assert isinstance(site.carried_state, tuple)
        return (*site.carried_state, site.branch())

    def _schema(self, names: Sequence[str]) -> str:
        operands = "".join(f"Tensor {name}, " for name in names)
        return f"{self.name}(Tensor[] outputs, int[] places, {operands}str spec) -> Tensor"

    def _kernel(self, names: Sequence[str]) -> Callable[..., Any]:
        def kernel(outputs: Sequence[Tensor], places: Sequence[int], *arguments: Any) -> Tensor:
            *values, text = arguments
            with without_autocast(outputs[0]):
                parameters = dict(zip(names, values, strict=True))
                return self.read(outputs, places, StreamSpec.parse(text), **parameters)

        return kernel
