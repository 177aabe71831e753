"""A result and its source in, a checkpoint directory out, named once complete; what transformers loads of it is compared first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graphprune import quiet
from graphprune.compiler import Result
from graphprune.device import beside, drawing, where
from graphprune.difference import tensors_in
from graphprune.errors import ModelLimit, UserMistake
from graphprune.exportable import exportable
from graphprune.facts import Example
from graphprune.plan import PLAN
from graphprune.ranks import leads
from graphprune.rewrite.checkpoint import load, save_plain
from graphprune.rewrite.folder import complete_or_nothing
from graphprune.rewrite.graph import PrunedGraph
from graphprune.rewrite.record import make_record, read_model, save_transformers
from graphprune.rewrite.stream import copy_rest
from graphprune.source import Source
from graphprune.trace import as_call
from graphprune.verify import SEED, Reference, close

PROGRAM = "model.pt2"


def save(result: Result, out: str | Path, source: Source | None = None) -> Path:
    """Write the smaller model, its tokenizer and plan to the directory ``out``; a transformers model is checked by loading it back.

    Raises UserMistake when ``out`` is not empty, ModelLimit when what loads does not compute the same; nothing is written then.
    """
    if not leads():
        return Path(out)
    with complete_or_nothing(out) as folder, quiet.loading():
        _write(result, folder)
        result.plan.save(folder / PLAN)
        if source is not None and source.path is not None:
            _copy_beside(source, result.model, folder)
        if result.facts.get(Example) is not None and not isinstance(result.model, PrunedGraph):
            _check_reload(result, folder)
    return Path(out)


def save_model(model: nn.Module, out: str | Path, source: Source) -> Path:
    """Write a transformers model of unchanged shape (made sparse, trained further) with its tokenizer; complete or not at all."""
    if not isinstance(model, PreTrainedModel):
        raise UserMistake(f"{type(model).__name__} is no transformers model", fix="save its state_dict from Python")
    if not leads():
        return Path(out)
    with complete_or_nothing(out) as folder, quiet.loading():
        save_transformers(model, folder)
        _copy_beside(source, model, folder)
    return Path(out)


def _write(result: Result, folder: Path) -> None:
    model, pruned, original = result.model, result.pruned, result.facts[nn.Module]
    if isinstance(model, PrunedGraph):
        _save_program(model, result.facts[Example], folder)
    elif not isinstance(model, PreTrainedModel):
        save_plain(model, make_record(model, original, pruned), folder)
    else:
        if pruned.config is None:
            model.config.pruned = make_record(model, original, pruned)
        save_transformers(model, folder)


def _save_program(model: PrunedGraph, example: Example, folder: Path) -> None:
    """An exported program; sizes that the trace left open stay open where the model allows it.

    For ONNX, hand a smaller model, module or graph, to torch's own exporter: ``torch.onnx.export(model, args, dynamo=True)``.
    """
    args, kwargs = beside(as_call(example.inputs), where(model))
    by_position, by_name = model.admission.open_sizes()
    sizes: dict[str, Any] = {"args": by_position} if by_position else {}
    names: list[Any] = []
    if by_name:  # of keywords torch hears of sizes by the names in a signature alone
        names = [*map(model.trace.signature.slot, range(len(by_position))), *by_name]
        sizes = dict(zip(names, [*by_position, *by_name.values()], strict=True))
    with exportable(model, experts=None), _called_by(model, names):
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        except Exception:  # noqa: BLE001  whatever stands against open sizes, fixed ones are the answer
            program = torch.export.export(model, args, kwargs, strict=False)
    torch.export.save(program, folder / PROGRAM)


@contextmanager
def _called_by(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Meanwhile, a forward of any arguments has a signature of these names, if there are any."""
    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **kwargs)

    if names:
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        model.forward = forward
    try:
        yield
    finally:
        vars(model).pop("forward", None)


def _copy_beside(source: Source, model: nn.Module, folder: Path) -> None:
    """The tokenizer, and what else lies beside the weights of a transformers model: as it is where it cannot be loaded."""
    with suppress(UserMistake, ModelLimit):
        source.tokenizer().save_pretrained(folder)
    if source.path is not None and source.path.is_dir() and isinstance(model, PreTrainedModel):
        copy_rest(source.path, folder)


def _reloaded(model: PreTrainedModel, folder: Path) -> Any:
    """As anyone loads it; a class of the user's own by that class."""
    if type(model).__module__.partition(".")[0] == "transformers":
        return load(folder)
    config = type(model.config).from_pretrained(folder)
    return read_model(type(model), folder, config)


def _check_reload(result: Result, folder: Path) -> None:
    """What a stranger will load must compute what was verified in memory."""
    if not isinstance(result.model, PreTrainedModel):
        return
    args, kwargs = beside(as_call(result.facts[Example].inputs), where(result.model))
    with torch.no_grad(), exportable(result.model, experts=None), drawing(SEED, where(result.model)):
        expected = tensors_in(result.model(*args, **kwargs))
    loaded: Any = _reloaded(result.model, folder).to(where(result.model), result.model.dtype).eval()
    if not close(loaded, result.facts[Example].inputs, Reference(lambda: expected)):
        raise ModelLimit(
            "the saved checkpoint does not compute what the pruned model does",
            why="its class derives something else from the new sizes (an attention scale, a rotary table)",
            fix="prune other kinds, or emit the graph",
        )
