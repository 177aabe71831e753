"""Spare the first and the last layers, as LLM-Pruner (arXiv 2305.11627) does: they carry what nothing else repeats.

A layer is found from names alone: the first number in the dotted name of any tensor of a group, ``model.layers.7.mlp…`` is layer 7.
``graphprune.compile(model, method="llm_pruner", alike=False, passes=["protect_ends:first=4:last=2"], …)``
"""

from __future__ import annotations

import re
from dataclasses import replace

from graphprune import Budget, Group, Groups
from graphprune.errors import ModelLimit


def protect_ends(groups: Groups, budget: Budget, *, first: int = 4, last: int = 2) -> Budget:
    """The budget with every group of the first and last layers among the protected names."""
    layers = {group.name: layer_of(group) for group in groups}
    count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    if count <= first + last:
        raise ModelLimit(f"{first} + {last} layers cannot be spared: the model's names show {count}", fix="spare fewer")
    spared = [name for name, layer in layers.items() if layer is not None and not first <= layer < count - last]
    return replace(budget, protect=(*budget.protect, *spared))


def layer_of(group: Group) -> int | None:
    """The layer a group lies in; None where its tensors lie in several, or in none."""
    found = {int(match[0]) for member in group.members if (match := re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", member.name))}
    return found.pop() if len(found) == 1 else None
