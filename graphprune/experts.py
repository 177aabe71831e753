"""A stack of matrices and the number of each row's own in, products out: a matrix at a time, where a graph gathers a copy a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
STACKED = 3
"""Dimensions of a stack of matrices."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """``stack[numbers]``, (rows, …, …), that nobody has made; products are in ``dtype``, or in the stack's own."""

    stack: Tensor
    numbers: Tensor
    dtype: torch.dtype | None

    @property
    def ndim(self) -> int:
        return STACKED

    def __mul__(self, mask: Tensor) -> Gathered:
        """Every matrix times the same mask, (1, …, …)."""
        return replace(self, stack=self.stack * mask.to(self.stack))

    def times(self, rows: Tensor) -> Tensor:
        """``bmm(self, rows)``."""
        return self._each(rows, lambda own, matrix: (own.transpose(1, 2) @ matrix.T).transpose(1, 2))

    def of(self, rows: Tensor) -> Tensor:
        """``bmm(rows, self)``."""
        return self._each(rows, torch.matmul)

    def _each(self, rows: Tensor, product: Any) -> Tensor:
        places, parts = [], []
        for number in torch.unique(self.numbers).tolist():
            first = range(len(self.stack))[number]
            matrix = self.stack[first : first + 1][0]
            places.append((self.numbers == number).nonzero().flatten())
            parts.append(product(rows[places[-1]], matrix.to(self.dtype or matrix.dtype)))
        return torch.cat(parts)[torch.cat(places).argsort()]


def gathers(node: fx.Node) -> bool:
    """Whether a node takes matrices from a stack that the graph is given, one for each row by its number, only for products."""
    if node.target is not aten.index.Tensor:
        return False
    stack, numbers = node.args
    if not isinstance(stack, fx.Node) or stack.op != "placeholder" or not isinstance(numbers, list | tuple) or len(numbers) != 1:
        return False
    made, number = (operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in (node, numbers[0]))
    if not isinstance(made, Tensor) or not isinstance(number, Tensor) or number.dtype not in (torch.int64, torch.int32):
        return False
    return made.ndim == STACKED and number.ndim == 1 and all(user.target is aten.bmm.default for user in node.users)


def multiplied(one: Any, other: Any) -> Tensor:
    """``bmm`` of two operands, one of which may be gathered."""
    if isinstance(one, Gathered):
        return one.times(other)
    return other.of(one) if isinstance(other, Gathered) else aten.bmm.default(one, other)
