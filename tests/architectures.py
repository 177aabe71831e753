"""One small instance of every named transformers architecture, with sharp random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from tests.models import sharpened

TEXT = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 1, "num_attention_heads": 6}
GROUPED = TEXT | SHAPE | {"num_key_value_heads": 3, "head_dim": 10, "sliding_window": 32}
IMAGE = SHAPE | {"image_size": 16, "patch_size": 4, "num_labels": 7}

Inputs = dict[str, Tensor]


def ids() -> Inputs:
    return {"input_ids": torch.randint(3, 101, (3, 11))}


def pixels(size: int = 16) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def sequence_to_sequence() -> Inputs:
    return {"input_ids": torch.randint(3, 101, (3, 11)), "decoder_input_ids": torch.randint(3, 101, (3, 7))}


ARCHITECTURES: dict[str, tuple[Callable[[], Any], Callable[[], Inputs]]] = {
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), ids),
    "mistral": (lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED)), ids),
    "qwen2": (lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)), ids),
    "qwen3": (lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED)), ids),
    "gemma2": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**GROUPED)), ids),
    "phi3": (lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED | {"hidden_size": 60})), ids),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**TEXT, n_embd=48, n_layer=1, n_head=6)), ids),
    "gpt_neox": (lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT | SHAPE, rotary_pct=0.5)), ids),
    "opt": (lambda: T.OPTForCausalLM(T.OPTConfig(**TEXT | SHAPE, ffn_dim=88, word_embed_proj_dim=48, max_position_embeddings=64)), ids),
    "bloom": (lambda: T.BloomForCausalLM(T.BloomConfig(**TEXT, hidden_size=48, n_layer=1, n_head=6)), ids),
    "bert": (lambda: T.BertForMaskedLM(T.BertConfig(**TEXT | SHAPE)), ids),
    "t5": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(**TEXT, d_model=48, d_kv=10, d_ff=88, num_layers=1, num_heads=6, decoder_start_token_id=0)),
        sequence_to_sequence,
    ),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE)), pixels),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(image_size=16, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0, num_labels=7)
        ),
        pixels,
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(T.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=7)),
        lambda: pixels(32),
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck", num_labels=7)
        ),
        lambda: pixels(32),
    ),
    "regnet": (
        lambda: T.RegNetForImageClassification(
            T.RegNetConfig(embedding_size=8, hidden_sizes=[12, 24], depths=[1, 1], groups_width=6, num_labels=7)
        ),
        lambda: pixels(32),
    ),
    "mobilenet_v2": (
        lambda: T.MobileNetV2ForImageClassification(T.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=7)),
        lambda: pixels(32),
    ),
}  # fmt: skip


def architecture(name: str) -> tuple[nn.Module, Inputs]:
    """A model in evaluation mode, and inputs."""
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name]
    return positive_statistics(sharpened(model())), inputs()


def positive_statistics(model: nn.Module) -> nn.Module:
    """Batch norm statistics that differ from channel to channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean) * 0.1
            module.running_var = torch.rand_like(module.running_var) + 0.5
    return model
