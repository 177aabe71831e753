"""Trace in, Axes out: walk the graph once, let every op state its equations, read off what is left free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import Axis, Factor
from graphprune.calls import all_arguments, operation, takes_part, written_to
from graphprune.computed import computed
from graphprune.errors import RuleBug
from graphprune.memory import rewritten
from graphprune.meta import depends_on_data, is_empty, is_single, number_of, shapes_of, source_line
from graphprune.rules import Literal, Op, Typed, Use, find_rule
from graphprune.trace import Trace
from graphprune.unify import Conflict, Expression, Link, Reason, Solver, resolve

Solve = Callable[[Expression], Axis]


CHOOSING = ("index", "index_select", "gather")
"""Operations whose result is a choice from their first operand."""


@dataclass(frozen=True, slots=True)
class ResolvedUse:
    """A ``Use`` with its axis solved: the role of some factors of one operand dimension in one contraction."""

    node: fx.Node
    operand: fx.Node
    dim: int
    role: str
    axis: Axis
    joint: bool
    apart: bool


@dataclass(frozen=True)
class Axes:
    """The solution of the axis analysis: the type of every tensor in the graph, and why each factor is what it is.

    ``tensors`` maps parameter, buffer and constant names to one Axis a dimension, ``nodes`` maps every fx node to the axes of
    its value (a tuple of them for several outputs), ``literals`` the literal arguments that are sizes, ``least`` the units a
    factor must keep where that is more than one, ``computed`` the nodes that follow from sizes alone, ``chosen`` the dimensions of
    a node's value that shrink although nothing it is made of does.
    """

    trace: Trace
    tensors: Mapping[str, tuple[Axis, ...]]
    nodes: Mapping[fx.Node, Any]
    uses: tuple[ResolvedUse, ...]
    literals: Mapping[fx.Node, tuple[tuple[Literal, ...], Any]]
    pins: Mapping[Factor, tuple[Reason, ...]]
    renormalised: Mapping[Factor, tuple[Reason, ...]]
    links: tuple[Link, ...]
    origins: Mapping[tuple[str, int], int]
    pinned: Mapping[int, tuple[int, Reason]]
    activations: frozenset[fx.Node]
    least: Mapping[Factor, int]
    computed: frozenset[fx.Node]
    chosen: Mapping[fx.Node, tuple[int, ...]]

    @cached_property
    def distinct(self) -> tuple[Axis, ...]:
        """Every axis of a tensor or of a node's one value."""
        found = (axis for axes in (*self.tensors.values(), *self.nodes.values()) for axis in axes or ())
        return tuple(dict.fromkeys(axis for axis in found if isinstance(axis, Axis)))

    def factors(self) -> frozenset[Factor]:
        """Every factor on any parameter, buffer or constant."""
        return frozenset(f for axes in self.tensors.values() for axis in axes for f in axis.factors)


def propagate(trace: Trace, *, open_ends: bool = False) -> Axes:
    """Solve for the axis expression of every tensor of ``trace``.

    Model inputs and outputs are frozen (``open_ends`` leaves them free, which is how a single op is studied). An op without
    a rule freezes everything that touches it. Raises RuleBug when a rule breaks the shapes of its op.
    """
    walk = _Walk(trace, open_ends)
    for node in trace.graph.nodes:
        walk.visit(node)
    return walk.solution()


