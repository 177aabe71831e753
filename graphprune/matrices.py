"""Axes in, matrices out: every place where the graph multiplies an activation by a weight, seen as (rows × inputs).

A linear layer, a transposed ``Conv1D``, a convolution (its patches are the inputs), a stack of experts: all are batches of one
matrix product, so a method written for a matrix works for each of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx
from torch.nn.functional import pad

from graphprune.calls import all_arguments, operation
from graphprune.capture import consumers
from graphprune.propagate import Axes

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")


@dataclass(frozen=True, slots=True)
class Contracted:
    """How a product's weight and activation are laid out: which dimensions are summed over, and which are batched."""

    inputs: int
    place: int
    batch: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (batch, rows, inputs), a view where strides allow."""
        batch = prod(weight.shape[dim] for dim in self.batch)
        return weight.permute(self._order(weight.ndim)).reshape(batch, -1, weight.shape[self.inputs])

    def restored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(batch, rows, inputs) back in the layout of ``weight``."""
        order = self._order(weight.ndim)
        back = [order.index(dim) for dim in range(weight.ndim)]
        return matrix.reshape([weight.shape[dim] for dim in order]).permute(back)

    def vectors(self, value: Tensor) -> Tensor:
        """Every input vector in an activation: (batch, positions, inputs)."""
        rest = [dim for dim in range(value.ndim) if dim not in (*self.places, self.place)]
        batch = prod(value.shape[dim] for dim in self.places)
        return value.permute(*self.places, *rest, self.place).reshape(batch, -1, value.shape[self.place])

    def _order(self, ndim: int) -> list[int]:
        return [*self.batch, *(dim for dim in range(ndim) if dim not in (*self.batch, self.inputs)), self.inputs]


@dataclass(frozen=True, slots=True)
class Convolved:
    """A convolution as a product: each group is a matrix, each patch an input vector in (channel, kernel) order."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def inputs(self) -> int:
        """The kernel's dimension that is summed over, beside space."""
        return 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The kernel as (groups, rows, channels · kernel)."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def restored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Back in the kernel's shape."""
        return matrix.reshape(weight.shape)

    def vectors(self, value: Tensor) -> Tensor:
        """Every patch: (groups, positions, channels · kernel)."""
        space = len(self.kernel)
        value = value if value.ndim == space + 2 else value.unsqueeze(0)
        value = pad(value, [side for sides in reversed(self.padding) for side in sides])
        for dim, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            value = value.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        value = value.reshape(len(value), self.groups, -1, *value.shape[2:])
        order = [1, 0, *range(3, 3 + space), 2, *range(3 + space, 3 + 2 * space)]
        return value.permute(order).flatten(3 + space - 1).flatten(1, 1 + space)


