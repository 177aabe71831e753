"""Twins in, the tensors of all but the first of them out of the way while a model is traced: what never runs is not carried along.

torch.export lifts every tensor of a model into its graph and takes its time over each. A block whose twin was traced becomes one
opaque node, and nothing of it is read. Should anybody ask for a tensor of it all the same, the trace fails, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.twins import Block


class Asked(Exception):
    """Somebody does something with a tensor that is out of the way."""


class Absent:
    """Stands where a tensor was, and tells when somebody wants more of it than to know that it is there."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._asked.append(name)
        raise Asked(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """No operation computes with it."""
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        return operands[0].used


class Withheld:
    """The tensors of some blocks of ``model``, each by its name with the name of the same tensor of the block's traced twin.

    ``asked`` is what somebody wanted of them while they were away.
    """

    def __init__(self, model: nn.Module, families: Iterable[Sequence[Block]]) -> None:
        pairs = [pair for twins in families for pair in followers(twins)]
        self.modules = [module for _, block in pairs for module in block.inner.values()]
        self.twins = {f"{b.name}.{name}": f"{first.name}.{name}" for first, b in pairs for name, _ in _tensors(b.module)}
        self.order = [name for name, _ in _tensors(model)]
        self.asked: list[str] = []

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody sees the tensors, only that something is there."""
        homes: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (vars(module), own) for module in self.modules for own in (module._parameters, module._buffers)
        ]
        held = [dict(own) for _, own in homes]
        absent = Absent(self.asked)
        try:
            for (attributes, own), before in zip(homes, held, strict=True):
                for name in (name for name, tensor in before.items() if tensor is not None):
                    attributes[name] = absent
                    del own[name]
            yield
        finally:
            for (attributes, own), before in zip(homes, held, strict=True):
                for name in (name for name, tensor in before.items() if tensor is not None):
                    attributes.pop(name, None)
                own.clear()
                own.update(before)

    def placed(self, graph: fx.Graph, holders: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """Give every tensor that was away a placeholder like that of its twin, where the model's order has it; returns these."""
        found: dict[str, fx.Node] = {}
        last = next(iter(graph.nodes))
        for name in self.order:
            if name in self.twins:
                twin = holders[self.twins[name]]
                with graph.inserting_after(last):
                    found[name] = graph.placeholder(f"{twin.name[:2]}{name.replace('.', '_')}")
                found[name].meta = {**twin.meta, "called": found[name].name}
            last = found.get(name) or holders.get(name, last)
        return found


def followers(twins: Sequence[Block]) -> Iterator[tuple[Block, Block]]:
    """Each block that is likely to do what one before it does, with that one.

    An attribute that is another in every block (its number) is likely to be read for nothing but a cache; one that some share
    tells them apart.
    """
    values = [[repr(block.reads(place)) for block in twins] for place in twins[0].differing]
    telling = [column for column in values if len(set(column)) < len(twins)]
    first: dict[tuple[str, ...], Block] = {}
    for place, block in enumerate(twins):
        seen = first.setdefault(tuple(column[place] for column in telling), block)
        if seen is not block:
            yield seen, block


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
