"""Iterative pruning: score, cut a little, score again.

Han et al., "Learning both Weights and Connections" (arXiv 1506.02626), in structured form: round k of n cuts to the share

    keep_k = keepᵏᐟⁿ   of the original's prunable parameters

with any method, scored on what is left; ``between`` may train the model after each round. The plan that comes back refers to the
original model, so it can be diffed and replayed like any other.
``result = iterative(model, keep=0.5, rounds=5, method="taylor", calibration=batches)``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graphprune import Result, Successive


def iterative(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    keep: float = 0.8,
    rounds: int = 5,
    between: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> Result:
    """Prune in rounds; ``options`` are those of ``compile``. The input model is untouched."""
    pruner = Successive(example_inputs, **options)
    for k in range(1, rounds + 1):
        result = pruner.cut_to(model, keep ** (k / rounds))
        if result is not None:
            model = result.model
            if between is not None:
                between(model)
    return pruner.result()
