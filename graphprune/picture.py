"""What a plan takes in, a picture of it out: a PNG file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from graphprune.errors import UserMistake
from graphprune.removed import Cells, Removal, grid_of, layers_of, short, summary

KEPT, GONE, INK, QUIET = "#3d6b8c", "#e8743b", "#1f2a33", "#7b8794"
WIDE_UNTIL = 32
"""Layers up to which the picture has room for a percentage in each bar."""
MOST_TICKS = 24


def picture(removals: Iterable[Removal], path: str | Path, *, title: str = "What was removed") -> Path:
    """A PNG: for each kind a row of bars, one a layer, the removed share hanging from the top."""
    grid = grid_of(removals)
    layers = layers_of(grid)
    if not layers:
        raise UserMistake("nothing to draw: no layer and no kind was given")
    figure = _figure(title, len(grid), len(layers))
    axes = figure.subplots(len(grid), 1, sharex=True, squeeze=False, gridspec_kw={"hspace": 0.62})[:, 0]
    for panel, (kind, cells) in zip(axes, grid.items(), strict=True):
        _draw_kind(panel, kind, cells, layers)
    _draw_ruler(axes[-1], layers)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.3)
    return Path(path)


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
    panel.set_title(f"{summary(cells.values())} kept", loc="right", fontsize=9.5, color=QUIET, pad=5)
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
    labels = short(layers)
    every = -(-len(layers) // MOST_TICKS)
    places = list(range(0, len(layers), every))
    tall = max(len(labels[i]) for i in places) > 4
    panel.set_xticks(places, [labels[i] for i in places], rotation=90 if tall else 0)
    panel.set_xlabel("layer · number in a bar: removed, %" if len(layers) <= WIDE_UNTIL else "layer", color=QUIET, fontsize=9)
