"""Random pruning: the baseline every criterion has to beat.

    score(unit) ~ U(0, 1)

Data-free. ``result = graphprune.compile(model, inputs, keep=0.8, method="random", seed=1)``
"""

from __future__ import annotations

import torch

from graphprune import Groups, Scores


def random(groups: Groups, *, seed: int = 0) -> Scores:
    """Draw a score for every unit: (units,) each, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return Scores({group.name: torch.rand(group.size, generator=draw, dtype=torch.float64) for group in groups}, f"random {seed}")
