"""What the heuristic cannot know: for each difficult model type, the sizes, inputs and options that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Special:
    """Config changes (nested as the config is), input changes, and how the model is best built."""

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], Mapping[str, Any]] | None = None
    attention: str | None = None
    gain: float = 1.5


CAUSAL: dict[str, Special] = {}
MASKED: dict[str, Special] = {}
SEQ2SEQ: dict[str, Special] = {}
IMAGE: dict[str, Special] = {}
AUDIO: dict[str, Special] = {}
SPECIAL = {"causal": CAUSAL, "masked": MASKED, "seq2seq": SEQ2SEQ, "image": IMAGE, "audio": AUDIO}
