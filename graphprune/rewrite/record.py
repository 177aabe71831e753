"""A smaller model and the one it was made of in, a record out: what a stock instance must change to become the smaller one.

Where no config describes a transformers model, its config carries the record, under ``pruned``, through files and further compiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import transformers
from torch import nn, view_as_real
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.errors import ModelLimit
from graphprune.facts import Pruned
from graphprune.rewrite import reshaped
from graphprune.rewrite.reshaped import Reshaped

Record = dict[str, Any]
Model = TypeVar("Model", bound=PreTrainedModel)
T = TypeVar("T")

RECORD = "graphprune.json"
MODELLING = "modeling_pruned"
LARGEST_BUFFER = 65536
"""Elements of an unsaved buffer that a record may carry."""


def record_of(config: PreTrainedConfig | None) -> Record | None:
    """The record that a config carries, None where the config alone describes its model."""
    found = getattr(config, "pruned", None)
    return found if isinstance(found, dict) and "shapes" in found else None


def check_described(config: PreTrainedConfig) -> None:
    """Raise ModelLimit where a config alone does not describe its model."""
    if record_of(config) is not None:
        raise ModelLimit("the model was pruned before, and its layers differ", why="its config alone does not describe it")


def remember(pruned: Pruned, original: nn.Module) -> Pruned:
    """The same; the config of a transformers model that it does not describe now carries the record, where there can be one."""
    if isinstance(pruned.model, PreTrainedModel) and pruned.config is None:
        with suppress(ModelLimit):
            pruned.model.config.pruned = make_record(pruned.model, original, pruned)
            _save_by_record(pruned.model)
    return pruned


def make_record(model: nn.Module, original: nn.Module, pruned: Pruned) -> Record:
    """What ``original`` must change to become ``model``: layers, attributes, shapes, and buffers that no checkpoint holds.

    Tensors that are new have a shape too; of a module with such a buffer all are listed. The record that made the original what
    it is comes ``first``. Raises ModelLimit where such a buffer is too large to be written down.
    """
    saved, elements = model.state_dict(keep_vars=True), pruned.elements or {}
    first = record_of(original.config) if isinstance(original, PreTrainedModel) else None
    before = dict(_left([*original.named_parameters(), *original.named_buffers()], elements))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    changed = {name: tensor for name, tensor in after.items() if name not in before or tensor.shape != before[name].shape}
    computed = (changed.keys() - saved.keys()) | dict(_left((first or {}).get("buffers", {}).items(), elements)).keys()
    owners = {name.rpartition(".")[0] for name in computed}
    unsaved = {name: tensor for name, tensor in model.named_buffers() if name not in saved and name.rpartition(".")[0] in owners}
    for name, tensor in unsaved.items():
        if tensor.numel() > LARGEST_BUFFER:
            raise ModelLimit(f"the buffer {name} is cut and too large for a record", fix='emit="graph"')
    return {
        **({} if first is None else {"first": first}),
        "elements": elements,
        "attributes": pruned.attributes or {},
        "shapes": {name: list(tensor.shape) for name, tensor in changed.items() if name in saved},
        "buffers": {name: (view_as_real(t) if t.is_complex() else t).tolist() for name, t in unsaved.items()},
    }


def _left(tensors: Iterable[tuple[str, T]], elements: Mapping[str, list[int]]) -> Iterator[tuple[str, T]]:
    """What belongs to the elements that stay, under the names it has then."""
    for name, tensor in tensors:
        stack = next((stack for stack in elements if name.startswith(f"{stack}.")), None)
        if stack is None:
            yield name, tensor
            continue
        element, dot, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(element) in elements[stack]:
            yield f"{stack}.{elements[stack].index(int(element))}{dot}{rest}", tensor


def read_model(cls: type[Model], folder: Path, config: PreTrainedConfig | None, **options: Any) -> Any:
    """What ``cls.from_pretrained`` gives, with the sizes that a config records, where it does."""
    if record_of(config) is None:
        return cls.from_pretrained(folder, **options)
    found = heeding(cls).from_pretrained(folder, config=config, **options)
    model = found[0] if isinstance(found, tuple) else found
    model.__class__ = cls
    _save_by_record(model)
    return found


def _save_by_record(model: PreTrainedModel) -> None:
    """Let ``save_pretrained``, whoever calls it (a Trainer, an upload), write what the class alone cannot load."""
    model.save_pretrained = partial(save_transformers, model)  # type: ignore[method-assign]


def build_model(cls: type[Model], config: PreTrainedConfig, **options: Any) -> Model:
    """The same of ``cls._from_config``."""
    built: Model = (cls if record_of(config) is None else heeding(cls))._from_config(config, **options)  # type: ignore[no-untyped-call]
    built.__class__ = cls
    return built


def heeding(cls: type[Model]) -> type[Model]:
    """One like ``cls`` whose instances begin with the sizes that their config records."""
    return type(cls.__name__, (Reshaped, cls), {"__module__": cls.__module__})


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_transformers(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    """``model.save_pretrained``; where the config carries a record, with that, and with modelling code that heeds it
    if the class is transformers' own."""
    record, save = record_of(model.config), type(model).save_pretrained
    if record is None:
        save(model, folder, **options)
        return
    stock, mapped = stock_class(type(model)), hasattr(model.config, "auto_map")
    try:
        model.config.auto_map = _auto_map(stock)
        save(model, folder, **options)
    finally:
        if not mapped:
            del model.config.auto_map
    if _is_stock(stock):
        (Path(folder) / f"{MODELLING}.py").write_text(_modelling(stock))
    (Path(folder) / RECORD).write_text(json.dumps({"class": class_path(stock)} | record))


def _auto_map(cls: type) -> dict[str, str]:
    names = [n for n in dir(transformers) if n.startswith("AutoModel") and isinstance(getattr(transformers, n), type)]
    return {name: f"{MODELLING}.{cls.__name__}" for name in names if cls in _classes(getattr(transformers, name))}


def _classes(auto: Any) -> list[type]:
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        return []
    names = [n for value in mapping._model_mapping.values() for n in (value if isinstance(value, tuple | list) else [value])]
    return [getattr(transformers, name, type(None)) for name in names]


def _modelling(cls: type) -> str:
    return (
        Path(reshaped.__file__).read_text()
        + f'''

from {cls.__module__} import {cls.__name__} as Stock


class {cls.__name__}(Reshaped, Stock):
    """The stock class, whose name transformers knows its checkpoints by."""
'''
    )


def stock_class(cls: type) -> type:
    """The class of transformers that this is or is made of: that of modelling code which a checkpoint brought is not on its own.
    One that only builds on a base without a forward (``PreTrainedModel``) is of its own making."""
    return next((base for base in cls.__mro__ if _is_stock(base)), cls)


def _is_stock(cls: type) -> bool:
    is_base = getattr(cls, "forward", nn.Module.forward) is nn.Module.forward
    return getattr(transformers, cls.__name__, None) is cls and not is_base


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
