"""Models that write: into their buffers, into what they are given. Neither a compile nor a check leaves a trace of it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import ModelLimit
from graphprune.memory import untouched
from graphprune.trace import trace
from tests.models import sharpened


class Remembering(nn.Module):
    """A running mean, a counter, a bank written through a view, and an input that is scaled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.key, self.down = nn.Linear(6, 16), nn.Linear(16, 10), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("bank", torch.ones(4, 10))
        self.register_buffer("fixed", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x.mul_(2.0)).relu() * self.fixed
        self.mean.lerp_(hidden.mean(0), 0.1)
        self.steps += 1
        keys = self.key(hidden)
        found = keys @ self.bank.T
        self.bank[:1].copy_(keys[:1])
        return self.down(hidden - self.mean) + found.sum(1, keepdim=True)


def test_what_is_written_to_is_known() -> None:
    found = trace(Remembering(), torch.randn(2, 6))
    names = {found.tensors[name].name if name in found.tensors else name for name in found.lent}
    assert names == {"mean", "steps", "bank", *found.inputs}


def test_a_model_that_writes_is_compiled_and_stays_as_it_was() -> None:
    model, x = sharpened(Remembering()), torch.randn(2, 6)
    state, given = {name: value.clone() for name, value in model.state_dict().items()}, x.clone()
    result = graphprune.compile(model, x, keep=0.5, kinds=["all"])
    assert result.plan.cost["after"]["parameters"] < result.plan.cost["before"]["parameters"]
    assert torch.equal(x, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert int(result.model.steps) == 0


def test_what_a_forward_writes_is_undone() -> None:
    model = Remembering()
    with untouched(model), torch.no_grad():
        model(torch.randn(2, 6))
        assert int(model.steps) == 1
        model.fixed = torch.zeros(16)
    assert int(model.steps) == 0
    assert torch.equal(model.fixed, torch.ones(16))
    assert torch.equal(model.bank, torch.ones(4, 10))


class Counting(nn.Module):
    """Scales by how often it was called, of which no trace knows."""

    calls: ClassVar[list[None]] = []

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(None)
        return self.down(self.up(x).relu()) * len(self.calls)


def test_a_graph_that_is_not_the_model_is_refused() -> None:
    with pytest.raises(ModelLimit, match="the graph of Counting does not compute what the model does"):
        graphprune.compile(Counting(), torch.randn(2, 6), keep=0.5, emit="graph")


class Caching(nn.Module):
    """Attention whose bias is gathered once and kept by device until the model trains again, and a list of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)
        self.bias, self.seen = nn.Parameter(torch.randn(4, 9)), []
        self.register_buffer("places", (torch.arange(5)[:, None] - torch.arange(5)).abs())
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        self.cache = {} if mode else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.bias[:, self.places]
        self.seen.append(len(x))
        q, k, v = (part.unflatten(2, (self.heads, self.width)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attention = (q @ k.transpose(2, 3) * 0.4 + self.cache[key]).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


def test_what_a_forward_keeps_in_attributes_is_undone() -> None:
    model, x = Caching(), torch.randn(2, 5, 12)
    with untouched(model), torch.no_grad():
        model(x)
        model.extra = x
    assert model.cache == {}
    assert model.seen == []
    assert not hasattr(model, "extra")


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("used", [False, True])
def test_a_cache_is_not_taken_for_a_constant(used: bool) -> None:
    """What lies in it has the old sizes, and is computed anew from a parameter that a trace would not see otherwise."""
    model, x = sharpened(Caching()), torch.randn(2, 5, 12)
    if used:
        with torch.no_grad():
            model(x)
    held = dict(model.cache)
    result = graphprune.compile(model, x, keep=0.5, kinds=["head"])
    smaller: Any = result.model
    assert smaller.bias.shape == (2, 9)
    assert model.cache == held
    before = smaller(x)
    smaller.train()
    torch.testing.assert_close(smaller(x), before)


class Table(nn.Module):
    """A tensor in a plain attribute, along a width that shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gains = nn.Linear(6, 16), nn.Linear(16, 3), torch.randn(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.gains)


def test_a_tensor_in_a_plain_attribute_shrinks_too() -> None:
    model, x = sharpened(Table()), torch.randn(4, 6)
    smaller: Any = graphprune.compile(model, x, keep=0.5).model
    assert smaller.gains.shape == (8,)
    assert model.gains.shape == (16,)
