"""Models in, what they cost to run out: speed while reading and writing, memory, bytes, and what the ideal would be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import accumulate, chain
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from graphprune.device import beside, finished, where
from graphprune.errors import ModelLimit, UserMistake, first_line
from graphprune.written import check_length, decode, inference

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

    @property
    def best(self) -> float:
        """The fastest rate: whoever else is busy only ever slows down."""
        return max(self.rates)

    def __str__(self) -> str:
        return f"{self.median:,.1f} ± {self.spread:,.1f}"


@dataclass(frozen=True, slots=True)
class LanguageSpeed:
    """Tokens a second while reading the prompt, and while writing."""

    prefill: Speed
    decode: Speed


@dataclass(frozen=True, slots=True)
class Figures:
    """What one model costs beside the first of several.

    ``weights``, ``kv`` (a token) and ``peak`` (weights and the most that one forward holds beside them) are bytes. ``prefill`` is
    the rate of tokens read, of rows for models that are no language models; ``decode`` of tokens written. ``ideal`` is how often
    faster than the first each would be if time followed what it is bound by: multiply-adds when reading, bytes when writing.
    """

    parameters: int
    weights: int
    kv: int
    peak: int
    prefill: Speed
    decode: Speed | None
    ideal: tuple[float, float]

    @property
    def reached(self) -> tuple[float, float]:
        """The shares of the ideal ratio that were measured."""
        return self.prefill.ratio / self.ideal[0], (self.decode.ratio if self.decode else 1.0) / self.ideal[1]


def figures(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor] | None = None,
    *,
    prompt: int | Tensor = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, Figures]:
    """Everything about models that run on one prompt in turns, or, given ``inputs``, on those."""
    timed: dict[str, tuple[Speed, Speed | None]]
    if inputs is None:
        ids = prompt if isinstance(prompt, Tensor) else _random_prompt(models.values(), prompt, 0)
        for name, model in models.items():
            check_length(model, ids.shape[1] + new_tokens, name)
        timed = {
            name: (row.prefill, row.decode)
            for name, row in speed(models, prompt=ids, new_tokens=new_tokens, repeats=repeats).items()
        }
        fed, length = {"input_ids": ids}, ids.shape[1]
    else:
        timed = {name: (row, None) for name, row in throughput(models, inputs, repeats=repeats).items()}
        fed, length = dict(inputs), 0
    work = {name: _flops(model, fed) for name, model in models.items()}
    cached = {name: kv_cache_bytes_per_token(model) if length else 0 for name, model in models.items()}
    read = {name: _bytes_read(model) + length * cached[name] for name, model in models.items()}
    first = next(iter(models))
    return {
        name: Figures(
            parameters(model), weight_bytes(model), cached[name], weight_bytes(model) + _peak(model, fed), *timed[name],
            ideal=(work[first] / max(1, work[name]), read[first] / max(1, read[name])),
        )
        for name, model in models.items()
    }  # fmt: skip


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
    for name, task in tasks.items():
        try:
            task()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            fix = "time models that take the same inputs, or give inputs"
            raise UserMistake(f"{name} does not run on what all are timed on", why=first_line(error), fix=fix) from error
    rounds = [{name: task() for name, task in tasks.items()} for _ in range(repeats)]
    return {name: [each[name] for each in rounds] for name in tasks}


def kv_cache_bytes_per_token(model: nn.Module) -> int:
    """What one more token of one sequence adds to the cache, measured on two short texts; 0 where there is no cache."""
    return (_cache_bytes(model, LONG) - _cache_bytes(model, SHORT)) // (LONG - SHORT)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns; a tied tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """The bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


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
    device = where(model)
    ids, stamps = prompt.to(device), [_now(device)]

    def greedy(logits: Tensor) -> Tensor:
        chosen = logits.argmax(-1)
        stamps.append(_now(device))
        return chosen

    decode(model, ids, greedy, new_tokens + 1)
    return stamps[1] - stamps[0], stamps[-1] - stamps[1]


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[float]:
    device = where(model)
    moved = beside(dict(inputs), device)
    with inference(model):
        start = _now(device)
        model(**moved)
        return (_now(device) - start,)


def _flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward, those of attention included whatever kernel runs it."""
    moved = beside(dict(inputs), where(model))
    with inference(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**moved)
    return int(counter.get_total_flops())


def _bytes_read(model: nn.Module) -> int:
    """The bytes of weights that one more token needs: of a table that is only looked up, next to nothing."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in others or id(p) not in tables)


def _peak(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """The most bytes that one forward holds at once, beside the weights."""
    device = where(model)
    moved = beside(dict(inputs), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with inference(model):
            model(**moved)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr otherwise
    with inference(model), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = model(**moved)
    del output
    events: Any = seen.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(max(accumulate((size for _, size in changes), initial=0)))


def _now(device: torch.device) -> float:
    """The time, once the device has finished what it was given."""
    finished(device)
    return perf_counter()


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
        output = model(torch.zeros((1, length), dtype=torch.long, device=where(model)), use_cache=True)
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
