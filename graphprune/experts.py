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
            matrix = self.stack[number : number + 1][0]
            part = product(rows[mine], matrix.to(self.dtype or matrix.dtype))
            made = part.new_empty(len(rows), *part.shape[1:]) if made is None else made
            made[mine] = part
        assert made is not None
        return made


def gathers(node: fx.Node) -> bool:
    """Whether a node takes matrices from a stack that the graph is given, one for each row, for nothing but products."""
    if node.target is not aten.index.Tensor or node.args[0].op != "placeholder":  # type: ignore[union-attr]
        return False
    value, numbers = node.meta.get("val"), node.args[1]
    if not isinstance(value, Tensor) or value.ndim != DIMS or len(numbers) != 1 or numbers[0].meta["val"].ndim != 1:  # type: ignore[arg-type, union-attr, index]
        return False
    return all(user.target is aten.bmm.default for user in node.users)


def multiplied(one: Any, other: Any) -> Tensor:
    """``bmm`` of two operands, one of which may be gathered."""
    if isinstance(one, Gathered):
        return one.times(other)
    return other.of(one) if isinstance(other, Gathered) else aten.bmm.default(one, other)
