"""What one field of a config sizes shrinks together, by one share, whatever the scope: the checkpoint stays a stock one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    XmodConfig,
    XmodForMaskedLM,
)

import graphprune
from graphprune.errors import UserMistake
from tests.models import sharpened

SCOPES = ("local", "global")


@pytest.fixture(scope="module")
def t5() -> Any:
    sizes = dict(d_model=48, d_kv=8, num_heads=6, d_ff=68, num_layers=2, num_decoder_layers=2, vocab_size=99)
    return sharpened(T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)))


@pytest.fixture(scope="module")
def deepseek() -> Any:
    sizes = dict(hidden_size=48, intermediate_size=68, moe_intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)
    experts = dict(n_routed_experts=4, n_shared_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)
    heads = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4)
    return sharpened(DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=99, **sizes, **experts, **heads)))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("keep", [0.55, 0.7, 0.8, 0.85])
def test_an_encoder_and_its_decoder_stay_one_width_and_one_number_of_heads(t5: Any, keep: float, scope: str) -> None:
    result = graphprune.compile(t5, keep=keep, scope=scope, method="magnitude")
    assert result.pruned.config is not None
    config = result.model.config
    sizes = {(cut.kind, len(cut.kept)) for cut in result.plan.cuts}
    assert sizes <= {("ffn", config.d_ff), ("head", config.num_heads)}
    assert config.d_ff < 68
    assert config.num_heads < 6 or scope == "global"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("keep", [0.55, 0.7, 0.8])
def test_shared_experts_stay_as_many_times_as_wide_as_one(deepseek: Any, keep: float, scope: str) -> None:
    result = graphprune.compile(deepseek, keep=keep, scope=scope, method="magnitude")
    assert result.pruned.config is not None
    widths = {cut.size: len(cut.kept) for cut in result.plan.cuts if cut.kind == "ffn"}
    assert widths[40] == 2 * widths[20] < 40


class Two(nn.Module):
    """Two widths, the second twice the first."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6)
        self.grow, self.end = nn.Linear(6, wide), nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.end(self.grow(self.down(self.up(x).relu())).relu())
        return hidden


def planned(net: nn.Module, keep: float) -> dict[int, tuple[int, ...]]:
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(net, torch.randn(2, 5))))
    chosen = [group for group in groups if group.size > 6]
    scores = graphprune.Scores({group.name: torch.arange(group.size).double() for group in groups}, "by number")
    protect = [group.name for group in groups if group.size <= 6]
    budget = graphprune.Budget(keep, kinds=["all"], protect=protect, together=[[group.name for group in chosen]])
    return {cut.size: cut.kept for cut in graphprune.select(groups, scores, budget).cuts}


@pytest.mark.parametrize("keep", [0.5, 0.6, 0.75, 0.9])
def test_groups_that_go_together_keep_their_ratio_and_lose_their_least(keep: float) -> None:
    cuts = planned(Two(), keep)
    assert len(cuts[16]) == 2 * len(cuts[8]) < 16
    assert all(kept == tuple(range(size - len(kept), size)) for size, kept in cuts.items())


def test_sizes_without_a_common_share_are_refused() -> None:
    with pytest.raises(UserMistake, match="cannot shrink by one share"):
        planned(Two(20), 0.6)


def test_of_a_kind_only_those_go_that_a_field_sizes() -> None:
    sizes = dict(hidden_size=48, intermediate_size=68, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    model = sharpened(XmodForMaskedLM(XmodConfig(languages=("en_XX",), default_language="en_XX", **sizes)))
    result = graphprune.compile(model, keep=0.7, method="magnitude")
    assert result.pruned.config is not None
    assert {".intermediate." in cut.group for cut in result.plan.cuts} == {True}
    assert any(line.startswith("2 ffn groups are left alone") for line in result.notes)


def test_a_width_and_the_stream_it_is_four_times_of_shrink_together() -> None:
    sizes = dict(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, image_size=32)
    model = sharpened(ConvNextForImageClassification(ConvNextConfig(**sizes)))
    result = graphprune.compile(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, keep=0.6, method="magnitude")
    assert result.pruned.config is not None
    assert result.model.config.hidden_sizes[1] < 12


def test_the_widths_of_a_residual_network_follow_its_stages() -> None:
    sizes = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
    model = sharpened(ResNetForImageClassification(ResNetConfig(**sizes)))
    result = graphprune.compile(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, keep=0.6, method="magnitude")
    assert result.pruned.config is not None
    assert result.model.config.hidden_sizes[1] < 32
