"""A traced graph, tensors and inputs in, outputs out: an interpreter that reads each weight when it is needed and no earlier.

The same walk serves the reference computations (double precision, masks at the contractions) and forward-only scoring, where
``tensors`` may be a mapping that loads from disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.trace import Trace

Edit = Callable[[fx.Node, fx.Node, Any], Any]
"""``edit(node, operand, value)``: what ``node`` sees in place of its operand's value."""

See = Callable[[fx.Node, Any], None]
"""``see(node, value)``: looks at the value of every node as it appears."""

CHECKS = ("aten::_assert_tensor_metadata", "aten::_assert_async", "aten::_assert_scalar")


def tensors_of(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """The model's tensors under the names the trace gives them. Nothing is copied."""
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {t.name: trace.constants[t.name] if t.kind == "constant" else owned[t.name] for t in trace.tensors.values()}


@torch.no_grad()
def execute(
    trace: Trace,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Any],
    *,
    graph: fx.Graph | None = None,
    dtype: torch.dtype | None = None,
    edit: Edit | None = None,
    see: See | None = None,
) -> Any:
    """Run ``graph`` (the trace's own unless given) on flat ``inputs``; returns the output node's structure of values.

    ``dtype`` replaces every floating-point dtype on the way, literal ones included. Values are dropped after their last use.
    """
    walk = Walk(trace, tensors, dict(zip(trace.inputs, inputs, strict=True)), dtype, edit)
    nodes = list((graph or trace.graph).nodes)
    dying = last_uses(nodes)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        for node in nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], walk.fetch)
            walk.step(node)
            if see is not None and node.op == "call_function":
                see(node, walk.values.get(node))
            for dead in dying[node]:
                walk.values.pop(dead, None)
    finally:
        torch.set_default_dtype(previous)
    raise AssertionError("a graph without an output node")


class Walk:
    """One run of the graph: computes node after node on demand and holds ``values`` until somebody drops them."""

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        edit: Edit | None = None,
    ) -> None:
        self.trace, self.tensors, self.inputs, self.dtype, self.edit = trace, tensors, inputs, dtype, edit
        self.values: dict[fx.Node, Any] = {}

    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node.name in self.inputs:
            self.values[node] = self.cast(self.inputs[node.name])
        elif node.op == "call_function" and not _is_check(node):
            self.values[node] = self.call(node)

    def call(self, node: fx.Node) -> Any:
        def fetch(operand: fx.Node) -> Any:
            value = self.fetch(operand)
            return value if self.edit is None else self.edit(node, operand, value)

        args, kwargs = fx.map_arg((node.args, node.kwargs), fetch)
        if self.dtype is not None:
            args, kwargs = _retyped(args, self.dtype), _retyped(kwargs, self.dtype)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def fetch(self, node: fx.Node) -> Any:
        """The value of a node; a weight is read the first time anything asks for it."""
        if node not in self.values:
            self.values[node] = self.cast(self.tensors[self.trace.tensors[node.name].name])
        return self.values[node]

    def cast(self, value: Any) -> Any:
        if self.dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value


def _is_check(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in CHECKS


def _retyped(value: Any, dtype: torch.dtype) -> Any:
    """Literal floating-point dtypes replaced."""
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, tuple | list):
        return type(value)(_retyped(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _retyped(part, dtype) for key, part in value.items()}
    return value


def last_uses(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """For each node, the values nobody asks for after it."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in reversed(nodes):
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                dying[node].append(operand)
    return dying
