"""Growing regularisation: what is about to go is pushed harder, step by step.

Wang et al., "Neural Pruning via Growing Regularization" (arXiv 2012.09243), over coupled groups as DepGraph's sparse training does
(arXiv 2301.12900)::

    loss + ½ Σ λ_g,k · ‖w_g,k‖₂²
    λ_g,k += step · (max_j I_g,j − I_g,k) / (max_j I_g,j − min_j I_g,j)        each time it grows,   I_g,k = ‖w_g,k‖₂

so the weakest unit of a group grows by the whole step and the strongest not at all. As a Trainer callback it grows every ``every``
optimizer steps; in a loop of your own call ``penalty.grow()``.
"""

from __future__ import annotations

from torch import nn

from graphprune import Groups, Penalty


def growing(model: nn.Module, groups: Groups, *, strength: float = 1e-4, step: float = 1e-4, every: int = 10) -> Penalty:
    """The growing penalty of a model's parameters."""

    def grow(penalty: Penalty) -> None:
        for name, norms in penalty.norms().items():
            spread = (norms.max() - norms.min()).clamp_min(1e-12)
            penalty.strengths[name] += step * (norms.max() - norms) / spread

    return Penalty(model, groups, groups.axes.tensors, strength=strength, squared=True, grow=grow, every=every)
