"""A model, its axes and what each factor keeps in, a copy of the model with smaller tensors and fitting attributes out.

Plain ``nn`` layers say their sizes in known attributes. For every other module the evidence is the graph: a literal size that
changed was executed inside some module's forward, so a whole number with the old value that this module (else one around it)
keeps is where it came from; so may be one that equals the length of an axis that shrank there. Nothing is taken on trust:
``accept`` runs each guess against the reference.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice
from typing import Any

from torch import Tensor, fx, nn

from graphprune.axes import Axis, Keep
from graphprune.errors import HiddenSize, first_line, raised_at
from graphprune.propagate import Axes, source_line
from graphprune.rewrite.attributes import Attributes, Path, attributes_between, is_plain, numbers, read, write
from graphprune.rewrite.graph import new_literals

TRIALS = 32
"""Choices of attributes that are tried for each kind of evidence."""

LAYER_ATTRIBUTES: Mapping[type[nn.Module], Mapping[str, Callable[[Any], Any]]] = {
    nn.Linear: {"in_features": lambda m: m.weight.shape[1], "out_features": lambda m: m.weight.shape[0]},
    nn.Embedding: {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]},
    nn.modules.conv._ConvTransposeNd: {
        "in_channels": lambda m: m.weight.shape[0],
        "out_channels": lambda m: m.weight.shape[1] * m.groups,
    },
    nn.modules.conv._ConvNd: {
        "in_channels": lambda m: m.weight.shape[1] * m.groups,
        "out_channels": lambda m: m.weight.shape[0],
    },
    nn.modules.batchnorm._NormBase: {"num_features": lambda m: _first_size(m)},
    nn.LayerNorm: {"normalized_shape": lambda m: tuple(m.weight.shape) if m.weight is not None else m.normalized_shape},
    nn.RMSNorm: {"normalized_shape": lambda m: tuple(m.weight.shape) if m.weight is not None else m.normalized_shape},
    nn.GroupNorm: {"num_channels": lambda m: m.weight.shape[0] if m.weight is not None else m.num_channels},
    nn.RNNBase: {
        "input_size": lambda m: m.weight_ih_l0.shape[1],
        "hidden_size": lambda m: m.hidden_size if m.proj_size else m.weight_hh_l0.shape[1],
    },
    nn.RNNCellBase: {"input_size": lambda m: m.weight_ih.shape[1], "hidden_size": lambda m: m.weight_hh.shape[1]},
    nn.EmbeddingBag: {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]},
    nn.Bilinear: {
        "in1_features": lambda m: m.weight.shape[1],
        "in2_features": lambda m: m.weight.shape[2],
        "out_features": lambda m: m.weight.shape[0],
    },
    nn.PReLU: {"num_parameters": lambda m: m.weight.shape[0]},
}


@dataclass(frozen=True, slots=True)
class Place:
    """A whole number that a module keeps; ``mark`` is the same for two ways to one place (a configuration that modules share)."""

    module: str
    path: Path
    mark: int

    @property
    def kind(self) -> tuple[str, Path]:
        """Equal modules of equal layers are decided alike."""
        return re.sub(r"\d+", "#", self.module), self.path

    def __str__(self) -> str:
        return ".".join(map(str, (self.module, *self.path))).lstrip(".")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A size that changed inside some module's forward, and the places it may have come from."""

    node: fx.Node
    before: int
    after: int
    places: tuple[Place, ...]


Choice = dict[Place, int]
"""New values of some places."""


