"""A model, its groups and a plan in, the smaller model out: of the same class, in place or beside the original, or a graph.

Whatever is emitted is held to the cut graph, and that to the masked original.
"""

from __future__ import annotations

from functools import cache, partial

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Keep
from graphprune.errors import ModelLimit
from graphprune.execute import tensors_of
from graphprune.facts import Emission, Example, Pruned
from graphprune.groups import Groups
from graphprune.plan import Plan
from graphprune.programs import traces_to
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import Learnt
from graphprune.rewrite.graph import PrunedGraph, Smaller, resized_graph, smaller
from graphprune.rewrite.inplace import cut_in_place
from graphprune.rewrite.module import copy_cut, emit_module, over
from graphprune.rewrite.record import check_described
from graphprune.rewrite.rehearse import Rehearsal
from graphprune.rewrite.static import static_config
from graphprune.rewrite.stock import stock_config
from graphprune.verify import Reference, check_traced, checked, close, computes, decodes, reference, says_little_of


def rewrite(model: nn.Module, groups: Groups, plan: Plan, example: Example, emission: Emission) -> Pruned:
    """Emit the smaller model and check it: masked original ≡ cut graph ≡ emitted model. Raises naming the group at fault."""
    axes, keep = groups.axes, plan.keep(groups)
    if emission.inplace and isinstance(model, PreTrainedModel) and emission.emit == "module":
        config = _proven(model, axes, keep, example)
        if config is not None:
            return _in_place(model, groups, keep, config, example, emission)
    tensors, inputs = tensors_of(model, axes.trace), axes.trace.flatten(example.inputs)
    cutting = cache(partial(smaller, axes, tensors, keep))
    exact = checked(groups, tensors, inputs, keep, cutting)[1] if emission.verify else None
    cut = cutting()
    if emission.emit == "graph":
        if emission.verify:
            check_traced(model, axes.trace, tensors, example.inputs)
        return Pruned(PrunedGraph(axes.trace, cut.graph, cut.tensors), obstacle="a graph has no config")
    wanted = reference(axes.trace, cut.tensors, inputs, cut.graph, exact)
    return _as_module(model, axes, keep, cut, wanted, example, emission.learnt)


def _proven(model: PreTrainedModel, axes: Axes, keep: Keep, example: Example) -> PreTrainedConfig | None:
    try:
        check_described(model.config)
        return static_config(model, axes, keep, example.inputs)
    except ModelLimit:
        return None


def _in_place(
    model: PreTrainedModel, groups: Groups, keep: Keep, config: PreTrainedConfig, example: Example, emission: Emission
) -> Pruned:
    """The model itself, made smaller once all of it has been checked: that what is cut computes the same, that the config does."""
    axes, inputs, exact = groups.axes, groups.axes.trace.flatten(example.inputs), None
    if emission.verify:
        tensors = tensors_of(model, axes.trace)
        exact = checked(groups, tensors, inputs, keep, partial(smaller, axes, tensors, keep, held=False))[1]
        del tensors  # the only other hold on them
    left = cut_in_place(model, axes, keep, config)
    if not close(model, example.inputs, reference(axes.trace, left, inputs, resized_graph(axes, keep), exact)):
        why = "its constructor, run for that config, gives it something that no trace shows"
        raise ModelLimit("the model was made smaller in place and computes otherwise now", why=why, fix="leave out inplace")
    return Pruned(model, config=config)


def _as_module(
    model: nn.Module, axes: Axes, keep: Keep, cut: Smaller, wanted: Reference, example: Example, learnt: Learnt
) -> Pruned:
    """The smaller model of the same class. What had to be guessed is held to the program, too: numbers may say too little of it."""
    vague = says_little_of(model, axes.trace)

    def accept(emitted: nn.Module) -> bool:
        try:
            return close(emitted, example.inputs, wanted) and (not vague or traces_to(emitted, example.inputs, cut.graph))
        except ModelLimit:  # what cannot be traced is not the same
            return False

    emitted, obstacle = copy_cut(model, axes, cut.tensors), "a plain module has no config"
    if isinstance(model, PreTrainedModel):
        try:
            return Pruned(emitted, config=stock_config(model, emitted, axes, keep, accept))
        except ModelLimit as limit:
            emitted, obstacle = over(model, emitted), str(limit)
    remembers = decodes(model, example.inputs)

    def runs(emitted: nn.Module, guessed: bool) -> bool:
        agrees = computes(emitted, example.inputs, wanted) and remembers(emitted)
        return agrees and (not (guessed or vague) or traces_to(emitted, example.inputs, cut.graph))

    emitted, attributes = emit_module(model, emitted, axes, keep, runs, Rehearsal(model, example.inputs), learnt)
    return Pruned(emitted, obstacle=obstacle, attributes=attributes)
