"""A transformers model and the layers that stay in, the stock config with only those out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.errors import ModelLimit, UserMistake, nearest
from graphprune.rewrite.blueprint import Blueprint, Changes, Dim, Sizes, as_text, is_number, items, lookup, scalars
from graphprune.rewrite.record import check_described


def shrink_depth(model: PreTrainedModel, keep_layers: Mapping[str, Sequence[int]]) -> PreTrainedConfig:
    """The config that keeps only these layers of each stack: ``{"model.layers": [0, 2, 3]}``.

    Lists with one entry per layer keep the same entries; the kept layers are renumbered in order.
    """
    config = model.config
    check_described(config)
    for stack, keep in keep_layers.items():
        config = _without_layers(Blueprint(type(model), type(config), as_text(config)), stack, sorted(set(keep)), config)
    return config


def _without_layers(blueprint: Blueprint, stack: str, keep: list[int], like: PreTrainedConfig) -> PreTrainedConfig:
    stacks = depths(blueprint.sizes)
    if stack not in stacks:
        raise UserMistake(f"the model has no stack of layers {stack!r}", fix=nearest(stack, stacks))
    if not keep or not set(keep) <= set(range(stacks[stack])):
        raise UserMistake(f"{stack} has layers 0 to {stacks[stack] - 1}, at least one stays", why=f"asked for {keep}")
    moved = ((_renumbered(dim, stack, keep), size) for dim, size in blueprint.sizes.items())
    goal = {dim: size for dim, size in moved if dim is not None}
    for changes in shallower(blueprint.settings(), stacks[stack], keep):
        if _after(blueprint, changes) == goal:
            return blueprint.config(changes, like)
    why = f"no number {stacks[stack]} in it leaves exactly layers {keep} when it becomes {len(keep)}"
    raise ModelLimit(f"no {blueprint.config_cls.__name__} drops these layers", at=stack, why=why)


def shallower(settings: dict[str, Any], depth: int, keep: list[int]) -> Iterator[Changes]:
    """Changes that may drop layers: a number equal to the depth, the lists beside it by layer, or of layer indices."""
    for path, value in scalars(settings):
        if value != depth or not is_number(value):
            continue
        beside = lookup(settings, path[:-1])
        lists = {(*path[:-1], key): entry for key, entry in items(beside) if isinstance(entry, list) and entry}
        by_layer = {where: [entries[i] for i in keep] for where, entries in lists.items() if len(entries) == depth}
        indices = {where: _reindexed(entries, depth, keep) for where, entries in lists.items() if where not in by_layer}
        for extra in ({}, *({where: new} for where, new in indices.items() if new is not None)):
            yield {path: len(keep)} | by_layer | extra
        yield {path: len(keep)}


def _reindexed(entries: list[Any], depth: int, keep: list[int]) -> list[int] | None:
    """A list of layer indices after the renumbering; None when it is something else."""
    if not all(isinstance(entry, int) and 0 <= entry < depth for entry in entries):
        return None
    return [keep.index(entry) for entry in entries if entry in keep]


def _after(blueprint: Blueprint, changes: Changes) -> Sizes | None:
    response = blueprint.response(changes, through_file=True)
    if response is None:
        return None
    return {dim: size for dim, size in (blueprint.sizes | response).items() if response.get((dim[0], -1)) != 0}


def depths(names: Iterable[Dim]) -> dict[str, int]:
    """How many members each stack of modules has: ``{"model.layers": 30}``."""
    found: dict[str, set[int]] = {}
    for name, _ in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            found.setdefault(name[: match.start()], set()).add(int(match[1]))
    return {stack: len(members) for stack, members in found.items() if members == set(range(len(members)))}


def _renumbered(dim: Dim, stack: str, keep: list[int]) -> Dim | None:
    """Where a dimension goes when only these layers stay; None when its layer goes."""
    match = re.match(rf"{re.escape(stack)}\.(\d+)\.(.*)", dim[0])
    if match is None:
        return dim
    layer = int(match[1])
    return (f"{stack}.{keep.index(layer)}.{match[2]}", dim[1]) if layer in keep else None
