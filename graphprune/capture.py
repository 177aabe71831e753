"""A model and calibration inputs in, statistics out: gradients as they appear, and what flows into every consumer.

Nothing is kept that a visitor does not keep: a gradient is handed over and freed before the next one exists, an activation is
seen while the graph is walked and dropped after its last use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from graphprune.axes import Axis, Place
from graphprune.calls import operation
from graphprune.data import logits_of
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import Abreast, tensors_of
from graphprune.groups import Groups
from graphprune.propagate import Axes
from graphprune.ranks import dealt, summed
from graphprune.trace import Trace

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``loss(model, inputs)``: a scalar to differentiate."""

SeeGradient = Callable[[str, nn.Parameter, Tensor], None]
"""``see(name, parameter, gradient)``, called once a parameter and backward pass; the gradient is freed afterwards.

It comes in float32 or better, whatever the weight is in.
"""


def language_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean next-token cross-entropy of ``input_ids`` (rows, length); a masked or other model's own loss on given labels.

    Raises ModelLimit when the model gives neither logits nor a loss.
    """
    output = model(**inputs)
    if getattr(output, "loss", None) is not None:
        found: Tensor = output.loss
        return found
    logits = logits_of(output)
    if "input_ids" not in inputs or logits.shape[1] != inputs["input_ids"].shape[1]:
        raise ModelLimit("no loss is known for this model", fix="pass loss=, a function of (model, inputs)")
    precise = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(precise, inputs["input_ids"][:, 1:].flatten())


def see_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    see: SeeGradient,
    *,
    names: Collection[str] | None = None,
    loss: Loss = language_loss,
) -> None:
    """Run forward and backward on each batch and hand every gradient over as soon as it is complete.

    ``names`` limits which parameters get one. The peak is weights, activations and one parameter's gradient. Modes, flags and
    gradients of the model are left as they were. A transformers model on which ``activation_checkpointing_enable()`` was called
    computes the activations within its layers twice instead of keeping them.
    """
    with _only_gradients_of(model, names) as parameters, _checkpointed(model):
        hooks = [_hand_over(name, parameter, see) for name, parameter in parameters.items()]
        try:
            for inputs in batches:
                loss(model, inputs).backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()


def one_by_one(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row of every batch as a batch of its own: what per-sample gradients are taken of."""
    for inputs in batches:
        rows = max((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), default=0)
        for row in range(rows):
            yield {k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}


def _hand_over(name: str, parameter: nn.Parameter, see: SeeGradient) -> Any:
    def hook(leaf: Tensor) -> None:
        if leaf.grad is not None:
            see(name, parameter, leaf.grad.to(torch.promote_types(leaf.grad.dtype, torch.float32)))
            leaf.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


@contextmanager
def _only_gradients_of(model: nn.Module, names: Collection[str] | None) -> Iterator[dict[str, nn.Parameter]]:
    named = dict(model.named_parameters())
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in named.items()}
    modes = {module: module.training for module in model.modules()}
    chosen = {name: p for name, p in named.items() if (names is None or name in names) and p.is_floating_point()}
    try:
        model.eval()
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in chosen)
        with torch.enable_grad():
            yield chosen
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name][0])
            parameter.grad = before[name][1]
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers that are marked for checkpointing do it in evaluation mode too, and keep no key-value cache."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config is not None and cached:
            config.use_cache = False
        yield
    finally:
        for layer in layers:
            del layer.forward
        if config is not None and cached:
            config.use_cache = cached


