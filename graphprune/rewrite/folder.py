"""A name in, a directory to fill out: it appears under the name complete or not at all, whenever the process ends."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from graphprune.errors import ModelLimit, UserMistake


def check_free(out: str | Path) -> Path:
    """``out`` as a path that may be written. Raises UserMistake where something is there already."""
    path = Path(out)
    if path.name in ("", "..") or path.is_symlink():
        raise UserMistake(f"{out!s} cannot be the output", why="it is to appear when it is complete", fix="give a new name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserMistake(f"{path} exists and is not empty", fix="choose another directory, or remove it")
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise UserMistake(f"{path} cannot be written", why=f"{home} is not a directory that you may write to")
    return path


@contextmanager
def complete_or_nothing(out: str | Path) -> Iterator[Path]:
    """A directory to fill. It takes the name ``out`` when the block ends well and vanishes when it does not; what a killed run
    left is removed first."""
    path = check_free(out)
    for left in path.parent.glob(f".{escape(path.name)}.*.part"):
        _remove_if_dead(left)
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        with ExitStack() as held:
            with suppress(OSError):  # where directories cannot be locked, none is taken for dead either
                held.enter_context(_locked(part))
            yield part
            if path.is_dir():
                path.rmdir()
            part.replace(path)
    except OSError as error:
        if not _is_ours(error, part, path):
            raise
        raise ModelLimit(f"{path} could not be written", why=error.strerror or str(error), fix="nothing was left behind") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_ours(error: OSError, part: Path, path: Path) -> bool:
    """Whether an error is of what was to be written, not of a file that was to be read meanwhile."""
    if error.filename is None:
        return True
    named, filled = Path(os.fsdecode(error.filename)).resolve(), part.resolve()
    return named.is_relative_to(filled) or named in (path.resolve(), *filled.parents)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A directory's lock: it stays with it under another name and ends with its process. OSError where it is not to be had."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_if_dead(left: Path) -> None:
    """The lock of a process that lives is held."""
    with suppress(OSError), _locked(left):
        shutil.rmtree(left, ignore_errors=True)
