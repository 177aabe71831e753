"""Convolutions, pooling and everything else that works on trailing spatial dimensions."""

from __future__ import annotations

from collections.abc import Iterable

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import Expression


def _transposed(op: Op) -> bool:
    return "transpose" in op.name or bool(op.get("transposed", False))


def _pin_space(op: Op, axes: Iterable[Expression]) -> None:
    for axis in axes:
        op.pin(axis, "spatial extent")


@rule(
    aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
)  # fmt: skip
def convolution(op: Op) -> Typed:
    """Channels are ``g·i`` in, ``g·o`` out; the weight is ``(g·o, i)``, transposed ``(g·i, o)``. Points of space are each alone."""
    source, weight, bias = op["input"], op["weight"], op.get("bias")
    place = len(source.axes) - len(weight.axes) + 1
    group, inner, outer, channels = _channels(op, weight)
    op.equal(source.axes[place], op.product(group, inner))
    if bias is not None:
        op.equal(bias.axes[0], channels)
    _pin_space(op, weight.axes[2:])
    op.use(source, place, "contracted", inner)
    op.use(weight, 0 if _transposed(op) else 1, "contracted", inner)
    op.use(weight, 1 if _transposed(op) else 0, "free", outer)
    space = (_swept(op, weight, source, place + 1 + dim) for dim in range(len(weight.axes) - 2))
    return Typed((*source.axes[:place], channels, *space))


def _swept(op: Op, weight: Typed, source: Typed, dim: int) -> Expression:
    """What a spatial dimension becomes: itself where the kernel looks at one point at a time, else a frozen one."""
    axis, window = source.axes[dim], weight.axes[dim - len(source.axes)]
    strides = op["stride"]
    step = strides[dim - len(source.axes)] if len(strides) > 1 else (strides or [1])[0]
    if op.length(window) == step == 1 and op.length(axis) == op.shape[dim]:
        return axis
    _pin_space(op, (axis,))
    return op.pinned(op.shape[dim], "spatial extent")


