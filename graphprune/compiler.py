"""A model and a budget in, a smaller model with its plan out: the stages in order, each callable on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphprune.alignment import realign
from graphprune.budget import Budget
from graphprune.collecting import settled
from graphprune.cost import cost
from graphprune.data import Calibration, batches_of
from graphprune.default import default_for
from graphprune.depth import as_groups, remaining, rewrite_pieces, select_pieces
from graphprune.device import beside, drawing, where
from graphprune.difference import tensors_in
from graphprune.disk import given_back
from graphprune.emission import rewrite
from graphprune.errors import GraphpruneError, ModelLimit, UserMistake, first_line
from graphprune.exportable import exportable
from graphprune.facts import Emission, Example, Notes, Pruned
from graphprune.gradients import Loss
from graphprune.groups import Groups, couple
from graphprune.hidden import run_visible
from graphprune.inputs import guess_inputs
from graphprune.memory import caches_emptied, untouched
from graphprune.narrow import narrow, stock_steps
from graphprune.pieces import WHOLE, Layers, pieces
from graphprune.pipeline import Facts, Pass, Progress, find_pass, find_scorer
from graphprune.plan import Plan
from graphprune.propagate import Axes, propagate
from graphprune.prunable import prunable
from graphprune.rewrite.record import remember
from graphprune.score import BLOCK, Scores
from graphprune.select import select
from graphprune.signature import signature_of
from graphprune.trace import Inputs, Trace, as_call, trace

HOLES = BLOCK // 2
"""Bytes that what is computed of a block of weights reaches: in place it goes back to the system at once, at the price of time."""


@dataclass(frozen=True)
class Result:
    """What a compile gives: the smaller ``model``, the ``plan`` that made it, the ``groups`` it chose from, and all facts."""

    model: nn.Module
    plan: Plan
    groups: Groups
    pruned: Pruned
    notes: tuple[str, ...]
    facts: Facts

    @property
    def report(self) -> dict[str, Any]:
        """What changed, as plain data: costs, groups cut by kind, what is frozen and why."""
        kinds = sorted({cut.kind for cut in self.plan.cuts})
        rows = {kind: [cut for cut in self.plan.cuts if cut.kind == kind] for kind in kinds}
        return {
            "cost": self.plan.cost,
            "cut": {k: {"groups": len(r), "units": sum(c.size - len(c.kept) for c in r)} for k, r in rows.items()},
            "stock": self.pruned.config is not None,
            "obstacle": self.pruned.obstacle,
            "notes": list(self.notes),
            "frozen": [{"members": [str(m) for m in f.members], "why": f.reason.what} for f in self.groups.frozen],
        }


def compile(  # noqa: A001  the product's own verb
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    keep: float = 0.8,
    method: str | Callable[..., Any] | None = None,
    kinds: Sequence[str] | None = None,
    scope: str | None = None,
    keep_of: str = "groups",
    target: Mapping[str, float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    minimum: int | Mapping[str, int] = 1,
    protect: Sequence[str] = (),
    alike: bool | None = None,
    emit: str = "module",
    verify: bool = True,
    seed: int = 0,
    calibration: Calibration | Sequence[Mapping[str, Tensor]] | None = None,
    passes: Sequence[str | Callable[..., Any]] = (),
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune ``model`` to a share ``keep`` of its prunable parameters and check the result. The input model is untouched.

    ``example_inputs`` is a tensor, a sequence of positional or a mapping of keyword arguments; a transformers model, or one with
    calibration data, needs none. ``method`` is a pass by name, by ``file.py:function`` or a function, with ``options``;
    ``passes`` adds further ones. Without a method it is magnitude, with calibration text the recipe in ``default.py``, its
    ``scope`` and its passes before yours. ``loss(model, inputs)`` is what gradients are of: by default that of the next token, or
    the model's own. ``alike`` (default for transformers models) makes equal layers shrink alike, which a
    stock config needs. Budget parameters are those of ``Budget``. ``inplace`` spares the memory of a second model: once
    all is checked a transformers model that a stock config will describe becomes the smaller one itself, and is the result's
    ``model``; any other, or where a pass comes after the cut, is left as it is. Raises ModelLimit when the model stands in
    the way, UserMistake on bad arguments; nothing is changed then.
    """
    model = prunable(model)
    whole = not set(WHOLE).isdisjoint(kinds or ())
    default = default_for(model, calibration is not None, kinds or (), method)
    shrink_alike = _alike(model, alike, emit)
    budget = Budget(keep, keep_of, scope or default.scope, kinds, protect, round_to, minimum, shrink_alike, dict(target or {}))
    given: Facts = {nn.Module: model, Example: example_for(model, example_inputs, calibration)}
    if calibration is not None:
        data = calibration if isinstance(calibration, Calibration) else Calibration(batches_of(calibration), "given")
        given[Calibration] = data if loss is None else replace(data, loss=loss)
    notes = [default.note] if default.note else []
    given[Notes] = Notes(notes)
    given[Budget] = budget
    scorer = find_scorer(default.method, **seeded(default.method, options or {}, seed))
    scorer = replace(scorer, function=_without_holes(scorer.function)) if inplace else scorer
    stages = whole_pieces(scorer, kinds or ()) if whole else pipeline(scorer)
    extras = [find_pass(extra) for extra in (*default.passes, *passes)]
    stages = with_extras(stages, extras)
    given[Emission] = Emission(emit, verify, inplace and not _after(stages))
    emptied = caches_emptied(model, partial(_outputs, model, given[Example]), refill=not inplace)
    with settled(), emptied, drawing(seed, where(model)):
        facts = run_visible(stages, given, progress)
    if repairs := repairs_of(stages):
        _check_repaired(facts[Pruned], facts[Example], repairs)
    pruned: Pruned = remember(facts[Pruned], model)
    if any(stage.makes is Plan and stage in extras for stage in stages):
        facts[Plan] = recounted(facts[Groups], facts[Plan])
    facts[Plan] = with_repairs(facts[Plan], repairs)
    notes += realign(pruned.model, facts[Plan])
    return Result(pruned.model, facts[Plan], facts[Groups], pruned, tuple(notes), facts)