def copy_cut(model: nn.Module, axes: Axes, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of ``model`` over the cut ``tensors``: ties stay ties, what was not cut is copied, the original is untouched."""
    memo: dict[int, Any] = {}
    known = {alias: traced.name for traced in axes.trace.tensors.values() for alias in traced.names}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in known:
            smaller = tensors[known[name]].detach()
            smaller = smaller.clone() if smaller.data_ptr() == tensor.data_ptr() else smaller
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(smaller, requires_grad=tensor.requires_grad) if is_parameter else smaller
    return deepcopy(model, memo)


def over(model: nn.Module, smaller: nn.Module) -> nn.Module:
    """A copy of ``model``, whatever became of the attributes of ``smaller``, over the very tensors of ``smaller``."""
    mine = [*model.named_parameters(), *model.named_buffers()]
    theirs = [*smaller.named_parameters(), *smaller.named_buffers()]
    return deepcopy(model, {id(old): new for (_, old), (_, new) in zip(mine, theirs, strict=True)})


def emit_module(
    model: nn.Module, smaller: nn.Module, axes: Axes, keep: Keep, accept: Callable[[nn.Module], bool]
) -> tuple[nn.Module, Attributes]:
    """The smaller model of the original classes, and every attribute that had to change; ``smaller`` has the cut tensors.

    ``accept`` runs a candidate. Raises ModelLimit, naming the model's line that stands in the way, when no choice of attributes
    makes it compute what the reference does.
    """
    literals = list(_literals(axes, keep))
    tried: set[frozenset[tuple[Place, int]]] = set()
    found: list[Evidence] = []
    failures: list[Exception] = []
    for more in (_evidence(smaller, literals, inner=True), _evidence(smaller, literals), _evidence(smaller, _lengths(axes, keep))):
        found += more
        for choice in _choices(found):
            key = frozenset(choice.items())
            if key in tried:
                continue
            tried.add(key)
            emitted = _changed(smaller, choice)
            try:
                if accept(emitted):
                    return emitted, attributes_between(model, emitted)
            except Exception as error:  # noqa: BLE001  a wrong guess at a size may fail in any way
                failures = failures or [error]
    raise _hidden(model, found[: len(literals)], axes, keep, failures)


def _changed(smaller: nn.Module, choice: Choice) -> nn.Module:
    """A copy with new attributes over the same tensors: what a copy or a pickle makes of a module is what must be right."""
    held = {place: read(smaller.get_submodule(place.module), place.path) for place in choice}
    try:
        for place, value in choice.items():
            write(smaller.get_submodule(place.module), place.path, value)
        emitted = deepcopy(smaller, {id(tensor): tensor for tensor in (*smaller.parameters(), *smaller.buffers())})
    finally:
        for place, value in held.items():
            write(smaller.get_submodule(place.module), place.path, value)
    _fit_layers(emitted)
    return emitted


def adopt(smaller: nn.Module, like: nn.Module) -> None:
    """Give every module the plain attributes that the constructor of ``like``, the same architecture, gives it."""
    for (_, mine), (_, theirs) in zip(smaller.named_modules(), like.named_modules(), strict=True):
        for name, value in vars(theirs).items():
            if is_plain(value) and name != "training" and vars(mine).get(name) != value:
                setattr(mine, name, value)
        if hasattr(mine, "config") and hasattr(theirs, "config"):
            mine.config = theirs.config


def _first_size(module: nn.Module) -> int:
    tensors = [*module.parameters(recurse=False), *(b for b in module.buffers(recurse=False) if b.ndim)]
    return tensors[0].shape[0] if tensors else int(module.num_features)  # type: ignore[arg-type]


def _fit_layers(model: nn.Module) -> None:
    for module in model.modules():
        for layer, attributes in LAYER_ATTRIBUTES.items():
            if isinstance(module, layer) and (layer is not nn.modules.conv._ConvNd or not _is_transposed(module)):
                for name, size in attributes.items():
                    setattr(module, name, size(module))


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _literals(axes: Axes, keep: Keep) -> Iterator[tuple[fx.Node, int, int]]:
    """Each literal size that changes."""
    for node in axes.literals:
        yield from ((node, before, after) for before, after in new_literals(axes, node, keep) if before != after)


def _lengths(axes: Axes, keep: Keep) -> Iterator[tuple[fx.Node, int, int]]:
    """Each length of an activation that changes."""
    for node, value in axes.nodes.items():
        for axis in value or () if node.op == "call_function" else ():
            if isinstance(axis, Axis) and axis.shrinks(keep):
                yield node, axis.size, axis.resized(keep)


def _evidence(model: nn.Module, changes: Iterable[tuple[fx.Node, int, int]], inner: bool = False) -> list[Evidence]:
    """Where each changed size may have come from: the modules on its stack, or the innermost of them, that keep the old value."""
    kept = cache(lambda name: _kept(model, name))
    first: dict[int, Place] = {}
    found = []
    for node, before, after in changes:
        held = [kept(name).get(before, ()) for name in _stack(node)]
        held = [places for places in held if places]
        places = dict.fromkeys(first.setdefault(place.mark, place) for row in (held[:1] if inner else held) for place in row)
        found.append(Evidence(node, before, after, tuple(places)))
    return found


def _stack(node: fx.Node) -> list[str]:
    """The modules whose forward was running, innermost first."""
    return [name for name, _ in reversed((node.meta.get("nn_module_stack") or {}).values())]


def _kept(model: nn.Module, name: str) -> dict[int, list[Place]]:
    """The places of a module by what they hold."""
    found: dict[int, list[Place]] = defaultdict(list)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return found
    for path, value, mark in numbers(module):
        found[value].append(Place(name, path, mark))
    return found


def _choices(evidence: Sequence[Evidence]) -> Iterator[Choice]:
    """Assignments of places: everything that may have changed first, then without some of it, the fewest first."""
    change: Choice = {}
    for item in evidence:
        for place in item.places:
            change.setdefault(place, item.after)
    kinds = sorted({place.kind for place in change}, key=str)
    dropped = (drop for count in range(len(kinds) + 1) for drop in combinations(kinds, count))
    for drop in islice(dropped, TRIALS):
        yield {place: value for place, value in change.items() if place.kind not in drop}


def _hidden(model: nn.Module, evidence: Sequence[Evidence], axes: Axes, keep: Keep, failures: Sequence[Exception]) -> HiddenSize:
    """The line that stands in the way: where two want different values of one attribute, or where the best guess fails."""
    wanted: dict[Place, Evidence] = {}
    clash = next((i for i in evidence for place in i.places if wanted.setdefault(place, i).after != i.after), None)
    if clash is not None:
        place = next(place for place in clash.places if wanted[place].after != clash.after)
        where, other = source_line(clash.node), wanted[place]
        why = f"{place} would have to be {clash.after} there and {other.after} at {source_line(other.node)}"
    elif failures:
        where = raised_at(failures[0], _files(model)) or _first_cut(axes, keep)
        line = where.partition("  ")[0]
        lost = next((item for item in evidence if not item.places and source_line(item.node).startswith(f"{line} ")), None)
        why = f"{type(failures[0]).__name__}: {first_line(failures[0])}"
        if lost is not None:
            why = f"{lost.before} must become {lost.after} there, and no attribute holds it"
    else:
        where, why = _first_cut(axes, keep), "it runs, but its code computes a value from a size (a scale, an average)"
    fix = 'emit="graph", or keep these kinds whole'
    return HiddenSize(f"{type(model).__name__} hides a size in its code", at=where, why=why, fix=fix)


def _files(model: nn.Module) -> set[str]:
    """Where the classes of a model are written, torch's own left out."""
    modules = {type(module).__module__ for module in model.modules()}
    return {str(getattr(sys.modules.get(name), "__file__", "")) for name in modules if not name.startswith("torch.")}


def _first_cut(axes: Axes, keep: Keep) -> str:
    for node, value in axes.nodes.items():
        if node.op == "call_function" and any(isinstance(a, Axis) and a.shrinks(keep) for a in value or ()):
            return source_line(node)
    return type(axes.trace).__name__
