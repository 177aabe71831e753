"""The type of a tensor dimension: an axis is a sum of products of factors. Receives nothing; every later room receives axes.

A **factor** is a symbol with a size, the only thing that can shrink; its indices are **units**. A product is a nested
row-major layout, a sum is a concatenation in memory order, and a product's item may itself be a sum:
``kv · rep · (r + r)`` is the output axis of a Llama query projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

Keep = Mapping["Factor", Sequence[int]]
"""For each factor that shrinks: its surviving units, ascending."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A symbolic size. Two axes that share a factor shrink together, unit by unit."""

    id: int
    size: int

    def __hash__(self) -> int:
        return self.id

    def __str__(self) -> str:
        return f"f{self.id}:{self.size}"


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor: ``segments`` in memory order, each a product with the outermost item first."""

    segments: tuple[tuple[Factor | Axis, ...], ...]

    @cached_property
    def size(self) -> int:
        """Number of indices before anything shrinks."""
        return sum(prod(item.size for item in product) for product in self.segments)

    @cached_property
    def factors(self) -> frozenset[Factor]:
        """Every factor the axis is made of."""
        return frozenset(factor for factor, _ in self.occurrences())

    def occurrences(self) -> Iterator[tuple[Factor, int]]:
        """Each factor with the nesting depth it occurs at, in memory order; a factor may occur twice (``r + r``)."""
        for product in self.segments:
            for item in product:
                if isinstance(item, Factor):
                    yield item, 0
                else:
                    yield from ((factor, depth + 1) for factor, depth in item.occurrences())

    def shrinks(self, keep: Keep) -> bool:
        """Whether any of its factors is in ``keep``."""
        return any(factor in keep for factor in self.factors)

    def resized(self, keep: Keep) -> int:
        """Number of indices once the factors in ``keep`` have shrunk."""
        return sum(prod(_new_size(item, keep) for item in product) for product in self.segments)

    def kept(self, keep: Keep) -> list[int]:
        """Ascending old indices that survive ``keep``: ``x.index_select(dim, kept)`` is the smaller tensor."""
        indices, start = [], 0
        for product in self.segments:
            indices += [start + index for index in _product_indices(product, keep)]
            start += prod(item.size for item in product)
        return indices

    def units(self, factor: Factor) -> list[list[int]]:
        """For each occurrence of ``factor``, the unit every index belongs to, or -1 where it belongs to none."""
        found, start = [], 0
        for product in self.segments:
            width = prod(item.size for item in product)
            for column in _product_units(product, factor):
                found.append([-1] * start + column + [-1] * (self.size - start - width))
            start += width
        return found

    def __str__(self) -> str:
        return " + ".join(_show(product) for product in self.segments)


@dataclass(frozen=True)
class UnitAxis(Axis):
    """The axis on which a whole tensor is one ``unit`` of a factor: it exists while the unit does."""

    factor: Factor
    unit: int

    @cached_property
    def size(self) -> int:
        """One: the tensor itself."""
        return 1

    def occurrences(self) -> Iterator[tuple[Factor, int]]:
        """Its factor."""
        yield self.factor, 0

    def resized(self, keep: Keep) -> int:
        """One or none."""
        return int(self.factor not in keep or self.unit in keep[self.factor])

    def units(self, factor: Factor) -> list[list[int]]:
        """All that is left of the tensor belongs to the unit."""
        return [[self.unit]] if factor == self.factor else []


def _new_size(item: Factor | Axis, keep: Keep) -> int:
    if isinstance(item, Axis):
        return item.resized(keep)
    return len(keep[item]) if item in keep else item.size


def _item_indices(item: Factor | Axis, keep: Keep) -> Sequence[int]:
    if isinstance(item, Axis):
        return item.kept(keep)
    return keep.get(item, range(item.size))


def _product_indices(product: tuple[Factor | Axis, ...], keep: Keep) -> list[int]:
    indices = [0]
    for item in product:
        inner = _item_indices(item, keep)
        indices = [outer * item.size + index for outer in indices for index in inner]
    return indices


def _item_units(item: Factor | Axis, factor: Factor) -> list[list[int]]:
    if isinstance(item, Axis):
        return item.units(factor)
    return [list(range(item.size))] if item == factor else []


def _product_units(product: tuple[Factor | Axis, ...], factor: Factor) -> Iterator[list[int]]:
    """Coordinates along each occurrence of ``factor``: repeated inside for outer items, tiled outside for inner ones."""
    for place, item in enumerate(product):
        outer = prod(other.size for other in product[:place])
        inner = prod(other.size for other in product[place + 1 :])
        for column in _item_units(item, factor):
            yield [unit for unit in column for _ in range(inner)] * outer


def _show(product: tuple[Factor | Axis, ...]) -> str:
    shown = [str(item) if isinstance(item, Factor) else f"({item})" for item in product]
    return " · ".join(shown) or "1"
