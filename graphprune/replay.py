"""A model and a plan in, the result that the plan describes out: no scores, no choice, the same bytes every time."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphprune.compiler import Emission, Example, Pruned, Result, example_for, rewrite
from graphprune.data import Calibration
from graphprune.groups import Groups, couple
from graphprune.pipeline import Facts, Pass, run
from graphprune.plan import Plan
from graphprune.propagate import propagate
from graphprune.trace import Inputs, trace


def replay(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    emit: str = "module",
    verify: bool = True,
    calibration: Calibration | None = None,
) -> Result:
    """Prune ``model`` exactly as ``plan`` says. Raises UserMistake when the plan was made for another architecture."""
    given: Facts = {nn.Module: model, Plan: plan, Emission: Emission(emit, verify)}
    given[Example] = example_for(model, example_inputs, calibration)

    def traced(model: nn.Module, example: Example) -> Groups:
        return couple(propagate(trace(model, example.inputs, dynamic=emit == "graph")))

    facts: dict[Any, Any] = run([Pass(traced), Pass(rewrite)], given)
    pruned: Pruned = facts[Pruned]
    return Result(pruned.model, plan, facts[Groups], pruned, (), facts)
