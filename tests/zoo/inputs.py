"""A model and its family in, small example inputs for `model(**inputs)` out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.shrink import LENGTH

BATCH = 5
ORDINARY_TOKENS = (4, 150)  # below the special ids that a small config puts at the top of its vocabulary


def example_inputs(model: nn.Module, family: str, seed: int) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(seed)
    if family == "image":
        inputs: dict[str, Any] = images(model, draw)
    elif family == "audio":
        inputs = audio(model, takes, draw)
    else:
        inputs = {"input_ids": tokens(draw, LENGTH)}
    if family in ("seq2seq", "audio") and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens(draw, LENGTH - 2)
    return inputs | without_cache(model, takes)


def without_cache(model: nn.Module, takes: Any) -> dict[str, Any]:
    """A cache would be a second output: ask for none, by argument or else by config."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return {"use_cache": False} if "use_cache" in takes else {}


def tokens(draw: torch.Generator, length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randint(*ORDINARY_TOKENS, (batch, length), generator=draw)


def images(model: nn.Module, draw: torch.Generator) -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.randn(BATCH, getattr(config, "num_channels", 3), height, width, generator=draw)}


def audio(model: nn.Module, takes: Any, draw: torch.Generator) -> dict[str, Any]:
    if "input_values" in takes:
        return {"input_values": torch.randn(BATCH, 400, generator=draw)}
    return {"input_features": torch.randn(BATCH, 40, getattr(model.config, "num_mel_bins", 24), generator=draw)}
