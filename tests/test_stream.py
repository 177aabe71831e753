"""A checkpoint pruned tensor by tensor: the same plan and tensors as in memory, whole or not there, within a memory limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import graphprune
from graphprune.disk import Checkpoint
from graphprune.errors import GraphpruneError
from graphprune.rewrite.stream import streamed
from graphprune.streamed import compile_streamed
from tests.models import VOCABULARY, sharpened


def saved(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str = "30KB") -> Path:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, tie_word_embeddings=tied,
    )  # fmt: skip
    model = sharpened(transformers.LlamaForCausalLM(config)).to(dtype)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_same_plan_and_tensors_as_in_memory(tmp_path: Path, method: str, tied: bool, dtype: torch.dtype) -> None:
    source = saved(tmp_path / "model", tied=tied, dtype=dtype)
    result = compile_streamed(source, tmp_path / "out", keep=0.6, method=method, seed=3)
    opened = graphprune.open_source(source)
    whole = graphprune.compile(opened.model, opened.example_inputs(), keep=0.6, method=method, seed=3)
    assert result.plan.dumps() == whole.plan.dumps()
    assert whole.pruned.config is not None
    kept, found = whole.model.state_dict(), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, kept[name]) and tensor.dtype is dtype for name, tensor in found.items())
    assert found.keys() == tensors(source).keys()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**opened.example_inputs()).logits, whole.model(**opened.example_inputs()).logits)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == found.keys()


def test_a_plan_is_replayed(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    first = compile_streamed(source, tmp_path / "one", keep=0.7)
    compile_streamed(source, tmp_path / "two", plan=first.plan)
    assert all(torch.equal(t, tensors(tmp_path / "two")[name]) for name, t in tensors(tmp_path / "one").items())


def test_nothing_is_left_of_a_run_that_fails_and_a_dead_one_is_cleared_away(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    dead = tmp_path / ".out.12345678.part"
    dead.mkdir()
    (dead / ".writing").write_text("")
    with pytest.raises(ZeroDivisionError), streamed(tmp_path / "out") as folder:
        assert not dead.exists()
        assert len(list(tmp_path.glob(".out.*.part"))) == 1
        with pytest.raises(ZeroDivisionError), streamed(tmp_path / "out"):
            assert folder.exists()
            raise ZeroDivisionError
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    compile_streamed(source, tmp_path / "out")
    with pytest.raises(GraphpruneError, match="not empty"):
        compile_streamed(source, tmp_path / "out")


def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", shard="1GB")
    state = load_file(source / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up" not in k}, source / "model.safetensors")
    with pytest.raises(GraphpruneError, match=r"up_proj.weight cannot be streamed"):
        compile_streamed(source, tmp_path / "out")
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(GraphpruneError, match="cannot be used"):
        compile_streamed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_forward_only_scores_from_disk_are_those_from_memory(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    opened = graphprune.open_source(source)
    axes = graphprune.propagate(graphprune.trace(opened.model, opened.example_inputs()))
    sums: list[dict[str, torch.Tensor]] = []
    held = {name: tensor.detach() for name, tensor in opened.model.named_parameters()} | dict(opened.model.named_buffers())

    class Weights(dict[str, torch.Tensor]):
        def __missing__(self, name: str) -> torch.Tensor:
            return Checkpoint(source)[name]

    unsaved = {name: tensor for name, tensor in held.items() if name not in Checkpoint(source)}
    for weights in (held, Weights(unsaved)):
        found: dict[str, torch.Tensor] = {}
        graphprune.see_inputs(
            axes, weights, [opened.example_inputs()], lambda c, x, found=found: found.__setitem__(c.weight, x.square().sum(0))
        )
        sums.append(found)
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])
