"""The difficult audio models: waveform encoders, spectrogram encoders, language models that listen."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.special import Special, sized, some_tokens, some_values

WAVE = {"conv_dim": [20, 24, 28], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "classifier_proj_size": 52}
EQUAL_HEADS = dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads", "decoder_num_attention_heads"), 6)
GRANITE = {"window_size": 15, "encoder_config": {"context_size": 8}, "projector_config": {"encoder_hidden_size": 136}}
VOICE = {"num_filters": 4, "hidden_size": 12, "downsampling_ratios": [2, 2], "depths": [1, 2, 1]}


def spoken(*shape: int) -> Any:
    return lambda model: {"input_features": some_values(5, *shape)}


def heard(count: int, **sound: Any) -> Any:
    """A text with `count` placeholders in the middle, and the sound that fills them."""

    def inputs(model: Any) -> dict[str, Any]:
        tokens = some_tokens(count + 6)
        tokens[:, 3 : 3 + count] = model.config.audio_token_id
        return {"input_ids": tokens, "input_features": None, "input_values": None} | sound

    return inputs


def all_of(length: int) -> torch.Tensor:
    return torch.ones(5, length, dtype=torch.long)


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
    "granite_speech": Special(GRANITE, heard(9, input_features=some_values(5, 40, 160))),
    "granite_speech_plus": Special(GRANITE, heard(9, input_features=some_values(5, 40, 160))),
    "granite_speech5_ctc": Special({"encoder_config": {"context_size": 8, "num_key_value_heads": 6}}, spoken(40, 96)),
    "fun_asr_nano": Special(
        {"adaptor_config": {"intermediate_size": 24}},
        heard(9, input_features=some_values(5, 9, 168), input_features_mask=all_of(9)),
    ),
    "hubert": sized(**WAVE),
    "kyutai_speech_to_text": Special(
        {"num_codebooks": 4, "codec_config": {"upsample_groups": 96}},
        lambda model: {"input_features": None, "input_values": None, "input_ids": codes(13, 5)},
    ),
    "moonshine": Special(EQUAL_HEADS, lambda model: {"input_values": some_values(5, 4000)}),
    "moonshine_streaming": Special({"num_key_value_heads": 6}, lambda model: {"input_values": some_values(5, 4000)}),
    "pop2piano": Special(inputs=spoken(40, 96)),
    "qwen3_asr": Special(inputs=lambda model: {"input_ids": some_tokens(13), "input_features": None}),  # lengths by tolist
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
        {"audio_config": VOICE, "semantic_model_config": VOICE, "diffusion_head_config": {"latent_size": 12}},
        heard(7, input_values=some_values(5, 1, 28), padding_mask=all_of(28), sample=False),
    ),
    "vibevoice_asr": Special(
        {"acoustic_tokenizer_encoder_config": VOICE, "semantic_tokenizer_encoder_config": VOICE},
        heard(7, input_values=some_values(5, 1, 28), sample=False),
    ),
    "voxtral": Special(
        {"audio_token_id": 190, "audio_config": {"intermediate_size": 384}},
        heard(16, input_features=some_values(5, 24, 128)),
    ),
    "voxtral_realtime": Special(inputs=lambda model: {"input_ids": some_tokens(13), "input_features": some_values(5, 24, 104)}),
    "wav2vec2": sized(**WAVE),
    "wav2vec2-bert": Special(inputs=spoken(40, 26)),
    "wav2vec2-conformer": sized(**WAVE, conv_depthwise_kernel_size=7),
    "wavlm": sized(**WAVE),
    "whisper": Special(inputs=spoken(24, 128)),
}
