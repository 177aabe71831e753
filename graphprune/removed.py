"""A plan in, what it takes from each layer out: rows for each kind of group, and their labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphprune.groups import Groups
from graphprune.plan import Plan


@dataclass(frozen=True, slots=True)
class Removal:
    """In one layer, how many units of one kind are kept, of how many."""

    layer: str
    kind: str
    kept: int
    total: int

    @property
    def removed(self) -> float:
        """The removed share, 0 to 1."""
        return 1 - self.kept / self.total if self.total else 0.0


def removals(groups: Groups, plan: Plan) -> list[Removal]:
    """What a plan takes from each group, by the layer (the deepest numbered module) that the group lies in."""
    kept = {cut.group: len(cut.kept) for cut in plan.cuts}
    return [Removal(_layer(group.name), group.kind, kept.get(group.name, group.size), group.size) for group in groups]


def _layer(name: str) -> str:
    numbered = re.match(r"(?:.*\.)?\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(":")[0]


Cells = dict[str, Removal]


def grid_of(removals: Iterable[Removal]) -> dict[str, Cells]:
    """Kind → layer → removal, in order of appearance; several rows for one cell are added up."""
    grid: dict[str, Cells] = {}
    for new in removals:
        cells = grid.setdefault(new.kind, {})
        old = cells.get(new.layer, Removal(new.layer, new.kind, 0, 0))
        cells[new.layer] = Removal(new.layer, new.kind, old.kept + new.kept, old.total + new.total)
    return grid


def layers_of(grid: Mapping[str, Cells]) -> list[str]:
    """Every layer of a grid once, in order of appearance."""
    return list(dict.fromkeys(layer for cells in grid.values() for layer in cells))


def short(layers: Sequence[str]) -> list[str]:
    """Labels without the dotted prefix that all of them share."""
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    return [".".join(names[shared:]) for names in parts]


def summary(cells: Iterable[Removal]) -> str:
    """The removed share, then what is kept: “−20%  1,152 of 1,440”; empty where there are no units."""
    found = list(cells)
    kept, total = sum(cell.kept for cell in found), sum(cell.total for cell in found)
    return f"−{1 - kept / total:.0%}  {kept:,} of {total:,}" if total else ""
