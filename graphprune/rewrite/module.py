"""A model, its axes and what each factor keeps in, a copy of the model with smaller tensors and fitting attributes out.

Plain ``nn`` layers say their sizes in known attributes. For every other module the evidence is the graph: a literal size that
changed was executed inside some module's forward, so an integer attribute of that module with the old value is where it came
from. Nothing is taken on trust: ``accept`` runs each guess against the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from torch import fx, nn

from graphprune.axes import Axis, Keep
from graphprune.errors import ModelLimit
from graphprune.propagate import Axes, source_line
from graphprune.rewrite.graph import cut, new_literals

Attributes = dict[str, dict[str, Any]]
"""New values of plain attributes, by module name."""

TRIALS = 64
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
    nn.PReLU: {"num_parameters": lambda m: m.weight.shape[0]},
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """A literal size that changed inside a module's forward, and the attributes that may have held it."""

    node: fx.Node
    before: Any
    after: Any
    places: tuple[tuple[str, str], ...]


def copy_cut(model: nn.Module, axes: Axes, keep: Keep) -> nn.Module:
    """A deep copy of ``model`` whose tensors are cut on the way: ties stay ties, the original is untouched."""
    memo: dict[int, Any] = {}
    known = {alias: traced.name for traced in axes.trace.tensors.values() for alias in traced.names}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in known:
            smaller = cut(tensor.detach(), axes.tensors[known[name]], keep)
            smaller = smaller.clone() if smaller.data_ptr() == tensor.data_ptr() else smaller
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(smaller, requires_grad=tensor.requires_grad) if is_parameter else smaller
    return deepcopy(model, memo)


def emit_module(model: nn.Module, axes: Axes, keep: Keep, accept: Callable[[nn.Module], bool]) -> tuple[nn.Module, Attributes]:
    """The smaller model of the original classes, and every attribute that had to change.

    Raises ModelLimit, naming the model's line that stands in the way, when no choice of attributes makes it compute what the
    reference does.
    """
    smaller = copy_cut(model, axes, keep)
    evidence = list(_evidence(smaller, axes, keep))
    for choice in _choices(evidence):
        changed = _apply(smaller, choice)
        _fit_layers(smaller)
        if accept(smaller):
            return smaller, _attributes(model, smaller)
        _undo(smaller, changed)
    raise _hidden(model, evidence, axes, keep)


def _attributes(model: nn.Module, smaller: nn.Module) -> Attributes:
    """Plain attributes in which the two differ."""
    return {
        name: changed
        for (name, old), (_, new) in zip(model.named_modules(), smaller.named_modules(), strict=True)
        if (changed := {k: v for k, v in vars(new).items() if _is_plain(v) and vars(old).get(k) != v})
    }


def adopt(smaller: nn.Module, like: nn.Module) -> None:
    """Give every module the plain attributes that the constructor of ``like``, the same architecture, gives it."""
    for (_, mine), (_, theirs) in zip(smaller.named_modules(), like.named_modules(), strict=True):
        for name, value in vars(theirs).items():
            if _is_plain(value) and name != "training" and vars(mine).get(name) != value:
                setattr(mine, name, value)
        if hasattr(mine, "config") and hasattr(theirs, "config"):
            mine.config = theirs.config


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


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


def _evidence(model: nn.Module, axes: Axes, keep: Keep) -> Iterator[Evidence]:
    """Where each changed literal may have come from: the innermost module on its stack with an attribute of the old value."""
    for node in axes.literals:
        for before, after in new_literals(axes, node, keep):
            places = next((found for name in _stack(node) if (found := _holding(model, name, before))), ())
            yield Evidence(node, before, after, tuple((name, attribute) for name, attribute in places))


def _stack(node: fx.Node) -> list[str]:
    """The modules whose forward was running, innermost first."""
    return [name for name, _ in reversed((node.meta.get("nn_module_stack") or {}).values())]


def _holding(model: nn.Module, name: str, value: Any) -> list[tuple[str, str]]:
    try:
        attributes = vars(model.get_submodule(name))
    except AttributeError:
        return []
    return [(name, key) for key, held in attributes.items() if key != "training" and _holds(held, value)]


def _holds(held: Any, value: Any) -> bool:
    if isinstance(held, tuple | list):
        return any(_holds(part, value) for part in held)
    return isinstance(held, int) and not isinstance(held, bool) and held == value


def _choices(evidence: Sequence[Evidence]) -> Iterator[dict[tuple[str, str], tuple[Any, Any]]]:
    """Assignments of attributes: everything that may have changed first, then without some of it, the fewest first.

    Equal modules of equal layers are decided alike.
    """
    change = {place: (item.before, item.after) for item in evidence for place in item.places}
    keys = sorted({_kind_of_place(place) for place in change})
    dropped = (drop for count in range(len(keys) + 1) for drop in combinations(keys, count))
    for drop in islice(dropped, TRIALS):
        yield {place: new for place, new in change.items() if _kind_of_place(place) not in drop}


def _kind_of_place(place: tuple[str, str]) -> tuple[str, str]:
    return re.sub(r"\d+", "#", place[0]), place[1]


def _apply(model: nn.Module, choice: Mapping[tuple[str, str], tuple[Any, Any]]) -> list[tuple[nn.Module, str, Any]]:
    changed = []
    for (name, attribute), (before, after) in choice.items():
        module = model.get_submodule(name)
        held = getattr(module, attribute)
        changed.append((module, attribute, held))
        setattr(module, attribute, _exchanged(held, before, after))
    return changed


def _undo(model: nn.Module, changed: Sequence[tuple[nn.Module, str, Any]]) -> None:
    for module, attribute, held in changed:
        setattr(module, attribute, held)


def _exchanged(held: Any, before: Any, after: Any) -> Any:
    if isinstance(held, tuple | list):
        return type(held)(_exchanged(part, before, after) for part in held)
    return after if held == before and not isinstance(held, bool) else held


def _hidden(model: nn.Module, evidence: Sequence[Evidence], axes: Axes, keep: Keep) -> ModelLimit:
    """The line that stands in the way: one whose size no attribute holds, or two that want different values of one attribute."""
    lost = next((item for item in evidence if not item.places), None)
    wanted: dict[tuple[str, str], Evidence] = {}
    clash = next((i for i in evidence for place in i.places if wanted.setdefault(place, i).after != i.after), None)
    if lost is not None:
        where, why = source_line(lost.node), f"{lost.before} must become {lost.after} there, and no attribute holds it"
    elif clash is not None:
        other = next(wanted[place] for place in clash.places if wanted[place].after != clash.after)
        where = source_line(clash.node)
        why = f"{clash.places[0][1]} would have to be {clash.after} there and {other.after} at {source_line(other.node)}"
    else:
        where, why = _first_cut(axes, keep), "its code computes a size that follows from no attribute"
    fix = 'emit="graph", or keep these kinds whole'
    return ModelLimit(f"{type(model).__name__} hides a size in its code", at=where, why=why, fix=fix)


def _first_cut(axes: Axes, keep: Keep) -> str:
    for node, value in axes.nodes.items():
        if node.op == "call_function" and any(isinstance(a, Axis) and a.shrinks(keep) for a in value or ()):
            return source_line(node)
    return type(axes.trace).__name__
