"""The sweep over a representative part of the zoo: nothing wrong, nothing timed out, no failure."""

from __future__ import annotations

import pytest

from tests.zoo.apart import Limits, apart
from tests.zoo.prune import stages
from tests.zoo.report import outcome

TYPES = {
    "causal": (
        "bamba", "bloom", "dbrx", "deepseek_v3", "falcon", "gemma3n_text", "gpt2", "gpt_neox", "jamba", "llama", "longcat_flash",
        "mamba2", "mixtral", "mpt", "phi3", "qwen3_next", "reformer", "rwkv",
    ),
    "masked": ("bert", "deberta-v2", "fnet", "funnel", "longformer", "squeezebert", "xlm"),
    "seq2seq": ("bart", "prophetnet", "switch_transformers", "t5"),
    "image": ("convnext", "data2vec-vision", "detr", "levit", "mobilenet_v2", "regnet", "resnet", "segformer", "swin", "vit"),
    "audio": ("audio-spectrogram-transformer", "sew-d", "speecht5", "wav2vec2", "whisper"),
}  # fmt: skip
WITHOUT_HEADS = {("seq2seq", "prophetnet"): "its predicting stream mixes heads with positions in one view"}
PAIRS = [(family, name) for family, names in TYPES.items() for name in names]
LIMITS = Limits(seconds=240, bytes=4 << 30)

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("item", PAIRS, ids="-".join)
def test_every_kind_of_group_and_the_heads_can_go(item: tuple[str, str]) -> None:
    (row,) = apart(stages, [item], 1, LIMITS)
    assert outcome(row).startswith("ok"), row.get("error", row.get("wrong"))
    free, products = row["attention"]
    assert (free == products) != (item in WITHOUT_HEADS), (free, products)
    assert row["kinds"].keys() & {"ffn", "channel", "expert", "value_width"}
