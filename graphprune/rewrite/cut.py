"""A tensor, its axes and what each factor keeps in, the part of it that survives out: at once, or whenever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from graphprune.axes import Axis, Keep
from graphprune.propagate import Axes


def cut(tensor: Tensor, axes: tuple[Axis, ...], keep: Keep) -> Tensor:
    """The slice of ``tensor`` that survives; the tensor itself where nothing on it shrinks."""
    return _picked(tensor, axes, keep, lambda axis: torch.tensor(axis.kept(keep)))


def cutter(axes: Axes, keep: Keep) -> Callable[[str, Tensor], Tensor]:
    """The same for any traced tensor, by its name."""
    positions = cache(lambda axis: torch.tensor(axis.kept(keep)))
    return lambda name, tensor: _picked(tensor, axes.tensors[name], keep, positions)


def cut_all(axes: Axes, tensors: Mapping[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """Every traced tensor, cut."""
    cut = cutter(axes, keep)
    return {name: cut(name, tensor) for name, tensor in tensors.items()}


class Lazily(Mapping[str, Tensor]):
    """Tensors, each cut anew whenever it is asked for and held by nobody here."""

    def __init__(self, axes: Axes, tensors: Mapping[str, Tensor], keep: Keep) -> None:
        self.tensors, self.cut = tensors, cutter(axes, keep)

    def __getitem__(self, name: str) -> Tensor:
        return self.cut(name, self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _picked(tensor: Tensor, axes: tuple[Axis, ...], keep: Keep, positions: Callable[[Axis], Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis.shrinks(keep):
            tensor = tensor.index_select(dim, positions(axis).to(tensor.device))
    return tensor
