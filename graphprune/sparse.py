"""What a mask method is given and gives: a matrix, what flows into it, a pattern of zeros, the sparse matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import UserMistake


@dataclass(frozen=True, slots=True)
class Pattern:
    """How many weights become zero: the share ``zeros`` of them, within every ``of`` consecutive inputs where that is given."""

    zeros: float
    of: int | None = None

    def __str__(self) -> str:
        return f"{self.zeros:.0%}" if self.of is None else f"{self.of - self.removed(self.of)}:{self.of}"

    def removed(self, count: int) -> int:
        """How many of ``count`` weights become zero."""
        return int(self.zeros * count + 1e-9)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as its product sees it: ``values`` (rows, inputs), float32."""

    name: str
    values: Tensor


@dataclass(frozen=True, slots=True)
class Norms:
    """‖X_j‖₂ of every input over all calibration positions: ``values`` (inputs,), float32."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """The mean of x·xᵀ over all calibration positions: ``values`` (inputs, inputs), float64."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """A matrix with zeros: ``values`` (rows, inputs)."""

    values: Tensor


SPARSE = 0.05
"""From this share of zeros on a weight is called sparse."""


def pattern_of(sparsity: float | None, pattern: str | None) -> Pattern:
    """A share of zeros, or ``n:m``: n of every m consecutive inputs stay. Raises UserMistake on anything else."""
    if pattern is not None:
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if sparsity is not None:
            raise UserMistake(f"the pattern {pattern} is a share of zeros already", fix="leave out the sparsity")
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise UserMistake(f"no pattern: {pattern!r}", fix="2:4 keeps 2 of every 4, 4:8 is half as strict; or sparsity=0.5")
        return Pattern(1 - int(found[1]) / int(found[2]), int(found[2]))
    share = 0.5 if sparsity is None else sparsity
    if not 0 <= share < 1:
        raise UserMistake(f"sparsity is the share of zeros, below 1, not {share}")
    return Pattern(share)


def lowest(saliency: Tensor, pattern: Pattern) -> Tensor:
    """Which weights go: in each row, or in each ``pattern.of`` of a row, those of lowest saliency. (rows, inputs) → bool."""
    rows = saliency if pattern.of is None else saliency.reshape(*saliency.shape[:-1], -1, pattern.of)
    count = pattern.removed(rows.shape[-1])
    order = rows.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True).reshape(saliency.shape)
