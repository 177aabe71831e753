"""Where a model's tensors lie in files, axes and what each factor keeps in, what stays of every tensor of the files out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from graphprune.axes import Axis, Keep
from graphprune.errors import ModelLimit
from graphprune.parts import Box, Location
from graphprune.runs import Positions


@dataclass(frozen=True, slots=True)
class Remainder:
    """What stays of a tensor: its new name, None where nothing does, and the positions that stay, by dimension."""

    name: str | None
    kept: tuple[Positions, ...] = ()


def cuts(places: Mapping[str, Location], axes: Mapping[str, tuple[Axis, ...]], keep: Keep) -> dict[str, Remainder]:
    """What stays of those tensors of the files that are part of one which shrinks; both mappings are by the model's names.

    Raises ModelLimit where that is no rectangle.
    """
    smaller = {name for name in places if any(axis.shrinks(keep) for axis in axes.get(name, ()))}
    touched = {box.source for name in smaller for box in places[name].boxes}
    parts: dict[str, list[Remainder]] = defaultdict(list)

    @cache
    def positions(axis: Axis) -> Positions:
        return np.array(axis.kept(keep), dtype=np.int64)

    for name, place in places.items():
        if any(box.source in touched for box in place.boxes):
            kept = [positions(axis) for axis in axes[name]] if name in smaller else [*map(np.arange, place.entry.shape)]
            for source, cut in _left(place.boxes, kept):
                parts[source].append(cut)
    return {source: _together(source, own) for source, own in parts.items()}


def _left(boxes: Sequence[Box], kept: Sequence[Positions]) -> Iterator[tuple[str, Remainder]]:
    """What stays of each part of a tensor: of what is numbered, the first names go to those that stay."""
    names = {box.place: box.source for box in boxes}

    @cache
    def numbers(dim: int) -> dict[int, int]:
        return {position: number for number, position in enumerate(kept[dim].tolist())}

    @cache
    def within(dim: int, first: int, size: int) -> Positions:
        return kept[dim][(kept[dim] >= first) & (kept[dim] < first + size)] - first

    for box in boxes:
        numbered = [dim for dim, held in enumerate(box.dims) if held is None]
        if any(box.place[dim] not in numbers(dim) for dim in numbered):
            yield box.source, Remainder(None)
            continue
        place = tuple(numbers(dim)[at] if dim in numbered else at for dim, at in enumerate(box.place))
        dims = sorted((held, dim) for dim, held in enumerate(box.dims) if held is not None)
        positions = (within(dim, box.place[dim], box.shape[dim]) + start for start, (_, dim) in zip(box.start, dims, strict=True))
        yield box.source, Remainder(names[place], tuple(positions))


def _together(source: str, parts: Sequence[Remainder]) -> Remainder:
    """What stays of a tensor of which parts go to several."""
    left = [part for part in parts if part.name is not None]
    if len(left) < 2:
        return left[0] if left else Remainder(None)
    kept = tuple(np.unique(np.concatenate(own)) for own in zip(*(part.kept for part in left), strict=True))
    if prod(map(len, kept)) != sum(prod(map(len, part.kept)) for part in left):
        why = "it is several tensors of the model, which shrink apart"
        raise ModelLimit(f"{source} cannot be streamed", why=why, fix="compile it in memory")
    return Remainder(left[0].name, kept)
