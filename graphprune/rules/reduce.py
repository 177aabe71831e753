"""Reductions and scans: a sum contracts its axis exactly, a mean or a maximum normalises over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.rules.pointwise import pointwise
from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE, Expression

NONE, MEAN = 0, 1
"""How torch numbers what a loss does with its elements."""


def _reduced(op: Op, source: Typed, dims: Sequence[int]) -> tuple[Expression, ...]:
    keep = op.get("keepdim", False)
    return tuple(ONE if dim in dims else axis for dim, axis in enumerate(source.axes) if keep or dim not in dims)


@rule(aten.sum, aten.nansum, aten.linalg_vector_norm, aten.linalg_norm, aten.norm, aten.frobenius_norm)
def total(op: Op) -> Typed:
    """A sum (a norm is one of powers) is a contraction with ones."""
    source = op["self"]
    dims = op.dims("dim", len(source.axes))
    powers = [op.get(name, 2) for name in ("ord", "p")]
    for dim in dims:
        op.use(source, dim, "contracted")
        if any(not isinstance(power, int | float) or power < 0 for power in powers):
            op.renormalise(source.axes[dim], "a norm that zeros count in")
    return Typed(_reduced(op, source, dims))


@rule(
    aten.mean, aten.var, aten.std, aten.amax, aten.amin, aten.prod, aten.logsumexp, aten.any, aten.all, aten.var_mean,
    aten.std_mean, aten.median, aten.mode, aten.nanmean, aten.aminmax,
)  # fmt: skip
def statistic(op: Op) -> Typed | tuple[Typed, ...]:
    """Anything else over an axis changes with the number or the choice of its units."""
    source = op["self"]
    dims = op.dims("dim", len(source.axes))
    for dim in dims:
        op.use(source, dim, "contracted")
        op.renormalise(source.axes[dim], f"{op.name} over it")
    out = Typed(_reduced(op, source, dims))
    if op.name in ("median", "mode") and len(op.shapes) == 2 and not isinstance(op.shapes[0], int):
        return out, Typed(out.axes, source.axes[dims[0]] if source.axes else None)
    return out if not op.shapes or isinstance(op.shapes[0], int) else tuple(out for _ in op.shapes)


@rule(aten.max, aten.min, aten.argmax, aten.argmin)
def extreme(op: Op) -> Typed | tuple[Typed, ...]:
    """The largest unit, or where it is: an index over the axis. With two tensors it is elementwise."""
    if isinstance(op.get("other"), Typed):
        return pointwise(op)
    source = op["self"]
    dims = op.dims("dim", len(source.axes))
    for dim in dims:
        op.renormalise(source.axes[dim], f"{op.name} over it")
    counted = [source.axes[dim] for dim in dims if op.length(source.axes[dim]) > 1]
    where = counted[0] if len(counted) == 1 else None
    for axis in counted if where is None and "arg" in op.name else ():
        op.pin(axis, "its places are counted across dimensions")
    axes = _reduced(op, source, dims)
    if op.shapes and not isinstance(op.shapes[0], int):
        return Typed(axes), Typed(axes, where)
    return Typed(axes, where if "arg" in op.name else None)


@rule(aten.cumsum, aten.logcumsumexp)
def running_total(op: Op) -> Typed:
    """Zeros add nothing to the sums behind them."""
    source = op["self"]
    if op.name != "cumsum":
        op.renormalise(source.axes[op.dim("dim", len(source.axes))], "scanned over it")
    op.use(source, op.dim("dim", len(source.axes)), "contracted")
    return Typed(source.axes)


@rule(aten.cummax, aten.cummin)
def running_extreme(op: Op) -> tuple[Typed, Typed]:
    """The largest unit so far, and where it is."""
    source = op["self"]
    axis = source.axes[op.dim("dim", len(source.axes))]
    op.renormalise(axis, f"{op.name} over it")
    return Typed(source.axes), Typed(source.axes, axis)


@rule(aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss)
def distance(op: Op) -> Typed:
    """Differences one by one, or the mean or the sum of all of them."""
    shapes = ([op.length(axis) for axis in operand.axes] for operand in op.tensors)
    axes = op.broadcast(op.tensors, tuple(torch.broadcast_shapes(*shapes)))  # type: ignore[no-untyped-call]
    if op["reduction"] == NONE:
        return Typed(axes)
    for operand in op.tensors:
        for dim in range(len(operand.axes)):
            op.use(operand, dim, "contracted", apart=True)
    for axis in axes if op["reduction"] == MEAN else ():
        op.renormalise(axis, "averaged over")
    return Typed(())


@rule(aten.cosine_similarity)
def cosine_similarity(op: Op) -> Typed:
    """Two norms and a product over one axis."""
    rank = len(op.shape) + 1
    dim = op.dim("dim", rank)
    summed = [(operand, dim - rank) for operand in op.tensors if len(operand.axes) >= rank - dim]
    shape = list(op.shape)
    shape.insert(dim, max(op.length(operand.axes[place]) for operand, place in summed))
    axes = op.broadcast(op.tensors, tuple(shape))
    for operand, place in summed:
        op.use(operand, place, "contracted", apart=True)
    return Typed(axes[:dim] + axes[dim + 1 :])
