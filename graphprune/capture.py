"""A graph and calibration inputs in, what flows into every consumer out: seen as it appears, dropped after its last use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.abreast import Abreast
from graphprune.axes import Axis, UnitAxis
from graphprune.calls import operation
from graphprune.disk import rows
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import tensors_of
from graphprune.experts import gathers
from graphprune.groups import Groups
from graphprune.propagate import Axes
from graphprune.ranks import dealt, summed
from graphprune.score import Each, profile
from graphprune.trace import Trace


@dataclass(frozen=True, slots=True)
class Consumer:
    """A contraction of an activation with a weight: where ``weight``'s dimension ``dim`` meets ``operand``'s dimension ``place``.

    ``axis`` is what is summed over, ``width`` all of the operand's dimension: a grouped convolution sums over a part of it, each
    group over its own.
    """

    node: fx.Node
    operand: fx.Node
    place: int
    weight: str
    dim: int
    axis: Axis
    width: Axis


SeeInput = Callable[[Consumer, Tensor], None]
"""``see(consumer, x)`` with x of shape (positions, width): every input vector of one consumer in one batch."""


def consumers(axes: Axes, *, experts: bool = True) -> tuple[Consumer, ...]:
    """Every place where a weight contracts an activation, in execution order (a tied weight may appear twice).

    ``experts``: also where each row meets its own matrix of a stack, which then counts as one weight that all rows meet.
    """
    weights = _weights(axes, experts)
    met: dict[fx.Node, list[Any]] = defaultdict(list)
    for use in axes.uses:
        if use.role == "contracted":
            met[use.node].append(use)
    found = []
    for node, uses in met.items():
        for mine in uses:
            for other in uses:
                if mine.operand in weights and other.operand not in weights and mine.axis == other.axis:
                    name, turned = weights[mine.operand]
                    dim = 1 - mine.dim if turned else mine.dim
                    width = axes.nodes[other.operand][other.dim]
                    found.append(Consumer(node, other.operand, other.dim, name, dim, mine.axis, width))
    return tuple(found)


def _weights(axes: Axes, experts: bool) -> dict[fx.Node, tuple[str, bool]]:
    """The nodes that are a weight, or its matrices one a row, and whether they are it turned (``x @ weight.T``)."""
    found: dict[fx.Node, tuple[str, bool]] = {}
    for node in axes.trace.graph.nodes:
        tensor = axes.trace.tensors.get(node.name)
        if node.op == "placeholder" and tensor is not None:
            found[node] = (tensor.name, False)
        for operand in node.all_input_nodes[:1]:
            name, turned = found.get(operand, ("", False))
            if name and len(axes.tensors[name]) == 2 and _is_turned(node):
                found[node] = (name, not turned)
            elif name and experts and gathers(node):
                found[node] = (name, False)
    return found


def _is_turned(node: fx.Node) -> bool:
    """Whether a node is its matrix with rows as columns."""
    name = operation(node)
    given: Any = node.args[1:]
    if name == "permute":
        return [dim % 2 for dim in given[0]] == [1, 0]
    return name in ("t", "numpy_T", "mT") or (name == "transpose" and {dim % 2 for dim in given} == {0, 1})


def reading(groups: Groups) -> dict[str, tuple[Consumer, ...]]:
    """For each group, the contractions with a weight that read its units; none for a group whose units meet no weight."""
    everywhere = consumers(groups.axes)
    found = {}
    for group in groups:
        consuming = {(member.name, member.dim) for member in group.members if member.role == "consumes"}
        mine = (c for c in everywhere if (c.weight, c.dim) in consuming and group.factor in c.axis.factors)
        found[group.name] = tuple(mine)
    return found


def readers(groups: Groups) -> dict[str, tuple[Consumer, ...]]:
    """The same. Raises ModelLimit for a group that has none."""
    found = reading(groups)
    for group in groups:
        if not found[group.name]:
            whole = isinstance(groups.axes.tensors[group.members[0].name][group.members[0].dim], UnitAxis)
            why = "its units are whole pieces" if whole else "its units meet only other activations"
            fix = "score it by magnitude, taylor or short_gpt" if whole else "leave this kind out, or use a gradient"
            raise ModelLimit(f"{group.name} is read by no weight", why=why, fix=fix)
    return found


def columns(reader: Consumer, weight: Tensor, each: Each) -> Tensor:
    """``each`` of a weight summed over all that reads one input: (width,), float64. What reads an input of a grouped convolution
    is its own group."""
    groups = reader.width.size // weight.shape[reader.dim]
    if groups == 1:
        return profile(weight, reader.dim, each)
    step = len(weight) // groups
    return torch.cat([profile(rows(weight, start, start + step), reader.dim, each) for start in range(0, len(weight), step)])


@dataclass(frozen=True, slots=True)
class Power:
    """What one consumer reads, over all positions of all batches: mean (parts, width), of complex numbers both parts', and mean
    square (width,) of each input, float64."""

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance of each input."""
        return (self.square - self.mean.square().sum(0)).clamp_min(0)


