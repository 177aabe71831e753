"""Pruning before and during training, on a small transformer and a small convolutional net with a shortcut and batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphprune.passes.gradual import gradual
from graphprune.passes.group_lasso import group_lasso
from graphprune.passes.growing import growing
from graphprune.passes.iterative import iterative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import graphprune
from graphprune import Group, Groups, Plan, couple, propagate, shrink, trace
from graphprune.errors import UserMistake
from graphprune.training import compose

IMAGES = {"x": torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))}
LABELS = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(1))
TOKENS = {"input_ids": torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(2))}


class Net(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.two = nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(relu(self.norm(self.one(x))))
        return self.head(relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def net_loss(model: nn.Module, inputs: Any) -> Tensor:
    return cross_entropy(model(**inputs), LABELS)


def groups_of(model: nn.Module, inputs: Any) -> Groups:
    return couple(propagate(trace(model, inputs)))


MODELS = [(net, IMAGES), (llama, TOKENS)]


# ── before training ──────────────────────────────────────────────────────────────────────────────────────────────────


def unit_of(groups: Groups, group: Group, name: str, dim: int, unit: int) -> Tensor:
    """Indices of a tensor's dimension that belong to a unit."""
    columns = groups.axes.tensors[name][dim].units(group.factor)
    return torch.tensor([i for column in columns for i, u in enumerate(column) if u == unit])


def test_snip_is_the_sensitivity_of_the_whole_batch() -> None:
    model = net().eval()
    halves = [{"x": IMAGES["x"][:4]}, {"x": IMAGES["x"][4:]}]

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        labels = LABELS[:4] if torch.equal(inputs["x"], halves[0]["x"]) else LABELS[4:]
        return cross_entropy(model(**inputs), labels)

    result = graphprune.compile(model, calibration=halves, method="snip", keep=0.7, loss=loss, kinds=["channel"])
    scores = result.facts[graphprune.Scores]
    (loss(model, halves[0]) + loss(model, halves[1])).backward()  # type: ignore[no-untyped-call]
    weights = dict(model.named_parameters())
    for group in result.groups:
        for unit in range(group.size):
            total = 0.0
            for member in group.members:
                if (weight := weights.get(member.name)) is not None and weight.grad is not None:
                    index = unit_of(result.groups, group, member.name, member.dim, unit)
                    total += float((weight.detach() * weight.grad).abs().index_select(member.dim, index).sum())
            assert scores[group.name][unit] == pytest.approx(total, rel=1e-4), (group.name, unit)


