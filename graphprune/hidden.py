"""The stages of a compile in, what they make out: without the groups whose sizes the model's own code cannot take.

What a class computes from other sizes (``width // heads``) or writes down as a number (``reshape(b, 12, 64)``) no attribute can
change. Of what is planned equal layers are tried together, the rest one after the other on top of what is known to work.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from graphprune.axes import Factor, Keep
from graphprune.budget import Budget
from graphprune.errors import HiddenSize, ModelLimit
from graphprune.execute import tensors_of
from graphprune.facts import Emission, Example, Notes, Pruned
from graphprune.groups import Group, Groups
from graphprune.levers import signature
from graphprune.pipeline import Facts, Pass, Progress, check, run
from graphprune.plan import Plan
from graphprune.programs import traces_to
from graphprune.propagate import Axes
from graphprune.rewrite.attributes import Learnt
from graphprune.rewrite.graph import smaller
from graphprune.rewrite.module import copy_cut, emit_module
from graphprune.rewrite.rehearse import Rehearsal
from graphprune.trace import Trace
from graphprune.verify import computes, reference


def run_visible(stages: Sequence[Pass], given: Facts, progress: Progress | None = None) -> Facts:
    """Run the stages. Where the model's code hides a size of some groups that nobody asked for, plan and emit anew without them,
    and so on: what is left goes further then."""
    check(stages, given)
    first = [stage.makes for stage in stages].index(Pruned)
    notes, before = given[Notes].lines, len(given[Notes].lines)
    facts = run(stages[:first], given, progress)
    known = {fact: facts[fact] for fact in (Trace, Axes) if fact in facts}
    hidden, told = set[str](), list[str]()

    def without_hidden(groups: Groups) -> Groups:
        return replace(groups, groups=tuple(group for group in groups if group.name not in hidden))

    while True:
        try:
            facts = run(stages[first:], facts, progress)
            notes.extend(told)
            return facts
        except HiddenSize as limit:
            found = (_visible(facts, limit) or _visible(facts, limit, strictly=True)) if given[Budget].kinds is None else None
            if found is None:
                _explain(limit, told)
                raise
            hidden |= {group.name for group in found.hidden}
            told += found.notes
            given = {
                **given,
                Budget: replace(given[Budget], alike=found.alike),
                Emission: replace(given[Emission], learnt=found.learnt),
            }
            if not found.notes:
                facts = {**facts, Emission: given[Emission]}
                continue
        del notes[before:]
        planning = [stage for stage in stages[:first] if stage.makes not in known]
        place = max((number for number, stage in enumerate(planning, 1) if stage.makes is Groups))
        try:
            facts = run([*planning[:place], Pass(without_hidden), *planning[place:]], given | known, progress)
        except ModelLimit as limit:
            _explain(limit, told)
            raise


def _explain(limit: ModelLimit, told: Sequence[str]) -> None:
    """Let an error also say what was left alone before."""
    limit.why = "; ".join(filter(None, (limit.why, *told))) or None


@dataclass(frozen=True, slots=True)
class Visible:
    """Which groups may not shrink, whether equal layers must be ``alike`` where the others do, what was ``learnt`` of the
    numbers to change, and what to say of it."""

    hidden: tuple[Group, ...]
    alike: bool
    learnt: Learnt
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Trials:
    """Cuts of one model, emitted one after the other: each knows what those before have ``learnt``. ``strictly``, a candidate must
    also trace to the cut graph."""

    model: nn.Module
    axes: Axes
    example: Example
    strictly: bool
    learnt: Learnt = field(default_factory=Learnt)

    @cached_property
    def rehearsal(self) -> Rehearsal:
        return Rehearsal(self.model, self.example.inputs)

    def emit(self, keep: Keep) -> None:
        """Raise HiddenSize where the model cannot be emitted; so it is where a candidate computes the same by another program."""
        trace = self.axes.trace
        cut = smaller(self.axes, tensors_of(self.model, trace), keep)
        wanted = reference(trace, cut.tensors, trace.flatten(self.example.inputs), cut.graph)
        other: list[nn.Module] = []

        def accept(emitted: nn.Module, guessed: bool) -> bool:
            if other or not computes(emitted, self.example.inputs, wanted):
                return False
            same = not self.strictly or traces_to(emitted, self.example.inputs, cut.graph)
            other.extend([] if same else [emitted])
            return same

        emit_module(self.model, copy_cut(self.model, self.axes, cut.tensors), self.axes, keep, accept, self.rehearsal, self.learnt)


def _visible(facts: Facts, limit: HiddenSize, *, strictly: bool = False) -> Visible | None:
    """Try what the plan keeps of each class of equal layers on top of those that are known to work, where need be of all of them
    alike; ``strictly`` asks of each that it traces to the cut graph. None where that makes no difference, or leaves nothing."""
    groups, budget = facts[Groups], facts[Budget]
    keep = facts[Plan].keep(groups)
    trials = Trials(facts[nn.Module], groups.axes, facts[Example], strictly)
    fine: dict[Factor, Sequence[int]] = {}
    hidden: list[Group] = []
    alike = budget.alike
    for row in _equal(groups, budget):
        units = {group.factor: keep.get(group.factor, range(group.size)) for group in row}
        least = min(map(len, units.values()))
        if least == row[0].size:
            continue
        planned = {factor: kept for factor, kept in units.items() if factor in keep}
        even = {factor: kept[:least] for factor, kept in units.items()}
        for cut in (planned, even)[: 1 if alike or even == planned else 2]:
            try:
                trials.emit(fine | cut)
                fine, alike = fine | cut, alike or cut is even
                break
            except HiddenSize as found:
                limit = found
        else:
            hidden += row
    if not fine or (not hidden and alike == budget.alike and trials.learnt.values == facts[Emission].learnt.values):
        return None
    notes = ["equal layers shrink alike, as the model's code has it"] if alike != budget.alike else []
    if hidden:
        left = ", ".join(f"{count} {kind} groups" for kind, count in Counter(group.kind for group in hidden).items())
        notes.append(f'{left} are left alone, emit="graph" would cut them: {limit.what}, {limit.at}')
    return Visible(tuple(hidden), alike, trials.learnt, tuple(notes))


def _equal(groups: Groups, budget: Budget) -> list[list[Group]]:
    """The classes of equal layers that a budget may touch."""
    classes: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        if not group.touches(budget.protect):
            classes[signature(group)].append(group)
    return list(classes.values())
