"""A traced node in, what torch.export noted of it out: its shapes, whether data decides them, the model's own line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.frames import is_own
from graphprune.rules import is_open

UNKNOWN = 10_007
"""Stands for a size that depends on data: prime, and larger than such sizes tend to be."""


def source_line(node: fx.Node) -> str:
    """The model's own source line behind a node: ``modeling_x.py:41  q = self.q(x)``."""
    frames = (node.meta.get("stack_trace") or "").strip().split('File "')[1:]
    own = [frame for frame in frames if is_own(frame.split('"')[0])] or frames
    if not own:
        return node.name
    head, _, code = own[-1].partition("\n")
    path, _, rest = head.partition('", line ')
    return f"{path.rpartition('/')[2]}:{rest.split(',')[0]}  {code.strip().splitlines()[0] if code.strip() else ''}".rstrip()


def is_single(shapes: Any) -> bool:
    """Whether it is the shape of one tensor."""
    return all(isinstance(size, int) for size in shapes)


def shapes_of(value: Any) -> Any:
    """The shape of a node's value, one for each of several tensors, None where there is no tensor."""
    if isinstance(value, Tensor):
        return tuple(number_of(size) for size in value.shape)
    if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
        return tuple(shapes_of(part) if isinstance(part, Tensor) else () for part in value)
    return None


def number_of(value: Any) -> Any:
    """A symbolic size as the number it was traced with; one that depends on data as a number no other size has."""
    if not isinstance(value, torch.SymInt):
        return value
    if value.node.hint is not None:
        return value.node.hint
    guess = int(value.node.expr.xreplace(dict.fromkeys(value.node.expr.free_symbols, UNKNOWN)))
    return guess if guess > 0 else UNKNOWN


def depends_on_data(node: fx.Node) -> bool:
    """Whether a size that no input shape determines takes part."""
    return any(map(is_open, (size for value in _around(node) for size in (value.shape if isinstance(value, Tensor) else [value]))))


def is_empty(node: fx.Node) -> bool:
    """Whether a tensor without elements takes part."""
    return any(isinstance(value, Tensor) and 0 in value.shape for value in _around(node))


def _around(node: fx.Node) -> Iterator[Any]:
    """What a call gives and what it is given, one by one."""
    for each in (node, *node.all_input_nodes):
        yield from pytree.tree_leaves(each.meta.get("val"))
