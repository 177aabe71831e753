"""A model, its axes and what each factor keeps in, a copy of the model with smaller tensors and fitting attributes out.

Plain ``nn`` layers say their sizes in known attributes. For every other module they are guessed, and nothing is taken on trust:
``accept`` runs each guess against the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.axes import Axis, Keep
from graphprune.copying import duplicate
from graphprune.errors import HiddenSize, first_line, raised_at, raised_inside
from graphprune.meta import source_line
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import Attributes, Learnt, attributes_between, is_plain
from graphprune.rewrite.guess import Choice, Evidence, HeldNumber, coincidences, evidence, lengths, literals, own_sizes, written
from graphprune.rewrite.rehearse import Rehearsal, Shadow
from graphprune.rewrite.search import Options, Outcome, attempted, search

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


def copy_cut(model: nn.Module, axes: Axes, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of ``model`` over the cut ``tensors``, those in plain attributes too: ties stay ties, what was not cut is copied,
    the original is untouched."""
    known = {alias: traced.name for traced in axes.trace.tensors.values() for alias in traced.names}
    owned = [*model.named_parameters(), *model.named_buffers()]
    memo: dict[int, Any] = {}
    for name, tensor in [*axes.trace.constants.items(), *owned]:
        if name in known:
            smaller = tensors[known[name]].detach()
            smaller = smaller.clone() if smaller.data_ptr() == tensor.data_ptr() else smaller
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(smaller, requires_grad=tensor.requires_grad) if is_parameter else smaller
    return duplicate(model, memo)


def over(model: nn.Module, smaller: nn.Module) -> nn.Module:
    """A copy of ``model``, whatever became of the attributes of ``smaller``, over the very tensors of ``smaller``."""
    mine = [*model.named_parameters(), *model.named_buffers()]
    theirs = [*smaller.named_parameters(), *smaller.named_buffers()]
    return duplicate(model, {id(old): new for (_, old), (_, new) in zip(mine, theirs, strict=True)})


def emit_module(
    model: nn.Module,
    smaller: nn.Module,
    axes: Axes,
    keep: Keep,
    accept: Callable[[nn.Module, bool], bool],
    rehearsal: Rehearsal,
    learnt: Learnt,
) -> tuple[nn.Module, Attributes]:
    """The smaller model of the original classes, and every attribute that had to change; ``smaller`` has the cut tensors.

    ``accept`` runs a candidate, and is told whether anything in it was guessed; all but the first are rehearsed. What was
    ``learnt`` from cuts of the same model before is built upon, and added to. Raises HiddenSize, naming the model's line that
    stands in the way, when no choice of attributes makes it compute what the reference does.
    """
    _fit_layers(smaller)
    found = evidence(smaller, literals(axes, keep))
    sizes, less = [*found, *own_sizes(smaller, axes, keep)], evidence(smaller, lengths(axes, keep))
    options = Options(sizes, less, coincidences(smaller, axes), learnt)
    first: list[Outcome] = []
    shadow = Shadow(smaller, rehearsal)

    def attempt(choice: Choice) -> Outcome | None:
        if first and (outcome := shadow.attempted(choice)) is not None:
            return outcome
        with written(smaller, choice):
            outcome = attempted(_copied(smaller), lambda emitted: accept(emitted, bool(choice)))
        first.extend([outcome] if outcome is not None and not first else [])
        return outcome

    choice, failure = search(options, attempt, lambda outcome: _line(model, outcome) in learnt.dead_ends)
    if choice is None:
        learnt.dead_ends.add(_line(model, first[0]))
        raise _hidden(model, found, axes, keep, failure)
    options.learn(choice, learnt)
    with written(smaller, choice):
        emitted = _copied(smaller)
    return emitted, attributes_between(model, emitted)


def _line(model: nn.Module, outcome: Outcome) -> str:
    """The line of the model's own code that a run failed at."""
    return (outcome.error and raised_at(outcome.error, _files(model))) or ""


def _copied(module: nn.Module) -> nn.Module:
    """A copy over the same tensors: what a copy or a pickle makes of a module is what must be right."""
    return duplicate(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def adopt(smaller: nn.Module, like: nn.Module) -> None:
    """Give every module the plain attributes that the constructor of ``like``, the same architecture, gives it.

    A part that a model has put in another's place since (big_bird's attention, for short inputs) keeps its own.
    """
    built = dict(like.named_modules())
    for path, mine in smaller.named_modules():
        theirs = built.get(path)
        if theirs is None or type(theirs) is not type(mine):
            continue
        for name, value in _plain(theirs).items():
            if vars(mine).get(name) != value:
                setattr(mine, name, value)
        if hasattr(mine, "config") and hasattr(theirs, "config"):
            mine.config = theirs.config


@contextmanager
def settings_kept(model: nn.Module, built: nn.Module) -> Iterator[None]:
    """Plain attributes that ``model`` had otherwise than ``built``, fresh from its constructor, stay as they were set by hand (a
    dropout turned off) whatever ``model`` adopts meanwhile: unless that is not what ``built`` has, for then it is a size."""
    fresh = {path: _plain(module) for path, module in built.named_modules()}
    set_by_hand = [
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in _plain(module).items()
        if fresh.get(path, {}).get(name, value) != value
    ]
    yield
    modules = dict(model.named_modules())
    for path, name, value in set_by_hand:
        if path in modules and vars(modules[path]).get(name) == fresh[path][name]:
            setattr(modules[path], name, value)


def _plain(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes; whether it trains is none of its constructor's."""
    return {name: value for name, value in vars(module).items() if is_plain(value) and name != "training"}


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


def _hidden(model: nn.Module, evidence: Sequence[Evidence], axes: Axes, keep: Keep, failure: Outcome) -> HiddenSize:
    """The line that stands in the way: where two want different values of one attribute, or where the best guess fails."""
    wanted: dict[HeldNumber, Evidence] = {}
    clash = next((i for i in evidence for place in i.places if wanted.setdefault(place, i).after != i.after), None)
    if clash is not None:
        place = next(place for place in clash.places if wanted[place].after != clash.after)
        where, other = source_line(clash.node), wanted[place]
        why = f"{place} would have to be {clash.after} there and {other.after} at {source_line(other.node)}"
    elif failure.error is not None:
        files = _files(model)
        where = raised_at(failure.error, files) or _first_cut(axes, keep)
        line = where.partition("  ")[0]
        lost = next((item for item in evidence if not item.places and source_line(item.node).startswith(f"{line} ")), None)
        stock = raised_inside(failure.error, files, str(Path(nn.__file__).parent))
        why = f"{type(failure.error).__name__}: {first_line(failure.error)}" + (f", in torch's {stock}" if stock else "")
        if lost is not None:
            why = f"{lost.before} must become {lost.after} there, and no attribute holds it" + (f" ({why})" if stock else "")
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
    return axes.trace.name
