"""Products that sum over a shared axis: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphprune.rules.table import Op, Typed, aten, rule
from graphprune.unify import ONE, Expression

ELLIPSIS = "..."


def contraction(
    op: Op, terms: Sequence[Sequence[str]], out: Sequence[str], operands: Sequence[Typed], apart: bool = False
) -> Typed:
    """Axis facts of an einsum: one letter is one axis, a letter that the output lacks is contracted.

    ``...`` stands for leading dimensions that broadcast. An operand without a contracted letter is a bias. ``apart`` where what
    is summed is no product.
    """
    named = [_named(term, operand) for term, operand in zip(terms, operands, strict=True)]
    places = _expand(out, max((sum(name.startswith(ELLIPSIS) for name in row) for row in named), default=0))
    letters = _letters(op, named, operands, dict(zip(places, op.shape, strict=True)))
    contracted = {name for row in named for name in row} - set(places)
    factors = [(row, operand) for row, operand in zip(named, operands, strict=True) if contracted & set(row)]
    joint = op.joint(*(operand for _, operand in factors))
    for row, operand in factors:
        others = {name for other, _ in factors if other is not row for name in other}
        for dim, name in enumerate(row):
            role = "contracted" if name in contracted else "batch" if name in others else "free"
            op.use(operand, dim, role, joint=joint, apart=apart)
    return Typed(tuple(letters[name] for name in places))


def _named(term: Sequence[str], operand: Typed) -> list[str]:
    return _expand(term, len(operand.axes) - sum(name != ELLIPSIS for name in term))


def _expand(term: Sequence[str], count: int) -> list[str]:
    """Replace the ellipsis by ``count`` names, numbered from the right so that they align."""
    spread = [f"{ELLIPSIS}{place}" for place in range(count, 0, -1)]
    return [name for item in term for name in (spread if item == ELLIPSIS else [item])]


def _letters(op: Op, named: list[list[str]], operands: Sequence[Typed], sizes: dict[str, int]) -> dict[str, Expression]:
    """One axis for each letter: all the operands' dimensions of that name, those of size one stretched."""
    letters: dict[str, Expression] = {}
    for name in dict.fromkeys(name for row in named for name in row):
        found = [operand.axes[row.index(name)] for row, operand in zip(named, operands, strict=True) if name in row]
        size = sizes.get(name) or max(op.length(axis) for axis in found)
        letters[name] = op.broadcast([Typed((axis,)) for axis in found], (size,))[0]
        _diagonal(op, name, named, operands)
    return letters


def _diagonal(op: Op, name: str, named: list[list[str]], operands: Sequence[Typed]) -> None:
    """A letter twice in one operand takes its diagonal: the two dimensions are one axis."""
    for row, operand in zip(named, operands, strict=True):
        places = [dim for dim, other in enumerate(row) if other == name]
        for dim in places[1:]:
            op.equal(operand.axes[places[0]], operand.axes[dim])


def equation(text: str, *operations: Any, operands: Sequence[str], onto: str | None = None, apart: bool = False) -> None:
    """Register operations whose axis facts are one einsum, with their tensor arguments by schema name.

    The argument called ``onto`` is broadcast and added to the result; ``apart`` as in ``contraction``.
    """
    left, right = text.split("->")
    terms = [term.split() for term in left.split(",")]

    def product(op: Op) -> Typed:
        present = [(term, op.get(name)) for term, name in zip(terms, operands, strict=True)]
        given = [(term, operand) for term, operand in present if operand is not None]
        result = contraction(op, [term for term, _ in given], right.split(), [operand for _, operand in given], apart)
        return result if onto is None else Typed(op.broadcast([result, op[onto]], op.shape))

    product.__name__ = f"equation {text}"
    rule(*operations)(product)


equation("... i, o i, o -> ... o", aten.linear, operands=("input", "weight", "bias"))
equation("i k, k j -> i j", aten.mm, operands=("self", "mat2"))
equation("b i k, b k j -> b i j", aten.bmm, operands=("self", "mat2"))
equation("i k, k -> i", aten.mv, operands=("self", "vec"))
equation("k, k -> ", aten.dot, operands=("self", "tensor"))
equation("k, k -> ", aten.vdot, operands=("self", "other"))
equation("i, j -> i j", aten.outer, aten.ger, operands=("self", "vec2"))
equation("... i, o i j, ... j, o -> ... o", aten.bilinear, operands=("input1", "weight", "input2", "bias"))
equation("i k, k j -> i j", aten.addmm, operands=("mat1", "mat2"), onto="self")
equation("... i k, ... j k -> ... i j", aten.cdist, operands=("x1", "x2"), apart=True)
equation("i k, k -> i", aten.addmv, operands=("mat", "vec"), onto="self")
equation("i, j -> i j", aten.addr, operands=("vec1", "vec2"), onto="self")
equation("b i k, b k j -> b i j", aten.baddbmm, operands=("batch1", "batch2"), onto="self")
equation("b i k, b k j -> i j", aten.addbmm, operands=("batch1", "batch2"), onto="self")


