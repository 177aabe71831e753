"""Newton step: the gains of the norms, and the biases, moved to where the curvature of the loss puts its minimum.

After a cut and its repair the vectors of a model are few and touch everything: for them one step of natural gradient (Amari, Neural
Computation 10, 1998) with the diagonal of the Fisher information can be had from one pass over the text. Tuning only them after
compression is the idea of Norm Tweaking (Li et al., arXiv 2309.02784), which does it layer by layer with many small steps. With
G_s the gradient (numbers,) of the mean loss of sequence s, T its predictions, g the mean of G_s over sequences and λ ``damping``::

    F = T · var_s(G_s)        d = −g / (F + λ · mean(F of the vector))        η = −g·d / (T · var_s(G_s·d))        w′ = w + η · d

d is blind to how the vectors work together; η is the minimum along d with that in it. Since sequences differ by more than chance,
F is too large and η too short: the step is doubled as long as that lowers the loss of four sequences that d did not come from,
halved until it does, left out where nothing does. Only given text is read: what the model wrote itself it already predicts. Cost:
one forward and backward pass without gradients of matrices, and some forward passes of the four.
``graphprune.compile(model, method="obs", calibration=c, passes=["least_squares", "newton"])``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphprune import Calibration, Pruned, see_gradients
from graphprune.disk import put
from graphprune.errors import UserMistake
from graphprune.facts import Notes
from graphprune.gradients import language_loss, one_by_one
from graphprune.ranks import dealt, summed, whole
from graphprune.rewrite.graph import PrunedGraph
from graphprune.written import inference

TRIED = 4
"""Sequences on which lengths are tried."""

FEWEST = 12
"""Other sequences below which a variance over them says too little."""

LONGER, SHORTER = (1.0, 2.0, 4.0, 8.0, 16.0), (0.5, 0.25, 0.125)

Rows = Sequence[Mapping[str, Any]]


def newton(pruned: Pruned, calibration: Calibration, notes: Notes, *, steps: int = 1, damping: float = 0.1) -> Pruned:
    """The pruned model with other gains and biases. The text is shared out over the ``steps``, 12 sequences each at the least.

    Of a graph that takes batches as traced only, a batch counts as one sequence.
    Less text than one step takes changes nothing, which the notes say. Raises UserMistake unless ``steps ≥ 1, damping ≥ 0``,
    ModelLimit where no loss is known.
    """
    if steps < 1 or damping < 0:
        raise UserMistake(f"steps={steps}, damping={damping} cannot be", fix="steps=1, damping=0.1")
    in_batches = isinstance(pruned.model, PrunedGraph) and not pruned.model.takes_one
    rows = list(calibration.given if in_batches else one_by_one(calibration.given))
    tried, others = rows[:TRIED], rows[TRIED:]
    steps = min(steps, len(others) // FEWEST)
    if not steps:
        notes.lines.append(f"no newton step: {len(rows)} sequences of given text are too few, {TRIED + FEWEST} would do")
        return pruned
    loss = _loss(pruned.model, tried)
    for step in range(steps):
        loss = _step(pruned.model, others[step::steps], damping, tried, loss)
    return pruned


def _step(model: nn.Module, rows: Rows, damping: float, tried: Rows, least: float) -> float:
    """One step, as long as serves the rows ``tried``, whose loss is the ``least`` so far; their loss after it."""
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point()}
    gradients: dict[str, list[Tensor]] = defaultdict(list)

    def see(name: str, _: nn.Parameter, gradient: Tensor) -> None:
        gradients[name].append(whole(gradient).double())

    see_gradients(model, dealt(rows, model), see, names=vectors)
    found = {name: torch.stack(each) for name, each in gradients.items()}
    before, along = {name: whole(vectors[name]).double() for name in found}, _direction(found, damping, model)
    size = _size(found, along, sum(map(_predictions, rows)) / len(rows), model)

    def moved(length: float) -> nn.Module:
        for name, d in along.items():
            put(vectors[name], before[name] + length * size * d)
        return model

    best = 0.0
    for length in LONGER:
        if not (loss := _loss(moved(length), tried)) < least:
            break
        best, least = length, loss
    for length in SHORTER if not best else ():
        if (loss := _loss(moved(length), tried)) < least:
            best, least = length, loss
            break
    moved(best)
    return least


def _direction(found: Mapping[str, Tensor], damping: float, model: nn.Module) -> dict[str, Tensor]:
    """d times the predictions of a sequence, from gradients (sequences, numbers) by name."""
    moments = {name: _moments(each, model) for name, each in found.items()}
    return {name: -mean / (spread + damping * spread.mean()).clamp_min(1e-300) for name, (mean, spread) in moments.items()}


def _size(found: Mapping[str, Tensor], along: Mapping[str, Tensor], predictions: float, model: nn.Module) -> float:
    """η over the predictions of a sequence."""
    slope, spread = _moments(torch.stack([found[name] @ d for name, d in along.items()]).sum(0)[:, None], model)
    return float(-slope / (predictions * spread)) if spread > 0 else 0.0


def _moments(each: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and variance over the sequences of all ranks; ``each`` is (sequences, numbers)."""
    ones = each.new_ones(1, each.shape[1]) * len(each)
    count, total, square = summed({"": torch.cat([ones, each.sum(0)[None], each.square().sum(0)[None]])}, model)[""]
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0) * count / (count - 1)


def _predictions(inputs: Mapping[str, Any]) -> int:
    """How many predictions the loss of one sequence is the mean of."""
    labels = inputs.get("labels")
    return inputs["input_ids"][:, 1:].numel() if labels is None else int((labels != -100).sum())


def _loss(model: nn.Module, rows: Rows) -> float:
    with inference(model):
        return sum(float(language_loss(model, row)) for row in rows)
