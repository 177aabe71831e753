"""Sums over half precision are as good as those over the same numbers in single precision; what is no number ends at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune import Scores, compile, sparsify
from graphprune.difference import difference
from graphprune.errors import ModelLimit
from tests.models import llama, tokens


def narrow(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(torch.float16).to(dtype)


def compiled(dtype: torch.dtype, rows: int, **settings: Any) -> Any:
    """From numbers that half precision holds, in ``dtype``."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(dtype)
    return compile(narrow(dtype), keep=0.6, calibration=[{"input": x}], verify=False, **settings)


def test_the_surgeon_adds_up_more_than_half_precision_holds() -> None:
    rows, settings = 200_000, {"method": "obs", "options": {"gradients": False}}
    half, single = (compiled(dtype, rows, **settings).facts[Scores].units for dtype in (torch.float16, torch.float32))
    for name, units in single.items():
        torch.testing.assert_close(half[name], units, rtol=0.02, atol=0)


@pytest.mark.parametrize(("method", "passes"), [("magnitude", ["least_squares"]), ("obs", [])])
def test_what_is_not_finite_is_told(method: str, passes: list[str]) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelLimit, match="not finite"):
        compile(model, keep=0.8, method=method, passes=passes, calibration=[{"input_ids": tokens()}])


def test_masks_of_what_is_not_finite_are_refused() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelLimit, match="not finite"):
        sparsify(model, [{"input_ids": tokens()}], method="sparsegpt")


class Closed(nn.Module):
    """Answers that are out of the question get minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).masked_fill(torch.tensor([False, True, False]), -torch.inf)


def test_an_infinity_on_both_sides_is_no_difference() -> None:
    result = compile(Closed(), torch.randn(5, 4), keep=0.5)
    assert result.model(torch.randn(2, 4))[:, 1].isneginf().all()
    assert difference([torch.tensor([1.0, -torch.inf])], [torch.tensor([1.0, torch.inf])]) == torch.inf
    assert difference([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, torch.nan])]) == torch.inf
    assert difference([torch.tensor([1.5, torch.inf])], [torch.tensor([1.0, torch.inf])]) == 0.5
