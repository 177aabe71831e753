"""The law of DESIGN §9, derived from every row of ``cases.py``: cutting the operands of an op cuts its (masked) output.

For every factor that a rule leaves free, a random subset of units is cut from operands and parameters; what the resized graph
then computes must be the cut of what the original computes with those units masked wherever they are summed over.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.axes import Axis, Factor, Keep
from graphprune.execute import execute, tensors_of
from graphprune.propagate import Axes, propagate
from graphprune.rewrite.cut import cut, cut_all
from graphprune.rewrite.graph import resized_graph
from graphprune.rules import RULES, find_rule, is_in_place, table
from graphprune.trace import trace
from graphprune.verify import masks
from tests.cases import CASES, Case, Operand

SEEDS = 2
RULE_FILES = str(Path(table.__file__).parent)


class Wrapped(nn.Module):
    """A function of tensors as a module: some operands are its parameters, the others its inputs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for place, operand in enumerate(case.operands):
            if operand.parameter:
                self.register_parameter(f"p{place}", nn.Parameter(operand.draw()))

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        operands = (getattr(self, f"p{i}") if o.parameter else next(given) for i, o in enumerate(self.case.operands))
        return self.case.function(*operands)


class Row:
    """A traced case with its axes and values."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(len(case.name))
        self.model = Wrapped(case).eval()
        self.inputs = tuple(o.draw() for o in case.operands if not o.parameter)
        self.axes = propagate(trace(self.model, self.inputs), open_ends=True)
        self.tensors = {name: p.detach() for name, p in tensors_of(self.model, self.axes.trace).items()}

    @property
    def typed_inputs(self) -> list[tuple[Axis, ...]]:
        by_name = {node.name: node for node in self.axes.trace.graph.nodes}
        return [self.axes.nodes[by_name[name]] for name in self.axes.trace.inputs]

    @property
    def typed_outputs(self) -> list[tuple[Axis, ...]]:
        return [self.axes.nodes[node] for node in pytree.tree_leaves(_output(self.axes).args) if isinstance(node, fx.Node)]

    def free(self) -> list[Factor]:
        """Every factor on an operand or output that can shrink."""
        typed = [*self.axes.tensors.values(), *self.typed_inputs, *self.typed_outputs]
        found = dict.fromkeys(f for axes in typed for axis in axes for f, _ in axis.occurrences())
        return [factor for factor in found if factor not in self.axes.pins]

    def smaller(self, keep: Keep) -> list[Tensor]:
        """What the resized graph computes from cut operands."""
        inputs = [cut(value.clone(), typed, keep) for value, typed in zip(self.inputs, self.typed_inputs, strict=True)]
        tensors = cut_all(self.axes, self.tensors, keep)
        return _leaves(execute(self.axes.trace, tensors, inputs, graph=resized_graph(self.axes, keep), dtype=torch.float64))

    def masked(self, keep: Keep) -> list[Tensor]:
        """What the original computes with the removed units zeroed where they are summed over, cut to what survives."""
        edit, inputs = masks(self.axes, keep), [value.clone() for value in self.inputs]
        whole = _leaves(execute(self.axes.trace, self.tensors, inputs, dtype=torch.float64, edit=edit))
        return [cut(value, typed, keep) for value, typed in zip(whole, self.typed_outputs, strict=True)]


@cache
def row_of(case: Case) -> Row:
    """Each row is traced once."""
    return Row(case)


def _output(axes: Axes) -> fx.Node:
    return next(iter(reversed(axes.trace.graph.nodes)))


def _leaves(outputs: Any) -> list[Tensor]:
    return [value.clone() for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


# ── the type of a row, written down ──────────────────────────────────────────────────────────────────────────────────


def signature(row: Row) -> str:
    """The whole type: factors lettered in the order they first appear."""
    letters: dict[Factor, str] = {}
    inputs, case = iter(row.typed_inputs), row.model.case
    operands = [row.axes.tensors[f"p{i}"] if o.parameter else next(inputs) for i, o in enumerate(case.operands)]
    left, right = ([_shown(row.axes, axes, letters) for axes in side] for side in (operands, row.typed_outputs))
    return f"{', '.join(left)} -> {', '.join(right)}"


def _shown(axes: Axes, typed: Iterable[Axis], letters: dict[Factor, str]) -> str:
    return " ".join(_axis(axes, axis, letters) for axis in typed) or "()"


def _axis(axes: Axes, axis: Axis, letters: dict[Factor, str]) -> str:
    return "+".join("*".join(_item(axes, item, letters) for item in product) or "1" for product in axis.segments)


def _item(axes: Axes, item: Factor | Axis, letters: dict[Factor, str]) -> str:
    if isinstance(item, Axis):
        return f"({_axis(axes, item, letters)})"
    if item in axes.pins:
        return str(item.size)
    return letters.setdefault(item, chr(ord("a") + len(letters))) + "~" * (item in axes.renormalised)


def roles(row: Row) -> str:
    """What each operand's dimensions do in the contractions they enter directly: contracted, free, batch, ranked; capital
    letters where all the operands are activations."""
    nodes = {node.name: node for node in row.axes.trace.graph.nodes if node.op == "placeholder"}
    inputs, named = iter(row.axes.trace.inputs), {t.name: name for name, t in row.axes.trace.tensors.items()}
    places = [named[f"p{i}"] if o.parameter else next(inputs) for i, o in enumerate(row.model.case.operands)]
    found = ", ".join(_roles(row.axes, nodes[place]) for place in places)
    return found if found.strip("., ") else ""


def _roles(axes: Axes, node: fx.Node) -> str:
    found = [{use.role[0].upper() if use.joint else use.role[0] for use in axes.uses if use.operand is node and use.dim == dim}
        for dim in range(len(axes.nodes[node]))]  # fmt: skip
    return "".join("".join(sorted(letters)) or "." for letters in found)


# ── the law ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def subsets(row: Row) -> Iterator[Keep]:
    """Random surviving units: of each free factor alone, of all that are exact, of all."""
    free = row.free()
    exact = [factor for factor in free if factor not in row.axes.renormalised]
    for seed in range(SEEDS):
        dice = random.Random(seed)
        for chosen in (*([factor] for factor in free), exact, free):
            yield {factor: _survivors(factor, row.axes.least.get(factor, 1), dice) for factor in chosen}


def _survivors(factor: Factor, least: int, dice: random.Random) -> list[int]:
    return sorted(dice.sample(range(factor.size), dice.randint(least, max(least, factor.size - 1))))


def check(row: Row, keep: Keep) -> None:
    """Raise where the law does not hold."""
    small = row.smaller(keep)
    expected = [tuple(axis.resized(keep) for axis in typed) for typed in row.typed_outputs]
    assert [tuple(value.shape) for value in small] == expected
    if not row.model.case.values or any(factor in row.axes.renormalised for factor in keep):
        return
    for got, wanted in zip(small, row.masked(keep), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_law(case: Case) -> None:
    row = row_of(case)
    assert signature(row) == case.type
    assert roles(row) == case.roles
    for keep in subsets(row):
        check(row, keep)


# ── no rule without a case ───────────────────────────────────────────────────────────────────────────────────────────


class Visited:
    """Records every line of the rules that runs while it is entered."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()

    def __enter__(self) -> Visited:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(RULE_FILES) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def _lines_of(code: CodeType) -> Iterator[tuple[str, int]]:
    """Every line inside functions, but the one that only runs when rules are registered."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == "equation":
                continue
            lines = {line for _, _, line in constant.co_lines() if line} - {constant.co_firstlineno}
            yield from ((code.co_filename, line) for line in lines)
            yield from _lines_of(constant)


def _statements() -> set[tuple[str, int]]:
    files = [path for path in Path(RULE_FILES).glob("*.py") if path.name not in ("table.py", "__init__.py")]
    return {line for path in files for line in _lines_of(compile(path.read_text(), str(path), "exec"))}


def test_every_statement_of_every_rule_has_a_case() -> None:
    """A rule, a literal, a pin that no row reaches is a rule that nothing tests."""
    traces = [row_of(case).axes.trace for case in CASES]
    with Visited() as visited:
        for each in traces:
            propagate(each, open_ends=True)
    missing = sorted(_statements() - visited.lines)
    assert not missing, "\n".join(f"{Path(file).name}:{line}" for file, line in missing)


def test_every_rule_has_a_case() -> None:
    traces = [row_of(case).axes.trace for case in CASES]
    used = {find_rule(node.target) for each in traces for node in each.graph.nodes if node.op == "call_function"}
    assert [name for name, function in RULES.items() if function not in used] == []


# ── operations that are pointwise by torch's word ────────────────────────────────────────────────────────────────────


def tagged() -> list[torch._ops.OpOverload]:
    """Every operation that falls to the default rule because torch tags it as pointwise."""
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
    overloads = [getattr(packet, name) for packet in packets if hasattr(packet, "overloads") for name in packet.overloads()]
    plain = [op for op in overloads if not any(argument.is_out for argument in op._schema.arguments) and not is_in_place(op)]
    return [op for op in plain if torch.Tag.pointwise in op.tags and op._schema.name not in RULES]


def operands_of(op: torch._ops.OpOverload, kind: str) -> list[Any] | None:
    """A matrix for the first tensor, a column for the next, a row for the last; None where a required argument is anything else."""
    shapes = iter(((4, 5, 6), (5, 1), (6,)))
    given: list[Any] = []
    for argument in op._schema.arguments:
        if argument.has_default_value():
            break
        if str(argument.type) not in ("Tensor", "number"):
            return None
        given.append(Operand(next(shapes), kind, below=4).draw() if str(argument.type) == "Tensor" else 2)
    return given


def outputs(op: torch._ops.OpOverload, operands: list[Any]) -> list[Tensor]:
    return _leaves(op(*(o.clone() if isinstance(o, Tensor) else o for o in operands)))


def is_elementwise(op: torch._ops.OpOverload, operands: list[Any]) -> bool:
    """Whether cutting the operands cuts every output, along each dimension."""
    whole = outputs(op, operands)
    for dim in (-1, -2, -3):
        kept = torch.tensor([1, 3])
        cuts = [o.index_select(dim, kept) if isinstance(o, Tensor) and o.ndim >= -dim and o.shape[dim] > 1 else o for o in operands]
        for small, value in zip(outputs(op, cuts), whole, strict=True):
            if not torch.allclose(small, value.index_select(dim, kept), equal_nan=True):
                return False
    return True


def test_what_torch_calls_pointwise_is_elementwise() -> None:
    seen, wrong = set(), []
    for op in tagged():
        for kind in ("positive", "integer", "truth"):
            operands = operands_of(op, kind)
            try:
                whole = outputs(op, operands) if operands else []
            except (RuntimeError, NotImplementedError):
                continue
            if whole:
                seen.add(op._schema.name)
                wrong += [str(op)] if not is_elementwise(op, operands or []) else []
    assert not wrong
    assert len(seen) >= 120
