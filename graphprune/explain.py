"""Groups and a name in, the chain of reasons out: which operations couple or freeze a tensor, with the model's own lines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from graphprune.axes import Factor
from graphprune.errors import UserMistake, nearest
from graphprune.meta import source_line
from graphprune.propagate import Axes
from graphprune.unify import Reason

if TYPE_CHECKING:
    from graphprune.groups import Group, Groups, Member


def explain(groups: Groups, name: str) -> str:
    """For each dimension of the tensor (or member of the group) called ``name``: what it is made of, coupled to, frozen by.

    Raises UserMistake, with the nearest names, when there is no such tensor or group.
    """
    by_name = {group.name: group for group in groups.groups}
    known = groups.axes.tensors
    aliases = {alias: t.name for t in groups.axes.trace.tensors.values() for alias in t.names}
    name = aliases.get(name, name)
    if name in by_name:
        return "\n".join(_group(groups.axes, by_name[name], by_name[name].members[0]))
    if name not in known:
        raise UserMistake(f"no tensor or group is called {name!r}", fix=nearest(name, [*aliases, *by_name]))
    return "\n".join(line for dim, axis in enumerate(known[name]) for line in _dimension(groups, name, dim, str(axis)))


def _dimension(groups: Groups, name: str, dim: int, shown: str) -> Iterator[str]:
    yield f"{name}[{dim}] = {shown}"
    axes = groups.axes
    free = {group.factor: group for group in groups.groups}
    for factor in sorted(axes.tensors[name][dim].factors, key=lambda f: f.id):
        if factor in free:
            group = free[factor]
            own = next(m for m in group.members if m.name == name and m.dim == dim)
            yield from (f"  {line}" for line in _group(axes, group, own))
        else:
            frozen = next(f for f in groups.frozen if f.factor == factor)
            yield f"  {factor} cannot shrink: {frozen.reason.what}{_at(frozen.reason)}"
            yield from _chain_to_pin(axes, name, dim, frozen.reason)


def _group(axes: Axes, group: Group, own: Member) -> Iterator[str]:
    """The group, each member under the equation that joins it to those before it."""
    note = "" if group.exact else f", not exactly: {_soft(axes, group.factor)}"
    yield f"{group.factor} is {group.name} (kind {group.kind}), {group.size} units, removable{note}"
    tree = _tree(axes, own)
    for member in group.members:
        step = tree.get(_variable(axes, member))
        yield f"  {member}" + (f"\n    because {step.what}{_at(step)}" if step and member != own else "")


def _tree(axes: Axes, own: Member) -> dict[int | None, Reason]:
    """For every variable reachable from one structure, the last equation on the shortest chain to it."""
    graph, root = _links(axes), _variable(axes, own)
    if root not in graph:
        return {}
    return {after: graph.edges[before, after]["why"] for before, after in nx.bfs_edges(graph, root)}


def _variable(axes: Axes, member: Member) -> int | None:
    return axes.origins.get((member.name, member.dim))


def _soft(axes: Axes, factor: Factor) -> str:
    reason = axes.renormalised[factor][0]
    return f"{reason.what}{_at(reason)}"


def _chain_to_pin(axes: Axes, name: str, dim: int, reason: Reason) -> Iterator[str]:
    graph = _links(axes)
    start, goal = axes.origins.get((name, dim)), axes.pinned.get(id(reason))
    if start is None or goal is None or start not in graph or goal[0] not in graph:
        return
    if nx.has_path(graph, start, goal[0]):
        for step in _reasons(graph, nx.shortest_path(graph, start, goal[0])):
            yield f"    because {step.what}{_at(step)}"


def _reasons(graph: nx.Graph, path: list[int]) -> list[Reason]:
    steps = [graph.edges[edge]["why"] for edge in pairwise(path)]
    return [step for place, step in enumerate(steps) if place == 0 or step != steps[place - 1]]


def _links(axes: Axes) -> nx.Graph:
    graph = nx.Graph()
    graph.add_edges_from((link.one, link.other, {"why": link.why}) for link in reversed(axes.links))
    return graph


def _at(reason: Reason) -> str:
    return f"  [{reason.where.target}]  {source_line(reason.where)}" if isinstance(reason.where, fx.Node) else ""
