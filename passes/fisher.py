"""Group Fisher: the squared gradient of the mask of a unit.

Liu et al., "Group Fisher Pruning" (arXiv 2108.00708); Kwon et al., "A Fast Post-Training Pruning Framework for Transformers"
(arXiv 2204.09656). A mask m = 1 on a unit where a weight W reads it has ∂L_j/∂m = Σ over that unit's part of W of w·∂L_j/∂w, so::

    score(unit) = ½ · Σ_j ( Σ_{w in readers of the unit}  w · ∂L_j/∂w )²

with j over calibration sequences. The members of a coupled group are one function: counting only its readers counts it
once, and the square is taken after the sum, so what cancels within a unit cancels here. Scores are loss increases:
``scope="global"`` may compare layers and kinds by them.
``result = graphprune.compile(model, method="fisher", scope="global", alike=False, calibration=c)``
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Scores, see_gradients, to_units
from graphprune.capture import readers
from graphprune.gradients import one_by_one
from graphprune.ranks import dealt, summed
from graphprune.score import change


def fisher(model: nn.Module, groups: Groups, calibration: Calibration) -> Scores:
    """Score units by the diagonal Fisher information of their masks: (units,) each, float64."""
    axes, spots = groups.axes.tensors, defaultdict(list)
    reading = readers(groups)
    for group in groups:
        for name, dim in {(reader.weight, reader.dim) for reader in reading[group.name]}:
            spots[name].append((group, dim))
    totals = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    masks: dict[str, Tensor] = {}

    def see(name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        for group, dim in spots[name]:
            units = to_units((weight, gradient), axes[name], dim, group.factor, change)
            masks[group.name] = masks[group.name] + units if group.name in masks else units

    for sample in dealt(one_by_one(calibration.inputs), model):
        masks.clear()
        see_gradients(model, [sample], see, names=spots, loss=calibration.loss)
        for name, units in masks.items():
            totals[name] = totals[name].to(units) + units.square() / 2
    return Scores(summed(totals, model), "fisher")
