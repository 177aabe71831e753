"""A transformers model and its groups in, which of them a config makes smaller out: in which steps, and what only together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import gcd

from transformers import PreTrainedModel

from graphprune.axes import Keep
from graphprune.budget import Budget
from graphprune.errors import ModelLimit
from graphprune.groups import Group, Groups
from graphprune.levers import alike
from graphprune.rewrite.stock import SizedDims, expressible, held, moved, obviously_expressible, sketchable, spelled

TRIED_STEPS = 8
"""How many roundings are tried to find sizes a config accepts."""

TRIED_BASES = 4
"""How many sizes are tried of which others may be multiples."""

Row = list[Group]  # the groups of equal layers


@dataclass(frozen=True, slots=True)
class Fitting:
    """Asks the config of a model. Nothing is run, and no weight is needed."""

    model: PreTrainedModel
    groups: Groups
    budget: Budget

    def clear_steps(self, kinds: Collection[str]) -> dict[str, int] | None:
        """For each kind the first multiple of which it is plain that a config accepts it; None where that is not plain of all."""
        tried = {kind: self._trials(kind) for kind in kinds}
        cuts = [[keep for _, keep in trials] for trials in tried.values()]
        places = obviously_expressible(self.model, self.groups.axes, cuts)
        return None if places is None else {kind: tried[kind][place][0] for kind, place in zip(kinds, places, strict=True)}

    def step(self, kind: str) -> int:
        """The first multiple that a config accepts, what was asked for where it accepts none."""
        tried = self._trials(kind, bases=0)
        clear = self.clear_steps([kind]) or {}
        return clear.get(kind) or next((step for step, keep in tried if not self._refused(keep)), tried[0][0])

    def obstacle(self, kind: str) -> str | None:
        """Why a config can express no smaller size of a kind, None where it can."""
        if self.clear_steps([kind]):
            return None
        obstacles = []
        for _, keep in self._trials(kind, bases=0):
            obstacle = self._refused(keep)
            if obstacle is None:
                return None
            obstacles.append(obstacle)
        return obstacles[0]

    def rows(self, kind: str) -> list[Row]:
        """The groups of a kind that may go, by equal layers."""
        return alike(group for group in self.groups if group.kind == kind and not group.touches(self.budget.protect))

    def sets(self, kinds: Collection[str], steps: Mapping[str, int] | None = None) -> list[list[Row]]:
        """Equal layers by what a config plainly makes smaller at once, all by one share: one alone, or a T5's encoder and decoder.

        What it does not is in none. Without ``steps`` for the kinds, those are tried that ``clear_steps`` tries.
        """
        tried = {kind: [steps[kind]] if steps else list(dict.fromkeys(step for step, _ in self._trials(kind))) for kind in kinds}
        sizes = held(self.model)
        places = [(row, self._places(row)) for kind in kinds for row in self.rows(kind)] if sizes else []
        named = [row for row, own in places if sizes & {row[0].size, *(size for _, _, size in own)}]
        found = [[row] for row in named if self._fits([row], tried)]
        for row in named:
            free = [(other, own) for other, own in places if not any(other in chosen for chosen in found)]
            if any(other is row for other, _ in free):
                found += islice((chosen for chosen in self._along(row, free, tried) if self._fits(chosen, tried)), 1)
        return found

    def _along(self, row: Row, rows: Sequence[tuple[Row, SizedDims]], steps: Mapping[str, Sequence[int]]) -> Iterator[list[Row]]:
        """A row with those of ``rows`` that a field moves with it, wholly or, where it takes several fields, in part."""
        mine = next(own for other, own in rows if other is row)
        for step in steps[row[0].kind]:
            for found in moved(self.model, self.groups.axes, _less(row, step)):
                if mine & found:
                    yield [other for other, own in rows if other is row or own <= found]
                    yield [other for other, own in rows if other is row or own & found]

    def _places(self, row: Row) -> SizedDims:
        """The dimensions that equal layers lie on, as ``moved`` has them."""
        tensors = self.groups.axes.tensors
        dims = [(member.name, member.dim) for member in row[0].members if member.name in tensors]
        return spelled(self.model, {(name, dim): tensors[name][dim].size for name, dim in dims})

    def _fits(self, rows: Sequence[Row], steps: Mapping[str, Sequence[int]]) -> bool:
        """Whether it is plain that a config expresses these a step smaller, all by the same share, and the others as they are."""
        least = min((row[0] for row in rows), key=lambda group: group.size)
        if any(row[0].size % least.size for row in rows):
            return False
        groups, own = list(chain.from_iterable(rows)), (step for step in steps[least.kind] if step < least.size)
        return any(sketchable(self.model, self.groups.axes, _less(groups, step, least.size)) for step in own)

    def _refused(self, keep: Keep) -> str | None:
        """Why no config expresses a cut."""
        try:
            expressible(self.model, self.groups.axes, keep)
        except ModelLimit as limit:
            return limit.what
        return None

    def _trials(self, kind: str, bases: int = TRIED_BASES) -> list[tuple[int, Keep]]:
        """Multiples of the asked rounding that divide the sizes of a kind, small ones first, each with all its groups one step
        smaller: by as many units, or, where a size divides others (one expert's that of two shared ones), those by as many times.
        """
        own = [group for group in self.groups if group.kind == kind]
        free = [group for group in own if not group.touches(self.budget.protect)]
        size = gcd(*(group.size for group in own))
        asked = self.budget.asked(kind, min(group.size for group in own))
        steps = [asked, *(step for step in range(2, size) if size % step == 0 and step % asked == 0)][:TRIED_STEPS]
        sizes = {group.size for group in free}
        divisors = [base for base in sorted(sizes) if any(other % base == 0 for other in sizes - {base})]
        return [(step, _less(free, step, base)) for base in (0, *divisors[:bases]) for step in steps]


def _less(groups: Sequence[Group], step: int, base: int = 0) -> Keep:
    """Groups a step smaller; with a ``base``, what it divides by as many steps as that goes into it."""
    steps = {group: group.size // base if base and group.size % base == 0 else 1 for group in groups}
    return {group.factor: range(group.size - step * times) for group, times in steps.items() if group.size > step * times}
