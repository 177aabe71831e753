"""Groups and elementwise saliencies in, Scores out: one number a unit, however many tensors the unit spans.

A criterion says how much each *element* of a tensor matters. Reducing that to units is the same for all criteria: sum over
everything that is not the factor, as the axis expressions lay it out. That is also what keeps grouped-query scores aligned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from graphprune.axes import Axis, Factor, UnitAxis
from graphprune.disk import OnDisk, rows, threads
from graphprune.errors import UserMistake, nearest
from graphprune.groups import Group, Groups
from graphprune.precise import precise
from graphprune.ranks import completed, own

Criterion = Callable[[str], Tensor | None]
"""The elementwise saliency of a tensor by name, in the tensor's shape; None for a tensor that has none."""


Each = Callable[..., Tensor]
"""An elementwise function of a block of a tensor, or of the same block of several tensors of one shape."""

BLOCK = 1 << 20
"""Bytes of a block: few enough to stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each unit of each group matters: float64 tensors of shape (units,), by group name. Low goes first."""

    units: Mapping[str, Tensor]
    method: str

    def __getitem__(self, group: str) -> Tensor:
        return self.units[group]


def check_scores(groups: Iterable[Group], scores: Scores) -> None:
    """Raise UserMistake unless every group has one number for each of its units; infinite ones will do."""
    for group in groups:
        units = scores.units.get(group.name)
        if not isinstance(units, Tensor) or units.shape != (group.size,) or not units.is_floating_point():
            found = f"{tuple(units.shape)} of {units.dtype}" if isinstance(units, Tensor) else type(units).__name__
            why = "there are none" if units is None else f"they are {found}"
            raise UserMistake(
                f"{scores.method} does not score {group.name}", why=why, fix=f"a float tensor of shape ({group.size},)"
            )
        if nameless := int(units.isnan().sum()):
            what = f"{scores.method} gives {nameless} of {group.size} units of {group.name} no number (nan)"
            raise UserMistake(what, why="what it looks at is not finite", fix="load the model in float32, or mend the criterion")


def to_units(
    saliency: Tensor | Sequence[Tensor], axes: Sequence[Axis], dim: int, factor: Factor, each: Each = Tensor.double
) -> Tensor:
    """Sum an elementwise saliency over everything but ``factor`` on dimension ``dim``: shape (units,), float64.

    ``saliency`` has the shape that ``axes`` describe; ``each`` is applied to it first, block by block, as ``profile`` has it. A
    factor that occurs twice on the dimension (``r + r``) collects both.
    """
    return gather_units(profile(saliency, dim, each), axes[dim], factor)


def profile(tensors: Tensor | Sequence[Tensor], dim: int, each: Each = Tensor.double) -> Tensor:
    """``each`` of a tensor summed over all dimensions but one, with no second tensor of its size: (size of ``dim``,), float64.

    Of several tensors of one shape, a weight and its gradient say, ``each`` is given the same block. Blocks are summed in float32
    or better, and the blocks in float64. A ``dim`` below 0 is none: (1,). Of what is spread over ranks each looks at its part.
    """
    return profiles(tensors, (dim,), each)[dim]


def profiles(tensors: Tensor | Sequence[Tensor], dims: Iterable[int], each: Each = Tensor.double) -> dict[int, Tensor]:
    """The profiles of several dimensions, of one look at the tensors."""
    several = (tensors,) if isinstance(tensors, Tensor) else tensors
    return {dim: completed(found, several[0], dim) for dim, found in _sums([*map(own, several)], tuple(dims), each).items()}


