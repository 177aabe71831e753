"""Small transformers models with random, sharp weights: attention that looks somewhere, so that misaligned heads are seen."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 101, 48, 2
IDS = (3, 11)


def sharpened(model: nn.Module, seed: int = 0) -> Any:
    """Weights redrawn so that every layer's outputs are of order one."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype if parameter.is_complex() else None)
        parameter.data = noise * 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * noise
    return model.eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, IDS, generator=torch.Generator().manual_seed(seed))


def llama(tied: bool = False, layers: int = LAYERS, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=88, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=3, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    return sharpened(transformers.LlamaForCausalLM(config))


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=88, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    return sharpened(transformers.BertForMaskedLM(config))


def mixture() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=48, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return sharpened(transformers.Qwen3MoeForCausalLM(config))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2)
    return sharpened(transformers.GPT2LMHeadModel(config))


class Residual(nn.Module):
    """Two convolutions with a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one = nn.Conv2d(12, 20, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.two = nn.Conv2d(20, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.two(self.norm(self.one(x)).relu())
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    return sharpened(Residual())
