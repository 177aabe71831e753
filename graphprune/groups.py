"""Axes in, Groups out: each free factor with everything that must go together with one of its units, its kind, and why.

Kinds fall out of what an axis does, none of what a module is called:

========== ==========================================================================================
head        batch axis of a product of activations, keys included: a KV head with all its query heads
query       batch axis that keys and values lack: one query head in every KV group
qk_width    contracted by a product of activations: what queries and keys are compared on
value_width left free by a product of activations: what attention carries
expert      units ranked against each other to choose who computes
hidden      normalised over, or written by several layers: the width of a residual stream
ffn         written by one linear map, or by several into a product, and read by the next
channel     written by convolutions, at least as often as by linear maps
========== ==========================================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import networkx as nx

from graphprune.axes import Axis, Factor
from graphprune.dependency import Join, Roles, Structure, dependency_graph
from graphprune.errors import UserMistake, nearest
from graphprune.explain import explain
from graphprune.propagate import Axes
from graphprune.unify import Reason

ATTENTION = ("head", "query", "qk_width", "value_width")
KINDS = (*ATTENTION, "expert", "hidden", "ffn", "channel")


@dataclass(frozen=True, slots=True)
class Member:
    """One structure of a group: a dimension of a parameter or buffer on which the group's factor lies."""

    name: str
    dim: int
    role: str
    order: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}] {self.role}"


@dataclass(frozen=True, slots=True)
class Group:
    """A coupled group: ``size`` units, each of which is a slice of every member.

    ``exact`` where no norm spans it; ``least`` is how many units must stay for the model to run.
    """

    name: str
    kind: str
    factor: Factor
    members: tuple[Member, ...]
    exact: bool
    least: int = 1

    @property
    def size(self) -> int:
        """Number of units."""
        return self.factor.size

    def touches(self, patterns: Iterable[str]) -> bool:
        """Whether a pattern names the group or any tensor, or module holding a tensor, of it."""
        names = {self.name, *(member.name for member in self.members)}
        return any(matches(name, pattern) for pattern in patterns for name in names)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A factor that cannot shrink, what it lies on, and why."""

    factor: Factor
    members: tuple[Member, ...]
    reason: Reason


@dataclass(frozen=True)
class Groups:
    """Every coupled group of a model, everything frozen, and the dependency graph both were read from."""

    axes: Axes
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    graph: nx.MultiDiGraph

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    @property
    def kinds(self) -> Counter[str]:
        """How many groups there are of each kind."""
        return Counter(group.kind for group in self.groups)

    def explain(self, name: str) -> str:
        """Why a tensor (or group) is coupled to what it is, or frozen: the chain of operations with the model's lines."""
        return explain(self, name)


def couple(axes: Axes) -> Groups:
    """Find the coupled groups: index identity from the axes, roles and flow from the dependency graph."""
    named = axes.factors()
    free = frozenset(factor for factor in named if factor not in axes.pins)
    graph, roles = dependency_graph(axes, free)
    members = _members(axes, roles)
    kinds = _kinds(axes, graph, roles, members)
    summed = {factor for use in axes.uses if use.role in ("contracted", "ranked") for factor in use.axis.factors}
    weighty = {factor for factor in free if any(member.name in axes.trace.parameters for member in members[factor])}
    picked = _picked(axes)
    live = [factor for factor in free & weighty if factor in summed and (factor not in picked or kinds[factor] in ATTENTION)]
    ordered = sorted(live, key=lambda factor: (min(m.order for m in members[factor]), factor.id))
    names = _names(ordered, members, kinds)
    groups = tuple(Group(names[f], kinds[f], f, members[f], f not in axes.renormalised, axes.least.get(f, 1)) for f in ordered)
    frozen = tuple(Frozen(f, members[f], axes.pins[f][0]) for f in sorted(named - free, key=lambda f: f.id))
    unused = Reason("no traced operation sums over it"), Reason("no parameter lies on it")
    why = {
        factor: picked[factor] if factor in picked and factor in weighty & summed else unused[factor in summed] for factor in free
    }
    idle = tuple(Frozen(f, members[f], why[f]) for f in sorted(free - set(live), key=lambda f: f.id))
    return Groups(axes, groups, frozen + idle, graph)


def _picked(axes: Axes) -> dict[Factor, Reason]:
    """The factors that shrink by leaving out a part of something that does not: worth it for attention only."""
    places = ((node, axes.nodes[node][dim]) for node, dims in axes.chosen.items() for dim in dims)
    return {
        factor: Reason("read from a width that has another layout elsewhere", node)
        for node, axis in places
        for factor in axis.factors
    }


