"""Idioms of published models, each in a net of its own: registered in ``NETS`` beside the others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import takes


@takes(2, 5, 8)
class ViewedAttention(nn.Module):
    """A view of what attention returns: its memory layout is another once keys and values differ in width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 5, 24))
