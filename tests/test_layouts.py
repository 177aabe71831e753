"""Widths that two operations lay out differently, rows written where a mask says, positions in steps: what can shrink, and by whom."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.execute import tensors_of
from graphprune.groups import Groups, couple
from graphprune.propagate import propagate
from graphprune.trace import trace
from graphprune.verify import TOLERANCE, check_masked


class GatedByPosition(nn.Module):
    """Attention whose position bias is gated by the stream, head by head; a convolution splits the stream into other parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 24), nn.Conv1d(24, 24, 3, padding=1, groups=3)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.gate, self.bias, self.last = nn.Linear(6, 2), nn.Parameter(torch.randn(4, 7, 7)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (layer(x).view(*x.shape[:2], 4, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
        gate = self.gate(x.view(*x.shape[:2], 4, 6).transpose(1, 2)).sigmoid().sum(-1, keepdim=True)
        mixed = ((q @ k.mT) / 3 + gate * self.bias).softmax(-1) @ v
        return self.last(x + self.o(mixed.transpose(1, 2).flatten(2)))


class Filled(nn.Module):
    """Features put in the place of some tokens, counted before they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(20, 16), nn.Linear(6, 16)
        self.up, self.down, self.last = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        x, features = self.embed(tokens), self.project(features)
        places = (tokens == 3).unsqueeze(-1).expand_as(x)
        torch._check(x[places].numel() >= features.numel())
        x = x.masked_scatter(places, features)
        return self.last(x + self.down(self.up(x).relu()))


class Interleaved(nn.Module):
    """Every third of the first angles is another's, and those of pairs are spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(5, 12), nn.Linear(14, 3)
        self.q, self.k, self.v = nn.Linear(12, 14), nn.Linear(12, 14), nn.Linear(12, 14)
        self.register_buffer("angles", torch.rand(7))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x, turn = self.embed(x), places[..., None] * self.angles
        first = turn[0] * 1
        first[..., 1:6:3] = turn[1][..., 1:6:3]
        sin, cos = (torch.stack([part, part], -1).reshape_as(torch.cat([part, part], -1)) for part in (first.sin(), first.cos()))
        q, k = (self.turned(layer(x), sin, cos) for layer in (self.q, self.k))
        return self.last(((q @ k.mT) / 3).softmax(-1) @ self.v(x))

    @staticmethod
    def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape_as(x) * sin


class TwoWidths(nn.Module):
    """One number for the width that queries and keys are compared on and for that of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.embed, self.last = 6, nn.Linear(5, 24), nn.Linear(24, 3)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q = self.q(x).view(*x.shape[:2], 4, self.head_dim).transpose(1, 2)
        k = self.k(x).view(*x.shape[:2], 4, self.head_dim).transpose(1, 2)
        v = self.v(x).view(*x.shape[:2], 4, self.head_dim).transpose(1, 2)
        return self.last(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Stock(nn.Module):
    """Attention as torch has it, which computes the width of its heads from that of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.last = nn.Linear(5, 24), nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


class Moved(nn.Module):
    """Something done to the units of a layer by their positions."""

    def __init__(self, moves: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.moves = nn.Linear(5, 8), nn.Linear(8, 3), moves

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.moves(self.first(x)))


TOKENS = torch.tensor([[1, 3, 3, 4, 5], [3, 7, 8, 9, 3]])


def analysed(model: nn.Module, *inputs: Tensor) -> Groups:
    torch.manual_seed(0)
    return couple(propagate(trace(model.eval(), inputs)))


def gap(model: nn.Module, groups: Groups, kind: str, *inputs: Tensor) -> float:
    """How far the original with a unit of each group of a kind masked is from the smaller computation."""
    keep = {group.factor: range(1, group.size) for group in groups if group.kind == kind}
    assert keep
    return check_masked(groups, tensors_of(model, groups.axes.trace), groups.axes.trace.flatten(inputs), keep)


def test_heads_go_though_the_stream_that_gates_them_cannot() -> None:
    model, x = GatedByPosition(), torch.randn(2, 7, 5)
    groups = analysed(model, x)
    assert groups.kinds["head"] == 1 and "hidden" not in groups.kinds
    assert gap(model, groups, "head", x) < TOLERANCE
    assert "read from a width that has another layout elsewhere" in groups.explain("gate.weight")


def test_only_a_graph_leaves_out_part_of_a_stream() -> None:
    model, x = GatedByPosition().eval(), torch.randn(2, 7, 5)
    result = graphprune.compile(model, x, keep=0.5, kinds=["head"], method="magnitude", emit="graph")
    weights = dict(result.model.body.named_parameters())
    assert weights["q.weight"].shape == (12, 24) and weights["gate.weight"].shape == (2, 6)
    (kept,) = [cut.kept for cut in result.plan.cuts]
    with torch.no_grad():
        model.o.weight[:, [6 * head + i for head in range(4) if head not in kept for i in range(6)]] = 0
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(graphprune.errors.HiddenSize, match=r"emit=.graph."):
        graphprune.compile(model, x, keep=0.5, kinds=["head"], method="magnitude", emit="module")


def test_a_stream_shrinks_though_features_are_written_into_it() -> None:
    model, inputs = Filled().eval(), (TOKENS, torch.randn(4, 6))
    groups = analysed(model, *inputs)
    assert {(group.kind, group.size) for group in groups} == {("hidden", 16), ("ffn", 24)}
    for emit in ("graph", "module"):
        result = graphprune.compile(model, inputs, keep=0.5, kinds=["hidden"], method="magnitude", emit=emit)
        (kept,) = [cut.kept for cut in result.plan.cuts]
        gone, masked = [i for i in range(16) if i not in kept], copy.deepcopy(model)
        assert len(kept) == 8
        with torch.no_grad():
            masked.up.weight[:, gone] = masked.last.weight[:, gone] = 0
            torch.testing.assert_close(result.model(*inputs), masked(*inputs), rtol=1e-4, atol=1e-5)


def test_rotations_shrink_in_the_steps_they_are_interleaved_in() -> None:
    model, inputs = Interleaved(), (torch.randn(2, 4, 5), torch.rand(2, 2, 4))
    groups = analysed(model, *inputs)
    assert sorted(group.size for group in groups if group.kind == "qk_width") == [2]
    assert gap(model, groups, "qk_width", *inputs) < TOLERANCE


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        (lambda x: x.flip(-1), "the place of the one opposite"),
        (lambda x: x.sort(-1)[0], "places by their values"),
        (lambda x: x.argsort(-1) * x, "places by their values"),
        (lambda x: x.topk(4)[0].sum(-1, keepdim=True) * x.cumprod(-1), "a zero is not nothing"),
    ],
)
def test_why_units_cannot_go_is_said_in_words(moves: Callable[[Tensor], Tensor], words: str) -> None:
    assert words in analysed(Moved(moves), torch.randn(2, 5)).explain("first.weight")


@pytest.mark.parametrize(
    ("net", "kind", "words"),
    [
        (TwoWidths, "qk_width", ("self.v(x).view(*x.shape[:2], 4, self.head_dim)",)),
        (Stock, "head", ("self.attention(x, x, x", "in torch's functional.py:")),
    ],
)
def test_what_only_a_graph_can_cut_is_said_with_the_line(net: type[nn.Module], kind: str, words: tuple[str, ...]) -> None:
    model, x = net().eval(), torch.randn(2, 7, 5)
    with pytest.raises(graphprune.errors.HiddenSize) as caught:
        graphprune.compile(model, x, keep=0.7, kinds=[kind], method="random", emit="module")
    assert all(word in str(caught.value) for word in (*words, 'emit="graph"')), str(caught.value)
    assert graphprune.compile(model, x, keep=0.7, kinds=[kind], method="random", emit="graph").plan.cuts
