"""Elementwise operations: aligned axes are equal, sizes of one stretch."""

from __future__ import annotations

from graphprune.rules.table import RULES, Op, Typed, aten, rule
from graphprune.unify import ONE, Conflict


@rule(
    aten.alpha_dropout, aten.bernoulli, aten.copy, aten.dropout, aten.empty_like, aten.feature_dropout, aten.fill,
    aten.full_like, aten.native_dropout, aten.ones_like, aten.rand_like, aten.randn_like, aten.zeros_like,
    aten.__and__, aten.__or__, aten.__xor__, aten.polar, aten.complex, aten.masked_fill, aten.zero, aten.real, aten.imag, aten.conj,
    aten.hardswish, aten.log_sigmoid, aten.special_ndtr, aten.isclose, aten.absolute, aten.negative, aten.fix, aten.arctan,
    aten.arccos, aten.arcsin, aten.arctan2, aten.floor_divide, aten.divide, aten.multiply, aten.subtract, aten.not_equal,
    aten.greater, aten.greater_equal, aten.less, aten.less_equal, aten.broadcast_tensors,
)  # fmt: skip
def pointwise(op: Op) -> Typed | tuple[Typed, ...]:
    """Every operand is one tensor broadcast to the output. Also the rule of all operations torch tags as pointwise."""
    if op.shapes and not isinstance(op.shapes[0], int):
        return tuple(Typed(op.broadcast(op.tensors, shape)) for shape in op.shapes)
    return Typed(op.broadcast(op.tensors, op.shape))


RULES["pointwise"] = pointwise


@rule(
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.to, aten._to_copy,
    aten.type_as, aten.data, aten.lift, aten.alias_copy, aten.resolve_conj, aten.resolve_neg, aten.positive, aten.abs,
)  # fmt: skip
def copy(op: Op) -> Typed:
    """The same values, so an index tensor keeps what it indexes."""
    return Typed(op["self"].axes, op["self"].values)


@rule(aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max)
def clamp(op: Op) -> Typed:
    """Elementwise. An index tensor whose whole range lies within the bounds keeps what it indexes."""
    values, low, high = op["self"].values, op.get("min", 0), op.get("max", float("inf"))
    axes = op.broadcast(op.tensors, op.shape)
    if values is None or isinstance(low, Typed) or isinstance(high, Typed):
        return Typed(axes)
    return Typed(axes, values if low <= 0 and high >= op.length(values) - 1 else None)


@rule(aten.where)
def where(op: Op) -> Typed:
    """Elementwise; with a condition alone it lists places, which depends on data."""
    if "self" not in op.arguments:
        raise Conflict("lists the places where its operand is true")
    return Typed(op.broadcast(op.tensors, op.shape))


@rule(aten.bucketize)
def bucketize(op: Op) -> Typed:
    """Each value by its place between the boundaries."""
    op.pin(op["boundaries"].axes[0], "its positions are compared with data")
    return Typed(op["self"].axes)


@rule(aten.fake_quantize_per_tensor_affine, aten._fake_quantize_learnable_per_tensor_affine)
def fake_quantize(op: Op) -> Typed:
    """Rounded to the steps of one scale."""
    return Typed(op["self"].axes)


@rule(aten.fake_quantize_per_channel_affine, aten._fake_quantize_learnable_per_channel_affine)
def fake_quantize_channels(op: Op) -> Typed:
    """Rounded to the steps of a scale for each index of one axis."""
    source = op["self"]
    axis = source.axes[op.dim("axis", len(source.axes))]
    for each in (op["scale"], op["zero_point"]):
        op.equal(each.axes[0], axis)
    return Typed(source.axes)


@rule(aten.meshgrid)
def meshgrid(op: Op) -> tuple[Typed, ...]:
    """Every operand is a dimension of every output, in order; ``xy`` swaps the first two."""
    axes = [operand.axes[0] if operand.axes else ONE for operand in op["tensors"]]
    if op.get("indexing") == "xy":
        axes[:2] = axes[1::-1]
    return tuple(Typed(tuple(axes)) for _ in op.shapes)


@rule(aten.prelu)
def prelu(op: Op) -> Typed:
    """A slope for each channel (dimension 1) or one for all."""
    source, slope = op["self"], op["weight"]
    if len(source.axes) > 1:
        op.broadcast([Typed((source.axes[1],)), slope], op.shape[1:2])
    return Typed(source.axes)


@rule(aten.glu)
def glu(op: Op) -> Typed:
    """The first half of an axis gated by the second."""
    axes = list(op["self"].axes)
    dim = op.dim("dim", len(axes))
    value, gate = op.cut(axes[dim], op.shape[dim])
    op.equal(value, gate)
    axes[dim] = value
    return Typed(tuple(axes))


@rule(aten._assert_tensor_metadata, aten._assert_scalar, aten.sym_size, aten.sym_numel, aten.sym_stride)
def no_tensor(op: Op) -> None:
    """About a tensor, not its values: no tensor comes out."""
    for operand in op.tensors:
        op.positions(operand)
