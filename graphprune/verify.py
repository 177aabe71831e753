"""The original, what was kept and the smaller computation in, nothing or an error out: smaller model ≡ masked original.

For exact groups the original with the removed units zeroed where a contraction consumes them gives the same outputs, in double
precision. Where a norm spans the removed units there is no such original; then module and graph emitters must agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.axes import Axis, Keep
from graphprune.execute import Edit, execute
from graphprune.propagate import Axes
from graphprune.rewrite.graph import cut_all, resized_graph

TOLERANCE = 1e-8
"""Largest difference, relative to the largest output, between two double-precision runs of one function."""


def masks(axes: Axes, keep: Keep) -> Edit:
    """An edit that zeroes removed units of every operand a contraction sums over."""
    spots: dict[tuple[fx.Node, fx.Node], list[tuple[int, Tensor]]] = defaultdict(list)
    for use in axes.uses:
        if use.role == "contracted" and not use.axis.factors.isdisjoint(keep):
            whole = axes.nodes[use.operand][use.dim]
            spots[use.node, use.operand].append((use.dim, _mask(whole, use.axis, keep)))

    def edit(node: fx.Node, operand: fx.Node, value: Any) -> Any:
        for dim, mask in spots.get((node, operand), ()):
            value = value * mask.to(value).reshape([-1 if d == dim else 1 for d in range(value.ndim)])
        return value

    return edit


def _mask(whole: Axis, part: Axis, keep: Keep) -> Tensor:
    mask = torch.zeros(whole.size)
    mask[whole.kept({factor: units for factor, units in keep.items() if factor in part.factors})] = 1
    return mask


def masked_outputs(axes: Axes, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep) -> list[Tensor]:
    """What the original computes without the removed units, in double precision."""
    return leaves(execute(axes.trace, tensors, inputs, dtype=torch.float64, edit=masks(axes, keep)))


def smaller_outputs(axes: Axes, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep) -> list[Tensor]:
    """What the cut tensors compute, in double precision."""
    cut = cut_all(axes, tensors, keep)
    return leaves(execute(axes.trace, cut, inputs, graph=resized_graph(axes, keep), dtype=torch.float64))


def leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value; infinite where shapes differ or values are not finite."""
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=False)):
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        scale = b.double().abs().max().item() if b.numel() else 1.0
        worst = max(worst, gap / (scale or 1.0)) if gap == gap and scale < float("inf") else float("inf")
    return worst
