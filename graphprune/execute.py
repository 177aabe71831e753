"""A traced graph, tensors and inputs in, outputs out: an interpreter that reads each weight when it is needed and no earlier.

The same walk serves the reference computations (double precision, masks at the contractions) and forward-only scoring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from graphprune.calls import all_arguments, is_check, operation, schema
from graphprune.device import CPU, beside, where
from graphprune.disk import OnDisk
from graphprune.experts import Gathered, gathers, multiplied
from graphprune.ranks import whole
from graphprune.trace import Trace

Edit = Callable[[fx.Node, fx.Node, Any], Any]
"""``edit(node, operand, value)``: what ``node`` sees in place of its operand's value."""

See = Callable[[fx.Node, Any], None]
"""``see(node, value)``: looks at the value of every node as it appears."""

Calls = dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments of each node, literal dtypes and devices replaced, for all walks that are alike in this."""

PART = 1 << 18
"""Elements of a weight that are brought to another precision at a time."""

aten = torch.ops.aten
READS_WEIGHT: Mapping[Any, int] = {
    aten.embedding.default: 0, aten.linear.default: 1, aten.conv1d.default: 1, aten.conv2d.default: 1, aten.conv3d.default: 1,
}  # fmt: skip
"""Operations that need their weight, the argument of this number, in parts only."""

SINGLE = (aten.fake_quantize_per_channel_affine.default, aten._fake_quantize_learnable_per_channel_affine.default)
"""Operations whose steps are in single precision, whatever is rounded to them."""

TYPELESS = frozenset({fx.Node, int, float, bool, str, type(None)})
"""Arguments that say nothing of a dtype or a device; by far the most do."""

DRAWN = 0.5
"""What takes the place of every random number where computations of different sizes are compared in another precision."""

STILL: Mapping[str, Any] = {"train": False, "training": False, "dropout_p": 0.0}
"""Arguments that tell an operation to draw nothing: a dropout then passes on what it is given."""

PLACES = ("multinomial", "randperm")
"""Operations that draw places: whole numbers, each below the size of what they are places in."""


def tensors_of(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """The model's tensors under the names the trace gives them. Nothing is copied."""
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    without_device = any(isinstance(value, Tensor) and value.is_meta for value in trace.example)
    constants = beside(dict(trace.constants), where(model)) if without_device else trace.constants
    return {t.name: constants[t.name] if t.kind == "constant" else owned[t.name] for t in trace.tensors.values()}


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
            walk.advance(node, dying)
            if see is not None and node.op == "call_function":
                see(node, walk.values.get(node))
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
        calls: Calls | None = None,
    ) -> None:
        self.trace, self.tensors, self.inputs, self.dtype, self.edit = trace, tensors, inputs, dtype, edit
        self.device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), CPU)
        self.values: dict[fx.Node, Any] = {}
        self.calls: Calls = {} if calls is None else calls

    def step(self, node: fx.Node) -> None:
        """Compute an input or an operation; weights, checks and the output are left alone."""
        if node.op == "placeholder" and node.name in self.inputs:
            self.values[node] = self.own(node, self.inputs[node.name])
        elif node.op == "get_attr":
            self.values[node] = Part(self.trace.module.get_submodule(str(node.target)), self.dtype, self.device)
        elif node.op == "call_function" and not is_check(node):
            self.values[node] = self.call(node)

    def advance(self, node: fx.Node, dying: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        """Compute a node, then drop what nobody asks for after it, as ``last_uses`` has it."""
        self.step(node)
        for dead in dying[node]:
            self.values.pop(dead, None)

    def call(self, node: fx.Node) -> Any:
        """The value of an operation on its operands' values, edited and retyped as this walk has it; ``values`` does not get it."""

        def fetch(operand: fx.Node) -> Any:
            value = self.fetch(operand)
            return value if self.edit is None else self.edit(node, operand, value)

        stored = None if self.dtype is None else self.stored(node)
        if stored is not None:
            return _in_parts(node, stored, fetch, self.dtype)
        if gathers(node) and self.is_own(node.args[0]):
            return self.gathered(node)
        if node not in self.calls:
            self.calls[node] = _retyped((node.args, node.kwargs), self.dtype, self.device)
        args, kwargs = fx.map_arg(self.calls[node], fetch)
        if self.dtype is not None and node.target in SINGLE:
            args = (args[0], *map(_single, args[1:]))
        if self.dtype is not None and is_drawn(node):
            return _undrawn(node, args, kwargs)
        target: Any = multiplied if node.target is aten.bmm.default else node.target
        return target(*args, **kwargs)

    def stored(self, node: fx.Node) -> Tensor | None:
        """The large weight that an operation reads, in the precision it is stored in, where it need not be whole in another."""
        place = READS_WEIGHT.get(node.target)
        weight = None if place is None or node.kwargs else node.args[place]
        if not self.is_own(weight):
            return None
        traced = self.trace.tensors[weight.name]
        if traced.dtype == self.dtype or not traced.dtype.is_floating_point:
            return None
        if prod(traced.shape) <= PART or prod(traced.shape[2:]) > 1 or node.args[6:] not in ((), (1,)):
            return None
        stored = whole(self.tensors[traced.name])
        return stored if self.edit is None else self.edit(node, weight, stored)

    def is_own(self, weight: Any) -> TypeGuard[fx.Node]:
        """Whether an operand is a tensor of the model, as it was given and not yet read."""
        known = isinstance(weight, fx.Node) and weight.name in self.trace.tensors
        return known and weight not in self.values and weight.name not in self.trace.lent

    def gathered(self, node: fx.Node) -> Gathered:
        """Matrices of a stack, one for each row, as they are stored: to be multiplied with one after the other."""
        given: Any = node.args
        stack = self.tensors[self.trace.tensors[given[0].name].name]
        stack = stack if isinstance(stack, OnDisk) else whole(stack)
        return Gathered(stack if self.edit is None else self.edit(node, given[0], stack), self.fetch(given[1][0]), self.dtype)

    def fetch(self, node: fx.Node) -> Any:
        """The value of a node; a weight is read the first time anything asks for it."""
        if node not in self.values:
            self.values[node] = self.own(node, whole(self.tensors[self.trace.tensors[node.name].name]))
        return self.values[node]

    def own(self, node: fx.Node, value: Any) -> Any:
        """A tensor of the model or of the caller as the graph gets it: a copy where the graph writes to it."""
        found = self.cast(value)
        return value.clone() if found is value and node.name in self.trace.lent and isinstance(value, Tensor) else found

    def cast(self, value: Any) -> Any:
        """A real or complex tensor in the precision of this walk, on its own device; anything else as it is."""
        return value.to(_replaced(value.dtype, self.dtype)) if isinstance(value, Tensor) else value


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class Part(fx.Interpreter):
    """A branch or the body of a loop, which its operation runs by itself: run as a walk runs the graph around it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__(module)
        self.dtype, self.device = dtype, device

    def __call__(self, *args: Any) -> Any:
        """What it gives."""
        return self.run(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A part of its own."""
        found = super().get_attr(target, args, kwargs)
        return Part(found, self.dtype, self.device) if isinstance(found, nn.Module) else found

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = _retyped(self.fetch_args_kwargs_from_env(n), self.dtype, self.device)
        target: Any = n.target
        return _undrawn(n, args, kwargs) if self.dtype is not None and is_drawn(n) else target(*args, **kwargs)


def finish(walk: Walk, nodes: Iterable[fx.Node], dying: Mapping[fx.Node, Sequence[fx.Node]]) -> Any:
    """Compute the given nodes, values dropped as ``last_uses`` has it; what the graph returns, where they reach its output."""
    for node in nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], walk.fetch)
        walk.advance(node, dying)
    return None


