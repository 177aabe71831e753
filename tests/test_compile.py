"""The whole compiler on small models, held against oracles that know nothing of axes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.difference import AT_ONCE, difference
from graphprune.errors import ModelLimit, RuleBug, UserMistake
from graphprune.execute import tensors_of
from graphprune.rewrite.graph import Smaller, smaller
from tests.models import bert, gpt2, llama, residual, tokens

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def kept_of(result: graphprune.Result, kind: str, layer: int) -> list[int]:
    return next(list(cut.kept) for cut in result.plan.cuts if cut.kind == kind and f".{layer}." in cut.group)


def silence(weight: Tensor, dim: int, removed: list[int]) -> None:
    weight.data.index_fill_(dim, torch.tensor(removed), 0.0)


def test_llama_heads_and_channels_equal_zeroing_them_by_hand() -> None:
    """Query heads go with their KV head: zero o_proj's columns of the whole group, down_proj's of each channel."""
    model, ids = llama(), tokens()
    result = graphprune.compile(model, {"input_ids": ids}, keep=0.55, kinds=["head", "ffn"], method="random", seed=3)
    oracle = copy.deepcopy(model)
    width = model.config.head_dim
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    for i, layer in enumerate(oracle.model.layers):
        gone = set(range(3)) - set(kept_of(result, "head", i))
        columns = [(kv * heads + q) * width + d for kv in gone for q in range(heads) for d in range(width)]
        silence(layer.self_attn.o_proj.weight, 1, columns)
        silence(layer.mlp.down_proj.weight, 1, sorted(set(range(88)) - set(kept_of(result, "ffn", i))))
    with torch.no_grad():
        torch.testing.assert_close(result.model(ids).logits, oracle(ids).logits, **CLOSE)
    assert result.model.config.num_key_value_heads < 3
    assert result.pruned.config is not None


def test_the_input_model_is_untouched() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    graphprune.compile(model, {"input_ids": tokens()}, keep=0.6)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_residual_convolutions_equal_zeroing_channels() -> None:
    model, x = residual(), torch.randn(2, 3, 8, 8)
    result = graphprune.compile(model, x, keep=0.6, kinds=["channel"], protect=["stem"], method="random")
    inner = next(cut for cut in result.plan.cuts if cut.group == "one:channel")
    oracle = copy.deepcopy(model)
    silence(oracle.two.weight, 1, sorted(set(range(20)) - set(inner.kept)))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), oracle(x), **CLOSE)
    smaller: Any = result.model
    assert smaller.one.out_channels == smaller.norm.num_features == smaller.two.in_channels == len(inner.kept)


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.5])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_budget_is_met_within_one_step(keep: float, scope: str) -> None:
    model = llama()
    result = graphprune.compile(model, {"input_ids": tokens()}, keep=keep, scope=scope, alike=True)
    names = [f"model.layers.{i}.{n}.weight" for i in range(2) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    before = sum(model.get_parameter(name).numel() for name in names)
    after = sum(result.model.get_parameter(name).numel() for name in names)
    step = 2 * 3 * 48
    assert 0 <= keep * before - after < step
    assert result.plan.cost["after"]["parameters"] == sum(p.numel() for p in result.model.parameters())


def test_keep_of_model_counts_every_parameter() -> None:
    model = llama()
    result = graphprune.compile(model, {"input_ids": tokens()}, keep=0.8, keep_of="model")
    ratio = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.79 < ratio <= 0.8


def test_rounding_minimum_and_protection() -> None:
    result = graphprune.compile(
        llama(), {"input_ids": tokens()}, keep=0.8, kinds=["ffn"], round_to=16, alike=False, protect=["model.layers.0"]
    )
    sizes = {cut.group: len(cut.kept) for cut in result.plan.cuts}
    assert set(sizes) == {"model.layers.1.mlp.gate_proj:ffn"}
    assert all(size % 16 == 0 for size in sizes.values())


def test_a_budget_out_of_reach_says_how_close_it_gets() -> None:
    with pytest.raises(ModelLimit, match="out of reach") as caught:
        graphprune.compile(llama(), {"input_ids": tokens()}, keep=0.1, kinds=["ffn"], minimum=80)
    assert "as small as these groups get" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"keep": 1.5}, {"keep": 0}, {"method": "magnitud"}, {"scope": "everywhere"}, {"kinds": ["nose"]}, {"emit": "onyx"}],
)
def test_mistakes_are_named_before_anything_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserMistake):
        graphprune.compile(llama(), {"input_ids": tokens()}, **wrong)


def test_bert_heads_are_left_alone_with_a_note_and_pruned_when_asked_for() -> None:
    model, ids = bert(), tokens()
    default = graphprune.compile(model, {"input_ids": ids}, keep=0.9)
    assert default.pruned.config is not None
    assert any("head groups are left alone" in note for note in default.notes)
    asked = graphprune.compile(model, {"input_ids": ids}, keep=0.8, kinds=["head"])
    assert asked.pruned.config is None
    assert asked.pruned.obstacle is not None
    assert asked.model.bert.encoder.layer[0].attention.self.query.out_features == 36  # type: ignore[union-attr, index]


def test_what_no_config_describes_can_be_compiled_again() -> None:
    once = graphprune.compile(bert(), {"input_ids": tokens()}, keep=0.8, kinds=["head"])
    assert once.pruned.config is None
    again = graphprune.compile(once.model, {"input_ids": tokens()}, keep=0.8)
    assert again.plan.cuts
    assert "does not describe" in str(again.pruned.obstacle)


def test_gpt2_heads_find_their_hidden_attributes() -> None:
    result = graphprune.compile(gpt2(), {"input_ids": tokens()}, keep=0.8, kinds=["head"])
    attention: Any = result.model.transformer.h[0].attn  # type: ignore[union-attr, index]
    assert attention.split_size == 36
    assert attention.c_attn.nf == 108


def test_tied_weights_stay_tied() -> None:
    result = graphprune.compile(llama(tied=True), {"input_ids": tokens()}, keep=0.7, kinds=["hidden"])
    model: Any = result.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_graph_emitter_agrees_with_the_module_emitter_and_takes_other_sizes() -> None:
    model, ids = llama(), tokens()
    module, graph = (graphprune.compile(model, {"input_ids": ids}, keep=0.7, emit=emit, alike=True) for emit in ("module", "graph"))
    assert module.plan.cuts == graph.plan.cuts
    longer = torch.randint(0, 101, (4, 17))
    with torch.no_grad():
        for other in (ids, longer):
            torch.testing.assert_close(graph.model(input_ids=other).logits, module.model(other).logits, **CLOSE)


def test_a_wrong_rule_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the value axis's layout on purpose: verification must name a group and nothing may come out."""
    rules = graphprune.propagate.__globals__["find_rule"]

    def broken(target: Any) -> Any:
        rule = rules(target)
        if "transpose" not in str(target):
            return rule

        def swapped(op: Any) -> Any:
            out = rule(op)
            axes = list(out.axes)
            same = [i for i, a in enumerate(axes) if op.length(a) == op.length(axes[-1])]
            if len(axes) == 4 and len(same) > 1:
                axes[same[0]], axes[-1] = axes[-1], axes[same[0]]
            return type(out)(tuple(axes))

        return swapped

    monkeypatch.setitem(graphprune.propagate.__globals__, "find_rule", broken)
    square = llama(head_dim=6)
    with pytest.raises(RuleBug, match="does not compute what the masked original does") as caught:
        graphprune.compile(square, {"input_ids": tokens()}, keep=0.7, kinds=["value_width"])
    assert caught.value.at == "model.layers.0.self_attn.v_proj:value_width"


