"""A plan in, Whisper's alignment heads under the places that they have after it out.

Timestamps of tokens are read off cross-attention heads that the generation settings name by decoder layer and head. No shape and no
config knows of them, so no check of the model would see them point elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy

from torch import nn
from transformers import GenerationConfig

from graphprune.plan import Plan

HEADS = "alignment_heads"
LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)$")
CROSS = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.encoder_attn\.")


def realign(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Give a smaller model settings that name the heads it has; what a person should be told."""
    settings = getattr(model, "generation_config", None)
    if not isinstance(settings, GenerationConfig) or not hasattr(settings, HEADS):
        return ()
    left = _left(getattr(settings, HEADS), plan)
    model.generation_config = moved = deepcopy(settings)  # type: ignore[assignment]
    if left:
        setattr(moved, HEADS, left)
        return ()
    delattr(moved, HEADS)
    return (f"none of the {HEADS} is left: the smaller model gives no timestamps of tokens",)


def _left(named: Iterable[Sequence[int]], plan: Plan) -> list[list[int]]:
    """The heads that stay, by the numbers that they have then."""
    gone = {int(found[1]) for cut in plan.cuts for member in cut.members if (found := LAYER.search(member))}
    kept = {int(found[1]): cut.kept for cut in plan.cuts if cut.kind == "head" for m in cut.members if (found := CROSS.search(m))}
    return [
        [layer - sum(other < layer for other in gone), kept[layer].index(head) if layer in kept else head]
        for layer, head in named
        if layer not in gone and (layer not in kept or head in kept[layer])
    ]
