"""Scores and a budget in, a Plan out: which units go.

Groups that must shrink alike form one *lever*; a lever shrinks in *steps*, each taking the lowest-scored units that are left.
``local`` pulls every lever by the same share, ``global`` takes the cheapest steps (score per parameter) wherever they are,
``rank`` the lowest scores, whatever a step frees: for scores that are standardised already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from graphprune.budget import Budget, allowed_kinds
from graphprune.cost import COUNTED, MEASURES, Measure, cost, parameter_count
from graphprune.errors import ModelLimit, UserMistake
from graphprune.groups import Group, Groups
from graphprune.levers import Lever, as_levers, sizes_of
from graphprune.plan import Cut, Plan, fingerprint
from graphprune.score import Scores, check_scores

SMALLEST = 1e-9
"""A step that frees nothing, or less than a measurement can tell, is priced at this share of the whole."""


def select(groups: Groups, scores: Scores, budget: Budget) -> Plan:
    """Choose the units that go. Raises ModelLimit, saying how close it gets and what stands in the way."""
    kinds = allowed_kinds(groups, budget.kinds)
    check_scores((group for group in groups if group.kind in kinds), scores)
    chosen = [group for group in groups if group.kind in kinds]
    ledger = Ledger(groups, chosen, budget)
    levers = as_levers(ledger.free, scores, budget)
    depths = _pull(levers, ledger, budget)
    if not ledger.allows(levers, depths) and (fine := budget.as_asked(kinds)) != budget:
        levers = as_levers(ledger.free, scores, fine)
        depths = _pull(levers, ledger, fine)
    if not ledger.allows(levers, depths):
        raise ledger.out_of_reach(levers, depths)
    return _plan(groups, scores, budget, levers, depths, ledger)


@dataclass(frozen=True, slots=True)
class Limit:
    """A cost that may not exceed a share of what it is for the whole model."""

    name: str
    measure: Measure
    share: float
    before: float

    @property
    def most(self) -> float:
        """The largest cost that is allowed."""
        return self.share * self.before


class Ledger:
    """What a choice of depths costs, and what it may."""

    def __init__(self, groups: Groups, chosen: Sequence[Group], budget: Budget) -> None:
        self.axes = groups.axes
        self.budget = budget
        self.free = [group for group in chosen if not group.touches(budget.protect)]
        known = groups.axes.trace.parameters
        within = {member.name for group in chosen for member in group.members if member.name in known}
        if budget.target:
            asked = [(name, MEASURES[name](self.axes), share) for name, share in budget.target.items()]
        else:
            names = sorted(within) if budget.keep_of == "groups" else None
            asked = [("parameters", parameter_count(self.axes, names), budget.keep)]
        self.limits = [Limit(name, measure, share, measure({})) for name, measure, share in asked]
        if budget.target and (none := [limit.name for limit in self.limits if not limit.before]):
            raise UserMistake(f"the model has no {none[0]} to save", fix=f"a target of {', '.join(MEASURES)}, or keep=")

    def allows(self, levers: Sequence[Lever], depths: Sequence[int]) -> bool:
        """Whether no cost exceeds its limit."""
        sizes = sizes_of(levers, depths)
        return all(limit.measure(sizes) <= limit.most for limit in self.limits)

    def cost(self, levers: Sequence[Lever], depths: Sequence[int]) -> float:
        """What is left of the first cost that is limited."""
        return self.limits[0].measure(sizes_of(levers, depths))

    def out_of_reach(self, levers: Sequence[Lever], depths: Sequence[int]) -> ModelLimit:
        """The error when everything that may go has gone and it is not enough."""
        sizes = sizes_of(levers, depths)
        limit = next(limit for limit in self.limits if limit.measure(sizes) > limit.most)
        best = limit.measure(sizes) / (limit.before or 1)
        stands = [f"{len(self.budget.protect)} protected names"] if self.budget.protect else []
        stands += [f"minimum {self.budget.minimum}", f"multiples of {self.budget.round_to or 1}"]
        return ModelLimit(
            f"a budget of {limit.share:.1%} of {limit.name} is out of reach: {best:.1%} is as small as these groups get",
            why=f"{sum(1 for lever in levers for _ in lever.groups)} groups of kinds "
            f"{', '.join(sorted({lever.groups[0].kind for lever in levers})) or 'none'} may shrink; {', '.join(stands)}",
            fix="allow more kinds, protect less, or lower the minimum",
        )


# ── how far each lever goes ──────────────────────────────────────────────────────────────────────────────────────────


def _pull(levers: Sequence[Lever], ledger: Ledger, budget: Budget) -> list[int]:
    order = _by_share(levers) if budget.scope == "local" else _by_value(levers, ledger, budget)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if ledger.allows(levers, _depths(levers, order[:middle])):
            high = middle
        else:
            low = middle + 1
    depths = _depths(levers, order[:high])
    return _give_back(levers, ledger, depths, order[:high])


def _depths(levers: Sequence[Lever], taken: Iterable[int]) -> list[int]:
    depths = [0] * len(levers)
    for place in taken:
        depths[place] += 1
    return depths


def _by_share(levers: Sequence[Lever]) -> list[int]:
    """Every step of every lever, in the order of the share of its units that is gone after it."""
    steps = [
        (1 - lever.kept(step) / lever.size, lever.value(step), place)
        for place, lever in enumerate(levers)
        for step in range(1, lever.steps + 1)
    ]
    return [place for _, _, place in sorted(steps)]


def _by_value(levers: Sequence[Lever], ledger: Ledger, budget: Budget) -> list[int]:
    """Every step of every lever, cheapest first, never a later step of a lever before an earlier: score per parameter, or unit."""
    whole = ledger.cost(levers, [0] * len(levers))
    rows = []
    for place, lever in enumerate(levers):
        single = [int(other == place) for other in range(len(levers))]
        price = 1.0
        if budget.scope == "global" and lever.steps:
            price = max(SMALLEST * whole, whole - ledger.cost(levers, single)) / max(1, lever.size - lever.kept(1))
        worst = float("-inf")
        for step in range(1, lever.steps + 1):
            worst = max(worst, lever.value(step) / (price * (lever.kept(step - 1) - lever.kept(step))))
            rows.append((worst, step, place))
    return [place for _, _, place in sorted(rows)]


def _give_back(levers: Sequence[Lever], ledger: Ledger, depths: list[int], taken: Sequence[int]) -> list[int]:
    """Undo steps that turn out not to be needed, the last first: a coarse step may have freed more than it had to."""
    needed: set[int] = set() if ledger.allows(levers, depths) else set(taken)
    for place in reversed(taken):
        if place in needed:
            continue
        depths[place] -= 1
        if not ledger.allows(levers, depths):
            depths[place] += 1
            needed.add(place)
    return depths


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plan(groups: Groups, scores: Scores, budget: Budget, levers: Sequence[Lever], depths: Sequence[int], ledger: Ledger) -> Plan:
    axes = groups.axes
    cuts = tuple(cut for lever, depth in zip(levers, depths, strict=True) if depth for cut in _cuts(lever, depth, scores))
    place = {group.name: i for i, group in enumerate(groups)}
    sizes = sizes_of(levers, depths)
    before, after = cost(axes, {}), cost(axes, sizes)
    limits = [limit for limit in ledger.limits if limit.name not in COUNTED]
    return Plan(
        model=axes.trace.name,
        fingerprint=fingerprint(axes.trace),
        method=scores.method,
        options=_options(budget),
        cuts=tuple(sorted(cuts, key=lambda cut: place[cut.group])),
        cost={
            "before": asdict(before) | {limit.name: limit.before for limit in limits},
            "after": asdict(after) | {limit.name: limit.measure(sizes) for limit in limits},
        },
    )


def _cuts(lever: Lever, depth: int, scores: Scores) -> Iterator[Cut]:
    for group, order, times in zip(lever.groups, lever.orders, lever.times, strict=True):
        gone = times * (lever.size - lever.kept(depth))
        kept, removed = order[gone:].sort().values, order[:gone]
        row = scores[group.name]
        summary = {"kept": float(row[kept].mean()), "removed": float(row[removed].mean())}
        yield Cut(group.name, group.kind, group.size, tuple(kept.tolist()), tuple(str(m) for m in group.members), summary)


def _options(budget: Budget) -> dict[str, Any]:
    found = {setting.name: getattr(budget, setting.name) for setting in fields(budget)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
