"""Sensitivity: each group's scores scaled to what cutting it really does to the model's predictions.

The layer-wise scan that pruning has always begun with (Li et al., arXiv 1608.08710, section 3.2), used as a scale: for each
group the lowest-scored ``share`` of its units is masked at the contractions that read them, nothing else, and the distance to the
original's predictions is measured. With U the masked units and s the given scores::

    s′(unit) = s(unit) · KL( original ‖ masked ) / Σ_{u ∈ U} s(u)          in nats a prediction

Order and proportions within a group stay, since scores know units better than groups; groups of all layers and kinds become
comparable, which is what ``scope="global"`` needs. One forward pass a group over ``samples`` rows of the calibration.
``graphprune.compile(model, method="obs", scope="global", alike=False, calibration=c, passes=["sensitivity"])``
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune import Calibration, Groups, Scores
from graphprune.axes import Keep
from graphprune.capture import fitted
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import execute, tensors_of
from graphprune.recover import divergence
from graphprune.verify import masks

LEAST = 0.1
"""No group counts for less than this share of the median one: what a few rows do not show may still matter."""


def sensitivity(
    model: nn.Module, groups: Groups, calibration: Calibration, scores: Scores, *, share: float = 0.2, samples: int = 4
) -> Scores:
    """Scores (units,) in nats a prediction. Raises UserMistake unless ``0 < share < 1``, ModelLimit without logits."""
    if not 0 < share < 1:
        raise UserMistake(f"share is {share}", fix="give a number between 0 and 1, 0.2 for instance")
    trial = _Trial(model, groups, calibration, samples)
    scale = {}
    for group in groups:
        order = scores[group.name].argsort(stable=True)
        cut = min(max(1, round(share * group.size)), group.size - 1)
        lost = trial.distance({group.factor: sorted(order[cut:].tolist())})
        foreseen = float(scores[group.name][order[:cut]].sum())
        scale[group.name] = lost / foreseen if foreseen > 0 else 0.0
    least = LEAST * median(scale.values())
    found = {group.name: scores[group.name] * max(scale[group.name], least) for group in groups}
    return Scores(found, f"{scores.method}, measured at {share:.0%}")


class _Trial:
    """How far a model with some units masked is from the original, on the first rows of the calibration."""

    def __init__(self, model: nn.Module, groups: Groups, calibration: Calibration, samples: int) -> None:
        self.axes = groups.axes
        self.tensors = tensors_of(model, self.axes.trace)
        self.batches: list[Any] = []
        rows = 0
        for flat in fitted(self.axes.trace, calibration.inputs):
            if rows >= samples:
                break
            self.batches.append(flat)
            rows += len(next(t for t in flat if isinstance(t, Tensor)))
        self.wanted = [self._logits(flat, {}) for flat in self.batches]

    def distance(self, keep: Keep) -> float:
        """Mean KL(original ‖ masked) over all predictions with only the units in ``keep`` of each factor."""
        apart = sum(
            float(divergence(self._logits(flat, keep), wanted)) for flat, wanted in zip(self.batches, self.wanted, strict=True)
        )
        return apart / sum(len(wanted) for wanted in self.wanted)

    def _logits(self, flat: Any, keep: Keep) -> Tensor:
        """(predictions, classes), float32."""
        trace = self.axes.trace
        made = execute(trace, self.tensors, flat, edit=masks(self.axes, keep) if keep else None)
        outputs = pytree.tree_unflatten(pytree.tree_leaves(made), trace.out_spec)
        logits = getattr(outputs, "logits", None)
        if logits is None:
            logits = next((leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
        if logits is None or not logits.is_floating_point() or logits.dim() < 2:
            raise ModelLimit("the model gives no logits to measure", fix="leave sensitivity out")
        return torch.as_tensor(logits).flatten(0, -2).float()