@rule(aten.matmul, aten.linalg_matmul)
def matmul(op: Op) -> Typed:
    """A matrix product with broadcast leading dimensions; vectors have no outer dimension."""
    left, right = op["self"], op["other"]
    rows = [] if len(left.axes) == 1 else ["i"]
    columns = [] if len(right.axes) == 1 else ["j"]
    terms = [["k"] if not rows else [ELLIPSIS, "i", "k"], ["k"] if not columns else [ELLIPSIS, "k", "j"]]
    return contraction(op, terms, [ELLIPSIS, *rows, *columns], [left, right])


@rule(aten.einsum)
def einsum(op: Op) -> Typed:
    """The equation says it all; without an arrow the output is every letter that occurs once, sorted."""
    text = op["equation"].replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = [_tokens(term) for term in left.split(",")]
    once = sorted(letter for letter in set(left) - {",", "."} if left.count(letter) == 1)
    out = _tokens(right) if arrow else [*([ELLIPSIS] if ELLIPSIS in left else []), *once]
    return contraction(op, terms, out, op["tensors"])


@rule(aten.tensordot)
def tensordot(op: Op) -> Typed:
    """Some dimensions of one operand summed with as many of the other; what is left of both follows in order."""
    operands = [op["self"], op["other"]]
    terms = [[f"{side}{dim}" for dim in range(len(operand.axes))] for side, operand in zip("ab", operands, strict=True)]
    pairs = zip(op.dims("dims_self", len(terms[0])), op.dims("dims_other", len(terms[1])), strict=True)
    for one, other in pairs if op["dims_self"] else ():
        terms[0][one] = terms[1][other] = f"{one} with {other}"
    rest = [name for term in terms for name in term if "with" not in name]
    return contraction(op, terms, rest, operands)


@rule(aten.kron)
def kron(op: Op) -> Typed:
    """Every dimension is the product of the operands' dimensions, aligned from the right."""
    rank = len(op.shape)
    rows = [(ONE,) * (rank - len(operand.axes)) + operand.axes for operand in (op["self"], op["other"])]
    return Typed(tuple(op.product(one, other) for one, other in zip(*rows, strict=True)))


def _tokens(term: str) -> list[str]:
    head, dots, tail = term.partition(ELLIPSIS)
    return [*head, *([ELLIPSIS] if dots else []), *tail]


@rule(aten.scaled_dot_product_attention)
def attention(op: Op) -> Typed:
    """Queries and keys share their width, keys and values their positions, all of them the heads."""
    query, key, value, mask = op["query"], op["key"], op["value"], op.get("attn_mask")
    op.equal(query.axes[-1], key.axes[-1])
    if op.get("scale") is None:
        op.constant("scale", float(op.length(query.axes[-1])) ** -0.5)
    op.equal(key.axes[-2], value.axes[-2])
    op.renormalise(key.axes[-2], "softmax over it")
    heads = [key, value]
    if op.get("enable_gqa", False):
        heads = [_repeated(op, query, operand) for operand in heads]
    lead = op.broadcast([Typed(operand.axes[:-2]) for operand in (query, *heads)], op.shape[:-2])
    positions = (query.axes[-2], key.axes[-2])
    if op.get("is_causal", False):
        for axis in positions:
            op.pin(axis, "compared by position")
    if mask is not None:
        op.broadcast([Typed((*lead, *positions)), mask], (*op.shape[:-1], op.length(key.axes[-2])))
    joint = op.joint(query, key)
    for operand in (query, key):
        op.use(operand, -1, "contracted", joint=joint)
        for dim in range(len(operand.axes) - 2):
            op.use(operand, dim, "batch", joint=joint)
    op.use(value, -2, "contracted", joint=joint)
    op.use(value, -1, "free", joint=joint)
    return Typed((*lead, query.axes[-2], value.axes[-1]))


def _repeated(op: Op, query: Typed, operand: Typed) -> Typed:
    """Grouped-query attention inside the op: every key-value head serves ``rep`` consecutive query heads."""
    groups = operand.axes[-3]
    times = op.length(query.axes[-3]) // op.length(groups)
    (rep,) = op.fresh((times,))
    return Typed((*operand.axes[:-3], op.product(groups, rep), *operand.axes[-2:]))
