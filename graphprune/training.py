"""Pruning while training: a penalty over coupled groups, an optimizer cut along with its model, plans in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from graphprune import compiler
from graphprune.axes import Axis, Keep
from graphprune.compiler import Result
from graphprune.cost import parameters
from graphprune.errors import UserMistake
from graphprune.groups import Group
from graphprune.pieces import WHOLE
from graphprune.plan import Plan
from graphprune.rewrite.cut import cut


class Penalty(TrainerCallback):
    """Σ over units of λ·‖unit‖₂, or ½λ·‖unit‖₂² when ``squared``: call it for the differentiable scalar to add to a loss.

    A unit's norm runs over its slices of all members that train. ``strengths`` holds a λ a unit, by group name. As a transformers
    callback it adds its gradient before every optimizer step and calls ``grow`` every ``every`` steps.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[Group],
        axes: Mapping[str, tuple[Axis, ...]],
        *,
        strength: float = 1e-4,
        squared: bool = False,
        grow: Callable[[Penalty], None] | None = None,
        every: int = 0,
    ) -> None:
        self.squared, self.every, self._grow = squared, every, grow
        owned = dict(model.named_parameters(remove_duplicate=False))
        device = next(iter(owned.values())).device
        self.groups = tuple(groups)
        self.strengths = {group.name: torch.full((group.size,), strength, device=device) for group in self.groups}
        self._model, self._owned = model, owned
        self.members: dict[str, list[tuple[nn.Parameter, int, list[Tensor]]]] = {
            group.name: [
                (owned[m.name], m.dim, [torch.tensor(c, device=device) for c in axes[m.name][m.dim].units(group.factor)])
                for m in group.members
                if m.name in owned and owned[m.name].requires_grad
            ]
            for group in self.groups
        }

    def norms(self) -> dict[str, Tensor]:
        """‖unit‖₂ of every unit, by group: (units,), differentiable where it is not zero."""
        return {group.name: _norm(self._squares(group)) for group in self.groups if self.members[group.name]}

    def __call__(self) -> Tensor:
        held = dict(self._model.named_parameters(remove_duplicate=False))
        if any(held.get(name) is not parameter for name, parameter in self._owned.items()):
            raise UserMistake("the penalty is on weights that the model no longer has", why="it was cut since", fix="make it anew")
        if self.squared:
            terms = [0.5 * (self.strengths[g.name] * self._squares(g)).sum() for g in self.groups if self.members[g.name]]
        else:
            terms = [(self.strengths[name] * norms).sum() for name, norms in self.norms().items()]
        if not terms:
            raise UserMistake("no parameter of any group trains", fix="requires_grad_() on what is to shrink")
        return torch.stack(terms).sum()

    def grow(self) -> None:
        """Raise the strengths by the rule given, if any."""
        if self._grow is not None:
            with torch.no_grad():
                self._grow(self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to the loss's."""
        with torch.enable_grad():
            self().backward()  # type: ignore[no-untyped-call]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Grow when it is time."""
        if self.every and state.global_step % self.every == 0:
            self.grow()

    def _squares(self, group: Group) -> Tensor:
        total = torch.zeros_like(self.strengths[group.name])
        for parameter, dim, columns in self.members[group.name]:
            squares = (parameter.abs() if parameter.is_complex() else parameter).float().square()
            profile = squares.movedim(dim, 0).flatten(1).sum(1) if parameter.ndim > 1 else squares
            for index in columns:
                total = total.index_add(0, index[index >= 0], profile[index >= 0])
        return total


def _norm(squares: Tensor) -> Tensor:
    """Its square root, with gradient zero instead of infinite at zero."""
    some = squares > 0
    return torch.where(some, squares.where(some, 1.0).sqrt(), 0.0)


# ── the optimizer ────────────────────────────────────────────────────────────────────────────────────────────────────


def shrink(optimizer: Optimizer, model: nn.Module, result: Result) -> None:
    """Make ``optimizer``, so far of ``model``, the optimizer of ``result.model``: same settings, its state cut like the weights.

    State of a parameter's shape, or with one dimension left out or of size one (Adafactor), is cut; numbers are kept. Raises
    UserMistake on a parameter that ``model`` does not own, or on state of any other shape; nothing is changed then.
    """
    keep, axes = result.plan.keep(result.groups), result.groups.axes
    typed = {alias: axes.tensors[traced.name] for traced in axes.trace.tensors.values() for alias in traced.names}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False)}
    fresh = dict(result.model.named_parameters(remove_duplicate=False))
    optimizer = getattr(optimizer, "optimizer", optimizer)
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := [parameter for parameter in owned if parameter not in names]:
        raise UserMistake(f"the optimizer holds {len(strangers)} parameters that are not the model's")
    states = {p: _cut_state(s, p, typed.get(names[p]), keep, names[p]) for p, s in optimizer.state.items()}
    for group in optimizer.param_groups:
        group["params"] = [fresh[names[parameter]] for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update({fresh[names[parameter]]: state for parameter, state in states.items()})


def _cut_state(state: Mapping[str, Any], parameter: Tensor, axes: tuple[Axis, ...] | None, keep: Keep, name: str) -> dict[str, Any]:
    if axes is None:
        return dict(state)
    found = {}
    for key, value in state.items():
        layout = _layout(value, parameter, axes)
        if layout is None:
            raise UserMistake(
                f"optimizer state {key!r} of {name} cannot be cut",
                why=f"its shape {tuple(value.shape)} does not follow {tuple(parameter.shape)}",
                fix="start a new optimizer after pruning",
            )
        found[key] = cut(value, layout, keep) if layout else value
    return found


def _layout(value: Any, parameter: Tensor, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes of a state tensor: those of its parameter, some of them summed to one or left out; none for a number."""
    if not isinstance(value, Tensor) or (value.numel() == 1 and parameter.numel() > 1):
        return ()
    one = Axis(((),))
    if value.ndim == parameter.ndim and all(size in (1, axis.size) for size, axis in zip(value.shape, axes, strict=True)):
        return tuple(axis if size == axis.size else one for size, axis in zip(value.shape, axes, strict=True))
    without = [(*axes[:dim], *axes[dim + 1 :]) for dim in reversed(range(len(axes)))]
    return next((part for part in without if tuple(axis.size for axis in part) == tuple(value.shape)), None)


def become(model: nn.Module, smaller: nn.Module) -> None:
    """Turn ``model`` into ``smaller`` in place, for whoever holds on to it (a Trainer): same object, new parts."""
    vars(model).update(vars(smaller))


# ── plans in a row ───────────────────────────────────────────────────────────────────────────────────────────────────


def share_left(result: Result) -> tuple[int, int]:
    """Parameters that the budget of a compile ranged over, before and after it."""
    axes, names = result.groups.axes, None
    known = axes.trace.parameters
    if result.plan.options.get("keep_of") == "groups":
        names = sorted({member.name for group in result.groups for member in group.members if member.name in known})
    sizes = {factor: len(kept) for factor, kept in result.plan.keep(result.groups).items()}
    names = list(known) if names is None else names
    return parameters(axes, {}, names), parameters(axes, sizes, names)


def compose(first: Plan, then: Plan) -> Plan:
    """One plan for the original model that does what ``first`` and, on its result, ``then`` do."""
    cuts = {cut.group: cut for cut in first.cuts}
    for later in then.cuts:
        before = cuts.get(later.group)
        if before is None:
            cuts[later.group] = later
        elif len(before.kept) != later.size or before.members != later.members:
            raise UserMistake(f"the plans do not follow each other at {later.group}", fix="compose plans of one model in order")
        else:
            cuts[later.group] = replace(before, kept=tuple(before.kept[unit] for unit in later.kept), scores=later.scores)
    cost = {"before": first.cost["before"], "after": then.cost["after"]}
    return replace(first, cuts=tuple(cuts.values()), cost=cost)


class Successive:
    """A model pruned again and again towards shares of its first size; ``plan`` always refers to the model it began with."""

    def __init__(self, example_inputs: Any = None, **options: Any) -> None:
        if options.get("target"):
            raise UserMistake(
                "rounds go towards a share of the parameters", why="target= has no schedule", fix="keep=, then one compile"
            )
        if options.get("emit", "module") != "module" or not set(WHOLE).isdisjoint(options.get("kinds") or ()):
            why = "no plan for the original says what rounds of graphs, or of layers and branches, did"
            raise UserMistake("rounds are of widths, and of modules", why=why, fix="a compile of its own for those")
        self.example_inputs, self.options = example_inputs, options
        self.first: Result | None = None
        self.last: Result | None = None
        self.plan: Plan | None = None
        self.whole = self.left = 1

    def cut_to(self, model: nn.Module, keep: float) -> Result | None:
        """Prune ``model``, as it is now, so that a share ``keep`` of the first model is left; None when it already is."""
        share = keep * self.whole / self.left
        if share >= 1:
            return None
        result = compiler.compile(model, self.example_inputs, keep=share, **self.options)
        before, self.left = share_left(result)
        if self.first is None or self.plan is None:
            self.first, self.plan, self.whole = result, result.plan, before
        else:
            self.plan = compose(self.plan, result.plan)
        self.last = result
        return result

    def result(self) -> Result:
        """The last model with the plan that leads to it from the first. Raises UserMistake when nothing was cut."""
        if self.first is None or self.last is None or self.plan is None:
            raise UserMistake("nothing was pruned", fix="keep less than 1")
        options = {**self.plan.options, "keep": self.left / self.whole}
        return replace(self.last, plan=replace(self.plan, options=options), groups=self.first.groups)
