"""A model, and whether there is calibration data, in; the method that stands where none is asked for out.

Without data it is magnitude. For a language model with text it is what ``docs/quality.md`` measures against the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from graphprune.pieces import WHOLE


@dataclass(frozen=True, slots=True)
class Default:
    """A scoring method with the ``scope`` it is meant for, further passes, the calibration text it wants, and what to ``note``."""

    method: str | Callable[..., Any]
    scope: str = "local"
    passes: tuple[str, ...] = ()
    samples: int = 32
    length: int = 128
    note: str | None = None


PLAIN = Default("magnitude")
BLIND = replace(
    PLAIN,
    note="magnitude looks at weights alone; with calibration text (calibration=, --calibration self) "
    "a language model keeps far more",
)
REPAIR = ("least_squares:drift=0.5:damping=1", "newton:steps=2")
CALIBRATED = Default("obs", "global", ("self_written", "sensitivity", *REPAIR), samples=32, length=512)
STREAMED = Default("flap", passes=("least_squares",), length=512)
INFLUENCE = Default("short_gpt")


def default_for(
    model: nn.Module,
    calibrated: bool,
    kinds: Collection[str] = (),
    method: str | Callable[..., Any] | None = None,
    *,
    streamed: bool = False,
) -> Default:
    """The ``method`` that was asked for; else the recipe for a model that writes text, where there is calibration data (of what
    is ``streamed``, forward passes and a repair), and the data-free one otherwise. Of whole pieces it is block influence, where
    there is data.
    """
    if method is not None:
        return Default(method)
    if not set(WHOLE).isdisjoint(kinds):
        return INFLUENCE if calibrated else PLAIN
    if not (isinstance(model, PreTrainedModel) and model.can_generate()) or model.config.is_encoder_decoder:
        return PLAIN
    if not calibrated:
        return BLIND
    return STREAMED if streamed else CALIBRATED
