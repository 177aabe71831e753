"""A transformers config class in, a small config of the same structure out: every size shrunk, every kind of layer kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, FFN, VOCAB, LENGTH = 96, 136, 199, 13

# (name pattern, largest value): the first row that matches wins. Sizes differ from one another on purpose, so that two
# axes that have nothing to do with each other are never of one length by accident.
ROWS: tuple[tuple[str, int], ...] = (
    (r"(num_)?decoder_(num_)?(self_)?(attention_)?heads|decoder_num_attention_heads|num_decoder_attention_heads", 4),
    (r"(.*_)?(num_|n_)(linear_|self_|cross_)?(attention_)?heads?|encoder_attention_heads|attention_heads|n_heads?", 6),
    (r".*(kv_heads|key_value(_attention)?_heads|kv_n_heads)", 2),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"(moe_)?num_(local_|routed_|moe_)?experts|n_routed_experts", 8),
    (r"n_group|num_expert_group", 4),
    (r"topk_group", 2),
    (r"q_lora_rank", 28),
    (r"kv_lora_rank", 20),
    (r"qk_nope_head_dim", 12),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 14),
    (r"o_lora_rank", 18),
    (r"index_head_dim", 16),
    (r"index_n_heads", 4),
    (r"index_topk", 5),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_key_head_dim|linear_head_dim", 10),
    (r"linear_value_head_dim", 14),
    (r"mamba_d_head|mamba_head_?dim", 24),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"(mamba_)?n_?groups", 2),
    (r"(mamba_d_|ssm_)?state(_size)?", 10),
    (r"(mamba_dt|time_step)_rank", 7),
    (r"(mamba_)?chunk_size", 8),
    (r"qk_head_dim|.*head_dim|kv_channels|attention_head_size|dim_head|d_head", 24),
    (r"d_kv", 20),
    (r"(.*_)?shared_.*intermediate_size|shared_experts_intermediate_size", 56),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 40),
    (r"decoder_(ffn_dim|intermediate_size)", 120),
    (r"(dense_|decoder_|alignment_)?intermediate_size(_mlp)?|(encoder_)?ffn_dim|d_ff|dff|d_inner|dim_ff|ffn_hidden_size|feed_forward_size|mlp_dim|hidden_dim", FFN),
    (r"hidden_size_per_layer_input", 12),
    (r"(.*_)?hidden_size|(.*_)?d_model|n_embd|(.*_)?embed_dim|emb_dim|embedding_dim|dim|embed_dims|mamba_d_ssm|lru_width|word_embed_proj_dim", HIDDEN),
    (r"embedding_size|.*_embedding_size|.*embed_dim", 44),
    (r"(.*_)?(num|n)_(hidden_|encoder_|decoder_)?(layers?|blocks)|(.*_)?(encoder|decoder)_layers|depth|num_layers_per_stack", 2),
    (r"(.*_)?num_(hidden_)?layers", 2),
    (r"type_vocab_size", 3),
    (r"(.*_)?vocab_size(_.*)?|decoder_vocab_size", VOCAB),
    (r"(.*_)?(max_(.*_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length)", 64),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size", 5),
    (r"image_size", 32),
    (r"patch_size", 4),
    (r"num_mel_bins", 20),
    (r"(.*_)?(codebook_size|num_codevectors_per_group)", 30),
    (r"(.*_)?(projection_dim|projection_size|proj_size|projector_.*_dim|output_dim)", 52),
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KEEP = {"num_labels", "id2label", "label2id", "transformers_version", "model_type", "architectures", "per_layer_config"}
TOKENS = re.compile(r".*token(_id|_index)?|.*_id|.*_index")


class Tokens(dict[str, int]):
    """Special token ids: the usual ones at 0, 1, 2, each other name its own id from the top of the vocabulary down."""

    def __missing__(self, name: str) -> int:
        stem = re.sub(r"_(id|index)$", "", name)
        self[name] = {"pad_token": 0, "bos_token": 1, "eos_token": 2, "decoder_start_token": 1}.get(
            stem, VOCAB - 1 - len(self)
        )
        return self[name]


def shrunken(cls: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A small config of `cls`; `changes` (nested as the config is) overrules the heuristic, None-valued keys included."""
    return cls(**sizes(cls(), changes, Tokens()))


def sizes(default: PreTrainedConfig, changes: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The keyword arguments that make a small `default`."""
    values = {name: getattr(default, name) for name in own_fields(type(default)) if hasattr(default, name)}
    kept = representative_layers(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        change = changes.get(name)
        if isinstance(value, PreTrainedConfig) and (change is None or isinstance(change, Mapping)):
            small[name] = type(value)(**sizes(value, change or {}, tokens))
        elif name in changes:
            small[name] = change
        else:
            small[name] = shrink_value(name, value, kept, layer_count(values), tokens)
    small.update({k: v for k, v in changes.items() if k not in small})
    small = {k: v for k, v in small.items() if k not in KEEP or k in changes}
    return latent_heads(small, changes)


def own_fields(cls: type[PreTrainedConfig]) -> list[str]:
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    special = {name for name in base if TOKENS.fullmatch(name)}
    return [field.name for field in dataclasses.fields(cls) if field.init and (field.name not in base or field.name in special)]


def layer_count(values: Mapping[str, Any]) -> int | None:
    return next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)


def representative_layers(values: Mapping[str, Any]) -> list[int]:
    """The fewest layers (two at least, in order) in which every kind of layer that a per-layer list names occurs."""
    count = layer_count(values)
    if count is None:
        return []
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count > 2]
    kept: list[int] = []
    seen: set[tuple[int, str]] = set()
    for index in range(count):
        kinds = {(number, str(row[index])) for number, row in enumerate(lists)}
        if not kinds <= seen:
            seen |= kinds
            kept.append(index)
    return kept if len(kept) >= 2 else sorted({*kept, *range(min(2, count))})[:2]


def shrink_value(name: str, value: Any, kept: list[int], count: int | None, tokens: Tokens) -> Any:
    if isinstance(value, (list, tuple)):
        return [value[i] for i in kept] if count is not None and len(value) == count > 2 else shrink_token_list(name, value, tokens)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if TOKENS.fullmatch(name):
        return tokens[name] if value >= 0 else value
    if name in LAYER_COUNTS:
        return max(len(kept), min(value, 2))
    return next((min(value, size) for pattern, size in ROWS if re.fullmatch(pattern, name)), value)


def shrink_token_list(name: str, value: Any, tokens: Tokens) -> Any:
    return tokens[name] if TOKENS.fullmatch(name) else value


def latent_heads(small: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention has one key per query head, its head width is the sum of two, and a few layers stay dense."""
    if "first_k_dense_replace" in small and "first_k_dense_replace" not in changes:
        small["first_k_dense_replace"] = 1
    if small.get("kv_lora_rank") and small.get("qk_rope_head_dim"):
        for name, value in (("num_key_value_heads", small["num_attention_heads"]), ("head_dim", small["qk_rope_head_dim"]),
                            ("qk_head_dim", small["qk_rope_head_dim"] + small["qk_nope_head_dim"])):
            if name in small and name not in changes:
                small[name] = value
    return small
