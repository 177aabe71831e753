"""Groups in, the figures of a coverage row out: kinds, attention with prunable heads, what is frozen and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

from torch import fx

from graphprune.axes import Factor
from graphprune.groups import Groups
from graphprune.meta import source_line

HEADS = ("head", "query")
OUTSIDE = ("model input", "spatial extent")


def measured(groups: Groups, config: Any) -> dict[str, Any]:
    """Shares are of the parameters that the traced call uses, tensors over the vocabulary excluded."""
    sizes, used = counted(groups, config), unused(groups)
    own = {name: size for name, size in sizes.items() if name not in used}
    free = {group.factor for group in groups}
    inner = {group.factor for group in groups if group.kind != "hidden"}
    total = max(1, sum(own.values()))
    return {
        "kinds": dict(groups.kinds),
        "attention": attention(groups),
        "frozen": round(sum(own[n] for n in own if not lies_on(groups, n, free)) / total, 4),
        "hidden_only": round(sum(own[n] for n in own if lies_on(groups, n, free) and not lies_on(groups, n, inner)) / total, 4),
        "unused": round(sum(sizes[n] for n in used if n in sizes) / max(1, sum(sizes.values())), 4),
        "reasons": reasons(groups, set(own)),
    }


def counted(groups: Groups, config: Any) -> dict[str, int]:
    """Parameters that are not over the vocabulary, with their sizes."""
    words = set(vocabularies(config))
    own = groups.axes.trace.parameters.values()
    return {tensor.name: prod(tensor.shape) for tensor in own if not (len(tensor.shape) == 2 and words & set(tensor.shape))}


def vocabularies(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if "vocab" in name and isinstance(value, int):
            yield value
        elif hasattr(value, "to_dict"):
            yield from vocabularies(value)


def unused(groups: Groups) -> set[str]:
    """Parameters that no operation of the traced call reads."""
    holders = [node for node in groups.axes.trace.graph.nodes if node.op == "placeholder"]
    read = {groups.axes.trace.tensors[node.name].name for node in holders if node.users and node.name in groups.axes.trace.tensors}
    return set(groups.axes.trace.parameters) - read


def lies_on(groups: Groups, name: str, factors: set[Factor]) -> bool:
    return any(axis.factors & factors for axis in groups.axes.tensors[name])


def attention(groups: Groups) -> list[int]:
    """Of the products that compare activations over several heads, how many have heads that can go; and how many there are."""
    kinds = {group.factor: group.kind for group in groups}
    heads: dict[fx.Node, set[Factor]] = defaultdict(set)
    for use in groups.axes.uses:
        if use.joint and use.role == "batch":
            heads[use.node] |= {factor for factor in use.axis.factors if not is_outside(groups, factor)}
    several = [factors for factors in heads.values() if factors]
    return [sum(any(kinds.get(factor) in HEADS for factor in factors) for factors in several), len(several)]


def is_outside(groups: Groups, factor: Factor) -> bool:
    return any(reason.what in OUTSIDE for reason in groups.axes.pins.get(factor, ()))


def reasons(groups: Groups, names: set[str]) -> dict[str, int]:
    """Why factors of parameters are frozen, with the parameters' total size on them, the largest first."""
    found: Counter[str] = Counter()
    for frozen in groups.frozen:
        on = {member.name for member in frozen.members} & names
        if on and frozen.factor.size > 1:
            where = frozen.reason.where
            line = source_line(where) if isinstance(where, fx.Node) else ""
            found[f"{frozen.reason.what} | {line}"] += sum(prod(groups.axes.trace.parameters[name].shape) for name in on)
    return dict(found.most_common(8))
