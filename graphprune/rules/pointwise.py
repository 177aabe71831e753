"""Elementwise operations: aligned axes are equal, sizes of one stretch."""

from __future__ import annotations

from graphprune.rules.table import RULES, Op, Typed, aten, rule


@rule(
    aten.alpha_dropout, aten.bernoulli, aten.copy, aten.dropout, aten.empty_like, aten.feature_dropout, aten.fill,
    aten.full_like, aten.native_dropout, aten.ones_like, aten.rand_like, aten.randn_like, aten.zeros_like,
    aten.__and__, aten.__or__, aten.__xor__, aten.polar, aten.complex, aten.masked_fill, aten.where, aten.bucketize,
)  # fmt: skip
def pointwise(op: Op) -> Typed | tuple[Typed, ...]:
    """Every operand is one tensor broadcast to the output. Also the rule of all operations torch tags as pointwise."""
    if "boundaries" in op.arguments:
        op.pin(op["boundaries"].axes[0], "its positions are compared with data")
        return Typed(op.broadcast([op["self"]], op.shape))
    if op.shapes and not isinstance(op.shapes[0], int):
        return tuple(Typed(op.broadcast(op.tensors, shape)) for shape in op.shapes)
    return Typed(op.broadcast(op.tensors, op.shape))


RULES["pointwise"] = pointwise


@rule(
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.to, aten._to_copy,
    aten.type_as, aten.data, aten.resolve_conj, aten.resolve_neg, aten.positive, aten.abs, aten.clamp, aten.clip,
)  # fmt: skip
def copy(op: Op) -> Typed:
    """The same values, so an index tensor keeps what it indexes."""
    source = op["self"]
    return Typed(op.broadcast([source], op.shape), source.values)


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
    dim = op.dim("dim", len(axes), -1)
    value, gate = op.cut(axes[dim], op.shape[dim])
    op.equal(value, gate)
    axes[dim] = value
    return Typed(tuple(axes))


@rule(aten._assert_tensor_metadata, aten._assert_async, aten._assert_scalar, aten.sym_size, aten._local_scalar_dense, aten.item)
def no_tensor(op: Op) -> None:
    """A check or a number: no tensor comes out."""
