"""What passes hand to each other beside the compiler's main line: inputs to check on, how to write, what was written, notes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig

from graphprune.errors import UserMistake, nearest
from graphprune.rewrite.attributes import Attributes, Learnt
from graphprune.rewrite.reshaped import Elements
from graphprune.trace import Inputs


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs the model is traced and checked on."""

    inputs: Inputs


@dataclass(frozen=True, slots=True)
class Emission:
    """How the smaller model is written: ``emit`` is ``module`` or ``graph``, ``verify`` whether it is checked, ``inplace`` whether
    the model itself may become it, ``learnt`` what is known of the numbers that its modules keep."""

    emit: str = "module"
    verify: bool = True
    inplace: bool = False
    learnt: Learnt = field(default_factory=Learnt)

    def __post_init__(self) -> None:
        if self.emit not in ("module", "graph"):
            raise UserMistake(f"emit cannot be {self.emit!r}", fix=nearest(self.emit, ("module", "graph")))


@dataclass(frozen=True, slots=True)
class Pruned:
    """The smaller model. ``config`` is its stock config, or ``obstacle`` says why there is none; then ``attributes`` are what
    changed, and ``elements`` what stays of stacks that lost layers."""

    model: nn.Module
    config: PreTrainedConfig | None = None
    obstacle: str | None = None
    attributes: Attributes | None = None
    elements: Elements | None = None


@dataclass(frozen=True, slots=True)
class Notes:
    """What a person should be told, collected on the way."""

    lines: list[str]
