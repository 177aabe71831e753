"""The table that every op rule stands in, and what a rule sees: an Op with typed operands. Receives one fx node at a time.

A rule states axis facts about one family of ATen operations: which axes are equal, contracted, renormalised or pinned. It
knows nothing of scores, weights or module types. It also states which literal arguments are sizes, so that they can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from graphprune.calls import operation
from graphprune.unify import ONE, Expression, Reason, Solver, free_variables, length

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Typed:
    """A tensor by its axes.

    ``values`` is, for an index tensor, the axis that its values are positions on; ``activation`` says that it depends on the
    model's inputs, not only on its weights.
    """

    axes: tuple[Expression, ...]
    values: Expression | None = None
    source: fx.Node | None = field(default=None, compare=False)
    activation: bool = False


Result = Typed | Sequence[Typed] | None


@dataclass(frozen=True, slots=True)
class Use:
    """One operand dimension in a contraction: ``contracted``, ``free`` (reaches the output) or ``batch`` (in both operands).

    ``axis`` is the part of the dimension that has the role; ``joint`` tells a product of two activations (attention) from a
    product with a weight; ``apart`` says that units zeroed in the other operands still count here, as in a distance.
    """

    node: fx.Node
    operand: fx.Node
    dim: int
    role: str
    axis: Expression
    joint: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Literal:
    """What a literal argument of an op means: a size, a list of sizes, or a position on an axis."""

    name: str
    axes: Any
    meaning: str = "size"


class Op:
    """One node as a rule sees it: arguments by their schema names, tensors as Typed, symbolic sizes as numbers."""

    def __init__(self, solver: Solver, node: fx.Node, arguments: Mapping[str, Any], shapes: Any) -> None:
        self.solver = solver
        self.node = node
        self.arguments = arguments
        self.shapes = shapes
        self.uses: list[Use] = []
        self.literals: list[Literal] = []
        self.limits: list[tuple[Expression, int]] = []
        self.understood: list[Expression] = []
        self.chosen: list[int] = []
        self.becomes: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where this overload has none."""
        found = self.arguments.get(name)
        return default if found is None else found

    @property
    def name(self) -> str:
        """The operation's bare name: ``linear``."""
        return operation(self.node)

    @property
    def tensors(self) -> list[Typed]:
        """Every tensor operand, in schema order."""
        return [value for value in _flat(self.arguments.values()) if isinstance(value, Typed)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only output."""
        shape: tuple[int, ...] = self.shapes
        return shape

    def dim(self, name: str, rank: int) -> int:
        """The dimension named by an argument, counted from the front."""
        return int(self[name]) % max(rank, 1)

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """The dimensions an argument names, all of them when it names none."""
        value = self.get(name)
        if value is None or value == []:
            return tuple(range(rank))
        return tuple(int(dim) % rank for dim in ([value] if isinstance(value, int) else value))

    # ── axis facts ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fresh(self, shape: Iterable[int]) -> tuple[Expression, ...]:
        """Axes nothing is known about yet."""
        return tuple(self.solver.fresh(size) for size in shape)

    def equal(self, one: Expression, other: Expression) -> bool:
        """The two axes are the same axis. Returns whether that can be; else both are frozen."""
        return self.solver.unify(one, other, Reason("these are one axis", self.node))

    def choose(self, dims: Iterable[int]) -> None:
        """Of these dimensions of the result, a whole of its own, positions can be dropped without any operand's."""
        self.chosen += dims

    def pinned(self, size: int, what: str) -> Expression:
        """A new axis that cannot shrink."""
        axis = self.solver.fresh(size)
        self.pin(axis, what)
        return axis

    def still(self, size: int, *axes: Expression) -> Expression:
        """A new axis that cannot shrink because frozen ``axes`` cannot, for their reason."""
        axis = self.solver.fresh(size)
        reasons = [leaf.pins[0] for other in axes for leaf in free_variables(other)]
        self.solver.pin(axis, reasons[0] if reasons else Reason("it is one position", self.node))
        return axis

    def pin(self, axis: Expression, what: str) -> None:
        """``axis`` cannot shrink, because of ``what`` this op does."""
        self.solver.pin(axis, Reason(what, self.node))

    def renormalise(self, axis: Expression, what: str) -> None:
        """This op normalises over ``axis``."""
        self.solver.renormalise(axis, Reason(what, self.node))

    def cut(self, axis: Expression, offset: int) -> tuple[Expression, Expression]:
        """``axis`` before and from ``offset``."""
        return self.solver.cut(axis, offset, Reason(f"cut at {offset}", self.node))

    @staticmethod
    def length(axis: Expression) -> int:
        """The size of ``axis``."""
        return length(axis)

    def literal(self, name: str, axes: Expression | Sequence[Expression], becomes: Any = None) -> None:
        """The literal argument ``name`` is the size of an axis, or lists the sizes of several (-1 and symbols stay).

        ``becomes`` is the operation that takes such an argument, where this one spells it otherwise.
        """
        self.literals.append(Literal(name, axes, "sizes" if isinstance(axes, list) else "size"))
        self.becomes = becomes

    def position(self, name: str, axis: Expression) -> None:
        """The literal argument ``name`` is a position on ``axis``."""
        self.literals.append(Literal(name, axis, "position"))

    def constant(self, name: str, value: Any, becomes: Any = None) -> None:
        """Once anything shrinks, the argument ``name`` must say ``value``: its default, or its meaning, follows from a size."""
        self.literals.append(Literal(name, value, "constant"))
        self.becomes = becomes

    def at_least(self, axis: Expression, count: int) -> None:
        """``axis`` must keep ``count`` of its indices for this op to run."""
        self.limits.append((axis, count))

    def positions(self, index: Typed) -> Expression | None:
        """The axis that the values of ``index`` are positions on. Where a rule does not ask, that axis is frozen."""
        if index.values is not None:
            self.understood.append(index.values)
        return index.values

    def is_open(self, dim: int) -> bool:
        """Whether data, not the inputs' shapes, says how long a dimension of the result is."""
        return is_open(self.node.meta["val"].shape[dim])

    def frozen(self, axis: Expression) -> bool:
        """Whether no factor of ``axis`` can shrink."""
        return all(leaf.pins for leaf in free_variables(axis))

    def product(self, *axes: Expression) -> Expression:
        """``axes`` flattened into one, row-major."""
        return self.solver.product(axes)

    def use(
        self, operand: Typed, dim: int, role: str, axis: Expression | None = None, joint: bool = False, apart: bool = False
    ) -> None:
        """Record the role an operand's dimension (or a part of it) has in this contraction."""
        dim %= len(operand.axes)
        if operand.source is not None:
            part = operand.axes[dim] if axis is None else axis
            self.uses.append(Use(self.node, operand.source, dim, role, part, joint, apart))

    def joint(self, *operands: Typed) -> bool:
        """Whether several operands meet and all are activations, none a weight."""
        return len(operands) > 1 and all(operand.activation for operand in operands)

    def broadcast(self, operands: Iterable[Typed], shape: tuple[int, ...]) -> tuple[Expression, ...]:
        """The axes of an elementwise result: aligned from the right, sizes of one stretch."""
        out: list[Expression | None] = [None] * len(shape)
        for operand in operands:
            for place, axis in enumerate(operand.axes, start=len(shape) - len(operand.axes)):
                if axis == ONE or length(axis) != shape[place]:
                    continue
                known = out[place]
                if known is None:
                    out[place] = axis
                else:
                    self.equal(known, axis)
        return tuple(self.solver.fresh(size) if axis is None else axis for axis, size in zip(out, shape, strict=True))


RuleFunction = Callable[[Op], Result]
Rule = TypeVar("Rule", bound=RuleFunction)


RULES: dict[str, RuleFunction] = {}
"""Every rule by the qualified name of the operation (``aten::linear``)."""


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the given operations (overload packets, every overload of them)."""

    def register(function: Rule) -> Rule:
        for packet in packets:
            RULES[packet._qualified_op_name] = function
        return function

    return register


def is_open(size: Any) -> bool:
    """Whether data, not the inputs' shapes, says what a traced number is."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def find_rule(target: Any) -> RuleFunction | None:
    """The rule of an fx call target. In-place variants follow their functional form; pointwise is torch's own tag."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    found = RULES.get(name) or (RULES.get(name[:-1]) if is_in_place(target) else None)
    if found is None and (torch.Tag.pointwise in target.tags or (is_in_place(target) and _is_elementwise(name[:-1]))):
        return RULES["pointwise"]
    return found


def _is_elementwise(name: str) -> bool:
    """Whether torch tags the functional form so: ``relu6``, where ``relu6_`` has no tag."""
    packet = getattr(aten, name.removeprefix("aten::"), None)
    return packet is not None and torch.Tag.pointwise in getattr(packet, packet.overloads()[0]).tags


def is_in_place(target: Any) -> bool:
    """Whether an operation writes to its first operand: ``aten.add_`` does, ``aten.__and__`` does not."""
    name = str(target._schema.name)
    return name.endswith("_") and not name.endswith("__")


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
