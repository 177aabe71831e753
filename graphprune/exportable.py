"""A model in, the same model for a while as torch.export needs it: evaluation mode, no cache, experts as products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def exportable(model: nn.Module, batched: bool = True) -> Iterator[None]:
    """Evaluation mode, no key-value cache among the outputs, experts as ``batched`` products: what export needs, then undone."""
    with ExitStack() as undo:
        training = [module for module in model.modules() if module.training]
        for module in training:
            undo.callback(setattr, module, "training", True)
            module.training = False
        for config in _configs(model):
            if getattr(config, "use_cache", None):
                undo.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if batched and groups_experts(model):
            undo.enter_context(_batched_experts(model))
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The transformers configurations in use anywhere in the model."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    return list(found.values())


def groups_experts(model: nn.Module) -> bool:
    """Whether a transformers mixture of experts brings the tokens of each expert together, in a loop or sorted for one product.

    A loop cannot be exported, and of a sorted list nobody can tell which expert a token came from; in batched products all is said.
    """
    own = getattr(getattr(model, "config", None), "_experts_implementation", None)
    can = isinstance(model, PreTrainedModel) and any(_has_experts(module) for module in model.modules())
    return can and own != "batched_mm"


def _has_experts(module: Any) -> bool:
    """Whether transformers can tell this model another way to run its experts."""
    return isinstance(module, PreTrainedModel) and module._can_set_experts_implementation()


@contextmanager
def _batched_experts(model: Any) -> Iterator[None]:
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if before is not None:
            model.set_experts_implementation(before)
