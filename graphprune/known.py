"""A forward being traced in, values that depend on sizes alone out: what a model asks of a constant, it is told.

A traced tensor has no values, so ``if mask.any():`` stops a trace even where the mask is made of ones and nothing else. While
``Known`` is entered, tensors that come from factories (``ones``, ``arange``) and from operations on such are computed for real
beside the trace; whoever asks for a number, a truth value or a list of places gets it from there.

A loop over the places where a vector of the inputs is true, ``for expert in hit.nonzero()``, is traced over all places. Whether
the loop does nothing at the others is for the caller to check, with ``agrees``.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphprune.calls import is_check

LARGEST = 1 << 24
"""Elements above which a constant is not worth remembering."""

ASKING = (
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__format__",
    "tolist",
    "nonzero",
    "where",
    "unique",
    "masked_select",
)
"""Functions whose result, or its size, depends on values; ``where`` only with a condition alone."""

CHANCE = re.compile(r".*(rand|normal|bernoulli|uniform|exponential|multinomial|dropout).*")

WRITING = re.compile(r"__setitem__|__i(add|sub|mul|truediv|floordiv|and|or|xor|pow|mod)__|\w*[a-z\d]_")
"""Functions that change their first operand."""

MAKING = ("ones", "zeros", "full", "arange", "tensor", "linspace", "eye", "tril_indices", "triu_indices")
ALIKE = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
"""Factories; the latter read the shape and type of their first operand, never its values."""

NOTHING = object()
"""Where nothing is known; functions that write return None."""


class Known(TorchFunctionMode):
    """Remembers the value of every tensor that depends on no input and no weight; no loop goes to the ``spare`` last places."""

    def __init__(self, spare: int = 0) -> None:
        self.values: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.everywhere = False
        self.spare = spare

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, in the trace and, where everything is known, for real."""
        kwargs = kwargs or {}
        real = self._real(func, args, kwargs)
        if real is NOTHING:
            self._forget(func, args)
        if real is not NOTHING and _asks(func, args, kwargs):
            return pytree.tree_map_only(Tensor, self._stated, real)
        if real is NOTHING and _asks_where(func, args, kwargs):
            self.everywhere = True
            return [self._stated(place) for place in _places(args[0].shape[0] - self.spare)]
        result = func(*args, **kwargs)
        if self.everywhere and _asks(func, args, kwargs):
            _assume_some(result)
        if real is not NOTHING:
            self._remember(result, real)
        return result

    def _real(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a call gives on real values, NOTHING where they are not known."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = {id(tensor): self._value(tensor) for tensor in tensors}
        if _name(func) in ALIKE and args and isinstance(args[0], Tensor):
            found[id(args[0])] = _blank(args[0])
        if (
            any(value is None for value in found.values())
            or not (tensors or _name(func) in MAKING)
            or CHANCE.fullmatch(_name(func))
        ):
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


def _asks_where(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether these are the places, one a row, where a vector of known length is true."""
    if _name(func) != "nonzero" or kwargs.get("as_tuple") or len(args) != 1:
        return False
    return args[0].dtype is torch.bool and args[0].ndim == 1 and isinstance(args[0].shape[0], int)


def _assume_some(found: Any) -> None:
    """Trace what a loop does with what it found, not that it does nothing where there is nothing."""
    for places in pytree.tree_leaves(found):
        if isinstance(places, Tensor) and places.ndim:
            torch._check(places.shape[0] != 0)  # type: ignore[no-untyped-call]


def _places(count: int) -> tuple[Tensor, ...]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return torch.arange(count)[:, None].unbind()


@contextmanager
def casts_that_do_nothing() -> Iterator[None]:
    """``module.to(dtype)`` in a forward leaves a module alone that has that type already."""
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        has = dtype is None or all(parameter.dtype == dtype for parameter in module.parameters())
        return module if device is None and has else original(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@torch.no_grad()
def agrees(model: nn.Module, program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a program computes what the model does, also where all rows of the inputs are alike and reach few places."""
    if any(tensor.is_meta for tensor in model.parameters()):
        return False
    alike = pytree.tree_map_only(Tensor, lambda x: x[:1, ..., :1].expand_as(x).clone() if _is_words(x) else x, (args, kwargs))
    runs = program.module()
    return all(_close(runs(*a, **k), model(*a, **k)) for a, k in ((args, kwargs), alike))


def without_checks(program: ExportedProgram) -> None:
    """Drop what a trace assumed: where nothing was found, products of no rows do nothing either."""
    for region in program.graph_module.modules():
        if isinstance(region, fx.GraphModule):
            for node in filter(is_check, list(region.graph.nodes)):
                region.graph.erase_node(node)
            region.recompile()


def _is_words(x: Tensor) -> bool:
    return x.ndim > 1 and not x.is_floating_point()


def _close(one: Any, other: Any) -> bool:
    pairs = list(_pairs(one, other))
    return bool(pairs) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in pairs)


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
