"""As a stranger goes: a checkpoint directory, no inputs, transformers' own way of running experts, in memory and streamed."""

from __future__ import annotations

import pytest

from tests.zoo.stranger import IN_PLACE, SAME, as_stranger

TYPES = (
    "llama", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "mamba2", "falcon_h1", "gpt_neox", "gpt2", "opt", "starcoder2", "olmo2",
    "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss", "llama4_text", "jetmoe", "qwen3_next",
    "bert", "roberta", "albert", "modernbert", "deberta-v2", "electra", "esm", "t5", "bart", "whisper", "wav2vec2",
    "cohere2_moe", "hunyuan_v1_moe", "jamba", "longt5", "t5gemma", "umt5", "convnext", "fsmt", "xmod", "mobilebert", "resnet", "detr",
)  # fmt: skip


@pytest.mark.zoo
@pytest.mark.parametrize("name", TYPES)
def test_memory_and_stream_give_the_same_stock_checkpoint(name: str) -> None:
    assert as_stranger(name, "all") == {"memory": "stock", "inplace": IN_PLACE, "stream": SAME}
