"""Scores and a budget in, a Plan out: which units go.

Groups that must shrink alike form one *lever*; a lever shrinks in *steps*, each taking the lowest-scored units that are left.
``local`` pulls every lever by the same share, ``global`` takes the cheapest steps (score per parameter) wherever they are,
``rank`` the lowest scores, whatever a step frees: for scores that are standardised already.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphprune.axes import Factor
from graphprune.cost import MEASURES, Measure, cost, parameter_count
from graphprune.errors import ModelLimit, UserMistake, nearest
from graphprune.groups import KINDS, Group, Groups
from graphprune.plan import Cut, Plan, fingerprint
from graphprune.score import Scores

WIDE = {4096: 64, 512: 16}
"""What kept FFN widths are multiples of unless a budget says otherwise, by the least width it is for."""

SMALLEST = 1e-9
"""A step that frees nothing, or less than a measurement can tell, is priced at this share of the whole."""

ALIASES = {"attention": ("head",), "heads": ("head",), "width": ("hidden",), "all": KINDS}


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may stay, and under which rules.

    ``keep`` is a share of the parameters of the groups of the allowed kinds, or of the whole ``model``. ``target`` takes its place:
    shares of the whole model's ``parameters``, ``bytes`` of weights, ``flops``, ``kv`` (bytes of cached keys and values) or
    ``latency`` (measured on this machine, of a forward of the traced sizes) that may stay, all of them. ``kinds`` None means
    attention heads and FFN channels where there is attention, everything otherwise. ``round_to`` makes kept sizes multiples; a
    kind it does not name gets what hardware likes, ``WIDE``, as long as that does not put the budget out of reach. ``minimum``
    bounds sizes below, ``alike`` makes equal layers shrink alike, ``protect`` names (globs, modules, tensors, groups) what must
    not change.
    """

    keep: float = 0.8
    keep_of: str = "groups"
    scope: str = "local"
    kinds: Sequence[str] | None = None
    protect: Sequence[str] = ()
    round_to: int | Mapping[str, int] | None = None
    minimum: int | Mapping[str, int] = 1
    alike: bool = False
    target: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserMistake(f"keep must be above 0 and at most 1, not {self.keep}", fix="0.8 keeps 80 %")
        scopes = ("local", "global", "rank")
        for name, value, choices in (("keep_of", self.keep_of, ("groups", "model")), ("scope", self.scope, scopes)):
            if value not in choices:
                raise UserMistake(f"{name} cannot be {value!r}", fix=nearest(value, choices))
        for name, share in self.target.items():
            if name not in MEASURES:
                raise UserMistake(f"no budget is called {name!r}", fix=nearest(name, MEASURES))
            if not 0 < share <= 1:
                raise UserMistake(f"a target of {name} must be above 0 and at most 1, not {share}", fix=f"{name}=0.8 keeps 80 %")