def test_synflow_is_the_product_of_absolute_weights() -> None:
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(i, o, bias=False) for i, o in ((4, 6), (6, 7), (7, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(relu(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]

    model = Three()
    result = graphprune.compile(model, torch.randn(1, 4), method="synflow", keep=0.5, options={"rounds": 1})
    a, b, c = (weight.detach().double().abs() for weight in model.parameters())
    first = a.sum(1) * (c @ b).sum(0)
    scores = result.facts[graphprune.Scores]
    torch.testing.assert_close(scores["a:ffn"], 2 * first)
    torch.testing.assert_close(scores["b:ffn"], 2 * c.sum(0) * (b @ a).sum(1))


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_synflow_falls_in_rounds(make: Any, inputs: Any) -> None:
    model = make().eval()
    few = graphprune.compile(model, inputs, method="synflow", keep=0.5, options={"rounds": 4})
    scores = few.facts[graphprune.Scores]
    for cut in few.plan.cuts:
        gone = [unit for unit in range(cut.size) if unit not in cut.kept]
        assert scores[cut.group][gone].max() <= scores[cut.group][list(cut.kept)].min()
    assert any((scores[cut.group] < 0).any() for cut in few.plan.cuts)
    assert all(scores[group.name].isfinite().all() and scores[group.name].max() > 0 for group in few.groups)


# ── penalties ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("make", "inputs"), MODELS)
@pytest.mark.parametrize("squared", [False, True])
def test_a_penalty_is_its_formula_and_so_is_its_gradient(make: Any, inputs: Any, squared: bool) -> None:
    model = make()
    groups = groups_of(model, inputs)
    penalty = growing(model, groups, strength=0.3) if squared else group_lasso(model, groups, strength=0.3)
    weights = dict(model.named_parameters())
    plain = torch.zeros(())
    for group in groups:
        for unit in range(group.size):
            parts = [
                weights[m.name].index_select(m.dim, unit_of(groups, group, m.name, m.dim, unit)).flatten()
                for m in group.members
                if m.name in weights
            ]
            norm = torch.cat(parts).norm()
            plain = plain + 0.3 * (0.5 * norm**2 if squared else norm)
    assert float(penalty().detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    mine = torch.autograd.grad(penalty(), list(weights.values()), allow_unused=True)
    theirs = torch.autograd.grad(plain, list(weights.values()), allow_unused=True)
    for name, one, other in zip(weights, mine, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_group_lasso_empties_whole_units_and_never_gives_nan() -> None:
    model = net()
    groups = groups_of(model, IMAGES)
    with torch.no_grad():
        model.one.weight[3], model.one.bias[3], model.norm.weight[3], model.norm.bias[3] = 0, 0, 0, 0
        model.two.weight[:, 3] = 0
    penalty = group_lasso(model, groups, strength=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: norms.detach() for name, norms in penalty.norms().items()}
    for _ in range(10):
        optimizer.zero_grad()
        (net_loss(model, IMAGES) + penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = penalty.norms()
    assert all(bool(norms.isfinite().all()) for norms in after.values())
    assert total(after) < 0.9 * total(before)


def total(norms: dict[str, Tensor]) -> float:
    return sum(float(found.detach().sum()) for found in norms.values())


def test_strengths_grow_most_where_least_is_left() -> None:
    model = net()
    penalty = growing(model, groups_of(model, IMAGES), strength=0.0, step=1.0)
    norms = {name: found.detach() for name, found in penalty.norms().items()}
    penalty.grow()
    penalty.grow()
    for name, strengths in penalty.strengths.items():
        assert strengths[norms[name].argmax()] == 0 and float(strengths[norms[name].argmin()]) == pytest.approx(2)
        assert torch.equal(strengths.argsort(), norms[name].argsort(descending=True))


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = TOKENS["input_ids"][place % 4]
        return {"input_ids": row, "labels": row}


def trained(model: nn.Module, folder: Any, callback: Any, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_adds_the_penalty_and_grows_it(tmp_path: Any) -> None:
    norms = {}
    for strength in (0.0, 1.0):
        model = llama()
        penalty = growing(model, groups_of(model, TOKENS), strength=strength, step=strength, every=2)
        trained(model, tmp_path, penalty, 6)
        norms[strength] = total(penalty.norms())
        grown = max(float(strengths.max()) for strengths in penalty.strengths.values())
        assert grown == pytest.approx(4 * strength)
    assert norms[1.0] < norms[0.0]


# ── physical pruning while training ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.AdamW(p, lr=1e-2),
    lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    lambda p: torch.optim.Adafactor(p, lr=1e-2),
])  # fmt: skip
def test_the_optimizer_is_cut_along(make_optimizer: Any) -> None:
    model = net()
    decay = [model.head.weight, model.one.weight]
    rest = [p for name, p in model.named_parameters() if name not in ("head.weight", "one.weight")]
    optimizer = make_optimizer([{"params": decay}, {"params": rest, "lr": 1e-3}])
    for _ in range(3):
        optimizer.zero_grad()
        net_loss(model, IMAGES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = graphprune.compile(model, IMAGES, keep=0.6, kinds=["channel", "hidden"])
    old = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    shrink(optimizer, model, result)
    keep, axes = result.plan.keep(result.groups), result.groups.axes
    new = dict(result.model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(new["head.weight"]), id(new["one.weight"])]
    assert optimizer.param_groups[1]["lr"] == 1e-3
    assert set(optimizer.state) == set(new.values())
    for name, parameter in new.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                expected = old[name][key]
                for dim, axis in enumerate(axes.tensors[name]):
                    expected = expected.index_select(dim, torch.tensor(axis.kept(keep)))
                assert torch.equal(value, expected)
    assert new["one.weight"].shape != model.one.weight.shape
    net_loss(result.model, IMAGES).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = net(), net()
    result = graphprune.compile(model, IMAGES, keep=0.6)
    with pytest.raises(UserMistake, match="not the model's"):
        shrink(torch.optim.SGD(other.parameters(), lr=0.1), model, result)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.one.weight]["odd"] = torch.zeros(3)
    with pytest.raises(UserMistake, match="cannot be cut"):
        shrink(optimizer, model, result)
    assert optimizer.param_groups[0]["params"][0] is model.stem.weight


def test_training_goes_on_while_the_model_shrinks() -> None:
    model = net()
    whole = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = gradual(IMAGES, keep=0.4, begin=5, end=25, every=5, method="magnitude")
    losses, sizes = [], []
    for step in range(60):
        optimizer.zero_grad()
        loss = net_loss(model, IMAGES)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pruner.step(model, optimizer, step)
        losses.append(float(loss.detach()))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert len(set(sizes)) >= 4 and sizes == sorted(sizes, reverse=True)
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < losses[26]
    for group in optimizer.param_groups:
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in group["params"])
    fresh = net()
    plan = pruner.plan
    assert plan is not None and sizes[-1] == plan.cost["after"]["parameters"] < 0.5 * whole
    replayed = replay_on(fresh, plan, IMAGES)
    assert [p.shape for p in replayed.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_prunes_on_schedule(tmp_path: Any) -> None:
    model = llama()
    pruner = gradual(TOKENS, keep=0.5, begin=0, end=6, every=2, method="magnitude", kinds=["ffn"])
    trainer = trained(model, tmp_path, pruner, 10)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").shape == (12, 16)
    assert model.config.intermediate_size == 12
    assert trainer.model is model
    assert trainer.optimizer is not None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def replay_on(model: nn.Module, plan: Plan, inputs: Any) -> nn.Module:
    """The original with a plan applied."""
    groups = groups_of(model, inputs)
    return graphprune.rewrite(model, groups, plan, graphprune.compiler.Example(inputs), graphprune.compiler.Emission()).model


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_rounds_compose_to_one_plan_for_the_original(make: Any, inputs: Any) -> None:
    model = make().eval()
    result = iterative(model, inputs, keep=0.5, rounds=3, method="magnitude", kinds=["all"] if make is net else None)
    replayed = replay_on(model, result.plan, inputs)
    for (name, one), (_, other) in zip(result.model.named_parameters(), replayed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    once = graphprune.compile(model, inputs, keep=0.5, method="magnitude", kinds=["all"] if make is net else None)
    assert result.plan.cost["before"] == once.plan.cost["before"]
    assert result.plan.cost["after"]["parameters"] == pytest.approx(once.plan.cost["after"]["parameters"], rel=0.2)
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.cost["after"]["parameters"]


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    model = net().eval()
    once = graphprune.compile(model, IMAGES, keep=0.5)
    with pytest.raises(UserMistake, match="do not follow"):
        compose(once.plan, once.plan)


def test_training_between_rounds_is_kept() -> None:
    model = net().eval()
    result = iterative(model, IMAGES, keep=0.6, rounds=2, between=lambda m: nn.init.constant_(m.get_parameter("head.bias"), 7.0))
    assert result.model.get_parameter("head.bias").eq(7).all()
    with pytest.raises(UserMistake, match="nothing was pruned"):
        iterative(model, IMAGES, keep=1.0, rounds=2)
