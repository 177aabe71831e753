"""Normalisations: what they normalise over may shrink, but not exactly."""

from __future__ import annotations

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE


@rule(aten.layer_norm, aten.rms_norm, aten.native_layer_norm)
def layer_norm(op: Op) -> Typed | tuple[Typed, ...]:
    """Mean and variance over the trailing axes; scale and shift carry them."""
    source = op["input"]
    start = len(source.axes) - len(op["normalized_shape"])
    op.literal("normalized_shape", list(source.axes[start:]))
    for axis in source.axes[start:]:
        op.renormalise(axis, "normalised over")
    for name in ("weight", "bias"):
        if op.get(name) is not None:
            for axis, other in zip(source.axes[start:], op[name].axes, strict=True):
                op.equal(axis, other)
    out = Typed(source.axes)
    statistics = Typed((*source.axes[:start], *(ONE for _ in source.axes[start:])))
    return (out, statistics, statistics) if op.shapes and not isinstance(op.shapes[0], int) else out


@rule(aten.group_norm)
def group_norm(op: Op) -> Typed:
    """Channels are ``group · k``: statistics over ``k`` and space, so a whole group is exact and a channel of one is not."""
    source = op["input"]
    channels = source.axes[1]
    group, inner = op.fresh((op["num_groups"], op.length(channels) // op["num_groups"]))
    op.equal(channels, op.product(group, inner))
    op.literal("num_groups", group)
    for axis in (inner, *source.axes[2:]):
        op.renormalise(axis, "normalised over")
    for name in ("weight", "bias"):
        if op.get(name) is not None:
            op.equal(channels, op[name].axes[0])
    return Typed(source.axes)


@rule(aten.batch_norm, aten.instance_norm)
def batch_norm(op: Op) -> Typed:
    """Each channel (dimension 1) on its own: scale, shift and running statistics carry it."""
    source = op["input"]
    batch = source.axes[:1] if op.get("training") else ()
    if op.get("training") or op.get("use_input_stats"):
        for axis in (*batch, *source.axes[2:]):
            op.renormalise(axis, "normalised over")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if op.get(name) is not None:
            op.equal(source.axes[1], op[name].axes[0])
    return Typed(source.axes)


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten._safe_softmax)
def softmax(op: Op) -> Typed:
    """Normalises over one axis."""
    source = op["self"]
    op.renormalise(source.axes[op.dim("dim", len(source.axes))], "softmax over it")
    return Typed(source.axes)


@rule(aten._weight_norm, aten._weight_norm_interface)
def weight_norm(op: Op) -> Typed | tuple[Typed, ...]:
    """``g · v / ‖v‖`` with the norm over every axis but one."""
    direction, scale = op["v"], op["g"]
    kept = op["dim"] if op["dim"] != -1 else None
    for dim, axis in enumerate(direction.axes):
        if dim != kept:
            op.renormalise(axis, "weight norm over it")
    op.broadcast([direction, scale], tuple(op.length(axis) for axis in direction.axes))
    out = Typed(direction.axes)
    return out if isinstance(op.shapes[0], int) else (out, Typed(scale.axes))
