"""A model of its stock class and a record of what shrank in, the same model with those smaller sizes out. Needs torch alone.

A checkpoint whose layers differ carries this file as its modelling code, so it may import nothing of graphprune.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Elements = dict[str, list[int]]
"""The elements that stay, by the stack of modules they stand in."""


class Reshaped:
    """Comes before a class of transformers, whose sizes are then those that its config records under ``pruned``."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        reshape(self, config.pruned)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The same as in the class, with the buffers that it computes from its config as they are recorded."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        fill(model, model.config.pruned)
        return loaded

    @classmethod
    def is_custom_code(cls) -> bool:
        """Its tensors are named as in the stock class, and saved the same way."""
        return False


def reshape(model: nn.Module, record: dict[str, Any]) -> None:
    """Give ``model`` the layers, attributes, empty tensors of the shapes, and values of unsaved buffers that ``record`` lists.

    A tensor that is listed and not there is added. A record that comes ``first`` is one of an earlier compile.
    """
    if "first" in record:
        reshape(model, record["first"])
    for stack, kept in record.get("elements", {}).items():
        modules = model.get_submodule(stack)._modules
        elements = [modules[str(element)] for element in kept]
        modules.clear()
        modules.update({str(place): element for place, element in enumerate(elements)})
    for name, attributes in record["attributes"].items():
        for path, value in attributes.items():
            _set(model.get_submodule(name), [_unescaped(step) for step in path.split("/")], value)
    for name, shape in record["shapes"].items():
        _add_missing(model, name)
        _exchange(model, name, lambda old, shape=shape: torch.empty(shape, dtype=old.dtype, device=old.device))
    fill(model, record)


def fill(model: nn.Module, record: dict[str, Any]) -> None:
    """Give the buffers that no checkpoint holds the values that ``record`` lists, and keep transformers from computing its own."""
    for name, values in record["buffers"].items():
        _exchange(model, name, lambda old, values=values: _filled(old, values))
        setattr(model.get_submodule(name.rpartition(".")[0]), "_is_hf_initialized", True)  # noqa: B010


def _filled(old: torch.Tensor, values: Any) -> torch.Tensor:
    """A tensor of the type of ``old``; complex numbers are listed as pairs."""
    if old.is_complex():
        return torch.view_as_complex(torch.tensor(values, dtype=old.dtype.to_real(), device=old.device))
    return torch.tensor(values, dtype=old.dtype, device=old.device)


def _unescaped(step: str) -> str:
    """A step of a path, in which slashes and tildes are written as in JSON pointers."""
    return step.replace("~1", "/").replace("~0", "~")


def _set(owner: Any, path: list[str], value: Any) -> None:
    """Change what a path of attributes, keys and places leads to."""
    step: Any = path[0]
    if isinstance(owner, (dict, list)):
        keys = owner.keys() if isinstance(owner, dict) else range(len(owner))
        step = next(key for key in keys if str(key) == step)
    held = owner[step] if isinstance(owner, (dict, list)) else getattr(owner, step, None)
    if len(path) > 1:
        _set(held, path[1:], value)
    elif isinstance(owner, (dict, list)):
        owner[step] = _like(held, value)
    else:
        object.__setattr__(owner, step, _like(held, value))


def _like(held: Any, value: Any) -> Any:
    """JSON knows lists only: what was a tuple becomes one again."""
    if not isinstance(held, (tuple, list)) or not isinstance(value, (tuple, list)) or len(held) != len(value):
        return tuple(value) if isinstance(held, tuple) else value
    parts = [_like(old, new) for old, new in zip(held, value, strict=True)]
    return tuple(parts) if isinstance(held, tuple) else parts


def _add_missing(model: nn.Module, name: str) -> None:
    """A parameter that the stock class has not, a bias that a repair added, begins as an empty one like its module's others."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if getattr(owner, leaf, None) is None:
        like = next(owner.parameters())
        owner.register_parameter(leaf, nn.Parameter(like.new_empty(0), requires_grad=like.requires_grad))


def _exchange(model: nn.Module, name: str, change: Any) -> None:
    """Replace a parameter or buffer wherever it is tied."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    new = change(old)
    new = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, held in table.items():
                if held is old:
                    table[key] = new
