"""Groups and elementwise saliencies in, Scores out: one number a unit, however many tensors the unit spans.

A criterion says how much each *element* of a tensor matters. Reducing that to units is the same for all criteria: sum over
everything that is not the factor, as the axis expressions lay it out. That is also what keeps grouped-query scores aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.axes import Axis, Factor
from graphprune.errors import UserMistake, nearest
from graphprune.groups import Group, Groups
from graphprune.ranks import completed, own

Criterion = Callable[[str], Tensor | None]
"""The elementwise saliency of a tensor by name, in the tensor's shape; None for a tensor that has none."""


Each = Callable[[Tensor], Tensor]
"""An elementwise function of a block of a tensor."""

BLOCK = 1 << 17
"""Elements of a block: few enough to stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each unit of each group matters: float64 tensors of shape (units,), by group name. Low goes first."""

    units: Mapping[str, Tensor]
    method: str

    def __getitem__(self, group: str) -> Tensor:
        return self.units[group]


def to_units(saliency: Tensor, axes: Sequence[Axis], dim: int, factor: Factor, each: Each | None = None) -> Tensor:
    """Sum an elementwise saliency over everything but ``factor`` on dimension ``dim``: shape (units,), float64.

    ``saliency`` has the shape that ``axes`` describe; ``each`` is applied to it first, block by block. A factor that occurs
    twice on the dimension (``r + r``) collects both.
    """
    return gather_units(profile(saliency, dim, each), axes[dim], factor)


def profile(tensor: Tensor, dim: int, each: Each | None = None) -> Tensor:
    """``each`` of a tensor summed over all dimensions but one, with no second tensor of its size: (size of ``dim``,), float64.

    Blocks are summed in float32 or better, and the blocks in float64. A ``dim`` below 0 is none: (1,). Of a tensor that is
    spread over ranks each looks at its part.
    """
    return completed(_sums(own(tensor), dim, each), tensor, dim)


def _sums(tensor: Tensor, dim: int, each: Each | None) -> Tensor:
    if each is None:
        if dim < 0:
            return tensor.sum(dtype=torch.float64).reshape(1)
        rows = tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
        return rows.sum(1, dtype=torch.float64)
    total = torch.zeros(tensor.shape[dim] if dim >= 0 else 1, dtype=torch.float64, device=tensor.device)
    step = max(1, BLOCK // max(1, tensor[:1].numel()))
    others = [other for other in range(tensor.ndim) if other != dim]
    for start in range(0, len(tensor), step):
        block = each(tensor[start : start + step])
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        summed = block.sum(others) if others else block
        (total[start : start + step] if dim == 0 else total).add_(summed)
    return total


def gather_units(profile: Tensor, axis: Axis, factor: Factor) -> Tensor:
    """Sum a vector over an axis into the units of one of its factors: (axis size,) → (units,)."""
    if axis.segments == ((factor,),):
        return profile.double()
    total = profile.new_zeros(factor.size, dtype=torch.float64)
    for column in axis.units(factor):
        index = torch.tensor(column, device=profile.device)
        on = index >= 0
        total.index_add_(0, index[on], profile[on].double())
    return total


# ── aggregators ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _product(members: Tensor) -> Tensor:
    """Log space: the order of the product without its overflow."""
    return members.clamp_min(torch.finfo(torch.float64).tiny).log().sum(0)


AGGREGATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda members: members.sum(0),
    "product": _product,
    "max": lambda members: members.amax(0),
    "mean": lambda members: members.mean(0),
    "last-only": lambda members: members[-1],
    "first-only": lambda members: members[0],
}
"""(members, units) in execution order → (units,). ``product`` gives the logarithm of the product."""


def combine(members: Sequence[Tensor], how: str) -> Tensor:
    """Reduce the members' unit scores to the group's. Raises UserMistake on an unknown aggregator."""
    if how not in AGGREGATORS:
        raise UserMistake(f"no aggregator is called {how!r}", fix=nearest(how, AGGREGATORS))
    return AGGREGATORS[how](torch.stack(list(members)))


def score(
    groups: Groups | Iterable[Group],
    axes: Mapping[str, Sequence[Axis]],
    criterion: Criterion,
    *,
    method: str,
    how: str = "sum",
    each: Each | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score every group by an elementwise criterion.

    ``each`` is applied to what the criterion gives, block by block: a function of the weight alone needs no second tensor of
    its size. ``after`` is applied to each member's unit sums before they are aggregated: ``torch.abs`` there makes a criterion
    vector-wise. Members without saliency (buffers) do not count.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        rows = []
        for member in group.members:
            saliency = criterion(member.name)
            if saliency is not None:
                units = to_units(saliency, axes[member.name], member.dim, group.factor, each)
                rows.append(units if after is None else after(units))
        found[group.name] = combine(rows, how) if rows else torch.zeros(group.size, dtype=torch.float64)
    return Scores(found, method)
