"""Runs say the positions again, in as few pieces as there are gaps."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from graphprune.runs import runs


@given(st.lists(st.integers(0, 12)))
def test_runs_spell_out_the_positions_and_none_goes_on_in_the_next(positions: list[int]) -> None:
    found = runs(positions)
    assert [first + step for first, count in found for step in range(count)] == positions
    assert all(count > 0 for _, count in found)
    assert all(first + count != after for (first, count), (after, _) in itertools.pairwise(found))
