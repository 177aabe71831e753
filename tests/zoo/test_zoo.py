"""The zoo itself: every type has a builder, builds are repeatable, weights are sharp."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.zoo.entries import FAMILIES, build, model_types
from tests.zoo.shrink import Layers, shrunken
from tests.zoo.weights import sharpen


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_names_types_and_all_is_their_union(family: str) -> None:
    types = model_types(family)
    assert len(types) == len(set(types)) > 20
    assert set(types) <= set(model_types("all"))


@pytest.mark.parametrize(
    ("model_type", "family"), [("llama", "causal"), ("bert", "masked"), ("t5", "seq2seq"), ("resnet", "image"), ("hubert", "audio")]
)
def test_an_entry_runs_and_is_the_same_twice(model_type: str, family: str) -> None:
    one, two = build(model_type, family), build(model_type, family)
    with torch.no_grad():
        first, second = one.model(**one.inputs)[0], two.model(**two.inputs)[0]
    assert torch.isfinite(first).all() and torch.equal(first, second)
    assert not one.model.training and first.dtype == torch.float32


def test_sizes_that_mean_different_things_differ() -> None:
    config = shrunken(LlamaConfig, {}, {})
    heads = config.num_attention_heads * config.head_dim
    assert len({config.hidden_size, config.intermediate_size, heads, config.vocab_size}) == 4
    assert 1 < config.num_key_value_heads < config.num_attention_heads


def test_every_kind_of_layer_is_kept_in_order() -> None:
    kinds = ["linear", "linear", "full", "linear", "linear", "full"]
    layers = Layers.of({"num_hidden_layers": 6, "layer_types": kinds, "dense_layers": [0, 1]})
    assert layers.kept == (0, 2)
    assert layers.of_list("layer_types", kinds) == ["linear", "full"]
    assert layers.of_list("dense_layers", [0, 1]) == [0]


def test_sharpening_is_seeded_and_scales_by_fan_in() -> None:
    models = [nn.Linear(400, 300), nn.Linear(400, 300), nn.Linear(400, 300)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        sharpen(model, seed)
    same, also, other = (model.weight for model in models)
    assert torch.equal(same, also) and not torch.equal(same, other)
    assert same.std().item() == pytest.approx(1.5 / 20, rel=0.02)
