"""Tensors of files in, those of a model out: how transformers puts them together, told in boxes, so that nothing need be read.

Some checkpoints hold a matrix for each expert where the model has a stack, projections apart that the model has fused, or fused
ones that it has apart, under names of their own. transformers' own conversions say how, run on tensors that only know where their
parts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from graphprune.disk import Checkpoint, Entry, Stored


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that comes from one source: ``place`` and ``shape`` in the tensor, ``start`` in the source.

    ``dims`` has the source's dimension for each of the tensor's, None for one that numbers sources.
    """

    source: str
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    start: tuple[int, ...]

    @staticmethod
    def of(source: str, shape: Sequence[int]) -> Box:
        """All of a source."""
        return Box(source, (0,) * len(shape), tuple(shape), tuple(range(len(shape))), (0,) * len(shape))

    def within(self, dim: int, first: int, last: int) -> Box | None:
        """What lies between two positions of a dimension, and begins to count there."""
        begin, end = max(first, self.place[dim]), min(last, self.place[dim] + self.shape[dim])
        if begin >= end:
            return None
        start, held = list(self.start), self.dims[dim]
        if held is not None:
            start[held] += begin - self.place[dim]
        place, shape = _with(self.place, dim, begin - first), _with(self.shape, dim, end - begin)
        return replace(self, place=place, shape=shape, start=tuple(start))

    def ranges(self) -> list[slice]:
        """What of the source it is, by the source's dimensions."""
        sizes = {held: size for held, size in zip(self.dims, self.shape, strict=True) if held is not None}
        return [slice(start, start + sizes[dim]) for dim, start in enumerate(self.start)]


