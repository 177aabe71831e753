"""A traced graph, tensors and inputs in, outputs out: an interpreter that reads each weight when it is needed and no earlier.

The same walk serves the reference computations (double precision, masks at the contractions) and forward-only scoring, where
tensors may lie in files or be spread over ranks: then all batches go abreast, and a weight is held from its first use to its last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from graphprune.calls import is_check, operation
from graphprune.disk import OnDisk
from graphprune.ranks import whole
from graphprune.trace import Trace

Edit = Callable[[fx.Node, fx.Node, Any], Any]
"""``edit(node, operand, value)``: what ``node`` sees in place of its operand's value."""

See = Callable[[fx.Node, Any], None]
"""``see(node, value)``: looks at the value of every node as it appears."""

Calls = dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments of each node, literal dtypes and devices replaced, for all walks that are alike in this."""

STRETCH = 64 << 20
"""Bytes of weights that are held at a time where they come from elsewhere; a larger one is held alone."""

CPU = torch.device("cpu")

TYPELESS = frozenset({fx.Node, int, float, bool, str, type(None)})
"""Arguments that say nothing of a dtype or a device; by far the most do."""

RANDOM = ("rand", "randn", "rand_like", "randn_like", "normal", "uniform", "bernoulli", "exponential")
DRAWN = 0.5
"""What takes the place of every random number where computations of different sizes are compared in another precision."""


def tensors_of(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """The model's tensors under the names the trace gives them. Nothing is copied."""
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {t.name: trace.constants[t.name] if t.kind == "constant" else owned[t.name] for t in trace.tensors.values()}


@torch.no_grad()
def execute(
    trace: Trace,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Any],
    *,
    graph: fx.Graph | None = None,
    dtype: torch.dtype | None = None,
    edit: Edit | None = None,
    see: See | None = None,
) -> Any:
    """Run ``graph`` (the trace's own unless given) on flat ``inputs``; returns the output node's structure of values.

    ``dtype`` replaces every floating-point dtype on the way, literal ones included. Values are dropped after their last use.
    """
    return execute_all(trace, tensors, [inputs], graph=graph, dtype=dtype, edit=edit, see=see)[0]


@torch.no_grad()
def execute_all(
    trace: Trace,
    tensors: Mapping[str, Tensor],
    batches: Sequence[Sequence[Any]],
    *,
    graph: fx.Graph | None = None,
    dtype: torch.dtype | None = None,
    edit: Edit | None = None,
    see: See | None = None,
) -> list[Any]:
    """``execute`` on several inputs side by side: each weight is read, and brought to ``dtype``, once for all of them."""
    calls: Calls = {}
    walks = [Walk(trace, tensors, dict(zip(trace.inputs, flat, strict=True)), dtype, edit, calls) for flat in batches]
    nodes = list((graph or trace.graph).nodes)
    dying = last_uses(nodes)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        for node in nodes:
            if node.op == "output":
                return [fx.map_arg(node.args[0], walk.fetch) for walk in walks]
            if len(walks) > 1:
                _share_weights(node, walks)
            for walk in walks:
                walk.advance(node, dying)
                if see is not None and node.op == "call_function":
                    see(node, walk.values.get(node))
    finally:
        torch.set_default_dtype(previous)
    raise AssertionError("a graph without an output node")


def _share_weights(node: fx.Node, walks: Sequence[Walk]) -> None:
    """What the first walk reads of the model for a node, the others need not read again."""
    for operand in node.all_input_nodes:
        trace = walks[0].trace
        if operand.op == "placeholder" and operand.name in trace.tensors and operand.name not in trace.lent:
            value = walks[0].fetch(operand)
            for walk in walks[1:]:
                walk.values[operand] = value


class Walk:
    """One run of the graph: computes node after node on demand and holds ``values`` until somebody drops them."""

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        edit: Edit | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.trace, self.tensors, self.inputs, self.dtype, self.edit = trace, tensors, inputs, dtype, edit
        self.values: dict[fx.Node, Any] = {}
        self.calls: Calls = {} if calls is None else calls

    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node.name in self.inputs:
            self.values[node] = self.own(node, self.inputs[node.name])
        elif node.op == "call_function" and not is_check(node):
            self.values[node] = self.call(node)

    def advance(self, node: fx.Node, dying: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        """Compute a node, then drop what nobody asks for after it, as ``last_uses`` has it."""
        self.step(node)
        for dead in dying[node]:
            self.values.pop(dead, None)

    def call(self, node: fx.Node) -> Any:
        def fetch(operand: fx.Node) -> Any:
            value = self.fetch(operand)
            return value if self.edit is None else self.edit(node, operand, value)

        if node not in self.calls:
            self.calls[node] = _retyped((node.args, node.kwargs), self.dtype)
        args, kwargs = fx.map_arg(self.calls[node], fetch)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        return value.fill_(DRAWN) if self.dtype is not None and is_drawn(node) else value

    def fetch(self, node: fx.Node) -> Any:
        """The value of a node; a weight is read the first time anything asks for it."""
        if node not in self.values:
            self.values[node] = self.own(node, whole(self.tensors[self.trace.tensors[node.name].name]))
        return self.values[node]

    def own(self, node: fx.Node, value: Any) -> Any:
        """A tensor of the model or of the caller as the graph gets it: a copy where the graph writes to it."""
        found = self.cast(value)
        return value.clone() if found is value and node.name in self.trace.lent and isinstance(value, Tensor) else found

    def cast(self, value: Any) -> Any:
        return value.to(_replaced(value.dtype, self.dtype)) if isinstance(value, Tensor) else value


def finish(walk: Walk, nodes: Iterable[fx.Node], dying: Mapping[fx.Node, Sequence[fx.Node]]) -> Any:
    """Compute the given nodes, values dropped as ``last_uses`` has it; what the graph returns, where they reach its output."""
    for node in nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], walk.fetch)
        walk.advance(node, dying)
    return None


