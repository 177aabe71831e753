"""A graph and several batches in, values out, stretch by stretch: a weight from a file or spread over ranks is read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from graphprune.disk import OnDisk
from graphprune.execute import Calls, Edit, Walk, last_uses
from graphprune.ranks import whole
from graphprune.trace import Trace

STRETCH = 64 << 20
"""Bytes of weights that are held at a time where they come from elsewhere; a larger one is held alone."""


class Held(Mapping[str, Tensor]):
    """Tensors by name, each read or gathered when it is first asked for and kept until it is let go."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.now: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.now:
            self.now[name] = whole(self.tensors[name])
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def let_go(self, name: str) -> None:
        """Forget a tensor."""
        self.now.pop(name, None)


class Abreast:
    """A graph walked on several batches, stretch of nodes by stretch: a weight is read once for all of them.

    ``nodes`` are those that will be walked, in order: a value is dropped after its last use among them.
    """

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        batches: Sequence[Sequence[Any]],
        nodes: Sequence[fx.Node],
        edit: Edit | None = None,
    ) -> None:
        self.trace, self.tensors = trace, Held(tensors)
        calls: Calls = {}
        inputs = [dict(zip(trace.inputs, flat, strict=True)) for flat in batches]
        self.walks = [Walk(trace, self.tensors, own, edit=edit, calls=calls) for own in inputs]
        self.dying = last_uses(nodes)

    @torch.no_grad()
    def run(self, nodes: Sequence[fx.Node]) -> None:
        """Walk one stretch, batch after batch. Every rank asks for the same weights in the same order, whatever its batches."""
        for name in dict.fromkeys(name for node in nodes for name in self.weights(node)):
            self.tensors[name]
        for walk in self.walks:
            for node in nodes:
                walk.advance(node, self.dying)
        for name in [name for node in nodes for dead in self.dying[node] for name in self.named(dead)]:
            self.tensors.let_go(name)

    def weights(self, node: fx.Node) -> list[str]:
        """The tensors of the model that a node reads."""
        return [name for operand in node.all_input_nodes for name in self.named(operand)]

    def named(self, node: fx.Node) -> list[str]:
        """The tensor of the model that a placeholder stands for, if it does."""
        return [self.trace.tensors[node.name].name] if node.op == "placeholder" and node.name in self.trace.tensors else []

    def stretches(self, nodes: Sequence[fx.Node], limit: int | None = None) -> Iterator[list[fx.Node]]:
        """Runs of nodes that read at most ``limit`` bytes of weights, each ending where the least is alive; all at once where
        every weight is in memory anyway."""
        if type(self.tensors.tensors) is dict and not any(isinstance(t, OnDisk | DTensor) for t in self.tensors.tensors.values()):
            yield list(nodes)
            return
        limit = limit or STRETCH
        alive, sizes = self._alive(nodes), {t.name: prod(t.shape) * t.dtype.itemsize for t in self.trace.tensors.values()}
        bytes_read = [sum(sizes[name] for name in self.weights(node)) for node in nodes]
        start = held = 0
        for i, more in enumerate(bytes_read):
            while more and held and held + more > limit:
                first = next(place for place in range(start, i) if bytes_read[place])
                cut = min(range(first, i), key=lambda place: (alive[place], -place)) + 1
                yield list(nodes[start:cut])
                start, held = cut, sum(bytes_read[cut:i])
            held += more
        yield list(nodes[start:])

    def _alive(self, nodes: Sequence[fx.Node]) -> list[int]:
        """Elements of all values that are waiting for a use after each node."""
        alive, now = [], 0
        sizes = {node: _elements(node) for node in nodes if not self.named(node)}
        waited = {dead for dying in self.dying.values() for dead in dying}
        for node in nodes:
            now += sizes.get(node, 0) if node in waited else 0
            now -= sum(sizes.get(dead, 0) for dead in self.dying[node])
            alive.append(now)
        return alive


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return sum(int(part.numel()) for part in (value if isinstance(value, tuple | list) else [value]) if isinstance(part, Tensor))