def input_power(model: nn.Module, groups: Groups, batches: Iterable[Mapping[str, Any]]) -> dict[Consumer, Power]:
    """First and second moments of what flows into every consumer of every group, over the batches of all ranks."""
    wanted = dict.fromkeys(consumer for found in readers(groups).values() for consumer in found)
    number = {consumer: i for i, consumer in enumerate(wanted)}
    sums: dict[int, Tensor] = {}

    def see(consumer: Consumer, x: Tensor) -> None:
        if consumer in number:
            numbers = [x.real, x.imag] if x.is_complex() else [x]
            means = [part.sum(0, dtype=torch.float64) for part in numbers]
            square = torch.stack([part.double().square().sum(0) for part in numbers]).sum(0)
            parts = torch.stack([*means, square, torch.full_like(square, len(x))])
            sums[number[consumer]] = sums[number[consumer]] + parts if number[consumer] in sums else parts

    axes = groups.axes
    see_inputs(axes, tensors_of(model, axes.trace), batches, see, wanted={consumer.weight for consumer in wanted})
    totals = summed(sums)
    means = {consumer: totals[i][:-1] / totals[i][-1] for consumer, i in number.items()}
    return {consumer: Power(found[:-1], found[-1]) for consumer, found in means.items()}


def see_inputs(
    axes: Axes,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any]],
    see: SeeInput,
    *,
    wanted: Collection[str] | None = None,
) -> None:
    """Walk the traced graph on each batch that this rank is dealt and show what flows into each consumer of a wanted weight;
    batches in their order.

    Rows are dealt into batches of the traced shape; those left over are not seen. Weights that lie in files or are spread over
    ranks are read once, a few at a time. Raises UserMistake where no batch fits.
    """
    by_node: dict[tuple[fx.Node, fx.Node], list[Consumer]] = defaultdict(list)
    for consumer in consumers(axes):
        if wanted is None or consumer.weight in wanted:
            by_node[consumer.node, consumer.operand].append(consumer)

    def look(node: fx.Node, operand: fx.Node, value: Any) -> Any:
        for consumer in by_node.get((node, operand), ()):
            see(consumer, value.movedim(consumer.place, -1).flatten(0, -2))
        return value

    nodes, reading = list(axes.trace.graph.nodes), {node for node, _ in by_node}
    last = max((place for place, node in enumerate(nodes) if node in reading), default=-1)
    walk = Abreast(axes.trace, tensors, dealt(fitted(axes.trace, batches)), nodes[: last + 1], look)
    for stretch in walk.stretches(nodes[: last + 1]):
        walk.run(stretch)


def fitted(trace: Trace, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Batches as flat inputs of the traced shapes, rows dealt anew where a batch has more or fewer; those left over are left out.

    Raises UserMistake where there are too few rows for one batch.
    """
    waiting: list[tuple[Any, ...]] = []
    count = 0
    for inputs in batches:
        flat = trace.flatten(inputs)
        if _shapes(flat) == _shapes(trace.example):
            count += 1
            yield flat
        else:
            _refuse_strangers(trace, flat)
            waiting.append(flat)
    if waiting:
        joined = [torch.cat(column) for column in zip(*waiting, strict=True)]
        dealt = [torch.split(column, len(like)) for column, like in zip(joined, trace.example, strict=True)]
        whole = [batch for batch in zip(*dealt, strict=True) if _shapes(batch) == _shapes(trace.example)]
        count += len(whole)
        yield from whole
    if not count:
        shapes = f"the model was traced on {_shapes(trace.example)}"
        raise UserMistake("too few calibration rows for one batch", why=shapes, fix="give more samples, or trace on fewer rows")


def _shapes(flat: Iterable[Any]) -> list[Any]:
    return [tuple(value.shape) if isinstance(value, Tensor) else value for value in flat]


def _refuse_strangers(trace: Trace, flat: tuple[Any, ...]) -> None:
    """Raise UserMistake unless the inputs differ from the traced ones in their number of rows only."""
    if len(flat) != len(trace.example) or any(
        not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape[1:] != other.shape[1:]
        for one, other in zip(flat, trace.example, strict=False)
    ):
        raise UserMistake(
            "calibration inputs do not look like the example inputs",
            why=f"{_shapes(flat)}, where the model was traced on {_shapes(trace.example)}",
            fix="batches alike but for their rows, and no other example_inputs: the first batch is then the example",
        )
