"""A graph or a model in, what it writes to out: operands, and the tensors of the model or of the caller whose memory that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.calls import operands, written_to

OWN = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What torch keeps in a module."""


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
    """Whatever a forward leaves in ``model`` is undone: in its buffers (averages, counters) and its other attributes (caches)."""
    modules = list(model.modules())
    buffers = {id(b): b for module in modules for b in module._buffers.values() if b is not None and not b.is_inference()}
    values = [(buffer, buffer._version, buffer.clone()) for buffer in buffers.values()]
    attributes: list[dict[str, Any]] = [vars(module) for module in modules]
    held = [*attributes, *(part for own in attributes for part in own.values() if isinstance(part, dict | list | set))]
    before = [(part, copy(part)) for part in held]
    try:
        yield
    finally:
        for part, was in before:
            _put_back(part, was)
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)


def _put_back(part: Any, was: Any) -> None:
    """Give a dictionary, list or set the very things it held."""
    if isinstance(part, list):
        part[:] = was
    elif isinstance(part, set) or part.keys() != was.keys() or any(part[name] is not value for name, value in was.items()):
        part.clear()
        part.update(was)


@contextmanager
def caches_emptied(model: nn.Module, run: Callable[[], Sequence[Tensor]], *, refill: bool = True) -> Iterator[None]:
    """Meanwhile the dictionaries in which forwards have kept tensors are empty, where ``run`` gives the same without them: what a
    trace sees then is how they are computed. They are put back in the end if ``refill``."""
    found = [(vars(module), name) for module in model.modules() for name in vars(module) if name not in OWN]
    dictionaries = [(own, name) for own, name in found if type(own[name]) is dict]
    caches = [(own, name, own[name]) for own, name in dictionaries if any(isinstance(v, Tensor) for v in own[name].values())]
    if not caches:
        yield
        return
    wanted = run()
    _refill(caches, empty=True)
    try:
        same = _equal(run(), wanted)
    except Exception:  # noqa: BLE001  what has lost something it needs may fail in any way
        same = False
    _refill(caches, empty=same)
    try:
        yield
    finally:
        _refill(caches, empty=same and not refill)


def _refill(caches: Sequence[tuple[dict[str, Any], str, dict[Any, Any]]], *, empty: bool) -> None:
    for own, name, held in caches:
        own[name] = {} if empty else held


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
