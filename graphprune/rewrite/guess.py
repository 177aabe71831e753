"""A module and the sizes that changed in its graph in, the whole numbers it keeps that must change with them out.

The evidence is the graph: a literal size that changed was executed inside some module's forward, so a whole number with the old
value that this module (else one around it) keeps is where it came from; a number that equals a size of the module's own smaller
tensors means that size; so may one that equals the length of an axis that shrank there. Which of them it was is tried. A run that
fails says where: the next guess is about a number of the modules that were running, the innermost first, and of two guesses the
one whose run gets further is built upon.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from itertools import chain, count, product
from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphprune.axes import Axis, Keep
from graphprune.patterns import unnumbered
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import Path, whole_numbers
from graphprune.rewrite.graph import new_literals, spoken

TRIALS = 64
"""Guesses that are tried; most fail on the first shape that does not fit."""
STUCK = 16
"""Guesses in a row that get no further before the search ends."""

NO_SIZES = (
    "padding_idx", "padding", "output_padding", "_reversed_padding_repeated_twice", "dilation", "stride", "kernel_size", "dim",
    "axis", "start_dim", "end_dim", "scale_factor", "upscale_factor", "downscale_factor", "num_layers", "norm_type", "ignore_index",
)  # fmt: skip
"""What torch's own layers keep that is no size of a tensor, whatever it equals."""
STOCK = ("torch.nn.", "transformers.")
"""Whose modules keep their sizes for more than one way to run them."""

Kind = tuple[str, Path]


@dataclass(frozen=True, slots=True)
class HeldNumber:
    """A whole number that a module keeps; ``mark`` is the same for two ways to one place (a configuration that modules share).

    One that a layer of torch's own or of transformers keeps is ``stock``: printed, or read by others, or by another way to run it.
    """

    module: str
    path: Path
    mark: int
    stock: bool = False

    @property
    def kind(self) -> Kind:
        """Equal modules of equal layers are decided alike."""
        return unnumbered(self.module), self.path

    def __str__(self) -> str:
        return ".".join(map(str, (self.module, *self.path))).lstrip(".")


Choice = dict[HeldNumber, int]
"""New values of some places."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A size that changed inside some module's forward, and the places it may have come from, module by module."""

    node: fx.Node
    before: int
    after: int
    rows: tuple[tuple[HeldNumber, ...], ...]
    module: str

    @property
    def places(self) -> tuple[HeldNumber, ...]:
        """All of them, the innermost first."""
        return tuple(place for row in self.rows for place in row)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: how many operations it got through, and where it failed, if it did."""

    steps: int
    error: Exception | None = None
    running: tuple[str, ...] = ()


def evidence(model: nn.Module, changes: Iterable[tuple[fx.Node, int, int]]) -> list[Evidence]:
    """Where each changed size may have come from: the modules on its stack that keep the old value."""
    kept = cache(lambda name: _kept(model, name))
    first: dict[int, HeldNumber] = {}
    found = []
    for node, before, after in changes:
        stack = _stack(node)
        rows = [[first.setdefault(place.mark, place) for place in kept(name).get(before, ())] for name in stack]
        found.append(Evidence(node, before, after, tuple(tuple(dict.fromkeys(row)) for row in rows if row), (stack or [""])[0]))
    return found


def own_sizes(model: nn.Module, axes: Axes, keep: Keep) -> Iterator[Evidence]:
    """Whole numbers that equal a size of a module's own tensors, where all of that size become one other size."""
    sizes: dict[tuple[str, int], set[int]] = defaultdict(set)
    origin: dict[str, fx.Node] = {}
    for node in axes.trace.graph.nodes:
        tensor = axes.trace.tensors.get(node.name)
        if node.op == "placeholder" and tensor is not None:
            for axis, name in product(axes.tensors[tensor.name], tensor.names):
                module = name.rpartition(".")[0]
                origin[module] = node
                sizes[module, axis.size].add(axis.resized(keep))
    for (module, before), afters in sizes.items():
        places = tuple(_kept(model, module).get(before, ())) if afters != {before} and len(afters) == 1 else ()
        if places:
            yield Evidence(origin[module], before, max(afters), (places,), module)


def literals(axes: Axes, keep: Keep) -> Iterator[tuple[fx.Node, int, int]]:
    """Each literal size that changes."""
    for node in axes.literals:
        yield from ((node, before, after) for before, after in new_literals(axes, node, keep) if before != after)


def lengths(axes: Axes, keep: Keep) -> Iterator[tuple[fx.Node, int, int]]:
    """Each length of an activation that changes."""
    for node, value in axes.nodes.items():
        for axis in value or () if node.op == "call_function" else ():
            if isinstance(axis, Axis) and axis.shrinks(keep):
                yield node, axis.size, axis.resized(keep)


def coincidences(model: nn.Module, axes: Axes) -> set[Kind]:
    """Kinds of numbers that no size can be the reason for: somewhere one of them is no size of its module, the ninth layer's
    number being nine or not.
    """
    sizes = _sizes(axes)
    return {
        (unnumbered(name), path)
        for name, module in model.named_modules()
        if name in sizes
        for path, value, _ in whole_numbers(module)
        if value not in sizes[name]
    }


