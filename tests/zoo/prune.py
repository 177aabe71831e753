"""One model type in, its outcome step by step out: built, run, traced, grouped, every kind cut by 30 % and held against the
masked original in double precision."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.axes import Factor
from graphprune.difference import difference, tensors_in
from graphprune.execute import execute, tensors_of
from graphprune.groups import Group, Groups, couple
from graphprune.propagate import propagate
from graphprune.rewrite.cut import cut_all
from graphprune.rewrite.graph import resized_graph
from graphprune.trace import trace
from graphprune.verify import TOLERANCE, masked_outputs, smaller_outputs
from tests.zoo.entries import Entry, build
from tests.zoo.measure import measured
from tests.zoo.stranger import as_stranger

SHARE = 0.3
FAITHFUL = 1e-3
"""How far a traced graph may be from the eager model in single precision."""

Rows = Iterator[dict[str, Any]]


def stages(family: str, model_type: str) -> Rows:
    """What is known after each step; ``stage`` names the next one."""
    warnings.simplefilter("ignore")
    entry = build(model_type, family)
    yield {"stage": "run", "class": type(entry.model).__name__, "parameters": sum(p.numel() for p in entry.model.parameters())}
    eager = eager_outputs(entry)
    yield from pruned(entry, eager)
    yield {"stage": "done"}


def with_checkpoint(family: str, model_type: str) -> Rows:
    """The same, and what a stranger gets."""
    *steps, last = stages(family, model_type)
    yield from steps
    yield {"stage": "stranger"}
    yield as_stranger(model_type, family) | last


def eager_outputs(entry: Entry) -> list[Tensor]:
    """What the model computes; refused where that is not finite, or not the same twice."""
    with torch.no_grad():
        first, second = (pytree.tree_leaves(entry.model(**entry.inputs)) for _ in range(2))
    outputs, again = ([x for x in found if isinstance(x, Tensor)] for found in (first, second))
    if bad := [list(x.shape) for x in outputs if x.is_floating_point() and not x.isfinite().all()]:
        raise ValueError(f"outputs of shapes {bad} are not finite")
    if bad := [list(x.shape) for x, y in zip(outputs, again, strict=True) if not torch.equal(x, y)]:
        raise ValueError(f"outputs of shapes {bad} differ from one call to the next")
    return tensors_in(first)


def pruned(entry: Entry, eager: Sequence[Tensor]) -> Rows:
    yield {"stage": "trace"}
    traced = trace(entry.model, entry.inputs)
    yield {"stage": "groups", "nodes": len(traced.graph.nodes)}
    groups = couple(propagate(traced))
    yield {"stage": "check", **measured(groups, entry.model.config)}
    tensors, inputs = tensors_of(entry.model, traced), traced.flatten(entry.inputs)
    drift = difference(tensors_in(execute(traced, tensors, inputs)), eager)
    wrong = [f"traced graph drifts by {drift:.1e}"] if drift > FAITHFUL else []
    for name, chosen in cuts(groups).items():
        try:
            wrong += check(groups, tensors, inputs, random_cut(chosen, name), all(group.exact for group in chosen), name)
        except Exception as error:
            error.add_note(f"while cutting {name}")
            raise
    yield {"wrong": wrong}


def cuts(groups: Groups) -> dict[str, list[Group]]:
    """Each kind alone, all that is exact together, and everything together."""
    found = {kind: [group for group in groups if group.kind == kind] for kind in groups.kinds}
    found |= {"exact": [group for group in groups if group.exact], "all": list(groups)}
    return {name: chosen for name, chosen in found.items() if chosen}


def check(
    groups: Groups, tensors: dict[str, Tensor], inputs: Sequence[Any], keep: dict[Factor, list[int]], exact: bool, name: str
) -> list[str]:
    """Exact groups must equal the masked original; others must run, stay finite and have the predicted sizes."""
    found = smaller_outputs(groups.axes, tensors, inputs, keep)
    problems = [] if predicted(groups, keep) == actual(groups, tensors, keep) else [f"{name}: parameter count is not as predicted"]
    if not all(torch.isfinite(output).all() for output in found):
        problems.append(f"{name}: outputs are not finite")
    gap = difference(found, masked_outputs(groups.axes, tensors, inputs, keep)) if exact else 0.0
    return problems + ([f"{name}: differs from the masked original by {gap:.1e}"] if gap > TOLERANCE else [])


def random_cut(chosen: Sequence[Group], seed: str) -> dict[Factor, list[int]]:
    draw = random.Random(seed)
    return {g.factor: sorted(draw.sample(range(g.size), max(g.least, round(g.size * (1 - SHARE))))) for g in chosen}


def predicted(groups: Groups, keep: dict[Factor, list[int]]) -> int:
    return sum(prod(axis.resized(keep) for axis in axes) for axes in groups.axes.tensors.values())


def actual(groups: Groups, tensors: dict[str, Tensor], keep: dict[Factor, list[int]]) -> int:
    resized_graph(groups.axes, keep)
    return sum(tensor.numel() for tensor in cut_all(groups.axes, tensors, keep).values())
