"""Groups and a budget in, the groups that the budget ranges over out, with sizes rounded to what a stock config accepts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import gcd

from torch import nn
from transformers import PreTrainedModel

from graphprune.axes import Keep
from graphprune.budget import Budget, allowed_kinds, for_kind
from graphprune.computed import changing
from graphprune.errors import ModelLimit
from graphprune.experts import STACKED
from graphprune.exportable import GROUPED, experts_run
from graphprune.facts import Emission, Notes
from graphprune.groups import Group, Groups
from graphprune.levers import alike
from graphprune.rewrite.stock import expressible, obviously_expressible, sketchable

ALIGNED = 16
"""Bytes that the rows of experts' matrices are multiples of in a grouped product."""

TRIED_STEPS = 8
"""How many roundings are tried to find sizes a config accepts."""


def narrow(model: nn.Module, groups: Groups, budget: Budget, emission: Emission, notes: Notes) -> Groups:
    """Only the groups the budget ranges over; by default none that would cost the stock config, or that no module computes."""
    kinds = allowed_kinds(groups, budget.kinds)
    if emission.emit == "module" and budget.kinds is None:
        groups = _without_recomputed(groups, notes)
        kinds = tuple(kind for kind in kinds if kind in groups.kinds)
    if isinstance(model, PreTrainedModel) and emission.emit == "module" and budget.alike and budget.kinds is None:
        plain = _clear_steps(model, groups, kinds, budget) is not None
        obstacles = {kind: None if plain else _not_stock(model, groups, kind, budget) for kind in kinds}
        spared = [kind for kind, why in obstacles.items() if why]
        if len(spared) < len(kinds):
            notes.lines.extend(f"{kind} groups are left alone: {obstacles[kind]}" for kind in spared)
            kinds = tuple(kind for kind in kinds if kind not in spared)
    return replace(groups, groups=tuple(group for group in groups if group.kind in kinds))


def _without_recomputed(groups: Groups, notes: Notes) -> Groups:
    """A module computes its constants anew: one that changes along a group cannot be sliced."""
    axes = groups.axes
    constants = {node: axes.nodes[node] for node in axes.computed}
    factors = changing(axes.trace, constants, frozenset(group.factor for group in groups))
    anew = [group for group in groups if group.factor in factors]
    notes.lines.extend(f'{g.name} is left alone: the forward computes a constant over it; emit="graph" slices that' for g in anew)
    return replace(groups, groups=tuple(group for group in groups if group not in anew))


def stock_steps(model: nn.Module, groups: Groups, budget: Budget, emission: Emission) -> Budget:
    """The budget with each kind's sizes rounded to multiples that the config accepts (a width that heads must divide, say), and
    with what one field of it sizes together."""
    budget = _aligned(model, groups, budget) if emission.emit == "module" else budget
    if not isinstance(model, PreTrainedModel) or emission.emit != "module" or not budget.alike:
        return budget
    steps = _clear_steps(model, groups, groups.kinds, budget) or {kind: _step(model, groups, kind, budget) for kind in groups.kinds}
    budget = replace(budget, round_to={kind: step for kind, step in steps.items() if step > 1 or isinstance(budget.round_to, int)})
    return replace(budget, together=[names for kind in groups.kinds for names in _together(model, groups, kind, budget)])


def _together(model: PreTrainedModel, groups: Groups, kind: str, budget: Budget) -> Iterator[list[str]]:
    """Equal layers that a config can make smaller only with others (a T5's encoder and its decoder): a group's name for each."""
    rows = alike(group for group in groups if group.kind == kind and not group.touches(budget.protect))
    bound = [row for row in rows if len(rows) > 1 and not _fits(model, groups, [row], budget)]
    while len(bound) > 1 and _fits(model, groups, bound, budget):
        pair = next(([bound[0], other] for other in bound[1:] if _fits(model, groups, [bound[0], other], budget)), bound)
        yield [row[0].name for row in pair]
        bound = [row for row in bound if row not in pair]


