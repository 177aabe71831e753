"""A model, and inputs or a seed, in; the inputs, or what is drawn, on the device that holds the model out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CPU = torch.device("cpu")


def where(model: nn.Module) -> torch.device:
    """The device of a model, which takes its inputs there: that of its first tensor."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), CPU)


def beside(inputs: Any, device: torch.device) -> Any:
    """Inputs of any structure, brought from the CPU to ``device``; as they are where some are there already, or it is no place
    for values (meta)."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if device.type in ("cpu", "meta") or any(tensor.device.type != "cpu" for tensor in tensors):
        return inputs
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Meanwhile what is drawn at random comes from ``seed``; the caller's draws then go on as if nothing had happened."""
    kind = device.type if device.type not in ("cpu", "meta") else "cuda"
    with torch.random.fork_rng([device] if device.type == kind else [], device_type=kind):
        torch.manual_seed(seed)
        yield


def finished(device: torch.device) -> None:
    """Come back when an accelerator has done what it was given; the CPU always has."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