@dataclass(frozen=True, slots=True)
class Parts:
    """A tensor that only knows where its parts come from; stacked, joined, cut and turned it knows it still."""

    shape: torch.Size
    boxes: tuple[Box, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def contiguous(self) -> Parts:
        """Itself."""
        return self

    def cut(self, dim: int, first: int, last: int) -> Parts:
        """What lies between two positions of a dimension."""
        boxes = tuple(part for box in self.boxes if (part := box.within(dim, first, last)) is not None)
        return Parts(torch.Size(_with(self.shape, dim, last - first)), boxes)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in OPERATIONS:
            raise NotImplementedError(f"{function} of parts")
        return OPERATIONS[function](*args, **(kwargs or {}))


def _with(values: Sequence[Any], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _stack(tensors: Sequence[Parts], dim: int = 0) -> Parts:
    dim %= tensors[0].ndim + 1

    def more(values: Sequence[Any], new: Any) -> tuple[Any, ...]:
        return (*values[:dim], new, *values[dim:])

    def numbered(box: Box, number: int) -> Box:
        return replace(box, place=more(box.place, number), shape=more(box.shape, 1), dims=more(box.dims, None))

    boxes = tuple(numbered(box, number) for number, tensor in enumerate(tensors) for box in tensor.boxes)
    return Parts(torch.Size(more(tensors[0].shape, len(tensors))), boxes)


def _join(tensors: Sequence[Parts], dim: int = 0) -> Parts:
    dim %= tensors[0].ndim
    boxes: list[Box] = []
    reached = 0
    for tensor in tensors:
        boxes += [replace(box, place=_with(box.place, dim, box.place[dim] + reached)) for box in tensor.boxes]
        reached += tensor.shape[dim]
    return Parts(torch.Size(_with(tensors[0].shape, dim, reached)), tuple(boxes))


def _split(tensor: Parts, sizes: Sequence[int] | int, dim: int = 0) -> tuple[Parts, ...]:
    dim %= tensor.ndim
    if isinstance(sizes, int):
        sizes = [min(sizes, tensor.shape[dim] - first) for first in range(0, tensor.shape[dim], sizes)]
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return tuple(tensor.cut(dim, end - size, end) for size, end in zip(sizes, ends, strict=True))


def _turn(tensor: Parts, dim0: int, dim1: int) -> Parts:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]

    def turned(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[dim] for dim in order)

    boxes = (replace(b, place=turned(b.place), shape=turned(b.shape), dims=turned(b.dims)) for b in tensor.boxes)
    return Parts(torch.Size(turned(tensor.shape)), tuple(boxes))


OPERATIONS: Mapping[Any, Any] = {
    torch.stack: _stack,
    torch.cat: _join,
    torch.split: _split,
    torch.chunk: lambda tensor, chunks, dim=0: _split(tensor, -(-tensor.shape[dim] // chunks), dim),
    torch.transpose: _turn,
}


@dataclass(frozen=True, slots=True)
class Assembled:
    """A place in files of a tensor that is put together from several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    entries: Mapping[str, Entry]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` up to ``last`` of the outermost dimension, read from the files."""
        made = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        for box in self.boxes:
            part = box.within(0, first, last)
            if part is not None:
                made[_spot(part)] = self._read(part)
        return made

    def read(self) -> Tensor:
        """The tensor, read from the files."""
        return self.rows(0, self.shape[0])

    def _read(self, box: Box) -> Tensor:
        outer, *inner = box.ranges()
        found = self.entries[box.source].rows(outer.start, outer.stop)[(slice(None), *inner)]
        return found.permute([dim for dim in box.dims if dim is not None]).reshape(box.shape)

    def write(self, tensor: Tensor) -> None:
        """Put other values in its places in the files."""
        for box in self.boxes:
            entry, held = self.entries[box.source], [dim for dim in box.dims if dim is not None]
            flat = tensor[_spot(box)].reshape([size for size, dim in zip(box.shape, box.dims, strict=True) if dim is not None])
            own = flat.permute([held.index(dim) for dim in range(len(held))])
            if own.shape != entry.shape:
                values = entry.read()
                values[tuple(box.ranges())] = own.to(values.dtype)
                own = values
            entry.write(own)


def _spot(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(box.place, box.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor of a model lies: ``entry`` reads and writes it, ``boxes`` are its parts."""

    entry: Stored
    boxes: tuple[Box, ...]


def layout(model: PreTrainedModel, files: Checkpoint) -> dict[str, Location]:
    """For each tensor of a model that a checkpoint holds, by the model's name, its place in the files.

    The weights of ``model`` may be on the meta device. What is no rectangular part of a file (rows interleaved) is left out.
    """
    found: dict[str, Location] = {}
    for name, parts in _converted(model, files):
        entries = [files.entries[box.source] for box in parts.boxes]
        if parts.boxes == (Box.of(parts.boxes[0].source, entries[0].shape),):
            found[name] = Location(entries[0], parts.boxes)
        elif len({entry.dtype for entry in entries}) == 1:
            found[name] = Location(Assembled(tuple(parts.shape), entries[0].dtype, parts.boxes, files.entries), parts.boxes)
    return found


def _converted(model: PreTrainedModel, files: Checkpoint) -> Iterator[tuple[str, Parts]]:
    """As transformers loads a checkpoint: names are changed, what goes together is gathered, then converted."""
    own = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    gathered: dict[str, WeightConverter] = {}
    for source in sorted(files.entries, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, own)
        if name not in own and source in own:
            name, pattern = source, None
        parts = Parts(torch.Size(files.entries[source].shape), (Box.of(source, files.entries[source].shape),))
        if pattern is None:
            yield name, parts
        elif name in own:
            gathered.setdefault(name, deepcopy(by_pattern[pattern])).add_tensor(name, source, pattern, parts)  # type: ignore[arg-type]
    for name, converter in gathered.items():
        try:
            made = converter.convert(name, model=model, config=model.config)
        except Exception:  # noqa: BLE001  a conversion may do with its tensors whatever tensors can
            continue
        yield from ((target, value[0] if isinstance(value, list) else value) for target, value in made.items())
