"""Tensors out of nothing: constant fillings have free axes, numbered ones are frozen."""

from __future__ import annotations

from graphprune.rules.table import Op, Typed, aten, rule


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided, aten.scalar_tensor,
)  # fmt: skip
def filled(op: Op) -> Typed:
    """The same constant everywhere: any unit can go, the sizes are literals."""
    axes = op.fresh(op.shape)
    if op.shape:
        op.literal("size", list(axes))
    return Typed(axes)


NUMBERED = (aten.arange, aten.linspace, aten.eye, aten.logspace, aten.tril_indices, aten.triu_indices)
"""Operations that give every position a value of its own."""


@rule(*NUMBERED)
def numbered(op: Op) -> Typed:
    """Every position has its own value."""
    return Typed(tuple(op.pinned(size, "numbered positions") for size in op.shape))
