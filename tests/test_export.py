"""What a smaller model can be handed to: an exported program that takes other batches, torch's own ONNX exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune
from tests.nets import example


@pytest.mark.parametrize("name", ["Channels", "Dense"])
def test_a_saved_graph_runs_for_another_batch(name: str, tmp_path: Path) -> None:
    model, inputs = example(name)
    result = graphprune.compile(model, inputs, keep=0.6, kinds=["all"], method="random", emit="graph")
    graphprune.save(result, tmp_path / "smaller")
    loaded: Any = torch.export.load(tmp_path / "smaller" / "model.pt2").module()
    longer = torch.cat([inputs[0]] * 3)
    torch.testing.assert_close(loaded(longer), result.model(longer))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("emit", ["module", "graph"])
def test_a_smaller_model_exports_to_onnx(emit: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, inputs = example("Channels")
    smaller = graphprune.compile(model, inputs, keep=0.6, kinds=["all"], method="random", emit=emit).model
    program: Any = torch.onnx.export(smaller, inputs, dynamo=True, verbose=False)
    sizes = [torch.Size(entry.dims).numel() for entry in program.model_proto.graph.initializer]
    assert 0 < sum(sizes) < sum(parameter.numel() for parameter in model.parameters())