def _in_parts(node: fx.Node, stored: Tensor, fetch: Callable[[fx.Node], Any], dtype: torch.dtype | None) -> Tensor:
    """A product with a weight of another precision, some rows of it at a time; of a table only the rows that are read."""
    target: Any = node.target
    if target is aten.embedding.default:
        looked_up: Tensor = target(stored, *fx.map_arg(node.args[1:], fetch)).to(dtype)
        return looked_up
    given: Any = fx.map_arg((node.args[0], *node.args[2:]), fetch)
    x, bias, options = given[0], given[1] if len(given) > 1 else None, given[2:]
    rows = max(1, PART * len(stored) // stored.numel())
    weights = torch.split(stored, rows)
    biases = [None] * len(weights) if bias is None else torch.split(bias, rows)
    made = [target(x, part.to(dtype), own, *options) for part, own in zip(weights, biases, strict=True)]
    return torch.cat(made, -1 if stored.ndim == 2 else x.ndim - stored.ndim + 1)


def is_drawn(node: fx.Node) -> bool:
    """Whether chance has a part in a node's value, whatever its operands are."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    told = [value for name, value in all_arguments(node).items() if name in STILL]
    return not told or any(value not in (False, 0) for value in told)


def _undrawn(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What takes the place of a value that chance has a part in: nothing dropped, one number everywhere, places in order."""
    target: Any = node.target
    names = [argument.name for argument in schema(target)]
    if not STILL.keys().isdisjoint(names):
        still = [STILL.get(name, value) for name, value in zip(names, args, strict=False)]
        return target(*still, **{name: STILL.get(name, value) for name, value in kwargs.items()})
    value = target(*args, **kwargs)
    if operation(node) in PLACES:
        count = args[0] if operation(node) == "randperm" else args[0].shape[-1]
        return value.copy_(torch.arange(value.shape[-1], device=value.device) % count)
    return value.fill_(dict(zip(names, args, strict=False)).get("low", DRAWN))


def _retyped(value: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Literal real and complex dtypes replaced where one is given; what was traced without a device (meta) has this one."""
    if type(value) in TYPELESS:
        return value
    if isinstance(value, torch.dtype):
        return _replaced(value, dtype)
    if isinstance(value, torch.device):
        return device if value.type == "meta" else value
    if isinstance(value, tuple | list):
        return type(value)([_retyped(part, dtype, device) for part in value])
    if isinstance(value, dict):
        return {key: _retyped(part, dtype, device) for key, part in value.items()}
    return value


def _replaced(dtype: torch.dtype, by: torch.dtype | None) -> torch.dtype:
    """``by`` in place of a real dtype, complex numbers of its precision in place of a complex one."""
    if by is None or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return by.to_complex() if dtype.is_complex else by


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
