"""What a researcher with criteria, passes and losses of her own relies on, and what she is told where she is mistaken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Budget, Groups, Matrix, Pattern, Plan, Pruned, Scores, Sparse, compile, sparsify
from graphprune.errors import GraphpruneError, ModelLimit, UserMistake
from graphprune.pipeline import find_pass
from graphprune.plan import load_plan
from graphprune.replay import replay
from passes.gradual import gradual
from passes.group_lasso import group_lasso
from passes.iterative import iterative
from tests.models import llama


class Two(nn.Module):
    """Two inputs, of which one is much larger than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(self.p(a).relu() * self.q(b).sigmoid())  # type: ignore[no-any-return]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=draw), 9 * torch.randn(5, 6, generator=draw)


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_calibration_by_name_is_read_by_name_however_the_example_was_given(order: str) -> None:
    torch.manual_seed(0)
    model, (a, b) = Two(), pair()
    batch = {name: {"a": a, "b": b}[name] for name in order}
    found = compile(model, (a, b), method="wanda_sp", calibration=[batch], keep=0.6)
    wanted = compile(model, {"a": a, "b": b}, method="wanda_sp", calibration=[{"a": a, "b": b}], keep=0.6)
    assert all(torch.equal(units, wanted.facts[Scores][name]) for name, units in found.facts[Scores].units.items())


@pytest.mark.parametrize("batch", [{"x": pair()[0], "b": pair()[1]}, {"a": pair()[0]}])
def test_calibration_that_lacks_an_argument_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(UserMistake, match="is missing"):
        compile(Two(), pair(), method="wanda_sp", calibration=[batch])


@pytest.mark.parametrize("method", ["taylor", "obs", "wanda_sp", "flap"])
@pytest.mark.parametrize("example", [(), (torch.randn(8, 8),)], ids=["guessed", "given"])
def test_labels_are_for_the_loss(method: str, example: tuple[Tensor, ...]) -> None:
    x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input"]), batch["y"])

    calibration = [{"input": x, "y": y}]
    result = compile(net(), *example, method=method, calibration=calibration, loss=loss, keep=0.5, passes=["least_squares"])
    assert result.model[0].out_features < 32  # type: ignore[index]


