"""The original, what was kept and the smaller computation in, nothing or an error out: smaller model ≡ masked original.

For exact groups the original with the removed units zeroed where a contraction consumes them gives the same outputs, in double
precision. Where a norm spans the removed units there is no such original; then module and graph emitters must agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.axes import Axis, Keep
from graphprune.device import CPU, beside, drawing, where
from graphprune.difference import difference, tensors_in
from graphprune.disk import given_back
from graphprune.errors import ModelLimit, RuleBug
from graphprune.execute import Edit, execute, is_drawn
from graphprune.exportable import exportable
from graphprune.groups import Groups
from graphprune.memory import untouched
from graphprune.precise import check_finite
from graphprune.propagate import Axes
from graphprune.rewrite.graph import Smaller, smaller
from graphprune.trace import Inputs, Trace, as_call

SURE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far two orders of the same operations may drift apart in any model, relative to the largest output."""

LOOSE = 1e-4
"""The same for a deep model in single precision whose own rounding cannot be measured."""

ROUNDINGS = 10
"""How many times the rounding measured on a model, single against double precision, another order of operations may differ."""

PROMPT = 3
"""Tokens of each of the two passes that check a cache."""

LARGE = 1 / 16
"""What takes more than this part of a model, and no less than 1 MiB, goes back to the system as soon as it is free."""

SEED = 0
"""Models that draw at random draw from it each time."""

TOLERANCE = 1e-8
"""Largest difference, relative to the largest output, between two double-precision runs of one function."""


def masks(axes: Axes, keep: Keep) -> Edit:
    """An edit that zeroes removed units wherever a contraction sums over them: in a weight only if activations do not suffice."""
    spots: dict[tuple[fx.Node, fx.Node], list[tuple[int, Tensor]]] = defaultdict(list)
    summed = [use for use in axes.uses if use.role == "contracted" and use.axis.shrinks(keep)]
    active = {(use.node, use.axis) for use in summed if use.operand.op != "placeholder"}
    for use in summed:
        if use.operand.op != "placeholder" or use.apart or (use.node, use.axis) not in active:
            whole = axes.nodes[use.operand][use.dim]
            spots[use.node, use.operand].append((use.dim, _mask(whole, use.axis, keep)))

    def edit(node: fx.Node, operand: fx.Node, value: Any) -> Any:
        for dim, mask in spots.get((node, operand), ()):
            shape = [-1 if d == dim else 1 for d in range(value.ndim)]
            value = value * (mask.to(value) if isinstance(value, Tensor) else mask).reshape(shape)
        return value

    return edit


def _mask(whole: Axis, part: Axis, keep: Keep) -> Tensor:
    mask = torch.zeros(whole.size)
    mask[whole.kept({factor: units for factor, units in keep.items() if factor in part.factors})] = 1
    return mask


def masked_outputs(axes: Axes, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep) -> list[Tensor]:
    """What the original computes without the removed units, in double precision."""
    return tensors_in(execute(axes.trace, tensors, inputs, dtype=torch.float64, edit=masks(axes, keep)))


def smaller_outputs(axes: Axes, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep) -> list[Tensor]:
    """What the cut tensors compute, in double precision."""
    cut = smaller(axes, tensors, keep, held=False)
    return tensors_in(execute(axes.trace, cut.tensors, inputs, graph=cut.graph, dtype=torch.float64))


def check_masked(
    groups: Groups, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep, cut: Smaller | None = None
) -> float:
    """Check the exact part of a cut against the masked original, on the given inputs, and on random ones where those say little:
    where they are all the same number, or all that comes out of the model is zero.

    ``cut`` is the smaller computation where it is at hand. Returns the largest difference. Raises RuleBug naming the first
    group that fails on its own.
    """
    return checked(groups, tensors, inputs, keep, None if cut is None else lambda: cut)[0]


