"""Recurrent layers: every gate is a segment of ``h`` rows, and the state carries ``h`` from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import Expression

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def recurrent(op: Op) -> tuple[Typed, ...]:
    """All layers and directions share the width of the state, because one tensor holds all their states."""
    source, states = op["input"], op["hx"] if op.name == "lstm" else [op["hx"]]
    batch, time = (0, 1) if op["batch_first"] else (1, 0)
    op.pin(source.axes[time], "one step after the other")
    for state in states:
        op.pin(state.axes[0], "one position for each layer and direction")
        op.equal(state.axes[1], source.axes[batch])
    seen, width = states[0].axes[2], states[-1].axes[2]
    directions = 2 if op["bidirectional"] else 1
    below = source.axes[2]
    op.use(source, 2, "contracted")
    if len(op["params"]) // (op["num_layers"] * directions) in (2, 4):
        op.equal(seen, width)
    for layer in _layers(op, directions):
        for weights in layer:
            _cell(op, weights, below, seen, width)
        below = seen * directions
    lead = (source.axes[0], source.axes[1])
    return Typed((*lead, below)), *(Typed(state.axes) for state in states)


def _layers(op: Op, directions: int) -> Iterator[list[Sequence[Typed]]]:
    """For each layer, the parameters of each direction: two weights, two biases if any, a projection if any."""
    given = op["params"]
    count = len(given) // (op["num_layers"] * directions)
    cells = [given[start : start + count] for start in range(0, len(given), count)]
    return (cells[start : start + directions] for start in range(0, len(cells), directions))


def _cell(op: Op, weights: Sequence[Typed], below: Expression, seen: Expression, width: Expression) -> None:
    """``below`` is what the layer reads, ``seen`` what it passes on, ``width`` its own state (another one with a projection)."""
    gates = width * GATES[op.name]
    for place, tensor in enumerate(weights):
        op.equal(tensor.axes[0], gates if len(tensor.axes) == 1 or place < 2 else seen)
    for tensor, read in zip([*weights[:2], *weights[2:][2 * op["has_biases"] :]], (below, seen, width), strict=False):
        op.equal(tensor.axes[1], read)
        op.use(tensor, 0, "free")
        op.use(tensor, 1, "contracted")
