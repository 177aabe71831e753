"""A block in, the same without what other libraries say about what is only tried, or loaded on a person's behalf."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from transformers import logging as transformers_logging

FAKE_LOG = "torch._subclasses.fake_tensor"
"""Where torch tells of every operation that refuses its operands, before it raises."""


@contextmanager
def loading() -> Iterator[None]:
    """No progress bars and no advice from transformers."""
    noise: Any = transformers_logging
    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


@contextmanager
def building() -> Iterator[None]:
    """Trial builds say nothing."""
    noise: Any = transformers_logging
    level = noise.get_verbosity()
    if level == logging.CRITICAL:
        yield
        return
    noise.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noise.set_verbosity(level)


@contextmanager
def tracing() -> Iterator[None]:
    """No graph so far, and no list of refused operands, before torch raises."""
    logger = logging.getLogger(FAKE_LOG)
    was, logger.disabled = logger.disabled, True
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = was