def _members(axes: Axes, roles: Roles) -> Mapping[Factor, tuple[Member, ...]]:
    """Every occurrence of every factor on a named tensor, in execution order."""
    found: dict[Factor, list[Member]] = defaultdict(list)
    for name, dims in axes.tensors.items():
        for dim, axis in enumerate(dims):
            for factor in axis.factors:
                role = roles.of(Structure(name, dim), factor)
                found[factor].append(Member(name, dim, role, roles.order.get(name, len(roles.order))))
    return {factor: tuple(sorted(row, key=lambda m: (m.order, m.dim))) for factor, row in found.items()}


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kinds(axes: Axes, graph: nx.MultiDiGraph, roles: Roles, members: Mapping[Factor, tuple[Member, ...]]) -> dict[Factor, str]:
    joint: dict[Factor, set[str]] = defaultdict(set)
    written: dict[Factor, Counter[bool]] = defaultdict(Counter)
    for use in axes.uses:
        for factor in use.axis.factors:
            if use.joint or use.role == "ranked":
                joint[factor].add(use.role)
            elif use.role == "free" and use.operand not in axes.activations:
                written[factor][_is_convolution(use.node.target)] += 1
    arriving = Counter((target, key) for _, target, key in graph.edges(keys=True) if isinstance(target, Join))
    gated = {key for join, key in arriving if join.multiplicative}
    added = {key for (join, key), sources in arriving.items() if sources > 1 and not join.multiplicative}
    normed = axes.renormalised.keys() - gated
    heads = _covers(axes, {factor for factor, found in joint.items() if "batch" in found})
    return {factor: _kind(factor, joint[factor], heads, written[factor], factor in added or factor in normed) for factor in members}


def _kind(factor: Factor, joint: set[str], heads: Mapping[Factor, bool], written: Counter[bool], shared: bool) -> str:
    if "ranked" in joint:
        return "expert"
    if factor in heads:
        return "head" if heads[factor] else "query"
    if "contracted" in joint:
        return "qk_width"
    if "free" in joint:
        return "value_width"
    if written[True] and written[True] >= written[False]:
        return "channel"
    return "hidden" if shared else "ffn"


def _covers(axes: Axes, factors: set[Factor]) -> dict[Factor, bool]:
    """Of the head factors that share an axis, those that lie on most indices, on keys as well as queries, are the KV heads."""
    reach: Counter[Factor] = Counter()
    together: dict[Factor, set[Factor]] = defaultdict(set)
    for dims in axes.tensors.values():
        for axis in dims:
            for factor in axis.factors & factors:
                reach[factor] += _reach(axis, factor)
                together[factor] |= axis.factors & factors
    return {factor: all(reach[factor] >= reach[other] for other in together[factor]) for factor in reach}


def _reach(axis: Axis, factor: Factor) -> int:
    """On how many indices of ``axis`` a factor lies."""
    return sum(_share(product, factor) for product in axis.segments)


def _share(product: tuple[Factor | Axis, ...], factor: Factor) -> int:
    sizes = prod(item.size for item in product)
    shares = (_reach(item, factor) / item.size for item in product if isinstance(item, Axis))
    return sizes if factor in product else round(sizes * max(shares, default=0.0))


def _is_convolution(target: object) -> bool:
    return "conv" in str(target)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _names(factors: list[Factor], members: Mapping[Factor, tuple[Member, ...]], kinds: Mapping[Factor, str]) -> dict[Factor, str]:
    """``module of the first producer:kind``, numbered where that is taken; stable across checkpoints of one architecture."""
    names: dict[Factor, str] = {}
    taken: Counter[str] = Counter()
    for factor in factors:
        trigger = next((m for m in members[factor] if m.role == "produces"), members[factor][0])
        name = f"{trigger.name.rpartition('.')[0] or trigger.name}:{kinds[factor]}"
        taken[name] += 1
        names[factor] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names


def matches(name: str, pattern: str) -> bool:
    """A pattern is a glob, or the dotted name of a module or tensor."""
    return fnmatchcase(name, pattern) or name == pattern or name.startswith((f"{pattern}.", f"{pattern}:"))


def check_named(groups: Groups, patterns: Iterable[str]) -> None:
    """Raise UserMistake for a pattern that names no group, tensor or module of the model."""
    tensors = [name for tensor in groups.axes.trace.tensors.values() for name in tensor.names]
    names = {*tensors, *(group.name for group in groups)}
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            modules = {name[:place] for name in tensors for place, letter in enumerate(name) if letter == "."}
            raise UserMistake(f"nothing in the model is called {pattern!r}", fix=nearest(pattern, names | modules))
