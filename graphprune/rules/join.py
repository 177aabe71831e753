"""Concatenation and its inverses: an axis is the sum of its segments."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE, Expression


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(op: Op) -> Typed:
    """Segments in order along one dimension; the other dimensions are equal."""
    return _joined(op, op.dim("dim" if "dim" in op.arguments else "axis", len(op.shape)))


@rule(aten.hstack, aten.vstack)
def stack_along(op: Op) -> Typed:
    """Concatenation along the columns or the rows; of vectors, ``hstack`` along the only dimension."""
    if op.name == "vstack":
        return _joined(op, 0)
    return _joined(op, min(1, len(op.shape) - 1))


def _joined(op: Op, dim: int) -> Typed:
    parts = [Typed((ONE,) * (len(op.shape) - len(part.axes)) + part.axes) for part in op["tensors"] if part.axes != ((),)]
    whole = tuple(segment for part in parts for segment in part.axes[dim])
    if all(op.frozen(part.axes[dim]) for part in parts):
        whole = op.still(op.shape[dim], *(part.axes[dim] for part in parts))
    rows = [Typed((*part.axes[:dim], *part.axes[dim + 1 :])) for part in parts]
    others = op.broadcast(rows, (*op.shape[:dim], *op.shape[dim + 1 :]))
    return Typed((*others[:dim], whole, *others[dim:]))


@rule(aten.stack)
def stack(op: Op) -> Typed:
    """A new dimension whose positions are the operands."""
    dim = op.dim("dim", len(op.shape))
    axes = op.broadcast(op["tensors"], (*op.shape[:dim], *op.shape[dim + 1 :]))
    return Typed((*axes[:dim], op.pinned(op.shape[dim], "one position for each stacked tensor"), *axes[dim:]))


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_chunk, aten.unsafe_split)
def split(op: Op) -> tuple[Typed, ...]:
    """Cut an axis into consecutive segments."""
    source = op["self"]
    dim = op.dim("dim", len(source.axes))
    parts = _segments(op, source.axes[dim], [shape[dim] for shape in op.shapes])
    op.literal("split_sizes", parts, becomes=aten.split_with_sizes.default)
    return tuple(Typed((*source.axes[:dim], part, *source.axes[dim + 1 :])) for part in parts)


def _segments(op: Op, axis: Expression, sizes: Sequence[int]) -> list[Expression]:
    if op.frozen(axis):
        return [op.still(size, axis) for size in sizes]
    parts = []
    for size in sizes:
        part, axis = op.cut(axis, size)
        parts.append(part)
    return parts


@rule(aten.slice, aten.narrow)
def slice_(op: Op) -> Typed:
    """A part of an axis; with a step, one position of every group of ``step``."""
    axes = list(op["self"].axes)
    dim = op.dim("dim", len(axes))
    axis, size = axes[dim], op.shape[dim]
    start = _from_front(op.get("start", 0), op.length(axis))
    step = int(op.get("step", 1))
    if size == op.length(axis):
        _positions(op, axis, axis)
        return Typed(tuple(axes), op["self"].values)
    if op.is_open(dim):
        op.pin(axis, "sliced where data says")
        axes[dim] = op.pinned(size, "sliced where data says")
    elif op.frozen(axis):
        axes[dim] = op.still(size, axis)
    elif step > 1:
        axes[dim] = _strided(op, axis, start, step, size)
    else:
        rest = op.cut(axis, start)[1] if start else axis
        axes[dim] = op.cut(rest, size)[0]
        _positions(op, axis, axes[dim])
    return Typed(tuple(axes), op["self"].values)


def _positions(op: Op, axis: Expression, part: Expression) -> None:
    if op.get("start") is not None:
        op.position("start", axis)
    if op.get("end") is not None:
        op.position("end", axis)
    if "length" in op.arguments:
        op.literal("length", part)


def _from_front(position: int, size: int) -> int:
    return max(0, position + size) if position < 0 else min(position, size)


def _strided(op: Op, axis: Expression, start: int, step: int, size: int) -> Expression:
    """One position of each of the first groups of ``step``: a group can go."""
    if start >= step or op.length(axis) < size * step:
        op.pin(axis, f"sliced in steps of {step}")
        return op.still(size, axis)
    (group,) = op.fresh((size,))
    op.equal(op.cut(axis, size * step)[0], op.product(group, op.pinned(step, f"sliced in steps of {step}")))
    op.constant("start", start)
    if op.get("end") is not None:
        op.position("end", axis)
    return group


@rule(aten.select)
def select(op: Op) -> Typed:
    """One position by its number: it stays, those before and after it may go."""
    source = op["self"]
    dim = op.dim("dim", len(source.axes))
    axis = source.axes[dim]
    if not op.frozen(axis):
        op.cut(op.cut(axis, _from_front(op["index"], op.length(axis)))[1], 1)
        op.position("index", axis)
    return Typed((*source.axes[:dim], *source.axes[dim + 1 :]), source.values)


@rule(aten.unbind)
def unbind(op: Op) -> tuple[Typed, ...]:
    """Every position by its number: that axis is frozen."""
    source = op["self"]
    dim = op.dim("dim", len(source.axes))
    op.pin(source.axes[dim], "taken apart")
    return tuple(Typed((*source.axes[:dim], *source.axes[dim + 1 :]), source.values) for _ in op.shapes)
