"""Laws of the algebra: what an axis keeps is what real indexing keeps, and unification is fair, stable and bounded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.axes import Axis, Factor, Keep
from graphprune.unify import Expression, Reason, Solver, free_variables, length, resolve

settings.register_profile("laws", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")
WHY = Reason("test")

# ── axes against numpy ───────────────────────────────────────────────────────────────────────────────────────────────

FACTORS = [Factor(number, size) for number, size in enumerate((2, 3, 4, 5))]
AXES = st.recursive(
    st.sampled_from(FACTORS),
    lambda items: st.lists(st.lists(items, max_size=2).map(tuple), min_size=1, max_size=3).map(lambda s: Axis(tuple(s))),
    max_leaves=6,
).map(lambda item: item if isinstance(item, Axis) else Axis(((item,),)))


def survivors(dice: random.Random, factors: set[Factor] | frozenset[Factor]) -> Keep:
    """Random units of some of the factors."""
    chosen = [factor for factor in sorted(factors, key=lambda f: f.id) if dice.random() < 0.8]
    return {factor: sorted(dice.sample(range(factor.size), dice.randint(1, factor.size))) for factor in chosen}


def mask(item: Factor | Axis, keep: Keep) -> np.ndarray:
    """Which indices survive, by Kronecker products and concatenation."""
    if isinstance(item, Factor):
        return np.isin(np.arange(item.size), keep.get(item, range(item.size)))
    return np.concatenate([reduce(np.kron, (mask(part, keep) for part in product), np.ones(1, bool)) for product in item.segments])


@given(AXES, st.randoms())
def test_kept_is_what_numpy_keeps(axis: Axis, dice: random.Random) -> None:
    keep = survivors(dice, axis.factors)
    expected = mask(axis, keep)
    assert axis.size == len(expected)
    assert axis.kept(keep) == np.flatnonzero(expected).tolist()
    assert axis.resized(keep) == expected.sum()


@given(AXES, st.randoms())
def test_units_tell_what_is_kept(axis: Axis, dice: random.Random) -> None:
    """An index survives exactly if every occurrence of a factor that covers it is at a unit that survives."""
    for factor in axis.factors:
        keep = {factor: sorted(dice.sample(range(factor.size), dice.randint(1, factor.size)))}
        columns = axis.units(factor)
        alive = [i for i in range(axis.size) if all(column[i] in (-1, *keep[factor]) for column in columns)]
        assert alive == axis.kept(keep)
        assert len(columns) == sum(other == factor for other, _ in axis.occurrences())


# ── unification ──────────────────────────────────────────────────────────────────────────────────────────────────────

Layout = int | tuple[str, tuple["Layout", ...]]
"""A number is a factor of that size; ``("sum", parts)`` and ``("product", parts)`` nest."""


def layouts(size: int, depth: int = 3) -> st.SearchStrategy[Layout]:
    """Random ways to lay out an axis of ``size``."""
    choices: list[st.SearchStrategy[Layout]] = [st.just(size)]
    divisors = [d for d in range(2, size) if size % d == 0]
    if depth and divisors:
        choices.append(st.sampled_from(divisors).flatmap(lambda d: _pair("product", d, size // d, depth)))
    if depth and size > 1:
        choices.append(st.integers(1, size - 1).flatmap(lambda d: _pair("sum", d, size - d, depth)))
    return st.one_of(choices)


def _pair(kind: str, one: int, other: int, depth: int) -> st.SearchStrategy[Layout]:
    return st.tuples(layouts(one, depth - 1), layouts(other, depth - 1)).map(lambda parts: (kind, parts))


def built(solver: Solver, layout: Layout) -> Expression:
    """The layout as an expression of fresh variables."""
    if isinstance(layout, int):
        return solver.fresh(layout)
    parts = [built(solver, part) for part in layout[1]]
    return solver.product(parts) if layout[0] == "product" else tuple(segment for part in parts for segment in part)


def shape(axis: Expression) -> str:
    """An axis with its factors numbered in the order they appear, pinned ones in brackets."""
    names: dict[int, str] = {}
    pinned = {leaf.id for leaf in free_variables(axis) if leaf.pins}

    def name(item: Factor | Axis) -> str:
        if isinstance(item, Axis):
            return f"({show(item)})"
        shown = names.setdefault(item.id, f"{len(names)}:{item.size}")
        return f"[{shown}]" if item.id in pinned else shown

    def show(whole: Axis) -> str:
        return " + ".join("·".join(map(name, product)) for product in whole.segments)

    return show(resolve(axis))


PAIRS = st.sampled_from([6, 8, 12, 20, 24, 30]).flatmap(lambda size: st.tuples(layouts(size), layouts(size)))


@given(PAIRS)
def test_unify_is_symmetric(pair: tuple[Layout, Layout]) -> None:
    forth, back = Solver(), Solver()
    one, other = (built(forth, layout) for layout in pair)
    twin, mirror = (built(back, layout) for layout in pair)
    assert forth.unify(one, other, WHY) == back.unify(mirror, twin, WHY)
    if not any(leaf.pins for leaf in free_variables(one)):
        assert shape(one) == shape(twin)


@given(PAIRS)
def test_unify_is_idempotent_and_keeps_sizes(pair: tuple[Layout, Layout]) -> None:
    solver = Solver()
    one, other = (built(solver, layout) for layout in pair)
    agreed = solver.unify(one, other, WHY)
    before, count = (shape(one), shape(other)), len(solver.variables)
    assert length(one) == length(other) == resolve(one).size == resolve(other).size
    if agreed:
        assert solver.unify(one, other, WHY)
        assert (shape(one), shape(other)) == before
        assert len(solver.variables) == count
        assert resolve(one) == resolve(other) or resolve(one).kept({}) == resolve(other).kept({})


@given(PAIRS, st.randoms())
def test_what_unified_shrinks_alike_and_what_did_not_is_pinned(pair: tuple[Layout, Layout], dice: random.Random) -> None:
    solver = Solver()
    one, other = (built(solver, layout) for layout in pair)
    if solver.unify(one, other, WHY):
        left, right = resolve(one), resolve(other)
        assert left.factors == right.factors
        keep = survivors(dice, left.factors)
        assert left.kept(keep) == right.kept(keep)
    else:
        stuck = [*free_variables(one), *free_variables(other)]
        assert stuck and all(leaf.pins and "test: " in leaf.pins[0].what for leaf in stuck)


@given(st.sampled_from([6, 8, 12, 24]).flatmap(layouts))
def test_an_unknown_axis_takes_any_layout(layout: Layout) -> None:
    """Unifying with a fresh axis, or with a copy, loses nothing."""
    solver = Solver()
    known, before = built(solver, layout), ""
    before = shape(known)
    unknown, copy = solver.fresh(length(known)), built(solver, layout)
    assert solver.unify(unknown, known, WHY) and solver.unify(copy, unknown, WHY)
    assert shape(known) == shape(unknown) == shape(copy) == before


@given(PAIRS, st.booleans())
def test_pins_and_norms_follow_units(pair: tuple[Layout, Layout], first: bool) -> None:
    """Whatever lies on a pinned (normalised) axis is pinned (normalised), whether that was said before or after."""
    solver = Solver()
    one, other = (built(solver, layout) for layout in pair)
    if first:
        solver.pin(one, WHY)
        solver.renormalise(one, WHY)
    agreed = solver.unify(one, other, WHY)
    if not first:
        solver.pin(one, WHY)
        solver.renormalise(one, WHY)
    assert all(leaf.pins and (leaf.renormalised or not agreed) for leaf in (*free_variables(one), *free_variables(other)))


@given(st.sampled_from([8, 12, 24]).flatmap(lambda size: st.tuples(layouts(size), st.integers(0, size))))
def test_a_cut_axis_is_the_sum_of_its_parts(cut: tuple[Layout, int]) -> None:
    solver = Solver()
    whole, offset = built(solver, cut[0]), cut[1]
    before, after = solver.cut(whole, offset, WHY)
    assert (length(before), length(after)) == (offset, length(whole) - offset)
    assert solver.unify((*before, *after), whole, WHY)
    assert not any(leaf.pins for leaf in free_variables(whole))


# ── programs of reshapes, transpositions and concatenations, against real tensors ────────────────────────────────────


class Program:
    """A tensor of its own indices that is rearranged step by step, with its axes; each step can be replayed on a cut tensor."""

    def __init__(self, sizes: list[int]) -> None:
        self.solver = Solver()
        self.axes = [self.solver.fresh(size) for size in sizes]
        self.start = list(self.axes)
        self.value = torch.arange(int(np.prod(sizes))).reshape(sizes)
        self.steps: list[Callable[[Tensor, Keep], Tensor]] = []

    def do(self, step: Callable[[Tensor, Keep], Tensor], axes: list[Expression]) -> None:
        """Take a step that leads to ``axes``."""
        self.steps.append(step)
        self.axes = axes
        self.value = step(self.value, {})
        assert list(self.value.shape) == [length(axis) for axis in axes]

    def view(self, axes: list[Expression]) -> None:
        self.do(lambda x, keep: x.reshape([resolve(axis).resized(keep) for axis in axes]), axes)

    def split(self, dim: int, outer: int) -> None:
        one, other = self.solver.fresh(outer), self.solver.fresh(length(self.axes[dim]) // outer)
        self.solver.unify(self.axes[dim], self.solver.product((one, other)), WHY)
        self.view([*self.axes[:dim], one, other, *self.axes[dim + 1 :]])

    def join(self, dim: int) -> None:
        self.view([*self.axes[:dim], self.solver.product(self.axes[dim : dim + 2]), *self.axes[dim + 2 :]])

    def swap(self, one: int, other: int) -> None:
        axes = list(self.axes)
        axes[one], axes[other] = axes[other], axes[one]
        self.do(lambda x, _: x.transpose(one, other), axes)

    def roll(self, dim: int, offset: int) -> None:
        """Cut in two and concatenate the other way round."""
        whole = self.axes[dim]
        before, after = self.solver.cut(whole, offset, WHY)

        def step(x: Tensor, keep: Keep) -> Tensor:
            sizes = [resolve(part).resized(keep) for part in (before, after)]
            return torch.cat(x.split(sizes, dim)[::-1], dim)

        self.do(step, [*self.axes[:dim], (*after, *before), *self.axes[dim + 1 :]])

    def meet(self, dim: int, other: Expression) -> None:
        """Something elementwise joins this axis with another of its size."""
        self.solver.unify(self.axes[dim], other, WHY)

    def random_step(self, dice: random.Random) -> None:
        dim = dice.randrange(len(self.axes))
        size = length(self.axes[dim])
        divisors = [d for d in range(2, size) if size % d == 0]
        twins = [axis for axis in (*self.start, *self.axes) if length(axis) == size]
        choice = dice.choice(["split", "join", "swap", "roll", "meet"])
        if choice == "split" and divisors and len(self.axes) < 5:
            self.split(dim, dice.choice(divisors))
        elif choice == "join" and dim + 1 < len(self.axes):
            self.join(dim)
        elif choice == "roll" and size > 2:
            self.roll(dim, dice.randint(1, size - 1))
        elif choice == "meet":
            self.meet(dim, dice.choice(twins))
        else:
            self.swap(dim, dice.randrange(len(self.axes)))


@settings(max_examples=250)
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3), st.integers(1, 7))
def test_kept_is_what_real_tensors_keep(dice: random.Random, sizes: list[int], steps: int) -> None:
    """Cutting the start and replaying with resized literals gives the cut of the end."""
    program = Program(sizes)
    for _ in range(steps):
        program.random_step(dice)
    free = {Factor(leaf.id, leaf.size) for axis in (*program.start, *program.axes) for leaf in free_variables(axis) if not leaf.pins}
    keep = survivors(dice, free)
    value = cut(torch.arange(program.value.numel()).reshape(sizes), program.start, keep)
    for step in program.steps:
        value = step(value, keep)
    assert torch.equal(value, cut(program.value, program.axes, keep))


def cut(value: Tensor, axes: list[Expression], keep: Keep) -> Tensor:
    for dim, axis in enumerate(axes):
        value = value.index_select(dim, torch.tensor(resolve(axis).kept(keep)))
    return value


# ── termination and cost ─────────────────────────────────────────────────────────────────────────────────────────────


def rolled(program: Program, offset: int) -> None:
    program.roll(0, offset)
    program.meet(0, program.start[0])


def shuffled(program: Program, outer: int) -> None:
    program.split(0, outer)
    program.swap(0, 1)
    program.join(0)
    program.meet(0, program.start[0])


def coprime(program: Program, outer: int) -> None:
    program.split(0, outer)
    size = length(program.start[0])
    one, other = program.solver.fresh(size // outer), program.solver.fresh(outer)
    program.meet(0, program.axes[0])
    program.solver.unify(program.start[0], program.solver.product((one, other)), WHY)


def adversaries() -> Iterator[tuple[Callable[[Program, int], None], int, int]]:
    for size in (12, 64, 96, 1024, 4096, 11008):
        yield from ((rolled, size, offset) for offset in (1, 3, size // 2, size - 1))
        yield from ((shuffled, size, outer) for outer in (2, 3, 4, size // 2) if size % outer == 0)
    yield from ((coprime, one * other, one) for one, other in ((7, 13), (64, 81), (31, 1024), (6, 4)))


@pytest.mark.parametrize(("attack", "size", "number"), adversaries(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_adversarial_layouts_cost_little(attack: Callable[[Program, int], None], size: int, number: int) -> None:
    """Either the layouts agree, or all of the axis is pinned with a reason; and the solver did not work itself to death."""
    program = Program([size])
    attack(program, number)
    whole = program.start[0]
    assert len(program.solver.variables) < 2000
    stuck = [leaf for leaf in free_variables(whole) if leaf.pins]
    assert not stuck or len(stuck) == len(list(free_variables(whole)))
    assert all(leaf.pins[0].what.startswith("test: ") for leaf in stuck)


def test_a_roll_by_half_swaps_two_equal_halves() -> None:
    program = Program([8])
    rolled(program, 4)
    assert shape(program.start[0]) == "0:4 + 0:4"


def test_a_roll_by_a_quarter_makes_quarters() -> None:
    program = Program([8])
    rolled(program, 2)
    assert shape(program.start[0]) == "0:2 + 0:2 + 0:2 + 0:2"


def test_coprime_layouts_are_refused_with_the_reason() -> None:
    solver = Solver()
    whole = solver.fresh(6)
    assert solver.unify(whole, solver.product((solver.fresh(2), solver.fresh(3))), WHY)
    assert not solver.unify(whole, solver.product((solver.fresh(3), solver.fresh(2))), WHY)
    assert shape(whole) == "[0:2]·[1:3]"
    assert next(free_variables(whole)).pins[0].what == "test: 3 and 2 have no common layout"


def test_axes_of_different_sizes_are_refused() -> None:
    solver = Solver()
    assert not solver.unify(solver.fresh(6), solver.fresh(5), WHY)


def test_an_empty_axis_and_an_axis_of_one_have_no_factors() -> None:
    solver = Solver()
    assert (length(solver.fresh(0)), length(solver.fresh(1))) == (0, 1)
    assert not list(free_variables((*solver.fresh(0), *solver.fresh(1))))
    assert solver.unify(solver.product((solver.fresh(1), solver.fresh(3))), solver.fresh(3), WHY)
