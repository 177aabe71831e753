"""A smaller transformers model in, the stock config that describes it out, or the reason why no config does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune import quiet
from graphprune.axes import Factor, Keep
from graphprune.errors import ModelLimit
from graphprune.patterns import unnumbered
from graphprune.propagate import Axes
from graphprune.rewrite.blueprint import Changes, Sizes, build_empty, build_meta, scalars
from graphprune.rewrite.config import STEPS, candidates, fit, named, proven, sketched
from graphprune.rewrite.module import adopt, settings_kept
from graphprune.rewrite.probe import described

SizedDims = set[tuple[str, int, int]]
"""Dimensions of tensors: a name, which dimension, and its size."""

ROUNDING = 1e-2
"""How far a buffer may be, relatively, from what a constructor computes in another precision."""


def shapes_after(axes: Axes, keep: Keep) -> dict[str, tuple[int, ...]]:
    """The shape of every traced parameter and buffer after the cut, under each of its names."""
    return {
        alias: tuple(axis.resized(keep) for axis in axes.tensors[traced.name])
        for traced in axes.trace.tensors.values()
        if traced.kind != "constant"
        for alias in traced.names
    }


def resized_numbers(axes: Axes, keep: Keep) -> dict[int, list[int]]:
    """What sizes anywhere in the graph become: hints for config fields that move no shape (a count of heads)."""
    found: dict[int, set[int]] = defaultdict(set)
    for factor, kept in keep.items():
        found[factor.size].add(len(kept))
    for axis in axes.distinct:
        if axis.shrinks(keep):
            found[axis.size].add(axis.resized(keep))
    return {old: sorted(new) for old, new in found.items()}


def stock_config(
    model: PreTrainedModel, smaller: nn.Module, axes: Axes, keep: Keep, accept: Callable[[nn.Module], bool]
) -> PreTrainedConfig:
    """The config whose constructor gives ``smaller`` its attributes, so that it computes what it should.

    ``smaller`` takes them on, and keeps what was set by hand. Raises ModelLimit when no config has these sizes or none computes
    the same.
    """

    def takes(config: PreTrainedConfig) -> bool:
        built = build_empty(type(model), config)
        if not same_buffers(smaller, built):
            return False
        adopt(smaller, built)
        return accept(smaller)

    with settings_kept(smaller, build_meta(type(model), model.config)):
        return fit(model, shapes_after(axes, keep), resized_numbers(axes, keep), takes)


def same_buffers(smaller: nn.Module, built: nn.Module) -> bool:
    """Whether buffers that no checkpoint holds (Gemma's √hidden) are, give or take rounding, the same in both."""
    saved = smaller.state_dict(keep_vars=True).keys()
    found = dict(built.named_buffers())
    for name, mine in smaller.named_buffers():
        theirs = found.get(name)
        if name in saved or theirs is None or theirs.is_meta or not mine.is_floating_point():
            continue
        if mine.shape != theirs.shape or not torch.allclose(theirs.to(mine), mine, rtol=ROUNDING, atol=0):
            return False
    return True


def expressible(model: PreTrainedModel, axes: Axes, keep: Keep) -> None:
    """Raise ModelLimit, with the reason, when no config field can express these sizes. Runs nothing, needs no weights."""
    with quiet.building():
        next(candidates(model, shapes_after(axes, keep), resized_numbers(axes, keep)))


def obviously_expressible(model: PreTrainedModel, axes: Axes, tried: Sequence[Sequence[Keep]]) -> list[int] | None:
    """Which cut of each of several lists a config plainly expresses: the first for which fields hold the sizes that change.

    They are looked for on two layers, where those stand for all; what is found is tried on the whole, all at once. None where
    the answer is yet to be found.
    """
    places: list[int] = []
    together: dict[Factor, Sequence[int]] = {}
    changes: Changes = {}
    with quiet.building(), suppress(ModelLimit):
        whole, few = described(model)

        def sketch(keep: Keep) -> Changes | None:
            return next(sketched(whole, few, shapes_after(axes, keep), resized_numbers(axes, keep)), None) if keep else {}

        for keeps in tried:
            place, found = next(((place, found) for place, found in enumerate(map(sketch, keeps)) if found is not None), (0, None))
            if found is None or found.keys() & changes.keys():
                return None
            places.append(place)
            changes |= found
            together |= keeps[place]
        return places if proven(whole, shapes_after(axes, together), changes) else None
    return None


def sketchable(model: PreTrainedModel, axes: Axes, keep: Keep) -> bool:
    """Whether fields that hold the sizes which change express a cut, as far as two layers tell, where those stand for all."""
    with quiet.building(), suppress(ModelLimit):
        return any(True for _ in sketched(*described(model), shapes_after(axes, keep), resized_numbers(axes, keep)))
    return False


def moved(model: PreTrainedModel, axes: Axes, keep: Keep) -> Iterator[SizedDims]:
    """What each field that holds a size which changes moves, given what that becomes."""
    whole, few = described(model)
    blueprint = few.blueprint if few else whole
    for path, value in named(blueprint, resized_numbers(axes, keep))[:STEPS]:
        response = blueprint.response({path: value}) or {}
        yield spelled(model, {dim: blueprint.sizes[dim] for dim in response if dim in blueprint.sizes})


def held(model: PreTrainedModel) -> set[int]:
    """The numbers that stand in a model's config, none where it does not describe the model."""
    with quiet.building(), suppress(ModelLimit):
        return {value for _, value in scalars(described(model)[0].settings()) if isinstance(value, int)}
    return set()


def spelled(model: PreTrainedModel, sizes: Sizes) -> SizedDims:
    """Dimensions and their sizes, without the numbers of layers where two layers stand for all."""
    with quiet.building():
        few = described(model)[1]
    return {(unnumbered(name) if few else name, dim, size) for (name, dim), size in sizes.items()}


def saved_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Those of the shapes that a checkpoint holds."""
    names = model.state_dict(keep_vars=True).keys()
    return {name: shape for name, shape in shapes.items() if name in names}
