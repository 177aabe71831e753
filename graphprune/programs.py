"""A graph and a trace in, whether they are the same program out: the same operations on the same operands, however each is told of
sizes, and however it comes by its constants."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphprune import quiet
from graphprune.calls import all_arguments, is_check, operation
from graphprune.computed import computed, evaluated
from graphprune.trace import Inputs, Trace, trace

aten = torch.ops.aten
PIECES = ("split", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
"""Operations that cut a dimension into pieces whose sizes they work out."""


def traces_to(model: nn.Module, inputs: Inputs, graph: fx.Graph) -> bool:
    """Whether a model's trace is the same program as a graph. Raises ModelLimit where it cannot be traced."""
    with quiet.building():
        return same_program(graph, trace(model, inputs))


def same_program(one: fx.Graph, other: Trace) -> bool:
    """Whether a graph calls the same operations on the same operands with the same literals as a trace does, in the same order.

    A reshape that need not copy is a view; a chunk is a split into the sizes that it gives; a squeeze names what it drops; what is
    viewed as another tensor is told its shape; a slice ends where its operand does; attention is told its scale. What neither
    gives back, and in which order a value lies in memory, do not count. A constant that the graph has by its elements must be
    what the trace computes.
    """
    mine, theirs = ([node for node in graph.nodes if _meant(node) is node] for graph in (one, other.graph))
    if len(mine) != len(theirs):
        return False
    pairs = list(zip(mine, theirs, strict=True))
    told = {twin: node for node, twin in pairs if node.target is torch.tensor}
    if not told.keys() <= computed(other):
        return False
    values = dict(evaluated(other, frozenset(told)))
    behind = _only_for(told, other.graph) | _idle(other.graph)
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in pairs:
        twins[node] = twin
        if node.op != twin.op:
            return False
        if twin in behind:
            continue
        if twin in told:
            if node.args[0] != values[twin].tolist() or node.kwargs["dtype"] != twin.meta["val"].dtype:
                return False
            continue
        (target, arguments), (its_target, its_arguments) = _spelled(node, twin), _spelled(twin, twin)
        if node.op == "call_function" and target is not its_target:
            return False
        if repr(fx.map_arg(arguments, lambda node: twins[_meant(node)])) != repr(fx.map_arg(its_arguments, _meant)):
            return False
    return True


def _meant(node: fx.Node) -> fx.Node:
    """The value that a node gives in another memory layout, which a size may call for or not; the node itself where it is none."""
    while node.target is aten.contiguous.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _idle(graph: fx.Graph) -> set[fx.Node]:
    """What nothing comes of: a size that is looked at, for instance."""
    idle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and idle.issuperset(node.users) and (is_check(node) or not node.is_impure()):
            idle.add(node)
    return idle


def _only_for(told: Collection[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """What is computed for these nodes alone."""
    behind: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.users and all(user in behind or user in told for user in node.users):
            behind.add(node)
    return behind.difference(told)


def _spelled(node: fx.Node, twin: fx.Node) -> tuple[Any, Any]:
    """What a node calls and the arguments by name, defaults filled in; of operations that do the same always the same one. The
    sizes of its operands are those of its twin's."""
    given: Mapping[str, Any] = all_arguments(node)
    if node.target is aten.reshape.default:
        return aten.view.default, list(given.values())
    if operation(node) in ("view_as", "reshape_as"):
        return aten.view.default, [given["self"], list(node.meta["val"].shape)]
    if operation(node) in PIECES:
        sizes = [piece.shape[given["dim"]] for piece in node.meta["val"]]
        return aten.split_with_sizes.default, [given["self"], sizes, given["dim"]]
    if node.target is aten.slice.Tensor:
        size = twin.all_input_nodes[0].meta["val"].shape[given["dim"]]
        return node.target, [given["self"], given["dim"], slice(given["start"], given["end"], given["step"]).indices(size)]
    if node.target is aten.scaled_dot_product_attention.default and given["scale"] is None:
        return node.target, list({**given, "scale": given["query"].meta["val"].shape[-1] ** -0.5}.values())
    if operation(node) == "squeeze":
        shape = given["self"].meta["val"].shape
        told = given.get("dim", list(range(len(shape))))
        dims = sorted(dim % len(shape) for dim in (told if isinstance(told, list | tuple) else [told]))
        return aten.squeeze.dims, [given["self"], [dim for dim in dims if shape[dim] == 1]]
    return node.target, list(given.values()) or [node.args, node.kwargs]
