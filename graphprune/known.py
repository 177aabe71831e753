"""A forward being traced in, values that depend on sizes alone out: what a model asks of a constant, it is told.

A traced tensor has no values, so ``if mask.any():`` stops a trace even where the mask is made of ones and nothing else. While
``Known`` is entered, tensors that come from factories (``ones``, ``arange``) and from operations on such are computed for real
beside the trace; whoever asks for a number, a truth value or a list of places gets it from there.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

LARGEST = 1 << 24
"""Elements above which a constant is not worth remembering."""

ASKING = ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero", "where", "unique", "masked_select")
"""Functions whose result, or its size, depends on values; ``where`` only with a condition alone."""


WRITING = re.compile(r"__setitem__|__i(add|sub|mul|truediv|floordiv|and|or|xor|pow|mod)__|\w*[a-z\d]_")
"""Functions that change their first operand."""

MAKING = ("ones", "zeros", "full", "arange", "tensor", "linspace", "eye", "tril_indices", "triu_indices")
ALIKE = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
"""Factories; the latter read the shape and type of an operand, never its values."""

NOTHING = object()
"""Where nothing is known; functions that write return None."""


class Known(TorchFunctionMode):
    """Remembers the value of every tensor that depends on no input and no weight."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, in the trace and, where everything is known, for real."""
        kwargs = kwargs or {}
        real = self._real(func, args, kwargs)
        if real is NOTHING:
            self._forget(func, args)
        if real is not NOTHING and _asks(func, args, kwargs):
            return pytree.tree_map_only(Tensor, self._stated, real)
        result = func(*args, **kwargs)
        if real is not NOTHING:
            self._remember(result, real)
        return result

    def _real(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a call gives on real values, NOTHING where they are not known."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        alike = _name(func) in ALIKE
        found = {id(tensor): _blank(tensor) if alike else self._value(tensor) for tensor in tensors}
        if any(value is None for value in found.values()) or not (tensors or _name(func) in MAKING):
            return NOTHING
        known_args, known_kwargs = pytree.tree_map_only(Tensor, lambda tensor: found[id(tensor)], (args, kwargs))
        try:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return func(*known_args, **known_kwargs)
        except Exception:  # noqa: BLE001  then it is not known, and the trace says what stands against it
            return NOTHING

    def _value(self, tensor: Tensor) -> Tensor | None:
        reference, value = self.values.get(id(tensor), (None, None))
        return value if reference is not None and reference() is tensor else None

    def _forget(self, func: Callable[..., Any], args: Any) -> None:
        """What is written to with something unknown is known no longer, nor is anything that shares its memory."""
        written = self._value(args[0]) if args and isinstance(args[0], Tensor) else None
        if written is not None and WRITING.fullmatch(_name(func)):
            memory = written.untyped_storage().data_ptr()
            self.values = {at: held for at, held in self.values.items() if held[1].untyped_storage().data_ptr() != memory}

    def _remember(self, result: Any, real: Any) -> None:
        for traced, value in _pairs(result, real):
            if value.numel() <= LARGEST:
                self.values[id(traced)] = weakref.ref(traced), value

    def _stated(self, value: Tensor) -> Tensor:
        """A known value as a constant of the trace."""
        traced = torch.tensor(value.tolist(), dtype=value.dtype)
        self._remember(traced, value)
        return traced


def _asks(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    return _name(func) in ASKING and (_name(func) != "where" or len(args) + len(kwargs) == 1)


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


def _blank(tensor: Tensor) -> Tensor | None:
    """Nothing in particular of the same shape and type."""
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return torch.empty(sizes, dtype=tensor.dtype) if len(sizes) == tensor.ndim else None


def _pairs(result: Any, real: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two results of one form; none where the forms differ."""
    one, other = pytree.tree_leaves(result), pytree.tree_leaves(real)
    if len(one) == len(other):
        yield from ((a, b) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor))
