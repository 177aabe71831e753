"""A freshly built model in, the same model with weights that make every connection count out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def sharpen(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Redraw the weights at a scale where activations are O(1), so that attention is far from uniform.

    Matrices: normal with std gain / sqrt(fan in); embeddings: unit; norm scales: 1 + 0.3 N; biases: 0.3 N; other vectors:
    what they were, plus 0.3 N; running statistics of batch norms: mean 0.3 N, variance in [0.5, 1.5].
    """
    draw = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
            parameter.copy_(sharpened(module, name, parameter, noise, gain))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))
            if name == "running_var":
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))


def sharpened(module: nn.Module, name: str, old: Tensor, noise: Tensor, gain: float) -> Tensor:
    if old.dim() >= 2:
        return noise if isinstance(module, nn.Embedding) else gain / math.sqrt(fan_in(module, old)) * noise
    if "bias" in name:
        return 0.3 * noise
    return 1 + 0.3 * noise if name == "weight" else old + 0.3 * noise


def fan_in(module: nn.Module, weight: Tensor) -> int:
    """How many inputs one output sums over; for a bare matrix, whose layout is not known, the wider side."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return max(1, weight.shape[0] // module.groups)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return weight[0].numel()
    return max(weight.shape[-2:])
