"""A trace in, what its graph was traced for out: it takes the arguments of a call, and refuses what would run and be wrong.

A graph is right for the numbers, structure and sizes it was traced on, and for other sizes where the trace left them open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graphprune.errors import UserMistake
from graphprune.signature import Signature, Sizes
from graphprune.trace import Trace

RETRACE = 'trace on arguments like these, or emit="module"'
NAMESPACE = {"max": max, "min": min, "math": math, "torch": torch}
"""What a condition on sizes, written as Python, may call."""

InputDim = tuple[int, int]
"""A dimension of an input: the number of the input, that of the dimension."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value among the arguments: the ``dtype`` and ``sizes`` of a tensor, None where open, or another ``value``."""

    name: str
    value: Any
    dtype: torch.dtype | None = None
    sizes: tuple[int | None, ...] = ()

    def fits(self, given: Any) -> bool:
        """Whether it is what the graph was traced on."""
        if self.dtype is None:
            return type(given) is type(self.value) and bool(given == self.value or (given != given and self.value != self.value))
        return isinstance(given, Tensor) and given.dtype == self.dtype and self.has_sizes(given.shape)

    def has_sizes(self, sizes: Sequence[int]) -> bool:
        """Whether a tensor's fixed sizes are these."""
        pairs = zip(sizes, self.sizes, strict=False)
        return len(sizes) == len(self.sizes) and all(fixed is None or size == fixed for size, fixed in pairs)

    def __str__(self) -> str:
        """What was traced."""
        return repr(self.value) if self.dtype is None else _tensor(("any" if s is None else s for s in self.sizes), self.dtype)


