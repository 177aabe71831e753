"""A checkpoint directory larger than memory in, a smaller one out: planned without weights, scored and cut tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Keep
from graphprune.compiler import Emission, Example, Notes, narrow, stock_steps
from graphprune.disk import Checkpoint, OnDisk
from graphprune.errors import ModelLimit, UserMistake
from graphprune.groups import Groups, couple
from graphprune.pipeline import Pass, Progress, find_pass, run
from graphprune.plan import Plan
from graphprune.propagate import Axes, propagate
from graphprune.rewrite.blueprint import build_meta
from graphprune.rewrite.checkpoint import PLAN
from graphprune.rewrite.config import fit
from graphprune.rewrite.graph import resized_graph
from graphprune.rewrite.stock import numbers, saved_shapes, shapes_after
from graphprune.rewrite.stream import copy_rest, streamed, write_cut
from graphprune.select import Budget, select
from graphprune.source import open_source
from graphprune.trace import Inputs, Trace, trace


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a streamed compile gives: where the smaller checkpoint lies, the plan that made it, and the groups it chose from."""

    path: Path
    plan: Plan
    groups: Groups
    notes: tuple[str, ...]


def compile_streamed(
    checkpoint: str | Path,
    out: str | Path,
    *,
    keep: float = 0.8,
    method: str | Callable[..., Any] = "magnitude",
    kinds: Sequence[str] | None = None,
    scope: str = "local",
    keep_of: str = "groups",
    round_to: int | Mapping[str, int] = 1,
    minimum: int | Mapping[str, int] = 1,
    protect: Sequence[str] = (),
    seed: int = 0,
    plan: Plan | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Prune a checkpoint directory by a data-free method without ever holding the model; the budget is that of ``compile``.

    ``plan`` applies a plan made before. The result is a stock checkpoint: layers shrink alike, and the config that describes
    them is checked to give the very graph the cut demands. Raises ModelLimit when there is none; nothing is written then.
    """
    source = open_source(checkpoint, weights=False)
    if source.path is None or not source.path.is_dir() or not isinstance(source.model, PreTrainedModel):
        raise UserMistake(f"{checkpoint} is no checkpoint directory", fix="give the directory that save_pretrained wrote")
    model, files, inputs = source.model, Checkpoint(source.path), source.example_inputs()
    budget = Budget(keep, keep_of, scope, kinds, tuple(protect), round_to, minimum, True)
    notes: list[str] = []
    torch.manual_seed(seed)

    def traced(model: nn.Module, example: Example) -> Trace:
        return trace(model, example.inputs)

    def on_disk(model: nn.Module, groups: Groups) -> nn.Module:
        return put_on_disk(deepcopy(model), groups.axes.trace, files)

    stages = [Pass(stage) for stage in (traced, propagate, couple, narrow, stock_steps, on_disk)]
    stages += [] if plan is not None else [find_pass(method, **_seeded(method, options or {}, seed)), Pass(select)]
    given = {nn.Module: model, Example: Example(inputs), Emission: Emission(), Notes: Notes(notes), Budget: budget}
    facts = run(stages, given if plan is None else {**given, Plan: plan}, progress)
    groups, chosen = facts[Groups], facts[Plan]
    kept = chosen.keep(groups)
    config = static_config(model, groups.axes, kept, inputs)
    axes = _by_file_name(groups.axes, files)
    with streamed(out) as folder:
        copy_rest(source.path, folder)
        config.save_pretrained(folder)
        chosen.save(folder / PLAN)
        write_cut(files, axes, kept, folder)
    return Streamed(Path(out), chosen, groups, tuple(notes))


def _seeded(method: Any, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {"seed": seed, **options} if method == "random" else dict(options)


def put_on_disk(model: nn.Module, traced: Trace, files: Checkpoint) -> nn.Module:
    """Let every parameter of a weightless model stand for its place in the files. Raises ModelLimit when names or shapes differ."""
    for tensor in traced.tensors.values():
        if tensor.kind != "parameter":
            continue
        name = next((name for name in tensor.names if name in files.entries), None)
        if name is None or files.entries[name].shape != tensor.shape:
            why = "no such tensor in the files" if name is None else f"it is {files.entries[name].shape} there, {tensor.shape} here"
            raise ModelLimit(f"{tensor.name} cannot be streamed", at=str(files.folder), why=why, fix="compile it in memory")
        parameter = OnDisk.of(files.entries[name])
        for alias in tensor.names:
            home, _, leaf = alias.rpartition(".")
            model.get_submodule(home)._parameters[leaf] = parameter
    return model


def _by_file_name(axes: Axes, files: Checkpoint) -> dict[str, Any]:
    return {
        name: axes.tensors[tensor.name]
        for tensor in axes.trace.tensors.values()
        for name in tensor.names
        if name in files.entries and tensor.kind != "constant"
    }


# ── the config, without a weight ─────────────────────────────────────────────────────────────────────────────────────


def static_config(model: PreTrainedModel, axes: Axes, keep: Keep, inputs: Inputs) -> PreTrainedConfig:
    """The stock config whose model computes the graph that the cut demands, node for node. Raises ModelLimit when none does."""
    unsaved = shapes_after(axes, keep).keys() - saved_shapes(model, shapes_after(axes, keep)).keys()
    for tensor in axes.trace.tensors.values():
        if tensor.kind == "buffer" and tensor.name in unsaved and any(axis.shrinks(keep) for axis in axes.tensors[tensor.name]):
            raise ModelLimit(f"{tensor.name} would shrink, and no checkpoint holds it", fix="compile it in memory")
    wanted = resized_graph(axes, keep)

    def computes_the_same(config: PreTrainedConfig) -> bool:
        found = trace(build_meta(type(model), config), inputs)
        return same_program(wanted, found.graph) and _same_constants(axes.trace, found)

    return fit(model, shapes_after(axes, keep), numbers(axes, keep), computes_the_same)


def same_program(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs call the same operations on the same operands with the same literals, in the same order."""
    if len(one.nodes) != len(other.nodes):
        return False
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(one.nodes, other.nodes, strict=True):
        twins[node] = twin
        if node.op != twin.op or (node.op == "call_function" and node.target is not twin.target):
            return False
        if _arguments(node, twins) != _arguments(twin):
            return False
    return True


def _arguments(node: fx.Node, twins: Mapping[fx.Node, fx.Node] | None = None) -> str:
    """Arguments by name, defaults filled in, as text; operands under their twins' names."""
    args, kwargs = (node.args, node.kwargs) if twins is None else fx.map_arg((node.args, node.kwargs), twins.__getitem__)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return repr((args, kwargs))
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    return repr([given.get(argument.name, argument.default_value) for argument in schema.arguments])


def _same_constants(one: Trace, other: Trace) -> bool:
    pairs = zip(one.constants.values(), other.constants.values(), strict=False)
    return len(one.constants) == len(other.constants) and all(_equal(mine, theirs) for mine, theirs in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or other.is_meta or torch.equal(one, other))
