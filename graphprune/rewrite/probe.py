"""A transformers model in, which number in its config moves which dimension out: every number is changed and looked at."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.errors import ModelLimit
from graphprune.rewrite.blueprint import Blueprint, Changes, Dim, Path, Sizes, as_text, dims, is_number, lookup, scalars
from graphprune.rewrite.record import check_described
from graphprune.rewrite.shallow import depths, shallower

DEEP = 4
"""Layers from which on it is worth looking at two of them first."""


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """A number in the config, and how many units each dimension gains per unit of it (none: a silent field)."""

    path: Path
    value: int | float
    unset: bool  # the config leaves it out, the model derives this value
    moves: Mapping[Dim, float]

    def __str__(self) -> str:
        return _dotted(self.path)


@dataclass(frozen=True, slots=True)
class Probe:
    """The number fields of a model's config, and the blueprint they were found on."""

    blueprint: Blueprint
    fields: tuple[Field, ...]

    def movers(self, name: str, dim: int) -> tuple[Field, ...]:
        """The fields that move this dimension of this parameter or buffer."""
        return tuple(found for found in self.fields if (name, dim) in found.moves)


@dataclass(frozen=True, slots=True)
class Few:
    """The first two layers of a stack, ``changes`` of the config away from all; ``twins`` says for each dimension of all layers
    which dimension of these two stands for it."""

    blueprint: Blueprint
    changes: Changes
    twins: Mapping[Dim, Dim]

    def goal(self, whole: Sizes) -> Sizes | None:
        """The part of a goal that two layers have; None where other layers want something else."""
        alike = all(whole.get(self.twins[dim]) == size for dim, size in whole.items())
        return {dim: size for dim, size in whole.items() if dim in self.blueprint.sizes} if alike else None


def probe(model: PreTrainedModel) -> Probe:
    """Which number in the config moves which dimension: seen on two layers where all respond alike, else seen on all."""
    described(model)
    key = _key(model)
    return _guess(*key) or _survey(*key)


def described(model: PreTrainedModel) -> tuple[Blueprint, Few | None]:
    """The blueprint of a model's config, and of two layers in place of all. Raises ModelLimit where the model looks different."""
    check_described(model.config)
    key = _key(model)
    blueprint = _blueprint(*key)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not dims(name, tensor.shape).items() <= blueprint.sizes.items():
            why = f"a {type(model).__name__} of its config has no such tensor of shape {tuple(tensor.shape)}"
            raise ModelLimit("the config does not describe the model", at=name, why=why)
    return blueprint, _few(*key)


def _key(model: PreTrainedModel) -> Any:
    return type(model), type(model.config), as_text(model.config)


@lru_cache(maxsize=32)
def _blueprint(cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], text: str) -> Blueprint:
    return Blueprint(cls, config_cls, text)


@lru_cache(maxsize=16)
def _few(cls: Any, config_cls: Any, text: str) -> Few | None:
    """The first two layers in place of all; None where there are few, several stacks, or layers that look different."""
    blueprint = _blueprint(cls, config_cls, text)
    stacks = {stack: depth for stack, depth in depths(blueprint.sizes).items() if depth >= DEEP}
    if len(stacks) != 1:
        return None
    ((stack, depth),) = stacks.items()
    layers = {dim: _layer(dim, stack) for dim in blueprint.sizes}
    twins = _twins(blueprint.sizes, stack, layers)
    wanted = {dim: size for dim, size in blueprint.sizes.items() if layers[dim] in (None, 0, 1)}
    for changes in shallower(blueprint.settings(), depth, [0, 1]) if twins else ():
        settings = blueprint.settings()
        for path, value in changes.items():
            lookup(settings, path[:-1])[path[-1]] = value
        try:
            small = _blueprint(cls, config_cls, json.dumps(settings))
        except Exception:  # noqa: BLE001  a constructor may raise anything; this depth is not to be had so
            continue
        if small.sizes == wanted and _numbered(small) == _numbered(blueprint):
            return Few(small, changes, twins)
    return None


@lru_cache(maxsize=16)
def _guess(cls: Any, config_cls: Any, text: str) -> Probe | None:
    """A survey of the first two layers, said of all; None where others respond differently.

    That all respond alike is seen on the whole model, with every number that moves a size doubled.
    """
    whole, few = _blueprint(cls, config_cls, text), _few(cls, config_cls, text)
    if few is None:
        return None
    survey = _survey(cls, config_cls, few.blueprint.text)
    moving = {found.path: 2 * found.value for found in survey.fields if found.moves and found.path not in few.changes}
    all_of_them, two = whole.response(moving), few.blueprint.response(moving)
    same = all_of_them is not None and two is not None and all_of_them == _everywhere(two, few)
    return _said_of_all(whole, survey, few) if same else None


