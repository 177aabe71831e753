"""What can go wrong. Receives nothing; every room raises one of these three kinds, and only these.

A rule bug is ours, a model limit is the model's, a user mistake is the caller's. Each has a what, where, why and fix.
"""

from __future__ import annotations

import traceback
from collections.abc import Container, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

MOST_CHOICES = 30
"""A longer list of valid choices is cut."""


class GraphpruneError(Exception):
    """The base of all errors: what went wrong, then where (``at``), ``why``, and the ``fix``, a line each."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, at: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.at, self.why, self.fix = what, at, why, fix

    def __str__(self) -> str:
        details = (("at", self.at), ("why", self.why), ("fix", self.fix))
        return "\n".join([self.what, *(_detail(label, text) for label, text in details if text)])


class RuleBug(GraphpruneError):
    """A rule of graphprune broke its own law."""


class ModelLimit(GraphpruneError):
    """The model cannot be handled: not exportable, no such group, a budget out of reach."""


class HiddenSize(ModelLimit):
    """A size stands in the model's code, where no attribute changes it."""


class UserMistake(GraphpruneError):
    """A bad ratio, an unknown method, a path that is not there."""

    exit_code: ClassVar[int] = 2


def nearest(name: str, choices: Iterable[str]) -> str:
    """The valid choices nearest to ``name``, as a hint: “did you mean wanda?”, or a list when none is near."""
    known = sorted(set(choices))
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not known:
        return "there is none to choose from"
    return f"choose one of {', '.join(known[:MOST_CHOICES])}{', …' if len(known) > MOST_CHOICES else ''}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to quote as the reason."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def raised_at(error: BaseException, files: Container[str]) -> str | None:
    """The innermost line, of some files, that another library's error came through: ``model.py:41  q = self.q(x)``."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}  {frames[-1].line}" if frames else None


def raised_inside(error: BaseException, files: Container[str], package: str) -> str | None:
    """The innermost line of a package that was called, at whatever depth, by some files: ``functional.py:5764``."""
    frames = traceback.extract_tb(error.__traceback__)
    last = max((place for place, frame in enumerate(frames) if frame.filename in files), default=len(frames))
    inside = [frame for frame in frames[last + 1 :] if frame.filename.startswith(package)]
    return f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else None


def _detail(label: str, text: str) -> str:
    """One labelled line; further lines of the text are indented under it."""
    indent = "\n" + " " * 7
    return f"  {label:<4} " + indent.join(text.splitlines())
