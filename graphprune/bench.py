"""Models in, what they cost to run out: tokens a second, KV-cache bytes a token, parameters, bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.data import decode, inference
from graphprune.errors import ModelLimit, UserMistake

SHORT, LONG = 3, 11
"""Two lengths of text; what the cache grows by between them is what a token costs."""

Task = Callable[[], tuple[float, ...]]
"""Does its work and says how many seconds each phase took."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Repeated measurements of one task: the rate of work a second, and its rate over the first model's, run by run."""

    rates: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median rate."""
        return median(self.rates)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the rate."""
        if len(self.rates) < 2:
            return 0.0
        low, _, high = quantiles(self.rates, n=4, method="inclusive")
        return (high - low) / 2

    @property
    def ratio(self) -> float:
        """The median ratio to the first model, each run against its neighbour in time."""
        return median(self.ratios)

    def __str__(self) -> str:
        return f"{self.median:,.1f} ± {self.spread:,.1f}"


@dataclass(frozen=True, slots=True)
class LanguageSpeed:
    """Tokens a second while reading the prompt, and while writing."""

    prefill: Speed
    decode: Speed


def speed(
    models: Mapping[str, nn.Module],
    *,
    prompt: int | Tensor = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, LanguageSpeed]:
    """Time language models on one prompt: token ids (rows, n), or a number of random ones. Greedy, with a KV cache."""
    ids = prompt if isinstance(prompt, Tensor) else _random_prompt(models.values(), prompt, seed)
    if ids.dim() != 2 or ids.numel() == 0 or new_tokens < 1:
        raise UserMistake(f"no prompt of shape {tuple(ids.shape)} and {new_tokens} tokens to time", fix="ids (rows, n ≥ 1)")
    seconds = race({name: partial(_reading_and_writing, model, ids, new_tokens) for name, model in models.items()}, repeats)
    reading, writing = _speeds(seconds, 0, ids.numel()), _speeds(seconds, 1, ids.shape[0] * new_tokens)
    return {name: LanguageSpeed(reading[name], writing[name]) for name in models}


def throughput(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, repeats: int = 5) -> dict[str, Speed]:
    """Rows a second of any models on the same inputs."""
    rows = next(iter(inputs.values())).shape[0]
    seconds = race({name: partial(_forward, model, inputs) for name, model in models.items()}, repeats)
    return _speeds(seconds, 0, rows)


def race(tasks: Mapping[str, Task], repeats: int) -> dict[str, list[tuple[float, ...]]]:
    """The seconds of each task's phases, ``repeats`` times, interleaved (A B A B) after a round that does not count.

    Taking turns makes a slow moment of the machine hit all alike.
    """
    if repeats < 1:
        raise UserMistake(f"repeats is {repeats}", fix="measure at least once")
    rounds = [{name: task() for name, task in tasks.items()} for _ in range(repeats + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in tasks}


def kv_cache_bytes_per_token(model: nn.Module) -> int:
    """What one more token of one sequence adds to the cache, measured on two short texts; 0 where there is no cache."""
    return (_cache_bytes(model, LONG) - _cache_bytes(model, SHORT)) // (LONG - SHORT)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns; a tied tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def disk_bytes(path: str | Path) -> int:
    """The size of a file, or of every file under a directory."""
    place = Path(path)
    if not place.exists():
        raise UserMistake(f"no such file or directory: {place}")
    return sum(file.stat().st_size for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())


def _speeds(seconds: Mapping[str, list[tuple[float, ...]]], phase: int, work: int) -> dict[str, Speed]:
    """Rates of one phase, and their ratios to the first model's in the same round."""
    rates = {name: [work / run[phase] for run in runs] for name, runs in seconds.items()}
    first = next(iter(rates.values()), [])
    return {name: Speed(tuple(mine), tuple(a / b for a, b in zip(mine, first, strict=True))) for name, mine in rates.items()}


def _reading_and_writing(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read the prompt up to its first answer, and seconds for the ``new_tokens`` after that one."""
    device = _device(model)
    ids, stamps = prompt.to(device), [_now(device)]

    def greedy(logits: Tensor) -> Tensor:
        chosen = logits.argmax(-1)
        stamps.append(_now(device))
        return chosen

    decode(model, ids, greedy, new_tokens + 1)
    return stamps[1] - stamps[0], stamps[-1] - stamps[1]


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[float]:
    device = _device(model)
    moved = {name: value.to(device) for name, value in inputs.items()}
    with inference(model):
        start = _now(device)
        model(**moved)
        return (_now(device) - start,)


def _now(device: torch.device) -> float:
    """The time, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _random_prompt(models: Iterable[nn.Module], length: int, seed: int) -> Tensor:
    """One row of ids that every model knows."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(min(_vocabulary(model) for model in models), (1, length), generator=draw)


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ModelLimit(f"{type(model).__name__} names no vocabulary", fix="give the prompt as token ids")
    return size


def _cache_bytes(model: nn.Module, length: int) -> int:
    if "use_cache" not in signature(model.forward).parameters:
        return 0
    with inference(model):
        output = model(torch.zeros((1, length), dtype=torch.long, device=_device(model)), use_cache=True)
    tensors = _tensors_in(getattr(output, "past_key_values", None), set())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a cache holds, whatever its class."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(_tensors_in(item, seen) for item in value.values())
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(_tensors_in(item, seen) for item in value)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value), seen)
