"""Layers of unlike sizes, many families: saved, loaded with graphprune and by transformers alone, the same logits and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graphprune
from tests.zoo.entries import build

TYPES = {
    "causal": (
        "bloom", "cohere", "falcon", "gemma2", "gpt2", "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "olmo2", "opt",
        "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2",
    ),
    "seq2seq": ("bart", "blenderbot", "m2m_100", "mbart", "pegasus", "t5"),
    "masked": ("bert", "electra", "roberta"),
}  # fmt: skip
HEADS_ALIKE = ("bloom", "phi3", "t5")
"""Slopes computed from the number of heads, a configuration all layers look it up in, a bias that all layers share."""
AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "masked": transformers.AutoModelForMaskedLM,
}

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize(("family", "model_type"), [(family, name) for family, names in TYPES.items() for name in names])
def test_layers_that_differ_round_trip(family: str, model_type: str, tmp_path: Path) -> None:
    entry = build(model_type, family)
    seed = next(seed for seed in range(8) if not alike(pruned(entry, seed)))
    result = pruned(entry, seed)
    assert result.pruned.config is None
    graphprune.save(result, tmp_path / "out")
    words = {"input_ids": torch.tensor([[5, 17, 3, 40, 9]])}
    start = {"decoder_start_token_id": 0} if family == "seq2seq" else {}
    for loaded in (graphprune.load(tmp_path / "out"), AUTO[family].from_pretrained(tmp_path / "out", trust_remote_code=True)):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**entry.inputs)[0], result.model(**entry.inputs)[0])
        if family != "masked":
            assert torch.equal(written(loaded, words | start, cache=True), written(result.model, words | start, cache=False))


def pruned(entry: Any, seed: int) -> graphprune.Result:
    """Heads and inner widths cut at random, every layer by itself."""
    kinds = ["ffn"] if entry.model_type in HEADS_ALIKE else ["head", "ffn", "expert"]
    rules: dict[str, Any] = {"scope": "global", "alike": False, "round_to": {"ffn": 8}, "verify": False}
    return graphprune.compile(entry.model, entry.inputs, keep=0.7, kinds=kinds, method="random", seed=seed, **rules)


def alike(result: graphprune.Result) -> bool:
    return result.pruned.config is not None


def written(model: Any, words: dict[str, Any], cache: bool) -> torch.Tensor:
    return model.generate(**words, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
