"""Whole pieces: layers and residual branches found from the graph, removed, renumbered, saved; against eager computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import graphprune
from graphprune.errors import ModelLimit, UserMistake
from tests.models import HIDDEN, IDS, VOCABULARY, bert, llama, sharpened, tokens

TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Block(nn.Module):
    """Two residual branches; knows its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.mix = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x)) * (1 + self.place)
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(place) for place in range(count))
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Shared(nn.Module):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        block = Block(0)
        self.blocks = nn.ModuleList([block, block, block])
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Widening(nn.Module):
    """A first block that changes the width, two that keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(6, 8), Block(0), Block(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def stack(count: int = 5) -> Any:
    return sharpened(Stack(count))


def deep_llama(layers: int = 4) -> Any:
    config = T.LlamaConfig(
        **TEXT, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=3
    )
    return sharpened(T.LlamaForCausalLM(config))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
    return sharpened(T.T5ForConditionalGeneration(T.T5Config(**TEXT, **sizes)))


def found(model: nn.Module, inputs: Any, kind: str = "layer") -> graphprune.Layers:
    axes = graphprune.propagate(graphprune.trace(model, inputs))
    return graphprune.layers(axes) if kind == "layer" else graphprune.branches(axes)


def calibration(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(seed)} for seed in range(count)]


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stack_is_one_group_and_each_layer_owns_its_tensors() -> None:
    layers = found(deep_llama(), {"input_ids": tokens()})
    assert [(group.name, group.size) for group in layers] == [("model.layers:layer", 4)]
    for place, piece in enumerate(layers.pieces["model.layers:layer"]):
        assert piece.name == f"model.layers.{place}"
        assert len(piece.tensors) == 9 and all(name.startswith(f"{piece.name}.") for name in piece.tensors)


def test_a_branch_takes_its_norm_along() -> None:
    layers = found(deep_llama(), {"input_ids": tokens()}, "branch")
    assert {group.name: group.size for group in layers} == {"model.layers.#.self_attn:branch": 4, "model.layers.#.mlp:branch": 4}
    assert "model.layers.2.input_layernorm.weight" in layers.pieces["model.layers.#.self_attn:branch"][2].tensors


def test_the_first_layer_of_a_relative_position_encoder_stays_since_others_need_it() -> None:
    layers = found(t5(), {"input_ids": tokens(), "decoder_input_ids": tokens(1)[:, :5]})
    assert {group.name: group.size for group in layers} == {"encoder.block:layer": 2, "decoder.block:layer": 2}
    assert "encoder.block.0 gives 2 results" in " ".join(frozen.reason.what for frozen in layers.frozen)


def test_an_element_that_changes_the_width_stays() -> None:
    layers = found(sharpened(Widening()), torch.randn(4, 6))
    assert [piece.name for pieces in layers.pieces.values() for piece in pieces] == ["blocks.1", "blocks.2"]


def test_a_block_called_several_times_is_no_layer() -> None:
    model, x = sharpened(Shared()), torch.randn(4, 8)
    with pytest.raises(ModelLimit, match="no layer of this model can go"):
        graphprune.compile(model, x, kinds=["layer"])


def test_nested_numbered_modules_count_as_their_outermost_stack() -> None:
    model = nn.Sequential(*[nn.Sequential(Block(0), Block(1)) for _ in range(3)])
    assert [(group.name, group.size) for group in found(sharpened(model), torch.randn(4, 8))] == [("layer", 3)]


def test_a_piece_says_what_goes_with_it() -> None:
    layers = found(deep_llama(), {"input_ids": tokens()})
    said = layers.explain("model.layers.2")
    assert "model.layers.2.mlp.down_proj.weight" in said and "9 tensors" in said
    assert layers.explain("model.layers:layer").count("can go") == 4
    with pytest.raises(UserMistake, match="no whole piece"):
        layers.explain("model.layer.2")


# ── removal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_removing_layers_is_skipping_them() -> None:
    model, x = stack(), torch.randn(7, 6)
    result = graphprune.compile(model, x, kinds=["layer"], keep=0.6, method="random")
    (cut,) = result.plan.cuts
    with torch.no_grad():
        stream = model.enter(x)
        for place in cut.kept:
            stream = model.blocks[place](stream)
        expected = model.leave(stream)
        assert len(cut.kept) == 3 and len(model.blocks) == 5
    torch.testing.assert_close(result.model(x), expected)
    graph = graphprune.compile(model, x, kinds=["layer"], keep=0.6, method="random", emit="graph")
    torch.testing.assert_close(graph.model(x), expected)
    assert graph.plan.cost["after"]["parameters"] == sum(p.numel() for p in graph.model.parameters())


def test_a_layer_that_computes_with_its_own_number_keeps_it() -> None:
    model = stack()
    result = graphprune.compile(model, torch.randn(7, 6), kinds=["layer"], keep=0.6, method="random")
    assert [block.place for block in result.model.blocks] == list(result.plan.cuts[0].kept)
    assert [block.place for block in model.blocks] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("build", [deep_llama, bert, t5, "mixtral", "mamba", "gpt2"])
def test_a_model_without_layers_is_a_stock_checkpoint_of_fewer_layers(build: Any, tmp_path: Path) -> None:
    model = build() if callable(build) else sharpened(OTHERS[build]())
    inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(1)[:, :5]} if build is t5 else {})
    result = graphprune.compile(model, inputs, kinds=["layer"], keep=0.7, method="magnitude")
    assert result.pruned.config is not None
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.cost["after"]["parameters"]
    graphprune.save(result, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again, **inputs), logits(result.model, **inputs))
    graph = graphprune.replay(model, result.plan, inputs, emit="graph")
    torch.testing.assert_close(graph.model(**inputs).logits, logits(result.model, **inputs), rtol=1e-4, atol=1e-4)


OTHERS: dict[str, Any] = {
    "mixtral": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(
            **TEXT, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4,
        )
    ),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**TEXT, hidden_size=32, num_hidden_layers=4, state_size=4)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**TEXT, n_embd=32, n_layer=4, n_head=4)),
}  # fmt: skip


def test_the_cache_of_a_shallower_model_is_numbered_anew(tmp_path: Path) -> None:
    model = deep_llama(5)
    result = graphprune.compile(model, kinds=["layer"], keep=0.6, method="short_gpt", calibration=calibration())
    graphprune.save(result, tmp_path / "out")
    smaller = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == list(range(smaller.config.num_hidden_layers))
    prompt, how = tokens()[:1], {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    assert torch.equal(smaller.generate(prompt, use_cache=True, **how), smaller.generate(prompt, use_cache=False, **how))


def test_layers_of_two_types_that_no_config_orders_so_are_saved_with_a_record(tmp_path: Path) -> None:
    """Swin shifts the windows of every other block by its place: without the even ones, the config shifts the wrong ones."""
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 2], "window_size": 4}
    model, inputs = sharpened(T.SwinModel(T.SwinConfig(**shape))), {"pixel_values": torch.randn(2, 3, 32, 32)}

    def even_first(layers: graphprune.Layers) -> graphprune.Scores:
        return graphprune.Scores({g.name: torch.arange(g.size) % 2 + 1.0 for g in layers}, "even first")

    result = graphprune.compile(model, inputs, kinds=["layer"], keep=0.6, method=even_first, protect=["encoder.layers.0"])
    assert [cut.kept for cut in result.plan.cuts] == [(1, 3)] and result.pruned.config is None
    graphprune.save(result, tmp_path / "out")
    again = graphprune.load(tmp_path / "out").eval()
    code = T.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = result.model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, expected)
        assert torch.equal(code(**inputs).last_hidden_state, expected)


def test_a_plain_module_without_layers_round_trips(tmp_path: Path) -> None:
    model, x = stack(), torch.randn(5, 6)
    result = graphprune.compile(model, x, kinds=["layer"], keep=0.5, method="random")
    graphprune.save(result, tmp_path / "out")
    again = graphprune.load(tmp_path / "out", Stack())
    assert len(again.blocks) == 2 and torch.equal(again(x), result.model(x))


def test_removing_a_branch_is_adding_nothing() -> None:
    model, inputs = deep_llama(), {"input_ids": tokens()}
    result = graphprune.compile(model, inputs, kinds=["branch"], keep=0.7, method="magnitude", emit="graph")
    gone = [member for cut in result.plan.cuts for member in cut.members]
    hooks = [model.get_submodule(name).register_forward_hook(_nothing) for name in gone]
    expected = logits(model, **inputs)
    for hook in hooks:
        hook.remove()
    assert gone and not any(name.startswith(f"{gone[0]}.") for name, _ in result.model.body.named_parameters())
    torch.testing.assert_close(result.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def _nothing(module: nn.Module, inputs: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def test_a_branch_is_no_element_of_a_stack() -> None:
    with pytest.raises(ModelLimit, match="emit"):
        graphprune.compile(deep_llama(), {"input_ids": tokens()}, kinds=["branch"], keep=0.8)


# ── choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_budget_is_met_with_as_few_layers_as_do() -> None:
    model = deep_llama(6)
    result = graphprune.compile(model, {"input_ids": tokens()}, kinds=["layer"], keep=0.67, method="magnitude")
    (cut,) = result.plan.cuts
    assert len(cut.kept) == 4
    inside = [p for name, p in result.model.named_parameters() if "layers" in name]
    assert sum(p.numel() for p in inside) <= 0.67 * sum(p.numel() for n, p in model.named_parameters() if "layers" in n)


def test_protected_layers_stay_and_a_budget_that_needs_them_is_refused() -> None:
    model, inputs = deep_llama(), {"input_ids": tokens()}
    ends = ["model.layers.0", "model.layers.3"]
    result = graphprune.compile(model, inputs, kinds=["layer"], keep=0.75, method="magnitude", protect=ends)
    assert {0, 3} <= set(result.plan.cuts[0].kept)
    with pytest.raises(ModelLimit, match="out of reach"):
        graphprune.compile(model, inputs, kinds=["layer"], keep=0.3, method="magnitude", protect=ends)


@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
def test_a_target_is_met_as_recounted_on_what_comes_out(measure: str) -> None:
    model, inputs = deep_llama(6), {"input_ids": tokens()}
    result = graphprune.compile(model, inputs, kinds=["layer"], method="magnitude", target={measure: 0.8})
    again = graphprune.compile(result.model, inputs, kinds=["layer"], keep=1.0)
    assert again.plan.cost["before"] == result.plan.cost["after"]
    assert result.plan.cost["after"][measure] <= 0.8 * result.plan.cost["before"][measure]
    with pytest.raises(UserMistake, match="latency"):
        graphprune.compile(model, inputs, kinds=["layer"], target={"latency": 0.8})


def test_layers_and_widths_go_one_after_the_other() -> None:
    model = deep_llama()
    with pytest.raises(UserMistake, match="cannot go in one compile"):
        graphprune.compile(model, {"input_ids": tokens()}, kinds=["layer", "ffn"])
    shallow = graphprune.compile(model, {"input_ids": tokens()}, kinds=["layer"], keep=0.75).model
    narrow = graphprune.compile(shallow, {"input_ids": tokens()}, kinds=["ffn"], keep=0.75)
    assert narrow.pruned.config is not None and narrow.model.config.num_hidden_layers == 3


def test_what_reads_no_unit_says_so() -> None:
    with pytest.raises(ModelLimit, match="whole piece"):
        graphprune.compile(deep_llama(), kinds=["layer"], method="wanda_sp", calibration=calibration())


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_block_influence_is_one_minus_the_cosine_of_what_enters_and_leaves() -> None:
    model, batches = deep_llama(), calibration()
    layers = found(model, batches[0])
    scores = graphprune.pipeline.find_pass("short_gpt")(
        {nn.Module: model, graphprune.Layers: layers, graphprune.Calibration: given(batches)}
    )
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    expected = [torch.cat([1 - torch.cosine_similarity(*pair, dim=-1) for pair in states[place::4]]).mean() for place in range(4)]
    torch.testing.assert_close(scores["model.layers:layer"].float(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_angular_variant_removes_the_contiguous_block_that_turns_least() -> None:
    model, batches = deep_llama(6), calibration()
    result = graphprune.compile(model, kinds=["layer"], keep=0.67, method="short_gpt:block=2", calibration=batches)
    streams = []
    with torch.no_grad():
        for batch in batches:
            states = model.model(**batch, output_hidden_states=True).hidden_states
            last = model.model.layers[-1].register_forward_hook(lambda _, __, output: streams.append(output[:, -1]))
            model(**batch)
            last.remove()
            streams[-1] = torch.stack([*(state[:, -1] for state in states[:-1]), streams[-1]])
    h = torch.cat(streams, 1)
    angles = [torch.cosine_similarity(h[i], h[i + 2], dim=-1).clamp(-1, 1).arccos().mean() for i in range(5)]
    first = int(torch.stack(angles).argmin())
    assert result.plan.cuts[0].members == (f"model.layers.{first}", f"model.layers.{first + 1}")


def test_a_layer_s_taylor_score_is_the_sum_over_its_weights() -> None:
    model, batches = deep_llama(), calibration(1)
    layers = found(model, batches[0])
    scores = graphprune.pipeline.find_pass("taylor")(
        {nn.Module: model, graphprune.Groups: layers, graphprune.Calibration: given(batches)}
    )
    loss = model(**batches[0], labels=batches[0]["input_ids"]).loss
    loss.backward()
    expected = [sum((p * p.grad).abs().sum() for p in layer.parameters()) for layer in model.model.layers]
    torch.testing.assert_close(scores["model.layers:layer"].float(), torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def given(batches: list[dict[str, Tensor]]) -> graphprune.Calibration:
    assert all(batch["input_ids"].shape == IDS for batch in batches)
    return graphprune.Calibration(tuple(batches), "given")


def test_llama_of_two_layers_keeps_one() -> None:
    result = graphprune.compile(llama(), kinds=["layer"], keep=0.5)
    assert result.model.config.num_hidden_layers == 1


class Blocks(nn.Sequential):
    """A model that is its own stack, with a parameter and a table of its own."""

    def __init__(self) -> None:
        super().__init__(*(Block(place) for place in range(4)))
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.shift


@pytest.mark.parametrize("build", [Blocks, lambda: nn.Sequential(*(Block(place) for place in range(4)))])
def test_a_model_that_is_its_own_stack_loses_layers_and_shares_nothing_with_what_is_left(build: Any) -> None:
    dense, x = sharpened(build()), torch.randn(3, 8)
    result = graphprune.compile(dense, x, kinds=["layer"], keep=0.5, method="magnitude")
    (cut,) = result.plan.cuts
    expected = x
    for place in cut.kept:
        expected = dense[place](expected)
    expected = expected * getattr(dense, "scale", 1) + getattr(dense, "shift", 0)
    torch.testing.assert_close(result.model(x), expected)
    mine, theirs = (set(map(id, (*model.parameters(), *model.buffers()))) for model in (dense, result.model))
    assert mine.isdisjoint(theirs)


def test_a_piece_that_need_not_have_gone_comes_back() -> None:
    blocks = [Block(0), Block(1), Block(2)]
    blocks[2].up, blocks[2].down = nn.Linear(8, 200), nn.Linear(200, 8)
    model = nn.Sequential(*blocks)
    plan = graphprune.compile(model, torch.randn(3, 8), kinds=["layer"], keep=0.6, method=ordered, verify=False).plan
    (cut,) = plan.cuts
    assert cut.kept == (0, 1)


def ordered(model: nn.Module, layers: graphprune.Layers) -> graphprune.Scores:
    return graphprune.Scores({group.name: torch.tensor([0.0, 2.0, 1.0]).double() for group in layers}, "ordered")
