"""As a stranger goes: a checkpoint directory, no inputs, transformers' own way of running experts, in memory and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune
from graphprune.streamed import compile_streamed
from tests.zoo.entries import build

TYPES = (
    "llama", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "mamba2", "falcon_h1", "gpt_neox", "gpt2", "opt", "starcoder2", "olmo2",
    "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss", "llama4_text", "jetmoe", "qwen3_next",
    "bert", "roberta", "albert", "modernbert", "deberta-v2", "electra", "esm", "t5", "bart", "whisper",
)  # fmt: skip


@pytest.mark.zoo
@pytest.mark.parametrize("name", TYPES)
def test_memory_and_stream_give_the_same_stock_checkpoint(name: str, tmp_path: Path) -> None:
    model: Any = build(name, "all").model
    model.save_pretrained(tmp_path / "model")
    source = graphprune.open_source(tmp_path / "model")
    whole = graphprune.compile(source.model, keep=0.7, method="magnitude")
    graphprune.save(whole, tmp_path / "whole", source)
    compile_streamed(tmp_path / "model", tmp_path / "out", keep=0.7)
    one, other = (type(model).from_pretrained(tmp_path / folder).state_dict() for folder in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sum(tensor.numel() for tensor in one.values()) < sum(tensor.numel() for tensor in model.state_dict().values())
