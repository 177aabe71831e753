"""A model of its stock class and a record of what shrank in, the same model with those smaller sizes out. Needs torch alone.

A checkpoint whose layers differ carries this file as its modelling code, so it may import nothing of graphprune.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def reshape(model: nn.Module, record: dict[str, Any]) -> None:
    """Give ``model`` the attributes, empty tensors of the shapes, and values of unsaved buffers that ``record`` lists."""
    for name, attributes in record["attributes"].items():
        for attribute, value in attributes.items():
            held = getattr(model.get_submodule(name), attribute, None)
            setattr(model.get_submodule(name), attribute, tuple(value) if isinstance(held, tuple) else value)
    for name, shape in record["shapes"].items():
        _exchange(model, name, lambda old, shape=shape: torch.empty(shape, dtype=old.dtype, device=old.device))
    for name, values in record["buffers"].items():
        _exchange(model, name, lambda old, values=values: torch.tensor(values, dtype=old.dtype))


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
