"""A Python file and the name of a callable in it in, the model that it makes out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from graphprune.errors import UserMistake, nearest


def make(script: Path, name: str, device: str) -> tuple[nn.Module, object]:
    """``file.py:factory``: the callable gives a module, or (module, example_inputs). Raises UserMistake."""
    found = _callables(import_file(script))
    if name not in found:
        raise UserMistake(f"{script} has no {name!r}", fix=_offer(found, script, name))
    made = _call_factory(found[name], f"{script}:{name}", device)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserMistake(f"{script}:{name} gave a {type(model).__name__}", fix="return an nn.Module, or (module, example_inputs)")
    return model, inputs


def which(script: Path) -> UserMistake:
    """The question that a file without a factory's name raises."""
    return UserMistake(f"which model in {script}?", fix=_offer(_callables(import_file(script)), script))


def _call_factory(factory: Callable[[], object], name: str, device: str) -> object:
    if isinstance(factory, nn.Module):
        return factory
    try:
        with torch.device(device):
            return factory()
    except Exception as error:
        raise UserMistake(f"the factory {name} failed", why=f"{type(error).__name__}: {error}") from error


def import_file(script: Path) -> ModuleType:
    """Run a Python file as a module of its own, its neighbours importable. Raises UserMistake."""
    if not script.is_file():
        raise UserMistake(f"no such file: {script}", fix=siblings(script))
    name, state = f"graphprune_file_{script.stem}", (str(script.resolve()), script.stat().st_mtime_ns)
    if name in sys.modules and vars(sys.modules[name]).get("__state__") == state:
        return sys.modules[name]  # what two functions of one file keep in its globals they share
    spec = spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.insert(0, str(script.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        vars(module)["__state__"] = state
    except Exception as error:
        raise UserMistake(f"{script} does not import", why=f"{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(script.parent.resolve()))
    return module


def _callables(module: ModuleType) -> dict[str, Callable[[], object]]:
    """What the file itself defines and can be called: its functions, classes and module instances."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    return {
        name: value
        for name, value in public.items()
        if getattr(value, "__module__", "") == module.__name__ or isinstance(value, nn.Module)
    }


def _offer(found: Mapping[str, object], script: Path, name: str = "") -> str:
    return f"{nearest(name, found)} (as {script}:NAME)"


def siblings(path: Path) -> str:
    """The nearest names beside a path that is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f"{folder} is not there either"
    return nearest(path.name, (entry.name for entry in folder.iterdir()))
