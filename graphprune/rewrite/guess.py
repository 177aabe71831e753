"""A module and the sizes that changed in its graph in, the whole numbers it keeps that must change with them out.

The evidence is the graph: a literal size that changed was executed inside some module's forward, so a whole number with the old
value that this module (else one around it) keeps is where it came from; a number that equals a size of the module's own smaller
tensors means that size; so may one that equals the length of an axis that shrank there. Which of them it was is tried (``search``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product

from torch import fx, nn

from graphprune.axes import Axis, Keep
from graphprune.patterns import unnumbered
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import Kind, Path, read, whole_numbers, write
from graphprune.rewrite.graph import new_literals, spoken

NO_SIZES = (
    "padding_idx", "padding", "output_padding", "_reversed_padding_repeated_twice", "dilation", "stride", "kernel_size", "dim",
    "axis", "start_dim", "end_dim", "scale_factor", "upscale_factor", "downscale_factor", "num_layers", "norm_type", "ignore_index",
)  # fmt: skip
"""What torch's own layers keep that is no size of a tensor, whatever it equals."""
STOCK = ("torch.nn.", "transformers.")
"""Whose modules keep their sizes for more than one way to run them."""


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


@contextmanager
def written(module: nn.Module, choice: Choice) -> Iterator[None]:
    """New values of some numbers, and then those there were."""
    before = {place: read(module.get_submodule(place.module), place.path) for place in choice}
    try:
        for place, value in choice.items():
            write(module.get_submodule(place.module), place.path, value)
        yield
    finally:
        for place, value in before.items():
            write(module.get_submodule(place.module), place.path, value)


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
