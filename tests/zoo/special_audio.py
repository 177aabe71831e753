"""The difficult audio models: waveform encoders, spectrogram encoders, language models that listen."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.special import Special, sized, some_tokens, some_values

WAVE = {"conv_dim": [20, 24, 28], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "classifier_proj_size": 52}
EQUAL_HEADS = {name: 6 for name in ("encoder_num_key_value_heads", "decoder_num_key_value_heads", "decoder_num_attention_heads")}
VOICE = {"num_filters": 4, "hidden_size": 12, "downsampling_ratios": [2, 2], "depths": [1, 2, 1]}


def spoken(*shape: int) -> Any:
    return lambda model: {"input_features": some_values(5, *shape)}


def text_only(model: Any) -> dict[str, Any]:
    """The language model of a composite, without sound."""
    return {"input_ids": some_tokens(13), "input_features": None, "input_values": None}


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(4, 30, (5, *shape), generator=torch.Generator().manual_seed(1))


AUDIO: dict[str, Special] = {
    "audio-spectrogram-transformer": Special(
        {"max_length": 64, "patch_size": 8, "frequency_stride": 4, "time_stride": 4},
        lambda model: {"input_values": some_values(5, 64, 24)},
    ),
    "data2vec-audio": sized(**WAVE),
    "dia": Special(
        {"decoder_config": {"num_channels": 4}, "delay_pattern": [0, 2, 3, 4]},
        lambda model: {"input_features": None, "input_ids": some_tokens(13), "decoder_input_ids": codes(11, 4)},
    ),
    "granite_speech": Special(inputs=text_only),
    "granite_speech_plus": Special(inputs=text_only),
    "granite_speech5_ctc": Special({"encoder_config": {"context_size": 8, "num_key_value_heads": 6}}, spoken(40, 96)),
    "fun_asr_nano": Special({"adaptor_config": {"intermediate_size": 24}}, text_only),
    "hubert": sized(**WAVE),
    "kyutai_speech_to_text": Special(
        {"num_codebooks": 4, "codec_config": {"upsample_groups": 96}},
        lambda model: {"input_features": None, "input_values": None, "input_ids": codes(13, 5)},
    ),
    "moonshine": Special(EQUAL_HEADS, lambda model: {"input_values": some_values(5, 4000)}),
    "moonshine_streaming": Special({"num_key_value_heads": 6}, lambda model: {"input_values": some_values(5, 4000)}),
    "pop2piano": Special(inputs=spoken(40, 96)),
    "qwen3_asr": Special(inputs=text_only),
    "seamless_m4t": Special(inputs=spoken(40, 26)),
    "seamless_m4t_v2": Special(inputs=spoken(40, 26)),
    "sew": sized(**WAVE),
    "sew-d": sized(**WAVE, position_buckets=8),
    "speech-encoder-decoder": sized(encoder=WAVE),
    "speech_to_text": Special({"conv_channels": 64, "input_feat_per_channel": 20}, spoken(40, 20)),
    "speecht5": sized(**WAVE, vocab_size=199),
    "unispeech": sized(**WAVE),
    "unispeech-sat": sized(**WAVE),
    "vibevoice": Special(
        {"audio_config": VOICE, "semantic_model_config": VOICE, "diffusion_head_config": {"latent_size": 12}}, text_only
    ),
    "vibevoice_asr": Special(
        {"acoustic_tokenizer_encoder_config": VOICE, "semantic_tokenizer_encoder_config": VOICE}, text_only
    ),
    "voxtral": Special(inputs=text_only),
    "voxtral_realtime": Special(inputs=lambda model: {"input_ids": some_tokens(13), "input_features": some_values(5, 24, 104)}),
    "wav2vec2": sized(**WAVE),
    "wav2vec2-bert": Special(inputs=spoken(40, 26)),
    "wav2vec2-conformer": sized(**WAVE, conv_depthwise_kernel_size=7),
    "wavlm": sized(**WAVE),
    "whisper": Special(inputs=spoken(24, 128)),
}
