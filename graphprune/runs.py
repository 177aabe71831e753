"""Positions in, the runs of consecutive ones out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def runs(positions: Sequence[int] | Positions) -> list[tuple[int, int]]:
    """Where each run begins and how many positions it has, in the order given: ``[7, 0, 1, 2]`` → ``[(7, 1), (0, 3)]``."""
    numbers = np.asarray(positions, dtype=np.int64)
    places = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    return list(zip(numbers[places].tolist(), np.diff(places, append=len(numbers)).tolist(), strict=True))
