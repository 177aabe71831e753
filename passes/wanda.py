"""Wanda: a weight matters as much as what it carries.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695)::

    S_ij = |W_ij| · ‖X_j‖₂

‖X_j‖₂ is the norm of input j over all calibration positions. Weights are compared within their output row: the lowest
⌊sparsity · inputs⌋ of each row become zero, or within each m consecutive inputs for n:m. Nothing is updated. ``cumulative`` is
the paper's variant: each row loses as many weights as make up one common share of its summed saliency, bisected to the target.
``sparse = graphprune.sparsify(model, calibration, method="wanda", pattern="2:4")``
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune import Matrix, Norms, Pattern, Sparse, lowest

BISECTIONS = 30


def wanda(matrix: Matrix, norms: Norms, pattern: Pattern, *, cumulative: bool = False) -> Sparse:
    """Zero the weights of lowest |W|·‖X‖₂ in each row of a matrix (rows, inputs)."""
    saliency = matrix.values.abs() * norms.values
    gone = _by_share(saliency, pattern.zeros) if cumulative and pattern.of is None else lowest(saliency, pattern)
    return Sparse(matrix.values.masked_fill(gone, 0))


def _by_share(saliency: Tensor, zeros: float) -> Tensor:
    """The weights that hold the lowest share α of each row's saliency, α such that ``zeros`` of all go."""
    ranked, order = saliency.sort(dim=1, stable=True)
    running = ranked.cumsum(1) / ranked.sum(1, keepdim=True).clamp_min(torch.finfo(ranked.dtype).tiny)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        low, high = (low, share) if float((running <= share).float().mean()) > zeros else (share, high)
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, running <= low)
