"""Outputs of two computations in, how far they are apart out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

AT_ONCE = 1 << 20
"""Numbers that are compared at a time."""


def tensors_in(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs; a complex one is two real ones."""
    tensors = [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.is_floating_point() or t.is_complex()]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value; infinite where shapes differ or values are no numbers."""
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=False)):
        return float("inf")
    return max((_relative_gap(a, b) for a, b in zip(one, other, strict=True) if a.numel()), default=0.0)


def _relative_gap(one: Tensor, other: Tensor) -> float:
    """In double precision, some numbers at a time: logits of a batch of text are larger than many a model. The same infinity on
    both sides is no gap."""
    gap = scale = 0.0
    for a, b in zip(*(torch.split(t.flatten(), AT_ONCE) for t in (one, other)), strict=True):
        a, b = a.double(), b.double()
        apart, size = _largest((a - b).masked_fill_(a == b, 0)), _largest(b.masked_fill(b.isinf(), 0))
        if not apart < float("inf") or not size < float("inf"):
            return float("inf")
        gap, scale = max(gap, apart), max(scale, size)
    return gap / (scale or 1.0)


def _largest(values: Tensor) -> float:
    return values.abs().max().item()
