"""Sensitivity: scores replaced by what the loss really does, group by group.

The layer-wise scan that pruning has always begun with (Li et al., arXiv 1608.08710, section 3.2), turned into scores: for each
group the lowest-scored share r of its units is masked at the contractions that read them, nothing else, and the loss is measured.
Between shares the loss is taken to rise evenly, so that a unit between r₁ and r₂ gets

    score(unit) = ( Δloss(r₂) − Δloss(r₁) ) / units between

never less than a unit below it. The order within a group stays; groups become comparable, which is what ``scope="global"`` needs.
Groups × shares forward passes over ``samples`` rows.
``graphprune.compile(model, method="obs", scope="global", alike=False, calibration=c, passes=["sensitivity"])``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune import Calibration, Group, Groups, Scores, language_loss
from graphprune.axes import Keep
from graphprune.capture import fitted
from graphprune.errors import UserMistake
from graphprune.execute import execute, tensors_of
from graphprune.verify import masks


def sensitivity(
    model: nn.Module, groups: Groups, calibration: Calibration, scores: Scores, *, shares: str = "0.25,0.5", samples: int = 8
) -> Scores:
    """Scores (units,) in units of loss; ``shares`` are the shares of a group that are tried, ascending."""
    steps = [float(part) for part in str(shares).split(",")]
    if sorted({0.0, *steps, 1.0}) != [0.0, *steps, 1.0]:
        raise UserMistake(f"no ascending shares between 0 and 1: {shares}", fix="0.25,0.5")
    trial = _Trial(model, groups, calibration, samples)
    found = {group.name: _rescored(group, scores[group.name], steps, trial) for group in groups}
    return Scores(found, f"{scores.method}, measured at {shares}")


class _Trial:
    """The loss of the model with some units masked, on a few calibration batches."""

    def __init__(self, model: nn.Module, groups: Groups, calibration: Calibration, samples: int) -> None:
        self.axes = groups.axes
        self.tensors = tensors_of(model, self.axes.trace)
        batches = list(fitted(self.axes.trace, calibration.inputs))
        rows = max(1, len(next(t for t in batches[0] if isinstance(t, Tensor))))
        self.batches = batches[: max(1, samples // rows)]
        self.names = self.axes.trace.in_spec
        self.whole = self.loss({})

    def loss(self, keep: Keep) -> float:
        """Mean loss with only the units in ``keep`` of each factor."""
        return sum(self._loss(flat, keep) for flat in self.batches) / len(self.batches)

    def _loss(self, flat: Sequence[Any], keep: Keep) -> float:
        trace = self.axes.trace
        _, inputs = pytree.tree_unflatten(list(flat), self.names)

        def masked(**_: Any) -> Any:
            outputs = execute(trace, self.tensors, flat, edit=masks(self.axes, keep))
            return pytree.tree_unflatten(pytree.tree_leaves(outputs), trace.out_spec)

        return float(language_loss(masked, _inputs(inputs)))  # type: ignore[arg-type]


def _inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    if "input_ids" not in inputs:
        raise UserMistake("the calibration inputs hold no input_ids to measure a loss on", fix="leave sensitivity out")
    return inputs


def _rescored(group: Group, scores: Tensor, steps: Sequence[float], trial: _Trial) -> Tensor:
    """Units in their order, each with the rise of the loss per unit where it lies; the last share is extended."""
    order = scores.argsort(stable=True)
    marks = sorted({round(step * group.size) for step in steps} - {0, group.size})
    rises = [0.0, *(trial.loss({group.factor: sorted(order[mark:].tolist())}) - trial.whole for mark in marks)]
    slopes, tops = [], [0, *marks]
    for low, high, before, after in zip(tops, tops[1:], rises, rises[1:], strict=False):
        slopes += [max((after - before) / (high - low), 0.0)] * (high - low)
    slopes += [2 * max(slopes, default=0.0)] * (group.size - len(slopes))
    ranks = torch.arange(group.size, dtype=torch.float64)
    rising = torch.tensor(slopes, dtype=torch.float64).cummax(0).values + 1e-12 * ranks
    return torch.empty_like(rising).index_copy_(0, order.cpu(), rising)
