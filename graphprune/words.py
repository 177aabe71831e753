"""Options of a command line in, what they ask for out: types, devices, shares, data, the harness; or a UserMistake."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from graphprune.data import Calibration, calibrate
from graphprune.errors import UserMistake, first_line, nearest
from graphprune.source import Source


def enable_checkpointing(source: Source) -> None:
    """Have a model compute activations twice instead of keeping them."""
    enable = getattr(source.model, "activation_checkpointing_enable", None) or getattr(
        source.model, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise UserMistake(f"{type(source.model).__name__} knows no checkpointing", fix="leave out --checkpointing")
    enable()


def dtype_of(name: str | None) -> torch.dtype | None:
    """A floating-point type by torch's name for it."""
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise UserMistake(f"no dtype {name!r}", fix=nearest(name, known))
    return known[name]


def device_of(name: str) -> torch.device:
    """A device by torch's name for it, where there is one that holds values."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserMistake(f"no device {name!r} here", why=first_line(error), fix="--device cpu") from error
    if device.type == "meta":
        raise UserMistake("the device meta holds no values", fix="--device cpu")
    return device


def harness() -> Any:
    """The room that needs the extra; a model is opened only when it is there."""
    try:
        return importlib.import_module("graphprune.tasks")
    except ImportError as error:
        why = f"no module {error.name}"
        raise UserMistake("lm-eval is not installed", why=why, fix="pip install 'graphprune[tasks]'") from error


def shares_of(targets: Sequence[str]) -> dict[str, float]:
    """``latency=0.7`` as a name and a number."""
    found = {}
    for target in targets:
        name, _, share = target.partition("=")
        if name in found:
            raise UserMistake(f"two targets of {name}", fix="give one")
        try:
            found[name] = float(share)
        except ValueError:
            raise UserMistake(f"{target!r} is no target", fix="write latency=0.7") from None
    return found


def listed(text: str | None) -> list[str] | None:
    """What stands between commas."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def calibration_for(
    steps: Sequence[Any], source: Source, spec: str | None, samples: int, length: int, batch: int, seed: int, show: Any
) -> Calibration | None:
    """Calibration data where it is asked for or some pass needs it; a data-free method needs no tokenizer and no text."""
    if spec is None and not any(Calibration in step.needs.values() for step in steps):
        return None
    show("calibration text")
    return calibrate(spec or "self", source, samples=samples, length=length, batch=batch, seed=seed)
