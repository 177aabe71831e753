"""Groups and a budget in, the groups that the budget ranges over out, with sizes rounded to what a stock config accepts."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from graphprune.budget import Budget, allowed_kinds
from graphprune.computed import changing
from graphprune.errors import ModelLimit
from graphprune.experts import STACKED
from graphprune.exportable import GROUPED, experts_run
from graphprune.facts import Emission, Notes
from graphprune.fitting import Fitting
from graphprune.groups import Group, Groups, check_named

STREAMS = ("hidden", "channel")
"""Kinds of widths that lie anywhere in a model."""

ALIGNED = 16
"""Bytes that the rows of experts' matrices are multiples of in a grouped product."""


def narrow(model: nn.Module, groups: Groups, budget: Budget, emission: Emission, notes: Notes) -> Groups:
    """Only the groups the budget ranges over; by default none that would cost the stock config, or that no module computes."""
    kinds = allowed_kinds(groups, budget.kinds)
    check_named(groups, budget.protect)
    if emission.emit == "module" and budget.kinds is None:
        groups = _without_recomputed(groups, notes)
        kinds = tuple(kind for kind in kinds if kind in groups.kinds)
    groups = replace(groups, groups=tuple(group for group in groups if group.kind in kinds))
    groups = _apart_from_idle(groups, notes) if emission.emit == "module" else groups
    if not len(groups):
        reasons = dict.fromkeys(frozen.reason.what for frozen in groups.frozen if frozen.members)
        why = "; ".join([*notes.lines, *reasons][:3]) or "no parameter has a dimension that anything shares"
        raise ModelLimit(
            f"nothing in {groups.axes.trace.name} can be pruned", why=why, fix="graphprune inspect lists what is frozen"
        )
    stock = isinstance(model, PreTrainedModel) and emission.emit == "module" and budget.alike and budget.kinds is None
    return _without_obstacles(Fitting(model, groups, budget), notes) if stock else groups  # type: ignore[arg-type]


def _apart_from_idle(groups: Groups, notes: Notes) -> Groups:
    """Without the widths that parameters may read or write which no traced operation uses: code for training, or other inputs.

    Which do, no trace tells; it may be those that have a dimension of the size of a stream, or of a width beside them.
    """
    trace = groups.axes.trace
    read = {trace.tensors[node.name].name for node in trace.graph.nodes if node.name in trace.tensors and node.users}
    idle = {name: tensor.shape for name, tensor in trace.parameters.items() if name not in read}
    if not idle:
        return groups
    bound = [group for group in groups if any(group.size in shape and _may_meet(group, name) for name, shape in idle.items())]
    few = f"{', '.join(list(idle)[:3])}{' …' if len(idle) > 3 else ''}"
    notes.lines.append(f"{few}: no part of the traced forward, left as they are")
    if bound:
        kinds = ", ".join(dict.fromkeys(group.kind for group in bound))
        notes.lines.append(f'{len(bound)} groups ({kinds}) are left alone: those may have the same width; emit="graph" cuts them')
    return replace(groups, groups=tuple(group for group in groups if group not in bound))


def _may_meet(group: Group, name: str) -> bool:
    """Whether a parameter that nothing reads may have the width of a group on it."""
    if group.kind != "ffn":
        return group.kind in STREAMS
    beside = name.rpartition(".")[0].rpartition(".")[0]
    return any(member.name.startswith(f"{beside}." if beside else "") for member in group.members)


def _without_obstacles(fitting: Fitting, notes: Notes) -> Groups:
    """Without the groups that no config makes smaller, unless that is all of them."""
    groups = fitting.groups
    if fitting.clear_steps(groups.kinds) is not None:
        return groups
    obstacles = {kind: why for kind in groups.kinds if (why := fitting.obstacle(kind))}
    able = {group for rows in fitting.sets(obstacles) for row in rows for group in row}
    stuck = {kind: [group for row in fitting.rows(kind) for group in row if group not in able] for kind in obstacles}
    left = tuple(group for group in groups if group not in stuck.get(group.kind, ()))
    if not left:
        return groups
    for kind, spared in stuck.items():
        count = f"{len(spared)} " if any(group.kind == kind for group in able) else ""
        notes.lines.extend([f"{count}{kind} groups are left alone: {obstacles[kind]}"] if spared else [])
    return replace(groups, groups=left)


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
    fitting = Fitting(model, groups, budget)
    steps = fitting.clear_steps(groups.kinds) or {kind: fitting.step(kind) for kind in groups.kinds}
    bound = any(len(fitting.rows(kind)) > 1 for kind in steps)
    sets = fitting.sets(steps, steps) if bound else []
    together = [[row[0].name for row in rows] for rows in sets if len(rows) > 1]
    rounded = {kind: step for kind, step in steps.items() if step > 1 or isinstance(budget.round_to, int)}
    return replace(budget, round_to=rounded, together=together)


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
