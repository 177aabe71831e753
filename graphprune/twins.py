"""A model in, its twins out: blocks of the same classes and tensor shapes, which differ in plain attributes at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 3
"""Modules a block must be made of to be worth an opaque node."""

OURS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
HOOKS = ("_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks")
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))

OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType)
"""What holds nothing that a call would change: modules are looked at one by one, tensors are written to in the graph."""
DEPTH = 3

Attribute = tuple[str, str]
"""A plain attribute: the path of its module inside the block, and its name."""


@dataclass(frozen=True, slots=True)
class Block:
    """One of several twins: its name, and the modules inside it by their paths."""

    name: str
    module: nn.Module
    inner: Mapping[str, nn.Module]
    differing: tuple[Attribute, ...]

    def reads(self, place: Attribute) -> Any:
        """The value of a plain attribute."""
        return vars(self.inner[place[0]])[place[1]]

    def is_hooked(self) -> bool:
        """Whether something listens inside the block: it would miss calls that are left out."""
        return any(getattr(module, hooks) for path, module in self.inner.items() if path for hooks in HOOKS)

    def state(self) -> Any:
        """Everything a call could change about the block's modules, and about the objects they hold."""
        known: dict[int, Any] = {}
        return {(path, name): seen(value, known) for path, module in self.inner.items() for name, value in vars(module).items()}


def seen(value: Any, known: dict[int, Any], depth: int = DEPTH) -> Any:
    """What a value is compared by: its text where that says everything, else its identity and what it holds."""
    if is_plain(value):
        return repr(value)
    if depth and id(value) not in known and not isinstance(value, OPAQUE):
        known[id(value)] = None
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else _held(value)
        known[id(value)] = [(str(name), seen(part, known, depth - 1)) for name, part in parts]
    return id(value), known.get(id(value))


def _held(value: Any) -> Iterable[tuple[str, Any]]:
    held: Mapping[str, Any] = getattr(value, "__dict__", {})
    return held.items()


def find_twins(model: nn.Module) -> dict[int, list[Block]]:
    """The outermost modules that have twins, by what they have in common."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    shared = _shared_tensors(model)
    looks: dict[int, int] = {}
    known: dict[Any, int] = {}
    alike: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        look = _look(module, looks, known)
        if len(names[id(module)]) == 1 and sum(1 for _ in module.modules()) >= SMALLEST:
            alike[look].append(module)
    chosen: dict[int, list[Block]] = defaultdict(list)
    covered: set[str] = set()
    for module in model.modules():
        name, twins = names[id(module)][0], alike[looks[id(module)]]
        if len(twins) < 2 or _inside(name, covered) or not shared.isdisjoint(map(id, _tensors(module))):
            continue
        covered.add(name)
        chosen[looks[id(module)]].append(Block(name, module, dict(module.named_modules()), ()))
    return {look: _with_differences(blocks) for look, blocks in chosen.items() if len(blocks) > 1}


def _inside(name: str, covered: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in covered for end in range(1, len(parts) + 1))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _shared_tensors(model: nn.Module) -> set[int]:
    """Tensors with several names."""
    seen: set[int] = set()
    twice: set[int] = set()
    for own in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for _, tensor in own:
            (twice if id(tensor) in seen else seen).add(id(tensor))
    return twice


def _look(module: nn.Module, looks: dict[int, int], known: dict[Any, int]) -> int:
    """A number for all that twins have in common: not plain attributes, unless the class has one of the name to stand in."""
    if id(module) in looks:
        return looks[id(module)]
    attributes = []
    for name, value in sorted(vars(module).items()):
        if name in OURS or name in HOOKS:
            continue
        alike = "plain" if is_plain(value) and not hasattr(type(module), name) else repr(value) if is_plain(value) else id(value)
        attributes.append((name, alike))
    tensors = [
        (name, None if tensor is None else (type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device))
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
    ]
    children = [(name, None if child is None else _look(child, looks, known)) for name, child in module._modules.items()]
    own = type(module), tuple(attributes), tuple(tensors), tuple(children), tuple(sorted(module._non_persistent_buffers_set))
    looks[id(module)] = known.setdefault(own, len(known))
    return looks[id(module)]


def _with_differences(blocks: list[Block]) -> list[Block]:
    """Note which plain attributes differ among the twins."""
    first = blocks[0]
    places = ((path, name) for path, module in first.inner.items() for name in vars(module) if name not in (*OURS, *HOOKS))
    plain = [place for place in places if is_plain(first.reads(place))]
    differing = tuple(p for p in plain if any(not same(block.reads(p), first.reads(p)) for block in blocks[1:]))
    return [replace(block, differing=differing) for block in blocks]


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, a dtype and the like, or a collection of such only: its ``repr`` says all of it."""
    if isinstance(value, tuple | list | set | frozenset):
        return all(is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, PLAIN)


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are of one type and read the same: 1, 1.0 and True are three, nan is itself."""
    return type(one) is type(other) and repr(one) == repr(other)
