"""A result in, a directory out that appears complete or not at all; and the way back. No pickle, no code of ours in a stock one.

Three forms: a stock checkpoint that ``from_pretrained`` loads; a transformers model whose layers differ, with a record of its sizes
and self-contained modelling code beside the weights; a plain module with the same record.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, contiguous_format, get_default_device, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from graphprune.disk import WEIGHTS
from graphprune.errors import UserMistake, first_line
from graphprune.rewrite import reshaped
from graphprune.rewrite.record import RECORD, Record, class_path, read_model

# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_plain(model: nn.Module, record: Record, folder: Path) -> None:
    """A plain module: its state and the record."""
    save_file(_apart(_distinct(model)), folder / WEIGHTS)
    (folder / RECORD).write_text(json.dumps({"class": class_path(type(model))} | record))


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state, each tied one once; what else a module keeps there holds no sizes."""
    named = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor.detach() for name, tensor in named.items() if first[id(tensor)] == name}


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none of which lies in another's memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone(memory_format=contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return found


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what a compile saved, stock or with layers that differ. ``model`` is the unpruned original of a plain module.

    Raises UserMistake when the directory is no such checkpoint, or a plain module's original is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserMistake(f"there is no checkpoint at {path}")
    try:
        name, record = _described(path)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise UserMistake(f"{path} is not a checkpoint", why=first_line(error)) from error
    cls = _class(name)
    if cls is None and record is None:
        fix = f"a class of your own loads it itself: {name.rpartition('.')[2]}.from_pretrained({str(path)!r})"
        raise UserMistake(
            f"{path} is of an unknown class", why=f"there is no {name} in transformers {transformers.__version__}", fix=fix
        )
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        config = _config(cls, path) if record else None
        loaded: nn.Module = read_model(cls, path, config)
        return loaded
    return _load_plain(path, record or {}, model)


def _config(cls: type[PreTrainedModel], path: Path) -> PreTrainedConfig:
    """The config of a checkpoint; a class that is not transformers' own says itself what kind it has."""
    own = None if cls.__module__.startswith("transformers.") else cls.config_class
    return own.from_pretrained(path) if own else AutoConfig.from_pretrained(path, trust_remote_code=False)


def _described(path: Path) -> tuple[str, Record | None]:
    """The class that a checkpoint is of, and its record."""
    if (path / RECORD).exists():
        record = json.loads((path / RECORD).read_text())
        return record["class"], record
    config = json.loads((path / "config.json").read_text())
    return f"transformers.{config['architectures'][0]}", config.get("pruned")


def _load_plain(path: Path, record: dict[str, Any], model: nn.Module | None) -> nn.Module:
    if model is None:
        raise UserMistake(
            f"{path} holds a plain module ({record.get('class')})", fix="pass the unpruned original: graphprune.load(dir, model)"
        )
    with _same_model(path):
        reshaped.reshape(model, record)
    if get_default_device().type == "meta":
        return model
    state = OrderedDict(load_file(path / WEIGHTS))
    wanted = model.state_dict()
    state._metadata = wanted._metadata  # type: ignore[attr-defined]  # versions that loading hooks ask for
    tied = wanted.keys() - _distinct(model).keys()
    if others := (state.keys() ^ wanted.keys()) - tied:
        raise UserMistake(f"{path} holds another model", why=f"tensors differ: {sorted(others)[:3]}")
    with _same_model(path):
        model.load_state_dict(state, strict=False, assign=any(tensor.is_meta for tensor in model.parameters()))
    return model


@contextmanager
def _same_model(path: Path) -> Iterator[None]:
    """What a record or a state does not find in a model, or finds of another size, says that it is of another one."""
    try:
        yield
    except (AttributeError, LookupError, StopIteration, RuntimeError) as error:
        fix = "pass the original as it was compiled: graphprune.load(dir, model)"
        raise UserMistake(f"{path} holds another model", why=f"{type(error).__name__}: {first_line(error)}", fix=fix) from error


def _class(dotted: str) -> Any:
    """The class of that name in transformers, or in a module that is imported already: a file does not say what to import."""
    module, _, name = dotted.rpartition(".")
    try:
        known = importlib.import_module(module) if module.partition(".")[0] == "transformers" else sys.modules[module]
        return getattr(known, name)
    except (ImportError, AttributeError, KeyError):
        return None
