"""Short stack traces name the lines that torch's own name."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from graphprune.meta import source_line
from graphprune.trace import trace


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def twice(self, x: Tensor) -> Tensor:
        return 2 * x + self.attention(x, x, x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.twice(x))  # type: ignore[no-any-return]


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32)), Mixed(), Called()])
def test_every_node_has_the_line_that_torch_names(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [source_line(node) for node in trace(model.eval(), torch.randn(2, 3, 16)).graph.nodes]
    monkeypatch.setattr(sys.modules["graphprune.trace"], "short_stacks", nullcontext)
    assert lines == [source_line(node) for node in trace(model, torch.randn(2, 3, 16)).graph.nodes]
    assert any(".py:" in line for line in lines)
