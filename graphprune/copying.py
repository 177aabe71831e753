"""A model in, a deep copy of it out, whatever its last forward left in its attributes."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Model = TypeVar("Model", bound=nn.Module)


def duplicate(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy, with what ``memo`` has for some of its parts by their ``id``.

    What a forward computed and kept (the ``weight`` of ``torch.nn.utils.weight_norm``, a cached state) is copied without the
    graph it came from, which torch copies for nobody.
    """
    memo = {} if memo is None else memo
    for value in held_tensors(model):
        if value.grad_fn is not None:
            memo.setdefault(id(value), value.detach().clone())
    return deepcopy(model, memo)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module keeps: parameters, buffers, and those in its other attributes."""
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Tensor):
                yield held
            elif isinstance(held, dict | list | tuple) and held:
                yield from (value for value in pytree.tree_leaves(held) if isinstance(value, Tensor))
