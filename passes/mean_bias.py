"""Mean bias: what a removed input contributed on average becomes a bias.

The compensation of FLAP (An et al., arXiv 2312.11983, equation 7), and of the older advice to replace a unit by its mean. At every
weight W (rows, inputs) that reads a pruned group, with x̄ (inputs,) the mean over all calibration positions::

    b′ = b + W · (x̄ ⊙ removed)

Where the product has no bias there is nowhere to put it in a stock architecture: that is a ModelLimit, unless ``add`` puts biases
into the layers, which no stock config then describes (``least_squares`` needs none).
``graphprune.compile(model, method="flap", calibration=c, passes=["mean_bias"])``
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Plan, Pruned
from graphprune.capture import fitted
from graphprune.errors import ModelLimit
from graphprune.execute import tensors_of
from graphprune.lockstep import Emitted, Reading, Site, side_by_side
from graphprune.ranks import dealt, summed


def mean_bias(
    model: nn.Module, groups: Groups, calibration: Calibration, plan: Plan, pruned: Pruned, *, add: bool = False
) -> Pruned:
    """The pruned model with biases that hold the mean of what was removed."""
    axes, keep = groups.axes, plan.keep(groups)
    smaller = Emitted(pruned.model, axes, keep)
    batches = dealt(fitted(axes.trace, calibration.inputs))
    added: dict[str, Tensor] = {}
    for site, readings in side_by_side(axes, keep, tensors_of(model, axes.trace), smaller, batches):
        if site.shrunk and site.bias is not None:
            smaller[site.bias] = smaller[site.bias] + _lost(site, readings).to(smaller[site.bias].dtype)
        elif site.shrunk:
            added[_layer(pruned.model, site, add)] = _lost(site, readings)
    for name, bias in added.items():
        layer = pruned.model.get_submodule(name)
        layer.bias = nn.Parameter(bias.to(next(layer.parameters()).dtype))
    return replace(pruned, config=None, obstacle="mean_bias added biases that the architecture has not") if added else pruned


def _lost(site: Site, readings: Iterable[Reading]) -> Tensor:
    """(rows,): the mean output of the inputs that are gone."""
    sums = [torch.cat([x.sum(0), x.new_tensor([len(x)])]) for x in (reading.then.double() for reading in readings)]
    total = summed({0: torch.stack(sums).sum(0)} if sums else {})[0]
    mean = total[:-1] / total[-1]
    mean[site.kept] = 0
    return site.whole.double() @ mean


def _layer(model: nn.Module, site: Site, add: bool) -> str:
    """The module that can take a bias, where it is to."""
    name = site.weight.rpartition(".")[0]
    layer = model.get_submodule(name) if add else None
    if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
        raise ModelLimit(f"{name} has no bias to hold a mean", fix="least_squares needs none; add=True adds biases")
    return name
