"""A model class and its config in, how every size responds when a setting changes out: built on the meta device, no memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from operator import getitem
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from graphprune import quiet

Path = tuple[str | int, ...]  # where a setting stands in the config: ("text_config", "hidden_size"), ("depths", 2)
Dim = tuple[str, int]  # a tensor's name and dimension; dimension -1 stands for the tensor's existence
Sizes = dict[Dim, int]
Changes = dict[Path, Any]
Model = TypeVar("Model", bound=PreTrainedModel)


def build_meta(cls: type[Model], config: PreTrainedConfig) -> Model:
    """``cls`` built from a copy of ``config`` on the meta device: names, shapes, dtypes and ties, no memory.

    A constructor that makes a tensor by ``torch.Tensor(n)`` does not hear of devices: that is put there afterwards.
    """
    model = _built(cls, deepcopy(config))
    nn.Module.to(model, "meta")
    return model


def _built(cls: type[Model], config: PreTrainedConfig) -> Model:
    """The same from the config itself, which the model may change."""
    with quiet.building(), torch.device("meta"), no_init_weights():
        model: Model = cls._from_config(config)  # type: ignore[no-untyped-call]
        model.tie_weights()
    return model


def build_empty(cls: type[Model], config: PreTrainedConfig) -> Model:
    """The same, but for the buffers that the constructor computes: they are there."""
    with quiet.building(), init_empty_weights(include_buffers=False), _Unfilled(), no_init_weights():
        model: Model = cls._from_config(deepcopy(config)).train(False)  # type: ignore[no-untyped-call]
    return model


def hold(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Let a model hold a tensor under these names, of which it has each: no shape is compared."""
    for name in names:
        home, _, leaf = name.rpartition(".")
        owner = model.get_submodule(home)
        held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        held[leaf] = tensor


class _Unfilled(TorchFunctionMode):
    """What a constructor leaves to be filled takes no memory."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


@dataclass
class Blueprint:
    """A model class and its config as plain data: says how the sizes respond when settings change."""

    cls: type[PreTrainedModel]
    config_cls: type[PreTrainedConfig]
    text: str
    sizes: Sizes = field(init=False)
    asked: list[Path] = field(init=False)  # attributes that the model looked for and the config has not
    refusals: dict[str, str] = field(default_factory=dict)
    _memo: dict[str, Sizes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config({})
        with _listening(config) as self.asked:
            self.sizes = _sizes(_built(self.cls, config))

    def settings(self) -> dict[str, Any]:
        """A fresh copy of the config as data."""
        settings: dict[str, Any] = json.loads(self.text)
        return settings

    def config(self, changes: Changes, like: PreTrainedConfig | None = None) -> PreTrainedConfig:
        """The config with ``changes``; ``like`` lends its choice of attention and expert kernels."""
        settings = self.settings()
        for path, value in changes.items():
            lookup(settings, path[:-1])[path[-1]] = value
        with quiet.building():
            return self.config_cls.from_dict(settings, **({} if like is None else _kernels(like)))

    def response(self, changes: Changes, *, through_file: bool = False) -> Sizes | None:
        """The dimensions that get another size, with that size; None when the config or the model refuses."""
        if not changes and not through_file:
            return {}
        key = _key(changes) + (" through a file" if through_file else "")
        if key not in self._memo:
            try:
                config = self._reload(changes) if through_file else self.config(changes)
                self._memo[key] = self._difference(_sizes(_built(self.cls, config)))
            except Exception as error:  # noqa: BLE001  a constructor may raise anything; its words are kept
                self._memo[key], self.refusals[key] = None, _last_line(error)
        return self._memo[key]

    def refusal(self, changes: Changes) -> str | None:
        """In the constructor's own words, why these changes are refused."""
        return self.refusals.get(_key(changes))

    def _reload(self, changes: Changes) -> PreTrainedConfig:
        with quiet.building(), TemporaryDirectory() as folder:
            self.config(changes).save_pretrained(folder)
            return self.config_cls.from_pretrained(folder)

    def _difference(self, new: Sizes) -> Sizes:
        gone = {dim: 0 for dim in self.sizes if dim[1] < 0 and dim not in new}
        return {dim: size for dim, size in new.items() if self.sizes.get(dim) != size} | gone


def scalars(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar in the settings with its path; a map onto 0, 1, 2 … numbers labels, not sizes."""
    if not isinstance(node, dict | list):
        yield path, node
    elif isinstance(node, list) or list(node.values()) != list(range(len(node))):
        yield from chain.from_iterable(scalars(value, (*path, key)) for key, value in items(node))


def items(node: dict[str, Any] | list[Any]) -> Iterable[tuple[str | int, Any]]:
    """The children of a node of the settings, each with its key or its place."""
    return node.items() if isinstance(node, dict) else enumerate(node)


def lookup(node: Any, path: Path) -> Any:
    """What stands at a path in the settings; raises KeyError or IndexError where nothing does."""
    return reduce(getitem, path, node)


def is_number(value: object) -> bool:
    """Whether a setting can be a size or a share: above zero, finite, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def as_text(config: PreTrainedConfig) -> str:
    """A config as JSON, with the text of whatever JSON does not know: what a Blueprint begins from."""
    return json.dumps(config.to_dict(), default=str)


def dims(name: str, shape: Sequence[int]) -> Sizes:
    """The sizes of one tensor: 1 for its existence, at dimension -1, then its shape."""
    return {(name, -1): 1} | {(name, dim): size for dim, size in enumerate(shape)}


def _sizes(model: nn.Module) -> Sizes:
    sizes: Sizes = {}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        sizes |= dims(name, tensor.shape)
    return sizes


def _key(changes: Changes) -> str:
    return str(sorted(changes.items(), key=str))


def _last_line(error: Exception) -> str:
    """The innermost reason: transformers wraps what a validator said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _configs(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, PreTrainedConfig]]:
    yield path, config
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig):
            yield from _configs(part, (*path, key))


def _kernels(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    parts = {".".join(map(str, path)): part for path, part in _configs(config) if len(path) < 2}
    return {
        "attn_implementation": {key: part._attn_implementation for key, part in parts.items()},
        "experts_implementation": {key: part._experts_implementation for key, part in parts.items()},
    }


@contextmanager
def _listening(config: PreTrainedConfig) -> Iterator[list[Path]]:
    """Collects the attributes that are looked up in the config or its parts and are not there."""
    heard: list[Path] = []
    parts = [(path, type(part)) for path, part in _configs(config)]

    def missing(self: PreTrainedConfig, name: str) -> Any:
        paths = [(*path, name) for path, kind in parts if kind is type(self) and not name.startswith("_")]
        heard.extend(path for path in paths if path not in heard)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    setattr(PreTrainedConfig, "__getattr__", missing)  # noqa: B010
    try:
        yield heard
    finally:
        delattr(PreTrainedConfig, "__getattr__")
