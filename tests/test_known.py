"""A model may ask what follows from sizes alone while it is traced; what follows from inputs stays unknown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import ModelLimit
from graphprune.execute import execute, tensors_of
from graphprune.trace import trace

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")


class Asks(nn.Module):
    """A linear layer, then what a function makes of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.function = nn.Linear(4, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.one(x))


def of_ones(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], dtype=torch.long)
    return x * 2 if (mask > 0).all() else x


def of_a_mask_written_to(x: Tensor) -> Tensor:
    mask = torch.ones_like(x[:, 0])
    mask[1:] = 0
    mask[:2] += 3
    return x * mask.sum().item()


def of_places(x: Tensor) -> Tensor:
    for place in (torch.arange(4) % 2).nonzero():
        x = x + x[:, place.item(), None]
    return x


def of_a_where(x: Tensor) -> Tensor:
    (places,) = torch.where(torch.eye(3)[1] > 0)
    return x[:, : len(places) + 1]


@pytest.mark.parametrize("function", [of_ones, of_a_mask_written_to, of_places, of_a_where])
def test_what_follows_from_sizes_is_known(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Asks(function), torch.randn(3, 4)
    traced = trace(model, (x,))
    (found,) = execute(traced, tensors_of(model, traced), [x])
    torch.testing.assert_close(found, model(x))


def of_the_input(x: Tensor) -> Tensor:
    return x * 2 if (x > 0).any() else x


def of_a_mask_the_input_wrote_to(x: Tensor) -> Tensor:
    mask = torch.zeros(3)
    view = mask[:2]
    view += x[0, 0]
    return x * 2 if mask.any() else x


def of_chance(x: Tensor) -> Tensor:
    return x * 2 if torch.rand(3).sum() > 1 else x


def of_a_mask_filled_from_the_input(x: Tensor) -> Tensor:
    return x * 2 if x.new_full((3,), x.sum()).any() else x  # type: ignore[arg-type]  # torch takes it


@pytest.mark.parametrize("function", [of_the_input, of_a_mask_the_input_wrote_to, of_a_mask_filled_from_the_input, of_chance])
def test_what_follows_from_inputs_or_chance_is_not(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelLimit, match="cannot be exported"):
        trace(Asks(function), (torch.randn(3, 4),))


class Loop(nn.Module):
    """Experts in a loop over those that were hit; ``always`` adds something for each of them, whoever chose it."""

    def __init__(self, always: float) -> None:
        super().__init__()
        self.embed, self.router, self.always = nn.Embedding(9, 4), nn.Linear(4, 3), always
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        chosen = torch.nn.functional.one_hot(self.router(x).argmax(-1), num_classes=3)
        out = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum(0), 0).nonzero():
            (rows,) = torch.where(chosen[:, expert[0]])
            out.index_add_(0, rows, self.experts[expert[0]].to(x.dtype)(x[rows]))
            out = out + self.always
        return out


def test_a_loop_over_experts_is_traced_over_all_of_them() -> None:
    model, ids = Loop(0.0), torch.arange(10).view(2, 5) % 9
    traced = trace(model, (ids,))
    for rows in (ids, torch.zeros_like(ids)):
        (found,) = execute(traced, tensors_of(model, traced), [rows])
        torch.testing.assert_close(found, model(rows))


class OneMore(Loop):
    """Counts one more expert than there are, and asks of each whether anybody chose it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        chosen = torch.nn.functional.one_hot(self.router(x).argmax(-1), num_classes=4)
        out = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum(0), 0).nonzero():
            with torch.no_grad():
                (rows,) = torch.where(chosen[:, expert[0]])
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, self.experts[expert[0]](x[rows]))
        return out


def test_a_loop_may_count_an_expert_too_many_and_leave_out_what_nobody_chose() -> None:
    model, ids = OneMore(0.0), torch.arange(10).view(2, 5) % 9
    traced = trace(model, (ids,))
    for rows in (ids, torch.zeros_like(ids)):
        (found,) = execute(traced, tensors_of(model, traced), [rows])
        torch.testing.assert_close(found, model(rows))


def test_a_loop_that_does_something_for_experts_nobody_chose_is_not() -> None:
    with pytest.raises(ModelLimit, match="depend on data"):
        trace(Loop(1.0), (torch.arange(10).view(2, 5) % 9,))
