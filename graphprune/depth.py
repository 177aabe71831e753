"""Layers and Scores in, the same model without its least important whole pieces out: choice and rewrite of what has no width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from graphprune.budget import Budget, for_kind
from graphprune.copying import duplicate
from graphprune.cost import COUNTED, MEASURES, cost
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import tensors_of
from graphprune.facts import Emission, Example, Pruned
from graphprune.groups import Group, Groups, check_named, matches
from graphprune.pieces import Layers, Piece, bypassed
from graphprune.plan import Cut, Plan, fingerprint
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import attributes_between
from graphprune.rewrite.blueprint import build_meta
from graphprune.rewrite.graph import PrunedGraph
from graphprune.rewrite.module import adopt, settings_kept
from graphprune.rewrite.reshaped import Elements
from graphprune.rewrite.shallow import shrink_depth
from graphprune.score import Scores, check_scores
from graphprune.verify import close, reference


def as_groups(layers: Layers) -> Groups:
    """The same, for a criterion that scores any groups."""
    return layers


def select_pieces(layers: Layers, scores: Scores, budget: Budget) -> Plan:
    """Choose the pieces that go: the lowest scores first, ``local`` the same share of every stack, ``global`` by score per
    parameter, ``rank`` by score alone, until the budget is met. Raises ModelLimit when it is out of reach."""
    check_named(layers, budget.protect)
    check_scores(layers, scores)
    keep = {group.factor: list(range(group.size)) for group in layers}
    left, gone = _left(layers, keep, budget), []
    for group, unit in _order(layers, scores, budget):
        if left <= 1:
            break
        if len(keep[group.factor]) > max(group.least, for_kind(budget.minimum, group.kind)):
            keep[group.factor].remove(unit)
            gone.append((group, unit))
            left = _left(layers, keep, budget)
    for group, unit in reversed(gone) if left <= 1 else ():  # a large piece may have made up for smaller ones
        more = {**keep, group.factor: sorted([*keep[group.factor], unit])}
        keep = more if _left(layers, more, budget) <= 1 else keep
    if left > 1:
        why = f"{left:.2f} times the budget is left when every stack keeps its minimum and what is protected stays"
        raise ModelLimit(
            f"a budget of {budget.target or budget.keep} is out of reach", why=why, fix="protect less, or ask for less"
        )
    cuts = tuple(_cut(layers, group, keep[group.factor], scores) for group in layers if len(keep[group.factor]) < group.size)
    costs = {"before": asdict(cost(layers.axes, {})), "after": asdict(cost(remaining(layers, keep), {}))}
    options = {name: getattr(budget, name) for name in ("keep", "keep_of", "scope")} | {"protect": list(budget.protect)}
    options |= {"target": dict(budget.target)} if budget.target else {}
    return Plan(layers.axes.trace.name, fingerprint(layers.axes.trace), scores.method, options, cuts, costs)


def _left(layers: Layers, keep: Mapping[Any, Sequence[int]], budget: Budget) -> float:
    """What is left over what may be, of the cost that exceeds its limit the most."""
    after = remaining(layers, keep)
    if budget.target:
        if unknown := set(budget.target) - set(COUNTED):
            raise UserMistake(f"whole pieces are not chosen by {min(unknown)}", fix=f"a target of {', '.join(COUNTED)}")
        return max(MEASURES[name](after)({}) / (share * MEASURES[name](layers.axes)({})) for name, share in budget.target.items())
    names = None if budget.keep_of == "model" else {t for pieces in layers.pieces.values() for p in pieces for t in p.tensors}
    return after.trace.count(names) / (budget.keep * layers.axes.trace.count(names))


def _order(layers: Layers, scores: Scores, budget: Budget) -> Iterator[tuple[Group, int]]:
    rows: list[tuple[float, float, int, Group, int]] = []
    for group in layers:
        pieces, values = layers.pieces[group.name], scores[group.name].tolist()
        ranks = sorted(range(group.size), key=values.__getitem__)
        for place, unit in enumerate(ranks):
            price = layers.axes.trace.count(pieces[unit].tensors) if budget.scope == "global" else 1
            key = (place + 1) / group.size if budget.scope == "local" else values[unit] / max(1, price)
            if not any(matches(name, p) for p in budget.protect for name in (pieces[unit].name, *pieces[unit].tensors)):
                rows.append((key, values[unit], len(rows), group, unit))
    return ((group, unit) for *_, group, unit in sorted(rows, key=lambda row: row[:3]))


def _cut(layers: Layers, group: Group, kept: Sequence[int], scores: Scores) -> Cut:
    removed = [unit for unit in range(group.size) if unit not in kept]
    row = scores[group.name]
    summary = {"kept": float(row[list(kept)].mean()), "removed": float(row[removed].mean())}
    pieces = layers.pieces[group.name]
    return Cut(group.name, group.kind, group.size, tuple(kept), tuple(pieces[unit].name for unit in removed), summary)


def remaining(layers: Layers, keep: Mapping[Any, Sequence[int]]) -> Axes:
    """The axes of what is left: tensors and contractions of removed pieces are no part of it."""
    axes, removed = layers.axes, layers.removed(keep)
    gone, nodes = {t for p in removed for t in p.tensors}, {node for p in removed for node in p.gone}
    trace = replace(axes.trace, tensors={key: t for key, t in axes.trace.tensors.items() if t.name not in gone})
    return replace(axes, trace=trace, uses=tuple(use for use in axes.uses if use.node not in nodes))


# ── rewrite ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite_pieces(model: nn.Module, layers: Layers, plan: Plan, example: Example, emission: Emission) -> Pruned:
    """Emit the model without the pieces and check it: the emitted module ≡ the traced graph with the pieces bypassed.

    Raises ModelLimit when the module's code does not do without them, or the pieces are no elements of a stack.
    """
    trace, removed = layers.axes.trace, _removed(layers, plan)
    tensors, graph = tensors_of(model, trace), bypassed(layers.axes, removed)
    if emission.emit == "graph":
        return Pruned(PrunedGraph(trace, graph, tensors), obstacle="a graph has no config")
    stays = _elements_left(layers, removed)
    wanted = reference(trace, tensors, trace.flatten(example.inputs), graph)
    obstacle = "a plain module has no config"
    if isinstance(model, PreTrainedModel):
        smaller = without_elements(model, stays)
        try:
            config = shrink_depth(model, stays)
            with settings_kept(smaller, without_elements(build_meta(type(model), model.config), stays)):
                adopt(smaller, build_meta(type(model), config))
                same = close(smaller, example.inputs, wanted)
            if same:
                return Pruned(smaller, config=config)
            obstacle = "the config for this depth computes something else"
        except ModelLimit as limit:
            obstacle = str(limit)
    plain = without_elements(model, stays, renumber=False)
    for smaller in (without_elements(model, stays), plain):
        if close(smaller, example.inputs, wanted):
            return Pruned(smaller, obstacle=obstacle, attributes=attributes_between(plain, smaller), elements=stays)
    raise ModelLimit(f"{type(model).__name__} does not run without {removed[0].name}", why=obstacle, fix='emit="graph"')


def _removed(layers: Layers, plan: Plan) -> list[Piece]:
    """The pieces that the plan removes, by name, in execution order: another trace may see one more or less that can go."""
    plan.check(layers)
    gone = {name for cut in plan.cuts for name in cut.members}
    found = [piece for group in layers for piece in layers.pieces[group.name] if piece.name in gone]
    if missing := sorted(gone - {piece.name for piece in found}):
        reasons = [held.reason.what for held in layers.frozen if held.members[0].name in missing]
        raise ModelLimit(f"{missing[0]} cannot go from this trace of the model", why="; ".join(reasons) or None)
    return found


def _elements_left(layers: Layers, removed: Sequence[Piece]) -> Elements:
    """For each stack that loses elements, those that stay, removable or not."""
    gone = {piece.name for piece in removed}
    found: Elements = {}
    for group in layers:
        if group.kind != "layer":
            raise ModelLimit("a residual branch is no element of a stack", fix='emit="graph", or prune layers')
        stack = layers.pieces[group.name][0].name.rpartition(".")[0]
        count = 1 + max(int(piece.name.rpartition(".")[2]) for piece in layers.pieces[group.name])
        stays = [i for i in range(count) if f"{stack}.{i}".lstrip(".") not in gone]
        if len(stays) < count:
            found[stack] = stays
    return found


def without_elements(model: nn.Module, stays: Elements, *, renumber: bool = True) -> nn.Module:
    """A copy of ``model`` with only these elements of each stack; the others are never copied.

    ``renumber`` gives attributes that held an element's place in its stack the new place.
    """
    memo: dict[int, Any] = {}
    for stack, kept in stays.items():
        memo |= {id(child): None for name, child in model.get_submodule(stack).named_children() if int(name) not in kept}
    smaller = duplicate(model, memo)
    for stack, kept in stays.items():
        new = smaller.get_submodule(stack)
        new._modules = {str(place): new._modules[str(element)] for place, element in enumerate(kept)}
        if renumber:
            _renumber(model.get_submodule(stack), new, kept)
    return smaller


def _renumber(old: nn.Module, new: nn.Module, kept: Sequence[int]) -> None:
    """An attribute that holds in every element the element's own number holds its number still."""
    elements = [dict(child.named_modules()) for child in old.children()]
    for path in set.intersection(*(set(own) for own in elements)):
        held = [vars(own[path]) for own in elements]
        for name in set.intersection(*(set(own) for own in held)):
            if all(type(own[name]) is int and own[name] == place for place, own in enumerate(held)):
                for place in range(len(kept)):
                    setattr(new.get_submodule(f"{place}.{path}".rstrip(".")), name, place)
