"""Indexing by tensors: the indexed axis is the one the index values range over, where that is known; else it is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphprune.calls import PASSING, is_check, operation
from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE, Conflict, Expression

NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)


def _indexed(op: Op, axis: Expression, index: Typed, *, listed: bool = False) -> None:
    """``axis`` is looked up by the values of ``index``.

    Where a constant has them ``listed``, a smaller model would need others, and a named constant is the model's to change.
    """
    positions = op.positions(index)
    if positions is not None:
        op.equal(axis, positions)
    elif listed:
        op.pin(axis, "indexed by positions that a constant lists; slices or a transpose in its place can be followed")
    else:
        op.pin(axis, "indexed by data")


def _is_listed(source: Typed, index: Typed) -> bool:
    """Whether units of an activation are picked by a constant, not rows of a table."""
    return source.activation and not index.activation


@rule(aten.embedding)
def embedding(op: Op) -> Typed:
    """A row of the table for each index."""
    table, indices = op["weight"], op["indices"]
    _indexed(op, table.axes[0], indices)
    op.use(table, 1, "free")
    return Typed((*indices.axes, table.axes[1]))


@rule(aten.embedding_bag)
def embedding_bag(op: Op) -> tuple[Typed, ...]:
    """Rows of the table summed, averaged or compared bag by bag."""
    table = op["weight"]
    for axis in (table.axes[0], *(axis for operand in op.tensors if operand is not table for axis in operand.axes)):
        op.pin(axis, "indexed by data")
    op.use(table, 1, "free")
    others = (Typed(tuple(op.pinned(size, "bags") for size in shape)) for shape in op.shapes[1:])
    return Typed((op.pinned(op.shapes[0][0], "bags"), table.axes[1])), *others


@rule(aten.index_select)
def index_select(op: Op) -> Typed:
    """Positions along one axis by a vector of indices."""
    source, index = op["self"], op["index"]
    dim = op.dim("dim", len(source.axes))
    _indexed(op, source.axes[dim], index, listed=_is_listed(source, index))
    return Typed((*source.axes[:dim], index.axes[0] if index.axes else ONE, *source.axes[dim + 1 :]))


@rule(aten.take_along_dim)
def take_along_dim(op: Op) -> Typed:
    """One position along ``dim`` for each index; the other axes broadcast."""
    source, index = op["self"], op["indices"]
    if op.get("dim") is None:
        raise Conflict("indexes the flattened tensor")
    dim = op.dim("dim", len(source.axes))
    _indexed(op, source.axes[dim], index)
    rows = [Typed((*operand.axes[:dim], *operand.axes[dim + 1 :])) for operand in (source, index)]
    others = op.broadcast(rows, (*op.shape[:dim], *op.shape[dim + 1 :]))
    return Typed((*others[:dim], index.axes[dim], *others[dim:]))


@rule(aten.gather)
def gather(op: Op) -> Typed:
    """One position along ``dim`` for each index; along the other axes index and tensor go together."""
    source, index = op["self"], op["index"]
    dim = op.dim("dim", len(source.axes))
    _indexed(op, source.axes[dim], index)
    _aligned(op, source, index, dim)
    return Typed(index.axes)


def _aligned(op: Op, source: Typed, index: Typed, dim: int) -> None:
    """Along every axis but ``dim`` an index addresses its own position: the axes are equal, or the longer one is cut short."""
    for place, (axis, other) in enumerate(zip(source.axes, index.axes, strict=True)):
        if place != dim:
            _same(op, axis, other)


def _same(op: Op, axis: Expression, other: Expression) -> None:
    if op.length(axis) == op.length(other):
        op.equal(axis, other)
    else:
        op.pin(axis, "addressed in part")
        op.pin(other, "addressed in part")


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(op: Op) -> Typed:
    """The reverse of gather: values land on positions along ``dim``; a zero that is added changes nothing there."""
    source, index, written = op["self"], op["index"], op.get("src")
    dim = op.dim("dim", len(source.axes))
    _indexed(op, source.axes[dim], index)
    _aligned(op, source, index, dim)
    if isinstance(written, Typed):
        for axis, other in zip(index.axes, written.axes, strict=True):
            _same(op, axis, other)
    if op.name == "scatter_add":
        op.use(written, dim, "contracted")
    else:
        op.pin(index.axes[dim], "each of its positions is written")
    return Typed(source.axes)


@rule(aten.index_add, aten.index_copy, aten.index_fill)
def index_add(op: Op) -> Typed:
    """Rows added (or written) at the positions that a vector of indices names; a row of zeros adds nothing."""
    source, index, added = op["self"], op["index"], op.get("source")
    dim = op.dim("dim", len(source.axes))
    _indexed(op, source.axes[dim], index)
    if isinstance(added, Typed):
        for axis, other in zip((*source.axes[:dim], *index.axes, *source.axes[dim + 1 :]), added.axes, strict=True):
            op.equal(axis, other)
    if op.name == "index_add":
        op.use(added, dim, "contracted")
    else:
        op.pin(index.axes[0], "each of its positions is written")
    return Typed(source.axes)


@rule(aten.index, aten._unsafe_index)
def index(op: Op) -> Typed:
    """Advanced indexing: index tensors broadcast together; their place is the first indexed axis, if they are adjacent."""
    source, indices = op["self"], op["indices"]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    masks = [(place, index) for place, index in given if _is_mask(op, place)]
    if masks and len(given) > 1:
        raise Conflict("mixes masks with other indices")
    if masks:
        return _masked(op, source, *masks[0])
    return Typed(_advanced(op, source, indices, op.shape))


def _is_mask(op: Op, place: int) -> bool:
    index = op.node.args[1][place]  # type: ignore[index]
    return index.meta["val"].dtype in _BOOLEAN  # type: ignore[union-attr]


def _masked(op: Op, source: Typed, place: int, mask: Typed) -> Typed:
    """The dimensions a mask covers become one, of the places where it is true."""
    after = place + len(mask.axes)
    counted = _only_counted(op.node)
    listed = "indexed by a mask that is a constant; slices in its place can be followed"
    for axis, other in zip(mask.axes, source.axes[place:after], strict=True):
        op.equal(axis, other)
        if not counted:
            op.pin(axis, listed if _is_listed(source, mask) else "indexed by a mask")
    chosen = op.pinned(op.shape[place], "chosen by a mask")
    return Typed((*source.axes[:place], chosen, *source.axes[after:]))


def _only_counted(node: fx.Node) -> bool:
    """Whether how many elements a value has is all that is asked of it, and that by checks alone."""
    return all(is_check(user) or (isinstance(user.meta.get("val"), NUMBERS) and _only_counted(user)) for user in node.users)


def _advanced(op: Op, source: Typed, indices: Sequence[Typed | None], shape: Sequence[int]) -> tuple[Expression, ...]:
    places = [place for place, index in enumerate(indices) if index is not None]
    tensors = [index for index in indices if index is not None]
    for place, tensor in zip(places, tensors, strict=True):
        _indexed(op, source.axes[place], tensor, listed=_is_listed(source, tensor))
    rank = max(len(tensor.axes) for tensor in tensors)
    start = _start(places)
    chosen = op.broadcast(tensors, tuple(shape[start : start + rank]))
    rest = [axis for place, axis in enumerate(source.axes) if place not in places]
    return (*rest[:start], *chosen, *rest[start:])


def _start(places: Sequence[int]) -> int:
    """Where the chosen dimensions stand in what advanced indexing gives."""
    return places[0] if list(places) == list(range(places[0], places[-1] + 1)) else 0


@rule(aten.index_put, aten._unsafe_index_put)
def index_put(op: Op) -> Typed:
    """Values written at chosen places: what they are chosen on is frozen, along the other dimensions values and tensor agree."""
    source, written, indices = op["self"], op["values"], op["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    tensors = [indices[place] for place in places]
    masked = any(_is_mask(op, place) for place in places)
    if masked and len(places) > 1:
        raise Conflict("mixes masks with other indices")
    covered = range(places[0], places[0] + len(tensors[0].axes)) if masked else places
    for axis in (*(source.axes[place] for place in covered), *(axis for index in tensors for axis in index.axes)):
        op.pin(axis, "written at places that data chooses")
    rest = [axis for place, axis in enumerate(source.axes) if place not in covered]
    start = _start(covered)
    rank = 1 if masked else max(len(index.axes) for index in tensors)
    for place, axis in enumerate(written.axes, start=len(rest) + rank - len(written.axes)):
        if start <= place < start + rank:
            op.pin(axis, "written at places that data chooses")
        elif axis != ONE:
            op.equal(axis, rest[place if place < start else place - rank])
    return Typed(source.axes)


@rule(aten.masked_scatter)
def masked_scatter(op: Op) -> Typed:
    """Values written one after the other where a mask is true. Along last dimensions that the mask was stretched over they are
    whole rows, whose units can go."""
    source, mask, written = (op[name].axes for name in ("self", "mask", "source"))
    rows = _rows(op, source, written)
    for axis, other in zip(source[len(source) - rows :], written[len(written) - rows :], strict=True):
        op.equal(axis, other)
    for axis, other in zip(reversed(source[len(source) - rows :]), reversed(mask), strict=False):
        if other != ONE:
            op.equal(axis, other)
    others = (*source[: len(source) - rows], *mask[: max(0, len(mask) - rows)], *written[: len(written) - rows])
    for axis in others:
        op.pin(axis, "written at places that data chooses")
    return Typed(source)


def _rows(op: Op, source: Sequence[Expression], written: Sequence[Expression]) -> int:
    """How many last dimensions of a tensor and of what is written into it are written whole or not at all."""
    mask = _unstretched(op["mask"].source)
    for rows, (axis, other) in enumerate(zip(reversed(source), reversed(written), strict=False)):
        if op.length(axis) != op.length(other) or mask[::-1][rows : rows + 1] not in ((), (1,)):
            return rows
    return min(len(source), len(written))


def _unstretched(node: Any) -> tuple[Any, ...]:
    """The shape of a tensor before it was stretched."""
    while operation(node) in PASSING:
        node = node.args[0]
    node = node.args[0] if operation(node) in ("expand", "expand_as", "broadcast_to") else node
    return tuple(node.meta["val"].shape)


@rule(aten.slice_scatter, aten.select_scatter)
def slice_scatter(op: Op) -> Typed:
    """A part overwritten: that axis is frozen, the others are equal."""
    source, written = op["self"], op["src"]
    dim = op.dim("dim", len(source.axes))
    op.pin(source.axes[dim], "overwritten in part")
    if op.name == "slice_scatter":
        op.pin(written.axes[dim], "overwrites a part")
    rest = [axis for place, axis in enumerate(source.axes) if place != dim]
    other = [axis for place, axis in enumerate(written.axes) if place != dim or op.name == "select_scatter"]
    for axis, twin in zip(rest, other, strict=True):
        op.equal(axis, twin)
    return Typed(source.axes)


@rule(aten.one_hot)
def one_hot(op: Op) -> Typed:
    """A new axis with a position for each value."""
    source = op["self"]
    axis = op.pinned(op.shape[-1], "one position for each value of data")
    if source.values is not None and op.length(source.values) == op.shape[-1]:
        op.positions(source)
        axis = source.values
    op.literal("num_classes", axis)
    return Typed((*source.axes, axis))


@rule(aten.topk, aten.sort, aten.argsort, aten.kthvalue)
def ranked(op: Op) -> Typed | tuple[Typed, ...]:
    """Units compared with each other; the indices range over the axis."""
    source = op["self"]
    dim = op.dim("dim", len(source.axes))
    axis = source.axes[dim]
    op.renormalise(axis, f"{op.name} compares its units")
    op.use(source, dim, "ranked")
    first = op.shapes if op.name == "argsort" else op.shapes[0]
    if op.name != "topk":
        op.pin(axis, f"{op.name} gives units places by their values: one that is zero would still have a place")
    op.at_least(axis, op.get("k", 1))
    place = op.pinned(first[dim], "places of a ranking") if len(first) == len(source.axes) else None
    axes = (*source.axes[:dim], *([place] if place is not None else []), *source.axes[dim + 1 :])
    where = Typed(axes, axis)
    return where if op.name == "argsort" else (Typed(axes), where)


_BOOLEAN = (torch.bool, torch.uint8)
