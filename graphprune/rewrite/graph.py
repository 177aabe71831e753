"""Axes and what each factor keeps in, the smaller computation out: tensors sliced, every literal that was a size re-derived.

Always possible, whatever Python attributes a model hides its sizes in; it is the reference every other emitter is held to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from operator import floordiv, mul
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.axes import Axis, Keep
from graphprune.calls import given_arguments, is_check, schema
from graphprune.computed import evaluated
from graphprune.errors import UserMistake
from graphprune.propagate import Axes
from graphprune.rewrite.admit import admission
from graphprune.rewrite.cut import Lazily, cut, cut_all
from graphprune.rules import Literal
from graphprune.trace import Trace, TracedTensor

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Smaller:
    """The smaller computation: the graph with its new sizes, and the tensors it reads."""

    graph: fx.Graph
    tensors: Mapping[str, Tensor]


def smaller(axes: Axes, tensors: Mapping[str, Tensor], keep: Keep, *, held: bool = True) -> Smaller:
    """What is left of a computation. Where nothing shrinks nothing is copied, unless ``held`` nothing before it is read."""
    return Smaller(resized_graph(axes, keep), cut_all(axes, tensors, keep) if held else Lazily(axes, tensors, keep))


def resized_graph(axes: Axes, keep: Keep) -> fx.Graph:
    """A copy of the traced graph whose literal sizes fit the cut tensors.

    What was a view may have to copy: attention kernels lay out their results differently for other widths.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in axes.trace.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            _follow(axes, node, copies[node], keep)
            if node.target is aten.view.default:
                copies[node].target = aten.reshape.default
            _choose(axes, node, copies[node], keep)
            if is_check(node) and _counts_less(axes, node.args[0], keep):
                copies[node].args = (True, *copies[node].args[1:])
    for node, value in evaluated(axes.trace, _sliced(axes, keep)):
        _spell_out(copies[node], cut(value, axes.nodes[node], keep))
    return graph


def resized_call(axes: Axes, node: fx.Node, keep: Keep) -> fx.Node:
    """One operation of the graph with its new literal sizes; each operand is a placeholder of the operand's name."""
    graph = fx.Graph()
    holders = {operand: graph.placeholder(operand.name) for operand in node.all_input_nodes}
    for operand, holder in holders.items():
        holder.target = operand.name
    copy = graph.node_copy(node, holders.__getitem__)
    _follow(axes, node, copy, keep)
    _choose(axes, node, copy, keep)
    return copy


def _sliced(axes: Axes, keep: Keep) -> frozenset[fx.Node]:
    """The constants that shrink, and those computed from what shrinks, which need their own values as they were."""
    found: set[fx.Node] = set()
    for node in axes.trace.graph.nodes:
        if node in axes.computed:
            own = _shrinks(axes.nodes[node], keep)
            if own or any(operand in found or _shrinks(axes.nodes[operand], keep) for operand in node.all_input_nodes):
                found.add(node)
    return frozenset(found)


def _shrinks(value: Any, keep: Keep) -> bool:
    return any(part.shrinks(keep) if isinstance(part, Axis) else _shrinks(part, keep) for part in value or ())


def _counts_less(axes: Axes, told: Any, keep: Keep) -> bool:
    """Whether a number, not a tensor, says how many elements something has of which fewer are left."""
    if not isinstance(told, fx.Node) or isinstance(told.meta.get("val"), Tensor):
        return False
    counted = [operand for operand in told.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)]
    less = any(_shrinks(axes.nodes[node], keep) for operand in counted for node in (operand, *operand.all_input_nodes))
    return less or any(_counts_less(axes, operand, keep) for operand in told.all_input_nodes)


def _spell_out(copy: fx.Node, value: Tensor) -> None:
    """A constant by its elements, in place of the operation that computed it."""
    traced = copy.meta["val"]
    copy.target, copy.args, copy.kwargs = torch.tensor, (value.tolist(),), {"dtype": traced.dtype, "device": traced.device}


