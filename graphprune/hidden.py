"""A plain model, groups and example inputs in, the groups out whose sizes the model's own code can take.

What a class computes from other sizes (``width // heads``) or writes down as a number (``reshape(b, 12, 64)``) no attribute can
change. Equal layers are tried together, the rest one after the other on top of what is known to work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

from torch import nn

from graphprune.axes import Keep
from graphprune.errors import HiddenSize
from graphprune.execute import execute, tensors_of
from graphprune.facts import Example
from graphprune.groups import Group, Groups
from graphprune.rewrite.graph import smaller
from graphprune.rewrite.module import copy_cut, emit_module
from graphprune.select import signature
from graphprune.verify import computes, leaves, same_draws


def visible(model: nn.Module, groups: Groups, example: Example, alike: bool = False) -> tuple[list[Group], list[HiddenSize]]:
    """The groups that may shrink together, equal layers ``alike`` or not, and what stands in the way of each of the others."""
    classes: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        if group.size > group.least:
            classes[signature(group)].append(group)
    fine: list[Group] = []
    obstacles = []
    for row in classes.values():
        try:
            _emit(model, groups, _cut([*fine, *row], alike), example)
            fine += row
        except HiddenSize as limit:
            obstacles.append(limit)
    return fine, obstacles


def _cut(groups: Iterable[Group], alike: bool) -> Keep:
    """About a quarter of each group gone; unless all must be alike, never of two in a row the same number of units."""
    turn = count()
    return {g.factor: range(max(g.least, g.size - max(1, g.size // 4) - (0 if alike else next(turn) % 3))) for g in groups}


def _emit(model: nn.Module, groups: Groups, keep: Keep, example: Example) -> None:
    axes = groups.axes
    tensors, inputs = tensors_of(model, axes.trace), axes.trace.flatten(example.inputs)
    cut = smaller(axes, tensors, keep)
    with same_draws():
        reference = leaves(execute(axes.trace, cut.tensors, inputs, graph=cut.graph))
    accept = partial(computes, inputs=example.inputs, reference=reference)
    emit_module(model, copy_cut(model, axes, cut.tensors), axes, keep, accept)
