"""A plain model, groups and example inputs in, the groups out whose sizes the model's own code can take.

What a class computes from other sizes (``width // heads``) or writes down as a number (``reshape(b, 12, 64)``) no attribute can
change. Equal layers are tried together, the rest one after the other on top of what is known to work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.axes import Factor, Keep
from graphprune.errors import HiddenSize
from graphprune.execute import tensors_of
from graphprune.facts import Example
from graphprune.groups import Group, Groups
from graphprune.levers import signature
from graphprune.rewrite.graph import smaller
from graphprune.rewrite.module import copy_cut, emit_module
from graphprune.verify import computes, reference


@dataclass(frozen=True, slots=True)
class Visible:
    """The groups that may shrink together, whether equal layers must be ``alike`` for that, and what stands in others' way."""

    groups: tuple[Group, ...]
    alike: bool
    obstacles: tuple[HiddenSize, ...]


def visible(model: nn.Module, groups: Groups, example: Example, alike: bool = False) -> Visible:
    """Try each class of equal layers on top of those that are known to work, where need be with all of its layers alike."""
    classes: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        if group.size > group.least:
            classes[signature(group)].append(group)
    fine: dict[Factor, range] = {}
    obstacles = []
    for number, row in enumerate(classes.values()):
        for even in (True,) if alike else (False, True)[: len(row)]:
            cut = _cut(row, number % 2, even)
            try:
                _emit(model, groups, fine | cut, example)
                fine, alike = fine | cut, even
                break
            except HiddenSize as limit:
                obstacles.append(limit)
    return Visible(tuple(group for group in groups if group.factor in fine), alike, tuple(obstacles))


def _cut(row: Sequence[Group], more: int, alike: bool) -> dict[Factor, range]:
    """About a quarter of each group and some ``more`` gone; unless equal layers are alike, none of every other group."""
    kept = {g.factor: range(max(g.least, g.size - max(1, g.size // 4) - more)) for g in row}
    whole = set() if alike else {group.factor for group in row[1::2]}
    return {factor: range(factor.size) if factor in whole else units for factor, units in kept.items()}


def _emit(model: nn.Module, groups: Groups, keep: Keep, example: Example) -> None:
    axes = groups.axes
    tensors, inputs = tensors_of(model, axes.trace), axes.trace.flatten(example.inputs)
    cut = smaller(axes, tensors, keep)
    wanted = reference(axes.trace, cut.tensors, inputs, cut.graph)

    def accept(emitted: nn.Module, guessed: bool) -> bool:
        return computes(emitted, example.inputs, wanted)

    emit_module(model, copy_cut(model, axes, cut.tensors), axes, keep, accept)
