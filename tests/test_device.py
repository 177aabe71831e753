"""A model elsewhere than on the CPU: inputs follow it, plans and numbers are those of the CPU, and results stay where it is.

The device is made here (``tests/elsewhere.cpp``): it computes as the CPU does and refuses to mix with it, as a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import calibrate, compile
from graphprune.bench import figures
from graphprune.cli import main
from graphprune.compiler import Result
from graphprune.device import where
from graphprune.evaluate import Protocol, perplexity
from graphprune.replay import replay
from graphprune.streamed import compile_streamed
from tests import elsewhere
from tests.models import llama, mixture, residual, tokens


@pytest.fixture(autouse=True, scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    missing = elsewhere.install(request.config.cache.mkdir("elsewhere"))  # type: ignore[union-attr]
    if missing:
        pytest.skip(missing)
    with torch.autograd.set_multithreading_enabled(False):
        yield torch.device(elsewhere.NAME, 0)


def text(batches: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(seed)} for seed in range(batches)]


def alike(prune: Callable[[Any], Result], device: torch.device, make: Callable[[], Any] = llama) -> None:
    """The same cuts, the same numbers but for rounding, and everything on the device."""
    here, there = prune(make()), prune(make().to(device))
    assert [cut.kept for cut in there.plan.cuts] == [cut.kept for cut in here.plan.cuts]
    wanted, found = here.model.state_dict(), there.model.state_dict()
    assert {tensor.device for tensor in found.values()} == {device}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].cpu(), tensor)


def test_a_tensor_here_and_one_there_do_not_mix(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=device) + torch.ones(3)


METHODS = [
    "magnitude", "random", "taylor", "fisher", "wanda_sp", "flap", "minitron", "obs", "snip", "synflow:rounds=3",
    "llm_pruner:order=vector", "llm_pruner:order=second", "llm_pruner:order=mixed:rounds=2",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_the_same(device: torch.device, method: str) -> None:
    alike(lambda model: compile(model, keep=0.7, method=method, calibration=text()), device)


@pytest.mark.parametrize(
    "settings",
    [
        {"emit": "graph"},
        {"kinds": ["hidden"]},
        {"kinds": ["layer"], "method": "short_gpt", "calibration": text()},
        {"kinds": ["branch"], "emit": "graph", "method": "taylor", "calibration": text()},
        {"alike": False, "scope": "global", "method": "taylor", "calibration": text()},
        {"calibration": text()},
        {"alike": False, "calibration": text()},
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_all_that_a_compile_does(device: torch.device, settings: dict[str, Any]) -> None:
    alike(lambda model: compile(model, keep=0.7, **{"method": None, **settings}), device)


@pytest.mark.parametrize("step", ["least_squares", "least_squares:damping=1", "newton", "sensitivity"])
def test_passes_repair_the_same(device: torch.device, step: str) -> None:
    alike(lambda model: compile(model, keep=0.7, method="flap", calibration=text(), passes=[step]), device)


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_convolutions(device: torch.device, emit: str) -> None:
    images = torch.randn(2, 3, 8, 8)
    alike(lambda model: compile(model, images, keep=0.7, emit=emit), device, residual)


@pytest.mark.parametrize("kinds", [["head", "ffn"], ["expert"]])
def test_experts(device: torch.device, kinds: list[str]) -> None:
    alike(lambda model: compile(model, keep=0.7, method="taylor", kinds=kinds, calibration=text()), device, mixture)


def test_what_is_saved_is_loaded_and_compared_there(device: torch.device, tmp_path: Path) -> None:
    result = compile(llama().to(device), keep=0.7)
    graphprune.save(result, tmp_path / "out")
    ids = tokens().to(device)
    found = graphprune.load(tmp_path / "out").eval()(ids.cpu()).logits
    torch.testing.assert_close(found, result.model(ids).logits.cpu())
    again = replay(llama().to(device), result.plan)
    assert where(again.model) == device


def test_a_plain_module_is_loaded_where_it_is(device: torch.device, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).to(device)
    result = compile(net, torch.randn(3, 4), keep=0.5)
    graphprune.save(result, tmp_path / "out")
    assert where(graphprune.load(tmp_path / "out", net)) == device


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_zeros(device: torch.device, method: str) -> None:
    here, there = (graphprune.sparsify(model, text(), method=method) for model in (llama(), llama().to(device)))
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize(("preset", "more"), [("llm-pruner", {}), ("ten-minutes", {"written": 2})])
def test_training(device: torch.device, preset: str, more: dict[str, Any]) -> None:
    data = calibrate(text(), None)  # type: ignore[arg-type]
    settings = {"preset": preset, "minutes": None, "steps": 2, **more}
    trained = graphprune.recover(llama().to(device), data, teacher=llama().to(device), **settings)
    assert {parameter.device for parameter in trained.parameters()} == {device}


def test_measuring(device: torch.device) -> None:
    def words(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 50 for letter in text]}

    here, there = (perplexity(model, words, ["some text " * 9], protocol=Protocol(16)).value for model in (llama(), llama().to(device)))
    assert there == pytest.approx(here)
    assert figures({"a": llama().to(device), "b": llama().to(device)}, None, prompt=8, new_tokens=2, repeats=1)
    assert compile(llama().to(device), target={"latency": 0.95}, kinds=["ffn"]).plan.cost


@pytest.mark.parametrize(("method", "passes"), [("magnitude", []), ("flap", ["least_squares"]), ("minitron", [])])
def test_streams(device: torch.device, tmp_path: Path, method: str, passes: list[str]) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    data = calibrate(text(), None) if method != "magnitude" else None  # type: ignore[arg-type]
    outs = {name: tmp_path / str(i) for i, name in enumerate(("cpu", device))}
    for name, out in outs.items():
        compile_streamed(tmp_path / "model", out, keep=0.7, method=method, passes=passes, calibration=data, device=name)
    here, there = (graphprune.load(out).state_dict() for out in outs.values())
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor)


def test_commands(device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")

    def run(command: str, *more: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main([command, str(tmp_path / "model"), *map(str, more)])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), " ".join((captured.out + captured.err).split())

    there = ("--device", device, "--calibration", "random", "--samples", 4, "--length", 16)
    assert run("compile", "-o", tmp_path / "out", "--method", "taylor", *there)[0] == 0
    assert run("compile", "-o", tmp_path / "streamed", "--method", "flap", "--stream", *there)[0] == 0
    assert run("sparsify", "-o", tmp_path / "sparse", *there)[0] == 0
    code, said = run("bench", tmp_path / "out", *there[:2], "--prompt", 8, "--new-tokens", 2, "--repeats", 1)
    assert code == 0 and "prefill" in said
    code, said = run("compile", "-o", tmp_path / "nowhere", "--device", "cuda:77")
    assert code == 2 and "no device 'cuda:77' here" in said and not (tmp_path / "nowhere").exists()
    code, said = run("compile", "-o", tmp_path / "nowhere", "--stream", "--method", "taylor", *there)
    assert code == 2 and "leave out --device" in said and not (tmp_path / "nowhere").exists()
