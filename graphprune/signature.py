"""A model's forward and a call of it in, the same call with its arguments in the places of another call out; what a trace of it
takes for granted of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import chain
from typing import Any

import sympy
from torch import SymInt, Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphprune.errors import UserMistake, nearest

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
"""Parameters that have a place."""

PLAIN = (int, float, str, type(None))
"""Defaults that may stand for an argument that is not given."""

Slot = str | int
"""An argument by its name, one of ``*args`` by its position."""

Sizes = tuple[sympy.Expr, ...]
"""The sizes of a traced tensor, symbols where open."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The ``names`` that positional arguments have, the ``defaults`` that are numbers, words or None, and all ``keywords`` that it
    takes, None where it takes any."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    keywords: frozenset[str] | None = None

    def taken(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of a batch what the forward takes: labels beside it are for a loss."""
        return {name: value for name, value in inputs.items() if self.keywords is None or name in self.keywords}

    def slot(self, position: int) -> Slot:
        """What the argument at a position is called."""
        return self.names[position] if position < len(self.names) else position

    def arranged(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positional: int, keywords: Sequence[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with so many arguments by position and these by keyword, whichever way they came.

        Raises UserMistake on arguments that the other call had not, or that are missing; one that equals its default is none.
        """
        if len(args) == positional and tuple(kwargs) == tuple(keywords):
            return args, kwargs
        given = self._named(args, kwargs)
        wanted = [*map(self.slot, range(positional)), *keywords]
        for slot, value in given.items():
            if slot not in wanted and not self._is_default(slot, value):
                known = nearest(str(slot), map(str, wanted))
                raise UserMistake(f"there was no argument {slot} when the graph was traced", why=f"it knows {wanted}", fix=known)
        if missing := [slot for slot in wanted if slot not in given and slot not in self.defaults]:
            raise UserMistake(f"the argument {missing[0]} is missing", why=f"the graph was traced with {wanted}")
        values = [given[slot] if slot in given else self.defaults[str(slot)] for slot in wanted]
        return tuple(values[:positional]), dict(zip(keywords, values[positional:], strict=True))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Slot, Any]:
        given: dict[Slot, Any] = {self.slot(position): value for position, value in enumerate(args)}
        if twice := [name for name in kwargs if name in given]:
            raise UserMistake(f"the argument {twice[0]} is given twice", why="by its position and by its name")
        given.update(kwargs)
        return given

    def _is_default(self, slot: Slot, value: Any) -> bool:
        return any(slot == name and type(value) is type(own) and value == own for name, own in self.defaults.items())


def signature_of(model: nn.Module) -> Signature:
    """How the forward of a model is called."""
    parameters = signature(model.forward).parameters.values()
    any_keyword = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    keywords = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    names = tuple(parameter.name for parameter in parameters if parameter.kind in POSITIONAL)
    defaults = {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, PLAIN)}
    return Signature(names, defaults, None if any_keyword else frozenset(keywords))


def open_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch and sequence left open, as the ``dynamic_shapes`` of torch.export: by the names of the forward's arguments."""

    def open_dims(value: Any) -> Any:
        return dict.fromkeys(range(min(2, value.ndim)), Dim.AUTO) if isinstance(value, Tensor) else None

    return pytree.tree_map(open_dims, dict(signature(model.forward).bind(*args, **kwargs).arguments))


def taken_for_granted(inputs: Sequence[Any]) -> tuple[tuple[Sizes, ...], tuple[sympy.Basic, ...]]:
    """The sizes of traced inputs, and what a trace asked of open ones, as both are now: whoever looks at them later asks more."""
    shapes = [tuple(getattr(value, "shape", ())) for value in inputs]
    asked = next((size.node.shape_env for size in chain(*shapes) if isinstance(size, SymInt)), None)
    guards = () if asked is None else tuple(asked.replace(guard.expr) for guard in asked.guards)
    return tuple(tuple(map(_expression, shape)) for shape in shapes), guards


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)
