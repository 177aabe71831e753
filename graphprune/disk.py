"""A checkpoint directory in, its tensors out one at a time: each is read when it is asked for and forgotten with its last use.

Files are read, not mapped: a mapped page counts as resident memory for as long as the file stays open.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.device import CPU
from graphprune.errors import ModelLimit, UserMistake
from graphprune.ranks import leads, wait

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAP_APART, HAND_BACK = -3, -1
"""``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` in malloc.h."""

READERS = 4
"""Threads that read at the same time at most: each holds a part of a tensor, in a stack of matrices a whole one."""

_apart = [32 << 20]
"""From how many bytes on memory is mapped apart, block within block; the first is where glibc would end by itself."""


class Stored(Protocol):
    """A tensor in files, read and written where it lies."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, first: int, last: int) -> Tensor: ...

    def read(self) -> Tensor: ...

    def write(self, tensor: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: ``start`` counts from the beginning of the file."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` up to ``last`` of the outermost dimension, read from the file."""
        row = self.size // self.shape[0] if self.shape and self.shape[0] else self.size
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        return _read(self.file, self.start + first * row, shape, self.dtype)

    def read(self) -> Tensor:
        """The tensor, read from the file."""
        return _read(self.file, self.start, self.shape, self.dtype)

    def write(self, tensor: Tensor) -> None:
        """Put other values in its place in the file."""
        with self.file.open("r+b", buffering=0) as stream:
            stream.seek(self.start)
            write_all(stream, as_bytes(tensor.to("cpu", self.dtype).contiguous()))


def write_all(stream: BinaryIO | FileIO, data: bytes | memoryview) -> None:
    """Write to the end what one call may write in part."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def _read(file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if not tensor.numel():
        return tensor
    left = as_bytes(tensor)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left:
            count = stream.readinto(left)
            if not count:
                raise cut_short(file)
            left = left[count:]
    return tensor


def cut_short(file: Path) -> UserMistake:
    """What to raise where a file ends before its tensors do."""
    return UserMistake(f"half a checkpoint: {file.name} ends too early", at=str(file.parent), fix="fetch it again")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a directory of safetensors, by name. Nothing is kept: every look-up reads."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = tuple(self.folder / name for name in shards(self.folder))
        self.entries = {name: entry for file in self.files for name, entry in _header(file)}

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def check_fits(model: str | Path) -> None:
    """Raise UserMistake where the weights in a checkpoint directory are larger than the memory that is left."""
    size, free = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), available_memory()
    if free is not None and size > free:
        why = f"its weights take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"
        raise UserMistake(f"{model} does not fit into memory", why=why, fix="--stream holds a few of its tensors at a time")


def available_memory() -> int | None:
    """Bytes that this machine can still give, where it says so."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


@contextmanager
def given_back(size: int) -> Iterator[None]:
    """Meanwhile, memory of so many bytes or more goes back to the system as soon as it is free, and costs more to get; then all
    that is free does. Within another such block the smaller size counts.

    Left alone, glibc keeps what tensors left in its heap, where small objects between them soon make it useless for larger ones.
    """
    _apart.append(min(size, _apart[-1]))
    _map_apart(_apart[-1])
    try:
        yield
    finally:
        _apart.pop()
        _map_apart(_apart[-1])
        hand_back()


def hand_back() -> None:
    """Memory that is free goes back to the system now: glibc keeps what lies between things that are not."""
    _tell("malloc_trim", 0)


def _map_apart(size: int) -> None:
    """Map at least so many bytes apart.

    As much may lie idle at the end of the heap. Left alone glibc raises both; told of one it leaves the other at 128 KiB, and
    each tensor that is freed there goes back to the system only to be asked for anew.
    """
    _tell("mallopt", MAP_APART, size)
    _tell("mallopt", HAND_BACK, size)


def _tell(function: str, *arguments: int) -> None:
    """Call a function of glibc, where that is the C library."""
    found = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    if found is not None:
        found(*arguments)


def shards(folder: Path) -> list[str]:
    """The names of a checkpoint's files. Raises UserMistake where there are none, or its index is damaged."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():  # transformers reads the one file where there are both
        try:
            return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserMistake(f"half a checkpoint: {INDEX} cannot be read", at=str(folder), why=str(error)) from error
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    why = "its weights are pickled, and a pickle can run code" if pickled else "it holds no weights"
    raise UserMistake(f"no safetensors in {folder}", why=why, fix="save_pretrained it as safetensors")


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            end = os.fstat(stream.fileno()).st_size
    except (OSError, ValueError) as error:
        raise UserMistake(f"half a checkpoint: {file.name} cannot be read", at=str(file.parent), why=str(error)) from error
    for name, found in header.items():
        if name == "__metadata__":
            continue
        if found["dtype"] not in DTYPES or 8 + length + found["data_offsets"][1] > end:
            why = f"{name} is of type {found['dtype']}" if found["dtype"] not in DTYPES else f"{name} lies past its end"
            raise UserMistake(f"{file.name} cannot be used", at=str(file.parent), why=why)
        yield name, Entry(file, 8 + length + found["data_offsets"][0], tuple(found["shape"]), DTYPES[found["dtype"]])


class OnDisk(nn.Parameter):
    """A parameter that lives in a file: every operation on it reads it anew, and gets an ordinary tensor on its device; some
    of its rows are read alone.

    It can be given a new value by ``put``; operations that would change it in place raise ModelLimit.
    """

    entry: Stored

    @staticmethod
    def of(entry: Stored, device: torch.device = CPU) -> OnDisk:
        """The parameter for a place in a checkpoint; what is read goes to ``device``."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made = make(OnDisk, entry.shape, dtype=entry.dtype, device=device, requires_grad=False)
        made.entry = entry
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        changed = args[0] if args and function._schema.is_mutable else None
        if isinstance(changed, OnDisk):
            raise ModelLimit("a weight in a file cannot be changed in place", why=str(function), fix="put(parameter, value)")
        if function is torch.ops.aten.slice.Tensor and (args[1:2] or (0,)) == (0,) and len(args) == 4:
            first, last, _ = slice(*args[2:]).indices(len(args[0]))
            return args[0].entry.rows(first, max(first, last)).to(args[0].device)
        args, kwargs = pytree.tree_map_only(OnDisk, lambda own: own.entry.read().to(own.device), (args, kwargs or {}))
        return function(*args, **kwargs)


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """As many as torch computes with, but few, each of which computes alone: for files, which one thread would wait for."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(count, READERS), initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(count)


def rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """``tensor[first:last]`` where nobody asks for gradients: of a file without a detour over torch's dispatch."""
    if not isinstance(tensor, OnDisk):
        return tensor[first:last]
    return tensor.entry.rows(first, min(last, tensor.shape[0])).to(tensor.device)


def put(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value of its own shape, where it lives: in memory or in its file, which one rank writes for all."""
    if isinstance(parameter, OnDisk):
        if leads():
            parameter.entry.write(value)
        wait()
    else:
        parameter.data = value.detach().to(parameter.dtype).contiguous()
