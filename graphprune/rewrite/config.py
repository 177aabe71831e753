"""A transformers model and the sizes it should get → a stock config whose model has exactly those sizes.

No architecture and no field is named here: which field moves which dimension is found by building the model class on
the meta device with that field changed. No answer is trusted: each is saved, reloaded, built and compared.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import chain, islice
from logging import CRITICAL
from operator import getitem
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import networkx as nx
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from graphprune.errors import ModelLimit, UserMistake, nearest

Path = tuple[str | int, ...]  # where a setting stands in the config: ("text_config", "hidden_size"), ("depths", 2)
Dim = tuple[str, int]  # a tensor's name and dimension; dimension -1 stands for the tensor's existence
Sizes = dict[Dim, int]
Changes = dict[Path, Any]
Choice = tuple[int, Changes]  # new values, and how many fields that changes (one that no hint names counts thrice)
Model = TypeVar("Model", bound=PreTrainedModel)

LIMIT = 256  # assignments tried before giving up
APART = "keep this size whole, or save with per-layer sizes"
ALIKE = "let the layers shrink alike, or save with per-layer sizes"
VALID = "choose numbers that the config accepts, or save with per-layer sizes"


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


def build_meta(cls: type[Model], config: PreTrainedConfig) -> Model:
    """``cls`` built from a copy of ``config`` on the meta device: names, shapes, dtypes and ties, no memory."""
    with _quiet(), torch.device("meta"), no_init_weights():
        model: Model = cls._from_config(deepcopy(config))  # type: ignore[no-untyped-call]
        model.tie_weights()
    return model


def probe(model: PreTrainedModel) -> Probe:
    """Which number in the config moves which dimension; computed once per config."""
    found = _survey(type(model), type(model.config), _text(model.config))  # type: ignore[arg-type]
    for name, tensor in model.state_dict().items():
        if not _dims(name, tensor.shape).items() <= found.blueprint.sizes.items():
            why = f"a {type(model).__name__} of its config has no such tensor of shape {tuple(tensor.shape)}"
            raise ModelLimit("the config does not describe the model", at=name, why=why)
    return found


def candidates(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[int, Sequence[int]]
) -> Iterator[PreTrainedConfig]:
    """Every config whose model has the target ``shapes``, fewest fields changed first.

    ``shapes`` names tensors of the state dict (unsaved buffers may be named too); what it leaves out is free.
    ``numbers`` maps an old number to its possible new ones: hints, and the only values for fields that move no shape.
    Raises ModelLimit, with the dimension in the way, when there is no such config.
    """
    found = probe(model)
    search = Search(found, _goal(found.blueprint.sizes, shapes), numbers)
    if obstacle := search.obstacle(certain=True):
        raise obstacle
    reached = False
    for changes in search.reached():
        reached = True
        yield found.blueprint.config(changes, like=model.config)
    if not reached:
        raise search.obstacle(certain=False) or search.exhausted()


def fit(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[int, Sequence[int]],
    accept: Callable[[PreTrainedConfig], bool] | None = None,
) -> PreTrainedConfig:
    """The first of ``candidates`` that ``accept`` takes; without it, the first."""
    refused = 0
    for config in candidates(model, shapes, numbers):
        if accept is None or accept(config):
            return config
        refused += 1
    raise ModelLimit(f"{refused} stock configs have these sizes, but none computes the same as the pruned model")


def shrink_depth(model: PreTrainedModel, keep_layers: Mapping[str, Sequence[int]]) -> PreTrainedConfig:
    """The config that keeps only these layers of each stack: ``{"model.layers": [0, 2, 3]}``.

    Lists with one entry per layer keep the same entries; the kept layers are renumbered in order.
    """
    config = model.config
    for stack, keep in keep_layers.items():
        config = _without_layers(Blueprint(type(model), type(config), _text(config)), stack, sorted(set(keep)), config)
    return config


@dataclass
class Blueprint:
    """A model class and its config as plain data: says how the sizes respond when settings change."""

    cls: type[PreTrainedModel]
    config_cls: type[PreTrainedConfig]
    text: str
    sizes: Sizes = field(init=False)
    asked: list[Path] = field(init=False)  # attributes that the model looked for and the config has not
    refusals: dict[str, str] = field(default_factory=dict)
    _memo: dict[str, Sizes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config({})
        with _listening(config) as self.asked:
            self.sizes = _sizes(build_meta(self.cls, config))

    def settings(self) -> dict[str, Any]:
        """A fresh copy of the config as data."""
        settings: dict[str, Any] = json.loads(self.text)
        return settings

    def config(self, changes: Changes, like: PreTrainedConfig | None = None) -> PreTrainedConfig:
        """The config with ``changes``; ``like`` lends its choice of attention and expert kernels."""
        settings = self.settings()
        for path, value in changes.items():
            _lookup(settings, path[:-1])[path[-1]] = value
        with _quiet():
            return self.config_cls.from_dict(settings, **({} if like is None else _kernels(like)))

    def response(self, changes: Changes, *, through_file: bool = False) -> Sizes | None:
        """The dimensions that get another size, with that size; None when the config or the model refuses."""
        key = _key(changes) + (" through a file" if through_file else "")
        if key not in self._memo:
            try:
                config = self._reload(changes) if through_file else self.config(changes)
                self._memo[key] = self._difference(_sizes(build_meta(self.cls, config)))
            except Exception as error:  # noqa: BLE001  a constructor may raise anything; its words are kept
                self._memo[key], self.refusals[key] = None, _last_line(error)
        return self._memo[key]

    def _reload(self, changes: Changes) -> PreTrainedConfig:
        with _quiet(), TemporaryDirectory() as folder:
            self.config(changes).save_pretrained(folder)
            return self.config_cls.from_pretrained(folder)

    def _difference(self, new: Sizes) -> Sizes:
        gone = {dim: 0 for dim in self.sizes if dim[1] < 0 and dim not in new}
        return {dim: size for dim, size in new.items() if self.sizes.get(dim) != size} | gone


@dataclass
class Search:
    """Which values of which fields give the goal. Fields that share no dimension are solved apart."""

    probe: Probe
    goal: Sizes
    hints: Mapping[int, Sequence[int]]

    @property
    def blueprint(self) -> Blueprint:
        return self.probe.blueprint

    def reached(self) -> Iterator[Changes]:
        """Changes that reach the goal and survive a file: of hinted values first, then with guessed ones."""
        tried: list[Changes] = []
        for changes in chain(self.assignments(guess=False), self.assignments(guess=True)):
            if changes not in tried and self.missed(changes) == self.missed(changes, through_file=True) == set():
                yield changes
            tried.append(changes)

    def assignments(self, *, guess: bool) -> Iterator[Changes]:
        """Changes that solve every part, cheapest first."""
        solved = [self.solutions(part, guess) for part in self.parts()]
        return (changes for _, changes in islice(_cheapest(solved), LIMIT))

    def parts(self) -> list[list[Field]]:
        """Fields that move a common dimension belong together."""
        links = nx.Graph()
        for found in self.probe.fields:
            links.add_node(found)
            links.add_edges_from((found, dim) for dim in found.moves if self.wanted(dim) is not None)
        return [[node for node in part if isinstance(node, Field)] for part in nx.connected_components(links)]

    def wanted(self, dim: Dim) -> int | None:
        """The size that a dimension should get (a tensor that the model has not: none); None when it is free."""
        return self.goal.get(dim) if dim in self.blueprint.sizes else 0

    def missed(self, changes: Changes, *, through_file: bool = False) -> set[Dim] | None:
        """The dimensions that these changes leave wrong; None when they are refused."""
        response = self.blueprint.response(changes, through_file=through_file)
        if response is None:
            return None
        wrong = {dim for dim, size in self.goal.items() if response.get(dim, self.blueprint.sizes[dim]) != size}
        return wrong | (response.keys() - self.blueprint.sizes.keys())

    def fits(self, changes: Changes, dims: set[Dim]) -> bool:
        """Whether none of ``dims`` is wrong, as far as these changes alone tell: refused, they may do with others."""
        return not dims or (missed := self.missed(changes)) is None or not missed & dims

    def solutions(self, part: list[Field], guess: bool) -> list[Choice]:
        """The choices for one part that leave none of its dimensions wrong."""
        dims = {dim for found in part for dim in found.moves}
        pools = [self.options(found, dims.difference(*(o.moves for o in part if o != found)), guess) for found in part]
        return [choice for choice in islice(_cheapest(pools), LIMIT) if self.fits(choice[1], dims)]

    def options(self, found: Field, own: set[Dim], guess: bool) -> list[Choice]:
        """Values for one field that suit the dimensions it alone moves: unchanged, written out, hinted, guessed."""
        choices: list[Choice] = [(0, {}), *([(1, {found.path: found.value})] if found.unset else [])]
        if isinstance(found.value, int):
            choices += [(1, {found.path: new}) for new in self.hints.get(found.value, ())]
        if guess or isinstance(found.value, float):
            choices += [(3, {found.path: new}) for new in self.guesses(found)]
        return [choice for choice in choices if self.fits(choice[1], own)]

    def guesses(self, found: Field) -> list[int | float]:
        """The values that would bring some dimension to its goal: in proportion, by an offset, or inversely."""
        values: set[float] = set()
        for dim, slope in found.moves.items():
            old, new = self.blueprint.sizes.get(dim, 0), self.wanted(dim) or 0
            if old and new and old != new:
                values |= {found.value * new / old, found.value + (new - old) / slope, found.value * old / new}
        if isinstance(found.value, float):
            return sorted(values)
        return sorted({int(value) for value in values if value == int(value) >= 1})

    def obstacle(self, *, certain: bool) -> ModelLimit | None:
        """A size that no field moves, or two wishes for one field; ``certain`` leaves out fractions: they may round."""
        alike: dict[str, list[Dim]] = {}
        for dim in self.goal:
            alike.setdefault(str(self.profile(dim)), []).append(dim)
        for dims in alike.values():
            stuck = next((dim for dim in dims if self.goal[dim] != self.blueprint.sizes[dim]), None)
            movers = self.probe.movers(*dims[0])
            if stuck is None or (certain and any(isinstance(found.value, float) for found in movers)):
                continue
            if not movers:
                return ModelLimit(self.what, at=self.wish(stuck), why="no field of the config moves it", fix=APART)
            if rivals := [dim for dim in dims if self.ratio(dim) != self.ratio(stuck)]:
                return self.clash(stuck, rivals, movers)
        return None

    def profile(self, dim: Dim) -> dict[Path, float]:
        """How each field moves the dimension, in proportion to its size."""
        size = self.blueprint.sizes[dim]
        return {found.path: round(found.moves[dim] / size, 9) for found in self.probe.movers(*dim)}

    def ratio(self, dim: Dim) -> Fraction:
        return Fraction(self.goal[dim], self.blueprint.sizes[dim])

    def clash(self, dim: Dim, rivals: list[Dim], movers: tuple[Field, ...]) -> ModelLimit:
        """The same fields move both: two sizes of one layer (or of none), or one size of layers that differ."""
        near = [rival for rival in rivals if _layer(rival) in (_layer(dim), None)]
        rival = (near or rivals)[0]
        why = f"{_listed(movers)} can only move it along with {self.wish(rival)}"
        if len(movers) == 1:
            moves, value = movers[0].moves, movers[0].value
            wants = [value + (self.goal[d] - self.blueprint.sizes[d]) / moves[d] for d in (dim, rival)]
            why += f": {wants[0]:g} or {wants[1]:g}?"
        kind = "this size has no field of its own" if near else "the layers differ"
        return ModelLimit(f"{self.what}: {kind}", at=self.wish(dim), why=why, fix=APART if near else ALIKE)

    def exhausted(self) -> ModelLimit:
        """No combination worked: the config's own refusal is the best reason to give, where there is one."""
        stuck = next(dim for dim in self.goal if self.goal[dim] != self.blueprint.sizes[dim])
        tried = (self.blueprint.refusals.get(_key(changes)) for changes in self.assignments(guess=True))
        if refusal := next(filter(None, tried), None):
            return ModelLimit(self.what, at=self.wish(stuck), why=f"the config refuses: {refusal}", fix=VALID)
        why = f"no values of {_listed(self.probe.movers(*stuck))} give this and the other sizes at once"
        return ModelLimit(self.what, at=self.wish(stuck), why=why, fix=APART)

    @property
    def what(self) -> str:
        return f"no {self.blueprint.config_cls.__name__} has these sizes"

    def wish(self, dim: Dim) -> str:
        """``h.0.mlp.weight[1] (64 → 48)``"""
        old, new = self.blueprint.sizes[dim], self.goal[dim]
        return f"{_spell(dim)} (stays {old})" if new == old else f"{_spell(dim)} ({old} → {new})"


