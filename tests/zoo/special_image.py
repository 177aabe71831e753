"""The difficult image models: hierarchies of stages, windows, video, detectors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ResNetConfig

from tests.zoo.special import Special, sized, some_tokens, some_values

WIDTHS, DEPTHS = [16, 24, 40, 56], [1, 2, 1, 1]
STAGES = {"hidden_sizes": WIDTHS, "depths": DEPTHS, "image_size": 64}
PYRAMID = {"num_encoder_blocks": 4, "hidden_sizes": WIDTHS, "depths": DEPTHS, "num_attention_heads": [1, 2, 5, 4]}
WINDOWS = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}
BOTTLENECKS = {"embedding_size": 12, "hidden_sizes": [32, 48, 80, 112], "depths": DEPTHS}
PERCEIVER = {
    "num_latents": 18,
    "d_latents": 72,
    "num_self_attends_per_block": 2,
    "num_blocks": 1,
    "self_attention_widening_factor": 2,
    "num_cross_attention_heads": 4,
    "image_size": 8,
    "d_model": 60,
}
DINO = {"image_size": 16, "patch_size": 4}


def detector(levels: int = 1, **config: Any) -> Special:
    """A detector on a small plain ResNet instead of a backbone from another library."""
    stages = [f"stage{4 - i}" for i in reversed(range(levels))]
    backbone = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    backbone |= {"backbone_config": ResNetConfig(**BOTTLENECKS, out_features=stages)}
    return Special({**backbone, "num_queries": 7, **config}, gain=1.0)


def convolutions(**config: Any) -> Special:
    """Batch norm in eval mode normalises nothing: a smaller gain keeps deep stacks in range."""
    return Special(config, gain=1.0)


def image_tokens(count: int, name: str) -> Any:
    """A text whose middle is `count` image placeholders, with the image itself."""

    def inputs(model: Any) -> dict[str, Any]:
        tokens = some_tokens(count + 6)
        tokens[:, 3 : 3 + count] = getattr(model.config, name)
        return {"input_ids": tokens}

    return inputs


def tiles(model: Any) -> dict[str, Any]:
    images = {"pixel_values": some_values(5, 1, 2, 3, 32, 32)}
    return images | {"aspect_ratio_ids": torch.full((5, 1), 2), "aspect_ratio_mask": torch.ones(5, 1, 2, dtype=torch.long)}


def patches(model: Any) -> dict[str, Any]:
    shapes = torch.tensor([[4, 4]] * 5)
    return {"pixel_values": some_values(5, 16, 48), "pixel_attention_mask": torch.ones(5, 16), "spatial_shapes": shapes}


def video(name: str = "pixel_values") -> Any:
    return lambda model: {"pixel_values": None} | {name: some_values(5, 4, 3, 32, 32)}


IMAGE: dict[str, Special] = {
    "bit": convolutions(embedding_size=16, num_groups=4, hidden_sizes=[32, 48, 64, 80], depths=DEPTHS),
    "cohere2_vision": Special({"alignment_intermediate_size": 136}, image_tokens(16, "image_token_id")),
    "conditional_detr": detector(),
    "convnext": sized(**STAGES),
    "convnextv2": sized(**STAGES),
    "cvt": sized(embed_dim=[16, 24, 48], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    "dab-detr": detector(),
    "deformable_detr": detector(levels=3, num_feature_levels=4),
    "depth_pro": Special(
        {
            "patch_size": 16,
            "fusion_hidden_size": 24,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [20, 20],
            "scaled_images_feature_dims": [28, 28, 20],
            "image_model_config": DINO,
            "patch_model_config": DINO,
            "fov_model_config": DINO,
        },
        lambda model: {"pixel_values": some_values(5, 3, 64, 64)},
    ),
    "detr": detector(),
    "dinov3_convnext": sized(**STAGES),
    "donut-swin": sized(**WINDOWS),
    "efficientnet": convolutions(image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
    "focalnet": sized(image_size=64, embed_dim=16, hidden_sizes=[32, 64, 128, 128], depths=DEPTHS),
    "glpn": sized(**PYRAMID),
    "hgnet_v2": convolutions(
        embedding_size=12,
        hidden_sizes=[16, 32, 48, 64],
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 32, 48],
        stage_mid_channels=[10, 14, 18, 22],
        stage_out_channels=[16, 32, 48, 64],
        stage_num_blocks=DEPTHS,
        stage_numb_of_layers=[2, 2, 2, 2],
        depths=DEPTHS,
    ),
    "hiera": sized(image_size=[64, 64], embed_dim=12, num_heads=[1, 2, 2, 4], depths=DEPTHS),
    "imagegpt": Special(inputs=lambda model: {"pixel_values": None, "input_ids": some_tokens(16)}),
    "levit": convolutions(
        image_size=128,
        patch_size=16,
        hidden_sizes=[16, 24, 40],
        num_attention_heads=[2, 3, 4],
        key_dim=[8, 6, 10],
        depths=[1, 1, 1],
    ),
    "llama4": sized(vision_config={"intermediate_size": 384, "projector_input_dim": 52}),
    "lw_detr_vit": sized(image_size=64, pretrain_image_size=64, window_block_indices=[0]),
    "maskformer-swin": sized(**WINDOWS),
    "mllama": Special(
        {
            "vision_config": {
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 288,
                "num_global_layers": 1,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            }
        },
        tiles,
    ),
    "mobilenet_v1": convolutions(image_size=64, depth_multiplier=0.25),
    "mobilenet_v2": convolutions(image_size=64, depth_multiplier=0.25),
    "mobilevit": convolutions(
        image_size=64, patch_size=2, hidden_sizes=[24, 36, 48], neck_hidden_sizes=[8, 12, 16, 20, 28, 32, 80]
    ),
    "mobilevitv2": convolutions(
        image_size=64, patch_size=2, width_multiplier=0.25, base_attn_unit_dims=[48, 64, 96], n_attn_blocks=[1, 2, 1]
    ),
    "perceiver": sized(**PERCEIVER),
    "poolformer": sized(num_encoder_blocks=4, hidden_sizes=WIDTHS, depths=DEPTHS),
    "pp_lcnet": convolutions(scale=0.25, class_expand=60),
    "pp_lcnet_v3": Special({"scale": 0.25}, gain=0.4),  # five branches are summed
    "pp_lcnet_v4": convolutions(
        stem_channels=[3, 8, 12],
        stage_out_channels=[12, 16, 24, 40],
        block_configs=[
            [[3, 12, 12, 1, True]],
            [[3, 12, 16, 1, False]],
            [[3, 16, 24, [2, 1], False], [3, 24, 24, 1, True]],
            [[3, 24, 40, [2, 1], False]],
        ],
    ),
    "pvt": sized(image_size=64, **PYRAMID),
    "pvt_v2": sized(image_size=[64, 64], **PYRAMID),
    "regnet": convolutions(embedding_size=12, groups_width=8, hidden_sizes=WIDTHS, depths=DEPTHS),
    "resnet": convolutions(**BOTTLENECKS),
    "rt_detr_resnet": convolutions(**BOTTLENECKS),
    "sapiens2": sized(
        num_hidden_layers=3,
        num_key_value_heads_per_layer=[6, 2, 6],
        num_key_value_attention_heads=2,
        num_first_full_attention_layers=1,
        num_last_full_attention_layers=1,
    ),
    "segformer": sized(**PYRAMID),
    "shieldgemma2": Special(
        {"mm_tokens_per_image": 16, "yes_token_index": 150, "no_token_index": 151}, image_tokens(16, "image_token_index")
    ),
    "siglip2": Special(inputs=patches),
    "swiftformer": convolutions(image_size=64, embed_dims=WIDTHS, depths=[1, 1, 2, 1]),
    "swin": sized(**WINDOWS),
    "swin2sr": sized(**WINDOWS | {"image_size": 16}),
    "swinv2": sized(**WINDOWS, pretrained_window_sizes=[0, 0]),
    "table-transformer": detector(),
    "textnet": convolutions(
        image_size=[64, 64],
        stem_out_channels=12,
        hidden_sizes=[12, 16, 24, 40, 56],
        conv_layer_kernel_sizes=[[[3, 3], [3, 3]], [[3, 3], [1, 3], [3, 1]], [[3, 3], [3, 1]], [[3, 3], [1, 3]]],
        conv_layer_strides=[[1, 2], [2, 1, 1], [2, 1], [2, 1]],
    ),
    "timesformer": Special({"num_frames": 4}, video()),
    "uvdoc_backbone": convolutions(
        resnet_head=[[3, 12], [12, 12]],
        resnet_configs=[
            [[12, 12, 1, False], [12, 12, 3, False]],
            [[12, 20, 1, True], [20, 20, 3, False]],
            [[20, 32, 1, True], [32, 32, 3, False]],
        ],
        stage_configs=[[[32, 1]], [[32, 2]], [[32, 5]], [[32, 8], [32, 3], [32, 2]], [[32, 12]], [[32, 6]]],
    ),
    "videomae": Special({"num_frames": 4}, video()),
    "videoprism_vision_model": Special({"num_frames": 4, "tubelet_size": [1, 8, 8]}, video("pixel_values_videos")),
    "vit_mae": Special(inputs=lambda model: {"noise": some_values(5, 64)}),
    "vitpose_backbone": sized(image_size=[64, 48], patch_size=[16, 16]),
    "vivit": Special({"num_frames": 4, "tubelet_size": [2, 8, 8]}, video()),
    "yolos": sized(image_size=[32, 48], num_detection_tokens=6),
}