@torch.no_grad()
def _sums(tensors: Sequence[Tensor], dims: Sequence[int], each: Each) -> dict[int, Tensor]:
    tensors = [tensor if tensor.ndim else tensor[None] for tensor in tensors]
    first = tensors[0]
    totals = {d: torch.zeros(first.shape[d] if d >= 0 else 1, dtype=torch.float64, device=first.device) for d in dims}
    if first.ndim > 2 and first.nbytes > BLOCK * len(first):
        return _row_by_row(tensors, totals, each)
    step = max(1, BLOCK * len(first) // max(1, first.nbytes))
    for start in range(0, len(first), step):
        block = each(*(rows(tensor, start, start + step) for tensor in tensors))
        block = precise(block)
        for dim, total in totals.items():
            others = [other for other in range(first.ndim) if other != dim]
            (total[start : start + step] if dim == 0 else total).add_(block.sum(others) if others else block)
    return totals


def _row_by_row(tensors: Sequence[Tensor], totals: dict[int, Tensor], each: Each) -> dict[int, Tensor]:
    """The same of a stack of matrices, of which one is more than a block."""
    inner = sorted({max(dim - 1, -1) for dim in totals})
    for row in range(len(tensors[0])):
        sums = _sums([rows(tensor, row, row + 1)[0] for tensor in tensors], inner, each)
        for dim, total in totals.items():
            (total[row : row + 1] if dim == 0 else total).add_(sums[max(dim - 1, -1)])
    return totals


def gather_units(profile: Tensor, axis: Axis, factor: Factor) -> Tensor:
    """Sum a vector over an axis into the units of one of its factors: (axis size,) → (units,)."""
    if len(profile) != axis.size:
        raise UserMistake(f"a profile of {len(profile)} numbers for an axis of {axis.size}")
    if factor not in axis.factors:
        raise UserMistake("this axis has no such factor", why=f"it is {axis}", fix="that of a group's member on this dimension")
    if axis.segments == ((factor,),):
        return profile.double()
    total = profile.new_zeros(factor.size, dtype=torch.float64)
    if isinstance(axis, UnitAxis) and axis.factor == factor:
        total[axis.unit] = profile.sum()
    start = 0
    for product in axis.segments:
        sizes = [item.size for item in product]
        part, start = profile[start : start + prod(sizes)], start + prod(sizes)
        for place, item in enumerate(product):
            if item == factor or (isinstance(item, Axis) and factor in item.factors):
                own = part.reshape(-1, item.size, prod(sizes[place + 1 :])).sum((0, 2), dtype=torch.float64)
                total += gather_units(own, item, factor) if isinstance(item, Axis) else own
    return total


def change(weight: Tensor, gradient: Tensor) -> Tensor:
    """w·g, what zeroing each number does to the loss to first order; of complex numbers, which go as one, Re(w·ḡ)."""
    return (weight * gradient.conj()).real if weight.is_complex() else weight * gradient


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
    groups: Groups | Sequence[Group],
    axes: Mapping[str, Sequence[Axis]],
    criterion: Criterion,
    *,
    method: str,
    how: str = "sum",
    each: Each = Tensor.double,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score every group by an elementwise criterion.

    Every tensor is asked for once. ``each`` is applied to what the criterion gives, block by block, of weights in files in several
    threads: a function of the weight alone needs no second tensor of its size. ``after`` is applied to each member's unit sums
    before they are aggregated: ``torch.abs`` there makes a criterion vector-wise. Members without saliency (buffers) do not count,
    and a group that has no other is the last to go.
    """
    wanted: dict[str, dict[int, None]] = defaultdict(dict)
    for group in groups:
        for member in group.members:
            wanted[member.name][member.dim] = None

    def shaped(name: str) -> Tensor | None:
        saliency, shape = criterion(name), tuple(axis.size for axis in axes[name] if not isinstance(axis, UnitAxis))
        if saliency is not None and tuple(saliency.shape) != shape:
            what = f"{method} gives {name} a saliency of shape {tuple(saliency.shape)}"
            raise UserMistake(what, why=f"the tensor is {shape}", fix="one number for each of its elements")
        return saliency

    sums = _sums_of(wanted, shaped, each)
    found: dict[str, Tensor] = {}
    for group in groups:
        members = []
        for member in group.members:
            if member.name in sums:
                units = gather_units(sums[member.name][member.dim], axes[member.name][member.dim], group.factor)
                members.append(units if after is None else after(units))
        found[group.name] = combine(members, how) if members else torch.full((group.size,), float("inf"), dtype=torch.float64)
    return Scores(found, method)


def _sums_of(wanted: Mapping[str, Iterable[int]], criterion: Criterion, each: Each) -> dict[str, dict[int, Tensor]]:
    """The profiles of every tensor that has a saliency; what lies in files is read by several threads."""
    found: dict[str, dict[int, Tensor]] = {}
    with threads() as readers:
        read = {}
        for name, dims in wanted.items():
            saliency = criterion(name)
            if isinstance(saliency, OnDisk):
                read[name] = readers.submit(profiles, saliency, dims, each)
            elif saliency is not None:
                found[name] = profiles(saliency, dims, each)
        return found | {name: done.result() for name, done in read.items()}
