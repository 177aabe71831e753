"""A transformers model, its axes and what each factor keeps in, the config of what is left out: no weight is read.

What a config gives is traced, and must be the cut graph, operation for operation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Axis, Keep
from graphprune.programs import same_program
from graphprune.propagate import Axes
from graphprune.rewrite.blueprint import build_empty, build_meta
from graphprune.rewrite.config import fit
from graphprune.rewrite.cut import cut
from graphprune.rewrite.graph import resized_graph
from graphprune.rewrite.stock import numbers, same_buffers, saved_shapes, shapes_after
from graphprune.trace import Inputs, Trace, trace


def by_name(axes: Axes) -> dict[str, tuple[Axis, ...]]:
    """The axes of what a model holds, under each of its names."""
    held = [tensor for tensor in axes.trace.tensors.values() if tensor.kind != "constant"]
    return {name: axes.tensors[tensor.name] for tensor in held for name in tensor.names}


def static_config(model: PreTrainedModel, axes: Axes, keep: Keep, inputs: Inputs) -> PreTrainedConfig:
    """The stock config whose model computes the graph that the cut demands, node for node. Raises ModelLimit when none does.

    What its constructor computes and no file holds must be what is left of that now.
    """
    known, shapes = by_name(axes), shapes_after(axes, keep)
    unsaved = shapes.keys() - saved_shapes(model, shapes).keys()
    dtypes = {alias: traced.dtype for traced in axes.trace.tensors.values() for alias in traced.names}
    wanted, before = resized_graph(axes, keep), build_empty(type(model), model.config)
    for name, buffer in list(before.named_buffers(remove_duplicate=False)):
        if name in unsaved:
            home, _, leaf = name.rpartition(".")
            before.get_submodule(home)._buffers[leaf] = cut(buffer, known[name], keep)

    def computes_the_same(config: PreTrainedConfig) -> bool:
        if not same_buffers(before, build_empty(type(model), config)):
            return False
        found = trace(retyped(build_meta(type(model), config), dtypes), inputs)
        return same_program(wanted, found) and _same_constants(axes.trace, found)

    return fit(model, shapes, numbers(axes, keep), computes_the_same)


def retyped(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A model on the meta device with tensors of these types: a config need not say in which precision a model is."""
    held = [*model.named_parameters(), *model.named_buffers()]
    for tensor, dtype in ((tensor, dtypes.get(name, tensor.dtype)) for name, tensor in held):
        tensor.data = tensor.data.to(dtype)
    return model


def _same_constants(one: Trace, other: Trace) -> bool:
    pairs = zip(one.constants.values(), other.constants.values(), strict=False)
    return len(one.constants) == len(other.constants) and all(_equal(mine, theirs) for mine, theirs in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or other.is_meta or torch.equal(one, other))