def _everywhere(two: Sizes, few: Few) -> Sizes:
    """Sizes of two layers as those of all of them."""
    return {dim: two[twin] for dim, twin in few.twins.items() if twin in two}


def _numbered(blueprint: Blueprint) -> list[Path]:
    return [path for path, value in scalars(blueprint.settings()) if is_number(value)]


def _said_of_all(whole: Blueprint, survey: Probe, few: Few) -> Probe:
    """The fields seen on two layers, each moving in every layer what it moves in the layer's twin."""
    settings = whole.settings()
    fields = []
    for found in survey.fields:
        if found.path in few.changes:
            value = lookup(settings, found.path)
            fields.append(Field(found.path, value, found.unset, _slopes(whole, found.path, value, [{}])))
            continue
        moves = {dim: found.moves[twin] for dim, twin in few.twins.items() if twin in found.moves}
        new = {dim: slope for dim, slope in found.moves.items() if dim not in few.blueprint.sizes}
        fields.append(replace(found, moves=moves | new))
    return Probe(whole, tuple(fields))


def _layer(dim: Dim, stack: str) -> int | None:
    number, dot, _ = dim[0][len(stack) + 1 :].partition(".") if dim[0].startswith(f"{stack}.") else ("", "", "")
    return int(number) if dot and number.isdecimal() else None


def _twins(sizes: Sizes, stack: str, layers: Mapping[Dim, int | None]) -> dict[Dim, Dim]:
    """For each dimension the one of the first two layers that stands for it; nothing where a layer has the sizes of neither."""
    looks: dict[int, Sizes] = defaultdict(dict)
    for dim, layer in layers.items():
        if layer is not None:
            looks[layer][dim[0][len(f"{stack}.{layer}") :], dim[1]] = sizes[dim]
    likes = {layer: next((first for first in (0, 1) if looks[first] == look), None) for layer, look in looks.items()}
    if None in likes.values():
        return {}
    return {
        dim: dim if layer is None else (f"{stack}.{likes[layer]}{dim[0][len(f'{stack}.{layer}') :]}", dim[1])
        for dim, layer in layers.items()
    }


@lru_cache(maxsize=16)
def _survey(cls: Any, config_cls: Any, text: str) -> Probe:
    blueprint = _blueprint(cls, config_cls, text)
    settings = list(scalars(blueprint.settings()))
    blanks = [path for path, value in settings if value is None] + blueprint.asked
    unset = {path: value for path in blanks if (value := _derived(blueprint, path)) is not None}
    numbers = {path: value for path, value in settings if is_number(value)}
    bases: list[Changes] = [{}, unset] if unset and blueprint.response(unset) == {} else [{}]
    silent = _silent(blueprint, numbers)
    fields = [
        Field(path, value, path in unset, {} if path in silent else _slopes(blueprint, path, value, bases))
        for path, value in (numbers | unset).items()
    ]
    return Probe(blueprint, tuple(fields))


def _derived(blueprint: Blueprint, path: Path) -> int | None:
    """The number that an omitted setting stands for: the one that leaves every size as it is. None if there is none."""
    first, second = (blueprint.response({path: trial}) for trial in (8, 16))
    if first is None or second is None:
        return None
    for name, dim in first.keys() | second.keys():
        old = blueprint.sizes.get((name, dim), 0)
        low, high = first.get((name, dim), old), second.get((name, dim), old)
        value = round(8 + 8 * (old - low) / (high - low)) if high != low else 0
        if value > 0 and blueprint.response({path: value}) == {}:
            return value
    return None


def _silent(blueprint: Blueprint, numbers: Changes) -> set[Path]:
    """The members of lists, and the fractions, that move nothing even when all are changed at once."""
    groups: dict[Path, Changes] = {}
    for path, value in numbers.items():
        group = ("fractions",) if isinstance(value, float) else path[:-1] if isinstance(path[-1], int) else path
        groups.setdefault(group, {})[path] = 2 * value
    return {path for group in groups.values() if len(group) > 1 and blueprint.response(group) == {} for path in group}


def _slopes(blueprint: Blueprint, path: Path, value: float, bases: Sequence[Changes]) -> dict[Dim, float]:
    """What the field moves, seen from each of these equivalent bases."""
    found: dict[Dim, float] = {}
    for base in bases:
        for new in _steps(value):
            response = blueprint.response({**base, path: new})
            if response is not None:
                known = {dim: size for dim, size in response.items() if dim in blueprint.sizes or dim[1] < 0}
                found = {dim: (size - blueprint.sizes.get(dim, 0)) / (new - value) for dim, size in known.items()} | found
                break
    return found


def _steps(value: float) -> list[int | float]:
    """Values to try in place of this one; divisors and multiples are the likeliest to be valid."""
    steps = [2 * value, value / 2] if isinstance(value, float) else [2 * value, value // 2, value + 1, 3 * value]
    return [step for step in steps if step > 0]


def _dotted(path: Path) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
