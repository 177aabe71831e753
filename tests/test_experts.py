"""Mixtures of experts as transformers makes them: grouped products by default, seen as products of one matrix a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import graphprune
from graphprune.difference import difference
from graphprune.errors import GraphpruneError
from graphprune.execute import execute, tensors_of
from graphprune.pipeline import find_pass
from tests.models import VOCABULARY, sharpened

WIDTH, HIDDEN, EXPERTS = 40, 24, 4


def mixtral(dtype: torch.dtype = torch.float32, way: str = "grouped_mm") -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS,
    )  # fmt: skip
    model: Any = sharpened(transformers.MixtralForCausalLM(config)).to(dtype).eval()
    model.set_experts_implementation(way)
    return model


INPUTS = {"input_ids": torch.arange(22).reshape(2, 11) % VOCABULARY}


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
def test_groups_do_not_depend_on_how_a_model_runs_its_experts(way: str) -> None:
    plain, other = (graphprune.couple(graphprune.propagate(graphprune.trace(mixtral(way=w), INPUTS))) for w in ("batched_mm", way))
    assert [(group.name, group.kind, group.size) for group in plain] == [(group.name, group.kind, group.size) for group in other]
    assert {"expert", "ffn"} <= set(other.kinds)


class Largest(TorchDispatchMode):
    """The largest tensor that anything gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_walk_multiplies_with_a_matrix_at_a_time_and_gathers_none(dtype: torch.dtype | None) -> None:
    model = mixtral()
    traced = graphprune.trace(model, INPUTS)
    with torch.no_grad():
        wanted = model(**INPUTS).logits
        with Largest() as seen:
            found = execute(traced, tensors_of(model, traced), traced.flatten(INPUTS), dtype=dtype)[0]
    assert difference([found.to(wanted.dtype)], [wanted]) < 1e-5  # of the largest: a model rounds each product to single precision
    assert seen.elements < 44 * WIDTH * HIDDEN  # 22 tokens, two experts each


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_widths_of_experts_suit_the_grouped_product(dtype: torch.dtype, multiple: int, tmp_path: Path) -> None:
    model = mixtral(dtype)
    result = graphprune.compile(model, INPUTS, keep=0.55)
    width = result.model.config.intermediate_size  # type: ignore[union-attr]
    assert 0 < width < WIDTH
    assert width % multiple == 0
    graphprune.save(result, tmp_path / "smaller")
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "smaller", dtype=dtype)
    assert all(torch.equal(tensor, result.model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert loaded(**INPUTS).logits.isfinite().all()
    assert loaded.config._experts_implementation == model.config._experts_implementation == "grouped_mm"


def test_a_width_that_was_asked_for_is_run_before_it_is_given() -> None:
    with pytest.raises(GraphpruneError, match="multiple of 16 bytes"):
        graphprune.compile(mixtral(torch.bfloat16), INPUTS, keep=0.55, kinds=["ffn"], round_to=1)


@pytest.mark.parametrize("kinds", [["expert"], ["head", "ffn"]])
def test_the_default_recipe_for_text_serves_experts(kinds: list[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, VOCABULARY, (2, 16), generator=draw)} for _ in range(2)]
    result = graphprune.compile(mixtral(), keep=0.6, kinds=kinds, calibration=rows)
    config: Any = result.model.config
    assert (config.num_local_experts < EXPERTS, config.intermediate_size < WIDTH) == ("expert" in kinds, "ffn" in kinds)


@pytest.mark.parametrize("method", ["wanda_sp", "flap", "minitron", "fisher"])
def test_what_all_rows_bring_to_a_stack_scores_the_width_of_its_experts(method: str) -> None:
    """The stack is one weight, which every row meets that is sent to an expert: a channel that is always zero matters least."""
    model = mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:, [5, 5 + WIDTH]] = 0
    calibration = graphprune.Calibration((INPUTS,), "drawn")
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, INPUTS)))
    widths = replace(groups, groups=tuple(group for group in groups if group.kind == "ffn"))
    scores = find_pass(method).function(model, widths, calibration)
    assert len(widths) == 2
    for group in widths:
        assert scores[group.name].shape == (WIDTH,)
        assert int(scores[group.name].argmin()) == 5


class Chosen(torch.nn.Module):
    """Matrices chosen by numbers from the end, by truth, and from a stack that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = torch.nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor, given: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        truth = torch.tensor([True, False, True])
        return torch.bmm(x, self.stack[numbers]), torch.bmm(x, given[numbers]), torch.bmm(x[:2], self.stack[truth])


def test_matrices_are_chosen_as_indexing_does() -> None:
    torch.manual_seed(0)
    model, inputs = Chosen(), (torch.randn(6, 2, 5), torch.randn(3, 5, 4), torch.tensor([0, -1, 2, 1, -3, 0]))
    traced = graphprune.trace(model, inputs)
    found = execute(traced, tensors_of(model, traced), traced.flatten(inputs))
    for mine, theirs in zip(found, model(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs.detach())
