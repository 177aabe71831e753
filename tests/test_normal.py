"""Normal equations in one square: sums, factors and solutions equal plain algebra whatever the blocks, and the matrix comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune import normal


def summed(size: int, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(size)
    x, missing = (torch.randn(positions, width, generator=draw, dtype=torch.float64) for width in (size, 9))
    gram, cross = torch.zeros(size, size, dtype=torch.float64), torch.zeros(9, size, dtype=torch.float64)
    for part, wanted in zip(x.split(7), missing.split(7), strict=True):
        normal.add_square(gram, part)
        normal.add_product(cross, wanted, part)
    return x, missing, normal.mirror(gram), cross


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("size", [1, 4, 11, 16])
def test_sums_and_solutions_are_those_of_plain_algebra(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal, "BLOCK", block)
    x, missing, gram, cross = summed(size, 40)
    torch.testing.assert_close(gram, x.T @ x)
    torch.testing.assert_close(cross, missing.T @ x)
    before = gram.clone()
    shifted = gram + 0.1 * torch.diag(gram.diagonal())
    with normal.factored(gram, 0.1) as factor:
        assert factor.data_ptr() == gram.data_ptr()
        torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(shifted))
        found = normal.substitute(factor, cross)
    torch.testing.assert_close(found, missing.T @ x @ shifted.inverse())
    assert torch.equal(gram, before)
    assert torch.equal(gram, gram.T)


def test_damping_grows_from_the_same_matrix_until_there_is_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal, "BLOCK", 4)
    _, _, gram, _ = summed(14, 30)
    gram = gram.inverse()
    gram[9:, 9:] -= 3 * gram.diagonal().max() * torch.eye(5)
    gram = (gram + gram.T) / 2
    before, least = gram.clone(), 0.0
    with normal.factored(gram, 0.0) as factor:
        product = factor.tril() @ factor.tril().T
    assert torch.equal(gram, before)
    scale = before.diagonal().where(before.diagonal() > 0, 1)
    least = ((product - before).diagonal() / scale).mean().item()
    torch.testing.assert_close(product, before + least * torch.diag(scale))
    assert torch.linalg.eigvalsh(before + least / 10 * torch.diag(scale)).min() < 0


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("size", [1, 4, 11, 16])
def test_a_packed_matrix_is_the_square_it_stands_for(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal, "BLOCK", block)
    x, rows, square, _ = summed(size, 40)
    y = x + rows.sum(1, keepdim=True)
    small, other = normal.packed(x, size), y.T @ y
    normal.add_square(small, y)
    torch.testing.assert_close(normal.multiplied(x, small), x @ other)
    before = square.clone()
    normal.exchange(square, small)
    torch.testing.assert_close(square, other)
    assert torch.equal(square, square.T)
    torch.testing.assert_close(normal.multiplied(x, small), x @ before)
    torch.testing.assert_close(normal.add_packed(square, small), other + before)
    assert small.numel() < square.numel() or size <= block
