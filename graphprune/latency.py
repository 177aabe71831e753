"""Axes and sizes in, seconds out: every contraction of the traced graph timed on this machine, at its own and at smaller sizes.

A model's latency is the sum over its contractions. Each is measured with all widths on multiples (eighths of the whole, or
multiples of 16 near them); between those it is interpolated. What was measured once is kept in a table.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import cycle, product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import Axis, Factor, Keep
from graphprune.device import finished
from graphprune.propagate import Axes
from graphprune.ranks import told
from graphprune.rewrite.graph import resized_call

PARTS = 8
"""Into how many steps a width is divided for measuring."""

COLD = 32 << 20
"""Bytes of operands to take turns with: a model's next layer does not find its weights in the processor's cache."""

SHORTEST, MOST, LEAST = 0.02, 200, 4
"""A measurement takes this many seconds, at most so many and at least so many calls."""

Signature = tuple[Any, ...]


class Latency:
    """Seconds of one traced forward once factors have the given sizes; of several ranks, what rank 0 measures."""

    def __init__(self, axes: Axes, table: Table | None = None) -> None:
        self.axes = axes
        self.table = table or Table()
        self.alike: dict[Signature, list[tuple[fx.Node, tuple[Factor, ...]]]] = {}
        for node in dict.fromkeys(use.node for use in axes.uses if use.role == "contracted"):
            if all(_is_typed(axes, operand) for operand in node.all_input_nodes):
                signature, factors = _signature(axes, node)
                self.alike.setdefault(signature, []).append((node, factors))
        self.known: dict[tuple[Signature, tuple[int, ...]], float] = {}

    def __call__(self, sizes: Mapping[Factor, int]) -> float:
        seconds = sum(self._seconds(signature, sizes, row) for signature, rows in self.alike.items() for row in rows)
        self.table.save()
        return told(seconds)

    def _seconds(self, signature: Signature, sizes: Mapping[Factor, int], row: tuple[fx.Node, tuple[Factor, ...]]) -> float:
        """One contraction's seconds, interpolated linearly between the measured sizes around each of its factors'."""
        node, factors = row
        wanted = tuple(sizes.get(factor, factor.size) for factor in factors)
        if (signature, wanted) not in self.known:
            around = [_around(factor.size, size) for factor, size in zip(factors, wanted, strict=True)]
            total = 0.0
            for corner in product(*around):
                share = 1.0
                for _, weight in corner:
                    share *= weight
                keep = {factor: range(size) for factor, (size, _) in zip(factors, corner, strict=True) if size < factor.size}
                total += share * self.table.seconds(*_call(self.axes, node, keep))
            self.known[signature, wanted] = total
        return self.known[signature, wanted]


def _is_typed(axes: Axes, operand: fx.Node) -> bool:
    return all(isinstance(axis, Axis) for axis in axes.nodes.get(operand) or (None,))


def _signature(axes: Axes, node: fx.Node) -> tuple[Signature, tuple[Factor, ...]]:
    """What contractions have in common that take as long at all sizes, and the factors that they depend on, in order."""
    order: dict[Factor, int] = {}
    operands = tuple(tuple(_renamed(axis, order) for axis in axes.nodes[operand]) for operand in node.all_input_nodes)
    dtypes = tuple(str(operand.meta["val"].dtype) for operand in node.all_input_nodes)
    literals = str(fx.map_arg((node.args, node.kwargs), lambda operand: f"%{node.all_input_nodes.index(operand)}"))
    return (str(node.target), operands, dtypes, literals), tuple(order)


def _renamed(axis: Axis, order: dict[Factor, int]) -> Any:
    def named(item: Factor | Axis) -> Any:
        return _renamed(item, order) if isinstance(item, Axis) else (order.setdefault(item, len(order)), item.size)

    return tuple(tuple(map(named, items)) for items in axis.segments)


def _around(size: int, wanted: int) -> list[tuple[int, float]]:
    """The measured sizes next to the wanted one, each with its share."""
    step = max(1, size // PARTS // 16 * 16 or size // PARTS)
    low = max(1, wanted // step * step) if wanted < size else size
    high = min(size, max(low, wanted // step * step + step))
    share = 0.0 if high == low else (wanted - low) / (high - low)
    return [(at, weight) for at, weight in ((low, 1 - share), (high, share)) if weight]


def _call(axes: Axes, node: fx.Node, keep: Keep) -> tuple[str, torch.device, Callable[[], Callable[[], Any]]]:
    """What an operation of the given sizes is known by, where it runs, and how to prepare calls of it."""
    copy = resized_call(axes, node, keep)
    device = node.meta["val"].device if isinstance(node.meta.get("val"), Tensor) else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    shapes = {o.name: tuple(axis.resized(keep) for axis in axes.nodes[o]) for o in node.all_input_nodes}
    dtypes = {o.name: o.meta["val"].dtype for o in node.all_input_nodes}
    args, kwargs = fx.map_arg((copy.args, copy.kwargs), lambda o: f"{dtypes[str(o.target)]}{list(shapes[str(o.target)])}")

    def prepare() -> Callable[[], Any]:
        def one() -> Any:
            made = {name: _operand(shape, dtypes[name], device) for name, shape in shapes.items()}
            return fx.map_arg((copy.args, copy.kwargs), lambda operand: made[str(operand.target)])

        size = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items())
        turns = cycle([one() for _ in range(max(1, min(PARTS, COLD // max(1, size))))])

        def call() -> Any:
            given, named = next(turns)
            return copy.target(*given, **named)  # type: ignore[operator]

        return call

    return f"{copy.target} {args} {kwargs or ''}".strip(), device, prepare


def _operand(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


class Table:
    """Seconds by operation, device, threads and torch version, kept in a file of the user's."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _cache() / "latency.json"
        self.rows: dict[str, dict[str, float]] = _read(self.path)
        self.fresh = False

    def seconds(self, operation: str, device: torch.device, prepare: Callable[[], Callable[[], Any]]) -> float:
        """What is known, else what is measured now."""
        row = self.rows.setdefault(machine(device), {})
        if operation not in row:
            row[operation], self.fresh = stopwatch(prepare(), device), True
        return row[operation]

    def save(self) -> None:
        """Write what is new beside what others may have written meanwhile."""
        if not self.fresh:
            return
        rows = _read(self.path)
        for name, row in self.rows.items():
            rows[name] = rows.get(name, {}) | row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(rows, indent=1, sort_keys=True))
        part.replace(self.path)
        self.rows, self.fresh = rows, False


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphprune"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        rows: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return rows


@cache
def machine(device: torch.device) -> str:
    """What seconds depend on besides the operation."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names: Iterator[str] = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@torch.no_grad()
def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
    """The seconds of the fastest of several calls: whoever else is busy only ever adds."""
    call()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < SHORTEST and len(taken) < MOST):
        finished(device)
        start = perf_counter()
        call()
        finished(device)
        taken.append(perf_counter() - start)
    return min(taken)
