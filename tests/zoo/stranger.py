"""A model type in, what a stranger gets out: a checkpoint directory, opened without inputs, pruned by default: in memory, beside the
original and in place, and streamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import graphprune
from graphprune.errors import GraphpruneError
from graphprune.streamed import compile_streamed
from tests.zoo.entries import build

KEEP = 0.7
IN_PLACE = "in place"
SAME, OTHER = "streamed, too", "other tensors"


def as_stranger(model_type: str, family: str) -> dict[str, str]:
    """``memory``: stock, record or no, with the reason; for what is stock ``inplace`` and ``stream``: the same tensors, others, no."""
    model: Any = build(model_type, family).model
    with TemporaryDirectory() as folder:
        try:
            model.save_pretrained(f"{folder}/model")
            type(model).from_pretrained(f"{folder}/model")
        except Exception as error:  # transformers' own way there and back may fail in any way
            return {"memory": f"not saved by transformers: {type(error).__name__} {error}"[:240]}
        return pruned_both_ways(Path(folder))


def pruned_both_ways(folder: Path) -> dict[str, str]:
    """The same for what is in ``model`` of a directory."""
    source = graphprune.open_source(folder / "model")
    try:
        whole = graphprune.compile(source.model, keep=KEEP, method="magnitude")
        graphprune.save(whole, folder / "whole", source)
    except GraphpruneError as error:
        return {"memory": f"no: {_reason(error)}"}
    if whole.pruned.config is None:
        return {"memory": f"record: {str(whole.pruned.obstacle).splitlines()[0]}"}
    found = {"memory": "stock", "inplace": in_place(folder, whole)}
    try:
        compile_streamed(folder / "model", folder / "out", keep=KEEP)
    except GraphpruneError as error:
        return found | {"stream": f"no: {_reason(error)}"}
    one, other = (_tensors(type(source.model), folder / name) for name in ("whole", "out"))
    less = sum(t.numel() for t in one.values()) < sum(t.numel() for t in source.model.state_dict().values())
    return found | {"memory": "stock" if less else "nothing went", "stream": SAME if _equal(one, other) else OTHER}


def in_place(folder: Path, whole: graphprune.Result) -> str:
    """Whether the model that is opened anew becomes what ``whole`` is, or how it does not."""
    source = graphprune.open_source(folder / "model")
    try:
        found = graphprune.compile(source.model, keep=KEEP, method="magnitude", inplace=True)
    except GraphpruneError as error:
        return f"no: {_reason(error)}"
    if found.model is not source.model:
        return "beside"
    same = _equal(found.model.state_dict(), whole.model.state_dict())
    return IN_PLACE if same and found.model.config.to_dict() == whole.model.config.to_dict() else OTHER


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _tensors(cls: Any, folder: Path) -> Mapping[str, Tensor]:
    """What transformers alone loads."""
    tensors: Mapping[str, Tensor] = cls.from_pretrained(folder).state_dict()
    return tensors


def _reason(error: GraphpruneError) -> str:
    return "; ".join(part for part in (error.what, error.why) if part)[:240]
