"""One zoo entry in, its outcome out: traced, grouped, every kind cut by 30 %, and held against the masked original in float64."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphprune.axes import Factor
from graphprune.compiler import compile
from graphprune.errors import GraphpruneError
from graphprune.execute import execute, tensors_of
from graphprune.groups import Group, Groups, couple
from graphprune.propagate import propagate
from graphprune.rewrite.graph import cut_all, resized_graph
from graphprune.trace import trace
from graphprune.verify import TOLERANCE, difference, leaves, masked_outputs, smaller_outputs
from tests.zoo.configs import Entry

SHARE = 0.3
FAITHFUL = 1e-3


def stages(entry: Entry, emit: bool = True) -> Iterator[dict[str, Any]]:
    """What is known after each step; the last outcome is ok, ok-with-frozen, or what went wrong."""
    yield {"stage": "trace"}
    traced = trace(entry.model, entry.inputs)
    yield {"stage": "groups", "nodes": len(traced.graph.nodes)}
    groups = couple(propagate(traced))
    yield {"stage": "check", "kinds": dict(groups.kinds), "frozen_share": frozen_share(groups), "reasons": reasons(groups)}
    tensors, inputs = tensors_of(entry.model, traced), traced.flatten(entry.inputs)
    eager = eager_outputs(entry)
    drift = difference(leaves(execute(traced, tensors, inputs)), eager)
    wrong = [f"traced graph drifts by {drift:.1e}"] if drift > FAITHFUL else []
    for kind in (*groups.kinds, "all"):
        wrong += check_kind(groups, tensors, inputs, kind)
    frozen = any(reason.startswith("no rule") for reason in reasons(groups))
    yield {"outcome": "wrong" if wrong else "ok-with-frozen" if frozen else "ok", "wrong": wrong}
    if emit:
        yield {"stage": "emit", "module": emitted(entry)}
    yield {"stage": "done"}


def eager_outputs(entry: Entry) -> list[Tensor]:
    with torch.no_grad():
        return leaves(entry.model(**entry.inputs))


def check_kind(groups: Groups, tensors: dict[str, Tensor], inputs: Sequence[Any], kind: str) -> list[str]:
    """Cut one kind (or all at once); exact groups must equal the masked original, others must run and keep the output shapes."""
    chosen = [group for group in groups if kind in (group.kind, "all")]
    keep = random_cut(chosen, kind)
    if kind == "all" and not all(group.exact for group in chosen):
        keep = {group.factor: keep[group.factor] for group in chosen if group.exact}
    found = smaller_outputs(groups.axes, tensors, inputs, keep)
    problems = [] if predicted(groups, keep) == actual(groups, tensors, keep) else [f"{kind}: parameter count is not as predicted"]
    if not all(torch.isfinite(output).all() for output in found):
        problems.append(f"{kind}: outputs are not finite")
    if all(group.exact for group in chosen) or kind == "all":
        gap = difference(found, masked_outputs(groups.axes, tensors, inputs, keep))
        problems += [f"{kind}: differs from the masked original by {gap:.1e}"] if gap > TOLERANCE else []
    return problems


def random_cut(chosen: Sequence[Group], seed: str) -> dict[Factor, list[int]]:
    draw = random.Random(seed)
    return {g.factor: sorted(draw.sample(range(g.size), max(1, round(g.size * (1 - SHARE))))) for g in chosen}


def predicted(groups: Groups, keep: dict[Factor, list[int]]) -> int:
    return sum(prod(axis.resized(keep) for axis in axes) for axes in groups.axes.tensors.values())


def actual(groups: Groups, tensors: dict[str, Tensor], keep: dict[Factor, list[int]]) -> int:
    resized_graph(groups.axes, keep)
    return sum(tensor.numel() for tensor in cut_all(groups.axes, tensors, keep).values())


def frozen_share(groups: Groups) -> float:
    """Parameters on no axis of which anything can shrink, over all parameters."""
    free = {group.factor for group in groups}
    sizes = {name: (prod(a.size for a in axes), any(a.factors & free for a in axes)) for name, axes in groups.axes.tensors.items()}
    own = [sizes[name] for name in groups.axes.trace.parameters]
    return round(sum(size for size, live in own if not live) / max(1, sum(size for size, _ in own)), 4)


def reasons(groups: Groups) -> dict[str, int]:
    """Why parameters' factors are frozen, the commonest first."""
    named = groups.axes.trace.parameters
    return dict(Counter(f.reason.what for f in groups.frozen if any(m.name in named for m in f.members)).most_common(6))


def emitted(entry: Entry) -> str:
    """How the module emitter writes the default kinds: stock, differing, or why only the graph emitter can."""
    try:
        result = compile(entry.model, entry.inputs, keep=0.8, method="random")
    except GraphpruneError as error:
        return f"no: {str(error).splitlines()[0][:160]}"
    return "stock" if result.pruned.config is not None else "differing"