class _Walk:
    def __init__(self, trace: Trace, open_ends: bool) -> None:
        self.trace = trace
        self.open_ends = open_ends
        self.solver = Solver()
        self.values: dict[fx.Node, Any] = {}
        self.named: dict[str, Typed] = {}
        self.origins: dict[tuple[str, int], int] = {}
        self.active: set[fx.Node] = set()
        self.computed = computed(trace)
        self.uses: list[Use] = []
        self.literals: dict[fx.Node, tuple[list[Literal], Any]] = {}
        self.limits: list[tuple[Expression, int, Reason]] = []
        self.chosen: dict[fx.Node, tuple[int, ...]] = {}

    @cached_property
    def rewritten(self) -> frozenset[fx.Node]:
        """Values whose memory is written to."""
        return rewritten(self.trace.graph)

    def visit(self, node: fx.Node) -> None:
        if self._depends_on_inputs(node):
            self.active.add(node)
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.op == "output":
            self._output(node)
        elif node.op == "get_attr":
            self.values[node] = None
        elif node.op == "call_function":
            self.values[node] = self._own(self._constant(node) if node in self.computed else self._call(node), node)

    def _depends_on_inputs(self, node: fx.Node) -> bool:
        """Whether a value is an activation. Weights chosen by index (an expert's) are weights all the same."""
        if operation(node) in CHOOSING and node.args[0] not in self.active:
            return False
        return any(operand in self.active for operand in node.all_input_nodes) or node.name in self.trace.inputs

    def _placeholder(self, node: fx.Node) -> Any:
        tensor = self.trace.tensors.get(node.name)
        if tensor is not None:
            if tensor.name not in self.named:
                axes = tuple(self.solver.fresh(size) for size in tensor.shape)
                self.named[tensor.name] = Typed(axes)
                self.origins |= {(tensor.name, dim): axis[0][0].id for dim, axis in enumerate(axes) if any(axis)}
            return self._own(self.named[tensor.name], node)
        if not isinstance(node.meta.get("val"), Tensor):
            return node.meta.get("val")
        typed = Typed(tuple(self.solver.fresh(int(size)) for size in node.meta["val"].shape))
        if not self.open_ends:
            self._pin(typed, Reason("model input", node))
        return self._own(typed, node)

    def _output(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes if not self.open_ends else []:
            for typed in _each(self.values.get(operand)):
                self._pin(typed, Reason("model output", operand))
                self.solver.pin(typed.values or (), Reason("its positions are a model output", operand))

    def _constant(self, node: fx.Node) -> Typed:
        """Axes nothing is known about yet: whoever uses a constant says what they are."""
        return Typed(tuple(map(self.solver.fresh, shapes_of(node.meta["val"]))))

    def _call(self, node: fx.Node) -> Any:
        if takes_part(node):
            return self._part(node)
        shapes = shapes_of(node.meta.get("val"))
        rule = find_rule(node.target)
        if rule is None and shapes is None and not written_to(node):
            return self._freeze_positions(node, "read as a number")
        if rule is None:
            return self._freeze(node, _no_rule(node))
        op = Op(self.solver, node, self._arguments(node), shapes)
        try:
            result = rule(op)
        except Conflict as conflict:
            return self._freeze(node, f"{node.target}: {conflict}")
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if depends_on_data(node):
                return self._freeze(node, "its sizes depend on data")
            if is_empty(node):
                return self._freeze(node, "it has no elements")
            error.add_note(f"in the rule of {node.target} at {source_line(node)}")
            raise RuleBug(f"the rule of {node.target} failed: {error!r}") from error
        mismatch = _mismatch(result, shapes)
        if mismatch and depends_on_data(node):
            return self._freeze(node, "its sizes depend on data")
        if mismatch:
            raise RuleBug(f"the rule of {node.target} {mismatch}")
        result = self._chosen(op, result)
        self.uses += op.uses
        if op.literals:
            self.literals[node] = (op.literals, op.becomes)
        self.limits += [(axis, count, Reason(f"must keep {count}", node)) for axis, count in op.limits]
        self._in_place(op, result)
        self._freeze_positions(node, "computed with", [*op.understood, *(typed.values for typed in _each(result))])
        return result

    def _chosen(self, op: Op, result: Any) -> Any:
        """Dimensions of an activation that its operands have no layout for are axes of their own, unless its memory is shared."""
        if not op.chosen or op.node not in self.active or op.node in self.rewritten:
            return result
        self.chosen[op.node] = tuple(op.chosen)
        own = (self.solver.fresh(op.length(axis)) if dim in op.chosen else axis for dim, axis in enumerate(result.axes))
        return replace(result, axes=tuple(own))

    def _part(self, node: fx.Node) -> Any:
        whole, index = self.values.get(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        return whole[index] if isinstance(whole, tuple | list) else whole

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by schema name, defaults filled in, nodes replaced by what they stand for."""
        return {name: _replace(value, self._value) for name, value in all_arguments(node).items()}

    def _value(self, node: fx.Node) -> Any:
        value = self.values.get(node)
        return value if value is not None else number_of(node.meta.get("val"))

    def _freeze(self, node: fx.Node, why: str) -> Any:
        reason = Reason(why, node)
        for operand in node.all_input_nodes:
            for typed in _each(self.values.get(operand)):
                self._pin(typed, reason)
        self._freeze_positions(node, "computed with")
        shapes = shapes_of(node.meta.get("val"))
        if shapes is None:
            return None
        frozen = [self._frozen(shape, reason) for shape in ([shapes] if is_single(shapes) else shapes)]
        return frozen[0] if is_single(shapes) else tuple(frozen)

    def _freeze_positions(self, node: fx.Node, what: str, understood: Sequence[Expression | None] = ()) -> None:
        """An index tensor that an op does anything unforeseen with keeps the axis it ranges over from shrinking."""
        for operand in node.all_input_nodes:
            for typed in _each(self.values.get(operand)):
                if typed.values is not None and typed.values not in understood:
                    self.solver.pin(typed.values, Reason(f"its positions are {what}", node))

    def _frozen(self, shape: tuple[int, ...], reason: Reason) -> Typed:
        typed = Typed(tuple(self.solver.fresh(size) for size in shape))
        self._pin(typed, reason)
        return typed

    def _pin(self, typed: Typed, reason: Reason) -> None:
        for axis in typed.axes:
            self.solver.pin(axis, reason)

    def _own(self, result: Any, node: fx.Node) -> Any:
        """Mark whose value a Typed is, and whether it depends on the inputs."""
        if isinstance(result, Typed):
            return replace(result, source=node, activation=node in self.active)
        return tuple(self._own(part, node) for part in result) if isinstance(result, tuple | list) else result

    def _in_place(self, op: Op, result: Any) -> None:
        """What an operation writes to has the axes of what it gives; giving it other dimensions writes nothing."""
        if torch.Tag.inplace_view in op.node.target.tags:  # type: ignore[union-attr]
            return
        targets = (typed for operand in written_to(op.node) for typed in _each(self.values.get(operand)))
        for target, typed in zip(targets, _each(result), strict=False):
            for axis, other in zip(target.axes, typed.axes, strict=False):
                op.equal(axis, other)

    # ── reading the solution ─────────────────────────────────────────────────────────────────────────────────────────

    def solution(self) -> Axes:
        least, solve = self._least(), cache(resolve)
        pins: dict[Factor, list[Reason]] = defaultdict(list)
        soft: dict[Factor, list[Reason]] = defaultdict(list)
        for variable in self.solver.variables:
            if variable.meaning is None:
                factor = Factor(variable.id, variable.size)
                pins[factor] += variable.pins
                soft[factor] += variable.renormalised
        return Axes(
            trace=self.trace,
            tensors={name: tuple(map(solve, typed.axes)) for name, typed in self.named.items()},
            nodes={node: _resolved(value, solve) for node, value in self.values.items()},
            uses=tuple(ResolvedUse(u.node, u.operand, u.dim, u.role, solve(u.axis), u.joint, u.apart) for u in self.uses),
            literals={n: (tuple(_literal(one, solve) for one in found), other) for n, (found, other) in self.literals.items()},
            pins={factor: tuple(reasons) for factor, reasons in pins.items() if reasons},
            renormalised={factor: tuple(reasons) for factor, reasons in soft.items() if reasons},
            links=tuple(self.solver.links),
            origins=self.origins,
            pinned=self.solver.pinned,
            activations=frozenset(self.active),
            least=least,
            computed=self.computed,
            chosen=self.chosen,
        )

    def _least(self) -> dict[Factor, int]:
        """What each limit demands: of the innermost factor that is large enough, else nothing may shrink."""
        least: dict[Factor, int] = {}
        for axis, count, reason in self.limits:
            enough = [factor for factor, _ in resolve(axis).occurrences() if factor.size >= count > 1]
            if enough:
                least[enough[-1]] = max(count, least.get(enough[-1], 1))
            elif count > 1:
                self.solver.pin(axis, reason)
        return least


def _no_rule(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"control flow: {node.target.__name__} runs parts of its own, which are not looked into"
    return f"no rule for {node.target}"


def _literal(literal: Literal, solve: Solve) -> Literal:
    axes = literal.axes
    if literal.meaning == "sizes":
        return replace(literal, axes=tuple(map(solve, axes)))
    return literal if literal.meaning == "constant" else replace(literal, axes=solve(axes))


def _resolved(value: Any, solve: Solve) -> Any:
    if isinstance(value, Typed):
        return tuple(map(solve, value.axes))
    return tuple(_resolved(part, solve) for part in value) if isinstance(value, tuple | list) else None


def _each(value: Any) -> Iterator[Typed]:
    if isinstance(value, Typed):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _each(part)


def _mismatch(result: Any, shapes: Any) -> str | None:
    """What is wrong with the shapes a rule gives."""
    if shapes is None:
        return None
    found, expected = list(_each(result)), [shapes] if is_single(shapes) else list(shapes)
    if len(expected) != len(found):
        return f"gives {len(found)} tensors of {len(expected)}"
    wrong = ((t.axes, shape) for t, shape in zip(found, expected, strict=True) if tuple(map(Op.length, t.axes)) != shape)
    return next((f"gives {axes} where the op gives {shape}" for axes, shape in wrong), None)


def _replace(value: Any, lookup: Any) -> Any:
    if isinstance(value, fx.Node):
        return lookup(value)
    if isinstance(value, tuple | list):
        return [_replace(part, lookup) for part in value]
    return value