@pytest.mark.parametrize("wrong", ["vector", "number", "detached"])
def test_a_loss_that_is_none_says_so(wrong: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        out = model(batch["input"])
        if wrong == "vector":
            return out.mean(1)
        return float(out.detach().mean()) if wrong == "number" else out.mean().detach()

    with pytest.raises(UserMistake, match="the loss"):
        compile(net(), torch.randn(8, 8), method="taylor", calibration=[{"input": torch.randn(8, 8)}], loss=loss)


class Heads(nn.Module):
    """Two heads, of which a loss may see one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.h1, self.h2, self.o2 = nn.Linear(8, 32), nn.Linear(32, 3), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return self.h1(h), self.o2(self.h2(h).relu())


@pytest.mark.parametrize("method", ["taylor", "fisher", "snip", "llm_pruner", "llm_pruner:order=second", "llm_pruner:order=mixed"])
def test_what_no_gradient_reaches_changes_no_loss(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    result = compile(Heads(), x, method=method, calibration=[{"x": x}], loss=lambda m, b: m(**b)[0].square().mean(), keep=0.7)
    scores = result.facts[Scores]
    assert scores["h2:ffn"].abs().max() == 0
    assert scores["body:ffn"].abs().max() > 0


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("low", [float("-inf"), -1e30, 0.0])
@pytest.mark.parametrize("scope", ["global", "rank"])
def test_units_that_must_go_take_no_other_with_them(low: float, scope: str) -> None:
    def method(model: nn.Module, groups: Groups) -> Scores:
        first, second = groups
        important = torch.full((first.size,), 1000.0, dtype=torch.float64)
        important[:2] = low
        return Scores({first.name: important, second.name: torch.ones(second.size, dtype=torch.float64)}, "own")

    result = compile(net(), torch.randn(2, 8), method=method, scope=scope, keep=0.7)
    kept = {cut.group: cut.kept for cut in result.plan.cuts}
    assert kept["0:ffn"] == tuple(range(2, 32))
    assert len(kept["2:ffn"]) < 30


def test_a_group_that_a_criterion_says_nothing_of_goes_last() -> None:
    def of_the_first(model: nn.Module, groups: Groups) -> Scores:
        weights = dict(model.named_parameters())
        return graphprune.score(groups, groups.axes.tensors, {"0.weight": weights["0.weight"].detach().abs()}.get, method="own")

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    result = compile(model, torch.randn(2, 8), method=of_the_first, kinds=["ffn"], scope="global", keep=0.8)
    assert [cut.group for cut in result.plan.cuts] == ["0:ffn"]


def test_units_of_a_dimension_without_the_factor_are_refused() -> None:
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(net(), torch.randn(2, 8))))
    axis, factor = groups.axes.tensors["0.weight"][0], next(iter(groups)).factor
    with pytest.raises(UserMistake, match="no such factor"):
        graphprune.gather_units(torch.ones(8), groups.axes.tensors["0.weight"][1], factor)
    with pytest.raises(UserMistake, match="for an axis of 32"):
        graphprune.gather_units(torch.ones(48), axis, factor)


# ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_that_a_pass_edits_costs_what_it_costs() -> None:
    def narrower(plan: Plan) -> Plan:
        return replace(plan, cuts=tuple(replace(cut, kept=cut.kept[:2]) for cut in plan.cuts))

    result = compile(net(), torch.randn(2, 8), method="magnitude", keep=0.7, passes=[narrower])
    assert result.plan.cost["after"]["parameters"] == sum(p.numel() for p in result.model.parameters())


def test_a_budget_that_a_pass_makes_is_that_of_layers_too() -> None:
    def spared(budget: Budget) -> Budget:
        return replace(budget, protect=("model.layers.0", "model.layers.1"))

    result = compile(llama(layers=4), kinds=["layer"], method="random", keep=0.6, passes=[spared])
    assert set(result.plan.cuts[0].kept) >= {0, 1}


def number(scores: Scores) -> int:
    return 1


def perhaps(scores: Scores) -> Scores | None:
    return scores


def anything(scores: Scores) -> Any:
    return scores


@pytest.mark.parametrize("made", [number, perhaps, anything])
def test_a_pass_that_makes_what_nothing_needs_is_refused(made: Callable[..., Any]) -> None:
    with pytest.raises(UserMistake, match="which nothing here needs"):
        compile(net(), torch.randn(2, 8), method="magnitude", passes=[made])


def not_a_number(pruned: Pruned) -> Pruned:
    with torch.no_grad():
        next(pruned.model.parameters())[0] = torch.nan
    return pruned


def of_another_shape(pruned: Pruned) -> Pruned:
    pruned.model[2] = nn.Linear(3, 3)  # type: ignore[operator]
    return pruned


@pytest.mark.parametrize(("repair", "told"), [(not_a_number, "not finite after"), (of_another_shape, "does not run after")])
def test_what_a_repair_leaves_is_looked_at(repair: Callable[..., Any], told: str) -> None:
    with pytest.raises(ModelLimit, match=told):
        compile(net(), torch.randn(2, 8), method="magnitude", passes=[repair])


def optional(groups: Groups, *, top: int | None = None, share: float | int = 1, mode: Literal["a", "b"] = "a", p=2) -> Scores:  # type: ignore[no-untyped-def]
    return Scores({group.name: torch.ones(group.size) for group in groups}, f"{top} {share} {mode} {p}")


def listed(groups: Groups, *, of: list[int] = []) -> Scores:  # noqa: B006
    return Scores({}, "")


def needed(groups: Groups, *, power: float) -> Scores:
    return Scores({group.name: torch.ones(group.size) for group in groups}, "")


def test_options_come_as_the_types_that_they_are_said_to_have() -> None:
    given = find_pass(optional, top="4", share="0.5", mode="b", p="3").options
    assert given == {"top": 4, "share": 0.5, "mode": "b", "p": 3}
    assert find_pass(optional, top="none").options == {"top": None}
    for wrong in ({"top": "many"}, {"mode": "c"}, {"p": "x"}):
        with pytest.raises(UserMistake, match="cannot be"):
            find_pass(optional, **wrong)
    with pytest.raises(UserMistake, match="cannot be"):
        find_pass(listed, of="1,2")
    with pytest.raises(UserMistake, match="needs its option 'power'"):
        compile(net(), torch.randn(2, 8), method=needed)


SHARED = """
from graphprune import Groups, Pruned, Scores
import torch
seen = []
def crit(groups: Groups) -> Scores:
    seen.append(1)
    return Scores({g.name: torch.arange(g.size, dtype=torch.float64) for g in groups}, "own")
def repair(pruned: Pruned) -> Pruned:
    assert seen == [1]
    return pruned
"""


def test_functions_of_one_file_share_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "x.pyenv" / "own.py"
    file.parent.mkdir()
    file.write_text(SHARED)
    compile(net(), torch.randn(2, 8), method=f"{file}:crit", passes=[f"{file}:repair"])
    file.write_text(SHARED.replace("seen == [1]", "False"))
    with pytest.raises(AssertionError):
        compile(net(), torch.randn(2, 8), method=f"{file}:crit", passes=[f"{file}:repair"])


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def dense(matrix: Matrix, pattern: Pattern) -> Sparse:
    return Sparse(matrix.values)


def turned(matrix: Matrix, pattern: Pattern) -> Sparse:
    return Sparse(matrix.values.T)


def bare(matrix: Matrix, pattern: Pattern) -> Sparse:
    return matrix.values  # type: ignore[return-value]


@pytest.mark.parametrize("mask", [dense, turned, bare])
def test_a_mask_that_is_none_is_refused(mask: Callable[..., Any]) -> None:
    with pytest.raises(UserMistake):
        sparsify(net(), method=mask, pattern="2:4", example_inputs=torch.randn(2, 8))


def test_what_is_skipped_must_be_there() -> None:
    with pytest.raises(UserMistake, match="nothing is called"):
        sparsify(llama(), method="magnitude", skip=["model.layer.0"])


# ── plans, budgets, rounds ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", ["1-3-5", "12-11", "a"])
def test_ranges_that_are_none_are_refused(tmp_path: Path, kept: str) -> None:
    compile(net(), torch.randn(2, 8), method="magnitude").plan.save(tmp_path / "plan.json")
    body = json.loads((tmp_path / "plan.json").read_text())
    body["cuts"][0]["kept"] = kept
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(UserMistake, match="is not a graphprune plan"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_cuts_a_group_once_and_of_its_kind() -> None:
    plan = compile(net(), torch.randn(2, 8), method="magnitude").plan
    for cuts, told in (((*plan.cuts, plan.cuts[0]), "twice"), ((replace(plan.cuts[0], kind="head"),), "of kind ffn")):
        with pytest.raises(UserMistake) as told_by:
            replay(net(), replace(plan, cuts=cuts), torch.randn(2, 8))
        assert told in str(told_by.value)


@pytest.mark.parametrize(
    "budget",
    [
        {"target": {"parameters": "0.5"}}, {"target": 0.5}, {"round_to": 2.5}, {"round_to": "8"}, {"minimum": {"head": 2.5}},
        {"protect": [nn.Linear(1, 1)]}, {"keep": "0.5"},
    ],
)  # fmt: skip
def test_budgets_of_other_types_are_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(UserMistake):
        Budget(**budget)


def test_any_real_number_is_a_share() -> None:
    assert Budget(np.float32(0.7)).keep == pytest.approx(0.7)


@pytest.mark.parametrize("options", [{"target": {"flops": 0.5}}, {"emit": "graph"}, {"kinds": ["layer"]}])
def test_rounds_that_no_plan_could_tell_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserMistake, match="rounds"):
        iterative(llama(), keep=0.5, rounds=2, method="magnitude", **options)
    with pytest.raises(UserMistake, match="rounds"):
        gradual(keep=0.5, method="magnitude", **options)


def test_a_penalty_on_weights_that_were_cut_says_so() -> None:
    model, x = net(), torch.randn(2, 8)
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, x)))
    penalty = group_lasso(model, groups)
    assert penalty() > 0
    assert gradual(x, keep=0.5, end=4, every=2, method="magnitude").step(model, None, 4)
    with pytest.raises(UserMistake, match="no longer has"):
        penalty()


def test_every_stage_in_the_readme_can_be_called() -> None:
    for stage in ("trace", "propagate", "couple", "score", "select", "rewrite", "verify"):
        assert callable(getattr(graphprune, stage))


def test_inference_mode_is_told() -> None:
    with torch.inference_mode(), pytest.raises(GraphpruneError, match="inference mode"):
        graphprune.see_gradients(net(), [{"input": torch.randn(2, 8)}], lambda *_: None, loss=lambda m, b: m(b["input"]).mean())