@dataclass(frozen=True, slots=True)
class Transposed(Convolved):
    """A transposed convolution as the convolution that it is, kernel turned round, of an input ``spread`` out among zeros.

    ``stride`` and ``padding`` are those of that convolution: steps of one, and what the input is surrounded by once spread out.
    """

    spread: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """The kernel's dimension that is summed over, beside space."""
        return 0

    def matrix(self, weight: Tensor) -> Tensor:
        """The kernel as (groups, rows, channels · kernel)."""
        return Convolved.matrix(self, self._turned(weight))

    def restored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Back in the kernel's shape."""
        return self._turned(matrix.reshape(-1, weight.shape[0] // self.groups, *self.kernel))

    def vectors(self, value: Tensor) -> Tensor:
        """What meets in each point of the output: (groups, positions, channels · kernel)."""
        space = len(self.spread)
        sizes = ((size - 1) * step + 1 for size, step in zip(value.shape[-space:], self.spread, strict=True))
        spread = value.new_zeros([*value.shape[:-space], *sizes])
        places: Any = (..., *(slice(None, None, step) for step in self.spread))
        spread[places] = value
        return Convolved.vectors(self, spread)

    def _turned(self, weight: Tensor) -> Tensor:
        """(groups · one, other, kernel) → (groups · other, one, kernel), space backwards; its own inverse."""
        parts = weight.reshape(self.groups, -1, *weight.shape[1:])
        return parts.transpose(1, 2).flatten(0, 1).flip(tuple(range(2, weight.ndim)))


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication of an activation (``operand``) by a parameter (``weight``, by its traced name) at ``node``.

    Where a stack of experts reads sorted rows, ``stops`` is the node that says where each expert's rows end.
    """

    node: fx.Node
    operand: fx.Node
    weight: str
    layout: Contracted | Convolved
    stops: fx.Node | None = None


def products(axes: Axes, *, routed: bool = False) -> tuple[Product, ...]:
    """Every product with a real parameter, in execution order; a shared weight appears once a use. ``routed``: of experts too."""
    found = [*_convolutions(axes), *_contractions(axes), *(_routed(axes) if routed else ())]
    place = {node: i for i, node in enumerate(axes.trace.graph.nodes)}
    real = (product for product in found if not axes.trace.parameters[product.weight].dtype.is_complex)
    return tuple(sorted(real, key=lambda product: place[product.node]))


def _contractions(axes: Axes) -> list[Product]:
    batches: dict[tuple[fx.Node, fx.Node], list[Any]] = defaultdict(list)
    for use in axes.uses:
        if use.role == "batch":
            batches[use.node, use.operand].append(use)
    placeholders = {axes.trace.tensors[node.name].name: node for node in _weights(axes)}
    found = []
    for consumer in consumers(axes, experts=False):
        if consumer.weight not in axes.trace.parameters or _convolution(consumer.node) is not None:
            continue
        mine, theirs = (batches[consumer.node, operand] for operand in (placeholders[consumer.weight], consumer.operand))
        pairs = [(one.dim, other.dim) for one in mine for other in theirs if one.axis == other.axis]
        layout = Contracted(consumer.dim, consumer.place, tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        if len(axes.tensors[consumer.weight]) > 1 and len(pairs) == len(mine):
            found.append(Product(consumer.node, consumer.operand, consumer.weight, layout))
    return found


def _weights(axes: Axes) -> list[fx.Node]:
    return [node for node in axes.trace.graph.nodes if node.op == "placeholder" and node.name in axes.trace.tensors]


def _convolutions(axes: Axes) -> list[Product]:
    found = []
    for node in axes.trace.graph.nodes:
        given = _convolution(node)
        if given is None or given["weight"].name not in axes.trace.tensors:
            continue
        traced = axes.trace.tensors[given["weight"].name]
        if traced.kind == "parameter":
            found.append(Product(node, given["input"], traced.name, _layout(given, traced.shape[2:])))
    return found


def _routed(axes: Axes) -> list[Product]:
    """Products of sorted rows with a stack of matrices, each applied to its own run of rows."""
    found = []
    for node in axes.trace.graph.nodes:
        if node.op != "call_function" or "grouped_mm" not in str(node.target) or len(node.args) < 3:
            continue
        operand, weight, stops = node.args[:3]
        turned = False
        while weight.op == "call_function" and "transpose" in str(weight.target):
            weight, turned = weight.args[0], not turned
        traced = axes.trace.tensors.get(weight.name)
        if traced is not None and traced.kind == "parameter" and len(traced.shape) == 3:
            found.append(Product(node, operand, traced.name, Contracted(2 if turned else 1, 1, (0,)), stops))
    return found


def _convolution(node: fx.Node) -> Mapping[str, Any] | None:
    """The arguments of a convolution by name, with whether it is ``transposed``; None for anything else."""
    if operation(node) not in CONVOLUTIONS:
        return None
    return {"transposed": "transpose" in operation(node)} | all_arguments(node)


def _layout(given: Mapping[str, Any], kernel: tuple[int, ...]) -> Convolved:
    space = len(kernel)
    stride, dilation = _spread(given["stride"], space), _spread(given["dilation"], space)
    if given["transposed"]:
        cut, more = _spread(given["padding"], space), _spread(given["output_padding"], space)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        around = tuple((r - c, r - c + m) for r, c, m in zip(reach, cut, more, strict=True))
        return Transposed(kernel, (1,) * space, around, dilation, int(given["groups"]), stride)
    if given["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _spread(0 if given["padding"] == "valid" else given["padding"], space))
    return Convolved(kernel, stride, padding, dilation, int(given["groups"]))


def _spread(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if len(values) == count else values * count


# ── what to leave alone ──────────────────────────────────────────────────────────────────────────────────────────────


def ends(axes: Axes) -> dict[str, str]:
    """Weights at the ends of a model, with the reason: what alone writes an output (a head), and what ranks (a router)."""
    weights = {product.weight for product in products(axes)}
    factors = {name: {factor for axis in axes.tensors[name] for factor in axis.factors} for name in weights}
    touching = Counter(factor for found in factors.values() for factor in found)
    ranked = {factor for use in axes.uses if use.role == "ranked" for factor in use.axis.factors}
    written = {factor for factor, reasons in axes.pins.items() if any(reason.what == "model output" for reason in reasons)}
    routers = {name: "its outputs are ranked" for name in weights if factors[name] & ranked}
    heads = {name: "it writes the model's output" for name in weights if any(touching[f] == 1 for f in factors[name] & written)}
    return routers | heads
