"""A model and its trace in, the same trace for less out: a block that repeats is traced once and written out again for its twins.

While a model is traced, the first call of each repeated block runs between two marks in the graph; a later call of a twin
becomes one opaque node. Twins have the same classes, the same plain attributes and tensors of the same shapes, and are called
with inputs of the same shapes. Attributes in which they differ (a layer's number) are taken away during the first call, so
that we hear of it when one is read: then only twins that agree on it count as the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from graphprune.twins import Attribute, Block, find_twins, is_plain, same

AUTOCAST = ("cpu", "cuda")
"""Devices for which autocast may be on or off."""

_library: Any = torch.library.Library("graphprune", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("enter(Tensor[] inputs, int call) -> ()")
_library.define("leave(Tensor[] inputs, Tensor[] outputs, int call) -> ()")
_library.define("again(Tensor[] inputs, Tensor[] like, int call) -> Tensor[]")
for _mark in ("enter", "leave"):
    _library.impl(_mark, lambda *_: None, "CompositeExplicitAutograd")
    has_side_effect(getattr(torch.ops.graphprune, _mark).default)
_library.impl("again", lambda inputs, like, call: [_empty(tensor) for tensor in like], "CompositeExplicitAutograd")
ENTER, LEAVE, AGAIN = (getattr(torch.ops.graphprune, name).default for name in ("enter", "leave", "again"))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class Call:
    """The call of a block that was traced. ``outputs`` are tensors, positions among the inputs, or plain constants."""

    number: int
    block: Block
    inputs: Any
    read: tuple[Attribute, ...]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec

    def repeats(self, block: Block, inputs: Any) -> bool:
        """Whether a call of a twin would do the same."""
        return inputs == self.inputs and all(same(block.reads(place), self.block.reads(place)) for place in self.read)


class Repeats:
    """The blocks of a model that have twins, and the calls seen so far."""

    def __init__(self, model: nn.Module, *, marked: bool) -> None:
        self.marked = marked
        self.families = find_twins(model)
        self.blocks = {id(vars(block.module)): (key, block) for key, twins in self.families.items() for block in twins}
        self.calls: dict[Any, list[Call]] = defaultdict(list)
        self.replays: dict[int, tuple[Call, Block]] = {}
        self.inside = False
        self.count = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Calls of twins go through us."""
        classes = {type(block.module) for twins in self.families.values() for block in twins}
        own = {cls: vars(cls).get("forward") for cls in classes}
        for cls in classes:
            cls.forward = self._watched(cls.forward)
        try:
            yield
        finally:
            for cls, forward in own.items():
                if forward is None:
                    del cls.forward
                else:
                    cls.forward = forward

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            family, block = self.blocks.get(id(vars(module)), (None, None))
            inputs, tensors = _described((args, kwargs))
            if block is None or self.inside or inputs is None or block.is_hooked():
                return forward(module, *args, **kwargs)
            key = family, torch.is_grad_enabled(), *map(torch.is_autocast_enabled, AUTOCAST)
            known = next((call for call in self.calls[key] if call.repeats(block, inputs)), None)
            if known is not None:
                return self._replay(known, block, tensors)
            return self._record(key, block, inputs, lambda: forward(module, *args, **kwargs), (args, kwargs), tensors)

        return watched

    def _record(self, key: Any, block: Block, inputs: Any, run: Callable[[], Any], given: Any, tensors: list[Tensor]) -> Any:
        """Run a block between marks; remember the call if nothing about it forbids to leave out the next."""
        number, self.count, self.inside = self.count, self.count + 1, True
        before = block.state()
        if self.marked:
            ENTER(tensors, number)
        try:
            with _listening(block) as read:
                result = run()
        finally:
            self.inside = False
        leaves, spec = pytree.tree_flatten(result)
        outputs = [_position(leaf, tensors) for leaf in leaves]
        if self.marked:
            LEAVE(tensors, [leaf for leaf in outputs if isinstance(leaf, Tensor)], number)
        if block.state() == before and _described(given)[0] == inputs and all(_is_output(leaf) for leaf in outputs):
            self.calls[key].append(Call(number, block, inputs, tuple(read), tuple(outputs), spec))
        return result

    def _replay(self, call: Call, block: Block, tensors: list[Tensor]) -> Any:
        number, self.count = self.count, self.count + 1
        self.replays[number] = call, block
        like = [leaf for leaf in call.outputs if isinstance(leaf, Tensor)]
        fresh = iter(AGAIN(tensors, like, number) if self.marked else map(_empty, like))
        leaves = [
            next(fresh) if isinstance(leaf, Tensor) else tensors[leaf.index] if isinstance(leaf, _Input) else leaf
            for leaf in call.outputs
        ]
        return pytree.tree_unflatten(leaves, call.spec)


@dataclass(frozen=True, slots=True)
class _Input:
    """An output that is one of the inputs."""

    index: int


def _position(leaf: Any, tensors: Sequence[Tensor]) -> Any:
    return next((_Input(i) for i, tensor in enumerate(tensors) if tensor is leaf), leaf)


def _is_output(leaf: Any) -> bool:
    return isinstance(leaf, _Input) or is_plain(leaf) or (isinstance(leaf, Tensor) and _numbers(leaf) is not None)


