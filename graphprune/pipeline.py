"""Passes and facts in, facts out: the typed runner; and a name or a file in, the pass that it means out.

A pass is a typed function: positional annotations are the facts it needs, the return annotation is the fact it makes or
replaces, keyword-only parameters are its options.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphprune.data import Calibration
from graphprune.disk import hand_back
from graphprune.errors import UserMistake, nearest
from graphprune.factory import import_file
from graphprune.score import Scores
from graphprune.signature import POSITIONAL

LIBRARY = "graphprune.passes"
FILE = re.compile(r"(.*?)\.py(?![^:])(.*)", re.DOTALL)
"""A path that ends in .py, and what follows it after a colon."""

Facts = dict[type, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pass:
    """A typed function with its options bound."""

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__.rstrip("_")

    @property
    def needs(self) -> dict[str, type]:
        """The facts the pass takes, by parameter."""
        hints = get_type_hints(self.function)
        return {name: hints[name] for name, p in inspect.signature(self.function).parameters.items() if p.kind in POSITIONAL}

    @property
    def makes(self) -> type:
        """The fact the pass gives."""
        made: type = get_type_hints(self.function)["return"]
        return made

    @property
    def untold(self) -> list[str]:
        """The options that have neither a value nor a default."""
        options = inspect.signature(self.function).parameters.values()
        needed = [p.name for p in options if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty]
        return [name for name in needed if name not in self.options]

    def __call__(self, facts: Facts) -> Any:
        return self.function(*(facts[need] for need in self.needs.values()), **self.options)


def check(passes: Sequence[Pass], given: Facts) -> None:
    """Reject an order in which some pass lacks a fact, before anything runs. Raises UserMistake."""
    ready = set(given)
    for place, step in enumerate(passes):
        if untold := step.untold:
            raise UserMistake(f"{step.name}() needs its option {untold[0]!r}", fix=f"{step.name}:{untold[0]}=…")
        for need in step.needs.values():
            if need not in ready:
                maker = next((later.name for later in passes[place + 1 :] if later.makes is need), None)
                hint = f"{maker}() makes it, but runs later" if maker else "nothing in this pipeline makes it"
                raise UserMistake(f"{step.name}() needs {need.__name__}; {hint}", fix=_how_to_give(need))
        ready.add(step.makes)


def _how_to_give(need: type) -> str | None:
    return "pass calibration=, or --calibration" if need.__name__ == "Calibration" else None


def run(passes: Sequence[Pass], given: Facts, progress: Progress | None = None) -> Facts:
    """Run passes in order on the facts; returns all facts. Raises UserMistake first when the order cannot work.

    Where there is calibration data each leaves a heap of gradients and activations, most of it free.
    """
    check(passes, given)
    facts = dict(given)
    for step in passes:
        if progress is not None:
            progress(step.name)
        made = step(facts)
        if isinstance(step.makes, type) and not isinstance(made, step.makes):
            raise UserMistake(f"{step.name}() gave a {type(made).__name__}", why=f"it says that it makes {step.makes.__name__}")
        facts[step.makes] = made
        if Calibration in facts:
            hand_back()
    return facts


# ── finding passes ───────────────────────────────────────────────────────────────────────────────────────────────────


def library() -> tuple[str, ...]:
    """The names of the installed passes."""
    package = importlib.import_module(LIBRARY)
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def find_pass(spec: str | Callable[..., Any] | Pass, **options: Any) -> Pass:
    """A pass by library name, by ``file.py`` or ``file.py:function``, or the function itself; ``name:option=value`` sets options.

    Raises UserMistake with the nearest names, or the options there are.
    """
    if isinstance(spec, Pass):
        return _bound(spec.function, {**spec.options, **options})
    if callable(spec):
        return _bound(spec, options)
    if not isinstance(spec, str):
        raise UserMistake(f"a {type(spec).__name__} is no pass", fix="give a name, file.py:function, or a function")
    in_file = FILE.match(spec)
    if in_file:
        name, rest = in_file.groups()
        function, *settings = [part for part in (rest or "").split(":") if part] or [Path(name).name]
        if "=" in function:
            function, settings = Path(name).name, [function, *settings]
        return _bound(_from_file(Path(f"{name}.py"), function), options | _settings(settings))
    name, _, rest = spec.partition(":")
    return _bound(_from_library(name), options | _settings(rest.split(":") if rest else []))


def find_scorer(spec: str | Callable[..., Any] | Pass, **options: Any) -> Pass:
    """The same of a method that scores. Raises UserMistake on a pass that makes something else."""
    found = find_pass(spec, **options)
    if found.makes is not Scores:
        makes = getattr(found.makes, "__name__", found.makes)
        raise UserMistake(f"{found.name} is no method: it makes {makes}, not scores", fix=f"passes=, or --pass {found.name}")
    return found


def _settings(parts: Sequence[str]) -> dict[str, str]:
    for part in parts:
        if "=" not in part:
            raise UserMistake(f"{part!r} is no option", fix="write name:option=value")
    return dict(part.split("=", 1) for part in parts)


def _from_library(name: str) -> Callable[..., Any]:
    if name not in library():
        raise UserMistake(f"no pass is called {name!r}", fix=nearest(name, library()))
    found: Callable[..., Any] = getattr(importlib.import_module(f"{LIBRARY}.{name}"), name)
    return found


def _from_file(path: Path, function: str) -> Callable[..., Any]:
    module = import_file(path)
    if not callable(getattr(module, function, None)):
        raise UserMistake(f"{path} has no function {function!r}", fix=nearest(function, [n for n in vars(module) if n[0] != "_"]))
    found: Callable[..., Any] = getattr(module, function)
    return found


def _bound(function: Callable[..., Any], options: Mapping[str, Any]) -> Pass:
    hints, own = _hints(function), function.__name__
    parameters = inspect.signature(function).parameters.items()
    known = {option for option, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    untold = [need for need, p in parameters if p.kind in POSITIONAL and need not in hints]
    if "return" not in hints or untold:
        why = f"it does not say of what type {untold[0]} is" if untold else "it does not say what it makes"
        raise UserMistake(f"{own} is no pass", why=why, fix="annotate it: def mine(model: nn.Module, groups: Groups) -> Scores")
    for name in options:
        if name not in known:
            raise UserMistake(f"{own} has no option {name!r}", fix=nearest(name, known))
    wanted = {option: hints.get(option, str if p.default is None else type(p.default)) for option, p in parameters}
    return Pass(function, {name: _converted(value, wanted[name], name) for name, value in options.items()})


TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
READ: Mapping[Any, Callable[[str], Any]] = {
    int: int, float: float, bool: lambda text: TRUTHS[text.lower()], NoneType: {"none": None}.__getitem__,
}  # fmt: skip
"""How text is read, by the type that an option has."""


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError as error:
        raise UserMistake(f"{function.__name__} names an unknown type", why=str(error), fix="import it in the same file") from error
    except TypeError as error:
        raise UserMistake(f"a {type(function).__name__} is no pass", fix="give a function, with its types") from error


def _converted(value: Any, wanted: Any, name: str) -> Any:
    """An option given as text, as what the signature says."""
    kinds = get_args(wanted) if get_origin(wanted) in (UnionType, Union) else (wanted,)
    if not isinstance(value, str) or str in kinds:
        return value
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    readings: list[Callable[[str], Any]] = [READ[kind] for kind in kinds if kind in READ]
    for reading in [*readings, *([{str(choice): choice for choice in choices}.__getitem__] if choices else [])]:
        with suppress(ValueError, KeyError):
            return reading(value)
    expected = ", ".join(map(str, choices)) or " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    fix = None if readings or choices else "text says numbers, words, yes and no; give it from Python"
    raise UserMistake(f"option {name} cannot be {value!r}, it is {expected}", fix=fix)
