"""A model that becomes the smaller one itself: the same result as beside the original, and nothing of the original left over."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graphprune
from graphprune import compile
from graphprune.errors import ModelLimit, RuleBug
from graphprune.replay import replay
from graphprune.rewrite import cut as cutting
from tests.models import VOCABULARY, bert, gpt2, llama, mixture, residual, sharpened, tokens


def gemma() -> Any:
    """Its stream's width stands in a buffer that no checkpoint holds."""
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, head_dim=12,
        num_key_value_heads=2,
    )  # fmt: skip
    return sharpened(transformers.GemmaForCausalLM(config))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {}),
    "unchecked": (llama, {"verify": False}),
    "tied": (lambda: llama(tied=True), {}),
    "a norm over what goes": (llama, {"kinds": ["hidden"]}),
    "half": (lambda: llama().bfloat16(), {}),
    "gpt2": (gpt2, {"kinds": ["ffn"]}),
    "bert": (bert, {}),
    "experts": (mixture, {"kinds": ["expert", "head"]}),
    "a computed buffer": (gemma, {}),
    "text": (llama, {"method": "taylor", "calibration": [{"input_ids": tokens(seed)} for seed in range(2)]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_becomes_what_it_would_be_beside_the_original(case: str) -> None:
    make, settings = CASES[case]
    settings = {"keep": 0.7, "method": "magnitude", **settings}
    model = make()
    wanted, found = compile(make(), **settings), compile(model, **settings, inplace=True)
    assert found.model is model
    assert found.plan.cuts == wanted.plan.cuts
    mine, theirs = model.state_dict(keep_vars=True), wanted.model.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor)
        assert type(mine[name]) is type(tensor)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in wanted.model.named_parameters()]
    assert model.config.to_dict() == wanted.model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, wanted.model(tokens()).logits)


def test_the_weights_it_had_are_gone() -> None:
    model = llama()
    cut = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    held = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    result = compile(model, keep=0.6, method="magnitude", inplace=True)
    gc.collect()
    gone = {name for name, parameter in held.items() if parameter() is None}
    assert gone == {name for name in held if name.split(".")[-2] in cut}
    assert result.model is model


class Checked(Exception):
    pass


def test_no_second_model_is_held_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is cut and alive at one time while it is checked is a tensor or two."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, picked = [0], cutting._picked

    def watched(*args: Any) -> torch.Tensor:
        found = picked(*args)
        if found is not args[0]:
            alive.add(found)
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(cutting, "_picked", watched)
    def checked(*_: Any) -> None:
        raise Checked

    monkeypatch.setattr("graphprune.emission.cut_in_place", checked)
    with pytest.raises(Checked):
        compile(llama(layers=6), keep=0.6, method="magnitude", inplace=True)
    assert 0 < most[0] < 4


def test_a_plan_is_replayed_in_place() -> None:
    plan = compile(llama(), keep=0.6, method="magnitude").plan
    model = llama()
    result = replay(model, plan, inplace=True)
    assert result.model is model
    wanted = replay(llama(), plan).model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def unlike(settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    model, args = (residual(), (torch.randn(2, 3, 8, 8),)) if settings.pop("plain", False) else (settings.pop("of", llama)(), ())
    return model, (args, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"plain": True, "kinds": ["channel"]},
        {"of": bert, "kinds": ["head"]},
        {"emit": "graph"},
        {"alike": False, "scope": "global", "method": "random"},
        {"kinds": ["layer"], "keep": 0.5},
        {"calibration": [{"input_ids": tokens(seed)} for seed in range(2)], "passes": ["least_squares"]},
    ],
    ids=["a plain module", "a record", "a graph", "layers that differ", "layers", "a repair"],
)
def test_what_cannot_be_in_place_is_beside_it(settings: dict[str, Any]) -> None:
    model, (args, settings) = unlike(dict(settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = compile(model, *args, **{"keep": 0.7, "method": "magnitude", **settings}, inplace=True)
    assert result.model is not model
    assert {name: tensor.shape for name, tensor in result.model.state_dict().items()} != {k: v.shape for k, v in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pass_that_fails_after_the_cut_leaves_the_model_as_it_was() -> None:
    def fails(pruned: graphprune.Pruned) -> graphprune.Pruned:
        raise ArithmeticError

    model = llama()
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ArithmeticError):
        compile(model, keep=0.6, method="magnitude", passes=[fails], inplace=True)
    assert [parameter.shape for parameter in model.parameters()] == shapes


def test_a_wrong_rule_is_caught_before_anything_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(sys.modules["graphprune.verify"], "difference", lambda *_: 1.0)
    with pytest.raises(RuleBug, match="does not compute what the masked original does"):
        compile(model, keep=0.6, method="magnitude", inplace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_no_trace_shows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose class does something else with its config than the trace of an empty one shows."""
    monkeypatch.setattr("graphprune.emission.close", lambda *_: False)
    with pytest.raises(ModelLimit, match="in place"):
        compile(llama(), keep=0.6, method="magnitude", inplace=True)


def test_a_buffer_that_no_config_gives_stands_in_the_way_here_too() -> None:
    def slowed() -> Any:
        model = llama()
        model.model.rotary_emb.inv_freq.mul_(0.5)
        return model

    model = slowed()
    found = compile(model, keep=0.6, method="magnitude", inplace=True)
    assert found.model is not model
    assert found.pruned.config is None
    assert compile(slowed(), keep=0.6, method="magnitude").pruned.config is None


def test_a_model_in_place_is_saved_and_loaded(tmp_path: Any) -> None:
    model = llama()
    result = compile(model, keep=0.6, method="magnitude", inplace=True)
    graphprune.save(result, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


SETTINGS = {"beside": {"kinds": ["ffn", "head"]}, "in place": {"kinds": ["ffn", "head"], "inplace": True}, "layers": {"kinds": ["layer"]}}


@pytest.mark.parametrize("way", SETTINGS)
def test_what_was_set_by_hand_stays_and_sizes_are_those_of_the_config(way: str) -> None:
    model = llama(layers=4)
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.03
    smaller = compile(model, tokens(), keep=0.5, method="magnitude", **SETTINGS[way]).model
    assert [layer.gradient_checkpointing for layer in smaller.model.layers] == [True] * len(smaller.model.layers)
    assert {layer.self_attn.attention_dropout for layer in smaller.model.layers} == {0.03}
    fresh = type(smaller)(smaller.config)
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [layer.self_attn.layer_idx for layer in fresh.model.layers]
    assert str(smaller) == str(fresh)


def test_the_whole_hears_of_a_part_pruned_in_place() -> None:
    whole = llama()
    config = whole.config
    compile(whole.model, tokens(), keep=0.5, method="magnitude", kinds=["ffn"], inplace=True)
    assert whole.config is config
    assert config.intermediate_size == whole.model.layers[0].mlp.up_proj.out_features < llama().config.intermediate_size
    fresh = type(whole)(config)
    fresh.load_state_dict(whole.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(tokens()).logits, whole(tokens()).logits)
