"""A model and its config in, small inputs that it accepts out, of sizes that coincide with none of the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedConfig

from graphprune import quiet
from graphprune.copying import duplicate
from graphprune.device import where
from graphprune.errors import ModelLimit, UserMistake, first_line
from graphprune.exportable import exportable
from graphprune.repeat import Repeats
from graphprune.written import ordinary_ids

BATCHES = (2, 3, 5, 7, 11)
LENGTHS = (13, 17, 19, 23, 29, 31, 37)
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
MEL_SETTINGS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim")
CHANNEL_SETTINGS = ("num_channels", "in_channels", "in_chans", "num_image_channels")
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
MODALITY_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")


def named(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Example inputs as keyword arguments: a mapping stays, a tensor or a sequence takes the names of forward."""
    if isinstance(inputs, Mapping):
        return {str(name): value for name, value in inputs.items()}
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs) if isinstance(inputs, Sequence) else []
    names = list(inspect.signature(model.forward).parameters)
    if not values or len(values) > len(names) or not all(isinstance(value, Tensor) for value in values):
        raise UserMistake(
            f"example inputs of type {type(inputs).__name__} do not fit {type(model).__name__}.forward",
            fix=f"give a tensor, a tuple of tensors or a mapping for: {', '.join(names)}",
        )
    return dict(zip(names, values, strict=False))


