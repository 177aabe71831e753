"""Sensitivity: each group's scores scaled to what cutting it really does to the model's predictions.

The layer-wise scan that pruning has always begun with (Li et al., arXiv 1608.08710, section 3.2), used as a scale: for each
group the lowest-scored ``share`` of its units is masked at the contractions that read them, nothing else, and the distance to the
original's predictions is measured. With U the masked units and s the given scores::

    s′(unit) = s(unit) · KL( original ‖ masked ) / Σ_{u ∈ U} s(u)          in nats a prediction

Order and proportions within a group stay, since scores know units better than groups; groups of all layers and kinds become
comparable, which is what ``scope="global"`` needs. Half a forward pass a group, on average.
``graphprune.compile(model, method="obs", scope="global", alike=False, calibration=c, passes=["sensitivity"])``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune import Axes, Calibration, Groups, Scores, Trace
from graphprune.axes import Keep
from graphprune.capture import fitted
from graphprune.divergence import divergence
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import Walk, execute, finish, last_uses, tensors_of
from graphprune.verify import masks

LEAST = 0.1
"""No group counts for less than this share of the median one: what a few rows do not show may still matter."""


def sensitivity(
    model: nn.Module, groups: Groups, calibration: Calibration, scores: Scores, *, share: float = 0.2, samples: int = 4
) -> Scores:
    """Scores (units,) in nats a prediction. Raises UserMistake unless ``0 < share < 1``, ModelLimit without logits.

    ``samples`` rows are read, or as many as were traced, the first ones of the first batches, so that text of all kinds in a
    mixture is among them. Groups that no product reads (experts, among which a router chooses) keep their scores.
    """
    if not 0 < share < 1:
        raise UserMistake(f"share is {share}", fix="give a number between 0 and 1, 0.2 for instance")
    axes = groups.axes
    lowest, kept = {}, {}
    for group in groups:
        order = scores[group.name].argsort(stable=True)
        cut = min(max(1, round(share * group.size)), group.size - 1)
        lowest[group.name], kept[group.name] = order[:cut], {group.factor: sorted(order[cut:].tolist())}
    tensors = tensors_of(model, axes.trace)
    lost: dict[str, float] = defaultdict(float)
    predictions = 0
    traced = next((len(value) for value in axes.trace.example if isinstance(value, Tensor) and value.ndim), 1)
    for flat in fitted(axes.trace, islice(_rows(calibration), max(samples, traced))):
        found = _distances(axes, tensors, flat, kept)
        predictions += found.pop("")
        for name, distance in found.items():
            lost[name] += distance
    if not predictions:
        raise UserMistake(f"no {traced} rows of calibration to measure on", fix="give as many rows as the model was traced with")
    foreseen = {name: float(scores[name][units].sum()) for name, units in lowest.items()}
    scale = {name: lost[name] / predictions / foreseen[name] if foreseen[name] > 0 else 0.0 for name in lost}
    if not scale:
        return scores
    least = LEAST * median(scale.values())
    scale |= dict.fromkeys(lowest.keys() - lost.keys(), 1.0)
    return Scores({name: scores[name] * max(scale[name], least) for name in lowest}, f"{scores.method}, measured at {share:.0%}")


def _rows(calibration: Calibration) -> Iterator[Mapping[str, Any]]:
    """The first row of every batch, then the second of every batch, and so on."""
    for row in count():
        batches = [inputs for inputs in calibration.inputs if row < len(next(iter(inputs.values())))]
        if not batches:
            return
        yield from ({name: value[row : row + 1] for name, value in inputs.items()} for inputs in batches)


@torch.no_grad()
def _distances(axes: Axes, tensors: Mapping[str, Tensor], flat: Sequence[Any], kept: Mapping[str, Keep]) -> dict[str, Any]:
    """For each group Σ KL over the predictions for one batch, and under "" how many these are.

    A masked run begins where the first product reads what is masked; what is before is the original's. What none reads is left out.
    """
    trace, nodes = axes.trace, list(axes.trace.graph.nodes)
    dying, begins = last_uses(nodes), defaultdict(list)
    for name, keep in kept.items():
        reads = {use.node for use in axes.uses if use.role == "contracted" and use.axis.shrinks(keep)}
        for first in islice((node for node in nodes if node in reads), 1):
            begins[first].append(name)
    wanted = _predictions(trace, execute(trace, tensors, flat))
    found: dict[str, Any] = {"": len(wanted)}
    whole = Walk(trace, tensors, dict(zip(trace.inputs, flat, strict=True)))
    for place, node in enumerate(nodes):
        for name in begins.pop(node, ()):
            run = Walk(trace, tensors, whole.inputs, edit=masks(axes, kept[name]))
            run.values = {n: v.clone() if isinstance(v, Tensor) and n.op != "placeholder" else v for n, v in whole.values.items()}
            found[name] = float(divergence(_predictions(trace, finish(run, nodes[place:], dying)), wanted))
        if not begins:
            break
        finish(whole, [node], dying)
    return found


def _predictions(trace: Trace, made: Any) -> Tensor:
    """(predictions, classes), float32."""
    outputs = pytree.tree_unflatten(pytree.tree_leaves(made), trace.out_spec)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        logits = next((leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    if logits is None or not logits.is_floating_point() or logits.dim() < 2:
        raise ModelLimit("the model gives no logits to measure", fix="leave sensitivity out")
    return torch.as_tensor(logits).flatten(0, -2).float()
