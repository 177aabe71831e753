"""Magnitude pruning: small weights matter least.

Group magnitude is the structured form of Han et al., "Learning both Weights and Connections" (arXiv 1506.02626), over coupled
groups as in DepGraph (arXiv 2301.12900)::

    score(unit) = aggregate over members of  Σ |w|^p   over the member's slice of the unit

Data-free. ``result = graphprune.compile(model, inputs, keep=0.8, method="magnitude")``
"""

from __future__ import annotations

from torch import Tensor, nn

from graphprune import Groups, Scores, score
from graphprune.precise import precise


def magnitude(model: nn.Module, groups: Groups, *, p: int = 2, aggregate: str = "sum") -> Scores:
    """Score units by the p-th power of their weights' magnitude: (units,) each, in float64."""
    weights = dict(model.named_parameters(remove_duplicate=False))

    def power(block: Tensor) -> Tensor:
        block = block.abs() if block.is_complex() else block
        own = precise(block)
        if p != 2:
            return own.abs().pow(p)
        return own.square() if own is block else own.square_()

    return score(groups, groups.axes.tensors, weights.get, method=f"magnitude p={p} {aggregate}", how=aggregate, each=power)
