"""Whisper's alignment heads after a compile are the heads that they were before it, wherever those stand now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import graphprune
from graphprune.copying import duplicate

SIZES = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
MORE = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WIDTH = 24 // 4
ALIGNED = [[0, 1], [1, 3], [1, 0], [2, 2], [2, 0]]
Place = tuple[int, int]


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **MORE, **TOKENS)).eval()  # type: ignore[arg-type]
    model.generation_config.alignment_heads = [list(place) for place in ALIGNED]
    return model


def heads(model: Any) -> dict[Place, torch.Tensor]:
    """The rows of the query projection of every cross-attention head, by decoder layer and head."""
    rows = [layer.encoder_attn.q_proj.weight.detach().split(WIDTH) for layer in model.model.decoder.layers]
    return {(place, head): own for place, layer in enumerate(rows) for head, own in enumerate(layer)}


def stand_now(before: Any, after: Any) -> list[list[int]]:
    """Where the aligned heads of one model stand in another, by their weights alone."""
    old, new = heads(before), heads(after)
    return [list(now) for layer, head in ALIGNED for now, rows in new.items() if torch.equal(rows, old[layer, head])]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("kind", "keep"), [("head", 0.5), ("layer", 0.6)])
def test_the_same_heads_are_aligned(whisper: WhisperForConditionalGeneration, kind: str, keep: float, inplace: bool) -> None:
    before = duplicate(whisper)
    result = graphprune.compile(whisper, keep=keep, kinds=[kind], inplace=inplace)
    expected = stand_now(before, result.model)
    assert 0 < len(expected) < len(ALIGNED), "this cut would prove nothing"
    assert result.model.generation_config.alignment_heads == expected
    assert before.generation_config.alignment_heads == ALIGNED
    again = graphprune.replay(before, result.plan)
    assert again.model.generation_config.alignment_heads == expected
    assert before.generation_config.alignment_heads == ALIGNED


def test_where_no_aligned_head_is_left_it_says_so(whisper: WhisperForConditionalGeneration) -> None:
    first = graphprune.compile(whisper, keep=0.5, kinds=["head"])
    kept = heads(first.model)
    whisper.generation_config.alignment_heads = [
        list(place) for place, rows in heads(whisper).items() if not any(torch.equal(rows, own) for own in kept.values())
    ]
    result = graphprune.replay(whisper, first.plan)
    assert not hasattr(result.model.generation_config, "alignment_heads")
    assert any("timestamps" in note for note in result.notes)
