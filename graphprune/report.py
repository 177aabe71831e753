"""Figures and removals in, what a person looks at out: a before/after table, a picture of what went in each layer.

Nothing here prints: the terminal parts are rich renderables, the picture is a PNG file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graphprune.bench import Figures, Speed
from graphprune.errors import UserMistake
from graphprune.groups import Groups
from graphprune.plan import Plan

KEPT, GONE, INK, QUIET = "#3d6b8c", "#e8743b", "#1f2a33", "#7b8794"
HEAT = ("#8a97a3", "#f2b98a", "#ee9a5f", "#e8743b", "#d1521c", "#a93708", "#7d2300")
"""From nothing removed to everything removed."""
BLOCKS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
PREFIXES = ("", "k", "M", "G", "T")
CELLS_A_LINE = 48
"""Layers in one line of a strip."""
WIDE_UNTIL = 32
"""Layers up to which the picture has room for a percentage in each bar."""
MOST_TICKS = 24


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


def removals(groups: Groups, plan: Plan) -> list[Removal]:
    """What a plan takes from each group, by the layer (the deepest numbered module) that the group lies in."""
    kept = {cut.group: len(cut.kept) for cut in plan.cuts}
    return [Removal(_layer(group.name), group.kind, kept.get(group.name, group.size), group.size) for group in groups]


def _layer(name: str) -> str:
    numbered = re.match(r"(?:.*\.)?\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(":")[0]


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
    grid = _grid(removals)
    layers = _layers(grid)
    legend = f"removed of each layer: {NOTHING} nothing, {BLOCKS[3]} half, {BLOCKS[-1]} all"
    table = Table(box=None, pad_edge=False, show_header=False, caption=legend, caption_justify="left")
    for style, justify in (("bold", "left"), ("", "left"), ("", "right")):
        table.add_column(style=style, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for start in range(0, len(layers), CELLS_A_LINE):
        line = layers[start : start + CELLS_A_LINE]
        for kind, cells in grid.items():
            table.add_row(kind, _strip(cells, line), _summary([cells[layer] for layer in line if layer in cells]))
        table.add_row("", Text(_ruler(line), style="dim"), "")
    return table


def picture(removals: Iterable[Removal], path: str | Path, *, title: str = "What was removed") -> Path:
    """The same as a PNG: for each kind a row of bars, one a layer, the removed share hanging from the top."""
    grid = _grid(removals)
    layers = _layers(grid)
    if not layers:
        raise UserMistake("nothing to draw: no layer and no kind was given")
    figure = _figure(title, len(grid), len(layers))
    axes = figure.subplots(len(grid), 1, sharex=True, squeeze=False, gridspec_kw={"hspace": 0.62})[:, 0]
    for panel, (kind, cells) in zip(axes, grid.items(), strict=True):
        _draw_kind(panel, kind, cells, layers)
    _draw_ruler(axes[-1], layers)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.3)
    return Path(path)


Cells = dict[str, Removal]


def _grid(removals: Iterable[Removal]) -> dict[str, Cells]:
    """Kind → layer → removal, in order of appearance; several rows for one cell are added up."""
    grid: dict[str, Cells] = {}
    for new in removals:
        cells = grid.setdefault(new.kind, {})
        old = cells.get(new.layer, Removal(new.layer, new.kind, 0, 0))
        cells[new.layer] = Removal(new.layer, new.kind, old.kept + new.kept, old.total + new.total)
    return grid


def _layers(grid: Mapping[str, Cells]) -> list[str]:
    return list(dict.fromkeys(layer for cells in grid.values() for layer in cells))


def _short(layers: Sequence[str]) -> list[str]:
    """Labels without the dotted prefix that all of them share."""
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    return [".".join(names[shared:]) for names in parts]


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


def _summary(cells: Iterable[Removal]) -> str:
    """“−20%  1,152 of 1,440 kept”."""
    found = list(cells)
    kept, total = sum(cell.kept for cell in found), sum(cell.total for cell in found)
    return f"−{1 - kept / total:.0%}  {kept:,} of {total:,}" if total else ""


def _ruler(layers: Sequence[str]) -> str:
    """The first and the last label under the ends of a strip; side by side where the strip is short."""
    labels = _short(layers)
    gap = len(layers) - len(labels[0]) - len(labels[-1])
    return f"{labels[0]}{' ' * max(gap, 3)}{labels[-1]}" if len(labels) > 1 else labels[0]


def _figure(title: str, kinds: int, layers: int) -> Figure:
    """An empty figure with room for the bars; drawn without a screen."""
    width, height = min(max(7.0, 2.2 + 0.36 * layers), 16.0), 1.5 + 1.25 * kinds
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.3 / width, right=1 - 0.3 / width, top=1 - 1.05 / height, bottom=0.75 / height)
    figure.text(0.3 / width, 1 - 0.38 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    for x, color, label in ((2.05, KEPT, "kept"), (1.05, GONE, "removed")):
        figure.text(1 - x / width, 1 - 0.38 / height, "■", fontsize=11, color=color, va="center")
        figure.text(1 - (x - 0.17) / width, 1 - 0.38 / height, label, fontsize=9.5, color=INK, va="center")
    return figure


def _draw_kind(panel: Any, kind: str, cells: Cells, layers: Sequence[str]) -> None:
    places = [i for i, layer in enumerate(layers) if layer in cells]
    removed = [cells[layers[i]].removed for i in places]
    panel.bar(places, [1 - share for share in removed], width=0.86, color=KEPT)
    panel.bar(places, removed, width=0.86, bottom=[1 - share for share in removed], color=GONE)
    if len(layers) <= WIDE_UNTIL:
        for place, share in zip(places, removed, strict=True):
            _write_share(panel, place, share)
    panel.set_title(kind, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)
    panel.set_title(f"{_summary(cells.values())} kept", loc="right", fontsize=9.5, color=QUIET, pad=5)
    panel.set(xlim=(-0.43, len(layers) - 0.57), ylim=(0, 1), yticks=[])
    panel.tick_params(length=0, labelsize=8.5, labelcolor=QUIET)
    panel.spines[:].set_visible(False)


def _write_share(panel: Any, place: int, share: float) -> None:
    """The removed percentage, in the bar, below where the removed part ends."""
    if share <= 0:
        return
    inside = share < 0.72
    y = 1 - share - 0.05 if inside else 0.95
    panel.text(place, y, f"{share * 100:.0f}", ha="center", va="top", fontsize=7.5, color="white")


def _draw_ruler(panel: Any, layers: Sequence[str]) -> None:
    labels = _short(layers)
    every = -(-len(layers) // MOST_TICKS)
    places = list(range(0, len(layers), every))
    tall = max(len(labels[i]) for i in places) > 4
    panel.set_xticks(places, [labels[i] for i in places], rotation=90 if tall else 0)
    panel.set_xlabel("layer · number in a bar: removed, %" if len(layers) <= WIDE_UNTIL else "layer", color=QUIET, fontsize=9)


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