def _fits(model: PreTrainedModel, groups: Groups, rows: Sequence[Sequence[Group]], budget: Budget) -> bool:
    """Whether it is plain that a config expresses these a step smaller, all by the same share, and the others as they are."""
    size, step = min(row[0].size for row in rows), for_kind(budget.round_to, rows[0][0].kind)
    if size <= step or any(row[0].size % size for row in rows):
        return False
    return sketchable(model, groups.axes, _less([group for row in rows for group in row], step, size))


def _aligned(model: nn.Module, groups: Groups, budget: Budget) -> Budget:
    """The same with widths of experts in multiples of 16 bytes where torch's grouped product, which asks for that, runs them."""
    if isinstance(budget.round_to, int) or experts_run(model) != GROUPED:
        return budget
    stacks = {name: p.element_size() for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == STACKED}
    steps: dict[str, int] = {}
    for group in groups:
        sizes = [stacks[member.name] for member in group.members if member.name in stacks and member.dim]
        if sizes and group.kind not in (budget.round_to or {}) and budget.multiple(group) * min(sizes) % ALIGNED:
            steps[group.kind] = ALIGNED // min(sizes)
    return replace(budget, round_to={**(budget.round_to or {}), **steps}) if steps else budget


def _step(model: PreTrainedModel, groups: Groups, kind: str, budget: Budget) -> int:
    """The first multiple that the config accepts, what was asked for where it accepts none."""
    tried = _trials(groups, kind, budget)
    clear = _clear_steps(model, groups, [kind], budget) or {}
    return clear.get(kind) or next((step for step, keep in tried if not _refused(model, groups, keep)), tried[0][0])


def _clear_steps(model: PreTrainedModel, groups: Groups, kinds: Collection[str], budget: Budget) -> dict[str, int] | None:
    """For each kind the first multiple of which it is plain that a config accepts it; None where that is not plain of all."""
    tried = {kind: _trials(groups, kind, budget) for kind in kinds}
    places = obviously_expressible(model, groups.axes, [[keep for _, keep in trials] for trials in tried.values()])
    return None if places is None else {kind: tried[kind][place][0] for kind, place in zip(kinds, places, strict=True)}


def _not_stock(model: PreTrainedModel, groups: Groups, kind: str, budget: Budget) -> str | None:
    """Why a config can express no smaller size of a kind, None where it can."""
    if _clear_steps(model, groups, [kind], budget):
        return None
    obstacles = []
    for _, keep in _trials(groups, kind, budget):
        obstacle = _refused(model, groups, keep)
        if obstacle is None:
            return None
        obstacles.append(obstacle)
    return obstacles[0]


def _refused(model: PreTrainedModel, groups: Groups, keep: Keep) -> str | None:
    """Why no config expresses a cut."""
    try:
        expressible(model, groups.axes, keep)
    except ModelLimit as limit:
        return limit.what
    return None


def _trials(groups: Groups, kind: str, budget: Budget) -> list[tuple[int, Keep]]:
    """Multiples of the asked rounding that divide the sizes of a kind, small ones first, each with all its groups one step smaller:
    by as many units, or, where a size divides others (that of two shared experts, say), those by as many times as much."""
    own = [group for group in groups if group.kind == kind]
    free = [group for group in own if not group.touches(budget.protect)]
    asked, size = for_kind(budget.round_to, kind), gcd(*(group.size for group in own))
    steps = [asked, *(step for step in range(2, size) if size % step == 0 and step % asked == 0)][:TRIED_STEPS]
    sizes = {group.size for group in free}
    bases = [base for base in sorted(sizes) if any(other % base == 0 for other in sizes - {base})]
    return [(step, _less(free, step, base)) for base in (0, *bases) for step in steps]


def _less(groups: Sequence[Group], step: int, base: int = 0) -> Keep:
    """Groups a step smaller; with a ``base``, what it divides by as many steps as that goes into it."""
    steps = {group: group.size // base if base and group.size % base == 0 else 1 for group in groups}
    return {group.factor: range(group.size - step * times) for group, times in steps.items() if group.size > step * times}
