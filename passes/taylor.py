"""First-order Taylor pruning, element-wise: how much the loss would change if each weight were zero.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771, equation 8), as LLM-Pruner
(arXiv 2305.11627, equation 5, first-order term) uses it::

    score(unit) = aggregate over members of  Σ |w · ∂L/∂w|   over the member's slice of the unit

summed over calibration batches, each batch's gradient consumed as it appears: the peak is the model plus one gradient. Products
are taken in float32 or better. Ranks share the batches. For example::

    source = graphprune.open_source("path/to/checkpoint")
    graphprune.compile(source.model, method="taylor", calibration=graphprune.calibrate("self", source))
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from graphprune import Calibration, Group, Groups, Scores, combine, gather_units, see_gradients
from graphprune.device import where
from graphprune.ranks import dealt, summed
from graphprune.score import change, profiles


def taylor(model: nn.Module, groups: Groups, calibration: Calibration, *, aggregate: str = "sum") -> Scores:
    """Score units by the summed first-order change of the loss: (units,) each, in float64."""
    axes, spots = groups.axes.tensors, defaultdict(list)
    for group in groups:
        for place, member in enumerate(group.members):
            spots[member.name].append((group, place, member))
    totals: dict[tuple[str, int], Tensor] = {}

    def see(name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        sums = profiles((weight, gradient), {member.dim for _, _, member in spots[name]}, lambda w, g: change(w, g).abs_())
        for group, place, member in spots[name]:
            units = gather_units(sums[member.dim], axes[name][member.dim], group.factor)
            totals[group.name, place] = totals.get((group.name, place), torch.zeros_like(units)) + units

    see_gradients(model, dealt(calibration.inputs, model), see, names=spots, loss=calibration.loss)
    totals = summed(totals, model)
    weights = dict(model.named_parameters(remove_duplicate=False))

    def rows(group: Group) -> list[Tensor]:  # what no gradient reaches does not change the loss
        none = torch.zeros(group.size, dtype=torch.float64, device=where(model))
        return [totals.get((group.name, place), none) for place, member in enumerate(group.members) if member.name in weights]

    return Scores({group.name: combine(rows(group), aggregate) for group in groups}, f"taylor {aggregate}")
