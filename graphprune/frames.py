"""A block that traces in, the same block with shorter stack traces on its nodes out.

torch notes the whole stack behind every operation, which takes a good part of an export's time; what is ever shown of it is
the innermost line that is not torch's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any

import torch
from torch.fx import proxy

TORCH = str(Path(torch.__file__).parent) + os.sep

NOTES = "CapturedTraceback"
"""What torch's tracer takes the stack behind an operation with."""


class Inner:
    """In place of torch's CapturedTraceback: the frames from the innermost ``forward`` that is not torch's inwards.

    Where all are torch's, those from the outermost inwards.
    """

    def __init__(self, frame: FrameType | None) -> None:
        self.frame = frame

    @staticmethod
    def extract(**_: Any) -> Inner:
        """From where it is called."""
        return Inner(sys._getframe(1))

    def summary(self) -> StackSummary:
        """Outermost first; empty where there is no ``forward``: torch makes nothing of such a stack either."""
        frames: list[tuple[str, int, str]] = []
        frame, last = self.frame, 0
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            frames.append((path, frame.f_lineno, name))
            if name == "forward":
                last = len(frames)
                if is_own(path):
                    return _summary(each for each in frames if is_own(each[0]))
            frame = frame.f_back
        return _summary(frames[:last])


def _summary(frames: Iterable[tuple[str, int, str]]) -> StackSummary:
    return StackSummary.from_list([FrameSummary(*frame, lookup_line=False) for frame in frames][::-1])


def is_own(path: str) -> bool:
    """Whether a file is not torch's."""
    return not path.startswith(TORCH)


@contextmanager
def short_stacks() -> Iterator[None]:
    """Nodes made meanwhile get short stack traces, where torch takes them from where it does today."""
    names = vars(proxy)
    whole = names.get(NOTES)
    if whole is not None:
        names[NOTES] = Inner
    try:
        yield
    finally:
        if whole is not None:
            names[NOTES] = whole
