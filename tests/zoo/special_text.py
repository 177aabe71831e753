"""The difficult text models: decoders, encoders and both."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.special import Special, sized, some_tokens
from tests.zoo.special_audio import AUDIO

# Fragments that several types share.
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [136, 120, 136, 120],
    "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    "num_kv_shared_layers": 2,
    "laurel_rank": 7,
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 40}
DOTS3_NOTE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 26,
    "swa_kv_lora_rank": 18,
    "swa_head_dim": 22,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 10,
}
LLAMA4 = {"intermediate_size": 40, "interleave_moe_layer_step": 2, "moe_layers": [1], "num_experts_per_tok": 2}
QWEN4 = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "ple_layer_ids": [3],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
    "hc_lowrank": 15,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 28,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "eos_token_id": 2,
}
ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 192,
    "attention_head_dim": 32,
}
BLT_PART = {"hidden_size": 96, "hidden_size_global": 80}


REFORMER = {
    "attn_layers": ["local", "lsh"],
    "num_hidden_layers": 2,
    "axial_pos_shape": [4, 16],
    "axial_pos_embds_dim": [32, 64],
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_buckets": 4,
    "hash_seed": 3,
}


PERCEIVER = {
    "num_latents": 18,
    "d_latents": 72,
    "num_self_attends_per_block": 2,
    "num_blocks": 1,
    "self_attention_widening_factor": 2,
    "num_cross_attention_heads": 4,
}


CAUSAL: dict[str, Special] = {
    "bamba": sized(num_hidden_layers=3, attn_layer_indices=[1]),
    "bloom": sized(hidden_size=96),
    "blt": Special(
        {
            "encoder_config": BLT_PART,
            "decoder_config": BLT_PART,
            "global_config": {"hidden_size": 80, "num_attention_heads": 4},
            "encoder_hash_byte_group_vocab": 61,
        },
        lambda model: {"patch_lengths": torch.tensor([[1, 4, 4, 4]] * 5)},
    ),
    "codegen": sized(n_head=8),
    "cohere2_moe": sized(num_shared_experts=1, mlp_layer_types=["dense", "sparse"]),
    "cohere_compass_text": sized(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")},
    ),
    "dbrx": sized(
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"moe_num_experts": 8, "moe_top_k": 2},
    ),
    "deepseek_v2": sized(num_experts_per_tok=2),
    "deepseek_v4": sized(
        head_dim=32,
        partial_rotary_factor=0.25,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        o_groups=2,
    ),
    "dots1": sized(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    "dots3_note": sized(
        text_config=DOTS3_NOTE,
        vision_config={"adapter_in_dim": 96, "adapter_out_dim": 96, "mlp_layer_types": ["dense", "sparse"]},
        audio_config={"adapter_input_size": 96, "adapter_out_dim": 96},
    ),
    "dots3_note_text": sized(**DOTS3_NOTE),
    "falcon_h1": sized(mamba_d_head=24),
    "gemma3n": Special({"text_config": GEMMA3N}, cls="Gemma3nForCausalLM"),
    "gemma3n_text": sized(**GEMMA3N),
    "gemma4": sized(text_config=GEMMA4 | GEMMA4_MOE),
    "gemma4_text": sized(**GEMMA4),
    "gemma4_unified": sized(text_config=GEMMA4),
    "gemma4_unified_text": sized(**GEMMA4),
    "gpt_neo": sized(attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"]),
    "granitemoe_swa": sized(shared_intermediate_size=56),
    "granitemoehybrid": sized(layer_types=["linear_attention", "full_attention"]),
    "granitemoeshared": sized(shared_intermediate_size=56),
    "helium": sized(head_dim=16),
    "hunyuan_v1_dense": sized(head_dim=24),
    "hunyuan_v1_moe": sized(head_dim=24, num_experts=8, moe_topk=2),
    "inkling_text": sized(logits_mup_width_multiplier=1.0, mlp_layer_types=["dense", "sparse"]),
    "jamba": sized(num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2),
    "laguna": sized(num_attention_heads_per_layer=[6, 4], layer_types=["full_attention", "sliding_attention"]),
    "lfm2": sized(layer_types=["conv", "full_attention"], full_attn_idxs=[1], block_multiple_of=8),
    "lfm2_moe": sized(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4": sized(text_config=LLAMA4),
    "llama4_text": sized(**LLAMA4),
    "longcat_flash": sized(zero_expert_num=3),
    "mamba2": sized(num_heads=8),
    "mellum": sized(layer_types=["full_attention", "sliding_attention"]),
    "mimo_v2_flash": sized(num_attention_heads=8, num_key_value_heads=2),
    "minimax_m3_vl_text": sized(mlp_layer_types=["dense", "sparse"]),
    "ministral": sized(head_dim=24),
    "moshi": sized(num_codebooks=4),
    "musicgen": Special(inputs=lambda model: {"input_ids": some_tokens(13, 5 * 4)}),
    "musicgen_melody": Special(inputs=lambda model: {"input_ids": some_tokens(13, 5 * 4)}),
    "nemotron": sized(num_key_value_heads=2),
    "qwen4_exp": Special({"text_config": QWEN4}, lambda model: {"input_ids": some_tokens(7, 2)}),  # a loop over rows and positions
    "qwen4_exp_text": Special(QWEN4, lambda model: {"input_ids": some_tokens(7, 2)}),
    "reformer": Special(REFORMER, lambda model: {"input_ids": some_tokens(16)}),  # padding makes a mask that is summed
    "xlnet": Special({"d_head": 16}, lambda model: {"use_mems": False}),
    "xmod": sized(default_language="en_XX"),
    "zamba": sized(**ZAMBA),
    "zamba2": sized(**ZAMBA),
}
SPARSE = Special({"block_size": 2, "num_random_blocks": 1}, lambda model: {"input_ids": some_tokens(16)})  # over seven blocks
MASKED: dict[str, Special] = {
    "big_bird": SPARSE,
    "esm": sized(vocab_size=199, pad_token_id=0, mask_token_id=198),
    "esmc": sized(vocab_size=199, num_key_value_heads=6, head_dim=16),
    "funnel": sized(block_sizes=[2, 1], block_repeats=[1, 1], num_decoder_layers=1),
    "neomme": sized(head_dim=32),
    "perceiver": Special(PERCEIVER, lambda model: {"input_ids": None, "inputs": some_tokens(13)}),
    "reformer": Special(REFORMER, lambda model: {"input_ids": some_tokens(16)}),
    "squeezebert": sized(hidden_size=96, embedding_size=96, num_attention_heads=8),  # over groups of four
    "xmod": sized(default_language="en_XX"),
}


def masked(model: Any) -> dict[str, Any]:
    """An explicit mask, where the model would otherwise look for padding in the tokens."""
    return {"attention_mask": torch.ones(5, 13, dtype=torch.long)}


def both_masked(model: Any) -> dict[str, Any]:
    return masked(model) | {"decoder_attention_mask": torch.ones(5, 11, dtype=torch.long)}


SPEECHLM = {
    "audio_config": {
        "asr_config": {"subsampling_conv_channels": 8},
        "diarization_config": {"audio_config": {"subsampling_conv_channels": 8}},
    },
}
SEQ2SEQ: dict[str, Special] = {
    "bigbird_pegasus": SPARSE,
    "fsmt": Special(inputs=both_masked),
    "led": sized(attention_window=4),
    "longt5": Special({"local_radius": 4}, masked),
    "nemo_speechlm": sized(**SPEECHLM),
    "nllb-moe": sized(encoder_sparse_step=2, decoder_sparse_step=2),
    "switch_transformers": Special({"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, masked),
    **{name: AUDIO[name] for name in ("granite_speech", "granite_speech_plus", "vibevoice_asr", "voxtral", "voxtral_realtime")},
}
