"""Figures and removals in, what a person looks at out: a before/after table, and a picture of what went, layer by layer.

Nothing here prints: the terminal parts are rich renderables, the picture is a PNG file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from graphprune.errors import UserMistake

SHADES = ("#e7ebef", "#fbe3cf", "#f8bf94", "#f0935b", "#d9622f", "#a83a17", "#6b1d0a")
"""From kept whole to removed whole; the first is for nothing removed at all."""
INK, QUIET = "#1f2a33", "#7b8794"
BLOCKS = " ▁▂▃▄▅▆▇█"
UNITS = ("", "k", "M", "G", "T")


@dataclass(frozen=True, slots=True)
class Removal:
    """In one layer, how many units of one kind are kept, of how many."""

    layer: str
    kind: str
    kept: int
    total: int

    @property
    def removed(self) -> float:
        """The removed share, 0 to 1."""
        return 1 - self.kept / self.total if self.total else 0.0
