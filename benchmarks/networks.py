"""The models of the comparison: Llama-likes of hidden width 512, ResNets and a DenseNet in plain ``nn``, random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096


def llama(layers: int, hidden: int = 512, heads: int = 8, kv: int = 8) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama-like model and token ids of shape (2, 13)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=512, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.eval(), {"input_ids": torch.randint(0, VOCABULARY, (2, 13))}


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


def resnet(depths: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """A ResNet of bottlenecks and an image."""
    inputs, stages = 64, []
    for place, depth in enumerate(depths):
        width = 64 << place
        for block in range(depth):
            stages.append(Bottleneck(inputs, width, 2 if place and not block else 1))
            inputs = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*stem, *stages, *head).eval(), torch.randn(1, 3, 96, 96)


class DenseLayer(nn.Module):
    """Reads everything made so far and adds ``growth`` channels to it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(y)))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Layers over the concatenation of all before them."""

    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + place * growth, growth) for place in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet(depths: Sequence[int], growth: int = 32) -> tuple[nn.Module, Tensor]:
    """A DenseNet and an image."""
    width = 2 * growth
    parts: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for place, depth in enumerate(depths):
        parts.append(DenseBlock(width, growth, depth))
        width += depth * growth
        if place + 1 < len(depths):
            parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
    return nn.Sequential(*parts).eval(), torch.randn(1, 3, 96, 96)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{f"llama-{layers}": lambda layers=layers: llama(layers) for layers in (4, 8, 16, 32, 64)},
    **{f"llama-gqa-{layers}": lambda layers=layers: llama(layers, kv=2) for layers in (4, 32)},
    **{f"llama-{n}x{h}": lambda n=n, h=h: llama(n, h, h // 64, h // 64) for n, h in ((32, 256), (48, 768), (16, 1024))},
    "resnet-50": lambda: resnet((3, 4, 6, 3)),
    "resnet-152": lambda: resnet((3, 8, 36, 3)),
    "densenet-121": lambda: densenet((6, 12, 24, 16)),
    "densenet-201": lambda: densenet((6, 12, 48, 32)),
}
