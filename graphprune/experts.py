"""A stack of matrices and the number of each row's own in, products out: a matrix at a time, where a graph gathers a copy a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
DIMS = 3
"""Dimensions of a stack of matrices."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """``stack[numbers]``, (rows, …, …), that nobody has made; products are in ``dtype``, or in the stack's own."""

    stack: Tensor
    numbers: Tensor
    dtype: torch.dtype | None

    @property
    def ndim(self) -> int:
        return DIMS

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
        made: Tensor | None = None
        for number in torch.unique(self.numbers).tolist():
            mine = (self.numbers == number).nonzero().flatten()
            first = number % len(self.stack)
            matrix = self.stack[first : first + 1][0]
            part = product(rows[mine], matrix.to(self.dtype or matrix.dtype))
            made = part.new_empty(len(rows), *part.shape[1:]) if made is None else made
            made[mine] = part
        assert made is not None
        return made


def gathers(node: fx.Node) -> bool:
    """Whether a node takes matrices from a stack that the graph is given, one for each row by its number, only for products."""
    if node.target is not aten.index.Tensor:
        return False
    stack, numbers = node.args
    if not isinstance(stack, fx.Node) or stack.op != "placeholder" or not isinstance(numbers, list | tuple) or len(numbers) != 1:
        return False
    shapes = [operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in (node, numbers[0])]
    matrices, own = ((value.ndim, value.dtype) if isinstance(value, Tensor) else (0, None) for value in shapes)
    by_number = own in ((1, torch.int64), (1, torch.int32))
    return matrices[0] == DIMS and by_number and all(user.target is aten.bmm.default for user in node.users)


def multiplied(one: Any, other: Any) -> Tensor:
    """``bmm`` of two operands, one of which may be gathered."""
    if isinstance(one, Gathered):
        return one.times(other)
    return other.of(one) if isinstance(other, Gathered) else aten.bmm.default(one, other)