@lru_cache(maxsize=16)
def _survey(cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], text: str) -> Probe:
    blueprint = Blueprint(cls, config_cls, text)
    settings = list(_leaves(blueprint.settings()))
    blanks = [path for path, value in settings if value is None] + blueprint.asked
    unset = {path: value for path in blanks if (value := _derived(blueprint, path)) is not None}
    numbers = {path: value for path, value in settings if _is_number(value)}
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


def _without_layers(blueprint: Blueprint, stack: str, keep: list[int], like: PreTrainedConfig) -> PreTrainedConfig:
    depths = _depths(blueprint.sizes)
    if stack not in depths:
        raise UserMistake(f"the model has no stack of layers {stack!r}", fix=nearest(stack, depths))
    if not keep or not set(keep) <= set(range(depths[stack])):
        raise UserMistake(f"{stack} has layers 0 to {depths[stack] - 1}, at least one stays", why=f"asked for {keep}")
    moved = ((_renumbered(dim, stack, keep), size) for dim, size in blueprint.sizes.items())
    goal = {dim: size for dim, size in moved if dim is not None}
    for changes in _shallower(blueprint.settings(), depths[stack], keep):
        if _after(blueprint, changes) == goal:
            return blueprint.config(changes, like)
    why = f"no number {depths[stack]} in it leaves exactly layers {keep} when it becomes {len(keep)}"
    raise ModelLimit(f"no {blueprint.config_cls.__name__} drops these layers", at=stack, why=why)


