"""Minitron: how large the activations of a unit are.

Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (arXiv 2407.14679, section 2.2): mean over the
sequence, L2 over the batch::

    score(unit) = √ Σ_batches ( mean_t ‖x_t,unit‖₂ )²

where x_t,unit are the channels of one unit in whatever a weight reads: one channel of the FFN's inner width (|x|), head_dim
channels of a head at o_proj, one channel of the hidden width at every norm's output; several such places are summed. A place
that several weights read (queries, keys and values behind one norm) counts once. Depth is ``short_gpt``'s business.
``result = graphprune.compile(model, method="minitron", kinds=["hidden", "ffn"], calibration=c)``
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from graphprune import Calibration, Groups, Scores, see_inputs
from graphprune.axes import Axis, Factor
from graphprune.capture import Consumer, readers
from graphprune.execute import tensors_of
from graphprune.ranks import summed


def minitron(model: nn.Module, groups: Groups, calibration: Calibration) -> Scores:
    """Score units by the magnitude of their activations: (units,) each, float64. Forward passes only."""
    places: dict[fx.Node, list[tuple[str, Consumer, Factor]]] = defaultdict(list)
    reading = readers(groups)
    for group in groups:
        distinct = {reader.operand: reader for reader in reading[group.name]}
        for operand, reader in distinct.items():
            places[operand].append((group.name, reader, group.factor))
    totals: dict[tuple[str, str], Tensor] = {}

    def see(consumer: Consumer, x: Tensor) -> None:
        for name, reader, factor in places[consumer.operand]:
            if consumer == reader:
                square = _norms(x, reader.width, factor).mean(0).square()
                here = name, reader.operand.name
                totals[here] = totals[here] + square if here in totals else square

    axes = groups.axes
    wanted = {reader.weight for found in places.values() for _, reader, _ in found}
    see_inputs(axes, tensors_of(model, axes.trace), calibration.inputs, see, wanted=wanted)
    found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for (name, _), total in summed(totals).items():
        found[name] = found[name].to(total) + total.sqrt()
    return Scores(found, "minitron")


def _norms(x: Tensor, axis: Axis, factor: Factor) -> Tensor:
    """(positions, width) → the L2 norm of each unit's channels at each position, (positions, units)."""
    squares = x.abs().double().square()
    sums = squares.new_zeros(len(x), factor.size)
    for column in axis.units(factor):
        index = torch.tensor(column, device=x.device)
        sums.index_add_(1, index[index >= 0], squares[:, index >= 0])
    return sums.sqrt()