@dataclass(frozen=True)
class Lever:
    """Groups that shrink together, step by step; ``orders`` lists each group's units from least to most important."""

    groups: tuple[Group, ...]
    orders: tuple[Tensor, ...]
    values: Tensor
    step: int
    floor: int

    @property
    def size(self) -> int:
        """Units of each group."""
        return self.groups[0].size

    @cached_property
    def steps(self) -> int:
        """How many steps the lever can go down."""
        return max(0, (self.size - self.floor) // self.step) if self.size % self.step == 0 else self._uneven()

    def _uneven(self) -> int:
        whole = self.size // self.step * self.step
        return max(0, (whole - self.floor) // self.step + 1) if whole >= self.floor else 0

    def kept(self, steps: int) -> int:
        """Units each group keeps after ``steps``; the first step of an uneven size goes to the nearest multiple."""
        if steps == 0:
            return self.size
        top = self.size if self.size % self.step == 0 else (self.size // self.step + 1) * self.step
        return top - steps * self.step

    @cached_property
    def _running(self) -> list[float]:
        return [0.0, *self.values.cumsum(0).tolist()]

    def value(self, steps: int) -> float:
        """The summed score of what the step number ``steps`` (from 1) removes."""
        return self._running[self.size - self.kept(steps)] - self._running[self.size - self.kept(steps - 1)]


def allowed_kinds(groups: Groups, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds a budget ranges over. Raises UserMistake on a kind this model lacks."""
    present = groups.kinds
    if kinds is None:
        return tuple(kind for kind in ("head", "ffn") if kind in present) if "head" in present else tuple(present)
    asked = [kind for name in kinds for kind in ALIASES.get(name, (name,))]
    for kind in asked:
        if kind not in KINDS:
            raise UserMistake(f"no kind of group is called {kind!r}", fix=nearest(kind, [*KINDS, *ALIASES]))
    if not set(asked) & set(present):
        raise UserMistake(f"this model has no prunable {' or '.join(asked)}", fix=f"it has {', '.join(present) or 'none'}")
    return tuple(dict.fromkeys(kind for kind in asked if kind in present))


def select(groups: Groups, scores: Scores, budget: Budget) -> Plan:
    """Choose the units that go. Raises ModelLimit, saying how close it gets and what stands in the way."""
    kinds = allowed_kinds(groups, budget.kinds)
    chosen = [group for group in groups if group.kind in kinds]
    ledger = Ledger(groups, chosen, budget)
    levers = _levers(ledger.free, scores, budget)
    depths = _pull(levers, ledger, budget)
    if not ledger.allows(levers, depths) and (fine := replace(budget, round_to=_asked(budget, kinds))) != budget:
        levers = _levers(ledger.free, scores, fine)
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


def sizes_of(levers: Iterable[Lever], depths: Iterable[int]) -> dict[Factor, int]:
    """How many units each factor keeps."""
    return {group.factor: lever.kept(depth) for lever, depth in zip(levers, depths, strict=True) if depth for group in lever.groups}


# ── levers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def signature(group: Group) -> tuple[Any, ...]:
    """What groups of equal layers have in common: kind, size and member names but for the numbers in them."""
    return group.kind, group.size, tuple(sorted((re.sub(r"\d+", "#", m.name), m.dim, m.role) for m in group.members))


def _levers(free: Sequence[Group], scores: Scores, budget: Budget) -> list[Lever]:
    sets: dict[Any, list[Group]] = defaultdict(list)
    for group in free:
        sets[signature(group) if budget.alike else group.name].append(group)
    return [_lever(tuple(row), scores, budget) for row in sets.values()]


def _lever(groups: tuple[Group, ...], scores: Scores, budget: Budget) -> Lever:
    sorts = [torch.sort(scores[group.name], stable=True) for group in groups]
    values = torch.stack([values for values, _ in sorts]).sum(0)
    kind, step = groups[0].kind, _step(budget, groups[0])
    step = step if step < groups[0].size else 1
    floor = max(1, for_kind(budget.minimum, kind), *(group.least for group in groups))
    return Lever(groups, tuple(order for _, order in sorts), values, step, floor)


def for_kind(setting: int | Mapping[str, int] | None, kind: str) -> int:
    """A setting given once for all kinds or kind by kind; 1 where it is not given."""
    return setting if isinstance(setting, int) else int((setting or {}).get(kind, 1))


def _step(budget: Budget, group: Group) -> int:
    """What kept sizes of a group are multiples of."""
    if isinstance(budget.round_to, int) or group.kind in (budget.round_to or {}) or group.kind != "ffn":
        return for_kind(budget.round_to, group.kind)
    return next((multiple for least, multiple in WIDE.items() if group.size >= least), 1)


def _asked(budget: Budget, kinds: Iterable[str]) -> int | Mapping[str, int]:
    """The rounding that was asked for, none where none was."""
    return budget.round_to if isinstance(budget.round_to, int) else {kind: for_kind(budget.round_to, kind) for kind in kinds}


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
    """Undo last steps that turn out not to be needed: a coarse step may have freed more than it had to."""
    if not ledger.allows(levers, depths):
        return depths
    for place in dict.fromkeys(reversed(taken)):
        while depths[place]:
            depths[place] -= 1
            if not ledger.allows(levers, depths):
                depths[place] += 1
                break
    return depths


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plan(groups: Groups, scores: Scores, budget: Budget, levers: Sequence[Lever], depths: Sequence[int], ledger: Ledger) -> Plan:
    axes = groups.axes
    cuts = tuple(cut for lever, depth in zip(levers, depths, strict=True) if depth for cut in _cuts(lever, depth, scores))
    place = {group.name: i for i, group in enumerate(groups)}
    sizes = sizes_of(levers, depths)
    before, after = cost(axes, {}), cost(axes, sizes)
    names = ("parameters", "bytes", "flops")
    limits = [limit for limit in ledger.limits if limit.name not in names]
    return Plan(
        model=axes.trace.name,
        fingerprint=fingerprint(axes.trace),
        method=scores.method,
        options=_options(budget),
        cuts=tuple(sorted(cuts, key=lambda cut: place[cut.group])),
        cost={
            "before": {name: getattr(before, name) for name in names} | {limit.name: limit.before for limit in limits},
            "after": {name: getattr(after, name) for name in names} | {limit.name: limit.measure(sizes) for limit in limits},
        },
    )


def _cuts(lever: Lever, depth: int, scores: Scores) -> Iterator[Cut]:
    gone = lever.size - lever.kept(depth)
    for group, order in zip(lever.groups, lever.orders, strict=True):
        kept, removed = order[gone:].sort().values, order[:gone]
        row = scores[group.name]
        summary = {"kept": float(row[kept].mean()), "removed": float(row[removed].mean())}
        yield Cut(group.name, group.kind, group.size, tuple(kept.tolist()), tuple(str(m) for m in group.members), summary)


def _options(budget: Budget) -> dict[str, Any]:
    found = {setting.name: getattr(budget, setting.name) for setting in fields(budget)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
