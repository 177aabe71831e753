"""Axes and sizes in, costs out: all but seconds are polynomials in factor sizes, exact, so asking costs microseconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

from torch import Tensor, fx

from graphprune.axes import Axis, Factor
from graphprune.calls import all_arguments, operation
from graphprune.latency import Latency
from graphprune.propagate import Axes

Sizes = Mapping[Factor, int]
"""How many units each shrinking factor keeps."""

Measure = Callable[[Sizes], float]
"""What a model costs once factors have the given sizes."""

RELAYING = ("expand", "unsqueeze", "view", "_unsafe_view", "reshape", "clone", "contiguous", "transpose", "permute", "t", "slice")
"""Operations that hand values on: what attends to a repeated key attends to the key."""


RECURRENT = tuple(f"{name}{ending}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for ending in ("", "_cell"))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs: parameters (tied ones once), their bytes, multiply-adds × 2 of one traced forward."""

    parameters: int
    bytes: int
    flops: int


COUNTED = tuple(measure.name for measure in fields(Cost))
"""What is counted tensor by tensor and product by product, so that the cost of a piece can be left out."""


class Polynomial:
    """A sum of products of axis sizes, each with a whole number in front. It remembers its last answer, so that asking for
    sizes which differ little costs little."""

    def __init__(self, terms: Iterable[tuple[int, tuple[Axis, ...]]]) -> None:
        self.terms = tuple(terms)
        self.having: dict[Factor, list[int]] = defaultdict(list)
        for place, (_, axes) in enumerate(self.terms):
            for factor in frozenset[Factor]().union(*(axis.factors for axis in axes)):
                self.having[factor].append(place)
        self.sizes: dict[Factor, int] = {}
        self.values = [weight * prod(axis.size for axis in axes) for weight, axes in self.terms]
        self.total = sum(self.values)

    def __call__(self, sizes: Sizes) -> int:
        changed = [factor for factor in {**self.sizes, **sizes} if self.sizes.get(factor) != sizes.get(factor)]
        keep = {factor: range(size) for factor, size in sizes.items()}
        known: dict[int, int] = {}
        for place in {place for factor in changed for place in self.having.get(factor, ())}:
            weight, axes = self.terms[place]
            known |= {id(axis): axis.resized(keep) for axis in axes if id(axis) not in known}
            value = weight * prod(known[id(axis)] for axis in axes)
            self.total += value - self.values[place]
            self.values[place] = value
        self.sizes = dict(sizes)
        return self.total


def parameters(axes: Axes, sizes: Sizes, names: Iterable[str] | None = None) -> int:
    """Number of parameters, of all of them or of those named, once factors have the given sizes."""
    return parameter_count(axes, names)(sizes)


def cost(axes: Axes, sizes: Sizes) -> Cost:
    """Parameters, bytes and FLOPs at once."""
    return Cost(parameters(axes, sizes), weight_bytes(axes)(sizes), flops(axes, sizes))


def flops(axes: Axes, sizes: Sizes) -> int:
    """Two for each multiply-add of every contraction in the traced graph, at the traced batch and sequence sizes."""
    return operations(axes)(sizes)


def parameter_count(axes: Axes, names: Iterable[str] | None = None) -> Polynomial:
    """The number of parameters."""
    chosen = axes.trace.parameters if names is None else names
    return Polynomial((1, axes.tensors[name]) for name in chosen)


def weight_bytes(axes: Axes) -> Polynomial:
    """The bytes of the parameters, in the dtypes that they were traced with."""
    return Polynomial((traced.dtype.itemsize, axes.tensors[name]) for name, traced in axes.trace.parameters.items())


def operations(axes: Axes) -> Polynomial:
    """FLOPs of one traced forward: of products, not of sums over a single operand (the mean in a norm)."""
    summed: dict[fx.Node, list[Axis]] = defaultdict(list)
    operands: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for use in axes.uses:
        if use.role == "contracted":
            operands[use.node].add(use.operand)
            summed[use.node] += [] if use.axis in summed[use.node] else [use.axis]
    products = (product for node, inner in summed.items() if len(operands[node]) > 1 for product in _products(axes, node, inner))
    return Polynomial((2, product) for product in products)


def _products(axes: Axes, node: fx.Node, inner: Sequence[Axis]) -> Iterator[tuple[Axis, ...]]:
    """Multiply-adds of one contraction. Attention is two: queries · keys over the width, then weights · values over positions.

    A convolution uses its weight once for each point it gives, transposed for each point it reads; a recurrent layer for each step.
    """
    out, given = tuple(axis for axis in axes.nodes[node] if isinstance(axis, Axis)), all_arguments(node)
    if operation(node).startswith("conv"):
        source, weight = axes.nodes[given["input"]], axes.nodes[given["weight"]]
        points = source if "transpose" in operation(node) or given.get("transposed") else out
        channels = len(source) - len(weight) + 1
        yield (*points[:channels], *points[channels + 1 :], *weight)
    elif operation(node) in RECURRENT:
        weights = [axes.nodes[tensor] for tensor in given.get("params") or (given["w_ih"], given["w_hh"])]
        yield from ((*axes.nodes[given["input"]][:-1], *weight) for weight in weights if len(weight) == 2)
    elif "scaled_dot_product" in str(node.target) and len(inner) == 2:
        width, positions = inner
        yield from ((*out[:-1], positions, width), (*out[:-1], positions, out[-1]))
    else:
        yield (*out, *inner)


def cache_bytes(axes: Axes) -> Polynomial:
    """The bytes of all keys and values of one traced forward, as a cache holds them: before they are repeated for their queries."""
    held = dict.fromkeys(_origin(node) for node in axes.trace.graph.nodes for node in _attended(axes, node))
    return Polynomial((node.meta["val"].dtype.itemsize, axes.nodes[node]) for node in held)


def _attended(axes: Axes, node: fx.Node) -> list[fx.Node]:
    """The keys and values that a node attends to: of a product of two activations, the second."""
    name = str(node.target)
    if "scaled_dot_product" in name:
        return [operand for operand in node.args[1:3] if isinstance(operand, fx.Node)]
    if not any(product in name for product in ("aten.matmul.", "aten.bmm.")):
        return []
    first, second = node.args[:2]
    return [second] if isinstance(second, fx.Node) and {first, second} <= axes.activations else []


def _origin(node: fx.Node) -> fx.Node:
    """The smallest value along the way that a value was handed on, the latest of them."""
    least = node
    while operation(node) in RELAYING:
        node = node.all_input_nodes[0]
        least = node if _elements(node) < _elements(least) else least
    return least


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, Tensor) else 0


MEASURES: Mapping[str, Callable[[Axes], Measure]] = {
    "parameters": parameter_count,
    "bytes": weight_bytes,
    "flops": operations,
    "kv": cache_bytes,
    "latency": Latency,
}
"""What a budget may be a share of, of the whole model."""
