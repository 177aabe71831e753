"""A transformers model, its axes and what each factor keeps in, the config of what is left out: no weight is read.

What a config gives is traced, and must be the cut graph, operation for operation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Axis, Keep
from graphprune.device import where
from graphprune.programs import same_program
from graphprune.propagate import Axes
from graphprune.rewrite.blueprint import build_empty, build_meta, hold
from graphprune.rewrite.config import fit
from graphprune.rewrite.cut import cut
from graphprune.rewrite.graph import resized_graph
from graphprune.rewrite.stock import resized_numbers, same_buffers, saved_shapes, shapes_after
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
    held = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if not buffer.is_meta}
    for name, buffer in list(before.named_buffers(remove_duplicate=False)):
        whole = held.get(name, buffer)
        hold(before, [name], cut(whole, known[name], keep) if name in unsaved else whole)

    def computes_the_same(config: PreTrainedConfig) -> bool:
        computed = build_empty(type(model), config)
        if not same_buffers(before, computed):
            return False
        found = trace(_weightless(model, config, computed, dtypes), inputs)
        return same_program(wanted, found) and _same_constants(axes.trace, found)

    return fit(model, shapes, resized_numbers(axes, keep), computes_the_same)


def _weightless(
    model: PreTrainedModel, config: PreTrainedConfig, computed: nn.Module, dtypes: Mapping[str, torch.dtype]
) -> nn.Module:
    """What a config describes, where ``model`` is and in its precision, which a config need not say, with the buffers that
    ``computed`` has. No parameter takes memory: on the meta device it never does, elsewhere each is a single zero, repeated."""
    device = where(model)
    built: nn.Module = build_meta(type(model), config)
    there = {} if device.type == "meta" else dict(computed.named_buffers(remove_duplicate=False))
    fresh: dict[int, Tensor] = {}
    for name, tensor in [*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False)]:
        dtype = dtypes.get(name, tensor.dtype)
        if id(tensor) not in fresh:
            empty = torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)
            new = there[name].to(device, dtype) if name in there else empty
            fresh[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        hold(built, [name], fresh[id(tensor)])
    return built


def _same_constants(one: Trace, other: Trace) -> bool:
    pairs = zip(one.constants.values(), other.constants.values(), strict=False)
    return len(one.constants) == len(other.constants) and all(_equal(mine, theirs) for mine, theirs in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or other.is_meta or torch.equal(one, other))