def see_output_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    see: Callable[[str, Tensor], None],
    *,
    modules: Collection[str],
    loss: Loss = language_loss,
) -> None:
    """Run forward and backward on each batch and show ∂loss/∂output of each named module that gives one tensor, in its shape."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output.register_hook(lambda gradient: see(name, gradient))

        return hook

    first = next(iter(dict(model.named_parameters())))
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        see_gradients(model, batches, lambda *_: None, names=[first], loss=loss)
    finally:
        for hook in hooks:
            hook.remove()


# ── activations ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Consumer:
    """A contraction of an activation with a weight: where ``weight``'s dimension ``dim`` meets ``operand``'s last one."""

    node: fx.Node
    operand: fx.Node
    place: int
    weight: str
    dim: int
    axis: Axis


SeeInput = Callable[[Consumer, Tensor], None]
"""``see(consumer, x)`` with x of shape (positions, width): every input vector of one consumer in one batch."""


def consumers(axes: Axes) -> tuple[Consumer, ...]:
    """Every place where a weight contracts an activation, in execution order (a tied weight may appear twice)."""
    weights = _weights(axes)
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
                    found.append(Consumer(node, other.operand, other.dim, name, dim, mine.axis))
    return tuple(found)


def _weights(axes: Axes) -> dict[fx.Node, tuple[str, bool]]:
    """The nodes that are a weight, and whether they are it turned (``x @ weight.T``)."""
    found: dict[fx.Node, tuple[str, bool]] = {}
    for node in axes.trace.graph.nodes:
        tensor = axes.trace.tensors.get(node.name)
        if node.op == "placeholder" and tensor is not None:
            found[node] = (tensor.name, False)
        for operand in node.all_input_nodes[:1]:
            name, turned = found.get(operand, ("", False))
            if name and len(axes.tensors[name]) == 2 and _is_turned(node):
                found[node] = (name, not turned)
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
            whole = isinstance(groups.axes.tensors[group.members[0].name][group.members[0].dim], Place)
            why = "its units are whole pieces" if whole else "its units meet only other activations"
            fix = "score it by magnitude, taylor or short_gpt" if whole else "leave this kind out, or use a gradient"
            raise ModelLimit(f"{group.name} is read by no weight", why=why, fix=fix)
    return found


@dataclass(frozen=True, slots=True)
class Power:
    """What one consumer reads, over all positions of all batches: mean and mean square of each input, (width,), float64."""

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance of each input."""
        return (self.square - self.mean.square()).clamp_min(0)


def input_power(model: nn.Module, groups: Groups, batches: Iterable[Mapping[str, Any]]) -> dict[Consumer, Power]:
    """First and second moments of what flows into every consumer of every group, over the batches of all ranks."""
    wanted = dict.fromkeys(consumer for found in readers(groups).values() for consumer in found)
    number = {consumer: i for i, consumer in enumerate(wanted)}
    sums: dict[int, Tensor] = {}

    def see(consumer: Consumer, x: Tensor) -> None:
        if consumer in number:
            count = torch.full((1, x.shape[1]), float(len(x)), dtype=torch.float64, device=x.device)
            parts = torch.cat([x.sum(0, dtype=torch.float64)[None], x.double().square().sum(0)[None], count])
            sums[number[consumer]] = sums[number[consumer]] + parts if number[consumer] in sums else parts

    axes = groups.axes
    mine = dealt(fitted(axes.trace, batches))
    see_inputs(axes, tensors_of(model, axes.trace), mine, see, wanted={consumer.weight for consumer in wanted})
    totals = summed(sums)
    return {consumer: Power(*(totals[i][:2] / totals[i][2])) for consumer, i in number.items()}


def see_inputs(
    axes: Axes,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any]],
    see: SeeInput,
    *,
    wanted: Collection[str] | None = None,
) -> None:
    """Walk the traced graph on each batch and show what flows into each consumer of a wanted weight; batches in their order.

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
    walk = Abreast(axes.trace, tensors, list(fitted(axes.trace, batches)), nodes[: last + 1], look)
    for stretch in walk.stretches(nodes[: last + 1]):
        walk.run(stretch)


def fitted(trace: Trace, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Batches as flat inputs of the traced shapes, rows dealt anew where a batch has more or fewer."""
    waiting: list[tuple[Any, ...]] = []
    for inputs in batches:
        flat = trace.flatten(inputs)
        if _shapes(flat) == _shapes(trace.example):
            yield flat
        else:
            _refuse_strangers(trace, flat)
            waiting.append(flat)
    if waiting:
        joined = [torch.cat(column) for column in zip(*waiting, strict=True)]
        dealt = [torch.split(column, len(like)) for column, like in zip(joined, trace.example, strict=True)]
        yield from (batch for batch in zip(*dealt, strict=True) if _shapes(batch) == _shapes(trace.example))


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
            fix="leave example_inputs out: the first calibration batch is then the example",
        )
