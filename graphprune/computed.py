"""A Trace in, the nodes whose values follow from sizes alone out; and those values, evaluated at the original sizes.

Slopes of a linear bias, sine tables, rotary frequencies written in a forward: numbered positions that ops made something of. No
rule needs to see through them. Each is a constant like a buffer is: what uses it gives it axes, and it is sliced, not recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import Axis, Factor
from graphprune.calls import written_to
from graphprune.execute import Walk
from graphprune.rules import NUMBERED
from graphprune.trace import Trace


def computed(trace: Trace) -> frozenset[fx.Node]:
    """The nodes that depend on numbered positions and constants, on no input, weight or chance, and are never written to."""
    still: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if _is_still(trace, node, still):
            still.add(node)
            if _is_numbered(node) or any(operand in found for operand in node.all_input_nodes):
                found.add(node)
    changed = [operand for node in trace.graph.nodes for operand in written_to(node)]
    return frozenset(found - _connected([node for node in changed if node in found], found))


def _is_still(trace: Trace, node: fx.Node, still: set[fx.Node]) -> bool:
    if node.op == "placeholder":
        return node.name in trace.tensors and _is_known(trace.constants.get(trace.tensors[node.name].name))
    if node.op != "call_function" or written_to(node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    chance = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not chance and all(operand in still for operand in node.all_input_nodes)


def _is_known(value: Tensor | None) -> bool:
    return value is not None and not value.is_meta and type(value) in (Tensor, torch.nn.Parameter)


def _is_numbered(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in NUMBERED


def _connected(start: list[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """What may share memory with ``start``: everything reachable from it, either way."""
    seen: set[fx.Node] = set()
    while start:
        node = start.pop()
        if node not in seen:
            seen.add(node)
            start += [other for other in (*node.all_input_nodes, *node.users) if other in within]
    return seen


def evaluated(trace: Trace, wanted: frozenset[fx.Node]) -> Iterator[tuple[fx.Node, Any]]:
    """Each wanted node with its value in double precision."""
    walk = Walk(trace, trace.constants, {}, torch.float64)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for node in trace.graph.nodes:
            if node in wanted:
                for operand in node.all_input_nodes:
                    _reach(walk, operand)
                walk.step(node)
                yield node, walk.values[node]
    finally:
        torch.set_default_dtype(previous)


def _reach(walk: Walk, node: fx.Node) -> None:
    """Compute what a node needs, first."""
    if node.op == "call_function" and node not in walk.values:
        for operand in node.all_input_nodes:
            _reach(walk, operand)
        walk.step(node)


def changing(trace: Trace, axes: Mapping[fx.Node, Sequence[Axis]], factors: frozenset[Factor]) -> frozenset[Factor]:
    """Those of the factors along which some of these constants change: of the others any part is what a smaller one would be."""
    concerned = frozenset(node for node, dims in axes.items() if any(axis.factors & factors for axis in dims))
    return frozenset(
        factor
        for node, value in evaluated(trace, concerned)
        for dim, axis in enumerate(axes[node])
        if not torch.equal(value, value.narrow(dim, 0, 1).expand_as(value))
        for factor in axis.factors & factors
    )
