"""Vectors in, corrections out: normal equations summed, factored and solved within the memory of their one square.

A symmetric matrix says everything twice. While it is a factor, that lies in the lower triangle, and the upper one remembers the
matrix. Nothing else here is larger than ``BLOCK`` rows or columns of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 256
"""Rows or columns taken at a time: enough that nearly all of the work is large products."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ·right to ``total``: (positions, rows), (positions, inputs), (rows, inputs)."""
    for rows, part in zip(torch.split(total, BLOCK), torch.split(left, BLOCK, 1), strict=True):
        rows.add_(part.T @ right)


def add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀ·x (inputs, inputs) to the lower triangle of ``total``; ``mirror`` completes it when all is added."""
    for start in range(0, len(total), BLOCK):
        stop = start + BLOCK
        total[start:stop, :stop].add_(x[:, start:stop].T @ x[:, :stop])


def mirror(total: Tensor) -> Tensor:
    """Make the upper triangle what the lower one is."""
    return _mirrored(total.mT).mT


def _mirrored(matrix: Tensor) -> Tensor:
    """Make the lower triangle what the upper one is."""
    for start in range(0, len(matrix), BLOCK):
        stop = start + BLOCK
        matrix[start:stop, :start] = matrix[:start, start:stop].mT
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return matrix


@contextmanager
def factored(gram: Tensor, damping: float) -> Iterator[Tensor]:
    """``gram`` (inputs, inputs), whose lower triangle is meanwhile the factor L of gram + λ·diag(gram) = L·Lᵀ.

    λ, at first ``damping``, grows tenfold until there is one; an input that is always zero counts as one of size one.
    """
    diagonal = gram.diagonal().clone()
    try:
        while not _factor(gram, diagonal + damping * diagonal.where(diagonal > 0, 1)):
            _restore(gram, diagonal)
            damping = max(10 * damping, 1e-8)
        yield gram
    finally:
        _restore(gram, diagonal)


def _restore(gram: Tensor, diagonal: Tensor) -> None:
    gram.diagonal().copy_(diagonal)
    _mirrored(gram)


def _factor(matrix: Tensor, diagonal: Tensor) -> bool:
    """Cholesky's factor of the matrix with another diagonal, block column by block column, in its lower triangle."""
    matrix.diagonal().copy_(diagonal)
    for start in range(0, len(matrix), BLOCK):
        stop = start + BLOCK
        done, corner = matrix[start:stop, :start], matrix[start:stop, start:stop]
        factor, failed = torch.linalg.cholesky_ex(torch.addmm(corner, done, done.mT, alpha=-1))
        if failed or not factor.diagonal().isfinite().all():
            return False
        corner.copy_(factor + corner.triu(1))
        below = matrix[stop:, start:stop]
        below.addmm_(matrix[stop:, :start], done.mT, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False))
    return True


def substitute(factor: Tensor, rows: Tensor) -> Tensor:
    """Replace ``rows`` (rows, inputs) by rows · (L·Lᵀ)⁻¹, L being the lower triangle of ``factor``."""
    for part in torch.split(rows, BLOCK):
        half = torch.linalg.solve_triangular(factor.mT, part, upper=True, left=False)
        part.copy_(torch.linalg.solve_triangular(factor, half, upper=False, left=False))
    return rows
