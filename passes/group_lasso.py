"""Group lasso: training that pushes whole coupled units to zero.

Yuan and Lin, "Model selection and estimation in regression with grouped variables" (2006), over coupled groups as in "Structured
sparsity" (arXiv 1608.03665) and DepGraph (arXiv 2301.12900)::

    loss + Σ over groups g, units k of  λ · ‖w_g,k‖₂

where w_g,k is everything the unit spans: its slice of every member. Added to a loss, or to a transformers Trainer as a callback::

    penalty = group_lasso(model, couple(propagate(trace(model, inputs))), strength=1e-4)
    (loss + penalty()).backward()          # or Trainer(…, callbacks=[penalty])
"""

from __future__ import annotations

from torch import nn

from graphprune import Groups, Penalty


def group_lasso(model: nn.Module, groups: Groups, *, strength: float = 1e-4) -> Penalty:
    """The group-lasso penalty of a model's parameters; buffers and frozen parameters do not count."""
    return Penalty(model, groups, groups.axes.tensors, strength=strength)