def _described(given: Any) -> tuple[Any, list[Tensor]]:
    """What a call's inputs have in common with those of another call that does the same, None where that cannot be told."""
    leaves, spec = pytree.tree_flatten(given)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    first = {id(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
    found = [(first[id(leaf)], _numbers(leaf)) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves]
    unknown = any(
        part[1] is None if isinstance(leaf, Tensor) else not is_plain(leaf) for leaf, part in zip(leaves, found, strict=True)
    )
    return None if unknown else (found, spec), tensors


def _numbers(tensor: Tensor) -> Any:
    """The layout of a tensor, None where a size is symbolic."""
    if tensor.layout is not torch.strided or not all(isinstance(size, int) for size in tensor.shape):
        return None
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


@contextmanager
def _listening(block: Block) -> Iterator[list[Attribute]]:
    """Collects which of the differing attributes are read."""
    homes = {id(vars(module)): path for path, module in block.inner.items()}
    hidden = {(path, name): vars(block.inner[path]).pop(name) for path, name in block.differing}
    read: list[Attribute] = []
    lookup = nn.Module.__getattr__

    def heard(module: nn.Module, name: str) -> Any:
        place = homes.get(id(vars(module)), ""), name
        if place not in hidden or id(vars(module)) not in homes:
            return lookup(module, name)
        if place not in read:
            read.append(place)
        return hidden[place]

    nn.Module.__getattr__ = heard  # type: ignore[method-assign]
    try:
        yield read
    finally:
        nn.Module.__getattr__ = lookup  # type: ignore[method-assign]
        for (path, name), value in hidden.items():
            vars(block.inner[path]).setdefault(name, value)


@contextmanager
def unwritten() -> Iterator[None]:
    """A graph on the way to the traced one is hardly ever run: its Python is written when it is."""
    write: Any = fx.GraphModule.recompile

    def later(module: Any) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            write(self)
            return self(*args, **kwargs)

        type(module).forward = forward

    fx.GraphModule.recompile = later  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        fx.GraphModule.recompile = write  # type: ignore[method-assign]


# ── writing the blocks out ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Body:
    """What a traced call put into the graph; ``after`` are its inputs once more: a conversion to the same type renames them."""

    inputs: Mapping[fx.Node, int]
    nodes: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def bodies(graph: fx.Graph) -> dict[int, Body]:
    """What lies between each pair of marks."""
    found: dict[int, Body] = {}
    open_at: list[tuple[fx.Node, list[fx.Node]]] = []
    for node in graph.nodes:
        if node.target is ENTER:
            open_at.append((node, []))
        elif node.target is LEAVE:
            enter, nodes = open_at.pop()
            before: Any = enter.args[0]
            tensors = {operand: place for place, operand in reversed(list(enumerate(before)))}
            found[node.args[2]] = Body(tensors, tuple(nodes), tuple(node.args[0]), tuple(node.args[1]))
        elif open_at:
            open_at[-1][1].append(node)
    return found


def write_out(module: fx.GraphModule, names: Mapping[str, str], repeats: Repeats) -> fx.GraphModule | None:
    """The graph with every opaque node replaced by what its block does; None where a block reaches for something outside it.

    ``names`` gives the tensor that each placeholder stands for.
    """
    found = bodies(module.graph)
    if not all(_is_closed(found[call.number], names, call.block) for call, _ in repeats.replays.values()):
        return None
    holders = {name: node for node in module.graph.nodes if (name := names.get(node.name)) is not None}
    flat = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            flat.output(fx.map_arg(node.args[0], values.__getitem__))
        elif node.target is AGAIN:
            values[node] = _again(flat, node, found, repeats, names, holders, values)
        elif node.op == "call_function" and node.args and isinstance(values.get(node.args[0]), list):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.target not in (ENTER, LEAVE):
            values[node] = flat.node_copy(node, values.__getitem__)
    return fx.GraphModule(module, flat)


def _is_closed(body: Body, names: Mapping[str, str], block: Block) -> bool:
    """Whether every operand is an input, the block's own, or made inside, and no size depends on data."""
    if any(isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool) for node in body.nodes):
        return False
    inside = set(body.nodes)
    operands = {operand for node in body.nodes for operand in node.all_input_nodes} | {*body.after, *body.outputs}
    own = f"{block.name}."
    return all(o in inside or o in body.inputs or names.get(o.name, "").startswith(own) for o in operands)


def _again(
    flat: fx.Graph, node: fx.Node, found: Mapping[int, Body], repeats: Repeats,
    names: Mapping[str, str], holders: Mapping[str, fx.Node], values: dict[fx.Node, Any],
) -> list[Any]:  # fmt: skip
    """Write the body of a call once more, with another block's tensors; returns its outputs."""
    call, block = repeats.replays[node.args[2]]  # type: ignore[index]
    body = found[call.number]
    operands: Any = node.args[0]
    given = [values[operand] for operand in operands]
    copies: dict[fx.Node, Any] = {operand: given[place] for operand, place in body.inputs.items()}

    def lookup(operand: fx.Node) -> Any:
        if operand not in copies:
            copies[operand] = values[holders[block.name + names[operand.name].removeprefix(call.block.name)]]
        return copies[operand]

    for original in body.nodes:
        copies[original] = flat.node_copy(original, lookup)
        copies[original].meta["nn_module_stack"] = _stack(original, call, node, block)
    values.update(zip(operands, map(lookup, body.after), strict=True))
    return [lookup(output) for output in body.outputs]


def _stack(original: fx.Node, call: Call, node: fx.Node, block: Block) -> dict[str, Any]:
    """The modules that run: around the block as at its opaque node, inside it as at the first call."""
    inside = f"{call.block.name}."
    running = (original.meta.get("nn_module_stack") or {}).items()
    own = {key: (block.name + path.removeprefix(call.block.name), cls) for key, (path, cls) in running if path.startswith(inside)}
    return dict(node.meta.get("nn_module_stack") or {}) | own
