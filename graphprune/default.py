"""Whether there is calibration text in, what stands where no method is asked for out: scores, scope, passes, how much text.

Without data it is magnitude. With text it is the recipe that ``docs/quality.md`` measures against the published methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.data import Calibration


@dataclass(frozen=True, slots=True)
class Default:
    """A scoring method with the ``scope`` it is meant for, further passes, and the calibration text it wants."""

    method: str | Callable[..., Any]
    scope: str = "local"
    passes: tuple[str, ...] = ()
    samples: int = 32
    length: int = 128


PLAIN = Default("magnitude")
CALIBRATED = Default("obs", "global", ("least_squares:where=all",), samples=64, length=512)


def default_for(calibration: Calibration | Sequence[Mapping[str, Any]] | None) -> Default:
    """The recipe for text where the calibration inputs are token ids, the data-free one otherwise."""
    inputs = calibration.inputs if isinstance(calibration, Calibration) else calibration or ()
    return CALIBRATED if any("input_ids" in batch for batch in inputs) else PLAIN
