"""First-order unification over axis expressions: equations between axes go in, resolved axes and the reasons come out.

Variables are union-find nodes. A variable is free, merged into another, split into a product ``n := a·b``, or cut into a
sum ``n := a + b``; the last two keep a substitution, so nothing learnt is ever lost. Every size strictly shrinks on the way
down, which is why unification terminates, and a fuel limit keeps adversarial layouts (a roll by one) from paying for
refinements nobody can use: they are pinned, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod

from graphprune.axes import Axis, Factor

Product = tuple["Variable", ...]
Expression = tuple[Product, ...]
"""An axis while it is being solved for: a sum of products of variables."""

ONE: Expression = ((),)
FUEL = 256
"""Cuts one equation may cost before both of its sides are pinned instead."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something holds: what was claimed, and the place (a graph node, a parameter) that claimed it."""

    what: str
    where: object = None


class Variable:
    """A factor being solved for."""

    __slots__ = ("id", "meaning", "pins", "renormalised", "size")

    def __init__(self, number: int, size: int) -> None:
        self.id = number
        self.size = size
        self.meaning: Expression | None = None
        self.pins: list[Reason] = []
        self.renormalised: list[Reason] = []

    def __repr__(self) -> str:
        return f"v{self.id}:{self.size}"


class Conflict(Exception):
    """Two axes of one size that no common layout describes."""


@dataclass(frozen=True, slots=True)
class Link:
    """Two variables, by number, that share units, and the equation that made them share: the edges that ``explain`` walks."""

    one: int
    other: int
    why: Reason


