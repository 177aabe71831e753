"""Two processes under torchrun give what one gives: scores, plans, repaired and trained weights; rank 0 alone writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from graphprune.passes.magnitude import magnitude
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

import graphprune
from graphprune.cli import main
from graphprune.pipeline import find_pass
from graphprune.ranks import joined, place
from tests.models import VOCABULARY, sharpened

METHODS = ("taylor", "llm_pruner", "fisher", "wanda_sp", "flap", "minitron")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    return sharpened(transformers.LlamaForCausalLM(config)).eval()


def calibration(batches: int = 3) -> graphprune.Calibration:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (2 * batches, 11), generator=draw)
    return graphprune.Calibration(tuple({"input_ids": pair} for pair in ids.split(2)), "drawn")


def grouped(model: Any) -> graphprune.Groups:
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, calibration().inputs[0])))
    return replace(groups, groups=tuple(group for group in groups if group.kind in ("head", "ffn")))


def outcome() -> dict[str, torch.Tensor]:
    """What each way of scoring, repairing and training gives, whatever the number of processes."""
    model, found = llama(), {}
    groups = grouped(model)
    for method in METHODS:
        scores = find_pass(method).function(model, groups, calibration())
        found |= {f"{method} {name}": units for name, units in scores.units.items()}
    repaired = graphprune.compile(model, method="random", keep=0.6, calibration=calibration(), passes=["least_squares"]).model
    settings = {"method": "full", "lr": 1e-3, "epochs": None, "steps": 3, "batch": 3, "micro": 2, "length": 11}
    trained = graphprune.recover(model, calibration(), teacher=None, **settings)
    uneven = graphprune.recover(model, calibration(), teacher=None, **settings | {"micro": 1, "minutes": 1e9})
    found |= {f"trained by the clock {name}": tensor for name, tensor in uneven.state_dict().items()}
    found |= {f"repaired {name}": tensor for name, tensor in repaired.state_dict().items()}
    return found | {f"trained {name}": tensor for name, tensor in trained.state_dict().items()}


def sharded() -> dict[str, torch.Tensor]:
    """Scores of a model whose parameters are spread over the processes; alone, of the model as it is."""
    model, found = llama(), {}
    groups = grouped(model)
    if place()[1] > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(p.to_local().numel() <= p.numel() // 2 + p.shape[-1] for p in model.parameters())
    for method in METHODS:
        scores = find_pass(method).function(model, groups, calibration())
        found |= {f"sharded {method} {name}": units for name, units in scores.units.items()}
    return found | {f"sharded magnitude {name}": units for name, units in magnitude(model, groups).units.items()}


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    done = torchrun("-m", "tests.test_ranks", str(tmp_path))
    assert not done.returncode, done.stderr[-3000:]
    alone = outcome() | sharded()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "options", [["--method", "taylor"], ["--method", "flap", "--pass", "least_squares", "--stream"]], ids=["memory", "stream"]
)
def test_the_command_line_under_torchrun_writes_what_one_process_writes(tmp_path: Path, options: list[str]) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    sizes = ["--keep", "0.6", "--calibration", "random", "--samples", "6", "--batch", "2", "--length", "11"]
    command = ["compile", str(tmp_path / "model"), *sizes, *options]
    done = torchrun("-m", "graphprune", *command, "-o", str(tmp_path / "two"))
    assert not done.returncode, done.stderr[-3000:]
    assert done.stdout.count("from_pretrained loads it") == 1
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command, "-o", str(tmp_path / "one")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]
    one, two = (graphprune.load_plan(tmp_path / name / "graphprune_plan.json") for name in ("one", "two"))
    assert [(cut.group, cut.kept) for cut in one.cuts] == [(cut.group, cut.kept) for cut in two.cuts]
    for file in (tmp_path / "one").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(load_file(tmp_path / "two" / file.name)[name], tensor, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in (outcome() | sharded()).items()}
        save_file(tensors, Path(sys.argv[1]) / f"{place()[0]}.safetensors")
