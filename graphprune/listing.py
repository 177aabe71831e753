"""Groups in, what ``inspect`` shows of them out: tables, plain data, or the reasons for one name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from graphprune.cost import parameter_count
from graphprune.groups import Group, Groups
from graphprune.levers import signature
from graphprune.pieces import Layers


def tables(found: Sequence[Groups]) -> tuple[Table, Table]:
    """What can shrink, equal layers in one row, and what cannot and why."""
    widths = found[0]
    title = f"{widths.axes.trace.name}: {len(widths)} groups, {sum(map(len, found[1:]))} stacks of whole pieces"
    columns = [Column(name, justify="right") for name in ("groups", "units", "per unit", "tensors")]
    table = Table(Column("group", overflow="fold"), *columns, "exact", title=title, box=SIMPLE_HEAD)
    for groups in found:
        count = parameter_count(groups.axes)
        whole = count({})
        for alike in _alike(groups):
            group, last = alike[0], alike[-1]
            price = whole - count({group.factor: group.size - 1})
            exact, name = "yes" if group.exact else "no", _span(group.name, last.name)
            table.add_row(name, str(len(alike)), str(group.size), f"{price:,}", str(len(group.members)), exact)
    frozen = Table(Column("frozen", overflow="fold"), Column("size", justify="right"), "why", box=SIMPLE_HEAD)
    for item in (item for groups in found for item in groups.frozen):
        frozen.add_row(item.members[0].name, str(item.factor.size), item.reason.what)
    return table, frozen


def explained(found: Sequence[Groups], name: str) -> str:
    """A width's chain of reasons, or what goes with a layer or branch."""
    whole = (own for own in found[1:] if isinstance(own, Layers))
    for own in whole:
        if any(name in (group.name, piece.name) for group in own for piece in own.pieces[group.name]):
            return own.explain(name)
    return found[0].explain(name)


def _alike(groups: Groups) -> list[list[Group]]:
    """The groups, those of equal layers together."""
    rows: dict[Any, list[Group]] = {}
    for group in groups:
        rows.setdefault(signature(group), []).append(group)
    return list(rows.values())


def _span(first: str, last: str) -> str:
    """Two names that differ in numbers as one: ``layers.0…29.mlp``."""
    pairs = zip(re.split(r"(\d+)", first), re.split(r"(\d+)", last), strict=False)
    return "".join(one if one == other else f"{one}…{other}" for one, other in pairs)


def rows(found: Sequence[Groups]) -> list[dict[str, Any]]:
    """The groups as plain data."""
    return [
        {"name": g.name, "kind": g.kind, "size": g.size, "exact": g.exact, "members": [str(m) for m in g.members]}
        for groups in found
        for g in groups
    ]
