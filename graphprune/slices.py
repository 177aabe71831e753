"""A flat graph and its constants in, the same graph out, with slices where it looked up positions that a constant lists.

``x[..., [-2], :]`` exports as an index by a tensor, of which no rule knows that it names one position and leaves the others be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.runs import runs

aten = torch.ops.aten

COPIES = (aten.lift_fresh_copy, aten.lift_fresh, aten.detach, aten.detach_, aten.alias, aten.clone)
PIECES = 4
"""Runs of neighbouring positions above which a list of positions stays one."""


def as_slices(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> None:
    """Rewrite every index by one constant vector, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.index.Tensor and (found := _looked_up(node, constants)):
            dim, positions = found
            pieces = [(first, first + count) for first, count in runs(positions)]
            if len(pieces) <= PIECES:
                _replace(graph, node, dim, pieces)
    graph.eliminate_dead_code(is_impure_node=lambda node: not _is_copy(node))


def _looked_up(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> tuple[int, list[int]] | None:
    """The dimension and the positions, where there is one index and it is a constant vector of whole numbers."""
    source, indices = node.args
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    value = _constant(given[0][1], constants) if len(given) == 1 else None
    if value is None or value.ndim != 1 or value.is_floating_point() or value.dtype in (torch.bool, torch.uint8):
        return None
    size = source.meta["val"].shape[given[0][0]]  # type: ignore[union-attr]
    return (given[0][0], [int(place) % size for place in value.tolist()]) if isinstance(size, int) else None


def _constant(node: Any, constants: Mapping[fx.Node, Tensor]) -> Tensor | None:
    while _is_copy(node):
        node = node.args[0]
    value = constants.get(node)
    return None if value is None or value.is_meta or type(value) is not Tensor else value


def _is_copy(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in COPIES


def _replace(graph: fx.Graph, node: fx.Node, dim: int, pieces: list[tuple[int, int]]) -> None:
    with graph.inserting_before(node):
        parts = [_call(graph, node, aten.slice.Tensor, (node.args[0], dim, *piece)) for piece in pieces]
        whole = parts[0] if len(parts) == 1 else _call(graph, node, aten.cat.default, (parts, dim))
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _call(graph: fx.Graph, origin: fx.Node, target: Any, args: Any) -> fx.Node:
    """A node in the place of ``origin``, with the value it was traced to have."""
    node = graph.call_function(target, args)
    node.meta = {**origin.meta, "val": target(*fx.map_arg(args, lambda operand: operand.meta["val"]))}
    return node
