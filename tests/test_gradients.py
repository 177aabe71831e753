"""Gradients as scores use them: in float32 or better, activations computed twice on request, no more of them held than asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from graphprune.passes.llm_pruner import llm_pruner
from torch.overrides import TorchFunctionMode

import graphprune
from graphprune.score import profiles
from tests.models import VOCABULARY, sharpened


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=45, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6,
    )  # fmt: skip
    return sharpened(transformers.LlamaForCausalLM(config)).to(dtype).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, VOCABULARY, (2, 11), generator=draw)} for _ in range(2)]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    graphprune.see_gradients(model, batches()[:1], lambda name, _, gradient: found.__setitem__(name, gradient.clone()))
    return found


def test_checkpointing_computes_the_layers_twice_and_gives_the_same_gradients() -> None:
    model, calls = llama(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, once = gradients(model), len(calls)
    model.activation_checkpointing_enable()
    twice = gradients(model)
    assert (once, len(calls) - once) == (3, 6)
    assert plain.keys() == twice.keys()
    assert all(torch.equal(plain[name], twice[name]) for name in plain)
    assert model.config.use_cache
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_gradients_of_half_precision_weights_come_in_float32() -> None:
    assert {gradient.dtype for gradient in gradients(llama(torch.bfloat16)).values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(llama(torch.float64)).values()} == {torch.float64}


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_the_share_of_the_gradients_that_is_held_does_not_change_the_scores(order: str) -> None:
    model, calibration = llama(), graphprune.Calibration(tuple(batches()), "drawn")
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, batches()[0])))
    whole, parts = (llm_pruner(model, groups, calibration, order=order, rounds=rounds) for rounds in (1, 4))
    assert all(torch.equal(whole[group.name], parts[group.name]) for group in groups)


class Made(TorchFunctionMode):
    """Holds weak references to every tensor of a weight's shape that a function of torch makes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.shapes = {parameter.shape for parameter in model.parameters() if parameter.ndim == 2}
        self.owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.shape in self.shapes and made.untyped_storage().data_ptr() not in self.owned:
                self.made.append(weakref.ref(made))
        return made

    def alive(self) -> dict[int, torch.Tensor]:
        """Those that somebody still holds, each once."""
        return {id(tensor): tensor for one in self.made if (tensor := one()) is not None}


@pytest.mark.parametrize(("order", "holds"), [("vector", False), ("second", False), ("first", True)])
def test_second_order_scores_hold_no_gradient(order: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``see`` is given, and what it makes of that size, is gone when the next gradient comes; first order keeps means."""
    model, calibration = llama(), graphprune.Calibration(tuple(batches()), "drawn")
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, batches()[0])))
    made, plain, given, left = Made(model), graphprune.see_gradients, list[weakref.ref[torch.Tensor]](), list[int]()

    def watched(model: Any, inputs: Any, see: Any, **options: Any) -> None:
        def look(name: str, weight: Any, gradient: torch.Tensor) -> None:
            assert not given or given[-1]() is None
            left.append(len(made.alive().keys() - {id(gradient)}))
            given.append(weakref.ref(gradient))
            with made:
                see(name, weight, gradient)

        plain(model, inputs, look, **options)

    monkeypatch.setattr(sys.modules[llm_pruner.__module__], "see_gradients", watched)
    llm_pruner(model, groups, calibration, order=order)
    assert len(given) == 4 * len(dict(model.named_parameters()))
    assert max(left) == (left[-1] if holds else 0) and (left[-1] > 10) is holds


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (3, 5, 7), (3, 2, 2)])
def test_a_function_of_several_tensors_is_summed_block_by_block(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["graphprune.score"], "BLOCK", 80)
    one, other = torch.randn(2, *shape, dtype=torch.float64)
    found = profiles((one, other), range(-1, len(shape)), lambda a, b: (a * b).abs())
    whole = (one * other).abs()
    for dim, sums in found.items():
        rows = whole.reshape(1, -1) if dim < 0 else whole.movedim(dim, 0).flatten(1) if len(shape) > 1 else whole[:, None]
        torch.testing.assert_close(sums, rows.sum(1))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for a peak of resident memory")
def test_scores_take_no_more_memory_than_gradients_freed_as_they_appear() -> None:
    """A tenth of both is for the allocator: holes between gradients once added up to half a model."""
    script = Path(__file__).parent.parent / "benchmarks" / "memory.py"

    def taken(what: str) -> float:
        command = [sys.executable, "-W", "ignore", script, "--hidden", "512", "--length", "64", "--one", "float32", what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return sum(json.loads(done.stdout.splitlines()[-1]))

    assert taken("taylor") < 1.1 * taken("freed")
