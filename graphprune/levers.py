"""Groups and Scores in, levers out: groups that shrink together, step by step, the lowest-scored units first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor

from graphprune.axes import Factor
from graphprune.budget import Budget, for_kind
from graphprune.errors import UserMistake
from graphprune.groups import Group
from graphprune.patterns import unnumbered
from graphprune.score import Scores


@dataclass(frozen=True)
class Lever:
    """Groups that shrink together, step by step, all by the same share; ``orders`` lists each group's units from least to most
    important. Steps, ``values`` and ``floor`` count the units of the smallest group; another's are ``times`` as many."""

    groups: tuple[Group, ...]
    orders: tuple[Tensor, ...]
    values: Tensor
    step: int
    floor: int

    @cached_property
    def size(self) -> int:
        """Units of the smallest group."""
        return min(group.size for group in self.groups)

    @cached_property
    def times(self) -> tuple[int, ...]:
        """How many units of each group stand for one."""
        return tuple(group.size // self.size for group in self.groups)

    @cached_property
    def steps(self) -> int:
        """How many steps the lever can go down."""
        return max(0, (self.size - self.floor) // self.step) if self.size % self.step == 0 else self._uneven()

    def _uneven(self) -> int:
        whole = self.size // self.step * self.step
        return max(0, (whole - self.floor) // self.step + 1) if whole >= self.floor else 0

    def kept(self, steps: int) -> int:
        """Units that stay after ``steps``; the first step of an uneven size goes to the nearest multiple."""
        if steps == 0:
            return self.size
        top = self.size if self.size % self.step == 0 else (self.size // self.step + 1) * self.step
        return top - steps * self.step

    @cached_property
    def _scores(self) -> list[float]:
        found: list[float] = self.values.tolist()
        return found

    def value(self, steps: int) -> float:
        """The summed score of what the step number ``steps`` (from 1) removes, infinite scores among it or not."""
        return sum(self._scores[self.size - self.kept(steps - 1) : self.size - self.kept(steps)])


def sizes_of(levers: Iterable[Lever], depths: Iterable[int]) -> dict[Factor, int]:
    """How many units each factor keeps."""
    return {
        group.factor: times * lever.kept(depth)
        for lever, depth in zip(levers, depths, strict=True) if depth
        for group, times in zip(lever.groups, lever.times, strict=True)
    }  # fmt: skip


def signature(group: Group) -> tuple[Any, ...]:
    """What groups of equal layers have in common: kind, size and member names but for the numbers in them."""
    return group.kind, group.size, tuple(sorted((unnumbered(m.name), m.dim, m.role) for m in group.members))


def as_levers(free: Sequence[Group], scores: Scores, budget: Budget) -> list[Lever]:
    """One lever a group, or one for all groups of equal layers, and of others that go with them, where the budget wants it so."""
    equal = alike(free) if budget.alike else [[group] for group in free]
    place = {name: -number for number, names in enumerate(budget.together, 1) for name in names}
    sets: dict[int, list[Group]] = defaultdict(list)
    for number, row in enumerate(equal):
        sets[next((place[group.name] for group in row if group.name in place), number)] += row
    return [_lever(tuple(row), scores, budget) for row in sets.values()]


def alike(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups of equal layers, set by set."""
    sets: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        sets[signature(group)].append(group)
    return list(sets.values())


def _lever(groups: tuple[Group, ...], scores: Scores, budget: Budget) -> Lever:
    size = min(group.size for group in groups)
    times = [group.size // size for group in groups]
    if any(group.size % size for group in groups):
        raise UserMistake(f"{', '.join(f'{group.name} ({group.size})' for group in groups)} cannot shrink by one share")
    sorts = [torch.sort(scores[group.name], stable=True) for group in groups]
    values = torch.stack([values.reshape(size, -1).sum(1) for values, _ in sorts]).sum(0)
    multiples = [budget.multiple(group) for group in groups]
    step = lcm(*(multiple // gcd(multiple, count) for multiple, count in zip(multiples, times, strict=True)))
    least = [max(1, for_kind(budget.minimum, group.kind), group.least) for group in groups]
    floor = max(-(-bound // count) for bound, count in zip(least, times, strict=True))
    return Lever(groups, tuple(order for _, order in sorts), values, step, floor)
