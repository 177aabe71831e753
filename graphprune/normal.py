"""Vectors in, corrections out: normal equations summed, factored and solved within the memory of their one square.

A symmetric matrix says everything twice. While it is a factor, that lies in the lower triangle, and the upper one remembers the
matrix; one that is only multiplied with is *packed*, its lower triangle alone. Nothing else here is larger than ``BLOCK`` rows or
columns of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from graphprune.precise import check_finite

BLOCK = 256
"""Rows or columns taken at a time: enough that nearly all of the work is large products."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ·right to ``total``: (positions, rows), (positions, inputs), (rows, inputs)."""
    for rows, part in zip(torch.split(total, BLOCK), torch.split(left, BLOCK, 1), strict=True):
        rows.add_(part.T @ right)


def add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀ·x (inputs, inputs) to the lower triangle of ``total``, square or packed; ``mirror`` completes a square at last."""
    for start, rows in block_rows(total, x.shape[1]):
        rows.add_(x[:, start : start + BLOCK].T @ x[:, : rows.shape[1]])


def packed(like: Tensor, size: int) -> Tensor:
    """Zeros for the block rows of a lower triangle, in one vector."""
    return like.new_zeros(sum(min(BLOCK, size - start) * min(start + BLOCK, size) for start in range(0, size, BLOCK)))


def block_rows(matrix: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The lower triangle of a square or packed matrix, ``BLOCK`` rows at a time: where they begin, and the rows up to where they
    end."""
    place = 0
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        end = place + (stop - start) * stop
        yield start, matrix[start:stop, :stop] if matrix.ndim == 2 else matrix[place:end].view(stop - start, stop)
        place = end


def multiplied(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows · matrix, which is packed: (rows, inputs)."""
    found = torch.zeros_like(rows)
    for start, block in block_rows(matrix, rows.shape[1]):
        stop = block.shape[1]
        found[:, start:stop].addmm_(rows[:, :stop], block.mT)
        found[:, :start].addmm_(rows[:, start:stop], block[:, :start])
    return found


def exchange(square: Tensor, matrix: Tensor) -> None:
    """Let a square and a packed matrix hold what the other one held."""
    for (_, mine), (_, theirs) in zip(block_rows(square, len(square)), block_rows(matrix, len(square)), strict=True):
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)
    mirror(square)


def add_packed(square: Tensor, matrix: Tensor) -> Tensor:
    """Add a packed matrix to a square."""
    for (_, mine), (_, theirs) in zip(block_rows(square, len(square)), block_rows(matrix, len(square)), strict=True):
        mine.add_(theirs)
    return mirror(square)


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

    λ, at first ``damping``, grows tenfold until there is one; an input that is always zero counts as one of size one. Raises
    ModelLimit where the matrix is not finite.
    """
    diagonal = gram.diagonal().clone()
    check_finite(diagonal)
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
