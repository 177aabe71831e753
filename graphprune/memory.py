"""A graph or a model in, what it writes to out: operands, and the tensors of the model or of the caller whose memory that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from graphprune.calls import operands, written_to


def lent(graph: fx.Graph) -> frozenset[str]:
    """The names of placeholders that are written to, be it through a view."""
    return frozenset(node.name for node in rewritten(graph) if node.op == "placeholder")


def rewritten(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every value whose memory an operation writes to, be it through a view."""
    behind: dict[fx.Node, frozenset[fx.Node]] = {}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        shared = _shared(node) if node.op == "call_function" else []
        behind[node] = frozenset().union(*(behind[operand] for operand in shared)) or frozenset({node})
        found.update(*(behind[operand] for operand in written_to(node)))
    return frozenset(node for node, memory in behind.items() if memory & found)


def _shared(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the result may be."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    return [operand for argument, operand in operands(node) if argument.shared]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever a forward writes into the buffers of ``model`` (averages, counters, caches) is undone."""
    held = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(b, b._version, b.clone()) for _, row in held for b in row.values() if b is not None and not b.is_inference()]
    try:
        yield
    finally:
        for own, row in held:
            own.update(row)
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)
