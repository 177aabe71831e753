"""A model and a plan in, the result that the plan describes out: no scores, no choice, the same bytes every time."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphprune.alignment import realign
from graphprune.compiler import Result, example_for, recounted, traced
from graphprune.data import Calibration
from graphprune.depth import as_groups, rewrite_pieces
from graphprune.emission import rewrite
from graphprune.facts import Emission, Example, Pruned
from graphprune.groups import Groups, couple
from graphprune.pieces import WHOLE, Layers, pieces
from graphprune.pipeline import Facts, Pass, run
from graphprune.plan import Plan
from graphprune.propagate import Axes, propagate
from graphprune.prunable import prunable
from graphprune.rewrite.record import remember
from graphprune.trace import Inputs


def replay(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    emit: str = "module",
    verify: bool = True,
    inplace: bool = False,
    calibration: Calibration | None = None,
) -> Result:
    """Prune ``model`` exactly as ``plan`` says, ``inplace`` as ``compile`` has it.

    Raises UserMistake when the plan was made for another architecture.
    """
    model = prunable(model)
    given: Facts = {nn.Module: model, Plan: plan, Emission: Emission(emit, verify, inplace)}
    given[Example] = example_for(model, example_inputs, calibration)

    def whole(axes: Axes) -> Layers:
        return pieces(axes, plan.cuts[0].kind)

    removes_pieces = any(cut.kind in WHOLE for cut in plan.cuts)
    stages = [Pass(whole), Pass(as_groups), Pass(rewrite_pieces)] if removes_pieces else [Pass(couple), Pass(rewrite)]
    facts: dict[Any, Any] = run([Pass(traced), Pass(propagate), *stages], given)
    pruned: Pruned = remember(facts[Pruned], model)
    plan = recounted(facts[Groups], plan)
    repairs = plan.options.get("passes", ())
    notes = [f"the plan was made with {', '.join(repairs)}: what they did to weights is no part of it"] if repairs else []
    notes += realign(pruned.model, plan)
    return Result(pruned.model, plan, facts[Groups], pruned, tuple(notes), facts)