def guess_inputs(model: nn.Module, config: PreTrainedConfig, *, rows: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Inputs that a transformers model accepts: named by its signature, sized by its config, tried on fake tensors.

    Those are best for which it asks for no value.
    """
    device = where(model)
    refused: list[tuple[Exception, dict[str, Tensor]]] = []
    for inputs in _guesses(model, config, rows, seed):
        refusal = _refusal(model, inputs)
        if refusal is None:
            return {name: value.to(device) for name, value in inputs.items()}
        refused.append((refusal, inputs))
    for refusal, inputs in refused:
        if isinstance(refusal, DATA_DEPENDENT):
            return {name: value.to(device) for name, value in inputs.items()}
    raise ModelLimit(
        f"no example inputs for {type(model).__name__}",
        why=f"it refuses what its signature suggests: {first_line(refused[0][0]) if refused else 'nothing known'}",
        fix="pass example inputs, or file.py:factory returning (module, example_inputs)",
    )


def _guesses(model: Any, config: PreTrainedConfig, rows: int | None, seed: int) -> Iterator[dict[str, Tensor]]:
    """Inputs worth trying, the likeliest first; the class's own dummy inputs last."""
    settings = dict(_settings(config.to_dict()))
    taken = _sizes(model, settings)
    batch = rows or _free(BATCHES, taken)
    for names in _name_sets(model, config):
        for shapes in product(*(_shapes(name, settings, taken) for name in names)):
            sized = zip(names, shapes, strict=True)
            yield {name: _drawn(name, (batch, *shape), settings, seed, model) for name, shape in sized}
    dummies = {name: value for name, value in getattr(model, "dummy_inputs", {}).items() if isinstance(value, Tensor)}
    if dummies and set(dummies) <= set(inspect.signature(model.forward).parameters):
        yield dummies


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of a config and its parts; the outer ones last, so that they win in a dict."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _settings(value)
    for name, value in config.items():
        if isinstance(name, str) and value is not None and not isinstance(value, Mapping):
            yield name, value


def _sizes(model: nn.Module, settings: Mapping[str, Any]) -> set[int]:
    """Numbers that an example size must not equal: the model's sizes, and the ratios between its settings."""
    values = [item for value in settings.values() for item in (value if isinstance(value, list | tuple) else [value])]
    numbers = {value for value in values if isinstance(value, int) and value > 1}
    ratios = {a // b for a in numbers for b in numbers if a % b == 0}
    return numbers | ratios | {size for parameter in model.parameters() for size in parameter.shape}


def _free(choices: Sequence[int], taken: set[int], limit: int | None = None) -> int:
    """The first choice that is not taken; where all are, the first that fits."""
    fitting = [choice for choice in choices if limit is None or choice <= limit] or [limit or choices[0]]
    return next((choice for choice in fitting if choice not in taken), fitting[0])


def _name_sets(model: Any, config: PreTrainedConfig) -> list[list[str]]:
    """Sets of inputs to try: the main and the required ones, then with a decoder's, with each modality's, with a mask."""
    takes = inspect.signature(model.forward).parameters
    required = [name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None) or "input_ids"
    least = [*([main] if isinstance(main, str) else main), *required]
    decoder = ["decoder_input_ids"]
    usual = [*least, *decoder] if config.is_encoder_decoder else least
    masks = ["attention_mask", "decoder_attention_mask"]
    tries = [usual, [*least, *decoder], [*least, *MODALITY_INPUTS], [*usual, masks[0]], [*usual, *masks]]
    known = [list(dict.fromkeys(name for name in names if name in takes)) for names in tries]
    return [names for i, names in enumerate(known) if names and names not in known[:i]]


def _shapes(name: str, settings: Mapping[str, Any], taken: set[int]) -> list[tuple[int, ...]]:
    """Shapes an input of this name may have, without the batch; several where conventions differ."""
    limit = min([v for k, v in settings.items() if k in POSITIONS and isinstance(v, int) and v > 0], default=None)
    if name in ("pixel_values", "pixel_values_videos", "images"):
        return _image_shapes(name, settings)
    if name == "input_features":
        mels = [settings[key] for key in MEL_SETTINGS if isinstance(settings.get(key), int)] or [80]
        frames = [
            _free((47, 53, 59), taken),
            2 * settings.get("max_source_positions", 0),
            settings.get("max_length", 0),
        ]
        return [shape for t in frames if t for mel in mels for shape in ((mel, t), (t, mel))]
    if name == "input_values":
        mels = [settings[key] for key in MEL_SETTINGS if isinstance(settings.get(key), int)]
        return [(4111,), (1, 4111), *((settings.get("max_length", 0), mel) for mel in mels)]
    if name.startswith("past_"):
        steps = settings.get("context_length", 0) + max(settings.get("lags_sequence", [0]), default=0)
        return [(steps, settings.get("num_input_channels", 1)), (steps,), (steps, settings.get("num_time_features", 1))]
    lengths = LENGTHS[1:] if name.startswith("decoder_") else LENGTHS
    return [(_free(lengths, taken, limit),)]


def _image_shapes(name: str, settings: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Images, or frames of them, of the size that the config tells; else of two unequal sizes that strides divide."""
    channels = next((settings[key] for key in CHANNEL_SETTINGS if isinstance(settings.get(key), int)), 3)
    told = settings.get("image_size") or settings.get("img_size")
    told = [told, told] if isinstance(told, int) else told
    sizes = [(160, 224), (224, 224)] if not isinstance(told, list | tuple) else [tuple(told[-2:]), (160, 224)]
    still = [(channels, *size) for size in sizes]
    moving = [(settings.get("num_frames", 8), *shape) for shape in still]
    return moving if name == "pixel_values_videos" else still + moving


def _drawn(name: str, shape: tuple[int, ...], settings: Mapping[str, Any], seed: int, model: nn.Module) -> Tensor:
    """Values for an input: ordinary token ids, a mask of ones, or normal numbers in the model's dtype."""
    draw = torch.Generator().manual_seed(seed)
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.long)
    if name.endswith("ids"):
        special = [v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)]
        sizes = [v for k, v in settings.items() if k.endswith("vocab_size") and ("type" in k) == ("type" in name) and v]
        return ordinary_ids(min(sizes, default=2), special, shape, draw)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=draw).to(dtype)


def _refusal(model: nn.Module, inputs: Mapping[str, Tensor]) -> Exception | None:
    """What a weightless shadow of the model, told that it is being exported, says against these inputs; None if they suit it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        weightless: dict[int, Any] = {id(tensor): _blank(tensor) for tensor in (*model.parameters(), *model.buffers())}
        fed = {name: torch.empty_like(value) for name, value in inputs.items()}
    shadow = duplicate(model, weightless)
    watched = Repeats(shadow, marked=False).watching()
    try:
        with mode, torch.no_grad(), quiet.tracing(), exportable(shadow), _compiling_state_context(), watched:
            shadow(**fed)
    except Exception as error:  # noqa: BLE001 (whatever it raises is its answer)
        return error
    return None


def _blank(tensor: Tensor) -> Tensor:
    blank = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank
