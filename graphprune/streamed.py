"""A checkpoint directory larger than memory in, a smaller one out: planned without weights, scored and cut tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from graphprune.axes import Keep
from graphprune.budget import Budget
from graphprune.collecting import settled
from graphprune.compiler import repairs_of, seeded, traced, with_extras, with_repairs
from graphprune.data import Calibration
from graphprune.device import beside, drawing
from graphprune.disk import Checkpoint, OnDisk, given_back
from graphprune.errors import ModelLimit, UserMistake
from graphprune.facts import Emission, Example, Notes, Pruned
from graphprune.groups import Groups, couple
from graphprune.narrow import narrow, stock_steps
from graphprune.parts import Location, layout
from graphprune.pieces import WHOLE
from graphprune.pipeline import Pass, Progress, find_pass, find_scorer, run
from graphprune.plan import PLAN, Plan
from graphprune.propagate import Axes, propagate
from graphprune.prunable import prunable
from graphprune.ranks import leads, wait
from graphprune.rewrite.blueprint import build_empty, build_meta, hold
from graphprune.rewrite.files import cuts
from graphprune.rewrite.record import check_described
from graphprune.rewrite.static import by_name, static_config
from graphprune.rewrite.stream import copy_rest, shared, write_cut
from graphprune.select import select
from graphprune.source import open_source

BLOCKS = 8 << 20
"""Bytes that the blocks in which files are read do not reach: their memory is used again and again."""

VALUES = 128 << 10
"""Bytes of a value or weight that is worth giving back where a graph is walked."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a streamed compile gives: where the smaller checkpoint lies, the plan that made it, and the groups it chose from."""

    path: Path
    plan: Plan
    groups: Groups
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Files:
    """The checkpoint that is read, where the model's tensors lie in it, the directory that is filled, and where to compute."""

    checkpoint: Checkpoint
    places: Mapping[str, Location]
    folder: Path
    device: torch.device


def compile_streamed(
    checkpoint: str | Path,
    out: str | Path,
    *,
    keep: float = 0.8,
    method: str | Callable[..., Any] = "magnitude",
    kinds: Sequence[str] | None = None,
    scope: str = "local",
    keep_of: str = "groups",
    target: Mapping[str, float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    minimum: int | Mapping[str, int] = 1,
    protect: Sequence[str] = (),
    seed: int = 0,
    calibration: Calibration | None = None,
    passes: Sequence[str | Callable[..., Any]] = (),
    plan: Plan | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Streamed:
    """Prune a checkpoint directory without ever holding the model; the budget is that of ``compile``.

    A data-free method sees the weights one by one. One that runs forward passes only (wanda_sp, flap, minitron), and the repairs
    least_squares and mean_bias, walk the graph with the weights of a few operations at a time; one that runs backward passes
    reads each weight where autograd asks for it, and holds the activations, on the CPU; all others compute on ``device``.
    ``plan`` applies a plan made before. The result is a stock checkpoint: layers shrink alike, and the config that describes them
    is checked to give the very graph the cut demands. Raises ModelLimit when there is none; nothing is written then.
    """
    source, there = open_source(checkpoint, weights=False), torch.device(device)
    if source.path is None or not source.path.is_dir() or not isinstance(source.model, PreTrainedModel):
        raise UserMistake(f"{checkpoint} is no checkpoint directory", fix="give the directory that save_pretrained wrote")
    prunable(source.model)
    if (source.path / "adapter_config.json").is_file():
        raise UserMistake(f"{checkpoint} holds an adapter beside its weights", fix="merge it first: merge_and_unload()")
    if not set(WHOLE).isdisjoint(kinds or ()) or (plan is not None and any(cut.kind in WHOLE for cut in plan.cuts)):
        raise UserMistake("whole pieces are removed in memory", fix="leave out --stream")
    check_described(source.model.config)
    inputs = source.example_inputs() if calibration is None else _weightless(calibration.inputs[0])
    budget = Budget(keep, keep_of, scope, kinds, protect, round_to, minimum, True, dict(target or {}))
    notes: list[str] = []
    stages = [Pass(stage) for stage in (traced, propagate, couple, narrow, stock_steps, on_disk)]
    stages += [] if plan is not None else [find_scorer(method, **seeded(method, options or {}, seed)), Pass(select)]

    def with_names(plan: Plan) -> Plan:
        return with_repairs(plan, repairs_of(stages))

    stages = with_extras([*stages, Pass(with_names), Pass(write)], [find_pass(extra) for extra in passes])
    given = {nn.Module: source.model, Example: Example(inputs), Emission: Emission(), Notes: Notes(notes), Budget: budget}
    given |= {} if plan is None else {Plan: plan}
    if calibration is not None:
        batches = tuple(beside(dict(batch), there) for batch in calibration.inputs)
        given[Calibration] = replace(calibration, inputs=batches)
    with (
        shared(out) as folder,
        given_back(BLOCKS if calibration is None else VALUES),
        settled(),
        drawing(seed, there),
    ):
        files = Checkpoint(source.path)
        facts = run(stages, {**given, Files: Files(files, layout(source.model, files), folder, there)}, progress)
        pruned: Pruned = facts[Pruned]
        if pruned.config is None:
            raise ModelLimit("the pruned model cannot be streamed", why=pruned.obstacle, fix="compile it in memory")
    return Streamed(Path(out), facts[Plan], facts[Groups], tuple(notes))


def _weightless(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in inputs.items()}


def on_disk(model: nn.Module, groups: Groups, files: Files) -> nn.Module:
    """The model with every traced parameter standing for its place in the files."""
    return opened(model, model.config, groups.axes, {}, files)  # type: ignore[arg-type]


def write(model: nn.Module, groups: Groups, plan: Plan, example: Example, files: Files) -> Pruned:
    """Fill the directory with the smaller checkpoint; what comes back stands for its files."""
    assert isinstance(model, PreTrainedModel)
    axes, keep = groups.axes, plan.keep(groups)
    config = static_config(build_meta(type(model), model.config), axes, keep, example.inputs)
    if leads():
        copy_rest(files.checkpoint.folder, files.folder)
        config.save_pretrained(files.folder)
        if model.can_generate() and not (files.folder / GENERATION_CONFIG_NAME).exists():  # an old config says it by itself
            said = json.loads((files.checkpoint.folder / CONFIG_NAME).read_text())
            known = vars(GenerationConfig.from_dict({})).keys() & said.keys() - {"transformers_version"}
            GenerationConfig.from_dict({name: said[name] for name in known}).save_pretrained(files.folder)
        plan.save(files.folder / PLAN)
        write_cut(files.checkpoint, cuts(files.places, by_name(axes), keep), files.folder)
    wait()
    filled = Checkpoint(files.folder)
    written = Files(filled, layout(build_meta(type(model), config), filled), files.folder, files.device)
    return Pruned(opened(model, config, axes, keep, written), config=config)


def opened(model: nn.Module, config: PreTrainedConfig, axes: Axes, keep: Keep, files: Files) -> nn.Module:
    """A model of the same class whose parameters stand for tensors in the files; buffers that no file holds are computed.

    Raises ModelLimit when names or shapes differ.
    """
    built: nn.Module = build_empty(type(model), config)  # type: ignore[type-var]
    for tensor in axes.trace.tensors.values():
        shape = tuple(axis.resized(keep) for axis in axes.tensors[tensor.name])
        entry = next((files.places[name].entry for name in tensor.names if name in files.places), None)
        if tensor.kind == "constant" or (tensor.kind == "buffer" and entry is None):
            continue
        if entry is None or entry.shape != shape:
            why = "the files have it neither whole nor in parts" if entry is None else f"it is {entry.shape} there, {shape} here"
            raise ModelLimit(
                f"{tensor.name} cannot be streamed", at=str(files.checkpoint.folder), why=why, fix="compile it in memory"
            )
        value: Any = OnDisk.of(entry, files.device) if tensor.kind == "parameter" else entry.read()
        hold(built, tensor.names, value)
    for part in built.modules():
        part._buffers.update({leaf: value.to(files.device) for leaf, value in part._buffers.items() if value is not None})
    return built
