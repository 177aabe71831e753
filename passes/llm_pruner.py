"""LLM-Pruner: what the loss would lose with a coupled structure, by a Taylor expansion.

Ma, Fang and Wang, "LLM-Pruner" (arXiv 2305.11627, equations 3 to 5). With g_j = ∂L_j/∂w of calibration sample j and g its mean,
one saliency an element, in the shape of the weight::

    vector   w·g                         summed over each vector (row of a producer, column of a consumer), then |·|
    first    |w·g|
    second   w²·E_j[g_j²]                E_j[g_j²] is the diagonal of the empirical Fisher, standing in for the Hessian
    mixed    |w·g − ½·w²·E_j[g_j²]|

Each member's saliencies are summed over the vectors that one unit spans (a KV head: its 64 key rows, its 64 value rows, all rows
of its queries), then the members are aggregated: sum, product, max, mean, last-only (the member executed last: o_proj, down_proj),
first-only. Axis expressions align query heads with their KV head, where the published code pairs strangers.

The paper sums the squared per-sample gradients, its code averages them, which only ``mixed`` notices: this page follows the code,
in float32, where half precision would lose the squares. ``vectors="unit"`` takes |·| after the whole unit instead of after each
vector. The published recipe is block-wise, local, layers 4 to 29 of 32:
``graphprune.compile(model, method="llm_pruner", calibration=c, alike=False, passes=[find_pass("protect_ends", first=4, last=2)])``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Scores, combine, gather_units, see_gradients
from graphprune.device import where
from graphprune.errors import UserMistake, nearest
from graphprune.gradients import one_by_one
from graphprune.ranks import dealt, summed
from graphprune.score import change, profiles

ORDERS = ("vector", "first", "second", "mixed")

Spot = tuple[str, int]
"""A weight and one of its dimensions."""


def llm_pruner(
    model: nn.Module,
    groups: Groups,
    calibration: Calibration,
    *,
    order: str = "first",
    aggregate: str = "sum",
    vectors: str = "each",
    rounds: int = 1,
) -> Scores:
    """Score units by the Taylor saliency of their weights: (units,) each, in float64.

    ``vector`` and ``second`` are sums over samples and hold no gradient; ``first`` needs the mean gradient of every weight, and
    ``mixed`` that of its square too: they hold those of one of ``rounds`` equal shares of the weights at a time.
    """
    for value, choices in ((order, ORDERS), (vectors, ("each", "unit"))):
        if value not in choices:
            raise UserMistake(f"llm_pruner knows no {value!r}", fix=nearest(value, choices))
    samples, weights = replace(calibration, inputs=tuple(one_by_one(calibration.inputs))), dict(model.named_parameters())
    spots: dict[str, set[int]] = defaultdict(set)
    for member in (member for group in groups for member in group.members if member.name in weights):
        spots[member.name].add(member.dim)
    sums: dict[Spot, Tensor] = {}
    if order in ("vector", "second"):
        sums = _summed(model, samples, spots, second=order == "second")
    else:
        for names in _shares(weights, spots, rounds):
            sums |= _of_means(model, samples, {name: spots[name] for name in names}, mixed=order == "mixed")
    found = {}
    for group in groups:
        rows = []
        for member in (member for member in group.members if member.name in weights):
            axis = groups.axes.tensors[member.name][member.dim]
            none = torch.zeros(axis.size, dtype=torch.float64, device=where(model))  # what no gradient reaches
            one = sums.get((member.name, member.dim), none)
            whole = vectors == "unit" or member.dim < 0
            rows.append(gather_units(one, axis, group.factor).abs() if whole else gather_units(one.abs(), axis, group.factor))
        found[group.name] = combine(rows, aggregate)
    return Scores(found, f"llm_pruner {order} {aggregate}")


def _summed(model: nn.Module, samples: Calibration, spots: Mapping[str, set[int]], *, second: bool) -> dict[Spot, Tensor]:
    """The mean over samples of w·g, or of its square, summed over each vector as the gradient appears."""
    sums: dict[Spot, Tensor] = {}

    def see(name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        for dim, total in profiles((weight, gradient), spots[name], _squared if second else change).items():
            sums[name, dim] = sums.get((name, dim), 0) + total / len(samples.inputs)

    see_gradients(model, dealt(samples.inputs, model), see, names=spots, loss=samples.loss)
    return summed(sums, model)


def _of_means(model: nn.Module, samples: Calibration, spots: Mapping[str, set[int]], *, mixed: bool) -> dict[Spot, Tensor]:
    """|w·g|, or |w·g − ½·w²·E[g²]|, of the mean gradient g, summed over each vector."""
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    count = len(samples.inputs)

    def see(name: str, _: nn.Parameter, gradient: Tensor) -> None:
        for held, term in ((mean, gradient / count), *([(square, gradient.abs().square() / count)] if mixed else [])):
            held[name] = held[name].add_(term) if name in held else term

    see_gradients(model, dealt(samples.inputs, model), see, names=spots, loss=samples.loss)
    mean, square = summed(mean, model), summed(square, model)
    weights: dict[str, nn.Parameter] = dict(model.named_parameters())
    sums: dict[Spot, Tensor] = {}
    for name, dims in ((name, dims) for name, dims in spots.items() if name in mean):
        terms = (weights[name], mean.pop(name), *([square.pop(name)] if mixed else []))
        sums |= {(name, dim): total for dim, total in profiles(terms, dims, _saliency).items()}
    return sums


def _saliency(w: Tensor, g: Tensor, square: Tensor | None = None) -> Tensor:
    return (change(w, g) if square is None else change(w, g) - w.abs().square() * square / 2).abs_()


def _squared(w: Tensor, g: Tensor) -> Tensor:
    return change(w, g).square_()


def _shares(weights: Mapping[str, Tensor], names: Iterable[str], count: int) -> list[list[str]]:
    """Names dealt into shares of about equally many elements."""
    shares: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(names, key=lambda name: -weights[name].numel()):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        sizes[least] += weights[name].numel()
    return [share for share in shares if share]
