"""A budget of any cost is met as the smaller model itself recounts it; seconds come from a table that is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune import latency
from graphprune.bench import kv_cache_bytes_per_token
from graphprune.cost import MEASURES
from graphprune.errors import ModelLimit, UserMistake
from graphprune.latency import Latency, Table
from tests.models import llama, tokens


def counted_flops(model: Any) -> int:
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    return int(counter.get_total_flops())


RECOUNTS: dict[str, Callable[[Any], int]] = {
    "parameters": lambda model: sum(p.numel() for p in model.parameters()),
    "bytes": lambda model: sum(p.numel() * p.element_size() for p in model.parameters()),
    "flops": counted_flops,
    "kv": kv_cache_bytes_per_token,
}


@pytest.mark.parametrize("name", RECOUNTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_target_is_met_by_recount(name: str, attention: str) -> None:
    dense = llama()
    dense.set_attn_implementation(attention)
    share = 0.7 if name == "kv" else 0.9
    pruned = graphprune.compile(dense, {"input_ids": tokens()}, target={name: share}, verify=False)
    before, after = RECOUNTS[name](dense), RECOUNTS[name](pruned.model)
    assert 0.7 * share * before < after <= share * before
    costs = pruned.plan.cost
    assert costs["after"][name] / costs["before"][name] == pytest.approx(after / before, rel=1e-6)


def test_several_targets_hold_at_once() -> None:
    dense = llama()
    model = graphprune.compile(dense, {"input_ids": tokens()}, target={"parameters": 0.95, "kv": 0.5}, verify=False).model
    assert RECOUNTS["kv"](model) <= 0.5 * RECOUNTS["kv"](dense)
    assert RECOUNTS["parameters"](model) <= 0.95 * RECOUNTS["parameters"](dense)


def test_a_target_nobody_knows_and_one_that_cannot_be_met() -> None:
    with pytest.raises(UserMistake, match="latency"):
        graphprune.Budget(target={"latencies": 0.5})
    with pytest.raises(UserMistake, match="at most 1"):
        graphprune.Budget(target={"flops": 1.5})
    with pytest.raises(ModelLimit, match="of bytes is out of reach"):
        graphprune.compile(llama(), {"input_ids": tokens()}, target={"bytes": 0.01})


# ── seconds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 640), nn.ReLU(), nn.Linear(640, 320), nn.ReLU(), nn.Linear(320, 5))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A machine whose products take a microsecond for each multiply-add and a hundred for the call."""
    asked: list[int] = []

    def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
        turns = next(cell.cell_contents for cell in call.__closure__ or () if hasattr(cell.cell_contents, "__next__"))
        given, weight = next(turns)[0][:2]
        asked.append(len(given) * weight.numel())
        return 1e-6 * (100 + asked[-1])

    monkeypatch.setattr(latency, "stopwatch", stopwatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def seconds(model: nn.Sequential, rows: int) -> float:
    return sum(1e-6 * (100 + rows * layer.weight.numel()) for layer in model if isinstance(layer, nn.Linear))


def test_a_latency_target_is_met_and_what_was_measured_is_kept(clock: list[int], tmp_path: Path) -> None:
    dense, inputs = net(), torch.randn(3, 24)
    model: Any = graphprune.compile(dense, inputs, target={"latency": 0.4}).model
    assert 0.3 * seconds(dense, 3) < seconds(model, 3) <= 0.401 * seconds(dense, 3)
    table = json.loads((tmp_path / "graphprune" / "latency.json").read_text())
    assert sum(len(rows) for rows in table.values()) == len(clock)
    again: Any = graphprune.compile(dense, inputs, target={"latency": 0.4})
    assert [p.shape for p in again.model.parameters()] == [p.shape for p in model.parameters()]
    assert sum(len(rows) for rows in table.values()) == len(clock), "nothing is measured twice"
    assert again.plan.cost["before"]["latency"] == pytest.approx(seconds(dense, 3))


def test_equal_layers_are_measured_once_and_between_widths_time_is_interpolated(clock: list[int], tmp_path: Path) -> None:
    dense = nn.Sequential(*(nn.Sequential(nn.Linear(8, 640), nn.ReLU(), nn.Linear(640, 8)) for _ in range(4)))
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(dense, torch.randn(3, 8))))
    model = Latency(groups.axes, Table(tmp_path / "table.json"))
    assert model({}) == pytest.approx(8 * 1e-6 * (100 + 3 * 8 * 640))
    assert len(clock) == 2
    factor = groups.groups[0].factor
    assert model({factor: 333}) == pytest.approx(model({}) - 2 * 1e-6 * 3 * 8 * (640 - 333))
    assert len(clock) == 2 + 2 * 2


