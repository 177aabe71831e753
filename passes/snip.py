"""SNIP: connection sensitivity at initialisation.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (arXiv 1810.02340): how much the loss would change,
to first order, if a weight were removed before training::

    score(unit) = aggregate over members of  Σ |w · ∂L/∂w|   over the member's slice of the unit

with L the loss of all calibration batches together: gradients add up before the absolute value is taken, which is what sets it
apart from ``taylor``. Holds one float32 gradient a parameter.
``result = graphprune.compile(net, images, method="snip", calibration=batches, loss=my_loss)``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Scores, score, see_gradients
from graphprune.precise import precise
from graphprune.score import change


def snip(model: nn.Module, groups: Groups, calibration: Calibration, *, aggregate: str = "sum") -> Scores:
    """Score units by |w·g| of the whole calibration batch: (units,) each, in float64."""
    names = {member.name for group in groups for member in group.members}
    gradients: dict[str, Tensor] = {}

    def see(name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        gradients[name] = gradients.get(name, 0) + gradient

    see_gradients(model, calibration.inputs, see, names=names, loss=calibration.loss)
    weights = dict(model.named_parameters(remove_duplicate=False))

    def saliency(name: str) -> Tensor | None:
        if name not in weights:
            return None
        whole = precise(weights[name].detach())
        return change(whole, gradients[name]).abs() if name in gradients else torch.zeros_like(whole.real)  # no gradient reaches it

    return score(groups, groups.axes.tensors, saliency, method=f"snip {aggregate}", how=aggregate)
