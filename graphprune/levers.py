"""Groups and Scores in, levers out: groups that shrink together, step by step, the lowest-scored units first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphprune.axes import Factor
from graphprune.budget import Budget, for_kind
from graphprune.groups import Group
from graphprune.score import Scores


@dataclass(frozen=True)
class Lever:
    """Groups that shrink together, step by step; ``orders`` lists each group's units from least to most important."""

    groups: tuple[Group, ...]
    orders: tuple[Tensor, ...]
    values: Tensor
    step: int
    floor: int

    @cached_property
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


def sizes_of(levers: Iterable[Lever], depths: Iterable[int]) -> dict[Factor, int]:
    """How many units each factor keeps."""
    return {group.factor: lever.kept(depth) for lever, depth in zip(levers, depths, strict=True) if depth for group in lever.groups}


def signature(group: Group) -> tuple[Any, ...]:
    """What groups of equal layers have in common: kind, size and member names but for the numbers in them."""
    return group.kind, group.size, tuple(sorted((re.sub(r"\d+", "#", m.name), m.dim, m.role) for m in group.members))


def as_levers(free: Sequence[Group], scores: Scores, budget: Budget) -> list[Lever]:
    """One lever a group, or one for all groups of equal layers where the budget wants them alike."""
    sets: dict[Any, list[Group]] = defaultdict(list)
    for group in free:
        sets[signature(group) if budget.alike else group.name].append(group)
    return [_lever(tuple(row), scores, budget) for row in sets.values()]


def _lever(groups: tuple[Group, ...], scores: Scores, budget: Budget) -> Lever:
    sorts = [torch.sort(scores[group.name], stable=True) for group in groups]
    values = torch.stack([values for values, _ in sorts]).sum(0)
    kind, step = groups[0].kind, budget.multiple(groups[0])
    step = step if step < groups[0].size else 1
    floor = max(1, for_kind(budget.minimum, kind), *(group.least for group in groups))
    return Lever(groups, tuple(order for _, order in sorts), values, step, floor)