def test_a_pass_of_ones_own_and_the_order_of_passes() -> None:
    def loud(model: nn.Module, groups: graphprune.Groups, *, power: int = 2) -> graphprune.Scores:
        weights = dict(model.named_parameters(remove_duplicate=False))
        return graphprune.score(groups, groups.axes.tensors, lambda n: weights[n].detach().abs() ** power, method="loud")

    result = graphprune.compile(llama(), {"input_ids": tokens()}, method=loud, options={"power": 4})
    assert result.plan.method == "loud"
    with pytest.raises(UserMistake, match="needs Calibration"):
        graphprune.compile(llama(), {"input_ids": tokens()}, method="taylor")
    with pytest.raises(UserMistake, match="no option"):
        graphprune.compile(llama(), {"input_ids": tokens()}, method="magnitude:q=3")


ONE_BY_ONE = torch.linspace(0.2, 1.8, 12).reshape(2, 6)


@pytest.mark.parametrize("x", [torch.zeros(2, 6), ONE_BY_ONE, -ONE_BY_ONE], ids=["all zero", "alive", "nothing passes the ReLU"])
def test_a_wrong_cut_is_seen_whatever_the_example_inputs_are(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    nn.init.uniform_(model[0].weight)
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, x)))
    tensors, keep = tensors_of(model, groups.axes.trace), {group.factor: range(4) for group in groups}
    cut = smaller(groups.axes, tensors, keep)
    assert graphprune.verify(groups, tensors, [x], keep, cut) < 1e-12
    wrong = Smaller(cut.graph, {name: tensor.flip(0) for name, tensor in cut.tensors.items()})
    with pytest.raises(RuleBug, match="masked original"):
        graphprune.verify(groups, tensors, [x], keep, wrong)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("place", "value", "gap"), [(-1, 3.0, 2 / 3), (0, 3.0, 2 / 3), (-2, float("nan"), INFINITE), (1, INFINITE, INFINITE)]
)
def test_outputs_are_compared_to_the_last_number(place: int, value: float, gap: float) -> None:
    """They are taken some at a time."""
    one = torch.ones(2, AT_ONCE // 2 + 5)
    other = one.clone()
    other.view(-1)[place] = value
    assert difference([one], [one]) == 0 and difference([one], [one[:1]]) == INFINITE
    assert difference([one], [other]) == pytest.approx(gap)
    assert difference([], []) == 0 and difference([one[:0]], [other[:0]]) == 0
