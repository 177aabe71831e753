"""FLAP: a channel that hardly fluctuates can be replaced by its mean.

An et al., "Fluctuation-based Adaptive Structured Pruning" (arXiv 2312.11983, equations 4 to 6). At a consumer W (rows, width) with
inputs x_t (width)::

    wifv   Var_t(x_j) · ‖W_:j‖²       weighted input feature variance, the published choice
    ifv    Var_t(x_j)
    wifn   mean_i |W_ij| · ‖X_j‖₂     Wanda-sp's

Channels are standardised within each group, z = (s − mean s) / std s, and a unit has the mean z of its channels: that makes layers
and kinds comparable, and ``scope="rank"`` cuts the lowest wherever they are, which is the adaptive part. With few KV heads in a
layer z says little; leave kind ``head`` out there. What is removed is made up for by ``mean_bias``, a pass of its own::

    graphprune.compile(model, method="flap", scope="rank", alike=False, calibration=c, passes=["mean_bias:add=true"])

The published code squares the attention metric before it standardises and updates its variance with a degenerate formula; both are
left out here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Scores, gather_units
from graphprune.capture import Consumer, Power, columns, input_power, readers
from graphprune.errors import UserMistake, nearest


def flap(model: nn.Module, groups: Groups, calibration: Calibration, *, metric: str = "wifv", standardise: bool = True) -> Scores:
    """Score units by the fluctuation of what reads them: (units,) each, float64, negative ones included."""
    if metric not in ("wifv", "ifv", "wifn"):
        raise UserMistake(f"flap knows no metric {metric!r}", fix=nearest(metric, ("wifv", "ifv", "wifn")))
    weights = dict(model.named_parameters(remove_duplicate=False))
    power = input_power(model, groups, calibration.inputs)
    found: dict[str, Tensor] = {}
    reading = readers(groups)
    for group in groups:
        for reader in reading[group.name]:
            channels = _metric(metric, weights[reader.weight].detach(), reader, power[reader])
            if standardise:
                channels = (channels - channels.mean()) / channels.std().clamp_min(torch.finfo(torch.float64).tiny)
            share = gather_units(torch.ones_like(channels), reader.width, group.factor)
            found[group.name] = found.get(group.name, 0) + gather_units(channels, reader.width, group.factor) / share
    return Scores(found, f"flap {metric}")


def _metric(metric: str, weight: Tensor, reader: Consumer, power: Power) -> Tensor:
    """(width,): of each channel that the weight reads."""
    if metric == "wifn":
        mean = columns(reader, weight, lambda block: block.abs().double()) * reader.width.size / weight.numel()
        return mean * power.square.sqrt()
    return power.variance * columns(reader, weight, lambda b: b.abs().double().square()) if metric == "wifv" else power.variance
