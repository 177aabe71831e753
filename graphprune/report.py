"""Figures and removals in, what a person reads in a terminal out: tables, and a strip of blocks for each kind of group.

Nothing here prints: these are rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graphprune.bench import Figures, Speed
from graphprune.removed import Cells, Removal, grid_of, layers_of, short, summary

HEAT = ("#8a97a3", "#f2b98a", "#ee9a5f", "#e8743b", "#d1521c", "#a93708", "#7d2300")
"""From nothing removed to everything removed."""
BLOCKS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
PREFIXES = ("", "k", "M", "G", "T")
CELLS_A_LINE = 48
"""Layers in one line of a strip."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A measured value with its unit, and its spread where it was measured more than once."""

    value: float
    unit: str = ""
    spread: float | None = None

    def __str__(self) -> str:
        scale = _scale(self.value)
        value, spread = (x / 1000**scale for x in (self.value, self.spread or 0.0))
        shown = _digits(value) if self.spread is None else f"{value:,.1f} ± {spread:,.1f}"
        unit = f"{PREFIXES[scale]}{self.unit}"
        return f"{shown} {unit}" if unit else shown


Value = Amount | float | int | str


def before_after(rows: Mapping[str, tuple[Value, Value]], *, title: str | None = None) -> Table:
    """A table of rows before and after, with the change where both are numbers."""
    table = Table(title=title, title_style="bold", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.add_column("", style="default")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (before, after) in rows.items():
        table.add_row(name, _shown(before), Text(_shown(after), style="bold"), _change(before, after))
    return table


def side_by_side(models: Mapping[str, Figures]) -> Table:
    """A column a model: sizes, then how fast each reads and writes, beside the first and beside the ideal."""
    rows: dict[str, list[str]] = {
        "parameters": [str(Amount(row.parameters)) for row in models.values()],
        "weights": [str(Amount(row.weights, "B")) for row in models.values()],
        "KV cache a token": [str(Amount(row.kv, "B")) for row in models.values()],
        "peak memory": [str(Amount(row.peak, "B")) for row in models.values()],
    }
    for place, phase in enumerate(("prefill", "decode")):
        timed = [row.prefill if place == 0 else row.decode for row in models.values()]
        if None not in timed:
            rows |= _phase(phase, [speed for speed in timed if speed], [(row.ideal, row.reached) for row in models.values()], place)
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _phase(name: str, speeds: Sequence[Speed], ideals: Sequence[Any], place: int) -> dict[str, list[str]]:
    return {
        f"{name}, a second": [str(speed) for speed in speeds],
        f"{name}, ms each": [f"{1000 / speed.median:.3f}" for speed in speeds],
        f"{name}, times the first": [f"{speed.ratio:.2f} ({min(speed.ratios):.2f} to {max(speed.ratios):.2f})" for speed in speeds],
        f"{name}, ideal": [f"{ideal[place]:.2f}, reached {reached[place]:.0%}" for ideal, reached in ideals],
    }


def strips(removals: Iterable[Removal]) -> Table:
    """For each kind a strip with a block a layer: the higher and hotter, the more of that layer was removed."""
    grid = grid_of(removals)
    layers = layers_of(grid)
    legend = f"removed of each layer: {NOTHING} nothing, {BLOCKS[3]} half, {BLOCKS[-1]} all"
    table = Table(box=None, pad_edge=False, show_header=False, caption=legend, caption_justify="left")
    for style, justify in (("bold", "left"), ("", "left"), ("", "right")):
        table.add_column(style=style, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for start in range(0, len(layers), CELLS_A_LINE):
        line = layers[start : start + CELLS_A_LINE]
        for kind, cells in grid.items():
            table.add_row(kind, _strip(cells, line), summary([cells[layer] for layer in line if layer in cells]))
        table.add_row("", Text(_ruler(line), style="dim"), "")
    return table


def _strip(cells: Cells, layers: Sequence[str]) -> Text:
    return Text.assemble(*(_block(cells.get(layer)) for layer in layers))


def _block(cell: Removal | None) -> tuple[str, str]:
    """A layer's character and its colour."""
    if cell is None:
        return " ", ""
    if cell.removed <= 0:
        return NOTHING, HEAT[0]
    height = min(round(cell.removed * len(BLOCKS) + 0.5) - 1, len(BLOCKS) - 1)
    return BLOCKS[max(height, 0)], HEAT[min(1 + int(cell.removed * (len(HEAT) - 1)), len(HEAT) - 1)]


def _ruler(layers: Sequence[str]) -> str:
    """The first and the last label under the ends of a strip; side by side where the strip is short."""
    labels = short(layers)
    gap = len(layers) - len(labels[0]) - len(labels[-1])
    return f"{labels[0]}{' ' * max(gap, 3)}{labels[-1]}" if len(labels) > 1 else labels[0]


def _shown(value: Value) -> str:
    return str(Amount(value)) if isinstance(value, int | float) else str(value)


def _change(before: Value, after: Value) -> str:
    old, new = (value.value if isinstance(value, Amount) else value for value in (before, after))
    if isinstance(old, str) or isinstance(new, str) or old == 0:
        return ""
    share = new / old - 1
    return f"{'−' if share < 0 else '+'}{abs(share):.1%}" if new != old else "same"


def _scale(value: float) -> int:
    """How many times a thousand goes into a value, from ten thousand on."""
    scale = 0
    while abs(value) / 1000**scale >= (10_000 if scale == 0 else 1000) and scale < len(PREFIXES) - 1:
        scale += 1
    return scale


def _digits(value: float) -> str:
    """About four digits; whole numbers stay whole."""
    if value == int(value) and abs(value) < 10_000:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
