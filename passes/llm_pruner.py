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

import torch
from torch import Tensor, nn

from graphprune import Axes, Calibration, Groups, Scores, combine, gather_units, see_gradients, to_units
from graphprune.axes import Factor
from graphprune.capture import one_by_one
from graphprune.errors import UserMistake, nearest

ORDERS = ("vector", "first", "second", "mixed")


def llm_pruner(
    model: nn.Module,
    groups: Groups,
    calibration: Calibration,
    *,
    order: str = "first",
    aggregate: str = "sum",
    vectors: str = "each",
) -> Scores:
    """Score units by the Taylor saliency of their weights: (units,) each, in float64. Holds one or two gradients a weight."""
    for value, choices in ((order, ORDERS), (vectors, ("each", "unit"))):
        if value not in choices:
            raise UserMistake(f"llm_pruner knows no {value!r}", fix=nearest(value, choices))
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = {member.name for group in groups for member in group.members} & set(weights)
    mean, square = _gradients(model, calibration, names, squares=order in ("second", "mixed"))
    saliency = {name: _saliency(order, weights[name].detach(), mean[name], square.get(name)) for name in mean}
    found = {}
    for group in groups:
        spots = [(member.name, member.dim) for member in group.members if member.name in saliency]
        rows = [_units(saliency[name], groups.axes, name, dim, group.factor, vectors) for name, dim in spots]
        found[group.name] = combine(rows, aggregate)
    return Scores(found, f"llm_pruner {order} {aggregate}")


def _gradients(
    model: nn.Module, calibration: Calibration, names: set[str], *, squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean over samples of the gradient, and of its square where wanted: float32, in the shape of each weight."""
    samples = list(one_by_one(calibration.inputs))
    mean: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    square: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def see(name: str, _: nn.Parameter, gradient: Tensor) -> None:
        here = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        mean[name] = mean[name].to(here) + here / len(samples)
        if squares:
            square[name] = square[name].to(here) + here.square() / len(samples)

    see_gradients(model, samples, see, names=names)
    return dict(mean), dict(square)


def _saliency(order: str, weight: Tensor, mean: Tensor, square: Tensor | None) -> Tensor:
    first = weight.to(mean) * mean
    if square is None:
        return first if order == "vector" else first.abs()
    second = weight.to(square).square() * square
    return second if order == "second" else (first - second / 2).abs()


def _units(saliency: Tensor, axes: Axes, name: str, dim: int, factor: Factor, vectors: str) -> Tensor:
    """Vector sums, their absolute values, and those summed into units; saliencies of the other orders are positive anyway.

    A whole tensor, of a layer, is one vector.
    """
    if vectors == "unit" or dim < 0:
        return to_units(saliency, axes.tensors[name], dim, factor).abs()
    sums = saliency.movedim(dim, 0).reshape(saliency.shape[dim], -1).sum(1, dtype=torch.float64)
    return gather_units(sums.abs(), axes.tensors[name][dim], factor)
