"""A model in, the same model for a while as torch.export needs it: evaluation mode, no cache, experts as products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

BATCHED, GROUPED = "batched_mm", "grouped_mm"
"""Ways of running experts: a product a row, and one product of all rows, sorted by their expert."""

QUANTIZED = "fake_quantize_per_channel_affine_cachemask"


@contextmanager
def exportable(model: nn.Module, experts: str | None = BATCHED) -> Iterator[None]:
    """Evaluation mode, no key-value cache among the outputs, ``experts`` run in that way: what export needs, then undone.

    Of the ways that transformers has for a mixture of experts, a loop cannot be exported, and of tokens sorted for one grouped
    product nobody can tell which expert they came from; in batched products all is said. None leaves the model its own.
    """
    with ExitStack() as undo:
        undo.enter_context(_shapes_said())
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
        own = experts_run(model)
        if experts not in (None, own) and isinstance(model, PreTrainedModel) and any(map(_has_experts, model.modules())):
            if own is not None:
                undo.callback(model.set_experts_implementation, own)
            model.set_experts_implementation(experts)
        yield


@contextmanager
def _shapes_said() -> Iterator[None]:
    """What torch can run and cannot trace with open sizes, since it was never told the shapes of its results: those."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{QUANTIZED}", "Meta"):
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(QUANTIZED, lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)), "Meta")
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The transformers configurations in use anywhere in the model."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    return list(found.values())


def experts_run(model: nn.Module) -> str | None:
    """The way in which a transformers mixture of experts runs them."""
    found: str | None = getattr(getattr(model, "config", None), "_experts_implementation", None)
    return found


def _has_experts(module: Any) -> bool:
    """Whether transformers can tell this model another way to run its experts."""
    return isinstance(module, PreTrainedModel) and module._can_set_experts_implementation()
