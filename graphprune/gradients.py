"""A model and calibration inputs in, gradients out as they appear: each is handed over and freed before the next one exists."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from graphprune.device import CPU, beside, where
from graphprune.disk import OnDisk, given_back
from graphprune.errors import ModelLimit, UserMistake
from graphprune.precise import precise
from graphprune.written import logits_of

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``loss(model, inputs)``: a scalar to differentiate."""

LARGE = 4 << 20
"""Bytes of a gradient or an activation that is worth giving back: holes between them would add up to another model."""

SeeGradient = Callable[[str, nn.Parameter, Tensor], None]
"""``see(name, parameter, gradient)``, called once a parameter and backward pass; the gradient is freed afterwards.

It comes in float32 or better, whatever the weight is in.
"""


def language_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean next-token cross-entropy of ``input_ids`` (rows, length); a masked or other model's own loss on given labels.

    Raises ModelLimit when the model gives neither logits of the next token nor a loss.
    """
    output = model(**inputs)
    if getattr(output, "loss", None) is not None:
        found: Tensor = output.loss
        return found
    logits = logits_of(output) if "input_ids" in inputs else None
    if logits is None or logits.shape[1] != inputs["input_ids"].shape[1]:
        why = "it predicts no next token, and returns no loss for the inputs it is given"
        raise ModelLimit(
            f"no loss is known for {type(model).__name__}", why=why, fix="compile(…, loss=f), f(model, inputs) a scalar"
        )
    predicted = precise(logits[:, :-1].flatten(0, 1))
    return nn.functional.cross_entropy(predicted, inputs["input_ids"][:, 1:].flatten())


def see_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    see: SeeGradient,
    *,
    names: Collection[str] | None = None,
    loss: Loss = language_loss,
) -> None:
    """Run forward and backward on each batch and hand every gradient over as soon as it is complete.

    ``names`` limits which parameters get one. The peak is weights, activations and one parameter's gradient. Modes, flags and
    gradients of the model are left as they were. A transformers model on which ``activation_checkpointing_enable()`` was called
    computes the activations within its layers twice instead of keeping them.
    """
    with _only_gradients_of(model, names) as parameters, _checkpointed(model), given_back(LARGE):
        hooks = [_hand_over(name, parameter, see) for name, parameter in parameters.items()]
        try:
            for inputs in batches:
                _scalar(loss(model, beside(dict(inputs), where(model)))).backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()


def _scalar(loss: Any) -> Tensor:
    """A loss that gradients can be taken of. Raises UserMistake where it is none."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserMistake(f"the loss is {what}", fix="give a scalar: the mean over the batch")
    if not loss.requires_grad:
        raise UserMistake("the loss does not depend on any weight", why="it is detached, or computed without gradients")
    return loss


def one_by_one(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row of every batch as a batch of its own: what per-sample gradients are taken of."""
    for inputs in batches:
        rows = max((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), default=0)
        for row in range(rows):
            yield {k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}


def _hand_over(name: str, parameter: nn.Parameter, see: SeeGradient) -> Any:
    def hook(leaf: Tensor) -> None:
        if leaf.grad is not None:
            gradient = precise(leaf.grad)
            leaf.grad = None
            see(name, parameter, gradient)

    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


@contextmanager
def _only_gradients_of(model: nn.Module, names: Collection[str] | None) -> Iterator[dict[str, nn.Parameter]]:
    named = dict(model.named_parameters())
    if any(isinstance(parameter, OnDisk) and parameter.device != CPU for parameter in named.values()):
        raise UserMistake("gradients of weights in files are computed on the CPU", fix="leave out --device, or --stream")
    if torch.is_inference_mode_enabled():
        raise UserMistake("no gradients are taken in inference mode", fix="call it outside torch.inference_mode()")
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in named.items()}
    modes = {module: module.training for module in model.modules()}
    chosen = {name: p for name, p in named.items() if (names is None or name in names) and _is_inexact(p)}
    try:
        model.eval()
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in chosen)
        with torch.enable_grad():
            yield chosen
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name][0])
            parameter.grad = before[name][1]
        for module, mode in modes.items():
            module.training = mode


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers that are marked for checkpointing do it in evaluation mode too, and keep no key-value cache."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config is not None and cached:
            config.use_cache = False
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
        if config is not None and cached:
            config.use_cache = cached


def see_output_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    see: Callable[[str, Tensor], None],
    *,
    modules: Collection[str],
    loss: Loss = language_loss,
) -> None:
    """Run forward and backward on each batch and show ∂loss/∂output of each named module that gives one tensor, in its shape."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output.register_hook(lambda gradient: see(name, gradient))

        return hook

    first = next(iter(dict(model.named_parameters())))
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        see_gradients(model, batches, lambda *_: None, names=[first], loss=loss)
    finally:
        for hook in hooks:
            hook.remove()