def _choose(axes: Axes, node: fx.Node, copy: fx.Node, keep: Keep) -> None:
    """Where the result shrinks and what it is made of does not, the operation gives it whole; what survives is taken from that."""
    typed = axes.nodes[node]
    kept = [(dim, typed[dim].kept(keep)) for dim in axes.chosen.get(node, ()) if typed[dim].shrinks(keep)]
    if kept:
        whole: Any = copy.target
        copy.target, copy.args = survivors, (whole, kept, *copy.args)


def survivors(operation: Callable[..., Tensor], kept: Iterable[tuple[int, Sequence[int]]], *args: Any, **kwargs: Any) -> Tensor:
    """What an operation gives, but only the positions ``kept`` of some dimensions."""
    value = operation(*args, **kwargs)
    for dim, positions in kept:
        value = value.index_select(dim, torch.tensor(positions, device=value.device))
    return value


def _follow(axes: Axes, node: fx.Node, copy: fx.Node, keep: Keep) -> None:
    if node not in axes.literals:
        return
    literals, becomes = axes.literals[node]
    arguments = given_arguments(copy)
    changed = {lit.name: new for lit in literals if (new := _followed(axes, node, lit, arguments, keep)) is not None}
    if not changed:
        return
    for literal in literals:
        if literal.name in changed and literal.meaning == "sizes":
            changed[literal.name] = _open_sizes(copy, changed[literal.name], literal.axes, keep)
    arguments |= changed
    copy.target = becomes or node.target
    copy.args, copy.kwargs = (), {one.name: arguments[one.name] for one in schema(copy.target) if one.name in arguments}
    _positional(copy)


def _open_sizes(copy: fx.Node, sizes: list[Any], axes: Iterable[Axis], keep: Keep) -> list[Any]:
    """A size that the graph computes, of an open size and one that shrinks (``batch · heads``), scaled in the graph."""
    with copy.graph.inserting_before(copy):
        return [
            _scaled(copy.graph, size, axis.resized(keep), axis.size) if isinstance(size, fx.Node) and axis.shrinks(keep) else size
            for size, axis in zip(sizes, axes, strict=True)
        ]


