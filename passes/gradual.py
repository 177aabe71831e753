"""Gradual pruning inside a training loop: the model gets physically smaller on a schedule, and its optimizer with it.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), in structured form. At step t, every ``every`` steps from ``begin``
to ``end``, the share of the original's prunable parameters that is left becomes::

    keep_t = keep + (1 − keep) · (1 − (t − begin) / (end − begin))³

In a loop of your own::

    pruner = gradual(inputs, keep=0.5, end=1000, every=100, method="magnitude")
    for step, batch in enumerate(batches):
        loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        pruner.step(model, optimizer, step)        # the same model object, smaller

or ``Trainer(…, callbacks=[pruner])``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from graphprune import Plan, Successive, become, shrink


class Gradual(TrainerCallback):
    """Prunes on a schedule, in place. ``plan`` says what is left of the model it began with."""

    def __init__(self, pruner: Successive, keep: Callable[[int], float | None]) -> None:
        self.pruner, self.keep = pruner, keep

    @property
    def plan(self) -> Plan | None:
        """All cuts so far, in units of the original model."""
        return self.pruner.plan

    def step(self, model: nn.Module, optimizer: Optimizer | None, step: int) -> bool:
        """Prune if the schedule says so; the optimizer's state goes along. Whether anything changed."""
        keep = self.keep(step)
        result = None if keep is None else self.pruner.cut_to(model, keep)
        if result is None:
            return False
        if optimizer is not None:
            shrink(optimizer, model, result)
        become(model, result.model.train(model.training))
        return True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step of a transformers Trainer."""
        self.step(kwargs["model"], kwargs.get("optimizer"), state.global_step)


def gradual(
    example_inputs: Any = None, *, keep: float = 0.5, begin: int = 0, end: int = 1000, every: int = 100, **options: Any
) -> Gradual:
    """A pruner on the cubic schedule; ``options`` are those of ``compile``."""

    def share(step: int) -> float | None:
        if not begin <= step <= end or (step - begin) % every:
            return None
        return keep + (1 - keep) * (1 - (step - begin) / max(1, end - begin)) ** 3

    return Gradual(Successive(example_inputs, **options), share)
