"""SparseGPT: remove weights one column at a time and let the columns to the right make up for each.

Frantar and Alistarh (arXiv 2301.00774): the layer-wise objective ``min ‖WX − ŴX‖²`` by optimal brain surgeon, with one Hessian
for all rows::

    H = X·Xᵀ + λI,   U = upper Cholesky factor of H⁻¹,   S_ij = W_ij² / U_jj²
    for each column j:   e = (W_:j − Ŵ_:j) / U_jj,   W_:,j… −= e · U_j,j…

Columns go in blocks: the lowest share of a rows × block slab is removed, or of each m columns, re-scored as they are reached.
Inputs that never fire get H_jj = 1 and lose their weights. λ is ``damping`` × mean diagonal, raised tenfold for as long as the
factorisation fails. ``sparse = graphprune.sparsify(model, calibration, method="sparsegpt", sparsity=0.5)``
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune import Matrix, Moments, Pattern, Sparse, lowest
from graphprune.precise import check_finite


def sparsegpt(matrix: Matrix, moments: Moments, pattern: Pattern, *, block: int = 128, damping: float = 0.01) -> Sparse:
    """Zero weights of a matrix (rows, inputs) and update those that stay; ``block`` columns share a threshold."""
    hessian = moments.values.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight = matrix.values.masked_fill(dead, 0)
    factor = inverse_factor(hessian, damping).to(weight)
    block = block if pattern.of is None else max(1, block // pattern.of) * pattern.of
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = _clear_block(weight[:, start:stop], factor[start:stop, start:stop], pattern)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return Sparse(weight)


def _clear_block(weight: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Remove weights of a slab in place, column by column; returns the errors the other columns must make up for."""
    errors = torch.zeros_like(weight)
    scale = factor.diagonal()
    gone = torch.zeros_like(weight, dtype=torch.bool)
    if pattern.of is None:
        gone = lowest((weight / scale).square().reshape(1, -1), pattern).reshape(weight.shape)
    for j in range(weight.shape[1]):
        if pattern.of is not None and j % pattern.of == 0:
            here = slice(j, j + pattern.of)
            gone[:, here] = lowest((weight[:, here] / scale[here]).square(), pattern)
        errors[:, j] = weight[:, j].where(gone[:, j], 0) / scale[j]
        weight[:, j:] -= errors[:, j, None] * factor[j, j:]
        weight[:, j].masked_fill_(gone[:, j], 0)
    return errors


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse; the damping grows until there is one."""
    check_finite(hessian.diagonal())
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * hessian.diagonal().abs().mean()
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * eye)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(factor.isfinite().all()):
            found: Tensor = factor
            return found
        damping = max(10 * damping, 1e-6)
