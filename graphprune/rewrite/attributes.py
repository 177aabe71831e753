"""A module in, the whole numbers it keeps as plain attributes out: also those in tuples, dictionaries and configuration objects.

A *path* leads to one of them from its module: ``("heads",)``, ``("axes_lengths", "h")``, ``("config", "width")``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from graphprune.memory import OWN

Path = tuple[str | int, ...]
Kind = tuple[str, Path]
"""A path in equal modules of equal layers."""
Attributes = dict[str, dict[str, Any]]
"""New values of plain attributes, by module name and by path, its steps joined by slashes (``~1`` is one in a step)."""

DEPTH = 4
OPAQUE = (
    nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, torch.dtype, torch.device, PreTrainedConfig,
    GenerationConfig,
)  # fmt: skip
"""What is not looked into: it holds no sizes, or somebody else is in charge of them."""


@dataclass(slots=True)
class Learnt:
    """What searches on the same model have found: ``values`` that were right, by module and path; kinds of numbers that were
    likely and needed no change, with the values they might have had; and lines where a first guess failed and no other was right.
    """

    values: dict[tuple[str, Path], int] = field(default_factory=dict)
    unneeded: dict[Kind, Sequence[Sequence[int]]] = field(default_factory=dict)
    dead_ends: set[str] = field(default_factory=set)


def whole_numbers(module: nn.Module) -> Iterator[tuple[Path, int, int]]:
    """Every whole number of ``module``: the path to it, its value, and a mark that two paths to one place share."""
    for name, held in vars(module).items():
        if name not in OWN:
            yield from _numbers(held, (name,), id(module))


def _numbers(held: Any, path: Path, owner: int) -> Iterator[tuple[Path, int, int]]:
    if isinstance(held, int | np.integer) and not isinstance(held, bool):
        yield path, int(held), hash((owner, path[-1]))
    elif len(path) < DEPTH:
        inner = hash((owner, path[-1])) if isinstance(held, tuple) else id(held)
        for step, part in _parts(held):
            yield from _numbers(part, (*path, step), inner)


def _parts(held: Any) -> list[tuple[Any, Any]]:
    if isinstance(held, dict):
        return [(key, part) for key, part in held.items() if isinstance(key, str | int)]
    if isinstance(held, list | tuple):
        return list(enumerate(held))
    if isinstance(held, partial):
        return [("keywords", held.keywords)]
    return [] if isinstance(held, OPAQUE) else [*getattr(held, "__dict__", {}).items(), *_slots(held)]


def _slots(held: Any) -> Iterator[tuple[str, Any]]:
    """What an object keeps in slots."""
    for declared in (vars(base).get("__slots__", ()) for base in type(held).__mro__):
        for name in (declared,) if isinstance(declared, str) else declared:
            if name not in ("__dict__", "__weakref__") and hasattr(held, name):
                yield name, getattr(held, name)


def read(module: nn.Module, path: Path) -> Any:
    """What ``path`` leads to."""
    held: Any = module
    for step in path:
        held = getattr(module, str(step)) if held is module else dict(_parts(held))[step]
    return held


def write(module: nn.Module, path: Path, value: Any) -> None:
    """Put ``value`` where ``path`` leads; tuples on the way are made anew."""
    _with(module, path, value)


def _with(held: Any, path: Path, value: Any) -> Any:
    """``held`` after the change: itself, or another tuple."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(held, tuple):
        parts = [_with(part, rest, value) if place == step else part for place, part in enumerate(held)]
        return type(held)(*parts) if hasattr(held, "_fields") else type(held)(parts)
    if isinstance(held, list | dict):
        held[step] = _with(held[step], rest, value)  # type: ignore[index]
        return held
    before = getattr(held, str(step))
    after = _with(before, rest, value)
    if after is not before:
        object.__setattr__(held, str(step), after)
    return held


def attributes_between(model: nn.Module, smaller: nn.Module) -> Attributes:
    """Plain attributes in which the two differ."""
    found = {
        name: dict(_differences(old, new))
        for (name, old), (_, new) in zip(model.named_modules(), smaller.named_modules(), strict=True)
    }
    return {name: changed for name, changed in found.items() if changed}


def _differences(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, held in vars(new).items():
        if name not in OWN:
            yield from _differing(vars(old).get(name), held, (name,))


def _differing(old: Any, new: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if is_plain(new):
        if old != new:
            yield "/".join(map(_escaped, path)), new
    elif len(path) < DEPTH and not isinstance(new, tuple) and type(old) is type(new):
        before = dict(_parts(old))
        for step, part in _parts(new):
            yield from _differing(before.get(step), part, (*path, step))


def _escaped(step: str | int) -> str:
    """A step that may contain the slash that divides steps, as JSON pointers have it; ``reshaped`` reads it."""
    return str(step).replace("~", "~0").replace("/", "~1")


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, or a tuple or list of them."""
    if isinstance(value, tuple | list):
        return all(is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)
