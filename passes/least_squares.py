"""Least squares: let the inputs that stay speak for those that went.

For every weight W (rows, inputs) that reads a pruned group, keeping inputs S, the closed form of the layer-wise objective
min ‖Y − W′X_S‖² is ``W′ = Y·X_Sᵀ·(X_S·X_Sᵀ)⁻¹``, which for Y = WX is ``W·C[:,S]·C[S,S]⁻¹`` with C = X·Xᵀ. Here it is solved as a
correction of the sliced weight, so that damping pulls towards what is known to work rather than towards zero::

    E = Y − W_S·X_S        W′ = W_S + E·X_Sᵀ · (X_S·X_Sᵀ + λ·diag(X_S·X_Sᵀ))⁻¹

in float64, sums over batches included, λ raised tenfold while a factorisation fails. A bias that the product has is
fitted along. Unless ``damping`` says it, λ is chosen weight by weight: the one whose fit to either half of the batches (even,
odd) leaves the least error on the other, and no change where none leaves less than before. Where batches of two kinds of text
alternate, that is what carries over from each kind to the other. Three choices:

``given``  inputs ``now``, as the layers already pruned and repaired send them (sequential), or ``then``, the original's
``drift``  the share that a weight also makes up for of what the stream it adds to has lost before: 0 aims at the original's
           outputs, 1 at the original's stream
``where``  ``readers`` of pruned groups; also ``writers``, whatever adds to a stream that drifted; or ``all`` that read
           something changed

With ``drift=0, given="now"`` this is the asymmetric calibration of GPTAQ (arXiv 2504.02692) without quantisation; with
``given="then"`` the reconstruction of Kwon et al. (arXiv 2204.09656). ``even`` weighs each position by 1 / the size of its stream,
as the norm that reads the stream does; else a few huge positions are all that counts. Cost: one forward of both models.
``graphprune.compile(model, method="obs", calibration=c, passes=["least_squares"])``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from graphprune import Calibration, Groups, Plan, Pruned
from graphprune.capture import fitted
from graphprune.errors import UserMistake, nearest
from graphprune.execute import tensors_of
from graphprune.lockstep import Emitted, Reading, Site, side_by_side
from graphprune.normal import (
    BLOCK,
    add_packed,
    add_product,
    add_square,
    exchange,
    factored,
    mirror,
    multiplied,
    packed,
    substitute,
)
from graphprune.precise import precise
from graphprune.ranks import dealt, numbered, summed

Moments = tuple[Tensor, Tensor]
"""Of one half of the batches: Σ x·xᵀ (inputs, inputs) and Σ e·xᵀ (rows, inputs), e being the error to make up for."""

FEW = 0.01
"""λ where there are not two batches to choose it by."""

DAMPINGS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

CHOICES = {"given": ("now", "then"), "where": ("readers", "writers", "all")}


def least_squares(
    model: nn.Module,
    groups: Groups,
    calibration: Calibration,
    plan: Plan,
    pruned: Pruned,
    *,
    given: str = "now",
    drift: float = 1.0,
    where: str = "writers",
    even: bool = True,
    damping: float | None = None,
) -> Pruned:
    """The pruned model with repaired weights; shapes, config and the original stay as they are."""
    for option, value in (("given", given), ("where", where)):
        if value not in CHOICES[option]:
            raise UserMistake(f"{option} cannot be {value!r}", fix=nearest(value, CHOICES[option]))
    if not 0 <= drift <= 1:
        raise UserMistake(f"drift cannot be {drift}", fix="give a share between 0 and 1")
    axes, keep = groups.axes, plan.keep(groups)
    smaller = Emitted(pruned.model, axes, keep)
    batches = dealt(fitted(axes.trace, calibration.inputs))
    for site, readings in side_by_side(axes, keep, tensors_of(model, axes.trace), smaller, batches):
        if _is_due(site, where, drift, given):
            _repair(site, readings, smaller, given=given, drift=drift, even=even, damping=damping)
    return pruned


def _is_due(site: Site, where: str, drift: float, given: str) -> bool:
    """Whether a product is to be fitted: it lost inputs, or reads or adds to something that changed."""
    if site.shrunk or given == "then":
        return site.shrunk
    return (where == "all" and site.differs) or (where != "readers" and drift > 0 and site.drifts)


def _repair(
    site: Site,
    readings: Iterable[Reading],
    smaller: MutableMapping[str, Tensor],
    *,
    given: str,
    drift: float,
    even: bool,
    damping: float | None,
) -> None:
    """Replace the site's weight, and its bias, by the fitted one."""
    weight, layout = smaller[site.weight], site.product.layout
    matrix = precise(layout.matrix(weight)[0].detach())
    sums: dict[tuple[str, int], Tensor] = {}
    for place, reading in numbered(readings):
        x = reading.now if given == "now" else reading.then[:, site.kept]
        missing = reading.wanted - x @ matrix.T
        if drift and reading.drift is not None:
            missing = missing + drift * reading.drift
        if site.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        if even and reading.stream is not None:
            size = reading.stream.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
            x, missing = x / size, missing / size
        half = place % 2 if damping is None else 0
        if ("gram", half) not in sums:
            sums["cross", half] = cross = x.new_zeros(missing.shape[1], x.shape[1], dtype=torch.float64)
            sums["gram", half] = packed(cross, x.shape[1]) if half else cross.new_zeros(x.shape[1], x.shape[1])
        add_square(sums["gram", half], x)
        add_product(sums["cross", half], missing, x)
    change = _change(summed(sums), damping)
    width = len(site.kept)
    change[:, :width].add_(matrix)
    smaller[site.weight] = layout.restored(change[None, :, :width].to(weight.dtype), weight)
    if site.bias is not None:
        smaller[site.bias] = (smaller[site.bias].double() + change[:, width]).to(weight.dtype)


def _change(sums: Mapping[tuple[str, int], Tensor], damping: float | None) -> Tensor:
    """The correction that the sums over even and odd batches ask for."""
    gram, cross = mirror(sums["gram", 0]), sums["cross", 0]
    if ("gram", 1) in sums:
        return carried((gram, cross), (sums["gram", 1], sums["cross", 1]))
    return solve(gram, cross, FEW if damping is None else damping)


def carried(one: Moments, other: Moments) -> Tensor:
    """The correction from two halves together, λ being the one that serves each half best when fitted to the other; or zero.

    Of the second half Σ x·xᵀ is packed. The first half is used up.
    """
    best, least = None, 0.0
    for damping in DAMPINGS:
        error = _error(one, other, damping)
        exchange(one[0], other[0])
        error += _error((one[0], other[1]), (other[0], one[1]), damping)
        exchange(one[0], other[0])
        if error > least and best is not None:
            break
        best, least = (damping, error) if error < least else (best, least)
    return torch.zeros_like(one[1]) if best is None else solve(add_packed(one[0], other[0]), one[1].add_(other[1]), best)


def _error(own: Moments, other: Moments, damping: float) -> float:
    """How much more squared error there is in the other half with the change that one half asks for than without it."""
    total = 0.0
    with factored(own[0], damping) as factor:
        for mine, theirs in zip(torch.split(own[1], BLOCK), torch.split(other[1], BLOCK), strict=True):
            change = substitute(factor, mine.clone())
            total += float(multiplied(change, other[0]).sub_(theirs, alpha=2).mul_(change).sum())
    return total


def solve(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """``cross · (gram + λ·diag(gram))⁻¹`` (rows, inputs), float64, in place of ``cross``; λ grows until there is an inverse,
    dead inputs get zero."""
    with factored(gram, damping) as factor:
        return substitute(factor, cross)