class Condition:
    """What must be true of the open sizes, in the order of their places: in words, and as ``code`` that calls them by ``names``."""

    def __init__(self, words: str, code: str, names: tuple[str, ...]) -> None:
        self.words, self.code, self.names = words, code, names
        self.holds: Callable[..., Any] = eval(f"lambda {', '.join(names)}: {code}", NAMESPACE)

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is made: what code becomes cannot be pickled."""
        return Condition, (self.words, self.code, self.names)


@dataclass(frozen=True, slots=True)
class Admission:
    """What a graph takes: a call of its ``signature`` with so many arguments by position and these ``keywords``, each of its
    ``leaves``, and ``conditions`` on the sizes at the ``places`` that are open."""

    signature: Signature
    positional: int
    keywords: tuple[str, ...]
    structure: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    places: tuple[InputDim, ...]
    conditions: tuple[Condition, ...]

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Callable[[], torch.dtype | None]) -> list[Any]:
        """The arguments of a call, as the graph takes them. Raises UserMistake where it was traced for others.

        ``own`` is the dtype of the graph's parameters, which inputs may have that were cast with them.
        """
        args, kwargs = self.signature.arranged(args, kwargs, self.positional, self.keywords)
        found, structure = pytree.tree_flatten((args, kwargs))
        if structure != self.structure:
            why = f"{_shown(structure)}, the graph was traced on {_shown(self.structure)}"
            raise UserMistake("the arguments are put together in another way", why=why, fix=RETRACE)
        for leaf, value in zip(self.leaves, found, strict=True):
            if not leaf.fits(value) and not _is_cast(leaf, value, own):
                raise UserMistake(f"{leaf.name} is {_described(value)}", why=f"the graph was traced on {leaf}", fix=RETRACE)
        sizes = [found[leaf].shape[dim] for leaf, dim in self.places]
        for condition in self.conditions:
            if not condition.holds(*sizes):
                raise self._refused(condition, sizes)
        return found

    def _refused(self, condition: Condition, sizes: Sequence[int]) -> UserMistake:
        said = ", ".join(f"{_called(self.leaves, place)} = {size}" for place, size in zip(self.places, sizes, strict=True))
        return UserMistake(f"the graph is not for these sizes: {said}", why=f"it was traced for {condition.words}", fix=RETRACE)

    def takes_rows(self, rows: int, example: Sequence[Any]) -> bool:
        """Whether all tensors may have this first size, the others being those of the ``example``."""
        shapes = [(rows, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else () for value in example]
        sizes = [shapes[leaf][dim] for leaf, dim in self.places]
        fixed = all(leaf.dtype is None or leaf.has_sizes(shape) for leaf, shape in zip(self.leaves, shapes, strict=True))
        return fixed and all(condition.holds(*sizes) for condition in self.conditions)

    def open_sizes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the trace left open, as the ``dynamic_shapes`` of positional and of keyword arguments."""
        found = [{dim: Dim.AUTO for dim, size in enumerate(leaf.sizes) if size is None} or None for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(found, self.structure)
        return args, kwargs


def admission(trace: Trace) -> Admission:
    """What a trace is good for."""
    symbols = {size for size in chain(*trace.sizes) if isinstance(size, sympy.Symbol)}
    named = zip(_names(trace), trace.example, trace.sizes, strict=True)
    leaves = tuple(_leaf(name, value, shape, symbols) for name, value, shape in named)
    places = tuple((i, dim) for i, leaf in enumerate(leaves) for dim, size in enumerate(leaf.sizes) if size is None)
    sizes, words = [trace.sizes[i][dim] for i, dim in places], [_called(leaves, place) for place in places]
    example = [trace.example[i].shape[dim] for i, dim in places]
    args, kwargs = pytree.tree_unflatten(list(trace.inputs), trace.in_spec)
    true = tuple(told for told in _conditions(trace.guards, sizes, words) if _holds(told, example))
    return Admission(trace.signature, len(args), tuple(kwargs), trace.in_spec, leaves, places, true)


def _names(trace: Trace) -> Iterator[str]:
    """What the caller calls each value: the argument's name, with the way to it inside."""
    whole = pytree.tree_unflatten(list(trace.inputs), trace.in_spec)
    paths: list[Any] = [path for path, _ in pytree.tree_flatten_with_path(whole)[0]]
    for side, argument, *rest in paths:
        name = argument.key if side.idx else trace.signature.slot(argument.idx)
        yield f"{name if isinstance(name, str) else f'argument {name}'}{pytree.keystr(tuple(rest))}"


def _leaf(name: str, value: Any, shape: Sizes, symbols: set[sympy.Symbol]) -> Leaf:
    """A size is open where it is made of sizes that are told; any other is fixed as it was."""
    if not isinstance(value, Tensor):
        return Leaf(name, value)
    is_open = [bool(size.free_symbols) and size.free_symbols <= symbols for size in shape]
    return Leaf(name, None, value.dtype, tuple(None if free else size for free, size in zip(is_open, value.shape, strict=True)))


def _conditions(guards: Sequence[sympy.Basic], sizes: Sequence[sympy.Expr], words: Sequence[str]) -> Iterator[Condition]:
    """Which of the open sizes are equal, or made of others, and what the model's code takes for granted of them."""
    variables = tuple(f"d{number}" for number in range(len(sizes)))
    first = {size: sizes.index(size) for size in sizes if isinstance(size, sympy.Symbol)}

    def printed(expression: sympy.Basic, names: Sequence[str]) -> str:
        symbols = {symbol: sympy.Symbol(names[place], integer=True, positive=True) for symbol, place in first.items()}
        return str(PythonPrinter().doprint(expression.xreplace(symbols)))

    for place, size in enumerate(sizes):
        if first.get(size) != place:
            said, code = (f"{names[place]} == {printed(size, names)}" for names in (words, variables))
            yield Condition(said, code, variables)
    for guard in dict.fromkeys(guards):
        if guard.free_symbols and guard.free_symbols <= first.keys():
            yield Condition(printed(guard, words), printed(guard, variables), variables)


def _holds(condition: Condition, sizes: Sequence[int]) -> bool:
    """Whether a condition is true of the example itself: one that is not, or cannot be asked, says nothing."""
    try:
        return bool(condition.holds(*sizes))
    except Exception:  # noqa: BLE001  a function of symbolic sizes that Python has not
        return False


def _called(leaves: Sequence[Leaf], place: InputDim) -> str:
    return f"{leaves[place[0]].name}.shape[{place[1]}]"


def _is_cast(leaf: Leaf, value: Any, own: Callable[[], torch.dtype | None]) -> bool:
    """Whether a tensor is as it was traced but for its precision, in which it goes with the graph."""
    if leaf.dtype is None or not leaf.dtype.is_floating_point or not isinstance(value, Tensor):
        return False
    return leaf.has_sizes(value.shape) and value.is_floating_point() and value.dtype == own()


def _described(value: Any) -> str:
    return _tensor(value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)


def _tensor(sizes: Iterable[Any], dtype: torch.dtype) -> str:
    return f"a tensor ({', '.join(map(str, sizes))}) of {str(dtype).removeprefix('torch.')}"


def _shown(structure: pytree.TreeSpec) -> str:
    """A structure in one line."""
    return " ".join(str(structure).split())
