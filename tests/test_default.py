"""What stands where no method is asked for: magnitude without data, the measured recipe with text; every choice can be overruled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from graphprune.passes.self_written import self_written
from torch import Tensor, nn

import graphprune
from graphprune import Calibration
from tests.models import llama


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return llama()


@pytest.fixture(scope="module")
def text(model: Any) -> Calibration:
    draw = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    rows = tuple({"input_ids": torch.randint(3, vocabulary, (2, 16), generator=draw)} for _ in range(4))
    return Calibration(rows, "drawn", seed=3)


def test_magnitude_without_data(model: Any) -> None:
    assert graphprune.compile(model, keep=0.8, verify=False).plan.method.startswith("magnitude")


def test_the_recipe_with_text(model: Any, text: Calibration) -> None:
    result = graphprune.compile(model, keep=0.7, kinds=["ffn"], calibration=text)
    assert result.plan.method.startswith("obs")
    assert result.plan.options["scope"] == "global"
    assert result.pruned.config is not None
    unrepaired = {"method": "obs", "scope": "global", "passes": ["self_written", "sensitivity"]}
    plain = graphprune.compile(model, keep=0.7, kinds=["ffn"], calibration=text, **unrepaired)
    assert plain.plan.cuts == result.plan.cuts
    changed = [
        name
        for (name, found), other in zip(result.model.named_parameters(), plain.model.parameters(), strict=True)
        if not torch.equal(found, other)
    ]
    assert any("down_proj" in name for name in changed)
    assert not any("norm" in name or "embed" in name for name in changed)


def test_a_method_that_is_asked_for_stands_alone(model: Any, text: Calibration) -> None:
    result = graphprune.compile(model, keep=0.7, calibration=text, method="wanda_sp")
    assert result.plan.method.startswith("wanda_sp")
    assert result.plan.options["scope"] == "local"
    assert result.facts[Calibration] is text


def test_a_model_that_writes_nothing_gets_magnitude(text: Calibration) -> None:
    config = hf.BertConfig(
        vocab_size=1000, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, hidden_dropout_prob=0.0
    )
    result = graphprune.compile(hf.BertModel(config).eval(), keep=0.8, calibration=text, verify=False)
    assert result.plan.method.startswith("magnitude")


def test_self_written_batches_take_turns_with_the_given_ones(model: Any, text: Calibration) -> None:
    both = self_written(model, text, most=4)
    assert [tuple(batch.shape) for batch in both.batches] == [(2, 16)] * 6
    assert [any(batch is given for given in text.batches) for batch in both.batches] == [True, False, True, False, True, True]
    again = self_written(model, text, most=4)
    assert all(torch.equal(one, other) for one, other in zip(both.batches, again.batches, strict=True))


def test_units_that_no_product_reads_are_scored_too(model: Any, text: Calibration) -> None:
    """Queries and keys meet each other only."""
    result = graphprune.compile(model, keep=0.7, kinds=["qk_width", "ffn"], calibration=text, emit="graph", verify=False)
    assert "taylor where" in result.plan.method and result.plan.cuts


def test_a_model_without_a_token_to_begin_with_begins_anywhere(text: Calibration) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    no_start = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = hf.MixtralConfig(vocab_size=1000, num_local_experts=3, num_experts_per_tok=2, **sizes, **no_start)
    result = graphprune.compile(hf.MixtralForCausalLM(config).eval(), keep=0.8, calibration=text)
    assert result.plan.method.startswith("obs") and result.plan.cuts


class Turned(nn.Module):
    """Weights written as (out, in) and turned where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        inner = (x @ self.up.T).relu()
        turned: Tensor = inner @ self.down.transpose(0, 1)
        return x + turned


def test_a_product_with_a_turned_weight_is_a_product() -> None:
    """Least squares at λ → 0 finds the closed form, W·C[:,S]·C[S,S]⁻¹, for ``x @ weight.T`` as for a linear layer."""
    torch.manual_seed(0)
    model, x = Turned().double(), torch.randn(64, 8).double()
    repair = "least_squares:given=then:drift=0:where=readers:even=false:damping=1e-12"
    result = graphprune.compile(model, calibration=[{"x": x}], keep=0.5, method="wanda_sp", passes=[repair])
    (cut,) = result.plan.cuts
    inner = (x @ model.up.T).relu().detach()
    gram = inner.T @ inner
    kept = list(cut.kept)
    expected = model.down.detach() @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    torch.testing.assert_close(result.model.down.detach(), expected, rtol=1e-6, atol=1e-8)