def _scaled(graph: fx.Graph, size: fx.Node, new: int, old: int) -> fx.Node:
    shared = gcd(new, old)
    return graph.call_function(floordiv, (graph.call_function(mul, (size, new // shared)), old // shared))


def new_literals(axes: Axes, node: fx.Node, keep: Keep) -> Iterator[tuple[Any, Any]]:
    """Each literal size of ``node`` that changes, before and after; lists give their changed entries."""
    arguments = given_arguments(node)
    for literal in axes.literals[node][0]:
        before, after = arguments.get(literal.name), _followed(axes, node, literal, arguments, keep)
        if after is None or literal.meaning == "constant":
            continue
        if before is None and literal.meaning == "sizes":
            before = [axis.size for axis in literal.axes]
        if isinstance(before, list | tuple):
            yield from ((old, new) for old, new in zip(before, after, strict=False) if old != new)
        else:
            yield before, after


def spoken(axes: Axes, node: fx.Node) -> Iterator[int]:
    """Every size and position that ``node`` is told, changed or not."""
    arguments = given_arguments(node)
    for literal in axes.literals[node][0]:
        told = arguments.get(literal.name)
        yield from (number for number in (told if isinstance(told, list | tuple) else [told]) if isinstance(number, int))
        meant = {"sizes": literal.axes, "size": [literal.axes]}.get(literal.meaning, ())
        yield from (axis.size for axis in meant)


def _positional(node: fx.Node) -> None:
    """Arguments named ``self`` cannot be keywords of an fx call; leading arguments go by position."""
    args: list[Any] = []
    kwargs = dict(node.kwargs)
    for argument in schema(node.target):
        if argument.by_name or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    node.args, node.kwargs = tuple(args), kwargs


def _followed(axes: Axes, node: fx.Node, literal: Literal, arguments: Mapping[str, Any], keep: Keep) -> Any:
    """The literal's new value, None where it stays."""
    if literal.meaning == "constant":
        return literal.axes if _touched(axes, node, keep) else None
    if literal.meaning == "sizes":
        borrowed = literal.name not in arguments and any(_shrinks(axes.nodes[other], keep) for other in node.all_input_nodes[1:])
        return _sizes(arguments.get(literal.name), literal, keep, borrowed)
    if not literal.axes.shrinks(keep):
        return None
    if literal.meaning == "size":
        return literal.axes.resized(keep)
    return _position(arguments.get(literal.name), literal.axes, keep)


def _touched(axes: Axes, node: fx.Node, keep: Keep) -> bool:
    return any(_shrinks(axes.nodes[operand], keep) for operand in node.all_input_nodes)


def _sizes(given: Any, literal: Literal, keep: Keep, borrowed: bool) -> list[Any] | None:
    """A list of sizes, negative where counted backwards: integers follow their axes, -1 and symbols take care of themselves.

    ``borrowed`` from another operand that shrinks, they must be said even where they stay.
    """
    if not borrowed and all(not axis.shrinks(keep) for axis in literal.axes):
        return None
    if not isinstance(given, list | tuple):
        given = [axis.size for axis in literal.axes]
    return [
        size if not isinstance(size, int) or size == -1 or not axis.shrinks(keep) else axis.resized(keep) * (-1 if size < 0 else 1)
        for size, axis in zip(given, literal.axes, strict=True)
    ]


def _position(position: Any, axis: Axis, keep: Keep) -> Any:
    """How many survivors lie before a position; positions from the end and past it keep their meaning."""
    if not isinstance(position, int) or position >= axis.size:
        return None
    front = max(0, position + axis.size) if position < 0 else position
    return sum(index < front for index in axis.kept(keep))


class PrunedGraph(nn.Module):
    """The smaller model as a graph: parameters and buffers under their original names, called like the original.

    It is in evaluation mode, as it was traced, and takes what it was traced for: other sizes only where the trace left them open.
    """

    def __init__(self, trace: Trace, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.trace, self.admission = trace, admission(trace)
        root = nn.Module()
        for node in list(graph.nodes):
            traced = trace.tensors.get(node.name) if node.op == "placeholder" else None
            if traced is not None:
                _attach(root, traced, tensors[traced.name], traced.name in trace.trainable)
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.get_attr(traced.name))
                graph.erase_node(node)
            elif node.op == "get_attr" and not hasattr(root, str(node.target)):
                root.add_module(str(node.target), trace.module.get_submodule(str(node.target)))
        self.body = fx.GraphModule(root, graph)
        self.eval()

    @property
    def takes_one(self) -> bool:
        """Whether batches may have one row: they had when it was traced, or their size was left open."""
        return self.admission.takes_rows(1, self.trace.example)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's signature. Raises UserMistake on arguments that the graph was not traced for."""
        flat = self.admission.flat(args, kwargs, self._dtype)
        return pytree.tree_unflatten(list(pytree.tree_leaves(self.body(*flat))), self.trace.out_spec)

    def train(self, mode: bool = True) -> Self:
        """Raises UserMistake on another mode than the traced one: dropout and statistics would stay as they are."""
        if mode:
            why = "dropout and batch statistics were traced in evaluation mode, and are part of the graph"
            raise UserMistake("a graph has no training mode", why=why, fix='train it in evaluation mode, or emit="module"')
        return super().train(mode)

    def _dtype(self) -> torch.dtype | None:
        return next((parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()), None)


def _attach(root: nn.Module, traced: TracedTensor, tensor: Tensor, trains: bool) -> None:
    """Hang up a tensor under its name; one that was not cut is copied, so that the original keeps its own."""
    *path, leaf = traced.name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if hasattr(root, leaf):
        return
    held = tensor.detach().clone() if tuple(tensor.shape) == traced.shape else tensor.detach()
    if traced.kind == "parameter":
        root.register_parameter(leaf, nn.Parameter(held, requires_grad=trains))
    else:
        root.register_buffer(leaf, held)
