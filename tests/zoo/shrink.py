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
    (r".*(kv_heads|key_value(_attention)?_heads|kv_n_heads|linear_num_key_heads)", 2),
    (r"linear_num_value_heads|index_n_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*decoder_.*heads", 4),
    (r"(.*_)?heads|n_head", 6),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"(moe_)?num_(local_|routed_|moe_)?experts|n_routed_experts", 8),
    (r"n_group|num_expert_group", 4),
    (r"topk_group", 2),
    (r"q_lora_rank", 28),
    (r"kv_lora_rank", 20),
    (r"o_lora_rank", 18),
    (r"qk_nope_head_dim", 12),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"v_head_dim|linear_value_head_dim", 14),
    (r"index_head_dim", 16),
    (r"index_topk|sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size", 5),
    (r"linear_key_head_dim|linear_head_dim", 10),
    (r"head_dim|qk_head_dim|.*_head_dim|mamba_d_head|mamba_headdim|kv_channels|attention_head_size|dim_head|d_head", 24),
    (r"d_kv", 20),
    (r"(mamba_)?n_?groups", 2),
    (r"(mamba_d_|ssm_)?state(_size)?", 10),
    (r"(mamba_dt|time_step)_rank", 7),
    (r"(mamba_)?chunk_size", 8),
    (r"mamba_d_ssm", 192),
    (r"(.*_)?shared_.*intermediate_size|shared_experts_intermediate_size", 56),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 40),
    (r"decoder_(ffn_dim|intermediate_size)", 120),
    (
        r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_ff|dff|d_inner|dim_ff|ffn_hidden_size|feed_forward_size|mlp_dim|hidden_dim",
        FFN,
    ),
    (r"hidden_size_per_layer_input", 12),
    (r"(.*_)?hidden_size|(.*_)?d_model|n_embd|(.*_)?embed_dim|emb_dim|embedding_dim|dim|lru_width|word_embed_proj_dim", HIDDEN),
    (r"(.*_)?embedding_size", 44),
    (r"(.*_)?(num|n)_(.*_)?(layers?|blocks)|(.*_)?(encoder|decoder)_layers|depth|num_layers_per_stack", 2),
    (r"type_vocab_size", 3),
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"(.*_)?max_(.*_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length", 64),
    (r"image_size", 32),
    (r"patch_size", 4),
    (r"num_mel_bins", 24),
    (r"subsampling_conv_channels|conv_channels", 18),
    (r"feature_projection_input_dim", 26),
    (r"(.*_)?num_filters", 4),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"downsample_hidden_size", 22),
    (r"(.*_)?(codebook_size|num_codevectors_per_group)", 32),
    (r"(.*_)?(projection_dim|projection_size|proj_size|projector_.*_dim|output_dim)", 52),
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
INDEX_LISTS = re.compile(r".*(layers|_ids|_idxs|_indexes|_indices)")
TOKENS = re.compile(r".*_(id|index)")


class Tokens(dict[str, int]):
    """Special token ids: the usual ones at 0, 1, 2, each other name its own id from the top of the vocabulary down."""

    def __missing__(self, name: str) -> int:
        stem = re.sub(r"_(id|index)$", "", name)
        self[name] = {"pad_token": 0, "bos_token": 1, "eos_token": 2, "decoder_start_token": 1}.get(stem, VOCAB - 1 - len(self))
        return self[name]


def shrunken(cls: type[PreTrainedConfig], role: Mapping[str, Any], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A small config of `cls`. `changes` (nested as the config is) overrules the heuristic; `role` holds where it fits."""
    default = cls(**{name: changes[name] for name in changes if isinstance(changes[name], PreTrainedConfig)})
    fitting = {name: value for name, value in role.items() if name in own_fields(cls)}
    return cls(**sizes(default, {**fitting, **changes}, Tokens()))


def sizes(default: PreTrainedConfig, changes: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The keyword arguments that make a small `default`."""
    stored = {name: type(default).attribute_map.get(name, name) for name in own_fields(type(default))}
    values = {name: vars(default)[place] for name, place in stored.items() if place in vars(default)}
    layers = Layers.of(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        change = changes.get(name)
        if isinstance(value, PreTrainedConfig) and (change is None or isinstance(change, Mapping)):
            small[name] = type(value)(**sizes(value, change or {}, tokens))
        elif name not in changes:
            small[name] = shrink_value(name, value, layers, tokens)
    small |= {k: v for k, v in changes.items() if k not in small}
    return latent_heads(small, values, changes)


def own_fields(cls: type[PreTrainedConfig]) -> list[str]:
    """What the class adds to the base config, and the special tokens."""
    base = {field.name for field in dataclasses.fields(PreTrainedConfig) if not TOKENS.fullmatch(field.name)}
    return [field.name for field in dataclasses.fields(cls) if field.init and field.name not in base]


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """The layers that stay: the fewest (two at least, in order) in which every kind of layer occurs."""

    count: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Layers:
        named = len(values.get("layers_block_type") or ())  # some configs only name their layers
        count = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), named)
        rows = [kinds for name, value in values.items() if (kinds := kinds_of_layers(name, value, count))]
        kept: list[int] = []
        seen: set[tuple[int, str]] = set()
        for index in range(count):
            kinds = {(number, str(row[index])) for number, row in enumerate(rows)}
            if not kinds <= seen:
                seen |= kinds
                kept.append(index)
        return cls(count, tuple(kept if len(kept) >= 2 else range(min(count, 2))))

    def of_list(self, name: str, value: Any) -> Any:
        """A per-layer list or a list of layer indices, for the layers that stay."""
        if is_layer_indices(name, value, self.count):
            return [new for new, old in enumerate(self.kept) if old in value]
        return [value[i] for i in self.kept] if len(value) == self.count > 2 else value


def kinds_of_layers(name: str, value: Any, count: int) -> list[Any] | None:
    if not isinstance(value, (list, tuple)):
        return None
    if is_layer_indices(name, value, count):
        return [index in value for index in range(count)]
    return list(value) if len(value) == count > 2 else None


def is_layer_indices(name: str, value: Any, count: int) -> bool:
    numbers = bool(value) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    return numbers and bool(INDEX_LISTS.fullmatch(name)) and list(value) == sorted(set(value)) and 0 <= value[-1] < count


def shrink_value(name: str, value: Any, layers: Layers, tokens: Tokens) -> Any:
    if isinstance(value, (list, tuple)):
        return tokens[name] if TOKENS.fullmatch(name) else layers.of_list(name, value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if TOKENS.fullmatch(name):
        return tokens[name] if value >= 0 else value
    if name in LAYER_COUNTS:
        return min(value, len(layers.kept))
    return next((min(value, size) for pattern, size in ROWS if re.fullmatch(pattern, name)), value)


def latent_heads(small: dict[str, Any], values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention has one key per query head and head widths that are sums; of its layers one stays dense."""
    derived: dict[str, Any] = {}
    if "first_k_dense_replace" in values:
        derived["first_k_dense_replace"] = 1
    if values.get("kv_lora_rank") and values.get("qk_rope_head_dim"):
        both = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
        same = values.get("head_dim") == values["qk_rope_head_dim"]
        derived |= {
            "num_key_value_heads": small["num_attention_heads"],
            "qk_head_dim": both,
            "head_dim": small["qk_rope_head_dim"] if same else both,
        }
    return small | {name: value for name, value in derived.items() if name in values and name not in changes}