def checked(
    groups: Groups, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep, cut: Callable[[], Smaller] | None = None
) -> tuple[float, Sequence[Tensor] | None]:
    """The same; also what the smaller computation gives on the inputs, in double precision, where all of the cut was checked.

    ``cut`` is asked for when the original, whose weights take the most room, has been run.
    """
    exact = {group.factor: keep[group.factor] for group in groups if group.exact and group.factor in keep}
    if not exact or any(tensor.is_meta for tensor in tensors.values()):
        return 0.0, None
    whole, example = len(exact) == len(keep), inputs
    worst, outputs = _gap(groups.axes, tensors, example, exact, cut if whole else None)
    if worst <= TOLERANCE and _says_little(inputs, outputs):
        example = _random(inputs)
        worst = max(worst, _gap(groups.axes, tensors, example, exact, cut if whole else None)[0])
    if worst > TOLERANCE:
        for tensor in masked_outputs(groups.axes, tensors, example, {}) if worst == float("inf") else ():
            check_finite(tensor)
        raise RuleBug(
            f"the smaller model does not compute what the masked original does (difference {worst:.1e})",
            at=_culprit(groups, tensors, example, exact),
            why="an axis rule is wrong for this model; nothing was written",
            fix="protect that group, and please report it",
        )
    drawn = any(map(is_drawn, groups.axes.trace.graph.nodes))
    return worst, outputs if whole and not drawn else None


def _gap(
    axes: Axes,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Any],
    keep: Keep,
    cut: Callable[[], Smaller] | None = None,
) -> tuple[float, Sequence[Tensor]]:
    """The difference between the smaller computation and the masked original, and what the former gives."""
    large = max(1 << 20, int(LARGE * sum(tensor.nbytes for tensor in tensors.values())))
    with given_back(large):
        wanted = masked_outputs(axes, tensors, inputs, keep)
        left = smaller(axes, tensors, keep, held=False) if cut is None else cut()
        found = tensors_in(execute(axes.trace, left.tensors, inputs, graph=left.graph, dtype=torch.float64))
    return difference(found, wanted), found


def _culprit(groups: Groups, tensors: Mapping[str, Tensor], inputs: Sequence[Any], keep: Keep) -> str:
    alone = ((group.name, {group.factor: keep[group.factor]}) for group in groups if group.factor in keep)
    return next(
        (name for name, only in alone if _gap(groups.axes, tensors, inputs, only)[0] > TOLERANCE), "several groups together"
    )