class Solver:
    """The mutable state of one analysis. Equations are added; ``resolve`` reads the solution."""

    def __init__(self) -> None:
        self.variables: list[Variable] = []
        self.links: list[Link] = []
        self.pinned: dict[int, tuple[int, Reason]] = {}
        self._fuel = FUEL

    # ── building expressions ─────────────────────────────────────────────────────────────────────────────────────────

    def fresh(self, size: int) -> Expression:
        """An axis of ``size`` that nothing is known about."""
        return ((self._variable(size),),) if size > 1 else ONE * size

    def product(self, axes: Iterable[Expression]) -> Expression:
        """The row-major flattening of ``axes``, outermost first."""
        return (tuple(variable for axis in axes for variable in self._as_factors(axis)),)

    def pin(self, axis: Expression, why: Reason) -> None:
        """Freeze every factor of ``axis``."""
        for leaf in free_variables(axis):
            if not leaf.pins:
                self.pinned.setdefault(id(why), (leaf.id, why))
            leaf.pins.append(why)

    def renormalise(self, axis: Expression, why: Reason) -> None:
        """Mark that an operation normalises over ``axis``: removing its units is allowed but not exact."""
        for leaf in free_variables(axis):
            leaf.renormalised.append(why)

    def cut(self, axis: Expression, offset: int, why: Reason) -> tuple[Expression, Expression]:
        """Split ``axis`` into what lies before and from ``offset``. Raises Conflict when that costs too much."""
        self._fuel = FUEL
        return self._cut(axis, offset, why)

    # ── equations ────────────────────────────────────────────────────────────────────────────────────────────────────

    def unify(self, left: Expression, right: Expression, why: Reason) -> bool:
        """Make two axes equal, or pin both when no common layout exists. Returns whether they unified."""
        self._fuel = FUEL
        try:
            self._unify(left, right, why)
        except Conflict as conflict:
            reason = Reason(f"{why.what}: {conflict}", why.where)
            self.pin(left, reason)
            self.pin(right, reason)
            return False
        return True

    def _unify(self, left: Expression, right: Expression, why: Reason) -> None:
        """Refine both sides to common segment boundaries and match segment by segment."""
        one, other = normal(left), normal(right)
        if length(one) != length(other):
            raise Conflict(f"an axis of {length(one)} is not an axis of {length(other)}")
        while one and other and one != other:
            here, there = width(one[0]), width(other[0])
            if here == there:
                self._unify_products(one[0], other[0], why)
                one, other = one[1:], other[1:]
            elif here < there:
                other = self._refine(other, here, why)
            else:
                one = self._refine(one, there, why)
            one, other = normal(one), normal(other)

    def _unify_products(self, left: Product, right: Product, why: Reason) -> None:
        """Match two products of one size from the innermost factor out."""
        sums = normal((left,)), normal((right,))
        if any(len(segments) > 1 for segments in sums):
            return self._unify(*sums, why)
        one, other = (list(segments[0]) for segments in sums)
        if not one and not other:
            return None
        if one[-1] is other[-1] or one[-1].size == other[-1].size:
            self._merge(one.pop(), other.pop(), why)
        elif one[-1].size < other[-1].size:
            self._divide(other, one, why)
        else:
            self._divide(one, other, why)
        return self._unify_products(tuple(one), tuple(other), why)

    def _merge(self, one: Variable, other: Variable, why: Reason) -> None:
        """Two variables of one size are the same variable."""
        if one is other:
            return
        self.links.append(Link(one.id, other.id, why))
        if one.meaning is not None and other.meaning is not None:
            self._unify(one.meaning, other.meaning, why)
        elif one.meaning is None:
            self._bind(one, ((other,),))
        else:
            self._bind(other, ((one,),))

    def _divide(self, large: list[Variable], small: list[Variable], why: Reason) -> None:
        """The last factor of ``large`` spans several of ``small``: split it, or match it against all it spans."""
        big, little = large[-1], small[-1]
        if big.meaning is not None:
            return self._match_sum(large, small, why)
        if big.size % little.size == 0:
            return self._split(big, big.size // little.size, little, why)
        common = gcd(big.size, little.size)
        if common == 1 or little.meaning is not None:
            raise Conflict(f"{big.size} and {little.size} have no common layout")
        inner = self._variable(common)
        self._split(little, little.size // common, inner, why)
        return self._split(big, big.size // common, inner, why)

    def _match_sum(self, large: list[Variable], small: list[Variable], why: Reason) -> None:
        """A nested sum equals the product of the trailing factors of the other side that fill it."""
        target = large[-1]
        spanned: list[Variable] = []
        while prod(variable.size for variable in spanned) < target.size:
            spanned.insert(0, small.pop())
        if prod(variable.size for variable in spanned) == target.size:
            large.pop()
            return self._unify(((target,),), (tuple(spanned),), why)
        outermost = spanned[0]
        inner, rest = divmod(target.size, prod(variable.size for variable in spanned[1:]))
        if rest or outermost.meaning is not None or outermost.size % inner:
            raise Conflict(f"{outermost.size} does not align with a concatenation of {target.size}")
        self._split(outermost, outermost.size // inner, self._variable(inner), why)
        small += spanned
        return None

    def _split(self, variable: Variable, outer: int, inner: Variable, why: Reason) -> None:
        """``variable := outer · inner``."""
        fresh = self._variable(outer)
        self.links += [Link(variable.id, fresh.id, why), Link(variable.id, inner.id, why)]
        self._bind(variable, ((fresh, inner),))

    def _bind(self, variable: Variable, meaning: Expression) -> None:
        variable.meaning = meaning
        for leaf in free_variables(meaning):
            leaf.pins += variable.pins
            leaf.renormalised += variable.renormalised

    # ── cutting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _cut(self, axis: Expression, offset: int, why: Reason) -> tuple[Expression, Expression]:
        before: list[Product] = []
        after = normal(axis)
        while offset:
            if width(after[0]) <= offset:
                offset -= width(after[0])
                before.append(after[0])
                after = after[1:]
            else:
                after = normal(self._refine(after, offset, why))
        return normal(before), after

    def _refine(self, segments: Expression, offset: int, why: Reason) -> Expression:
        """Split the first segment at ``offset``, or as near before it as its outermost factor allows, or after one unit."""
        lead, inner = segments[0][0], segments[0][1:]
        first, second = self._halve(lead, max(1, offset // width(inner)), why)
        return ((*first, *inner), (*second, *inner), *segments[1:])

    def _halve(self, variable: Variable, offset: int, why: Reason) -> tuple[Product, Product]:
        """``variable := offset + rest``; a part of size one is the empty product."""
        self._fuel -= 1
        if self._fuel < 0:
            raise Conflict("more cuts than a layout is worth")
        first, second = (self.fresh(size)[0] for size in (offset, variable.size - offset))
        self.links += [Link(variable.id, part.id, why) for part in (*first, *second)]
        self._bind(variable, (first, second))
        return first, second

    # ── variables ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _variable(self, size: int) -> Variable:
        self.variables.append(Variable(len(self.variables), size))
        return self.variables[-1]

    def _as_factors(self, axis: Expression) -> Product:
        segments = normal(axis)
        if len(segments) == 1:
            return segments[0]
        variable = self._variable(length(segments))
        variable.meaning = segments
        return (variable,)


def normal(axis: Sequence[Product]) -> Expression:
    """``axis`` with every substitution applied: leading sums distributed, products flattened, sizes of one dropped."""
    return tuple(segment for product in axis for segment in _expand(product))


def _expand(product: Sequence[Variable]) -> Expression:
    """``product`` as a sum of products that no sum leads. What a leading sum stands for is kept flat, so that one that was cut a
    hundred times stays one step deep."""
    flat = [part for variable in product for part in _follow(variable)]
    if not flat or flat[0].meaning is None:
        return (tuple(flat),)
    lead, *inner = flat
    lead.meaning = segments = normal(flat[0].meaning)
    return tuple(part for segment in segments for part in ([(*segment, *inner)] if segment else _expand(inner)))


def _follow(variable: Variable) -> Product:
    """What a variable stands for, as far as that is a product: free variables and true sums stay."""
    variable = _find(variable)
    if variable.size == 1:
        return ()
    if variable.meaning is None or len(variable.meaning) > 1:
        return (variable,)
    return tuple(part for inner in variable.meaning[0] for part in _follow(inner))


def _find(variable: Variable) -> Variable:
    """The end of a chain of merges; the chain is shortened, so that a width merged once a layer stays one step away."""
    chain = []
    while (meaning := variable.meaning) is not None and len(meaning) == 1 and len(meaning[0]) == 1:
        chain.append(variable)
        variable = meaning[0][0]
    for passed in chain[:-1]:
        passed.meaning = ((variable,),)
    return variable


def free_variables(axis: Sequence[Product]) -> Iterator[Variable]:
    """The free variables of ``axis``, each once."""
    seen: dict[int, Variable] = {}
    stack = [variable for product in axis for variable in product]
    while stack:
        variable = stack.pop()
        if variable.id in seen:
            continue
        seen[variable.id] = variable
        if variable.meaning is not None:
            stack += [part for product in variable.meaning for part in product]
    return (variable for variable in seen.values() if variable.meaning is None and variable.size > 1)


def width(product: Product) -> int:
    """Number of indices a product spans."""
    return prod(variable.size for variable in product)


def length(axis: Sequence[Product]) -> int:
    """Number of indices an axis has."""
    return sum(width(product) for product in axis)


def resolve(axis: Expression) -> Axis:
    """The solution of ``axis``: immutable, with equal factors equal."""
    return Axis(tuple(tuple(_resolved(variable) for variable in product) for product in normal(axis)))


def _resolved(variable: Variable) -> Factor | Axis:
    if variable.meaning is None:
        return Factor(variable.id, variable.size)
    return resolve(variable.meaning)
