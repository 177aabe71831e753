"""Operations that rearrange dimensions: views, transpositions, copies, and those to which positions matter: fft, diff, tril."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE, Conflict, Expression


@rule(aten.view, aten.reshape, aten._unsafe_view, aten._reshape_copy)
def reshape(op: Op) -> Typed:
    """A view is a claim that two products are equal."""
    axes = _viewed(op, op["self"].axes, op.shape)
    if "size" in op.arguments or "shape" in op.arguments:
        op.literal("size" if "size" in op.arguments else "shape", list(axes))
    return Typed(axes, op["self"].values)


@rule(aten.flatten, aten.ravel)
def flatten(op: Op) -> Typed:
    """Views whose shape needs no literal."""
    return Typed(_viewed(op, op["self"].axes, op.shape), op["self"].values)


@rule(aten.view_as, aten.reshape_as)
def view_as(op: Op) -> Typed:
    """A view whose shape is another tensor's: another shape than that may be right once units are gone."""
    axes = _viewed(op, op["self"].axes, op.shape)
    if all(isinstance(size, int) for size in op.node.meta["val"].shape):
        op.literal("shape", list(axes), becomes=aten.reshape.default)
    else:
        for axis, other in zip(axes, op["other"].axes, strict=True):
            op.equal(axis, other)
    return Typed(axes, op["self"].values)


@rule(aten.unflatten)
def unflatten(op: Op) -> Typed:
    """One axis is a product of several."""
    axes = _viewed(op, op["self"].axes, op.shape)
    start = op.dim("dim", len(op["self"].axes))
    op.literal("sizes", list(axes[start : start + len(op["sizes"])]))
    return Typed(axes, op["self"].values)


def _viewed(op: Op, axes: Sequence[Expression], shape: tuple[int, ...]) -> tuple[Expression, ...]:
    """The axes of ``shape``: dimensions that kept their size are kept, others regroup within common boundaries.

    Where they have no common layout with what they are made of, that is frozen, and they can only be chosen from.
    """
    out: list[Expression] = []
    for block, sizes in _blocks(axes, shape):
        if len(block) == len(sizes) == 1:
            out += block
        else:
            fresh = op.fresh(sizes)
            if not op.equal(op.product(*block), op.product(*fresh)):
                op.choose(range(len(out), len(out) + len(fresh)))
            out += fresh
    return tuple(out)


def _blocks(axes: Sequence[Expression], shape: tuple[int, ...]) -> Iterator[tuple[list[Expression], list[int]]]:
    """Pair runs of input axes with runs of output sizes that hold as many elements, shortest first."""
    left, right = list(axes), list(shape)
    while left or right:
        block, sizes = left[:1], right[:1]
        del left[:1], right[:1]
        while (here := prod(map(Op.length, block))) != (there := prod(sizes)):
            taken = (left, block) if here < there else (right, sizes)
            taken[1].append(taken[0].pop(0))  # type: ignore[arg-type]
        yield block, sizes


@rule(aten.permute)
def permute(op: Op) -> Typed:
    """Dimensions in another order."""
    source = op["self"]
    return Typed(tuple(source.axes[dim] for dim in op.dims("dims", len(source.axes))), source.values)


@rule(aten.transpose, aten.swapaxes, aten.swapdims)
def transpose(op: Op) -> Typed:
    """Two dimensions swapped."""
    axes = list(op["self"].axes)
    names = ("dim0", "dim1") if "dim0" in op.arguments else ("axis0", "axis1")
    one, other = (op.dim(name, len(axes)) for name in names)
    axes[one], axes[other] = axes[other], axes[one]
    return Typed(tuple(axes), op["self"].values)


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint, aten.mH, aten.matrix_H)
def turned(op: Op) -> Typed:
    """A matrix (or the last two dimensions) transposed; ``T`` reverses all."""
    axes = op["self"].axes
    if op.name in ("t", "numpy_T"):
        return Typed(axes[::-1])
    return Typed((*axes[:-2], axes[-1], axes[-2]))


@rule(aten.movedim, aten.moveaxis)
def movedim(op: Op) -> Typed:
    """Some dimensions taken out and put elsewhere, the rest in order."""
    source = op["self"]
    rank = len(source.axes)
    moved = dict(zip(op.dims("destination", rank), op.dims("source", rank), strict=True))
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    order = [moved[place] if place in moved else next(rest) for place in range(rank)]
    return Typed(tuple(source.axes[dim] for dim in order), source.values)


@rule(aten.unsqueeze)
def unsqueeze(op: Op) -> Typed:
    """A new dimension of size one."""
    axes = list(op["self"].axes)
    axes.insert(op.dim("dim", len(axes) + 1), ONE)
    return Typed(tuple(axes), op["self"].values)


