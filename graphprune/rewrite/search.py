"""Evidence in, the numbers that a module keeps and must change out: guessed, tried and built upon.

A run that fails says where: the next guess is about a number of the modules that were running, the innermost first, and of two
guesses the one whose run gets further is built upon.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, count
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from graphprune.patterns import unnumbered
from graphprune.rewrite.attributes import Kind, Learnt
from graphprune.rewrite.guess import Choice, Evidence, HeldNumber

TRIALS = 64
"""Guesses that are tried; most fail on the first shape that does not fit."""
STUCK = 16
"""Guesses in a row that get no further before the search ends."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: how many operations it got through, and where it failed, if it did."""

    steps: int
    error: Exception | None = None
    running: tuple[str, ...] = ()


class Options:
    """For each kind of place, the values that its places may take: what the evidence says first, then what else it says.

    The first guess is what was ``learnt`` from searches before, and of the rest what is likely.
    """

    def __init__(self, found: Sequence[Evidence], less: Sequence[Evidence], doubted: Collection[Kind], learnt: Learnt) -> None:
        values: dict[HeldNumber, dict[int, None]] = defaultdict(dict)
        for item in [*found, *less]:
            for place in item.places:
                values[place][item.after] = None
        self.kinds: dict[Kind, list[tuple[HeldNumber, tuple[int, ...]]]] = defaultdict(list)
        for place, afters in values.items():
            self.kinds[place.kind].append((place, tuple(afters)))
        likely = (place.kind for item in found for row in item.rows[:1] for place in row)
        self.likely = {kind: 0 for kind in likely if kind not in doubted and learnt.unneeded.get(kind) != self._afters(kind)}
        self.likely |= {kind: number for kind in self.kinds if (number := self._known(kind, learnt)) is not None}
        stock = (place for item in found for place in item.places if place.stock)
        self.sure = {place.kind for place in stock}.difference(doubted)

    def _afters(self, kind: Kind) -> list[tuple[int, ...]]:
        return [afters for _, afters in self.kinds[kind]]

    def _known(self, kind: Kind, learnt: Learnt) -> int | None:
        """The alternative that gives all places of a kind the values they had before."""
        known = [
            (learnt.values[place.module, place.path], afters)
            for place, afters in self.kinds[kind]
            if (place.module, place.path) in learnt.values
        ]
        numbers = range(max(map(len, self._afters(kind)))) if known else ()
        return next((n for n in numbers if all(afters[min(n, len(afters) - 1)] == value for value, afters in known)), None)

    def learn(self, picked: Choice, learnt: Learnt) -> None:
        """Remember a choice that came true, and what was likely and is not in it."""
        learnt.values = {(place.module, place.path): value for place, value in picked.items()}
        needed = {place.kind for place in picked}
        learnt.unneeded |= {kind: self._afters(kind) for kind in self.likely if kind not in needed}

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


def search(
    options: Options, attempt: Callable[[Choice], Outcome | None], hopeless: Callable[[Outcome], bool]
) -> tuple[Choice | None, Outcome]:
    """The first choice whose attempt gives no outcome to complain of, else the outcome of the one that got furthest.

    Nothing else is tried where the first guess is ``hopeless``.
    """
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
            if since == STUCK or len(seen) == TRIALS or (len(seen) == 1 and hopeless(outcome)):
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