def _shallower(settings: dict[str, Any], depth: int, keep: list[int]) -> Iterator[Changes]:
    """Changes that may drop layers: a number equal to the depth, the lists beside it by layer, or of layer indices."""
    for path, value in _leaves(settings):
        if value != depth or not _is_number(value):
            continue
        beside = _lookup(settings, path[:-1])
        lists = {(*path[:-1], key): entry for key, entry in _items(beside) if isinstance(entry, list) and entry}
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


def _depths(names: Iterable[Dim]) -> dict[str, int]:
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


def _goal(sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    goal: Sizes = {}
    for name, shape in shapes.items():
        if (name, -1) not in sizes:
            raise UserMistake(f"the model has no tensor {name!r}", fix=nearest(name, {known for known, _ in sizes}))
        goal |= _dims(name, shape)
        if any(dim not in sizes for dim in _dims(name, shape)) or (name, len(shape)) in sizes:
            raise UserMistake(f"{name} has not {len(shape)} dimensions")
    return goal


def _sizes(model: torch.nn.Module) -> Sizes:
    sizes: Sizes = {}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        sizes |= _dims(name, tensor.shape)
    return sizes


def _dims(name: str, shape: Sequence[int]) -> Sizes:
    return {(name, -1): 1} | {(name, dim): size for dim, size in enumerate(shape)}


def _cheapest(pools: Sequence[Sequence[Choice]]) -> Iterator[Choice]:
    """One choice from each pool, in every combination, by total cost."""
    if all(pools):
        dearest = sum(max(cost for cost, _ in pool) for pool in pools)
        yield from ((total, changes) for total in range(dearest + 1) for changes in _spend(pools, total))


def _spend(pools: Sequence[Sequence[Choice]], total: int) -> Iterator[Changes]:
    if not pools:
        yield from [{}] if total == 0 else []
        return
    for cost, changes in pools[0]:
        if cost <= total:
            yield from (changes | rest for rest in _spend(pools[1:], total - cost))


def _leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar in the settings with its path; a map onto 0, 1, 2 … numbers labels, not sizes."""
    if not isinstance(node, dict | list):
        yield path, node
    elif isinstance(node, list) or list(node.values()) != list(range(len(node))):
        yield from chain.from_iterable(_leaves(value, (*path, key)) for key, value in _items(node))


def _items(node: dict[str, Any] | list[Any]) -> Iterable[tuple[str | int, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node)


def _lookup(node: Any, path: Path) -> Any:
    return reduce(getitem, path, node)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _text(config: PreTrainedConfig) -> str:
    return json.dumps(config.to_dict(), default=str)


def _key(changes: Changes) -> str:
    return str(sorted(changes.items(), key=str))


def _dotted(path: Path) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def _spell(dim: Dim) -> str:
    return dim[0] if dim[1] < 0 else f"{dim[0]}[{dim[1]}]"


def _listed(fields: Iterable[Field]) -> str:
    return " and ".join(map(str, fields))


def _last_line(error: Exception) -> str:
    """The innermost reason: transformers wraps what a validator said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _layer(dim: Dim) -> str | None:
    match = re.search(r"\.(\d+)\.", dim[0])
    return match[1] if match else None


def _configs(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, PreTrainedConfig]]:
    yield path, config
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig):
            yield from _configs(part, (*path, key))


def _kernels(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    parts = {".".join(map(str, path)): part for path, part in _configs(config) if len(path) < 2}
    return {
        "attn_implementation": {key: part._attn_implementation for key, part in parts.items()},
        "experts_implementation": {key: part._experts_implementation for key, part in parts.items()},
    }


@contextmanager
def _listening(config: PreTrainedConfig) -> Iterator[list[Path]]:
    """Collects the attributes that are looked up in the config or its parts and are not there."""
    heard: list[Path] = []
    parts = [(path, type(part)) for path, part in _configs(config)]

    def missing(self: PreTrainedConfig, name: str) -> Any:
        paths = [(*path, name) for path, kind in parts if kind is type(self) and not name.startswith("_")]
        heard.extend(path for path in paths if path not in heard)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    setattr(PreTrainedConfig, "__getattr__", missing)  # noqa: B010
    try:
        yield heard
    finally:
        delattr(PreTrainedConfig, "__getattr__")


@contextmanager
def _quiet() -> Iterator[None]:
    """Trial builds say nothing."""
    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
