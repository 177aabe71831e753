"""What a caller gives as a model in, the module whose weights are there to be cut out, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphprune.errors import UserMistake


def prunable(model: nn.Module) -> nn.Module:
    """The model behind ``torch.compile``.

    Raises UserMistake on what is no model, holds adapters or quantised weights, offloads them, or hides its attention in a kernel.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise UserMistake(f"a {type(model).__name__} is no model", fix="give an nn.Module")
    if type(model).__module__.startswith("peft.") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserMistake("the model holds an adapter beside its weights", fix="merge it first: merge_and_unload()")
    how = getattr(getattr(model, "config", None), "quantization_config", None)
    if how is not None:
        name = how.get("quant_method") if isinstance(how, Mapping) else getattr(how, "quant_method", None)
        raise UserMistake(
            f"the weights are quantised ({name or type(how).__name__})", fix="dequantise them first: model.dequantize()"
        )
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        raise UserMistake("weights are offloaded: they are only there while they compute", fix="load the model whole, or --stream")
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        raise UserMistake(
            "flex_attention is a kernel of its own, which no trace shows", fix='model.set_attn_implementation("sdpa")'
        )
    return model
