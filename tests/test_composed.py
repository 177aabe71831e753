"""Operations that torch makes of others are written out; what cannot be stays one operation, frozen by its own name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.calls import operation


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, 12), nn.Linear(width, 5), function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.function(self.up(x).relu()))
        return found


CUT = {
    "hsplit": lambda h: torch.hsplit(h, 2)[0] * torch.hsplit(h, 2)[1],
    "renorm": lambda h: torch.renorm(h, 2, 0, 1.0),
    "linalg_vecdot": lambda h: h * torch.linalg.vecdot(h, h)[:, None],
    "pairwise_distance": lambda h: h * nn.functional.pairwise_distance(h, 2 * h)[:, None],
}


@pytest.mark.parametrize("name", CUT)
def test_what_torch_composes_can_be_cut(name: str) -> None:
    torch.manual_seed(0)
    model, x = Between(CUT[name], 6 if name == "hsplit" else 12).eval(), torch.randn(4, 8)
    trace = graphprune.trace(model, x)
    assert name not in {operation(node) for node in trace.graph.nodes}
    assert all("stack_trace" in node.meta for node in trace.graph.nodes if node.op == "call_function")
    result = graphprune.compile(model, x, keep=0.5)
    assert [len(cut.kept) for cut in result.plan.cuts] == [3 if name == "hsplit" else 6]
    graph = graphprune.compile(model, x, keep=0.5, emit="graph").model
    rows = torch.randn(7, 8)
    torch.testing.assert_close(graph(rows), result.model(rows))


def test_what_is_made_of_the_unknown_stays_one_operation() -> None:
    model, x = Between(lambda h: torch.linalg.solve(torch.eye(12), h.T).T).eval(), torch.randn(4, 8)
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, x)))
    assert not groups.groups
    assert any("linalg_solve" in frozen.reason.what for frozen in groups.frozen)


def test_what_writes_is_not_written_out() -> None:
    model, x = Between(lambda h: (h + 0).renorm_(2, 0, 1.0)).eval(), torch.randn(4, 8)
    assert "renorm" in {operation(node) for node in graphprune.trace(model, x).graph.nodes}
