"""A checkpoint directory and what stays of its tensors in, a smaller checkpoint directory out, block by block.

The output has the shards of the input under the same names. What stays in one piece goes from file to file within the system; of
the rest no more than a block of one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EINVAL, ENODEV, ENOSYS, EOPNOTSUPP, EPERM, EXDEV
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np
import torch

from graphprune.disk import INDEX, NAMES, Checkpoint, Entry, cut_short, write_all
from graphprune.plan import PLAN
from graphprune.ranks import leads, told, wait
from graphprune.rewrite.files import Remainder
from graphprune.rewrite.folder import complete_or_nothing
from graphprune.rewrite.record import MODELLING, RECORD
from graphprune.runs import Positions, runs

BLOCK = 1 << 20
"""Bytes read at a time: few enough to stay in a processor's cache, and to be taken from memory that was used before."""

PIECE = 64 << 10
"""Bytes that rows which stay together must have, on average, for the system to copy them from file to file as fast as we do."""

CANNOT = (EINVAL, ENODEV, ENOSYS, EOPNOTSUPP, EPERM, EXDEV)
"""How a system says that it cannot copy between two files by itself, or reserve room for one."""

AT_ONCE = 2
"""Shards that are written side by side: one is picked apart while the other goes to the disk."""

WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their size in bytes."""

REPLACED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""Files that are not copied: weights in any form, and their index."""


OWN = ("config.json", PLAN, RECORD, f"{MODELLING}.py")
"""What a compile writes itself."""


@contextmanager
def shared(out: str | Path) -> Iterator[Path]:
    """``complete_or_nothing`` where several ranks fill one directory: rank 0 makes it and gives it its name when all are done."""
    if not leads():
        yield told(Path(out))
        wait()
        return
    with complete_or_nothing(out) as folder:
        yield told(folder)
        wait()


@dataclass(frozen=True, slots=True)
class ToWrite:
    """A tensor to be written: where it lies, and the positions that stay of each dimension that shrinks."""

    entry: Entry
    kept: Mapping[int, Positions]

    @property
    def shape(self) -> list[int]:
        """What it will have."""
        return [len(self.kept[dim]) if dim in self.kept else size for dim, size in enumerate(self.entry.shape)]


def write_cut(checkpoint: Checkpoint, cuts: Mapping[str, Remainder], folder: Path) -> None:
    """Write every shard with its tensors cut, and the index. ``cuts`` has what is not to be as it is, by name."""
    shards: dict[Path, dict[str, ToWrite]] = defaultdict(dict)
    for name, entry in checkpoint.entries.items():
        cut = cuts.get(name, Remainder(name))
        if cut.name is not None:
            less = {dim: kept for dim, kept in enumerate(cut.kept) if len(kept) < entry.shape[dim]}
            shards[entry.file][cut.name] = ToWrite(entry, less)
    with ThreadPoolExecutor(AT_ONCE) as workers:
        total = sum(workers.map(lambda file: _write_shard(shards[file], folder / file.name), shards))
    weight_map = {name: file.name for file, own in shards.items() for name in own}
    if (checkpoint.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(pieces: Mapping[str, ToWrite], target: Path) -> int:
    """One file: the header first, since every size is known before anything is read."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, piece in pieces.items():
        dtype, shape = piece.entry.dtype, piece.shape
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb", buffering=0) as stream:
        _reserve(stream, 8 + len(text) + place)
        write_all(stream, len(text).to_bytes(8, "little") + text)
        for piece in pieces.values():
            parts = _parts(piece.entry, piece.kept)
            if parts is not None:
                _copy(piece.entry.file, parts, stream)
                continue
            for block in _cut_blocks(piece.entry, piece.kept):
                write_all(stream, block)
    return place


def _reserve(stream: FileIO, size: int) -> None:
    """Ask for room on the disk before anything is written: what follows is faster, and a full disk says so at once."""
    with _if_able():
        os.posix_fallocate(stream.fileno(), 0, size)


@contextmanager
def _if_able() -> Iterator[None]:
    """What a system has no call for, or cannot do between these files, is left undone."""
    try:
        yield
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def _parts(entry: Entry, kept: Mapping[int, Positions]) -> list[tuple[int, int]] | None:
    """Where the surviving bytes of a tensor begin and how many they are, run by run; None where they are in too many places."""
    if not kept or not entry.size:
        return [(entry.start, entry.size)]
    if kept.keys() != {0} or not len(kept[0]):
        return None
    row, found = entry.size // entry.shape[0], runs(kept[0])
    if row * len(kept[0]) < PIECE * len(found):
        return None
    return [(entry.start + row * first, row * count) for first, count in found]


def _copy(file: Path, parts: Iterable[tuple[int, int]], target: FileIO) -> None:
    """Append parts of one file to another."""
    with file.open("rb", buffering=0) as source:
        for start, size in parts:
            done = 0
            while done < size:
                count = _copied(source, start + done, size - done, target)
                if not count:
                    raise cut_short(file)
                done += count


def _copied(source: FileIO, start: int, size: int, target: FileIO) -> int:
    """Append as many bytes as one call copies, and say how many."""
    with _if_able():
        return os.copy_file_range(source.fileno(), target.fileno(), size, start)
    source.seek(start)
    data = source.read(min(size, BLOCK))
    write_all(target, data)
    return len(data)


def _cut_blocks(entry: Entry, kept: Mapping[int, Positions]) -> Iterator[memoryview]:
    """The surviving part of a tensor, some rows at a time; rows that go are not even read where whole blocks of them go.

    numpy picks small numbers three times as fast as torch.
    """
    rows, step = entry.shape[0], max(1, BLOCK * entry.shape[0] // entry.size)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        own = {0: kept[0][(kept[0] >= first) & (kept[0] < last)] - first} if 0 in kept else {}
        if own and not len(own[0]):
            continue
        block = entry.rows(first, last).view(WHOLE[entry.dtype.itemsize]).numpy()
        for dim, index in {**kept, **own}.items():
            block = block.take(index, axis=dim)
        yield block.reshape(-1).view(np.uint8).data


def copy_rest(source: Path, folder: Path) -> None:
    """Tokenizer, processor, generation settings, licence and the like: everything that holds no weights and no config, and is not
    there yet; of directories those that transformers and sentence-transformers keep such things in."""
    for home in [source, *(source / name for name in _settings_in(source) if (source / name).is_dir())]:
        for file in sorted(home.iterdir()):
            target, is_config = folder / file.relative_to(source), home == source and file.name in OWN
            if file.is_file() and not (file.name.endswith(REPLACED) or is_config or file.name.startswith(".") or target.exists()):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _settings_in(source: Path) -> list[str]:
    """Directories of a checkpoint that hold settings: chat templates, and the modules that sentence-transformers lists."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        listed = [str(module["path"]) for module in json.loads((source / "modules.json").read_text())]
        return ["additional_chat_templates", *(path for path in listed if path and Path(path).name == path)]
    return ["additional_chat_templates"]
