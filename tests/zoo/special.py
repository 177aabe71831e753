"""What the heuristic cannot know: for each difficult model type, the sizes, inputs and options that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Special:
    """Config changes (nested as the config is), input changes, and how the model is best built."""

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], Mapping[str, Any]] | None = None
    attention: str | None = None
    cls: str | None = None
    gain: float = 1.5


def sized(**config: Any) -> Special:
    return Special(config)


def some_tokens(length: int, rows: int = 5) -> torch.Tensor:
    """Ordinary tokens, for inputs that the family's default cannot give."""
    return torch.randint(4, 150, (rows, length), generator=torch.Generator().manual_seed(1))


def some_values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
