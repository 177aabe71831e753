"""A tensor in, the same values in float32 or better out: what sums are taken in, as long as they are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.errors import ModelLimit


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is in less; float64 and complex numbers as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_finite(tensor: Tensor, at: str | None = None) -> None:
    """Raise ModelLimit where a sum of what flows through a model is infinite or no number: no equation with it has a solution."""
    if not bool(tensor.isfinite().all()):
        raise ModelLimit("a value in the model is not finite", at=at, fix="load it in float32")
