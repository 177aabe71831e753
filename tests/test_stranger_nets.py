"""Networks that strangers brought: each was refused, crashed or needlessly frozen once, each is held to a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import Calibration, propagate, trace
from graphprune.matrices import products
from tests.models import sharpened


def drawn(*shape: int, count: int = 2) -> list[dict[str, Tensor]]:
    """Calibration batches of images, vectors, whatever has that shape."""
    return [{"x": torch.randn(shape)} for _ in range(count)]


# ── transposed convolutions ──────────────────────────────────────────────────────────────────────────────────────────


class Decoder(nn.Module):
    """A transposed convolution whose kernel places overlap."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)
        self.b = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.a(x).relu()).relu())


def units(result: Any, name: str, dim: int) -> list[int]:
    """What stays along a dimension of a tensor of the original."""
    kept: list[int] = result.groups.axes.tensors[name][dim].kept(result.plan.keep(result.groups))
    return kept


@pytest.mark.parametrize(("bias", "step"), [(True, "mean_bias"), (False, "mean_bias:add=true")])
def test_the_bias_of_a_transposed_convolution_holds_the_mean_of_what_went(bias: bool, step: str) -> None:
    model, batches = sharpened(Decoder(bias=bias)), drawn(2, 3, 5, 4)
    result = graphprune.compile(model, keep=0.6, method="flap", calibration=batches, passes=[step])
    inputs, rows = units(result, "b.weight", 0), units(result, "b.weight", 1)
    assert len(inputs) < 16
    with torch.no_grad():
        gone = model.a(torch.cat([batch["x"] for batch in batches])).relu()
        gone[:, inputs] = 0
        lost = F.conv_transpose2d(gone, model.b.weight, None, 2, 1, 1).mean((0, 2, 3))
    before = model.b.bias.detach() if bias else torch.zeros(8)
    torch.testing.assert_close(result.model.b.bias.detach(), (before + lost)[rows])
    assert result.model(batches[0]["x"]).shape == (2, 4, 10, 8)


def test_least_squares_fits_a_transposed_convolution_with_its_bias() -> None:
    model, batches = sharpened(Decoder(bias=True)), drawn(4, 3, 9, 8)
    step = "least_squares:damping=0:drift=0:even=false:where=readers"
    result = graphprune.compile(model, keep=0.6, method="magnitude", calibration=batches, passes=[step])
    inputs, rows = units(result, "b.weight", 0), units(result, "b.weight", 1)
    assert len(inputs) < 16
    with torch.no_grad():
        x = model.a(torch.cat([batch["x"] for batch in batches])).relu()
        wanted = model.b(x)[:, rows]
    (result.model.b(x[:, inputs]) - wanted).square().mean().backward()
    assert result.model.b.weight.grad.abs().max() < 1e-5 and result.model.b.bias.grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(6, 9, 3, stride=2, groups=3, dilation=2, output_padding=1), (2, 6, 5)),
        (nn.ConvTranspose2d(4, 6, (3, 1), stride=(3, 2), padding=(1, 0), groups=2), (2, 4, 5, 3)),
        (nn.ConvTranspose3d(2, 3, 2, padding=2), (2, 2, 4, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 3, padding=1), (4, 5, 3)),
    ],
)
def test_a_transposed_convolution_is_rows_times_vectors(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    (product,) = products(propagate(trace(nn.Sequential(layer), x)))
    matrix = product.layout.matrix(layer.weight)
    assert torch.equal(product.layout.restored(matrix, layer.weight), layer.weight)
    wanted = layer(x).movedim(-layer.weight.ndim + 1, 0).unflatten(0, (layer.groups, -1)).flatten(2).mT
    bias = layer.bias.unflatten(0, (layer.groups, 1, -1))
    torch.testing.assert_close(product.layout.vectors(x) @ matrix.mT + bias, wanted)


def test_a_transposed_convolution_is_sparse_along_what_meets_in_a_point() -> None:
    model, batches = sharpened(Decoder(bias=True)), drawn(2, 3, 5, 4)
    sparse = graphprune.sparsify(model, batches, method="wanda", sparsity=0.5)
    turned = sparse.b.weight.transpose(0, 1).flatten(1)
    assert (turned == 0).sum(1).eq(16 * 9 // 2).all()
