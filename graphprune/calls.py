"""An fx call in, what its operation's schema says of it out: the bare name, the arguments by name, what is written and shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

PASSING = ("dropout", "alias", "clone", "contiguous", "detach", "to", "_to_copy")
"""Operations whose result is their first operand, in another place or precision."""

CHECKS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar")


@dataclass(frozen=True, slots=True)
class Argument:
    """What a schema says of one argument; ``shared``: the result may be its memory."""

    name: str
    default: Any
    by_name: bool
    written: bool
    shared: bool


@cache
def schema(target: Any) -> tuple[Argument, ...]:
    """The arguments of an operation in order; none where no schema says (a Python function)."""
    return tuple(
        Argument(one.name, one.default_value, one.kwarg_only, one.is_write, one.alias_info is not None)
        for one in (target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ())
    )


@cache
def _name(target: Any) -> str:
    return str(target._schema.name).rpartition("::")[2].rstrip("_") if isinstance(target, torch._ops.OpOverload) else ""


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls, in place or not: ``add`` of ``aten.add_.Tensor``; empty where it is no operation."""
    return _name(node.target)


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call gives, by the names its operation has for them."""
    names = (argument.name for argument in schema(node.target))
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def all_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments by name in the schema's order, defaults filled in."""
    given = given_arguments(node)
    return {argument.name: given.get(argument.name, argument.default) for argument in schema(node.target)}


def operands(node: fx.Node) -> Iterator[tuple[Argument, fx.Node]]:
    """Each operand with the argument that it is, or is a part of."""
    given = given_arguments(node)
    for argument in schema(node.target):
        for value in pytree.tree_leaves(given.get(argument.name)):
            if isinstance(value, fx.Node):
                yield argument, value


def written_to(node: fx.Node) -> list[fx.Node]:
    """The operands an operation writes to, as its schema says: ``self`` of ``add_``, ``out`` of ``mm.out``, whole lists."""
    return [operand for argument, operand in operands(node) if argument.written] if writes(node.target) else []


@cache
def writes(target: Any) -> bool:
    """Whether an operation writes to any operand."""
    return any(argument.written for argument in schema(target))


def takes_part(node: fx.Node) -> bool:
    """Whether a node takes one of several values."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def is_check(node: fx.Node) -> bool:
    """Whether a node only asserts something about its operand."""
    return operation(node) in CHECKS