def is_drawn(node: fx.Node) -> bool:
    """Whether a node's value is drawn at random, whatever its operands are."""
    return operation(node) in RANDOM


def _retyped(value: Any, dtype: torch.dtype | None) -> Any:
    """Literal real and complex dtypes replaced where one is given; what was traced without a device computes on the CPU."""
    if type(value) in TYPELESS:
        return value
    if isinstance(value, torch.dtype):
        return _replaced(value, dtype)
    if isinstance(value, torch.device):
        return CPU if value.type == "meta" else value
    if isinstance(value, tuple | list):
        return type(value)([_retyped(part, dtype) for part in value])
    if isinstance(value, dict):
        return {key: _retyped(part, dtype) for key, part in value.items()}
    return value


def _replaced(dtype: torch.dtype, by: torch.dtype | None) -> torch.dtype:
    """``by`` in place of a real dtype, complex numbers of its precision in place of a complex one."""
    if by is None or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return by.to_complex() if dtype.is_complex else by


def last_uses(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """For each node, the values nobody asks for after it."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in reversed(nodes):
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                dying[node].append(operand)
    return dying


# ── many batches, weights from elsewhere ─────────────────────────────────────────────────────────────────────────────


class Held(Mapping[str, Tensor]):
    """Tensors by name, each read or gathered when it is first asked for and kept until it is let go."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.now: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.now:
            self.now[name] = whole(self.tensors[name])
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def let_go(self, name: str) -> None:
        """Forget a tensor."""
        self.now.pop(name, None)


class Abreast:
    """A graph walked on several batches, stretch of nodes by stretch: a weight is read once for all of them.

    ``nodes`` are those that will be walked, in order: a value is dropped after its last use among them.
    """

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        batches: Sequence[Sequence[Any]],
        nodes: Sequence[fx.Node],
        edit: Edit | None = None,
    ) -> None:
        self.trace, self.tensors = trace, Held(tensors)
        calls: Calls = {}
        inputs = [dict(zip(trace.inputs, flat, strict=True)) for flat in batches]
        self.walks = [Walk(trace, self.tensors, own, edit=edit, calls=calls) for own in inputs]
        self.dying = last_uses(nodes)

    @torch.no_grad()
    def run(self, nodes: Sequence[fx.Node]) -> None:
        """Walk one stretch, batch after batch. Every rank asks for the same weights in the same order, whatever its batches."""
        for name in dict.fromkeys(name for node in nodes for name in self.weights(node)):
            self.tensors[name]
        for walk in self.walks:
            for node in nodes:
                walk.advance(node, self.dying)
        for name in [name for node in nodes for dead in self.dying[node] for name in self.named(dead)]:
            self.tensors.let_go(name)

    def weights(self, node: fx.Node) -> list[str]:
        """The tensors of the model that a node reads."""
        return [name for operand in node.all_input_nodes for name in self.named(operand)]

    def named(self, node: fx.Node) -> list[str]:
        """The tensor of the model that a placeholder stands for, if it does."""
        return [self.trace.tensors[node.name].name] if node.op == "placeholder" and node.name in self.trace.tensors else []

    def stretches(self, nodes: Sequence[fx.Node], limit: int | None = None) -> Iterator[list[fx.Node]]:
        """Runs of nodes that read at most ``limit`` bytes of weights, each ending where the least is alive; all at once where
        every weight is in memory anyway."""
        if type(self.tensors.tensors) is dict and not any(isinstance(t, OnDisk | DTensor) for t in self.tensors.tensors.values()):
            yield list(nodes)
            return
        limit = limit or STRETCH
        alive, sizes = self._alive(nodes), {t.name: prod(t.shape) * t.dtype.itemsize for t in self.trace.tensors.values()}
        bytes_read = [sum(sizes[name] for name in self.weights(node)) for node in nodes]
        start = held = 0
        for i, more in enumerate(bytes_read):
            while more and held and held + more > limit:
                first = next(place for place in range(start, i) if bytes_read[place])
                cut = min(range(first, i), key=lambda place: (alive[place], -place)) + 1
                yield list(nodes[start:cut])
                start, held = cut, sum(bytes_read[cut:i])
            held += more
        yield list(nodes[start:])

    def _alive(self, nodes: Sequence[fx.Node]) -> list[int]:
        """Elements of all values that are waiting for a use after each node."""
        alive, now = [], 0
        sizes = {node: _elements(node) for node in nodes if not self.named(node)}
        waited = {dead for dying in self.dying.values() for dead in dying}
        for node in nodes:
            now += sizes.get(node, 0) if node in waited else 0
            now -= sum(sizes.get(dead, 0) for dead in self.dying[node])
            alive.append(now)
        return alive


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return sum(int(part.numel()) for part in (value if isinstance(value, tuple | list) else [value]) if isinstance(part, Tensor))
