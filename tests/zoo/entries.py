"""The model zoo: a transformers model type in, a small model with sharp random weights and its example inputs out."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.inputs import example_inputs
from tests.zoo.shrink import shrunken
from tests.zoo.special import Special
from tests.zoo.special_audio import AUDIO
from tests.zoo.special_image import IMAGE
from tests.zoo.special_text import CAUSAL, MASKED, SEQ2SEQ
from tests.zoo.weights import sharpen

MAPPINGS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "image": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_BACKBONE_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_MAPPING_NAMES",
    ),
    "audio": (
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    ),
}
FAMILIES = tuple(MAPPINGS)
SPECIAL = {"causal": CAUSAL, "masked": MASKED, "seq2seq": SEQ2SEQ, "image": IMAGE, "audio": AUDIO}
LABELS = 7
ROLES = {"causal": {"is_decoder": True}}


@dataclass(frozen=True, slots=True)
class Entry:
    """A small model and what to call it with; the tensors that `model(**inputs)` gives are logits or hidden states."""

    model_type: str
    family: str
    model: nn.Module
    inputs: dict[str, Any]


def model_types(family: str) -> list[str]:
    """The model types of a family in transformers' auto mappings, in order; "all" gives each type once."""
    families = FAMILIES if family == "all" else (family,)
    return sorted({model_type for each in families for model_type in class_names(each)})


def class_names(family: str) -> dict[str, str]:
    """For each model type its first class: a classifier before a backbone before a bare model."""
    names: dict[str, str] = {}
    for mapping in MAPPINGS[family]:
        for model_type, name in getattr(modeling_auto, mapping).items():
            names.setdefault(model_type, name if isinstance(name, str) else name[0])
    return names


def build(model_type: str, family: str, seed: int = 0) -> Entry:
    """The zoo's model of this type: small, float32, in eval mode, the same at each call."""
    if family == "all":
        family = next(each for each in FAMILIES if model_type in class_names(each))
    special = SPECIAL[family].get(model_type, Special())
    cls = getattr(transformers, special.cls or class_names(family)[model_type])
    config = shrunken(CONFIG_MAPPING[model_type], ROLES.get(family, {}), special.config)
    if family in ("image", "audio"):
        config.num_labels = LABELS
    model = construct(cls, config_of(cls, config), special, seed)
    sharpen(model, seed, special.gain)
    inputs = example_inputs(model, family, seed)
    changed: Mapping[str, Any] = special.inputs(model) if special.inputs else {}
    return Entry(model_type, family, model, {k: v for k, v in {**inputs, **changed}.items() if v is not None})


def config_of(cls: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite config that the class is built from, as the auto classes choose it."""
    parts = [getattr(config, name) for name in config.sub_configs]
    fits = [part for part in parts if part is not None and type(part) is cls.config_class]
    return config if isinstance(config, cls.config_class) or not fits else fits[0]


def construct(cls: Any, config: Any, special: Special, seed: int) -> nn.Module:
    options = {"attn_implementation": special.attention} if special.attention else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32, **options) if hasattr(cls, "_from_config") else cls(config)
    model = model.float().eval()
    use_exportable_experts(model)
    return model


def use_exportable_experts(model: Any) -> None:
    """The eager loop over experts depends on data and does not export; a batched product does."""
    for name in ("batched_mm", "grouped_mm"):
        try:
            return model.set_experts_implementation(name)
        except (ValueError, AttributeError, NotImplementedError):
            continue