def test_a_damaged_table_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{")
    table = Table(tmp_path / "table.json")
    assert table.seconds("nothing", torch.device("cpu"), lambda: lambda: None) > 0
    table.save()
    assert len(json.loads((tmp_path / "table.json").read_text())) == 1


@pytest.mark.parametrize("build", [lambda: (llama(), {"input_ids": tokens()}), lambda: (conv(), torch.randn(2, 3, 9, 9))])
def test_every_contraction_of_a_model_can_be_timed_smaller(build: Callable[[], Any], tmp_path: Path) -> None:
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(*build())))
    model = Latency(groups.axes, Table(tmp_path / "table.json"))
    timed = {node for rows in model.alike.values() for node, _ in rows}
    assert timed == {use.node for use in groups.axes.uses if use.role == "contracted"}
    assert model({group.factor: max(1, group.size // 2) for group in groups if group.kind != "hidden"}) > 0


def conv() -> nn.Sequential:
    grouped = nn.Conv2d(16, 16, 3, groups=4)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), grouped, nn.Flatten(), nn.Linear(400, 4)).eval()


# ── multiples ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wide_ffns_keep_multiples_unless_told_otherwise_or_out_of_reach() -> None:
    dense, inputs = net(), torch.randn(3, 24)
    scored: Any = {"method": "magnitude", "keep_of": "model", "kinds": None}

    def widths(**budget: Any) -> list[int]:
        model: Any = graphprune.compile(dense, inputs, **scored, **budget).model
        return [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:2]

    assert widths(keep=0.5)[0] % 16 == 0
    assert widths(keep=0.5, round_to=1)[0] % 16
    assert widths(keep=0.0004)[0] < 16


class Hybrid(nn.Module):
    """Convolutions of one width before attention of another."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.ReLU())
        self.tokens, self.out = nn.Linear(channels, width), nn.Linear(width, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(self.trunk(x).flatten(2).transpose(1, 2))
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("channels", "width", "kinds"), [(32, 16, {"head", "channel"}), (4, 32, {"head"})])
def test_channels_go_unasked_where_most_weights_are_those_of_convolutions(channels: int, width: int, kinds: set[str]) -> None:
    result = graphprune.compile(Hybrid(channels, width).eval(), torch.randn(2, 3, 8, 8), keep=0.6)
    assert {cut.kind for cut in result.plan.cuts} == kinds


def test_measures_agree_with_what_they_were() -> None:
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(llama(), {"input_ids": tokens()})))
    assert MEASURES["flops"](groups.axes)({}) == counted_flops(llama())


CONVOLUTIONS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "strided and grouped": (
        nn.Sequential(nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 5, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)),
        torch.randn(2, 8, 16, 16),
    ),
    "one dimension": (nn.Sequential(nn.Conv1d(8, 32, 5), nn.ReLU(), nn.Conv1d(32, 4, 5, dilation=2)), torch.randn(2, 8, 20)),
    "no batch": (nn.Sequential(nn.Conv1d(8, 32, 5), nn.ReLU(), nn.Conv1d(32, 4, 5)), torch.randn(8, 20)),
    "three dimensions": (nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), torch.randn(2, 2, 6, 6, 6)),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 16, 3, 2), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, groups=2), nn.Conv2d(8, 2, 1)),
        torch.randn(2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flops_of_convolutions_are_those_that_torch_counts(name: str) -> None:
    model, x = CONVOLUTIONS[name]
    result = graphprune.compile(model, x, keep=0.5, method="magnitude")
    for when, made in (("before", model), ("after", result.model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made(x)
        assert result.plan.cost[when]["flops"] == counter.get_total_flops()


class Read(nn.Module):
    """A recurrent layer or cell, and what reads it."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Read(nn.LSTM(8, 16, num_layers=2, batch_first=True), 16), (2, 6, 8)),
        (Read(nn.GRU(8, 16, bidirectional=True, batch_first=True), 32), (2, 6, 8)),
        (Read(nn.RNN(8, 16), 16), (6, 2, 8)),
        (Read(nn.LSTMCell(8, 16), 16), (4, 8)),
    ],
    ids=["lstm", "gru", "rnn", "cell"],
)
def test_flops_of_recurrent_layers_use_each_weight_once_a_step(model: nn.Module, shape: tuple[int, ...]) -> None:
    result = graphprune.compile(model, torch.randn(shape), keep=0.6, method="magnitude")
    for when, made in (("before", model), ("after", result.model)):
        weights = sum(p.numel() for p in made.parameters() if p.ndim == 2)
        assert result.plan.cost[when]["flops"] == 2 * weights * shape[0] * (shape[1] if len(shape) == 3 else 1)
