"""Magnitude masks: the smallest weights of each matrix become zero.

Han et al., "Learning both Weights and Connections" (arXiv 1506.02626), with one threshold a matrix: the baseline of the
SparseGPT and Wanda papers::

    S_ij = |W_ij|,   remove the lowest share of the whole matrix; n:m: within each m consecutive inputs of a row

Data-free. ``sparse = graphprune.sparsify(model, method="magnitude", sparsity=0.5)``
"""

from __future__ import annotations

from graphprune import Matrix, Pattern, Sparse, lowest


def magnitude_mask(matrix: Matrix, pattern: Pattern) -> Sparse:
    """Zero the smallest weights of a matrix (rows, inputs)."""
    saliency = matrix.values.abs()
    gone = lowest(saliency if pattern.of else saliency.reshape(1, -1), pattern).reshape(saliency.shape)
    return Sparse(matrix.values.masked_fill(gone, 0))