def _says_little(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> bool:
    """Whether reals that go in are all the same number, which hides what is done to them, or all that comes out is zero."""
    reals = [value.flatten() for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return any(bool((row == row[:1]).all()) for row in reals) or not any(tensor.any() for tensor in outputs)


def _random(inputs: Sequence[Any]) -> list[Any]:
    """Inputs of the same shapes and ranges: tokens shuffled, reals drawn anew."""
    draw = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=draw).to(value)
        flat = value.flatten()
        return flat[torch.randperm(len(flat), generator=draw).to(flat.device)].reshape(value.shape)

    return [other(value) for value in inputs]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model is held to: its ``outputs``, and what it gives ``exactly``, in double precision, where that can be had.

    Where the latter is ``known``, that alone does for a model that comes as close to it as two orders of operations may.
    """

    outputs: Callable[[], Sequence[Tensor]]
    exactly: Callable[[], Sequence[Tensor]] | None = None
    known: bool = False

    def agrees(self, found: Sequence[Tensor]) -> bool:
        """Whether outputs differ from these by no more than rounding; how much that is, is measured where it matters."""
        limit = max((SURE.get(tensor.dtype, LOOSE) for tensor in found), default=0.0)
        if self.known and self.exactly is not None and difference(found, self.exactly()) <= limit:
            return True
        gap = difference(found, self.outputs())
        if gap <= limit or gap > ROUNDINGS * ROUNDINGS * LOOSE:
            return gap <= limit
        return gap <= (LOOSE if self.exactly is None else ROUNDINGS * difference(self.outputs(), self.exactly()))


def reference(
    trace: Trace, tensors: Mapping[str, Tensor], inputs: Sequence[Any], graph: fx.Graph, exact: Sequence[Tensor] | None = None
) -> Reference:
    """What a graph computes; with its ``exact`` outputs at hand, its own are computed if they are ever asked for."""
    run = partial(execute, trace, tensors, inputs, graph=graph)
    device = next((tensor.device for tensor in tensors.values()), CPU)

    @cache
    def outputs() -> Sequence[Tensor]:
        with drawing(SEED, device), torch._C.DisableTorchFunction():
            return tensors_in(run())

    if exact is not None:
        return Reference(outputs, lambda: exact, known=True)
    outputs()
    return Reference(outputs, None if any(map(is_drawn, graph.nodes)) else lambda: tensors_in(run(dtype=torch.float64)))


def close(emitted: torch.nn.Module, inputs: Inputs, wanted: Reference) -> bool:
    """Whether an emitted model computes the reference outputs, within what its precision allows; False when it cannot run."""
    try:
        return computes(emitted, inputs, wanted)
    except Exception:  # noqa: BLE001  a wrong guess at a size may fail in any way
        return False


@torch.no_grad()
def computes(emitted: torch.nn.Module, inputs: Inputs, wanted: Reference) -> bool:
    """The same, but what the model raises is raised. Experts are run as the model runs them, however they were traced."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, beside(as_call(inputs), where(emitted)))
    with exportable(emitted, experts=None), drawing(SEED, where(emitted)), untouched(emitted):
        return wanted.agrees(tensors_in(emitted(*args, **kwargs)))


def check_traced(model: torch.nn.Module, trace: Trace, tensors: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Check that a trace computes what its model does: where only the graph is wanted, nothing else would tell."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    if not close(model, inputs, reference(trace, tensors, trace.flatten(inputs), trace.graph)):
        raise ModelLimit(
            f"the graph of {trace.name} does not compute what the model does",
            why="its forward depends on something that no trace sees: a state outside its tensors, a value of the inputs",
            fix='emit="module", which is held to the model itself',
        )


def says_little_of(model: torch.nn.Module, trace: Trace) -> bool:
    """Whether outputs would hardly tell how a model computes: of half precision, whole numbers, or of one position."""
    half = any(t.is_floating_point() and t.dtype.itemsize < torch.float32.itemsize for t in model.parameters())
    (output,) = (node for node in trace.graph.nodes if node.op == "output")
    given = [node.meta["val"] for node in output.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    short = any(isinstance(x, Tensor) and x.dtype == torch.long and x.shape[1:] == (1,) for x in trace.example)
    return half or short or not any(value.is_floating_point() for value in given)


def decodes(model: torch.nn.Module, inputs: Inputs) -> Callable[[torch.nn.Module], bool]:
    """Whether a smaller model, too, says in two passes, the second upon the cache of the first, what it says in one.

    Some numbers that are no sizes, a layer's own say, count only there. Nothing is asked where ``model`` itself has no cache.
    """
    theirs = _with_cache(model, inputs)

    def alike(emitted: torch.nn.Module) -> bool:
        mine = _with_cache(emitted, inputs) if theirs <= LOOSE else 0.0
        return mine <= max(ROUNDINGS * theirs, SURE[torch.float32])

    return alike


@torch.no_grad()
def _with_cache(model: torch.nn.Module, inputs: Inputs) -> float:
    """The difference between two passes with a cache and one without, infinite where there is none."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) and len(inputs) == 1 else None
    if ids is None or ids.shape[1] < 2 * PROMPT:
        return float("inf")
    ids = beside(ids, where(model))
    prompt, rest = ids[:1, :PROMPT], ids[:1, PROMPT : 2 * PROMPT]
    try:
        with drawing(SEED, ids.device):
            whole = model(torch.cat([prompt, rest], 1), use_cache=False).logits[:, PROMPT:]
            cache = model(prompt, use_cache=True).past_key_values
            return difference([model(rest, past_key_values=cache, use_cache=True).logits], [whole])
    except Exception:  # noqa: BLE001  a model without a cache says so in its own way, a wrong guess may fail in any
        return float("inf")
