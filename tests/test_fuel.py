"""Adversarial graphs, n and 4 n operations deep: the solver's steps are counted, not its seconds, and grow no faster than the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.groups import couple
from graphprune.propagate import propagate
from graphprune.trace import trace
from graphprune.unify import Solver

WIDTH = 60
Attack = Callable[[Tensor, int], Tensor]


def roll(x: Tensor, layer: int) -> Tensor:
    return x.roll(layer + 1, -1)


def same_roll(x: Tensor, layer: int) -> Tensor:
    return x.roll(x.shape[1] // 2, -1)


def swapped(x: Tensor, layer: int) -> Tensor:
    cut = 1 + 7 * layer % (x.shape[1] - 1)
    return torch.cat((x[:, cut:], x[:, :cut]), 1)


def interleaved(x: Tensor, layer: int) -> Tensor:
    return x.view(-1, 2, x.shape[1] // 2).transpose(1, 2).flatten(1)


def shuffled(x: Tensor, layer: int) -> Tensor:
    groups = (2, 3, 4, 5, 6)[layer % 5]
    return x.view(-1, groups, x.shape[1] // groups).transpose(1, 2).flatten(1)


def coprime_splits(x: Tensor, layer: int) -> Tensor:
    sizes = ((7, 53), (13, 47), (11, 20, 29), (31, 29))[layer % 4]
    return torch.cat(x.split(sizes, 1)[::-1], 1)


def regrouped(x: Tensor, layer: int) -> Tensor:
    """Blocks of five scaled, then blocks of twelve."""
    rows = (12, 5)[layer % 2]
    grouped = x.view(-1, rows, x.shape[1] // rows)
    return (grouped * grouped.sum(-1, keepdim=True)).flatten(1)


def nested(x: Tensor, layer: int) -> Tensor:
    """A half of a half, and so on, is turned round."""
    part = max(2, x.shape[1] // 2 ** (layer % 5 + 1))
    return torch.cat((x[:, :part].roll(1, -1), x[:, part:]), 1)


ATTACKS = (roll, same_roll, swapped, interleaved, shuffled, coprime_splits, regrouped, nested)


class Tower(nn.Module):
    """A residual stream that every layer rearranges in its own way before it adds to it."""

    def __init__(self, attack: Attack, depth: int, width: int = WIDTH) -> None:
        super().__init__()
        self.attack = attack
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            x = x + self.attack(x, number) + layer(x).relu()
        return self.last(x)


class Chain(Tower):
    """The same without a stream: every layer's width is its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            x = layer(self.attack(x, number).relu())
        return self.last(x)


def steps(model: nn.Module, counted: pytest.MonkeyPatch) -> tuple[int, int]:
    """What one analysis takes: products matched, variables merged, split and cut; and how many operations the graph has."""
    taken = 0

    def counting(name: str) -> None:
        original = getattr(Solver, name)

        def step(*args: object) -> object:
            nonlocal taken
            taken += 1
            return original(*args)

        counted.setattr(Solver, name, step)

    traced = trace(model, torch.randn(2, 6))
    with counted.context() as counted:
        for name in ("_unify_products", "_merge", "_split", "_halve", "_variable", "_refine"):
            counting(name)
        propagate(traced)
    return taken, len(traced.graph.nodes)


@pytest.mark.parametrize("tower", [Tower, Chain])
@pytest.mark.parametrize("attack", ATTACKS)
def test_work_grows_with_the_graph(tower: type[Tower], attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    few, small = steps(tower(attack, 3), monkeypatch)
    many, large = steps(tower(attack, 12), monkeypatch)
    assert many / few < 1.3 * large / small + 0.5


@pytest.mark.parametrize("attack", [roll, swapped, interleaved, shuffled, regrouped, nested])
def test_a_layout_that_is_not_worth_it_is_given_up(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the width takes hardly more steps."""
    narrow, _ = steps(Tower(attack, 3, 480), monkeypatch)
    wide, _ = steps(Tower(attack, 3, 1920), monkeypatch)
    assert wide < 1.5 * narrow


@pytest.mark.parametrize("tower", [Tower, Chain])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_frozen_says_why_and_the_rest_can_go(tower: type[Tower], attack: Attack) -> None:
    """Every width is either a group that is cut exactly, or frozen with a reason; ``verify`` compares with the masked original."""
    torch.manual_seed(0)
    model, x = tower(attack, 3).double().eval(), torch.randn(2, 6, dtype=torch.float64)
    groups = couple(propagate(trace(model, x)))
    assert all(frozen.reason.what for frozen in groups.frozen)
    if len(groups):
        result = graphprune.compile(model, x, keep=0.7, kinds=["all"], method="random", emit="graph")
        assert result.plan.cuts
