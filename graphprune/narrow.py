"""Groups and a budget in, the groups that the budget ranges over out, with sizes rounded to what a stock config accepts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import gcd

from torch import nn
from transformers import PreTrainedModel

from graphprune.axes import Keep
from graphprune.budget import Budget, allowed_kinds, for_kind
from graphprune.errors import ModelLimit
from graphprune.experts import STACKED
from graphprune.exportable import GROUPED, experts_run
from graphprune.facts import Emission, Notes
from graphprune.groups import Groups
from graphprune.rewrite.stock import expressible, obviously_expressible

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
    anew = [group for group in groups if group.factor in groups.axes.recomputed()]
    notes.lines.extend(f'{g.name} is left alone: the forward computes a constant over it; emit="graph" slices that' for g in anew)
    return replace(groups, groups=tuple(group for group in groups if group not in anew))


def stock_steps(model: nn.Module, groups: Groups, budget: Budget, emission: Emission) -> Budget:
    """The budget with each kind's sizes rounded to multiples that the config accepts (a width that heads must divide, say)."""
    budget = _aligned(model, groups, budget) if emission.emit == "module" else budget
    if not isinstance(model, PreTrainedModel) or emission.emit != "module" or not budget.alike:
        return budget
    steps = _clear_steps(model, groups, groups.kinds, budget) or {kind: _step(model, groups, kind, budget) for kind in groups.kinds}
    return replace(budget, round_to={kind: step for kind, step in steps.items() if step > 1 or isinstance(budget.round_to, int)})


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
    tried = _steps(groups, kind, budget)
    clear = _clear_steps(model, groups, [kind], budget) or {}
    return clear.get(kind) or next((step for step in tried if not _refused(model, groups, kind, step, budget)), tried[0])


def _clear_steps(model: PreTrainedModel, groups: Groups, kinds: Collection[str], budget: Budget) -> dict[str, int] | None:
    """For each kind the first multiple of which it is plain that a config accepts it; None where that is not plain of all."""
    tried = {kind: _steps(groups, kind, budget) for kind in kinds}
    cuts = [[_one_less(groups, kind, step, budget) for step in steps] for kind, steps in tried.items()]
    places = obviously_expressible(model, groups.axes, cuts)
    return None if places is None else {kind: tried[kind][place] for kind, place in zip(kinds, places, strict=True)}


def _steps(groups: Groups, kind: str, budget: Budget) -> list[int]:
    """Multiples of the asked rounding that divide the sizes of a kind, small ones first."""
    asked, size = for_kind(budget.round_to, kind), gcd(*(group.size for group in groups if group.kind == kind))
    return [asked, *(step for step in range(2, size) if size % step == 0 and step % asked == 0)][:TRIED_STEPS]


def _not_stock(model: PreTrainedModel, groups: Groups, kind: str, budget: Budget) -> str | None:
    """Why a config can express no smaller size of a kind, None where it can."""
    if _clear_steps(model, groups, [kind], budget):
        return None
    obstacles = []
    for step in _steps(groups, kind, budget):
        obstacle = _refused(model, groups, kind, step, budget)
        if obstacle is None:
            return None
        obstacles.append(obstacle)
    return obstacles[0]


def _refused(model: PreTrainedModel, groups: Groups, kind: str, step: int, budget: Budget) -> str | None:
    """Why no config expresses all groups of a kind one step smaller."""
    try:
        expressible(model, groups.axes, _one_less(groups, kind, step, budget))
    except ModelLimit as limit:
        return limit.what
    return None


def _one_less(groups: Groups, kind: str, step: int, budget: Budget) -> Keep:
    """All groups of a kind one step smaller."""
    free = [group for group in groups if group.kind == kind and not group.touches(budget.protect) and group.size > step]
    return {group.factor: range(group.size - step) for group in free}
