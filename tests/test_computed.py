"""Constants that a forward computes from sizes: a graph slices them, a module would compute them anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune import compile
from graphprune.errors import ModelLimit
from tests.idioms import LinearBias
from tests.models import sharpened

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")


class Folded(nn.Module):
    """Heads folded into an open batch, with a slope for each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 18), nn.Linear(8, 18), nn.Linear(8, 18), nn.Linear(18, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, 6, 3).transpose(1, 2).reshape(batch * 6, length, 3) for part in (self.q, self.k, self.v)
        )
        slopes = 2.0 ** -torch.arange(1, 7)
        scores = (q @ k.transpose(1, 2)).view(batch, 6, length, length) * slopes.view(6, 1, 1)
        mixed = scores.softmax(-1).view(batch * 6, length, length) @ v
        return self.o(mixed.view(batch, 6, length, 3).transpose(1, 2).reshape(batch, length, 18))


def test_a_graph_keeps_the_slopes_of_the_heads_that_stay() -> None:
    model, x = sharpened(LinearBias()).eval(), torch.randn(2, 5, 8)
    result = compile(model, x, keep=0.5, method="random", kinds=["head"], emit="graph")
    (kept,) = [cut.kept for cut in result.plan.cuts]
    rows = [3 * head + i for head in kept for i in range(3)]
    with torch.no_grad():
        gone = [i for i in range(18) if i not in rows]
        model.o.weight[:, gone] = 0
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_by_default_a_module_leaves_those_heads_alone_and_says_so() -> None:
    model, x = sharpened(LinearBias()).eval(), torch.randn(2, 5, 8)
    with pytest.raises(ModelLimit, match="computes a constant over it"):
        compile(model, x, keep=0.7, method="random")
    beside = nn.Sequential(model, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    result = compile(beside, x, keep=0.7, method="random")
    assert {cut.kind for cut in result.plan.cuts} == {"ffn"}
    assert any("computes a constant over it" in note for note in result.notes)


def test_asked_for_them_a_module_is_refused_never_wrong() -> None:
    model, x = sharpened(LinearBias()).eval(), torch.randn(2, 5, 8)
    with pytest.raises(ModelLimit, match="emit"):
        compile(model, x, keep=0.5, method="random", kinds=["head"])


def test_open_sizes_that_heads_are_part_of_follow() -> None:
    model = sharpened(Folded()).eval()
    result = compile(model, torch.randn(4, 5, 8), keep=0.5, method="random", kinds=["head"], emit="graph")
    (kept,) = [cut.kept for cut in result.plan.cuts]
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        model.o.weight[:, [3 * head + i for head in range(6) if head not in kept for i in range(3)]] = 0
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)
