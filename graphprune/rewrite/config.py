"""A transformers model and the sizes it should get → a stock config whose model has exactly those sizes.

No architecture and no field is named here: which field moves which dimension is found by building the model class on
the meta device with that field changed. No answer is trusted: each is saved, reloaded, built and compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice

import networkx as nx
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune import quiet
from graphprune.errors import ModelLimit, UserMistake, nearest
from graphprune.rewrite.blueprint import Blueprint, Changes, Dim, Path, Sizes, dims, is_number, scalars
from graphprune.rewrite.probe import Few, Field, Probe, described, probe

Step = tuple[Path, int]  # a field, and its new value
Choice = tuple[int, Changes]  # new values, and how many fields that changes (one that no hint names counts thrice)

LIMIT = 256  # assignments tried before giving up
OBVIOUS = 32  # answers that fields as they stand may give
STEPS = 128  # values of fields that are tried alone for that
APART = "keep this size whole, or save with per-layer sizes"
ALIKE = "let the layers shrink alike, or save with per-layer sizes"
VALID = "choose numbers that the config accepts, or save with per-layer sizes"


def candidates(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[int, Sequence[int]]
) -> Iterator[PreTrainedConfig]:
    """Every config whose model has the target ``shapes``, fewest fields changed first.

    ``shapes`` names tensors of the state dict (unsaved buffers may be named too); what it leaves out is free.
    ``numbers`` maps an old number to its possible new ones: hints, and the only values for fields that move no shape.
    Raises ModelLimit, with the dimension in the way, when there is no such config.
    """
    tried: list[Changes] = []
    whole, few = described(model)
    for changes in islice(obvious(whole, few, shapes, numbers), OBVIOUS):
        tried.append(changes)
        yield whole.config(changes, like=model.config)
    search = Search(probe(model), _goal(whole.sizes, shapes), numbers)
    if not tried and (obstacle := search.obstacle(certain=True)):
        raise obstacle
    for changes in search.reached():
        if changes not in tried:
            tried.append(changes)
            yield whole.config(changes, like=model.config)
    if not tried:
        raise search.obstacle(certain=False) or search.exhausted()


def obvious(
    whole: Blueprint, few: Few | None, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[int, Sequence[int]]
) -> Iterator[Changes]:
    """Changes that reach ``shapes`` by giving fields which hold a changed size what that becomes, fewest first.

    They are looked for on two layers where those stand for all, and then tried on all of them.
    """
    return (changes for changes in sketched(whole, few, shapes, numbers) if proven(whole, shapes, changes))


def proven(whole: Blueprint, shapes: Mapping[str, tuple[int, ...]], changes: Changes) -> bool:
    """Whether changes reach ``shapes``, and survive a file."""
    return Search(Probe(whole, ()), _goal(whole.sizes, shapes), {}).missed(changes, through_file=True) == set()


def sketched(
    whole: Blueprint, few: Few | None, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[int, Sequence[int]]
) -> Iterator[Changes]:
    """The same as far as two layers tell, where those stand for all."""
    goal = _goal(whole.sizes, shapes)
    near = goal if few is None else few.goal(goal)
    if near is None:
        return
    search = Search(Probe(few.blueprint if few else whole, ()), near, numbers)
    steps = named(search.blueprint, numbers)
    wrong = search.missed({}) or set()
    left = {step: search.missed(dict([step])) for step in steps[:STEPS] if few is None or step[0] not in few.changes}
    useful = {step: missed or set() for step, missed in left.items() if missed is None or missed <= wrong}
    needs = sorted({tuple(step for step, missed in useful.items() if dim not in missed) for dim in wrong}, key=str)
    for chosen in islice(chain.from_iterable(_hitting(list(useful), needs, n) for n in range(1, len(useful) + 1)), LIMIT):
        if search.missed(dict(chosen)) == set():
            yield dict(chosen)


def named(blueprint: Blueprint, numbers: Mapping[int, Sequence[int]]) -> list[Step]:
    """The fields that hold a size which changes, each with what that becomes."""
    held = [(path, value) for path, value in scalars(blueprint.settings()) if isinstance(value, int) and is_number(value)]
    return [(path, new) for old in numbers for path, value in held if value == old for new in numbers[old]]


def fit(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[int, Sequence[int]],
    accept: Callable[[PreTrainedConfig], bool] | None = None,
) -> PreTrainedConfig:
    """The first of ``candidates`` that ``accept`` takes; without it, the first."""
    refused = 0
    with quiet.building():
        for config in candidates(model, shapes, numbers):
            if accept is None or accept(config):
                return config
            refused += 1
    raise ModelLimit(f"{refused} stock configs have these sizes, but none computes the same as the pruned model")


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
            if changes not in tried and self.reaches(changes):
                yield changes
            tried.append(changes)

    def reaches(self, changes: Changes) -> bool:
        """Whether these changes leave nothing wrong, and survive a file."""
        return self.missed(changes) == set() == self.missed(changes, through_file=True)

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
        for peers in alike.values():
            stuck = next((dim for dim in peers if self.goal[dim] != self.blueprint.sizes[dim]), None)
            movers = self.probe.movers(*peers[0])
            if stuck is None or (certain and any(isinstance(found.value, float) for found in movers)):
                continue
            if not movers:
                return ModelLimit(self.what, at=self.wish(stuck), why="no field of the config moves it", fix=APART)
            if rivals := [dim for dim in peers if self.ratio(dim) != self.ratio(stuck)]:
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
        tried = (self.blueprint.refusal(changes) for changes in self.assignments(guess=True))
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


def _goal(sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    goal: Sizes = {}
    for name, shape in shapes.items():
        if (name, -1) not in sizes:
            raise UserMistake(f"the model has no tensor {name!r}", fix=nearest(name, {known for known, _ in sizes}))
        goal |= dims(name, shape)
        if any(dim not in sizes for dim in dims(name, shape)) or (name, len(shape)) in sizes:
            raise UserMistake(f"{name} has not {len(shape)} dimensions")
    return goal


def _hitting(steps: Sequence[Step], needs: Sequence[Sequence[Step]], count: int) -> Iterator[tuple[Step, ...]]:
    """Each choice of so many steps, one to a field, that has one of every need."""
    if not count:
        yield from () if needs else ((),)
        return
    scarce = min(needs, key=len, default=steps)
    able = [step for step in steps if step in scarce]
    for place, step in enumerate(able):
        rest = [other for other in steps if other not in able[: place + 1] and other[0] != step[0]]
        for more in _hitting(rest, [need for need in needs if step not in need], count - 1):
            yield (step, *more)


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


def _spell(dim: Dim) -> str:
    return dim[0] if dim[1] < 0 else f"{dim[0]}[{dim[1]}]"


def _listed(fields: Iterable[Field]) -> str:
    return " and ".join(map(str, fields))


def _layer(dim: Dim) -> str | None:
    match = re.search(r"\.(\d+)\.", dim[0])
    return match[1] if match else None
