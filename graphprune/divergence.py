"""Logits of two models in, how far apart their predictions are out: Σ over tokens of KL(theirs ‖ ours), in nats.

A vocabulary is wide and a batch long: probabilities are made for a few tokens at a time and forgotten, and the gradient, which is
the difference of the two, on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Probabilities held at a time."""


def divergence(ours: Tensor, theirs: Tensor, top: int | None = None, learnt: Tensor | None = None) -> Tensor:
    """Σ KL(theirs ‖ ours) over tokens, a float32 scalar; both are logits (…, vocabulary) and ``theirs`` gets no gradient.

    ``learnt`` (…) says which tokens count. ``top`` compares their most likely tokens one by one and all others as one event.
    """
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    rows = torch.arange(len(ours), device=ours.device) if learnt is None else learnt.flatten().nonzero()[:, 0]
    if top is not None and top < theirs.shape[-1]:
        return _of_most_likely(ours[rows].float(), theirs[rows].float(), top)
    summed: Tensor = _Divergence.apply(ours, theirs, rows)  # type: ignore[no-untyped-call]
    return summed


class _Divergence(torch.autograd.Function):
    """The sum and, where it is asked for, softmax(ours) − softmax(theirs)."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, rows: Tensor) -> Tensor:
        gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        if gradient is not None and len(rows) < len(ours):
            gradient.index_fill_(0, torch.isin(torch.arange(len(ours), device=rows.device), rows, invert=True).nonzero()[:, 0], 0)
        total = ours.new_zeros((), dtype=torch.float32)
        for some in torch.split(rows, max(1, AT_ONCE // ours.shape[-1])):
            log_ours, log_theirs = (logits[some].float().log_softmax(-1) for logits in (ours, theirs))
            wanted = log_theirs.exp()
            total += torch.linalg.vecdot(log_theirs.sub_(log_ours), wanted).sum()
            if gradient is not None:
                gradient[some] = log_ours.exp_().sub_(wanted).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer[0]), None, None


def _of_most_likely(ours: Tensor, theirs: Tensor, top: int) -> Tensor:
    places, (log_ours, log_theirs) = theirs.topk(top).indices, (logits.log_softmax(-1) for logits in (ours, theirs))
    kept = [log.gather(-1, places) for log in (log_ours, log_theirs)]
    mine, wanted = (torch.cat([log, _rest(log)], -1) for log in kept)
    return (wanted.exp() * (wanted - mine)).sum()


def _rest(log_probabilities: Tensor) -> Tensor:
    """The logarithm of what is missing to one."""
    mass = log_probabilities.exp().sum(-1, keepdim=True)
    return (1 - mass).clamp_min(1e-7).log()
