"""Axes and sizes in, exact costs out: every cost is a polynomial in factor sizes, so asking costs microseconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from graphprune.axes import Axis, Factor
from graphprune.propagate import Axes

Sizes = Mapping[Factor, int]
"""How many units each shrinking factor keeps."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs: parameters (tied ones once), their bytes, multiply-adds × 2 of one traced forward."""

    parameters: int
    bytes: int
    flops: int


def parameters(axes: Axes, sizes: Sizes, names: Iterable[str] | None = None) -> int:
    """Number of parameters, of all of them or of those named, once factors have the given sizes."""
    keep = {factor: range(size) for factor, size in sizes.items()}
    chosen = axes.trace.parameters if names is None else names
    return sum(prod(axis.resized(keep) for axis in axes.tensors[name]) for name in chosen)


def cost(axes: Axes, sizes: Sizes) -> Cost:
    """Every cost at once."""
    keep = {factor: range(size) for factor, size in sizes.items()}
    count = weight = 0
    for name, traced in axes.trace.parameters.items():
        size = prod(axis.resized(keep) for axis in axes.tensors[name])
        count += size
        weight += size * traced.dtype.itemsize
    return Cost(count, weight, flops(axes, sizes))


def flops(axes: Axes, sizes: Sizes) -> int:
    """Two for each multiply-add of every contraction in the traced graph, at the traced batch and sequence sizes."""
    keep = {factor: range(size) for factor, size in sizes.items()}
    summed: dict[fx.Node, list[Axis]] = defaultdict(list)
    for use in axes.uses:
        if use.role == "contracted" and use.axis not in summed[use.node]:
            summed[use.node].append(use.axis)
    return sum(2 * _products(axes, node, inner, keep) for node, inner in summed.items())


def _products(axes: Axes, node: fx.Node, inner: Sequence[Axis], keep: Mapping[Factor, range]) -> int:
    """Multiply-adds of one contraction. Attention is two: queries · keys over the width, then weights · values over positions."""
    out = [axis.resized(keep) for axis in axes.nodes[node] if isinstance(axis, Axis)]
    widths = [axis.resized(keep) for axis in inner]
    if "scaled_dot_product" in str(node.target) and len(widths) == 2:
        width, positions = widths
        return prod(out[:-1]) * positions * (width + out[-1])
    return prod(out) * prod(widths)
