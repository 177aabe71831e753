"""Self-written text beside the given one: calibration that covers what the model knows, not only what the corpus is about.

Liu et al., "LLM-QAT" (arXiv 2305.17888) sample training text from the model itself; Williams et al., "Self-calibration for language
model quantization and pruning" (arXiv 2410.17170) calibrate on it. Here the model adds as many sequences as it was given, ``most``
at most, of the same shape, and batches of both kinds take turns, so that ``least_squares`` keeps what carries over from one kind to
the other. It is a pass from Calibration to Calibration: everything after it sees both.
``graphprune.compile(model, method="obs", calibration=c, passes=["self_written", "least_squares"])``
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from graphprune import Calibration
from graphprune.data import mixed
from graphprune.written import written


def self_written(model: nn.Module, calibration: Calibration, *, most: int = 32) -> Calibration:
    """The calibration with the model's own sequences among it. Raises UserMistake for a model that writes no text."""
    given = calibration.batches
    own = written(model, model.config, min(most, sum(map(len, given))), given[0].shape[1], calibration.seed)
    batches = tuple({"input_ids": batch} for batch in islice(torch.split(own, len(given[0])), len(given)))
    return mixed(calibration, Calibration(batches, "self", calibration.seed, written=frozenset(range(len(batches)))))
