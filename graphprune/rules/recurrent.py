"""Recurrent layers: every gate is a segment of ``h`` rows, and the state carries ``h`` from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import Conflict, Expression

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def recurrent(op: Op) -> tuple[Typed, ...]:
    """All layers and directions share the width of the state, because one tensor holds all their states."""
    directions = 2 if op["bidirectional"] else 1
    cells = _cells(op, directions)
    source, states = op["input"], op["hx"] if op.name == "lstm" else [op["hx"]]
    batch, time = (0, 1) if op["batch_first"] else (1, 0)
    op.pin(source.axes[time], "one step after the other")
    _states(op, states, source.axes[batch])
    width = states[0].axes[2]
    op.use(source, 2, "contracted")
    for place, weights in enumerate(cells):
        _cell(op, weights, source.axes[2] if place < directions else width * directions, width)
    return Typed((*source.axes[:2], width * directions)), *(Typed(state.axes) for state in states)


def _states(op: Op, states: Sequence[Typed], batch: Expression) -> None:
    for state in states:
        op.pin(state.axes[0], "one position for each layer and direction")
        op.equal(state.axes[1], batch)
        op.equal(state.axes[2], states[0].axes[2])


def _cells(op: Op, directions: int) -> list[Sequence[Typed]]:
    """The parameters of each layer and direction: two weights, and two biases if any."""
    given, count = op["params"], 4 if op["has_biases"] else 2
    if "input" not in op.arguments or len(given) != count * op["num_layers"] * directions:
        raise Conflict("its steps are packed, or its state projected, which torch tells by comparing sizes")
    return [given[start : start + count] for start in range(0, len(given), count)]


def _cell(op: Op, weights: Sequence[Typed], below: Expression, width: Expression) -> None:
    """Weights on what lies below and on the state before; each has a segment of rows for every gate."""
    for tensor in weights:
        op.equal(tensor.axes[0], width * GATES[op.name.removesuffix("_cell")])
    for tensor, read in zip(weights, (below, width), strict=False):
        op.equal(tensor.axes[1], read)
        op.use(tensor, 0, "free")
        op.use(tensor, 1, "contracted", apart=True)


@rule(aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
def cell(op: Op) -> Typed | tuple[Typed, ...]:
    """One step of one layer."""
    source, states = op["input"], op["hx"] if op.name == "lstm_cell" else [op["hx"]]
    weights = [op[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if op.get(name) is not None]
    for state in states:
        for axis, other in zip(state.axes, (*source.axes[:-1], states[0].axes[-1]), strict=True):
            op.equal(axis, other)
    op.use(source, -1, "contracted")
    _cell(op, weights, source.axes[-1], states[0].axes[-1])
    return tuple(Typed(state.axes) for state in states) if op.name == "lstm_cell" else Typed(states[0].axes)