def _without_holes(score: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which leaves no holes in the heap."""

    @wraps(score)
    def scored(*facts: Any, **options: Any) -> Any:
        with given_back(HOLES):
            return score(*facts, **options)

    return scored


def pipeline(scorer: Pass) -> list[Pass]:
    """The default stages around one scoring pass."""
    return [Pass(traced), Pass(propagate), Pass(couple), Pass(narrow), Pass(stock_steps), scorer, Pass(select), Pass(rewrite)]


def whole_pieces(scorer: Pass, kinds: Sequence[str]) -> list[Pass]:
    """The stages that remove layers or branches; widths are for another compile, of what this one gives."""
    if len(kinds) > 1:
        raise UserMistake(f"{', '.join(kinds)} cannot go in one compile", fix="remove layers first, then compile the result again")
    if scorer.options.get("aggregate") in ("last-only", "first-only"):
        raise UserMistake("a layer has no first or last member", fix="aggregate=sum")

    def found(axes: Axes) -> Layers:
        return pieces(axes, kinds[0])

    return [Pass(traced), Pass(propagate), Pass(found), Pass(as_groups), scorer, Pass(select_pieces), Pass(rewrite_pieces)]


def repairs_of(stages: Sequence[Pass]) -> list[str]:
    """The names of the passes that change weights of the smaller model."""
    return [stage.name for stage in _after(stages) if stage.makes is Pruned]


def with_repairs(plan: Plan, repairs: Sequence[str]) -> Plan:
    """The plan that names the passes which changed weights after it, as no plan can say how."""
    return replace(plan, options={**plan.options, "passes": list(repairs)}) if repairs else plan


def _after(stages: Sequence[Pass]) -> Sequence[Pass]:
    """The stages behind the one that first makes the smaller model."""
    return stages[[stage.makes for stage in stages].index(Pruned) + 1 :]


def with_extras(stages: Sequence[Pass], extras: Sequence[Pass]) -> list[Pass]:
    """Stages with further passes, each behind the stage that makes what it makes, or before the first that needs it; what changes
    the calibration goes first. Raises UserMistake on one that makes what nothing needs, or scores anew what the method scored."""
    placed = list(stages)
    for extra in extras:
        made = [i for i, stage in enumerate(placed) if stage.makes is extra.makes]
        needed = [i for i, stage in enumerate(placed) if extra.makes in stage.needs.values()]
        if extra.makes is not Calibration and not made and not needed:
            name = getattr(extra.makes, "__name__", str(extra.makes))
            raise UserMistake(f"{extra.name}() makes {name}, which nothing here needs", fix="annotate what it makes: -> Scores")
        if extra.makes is Scores and made and Scores not in extra.needs.values():
            why = f"its scores would replace those of {placed[made[-1]].name}()"
            raise UserMistake(f"{extra.name} is a method", why=why, fix=f"method=, or --method {extra.name}; a pass takes scores")
        placed.insert(0 if extra.makes is Calibration else made[-1] + 1 if made else needed[0], extra)
    return placed


def recounted(groups: Groups, plan: Plan) -> Plan:
    """The plan with what it saves on the model of these groups, where that is counted, not measured."""
    keep = plan.keep(groups)
    left = remaining(groups, keep) if isinstance(groups, Layers) else groups.axes
    sizes = {} if isinstance(groups, Layers) else {factor: len(kept) for factor, kept in keep.items()}
    found = {"before": cost(groups.axes, {}), "after": cost(left, sizes)}
    return replace(plan, cost={when: {**plan.cost.get(when, {}), **asdict(counted)} for when, counted in found.items()})


def _check_repaired(pruned: Pruned, example: Example, repairs: Sequence[str]) -> None:
    """Raise ModelLimit where the passes behind the cut left weights that are not finite, or a model that does not run."""
    by = ", ".join(f"{name}()" for name in repairs)
    for name, weight in pruned.model.named_parameters():
        if not weight.isfinite().all():
            raise ModelLimit(f"{name} is not finite after {by}", fix="leave it out, or mend it")
    try:
        with untouched(pruned.model):
            _outputs(pruned.model, example)
    except Exception as error:
        raise ModelLimit(f"the model does not run after {by}", why=f"{type(error).__name__}: {first_line(error)}") from error


@torch.no_grad()
def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = beside(as_call(example.inputs), where(model))
    with exportable(model, experts=None):
        return tensors_in(model(*args, **kwargs))


def traced(model: nn.Module, example: Example, emission: Emission) -> Trace:
    """The first stage; a graph that is to be emitted keeps batch and sequence open where the model allows it."""
    return trace(model, example.inputs, dynamic=emission.emit == "graph")


def _alike(model: nn.Module, alike: bool | None, emit: str) -> bool:
    return isinstance(model, PreTrainedModel) and emit == "module" if alike is None else alike


def example_for(model: nn.Module, inputs: Inputs | None, calibration: Any) -> Example:
    """The inputs to trace and check on: given ones, the first calibration batch, or small ones a transformers model accepts."""
    if inputs is not None:
        return Example(inputs)
    if calibration is not None:
        batches = calibration.inputs if isinstance(calibration, Calibration) else calibration
        if not batches:
            raise UserMistake("the calibration holds no batch")
        return Example(signature_of(model).taken(batches[0]) if isinstance(batches[0], Mapping) else batches[0])
    if isinstance(model, PreTrainedModel):
        return Example(guess_inputs(model, model.config))
    raise UserMistake(f"{type(model).__name__} needs example inputs", fix="compile(model, example_inputs, …)")


def seeded(method: Any, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A method that draws takes the compile's seed unless its options say otherwise."""
    told = {**(method.options if isinstance(method, Pass) else {}), **options}
    try:
        return {"seed": seed, **options} if "seed" not in told and find_pass(method, seed=seed) else dict(options)
    except GraphpruneError:
        return dict(options)
