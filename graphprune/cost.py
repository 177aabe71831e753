"""Axes and sizes in, exact costs out: every cost is a polynomial in factor sizes, so asking costs microseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

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
    inner: dict[object, int] = {}
    for use in axes.uses:
        if use.role == "contracted" and use.node not in inner:
            inner[use.node] = use.axis.resized(keep)
    return sum(2 * width * _elements(axes.nodes[node], keep) for node, width in inner.items())  # type: ignore[index]


def _elements(dims: Iterable[Axis], keep: Mapping[Factor, range]) -> int:
    return prod(axis.resized(keep) for axis in dims if isinstance(axis, Axis))
