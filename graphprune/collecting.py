"""A block in, the same block with less to look through for garbage out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For what makes many objects that all stay, as imports do: looking through them for garbage takes a fifth of the time.

    What there is at the end counts as old at once.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        with settled():
            pass
        if collecting:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """What was there before is not searched for garbage: the many objects of a graph call for that, and none of it is theirs."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