@rule(aten.squeeze)
def squeeze(op: Op) -> Typed:
    """Dimensions of size one dropped: those that are one now, not those that shrink to it."""
    source = op["self"]
    dims = [dim for dim in op.dims("dim", len(source.axes)) if op.length(source.axes[dim]) == 1]
    op.constant("dim", dims, becomes=aten.squeeze.dims)
    return Typed(tuple(axis for dim, axis in enumerate(source.axes) if dim not in dims), source.values)


@rule(aten.expand, aten.broadcast_to, aten.expand_as)
def expand(op: Op) -> Typed:
    """Sizes of one, and new leading dimensions, become copies: a factor of their own, or the other tensor's."""
    axes = op.broadcast(op.tensors, op.shape)
    if "size" in op.arguments:
        op.literal("size", list(axes))
    return Typed(axes, op["self"].values)


@rule(aten.repeat, aten.tile)
def repeat(op: Op) -> Typed:
    """Copies one after the other: ``times · axis``."""
    source = op["self"]
    name = "repeats" if "repeats" in op.arguments else "dims"
    axes = [ONE] * (len(op.shape) - len(source.axes)) + list(source.axes)
    times = op.fresh(size // op.length(axis) for size, axis in zip(op.shape, axes, strict=True))
    op.literal(name, list(times[len(times) - len(op[name]) :]))
    return Typed(tuple(op.product(time, axis) for time, axis in zip(times, axes, strict=True)))


@rule(aten.repeat_interleave)
def repeat_interleave(op: Op) -> Typed:
    """Copies of each index side by side: ``axis · times``."""
    if isinstance(op["repeats"], Typed) or op.get("dim") is None:
        raise Conflict("the number of repetitions depends on data, or on every dimension")
    axes = list(op["self"].axes)
    dim = op.dim("dim", len(axes))
    (times,) = op.fresh((op["repeats"],))
    op.literal("repeats", times)
    if op.get("output_size") is not None:
        op.literal("output_size", op.product(axes[dim], times))
    axes[dim] = op.product(axes[dim], times)
    return Typed(tuple(axes))


@rule(aten.diff)
def diff(op: Op) -> Typed:
    """Neighbours subtracted, of what may be longer than the operand."""
    out = reordered(op)
    for axis in [axis for operand in op.tensors[1:] for axis in (*operand.axes, *out.axes)]:
        op.pin(axis, "put before or after")
    return out


@rule(aten.roll)
def roll(op: Op) -> Typed:
    """The end of an axis comes before its beginning: ``a + b`` becomes ``b + a``."""
    source, dims = op["self"], op["dims"]
    if not dims or any(op.frozen(source.axes[dim]) or abs(by) >= op.shape[dim] for dim, by in zip(dims, op["shifts"], strict=True)):
        return reordered(op)
    axes, moved = list(source.axes), []
    for dim, by in zip(dims, op["shifts"], strict=True):
        first, last = op.cut(axes[dim], -by % op.shape[dim])
        axes[dim] = (*last, *first)
        moved.append(first if by < 0 else last)
    op.literal("shifts", moved)
    return Typed(tuple(axes))


MOVING = {
    "flip": "flip puts each position in the place of the one opposite: a unit cannot go without that",
    "roll": "roll moves positions over the end: which units meet changes with how many there are",
    "tril": "tril keeps or drops an entry by its position",
    "triu": "triu keeps or drops an entry by its position",
    "cumprod": "cumprod multiplies all that come before: a zero is not nothing",
    "diff": "diff subtracts neighbours: which are neighbours changes",
}
"""Why the units along a dimension cannot go, where an operation depends on their positions."""


@rule(
    aten.flip, aten.tril, aten.triu, aten.cumprod, aten.rot90, aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft,
    aten.fft_hfft, aten.fft_ihfft, aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_fftn, aten.fft_ifftn,
    aten.fft_rfftn, aten.fft_irfftn, aten.fft_fftshift, aten.fft_ifftshift,
)  # fmt: skip
def reordered(op: Op) -> Typed:
    """Positions along some dimensions matter, so those are frozen; the others pass."""
    source = op["self"]
    dims = {len(source.axes) - 1, len(source.axes) - 2} if op.name in ("tril", "triu") else _moving(op, source)
    for dim in dims:
        op.pin(source.axes[dim], MOVING.get(op.name, f"{op.name}: every position depends on which the others are"))
    return Typed(tuple(op.pinned(op.shape[d], "reordered") if d in dims else a for d, a in enumerate(source.axes)))


def _moving(op: Op, source: Typed) -> set[int]:
    rank = len(source.axes)
    return set(op.dims("dims" if "dims" in op.arguments else "dim", rank))


@rule(aten.diagonal)
def diagonal(op: Op) -> Typed:
    """Two dimensions that are one axis, which comes last; beside the main diagonal positions matter."""
    axes = list(op["self"].axes)
    one, other = (axes[op.dim(name, len(axes))] for name in ("dim1", "dim2"))
    rest = [axis for dim, axis in enumerate(axes) if dim not in (op.dim("dim1", len(axes)), op.dim("dim2", len(axes)))]
    if op["offset"] == 0 and op.length(one) == op.length(other):
        op.equal(one, other)
        return Typed((*rest, one))
    for axis in (one, other):
        op.pin(axis, "a diagonal of it")
    return Typed((*rest, op.pinned(op.shape[-1], "a diagonal")))


@rule(aten.diag_embed)
def diag_embed(op: Op) -> Typed:
    """The last axis becomes two dimensions, zero but on the diagonal; beside the main one positions matter."""
    *axes, axis = op["self"].axes
    places = sorted(op.dim(name, len(op.shape)) for name in ("dim1", "dim2"))
    if op["offset"]:
        op.pin(axis, "put beside a diagonal")
        axis = op.pinned(op.shape[places[0]], "a diagonal")
    for place in places:
        axes.insert(place, axis)
    return Typed(tuple(axes))


@rule(aten.as_strided)
def as_strided(op: Op) -> Typed:
    """Windows, which may overlap, over dimensions that are neighbours in memory; the others pass. A step is a product of sizes."""
    given = op.node.args[0].meta["val"]  # type: ignore[union-attr]
    order, places = _descending(given.stride()), _descending(op["stride"])
    source, strides = [op["self"].axes[dim] for dim in order], [given.stride(dim) for dim in order]
    mine = list(zip(map(op.length, source), strides, strict=True))
    theirs = [(op.shape[place], op["stride"][place]) for place in places]
    found = next(_passing(mine, theirs), None)
    dense = strides == [_inner(mine, place + 1) for place in range(len(mine))]
    if found is None or op.get("storage_offset") or not dense:
        raise Conflict("addresses memory, not dimensions")
    first, last, end = found
    for axis in source[first:last]:
        op.pin(axis, "windows over it")
    windows = [(op.pinned(size, "windows"), op.pinned(step // _inner(mine, last), "windows")) for size, step in theirs[first:end]]
    axes = [*source[:first], *(axis for axis, _ in windows), *source[last:]]
    steps = [source[place + 1 :] for place in range(len(source))]
    steps[first:last] = [[count, *source[last:]] for _, count in windows]
    back = [places.index(dim) for dim in range(len(places))]
    op.literal("size", [axes[place] for place in back])
    op.literal("stride", [op.product(*steps[place]) for place in back])
    return Typed(tuple(axes[place] for place in back))


def _descending(strides: Sequence[int]) -> list[int]:
    """Dimensions as they lie in memory, outermost first."""
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _inner(mine: Sequence[tuple[int, int]], last: int) -> int:
    """How far apart in memory the positions of the dimension before ``last`` lie."""
    return prod(size for size, _ in mine[last:])


def _passing(mine: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Which dimensions (sizes and steps) do not pass: of ``mine`` from, to, and of ``theirs`` to; fewest first. They read nothing
    but each other."""
    for passing in range(min(len(mine), len(theirs)), -1, -1):
        for first in range(passing, -1, -1):
            last, end = len(mine) - passing + first, len(theirs) - passing + first
            inner, windows = _inner(mine, last), theirs[first:end]
            reach = sum((size - 1) * step for size, step in windows) + inner
            within = reach <= inner * prod(size for size, _ in mine[first:last])
            same = mine[:first] == theirs[:first] and mine[last:] == theirs[end:]
            if same and within and not any(step % inner for _, step in windows):
                yield first, last, end


@rule(aten.unfold)
def unfold(op: Op) -> Typed:
    """Sliding windows along one dimension."""
    axes = list(op["self"].axes)
    dim = op.dim("dimension", len(axes))
    op.pin(axes[dim], "sliding windows over it")
    axes[dim] = op.pinned(op.shape[dim], "windows")
    return Typed((*axes, op.pinned(op.shape[-1], "window")))


@rule(aten.view_as_complex)
def view_as_complex(op: Op) -> Typed:
    """The last dimension, real and imaginary part, is no longer one."""
    op.pin(op["self"].axes[-1], "real and imaginary part")
    return Typed(op["self"].axes[:-1])


@rule(aten.view_as_real)
def view_as_real(op: Op) -> Typed:
    """Real and imaginary part become a dimension."""
    return Typed((*op["self"].axes, op.pinned(2, "real and imaginary part")))