def _sizes(axes: Axes) -> dict[str, set[int]]:
    """For each module whose forward says sizes, these and those of its own tensors, before the cut."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in axes.literals:
        said = set(spoken(axes, node))
        for name in _stack(node):
            found[name] |= said
    for tensor in axes.trace.tensors.values():
        for name in tensor.names:
            if (module := name.rpartition(".")[0]) in found:
                found[module] |= {axis.size for axis in axes.tensors[tensor.name]}
    return found


def _stack(node: fx.Node) -> list[str]:
    """The modules whose forward was running, innermost first."""
    return [name for name, _ in reversed((node.meta.get("nn_module_stack") or {}).values())]


def _kept(model: nn.Module, name: str) -> dict[int, list[HeldNumber]]:
    """The places of a module by what they hold."""
    found: dict[int, list[HeldNumber]] = defaultdict(list)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return found
    stock = _is_stock(module)
    for path, value, mark in whole_numbers(module):
        if not stock or path[0] not in NO_SIZES:
            found[value].append(HeldNumber(name, path, mark, stock))
    return found


def _is_stock(module: nn.Module) -> bool:
    """Whether a module is a layer of torch's own, or one that transformers adds, or made of one; what only holds others is not."""
    bases = (base.__module__ for base in type(module).__mro__ if base is not nn.Module)
    return any(base.startswith(STOCK) and base != nn.Sequential.__module__ for base in bases)


# ── the search ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Options:
    """For each kind of place, the values that its places may take: what the evidence says first, then what else it says."""

    def __init__(self, found: Sequence[Evidence], less: Sequence[Evidence], doubted: Collection[Kind]) -> None:
        values: dict[HeldNumber, dict[int, None]] = defaultdict(dict)
        for item in [*found, *less]:
            for place in item.places:
                values[place][item.after] = None
        self.kinds: dict[Kind, list[tuple[HeldNumber, tuple[int, ...]]]] = defaultdict(list)
        for place, afters in values.items():
            self.kinds[place.kind].append((place, tuple(afters)))
        likely = (place.kind for item in found for row in item.rows[:1] for place in row)
        self.likely = {kind: 0 for kind in likely if kind not in doubted}
        stock = (place for item in found for place in item.places if place.stock)
        self.sure = {place.kind for place in stock}.difference(doubted)

    def choice(self, picked: Mapping[Kind, int]) -> Choice:
        """The values of a guess: of each picked kind, the alternative of that number."""
        return {
            place: afters[min(number, len(afters) - 1)] for kind, number in picked.items() for place, afters in self.kinds[kind]
        }

    def next(self, picked: Mapping[Kind, int], running: Sequence[str]) -> Iterator[dict[Kind, int] | None]:
        """Guesses that differ in one kind: those of each module that was running, then the others; nothing between two modules."""
        near = list(dict.fromkeys(map(unnumbered, running)))
        rows: dict[str, list[Kind]] = defaultdict(list)
        for kind in self.kinds:
            rows[kind[0]].append(kind)
        for row in [*(rows.pop(name, ()) for name in near), chain.from_iterable(rows.values())]:
            yield from (guess for kind in row for guess in self._other(picked, kind))
            yield None

    def _other(self, picked: Mapping[Kind, int], kind: Kind) -> Iterator[dict[Kind, int]]:
        others = {other: number for other, number in picked.items() if other != kind}
        if kind in picked:
            yield others
        for number in range(max(len(afters) for _, afters in self.kinds[kind])):
            if number != picked.get(kind):
                yield others | {kind: number}


def search(options: Options, attempt: Callable[[Choice], Outcome | None]) -> tuple[Choice | None, Outcome]:
    """The first choice whose attempt gives no outcome to complain of, else the outcome of the one that got furthest."""
    order = count()
    seen: set[frozenset[tuple[Kind, int]]] = set()
    here, best, since = Outcome(-1), Outcome(-1), 0
    guesses: Iterator[dict[Kind, int] | None] = iter([options.likely])
    ends = [(-here.steps, next(order), here, guesses)]
    while ends:
        _, _, here, guesses = heappop(ends)
        for picked in guesses:
            if picked is None and ends and -ends[0][0] > here.steps:
                heappush(ends, (-here.steps, next(order), here, guesses))
                break
            if picked is None or (key := frozenset(picked.items())) in seen:
                continue
            seen.add(key)
            outcome = attempt(options.choice(picked))
            if outcome is None:
                return options.choice(_needed(options, picked, attempt)), best
            best, since = (outcome, 0) if outcome.steps > best.steps else (best, since + 1)
            if since == STUCK or len(seen) == TRIALS:
                return None, best
            heappush(ends, (-outcome.steps, next(order), outcome, options.next(picked, outcome.running)))
    return None, best


def _needed(options: Options, picked: dict[Kind, int], attempt: Callable[[Choice], Outcome | None]) -> dict[Kind, int]:
    """A guess that came true, without the numbers that need not change, which may be no sizes; the ``sure`` ones stay."""
    doubtful = [[kind for kind in picked if kind not in options.sure]]
    while doubtful:
        drop = doubtful.pop()
        others = {kind: number for kind, number in picked.items() if kind not in drop}
        if drop and attempt(options.choice(others)) is None:
            picked = others
        elif len(drop) > 1:
            doubtful += [drop[: len(drop) // 2], drop[len(drop) // 2 :]]
    return picked


class Steps(TorchFunctionMode):
    """Counts the operations that a run gets through."""

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself, counted once it is done."""
        result = func(*args, **kwargs or {})
        self.count += 1
        return result


def attempted(model: nn.Module, accept: Callable[[nn.Module], bool]) -> Outcome | None:
    """Run ``accept``: nothing where it is content, else how far it got."""
    steps = Steps()
    try:
        with steps:
            return None if accept(model) else Outcome(steps.count)
    except Exception as error:  # noqa: BLE001  a wrong guess at a size may fail in any way
        return Outcome(steps.count, error, tuple(_running(model, error)))


def _running(model: nn.Module, error: Exception) -> Iterator[str]:
    """The modules at hand where an error was raised, the innermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        yield from (names[id(held)] for held in frame.f_locals.values() if isinstance(held, nn.Module) and id(held) in names)
