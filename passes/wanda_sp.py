"""Wanda-sp: weights times the size of what they read, summed over what a unit is read by.

The structured form of Wanda (arXiv 2306.11695) that FLAP (An et al., arXiv 2312.11983) compares with. At every consumer of a group,
W (rows, width) reading inputs x_t (width)::

    score(j) = mean_i |W_ij| · ‖X_j‖₂       ‖X_j‖₂ = √ mean_t x_tj²      score(unit) = Σ over the channels j of the unit

Forward passes only. ``result = graphprune.compile(model, method="wanda_sp", calibration=c)``
"""

from __future__ import annotations

from torch import Tensor, nn

from graphprune import Calibration, Groups, Scores, gather_units
from graphprune.capture import columns, input_power, readers


def wanda_sp(model: nn.Module, groups: Groups, calibration: Calibration) -> Scores:
    """Score units by the mean |weight| that reads them times the root mean square of what is read: (units,), float64."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    power = input_power(model, groups, calibration.inputs)
    found: dict[str, Tensor] = {}
    reading = readers(groups)
    for group in groups:
        for reader in reading[group.name]:
            weight = weights[reader.weight].detach()
            mean = columns(reader, weight, lambda block: block.abs().double()) * reader.width.size / weight.numel()
            units = gather_units(mean * power[reader].square.sqrt(), reader.width, group.factor)
            found[group.name] = found.get(group.name, 0) + units
    return Scores(found, "wanda_sp")