def _channels(op: Op, weight: Typed) -> tuple[Expression, Expression, Expression, Expression]:
    """The group, input and output factors of a convolution weight, and the output channels they make."""
    groups = int(op.get("groups", 1))
    rows, columns = weight.axes[:2]
    group, per_group = op.fresh((groups, op.length(rows) // groups))
    op.equal(rows, op.product(group, per_group))
    op.literal("groups", group)
    inner, outer = (per_group, columns) if _transposed(op) else (columns, per_group)
    return group, inner, outer, op.product(group, outer)


def _over_space(op: Op, count: int) -> Typed | tuple[Typed, ...]:
    """Channels pass; the last ``count`` dimensions are spatial and frozen."""
    source = op.tensors[0]
    lead = source.axes[: len(source.axes) - count]
    for operand in op.tensors:
        _pin_space(op, operand.axes[len(operand.axes) - count :])
        for axis, other in zip(lead, operand.axes, strict=False):
            op.equal(axis, other)

    def out(shape: tuple[int, ...]) -> Typed:
        return Typed((*lead, *(op.pinned(size, "spatial extent") for size in shape[len(lead) :])))

    return out(op.shape) if not op.shapes or isinstance(op.shapes[0], int) else tuple(out(shape) for shape in op.shapes)


@rule(
    aten.avg_pool1d, aten.max_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d, aten.max_pool1d_with_indices,
    aten.upsample_linear1d, aten.upsample_nearest1d, aten._upsample_nearest_exact1d,
    aten.reflection_pad1d, aten.replication_pad1d,
)  # fmt: skip
def over_length(op: Op) -> Typed | tuple[Typed, ...]:
    """One spatial dimension."""
    return _over_space(op, 1)


@rule(
    aten.avg_pool2d, aten.max_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d_with_indices,
    aten._adaptive_avg_pool2d, aten.upsample_bilinear2d, aten.upsample_nearest2d, aten.upsample_bicubic2d,
    aten._upsample_nearest_exact2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
    aten.reflection_pad2d, aten.replication_pad2d, aten.max_unpool2d,
)  # fmt: skip
def over_area(op: Op) -> Typed | tuple[Typed, ...]:
    """Two spatial dimensions."""
    return _over_space(op, 2)


@rule(
    aten.avg_pool3d, aten.max_pool3d, aten.adaptive_avg_pool3d, aten.adaptive_max_pool3d, aten.max_pool3d_with_indices,
    aten.upsample_trilinear3d, aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.reflection_pad3d,
    aten.replication_pad3d, aten.max_unpool3d,
)  # fmt: skip
def over_volume(op: Op) -> Typed | tuple[Typed, ...]:
    """Three spatial dimensions."""
    return _over_space(op, 3)


@rule(aten.grid_sampler, aten.grid_sampler_2d)
def grid_sampler(op: Op) -> Typed:
    """Channels pass; positions come from data."""
    source, grid = op["input"], op["grid"]
    _pin_space(op, (*source.axes[2:], *grid.axes[1:]))
    op.equal(source.axes[0], grid.axes[0])
    return Typed((*source.axes[:2], *(op.pinned(size, "spatial extent") for size in op.shape[2:])))


@rule(aten.pixel_shuffle)
def pixel_shuffle(op: Op) -> Typed:
    """Channels are ``c · r · r``; the squares become pixels."""
    source, scale = op["self"], op["upscale_factor"]
    square = op.pinned(scale * scale, "pixels of a square")
    (channels,) = op.fresh((op.shape[-3],))
    op.equal(source.axes[-3], op.product(channels, square))
    _pin_space(op, source.axes[-2:])
    return Typed((*source.axes[:-3], channels, *(op.pinned(size, "spatial extent") for size in op.shape[-2:])))


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(op: Op) -> Typed:
    """Pixels of a square become channels ``c · r · r``."""
    source, scale = op["self"], op["downscale_factor"]
    square = op.pinned(scale * scale, "pixels of a square")
    channels = op.product(source.axes[-3], square)
    _pin_space(op, source.axes[-2:])
    return Typed((*source.axes[:-3], channels, *(op.pinned(size, "spatial extent") for size in op.shape[-2:])))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(op: Op) -> Typed:
    """``g · k`` becomes ``k · g``."""
    source = op["self"]
    group, inner = op.fresh((op["groups"], op.shape[1] // op["groups"]))
    op.literal("groups", group)
    op.equal(source.axes[1], op.product(group, inner))
    return Typed((source.axes[0], op.product(inner, group), *source.axes[2:]))


@rule(aten.im2col)
def im2col(op: Op) -> Typed:
    """Patches: every channel with the pixels of one window, by window."""
    source = op["self"]
    window = op.pinned(op.shape[-2] // op.length(source.axes[-3]), "pixels of a window")
    _pin_space(op, source.axes[-2:])
    return Typed((*source.axes[:-3], op.product(source.axes[-3], window), op.pinned(op.shape[-1], "windows")))


@rule(aten.col2im)
def col2im(op: Op) -> Typed:
    """The reverse of im2col."""
    source = op["self"]
    (channels,) = op.fresh((op.shape[-3],))
    window = op.pinned(op.length(source.axes[-2]) // op.shape[-3], "pixels of a window")
    op.equal(source.axes[-2], op.product(channels, window))
    _pin_space(op, source.axes[-1:])
    return Typed((*source.axes[:-2], channels, *(op.pinned(size, "spatial extent") for size in op.shape[-2:])))


@rule(aten.pad, aten.constant_pad_nd)
def pad(op: Op) -> Typed:
    """Padding concatenates constants, which cannot shrink; other than constant padding mirrors positions."""
    axes = list(op["self"].axes)
    amounts = list(op["pad"])
    for place in range(len(amounts) // 2):
        before, after = amounts[2 * place : 2 * place + 2]
        if before or after:
            axes[-1 - place] = _padded(op, axes[-1 - place], before, after)
    return Typed(tuple(axes))


def _padded(op: Op, axis: Expression, before: int, after: int) -> Expression:
    if op.get("mode", "constant") != "constant" or before < 0 or after < 0 or op.frozen(axis):
        op.pin(axis, "padded by its own positions")
        return op.pinned(op.length(axis) + before + after, "padded")
    edges = [op.pinned(size, "padding") if size else () for size in (before, after)]
    return (*edges[0], *axis, *edges[1])
