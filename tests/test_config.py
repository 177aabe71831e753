"""Config probing: the config found for target shapes builds them, survives a file, and computes what was meant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from graphprune.errors import ModelLimit, UserMistake
from graphprune.rewrite import blueprint
from graphprune.rewrite.blueprint import as_text, build_meta
from graphprune.rewrite.config import _hitting, candidates, fit
from graphprune.rewrite.probe import _guess, _survey, probe
from graphprune.rewrite.shallow import shrink_depth

# Sizes collide on purpose: 4 layers, 4 heads, 4 experts; a vocabulary as wide as the FFN.
DECODER = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=64,
)
GQA = DECODER | dict(num_key_value_heads=2)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
BLOOM = dict(vocab_size=128, hidden_size=64, n_layer=4, n_head=4)
T5 = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4, num_decoder_layers=4)
VIT = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8)
CLIP = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
LLAVA = dict(vision_config=CLIP | dict(model_type="clip_vision_model"), image_token_index=127)

FFN, HEADS, WIDTH = {128: [96]}, {4: [2], 2: [1]}, {64: [48]}
LLAMA_LIKE = [
    (dict(intermediate_size=96), FFN),
    (dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16), HEADS),
    (dict(hidden_size=48, head_dim=16), WIDTH),
    (dict(head_dim=12), {16: [12]}),
    (
        dict(hidden_size=48, head_dim=12, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96),
        FFN | HEADS | WIDTH | {16: [12]},
    ),
]


def cases() -> list[Any]:
    """(config class, model class, base settings, changed settings, hints)."""
    rows: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[int, list[int]]]] = []
    explicit = GQA | dict(head_dim=16)
    for name, base, some in (
        ("Llama", GQA, LLAMA_LIKE),  # the config works the head width out
        ("Qwen2", GQA, LLAMA_LIKE),  # the model does, and the config has no field for it
        ("Mistral", GQA, LLAMA_LIKE[1::3]),
        ("Phi3", GQA, LLAMA_LIKE[1::3]),  # fused projections
        ("Qwen3", explicit, LLAMA_LIKE[1::3]),
        ("Gemma2", explicit | dict(query_pre_attn_scalar=16), LLAMA_LIKE[3:]),  # the scale keeps its number
    ):
        rows += [(f"{name}Config", f"{name}ForCausalLM", base, changes, hints) for changes, hints in some]
    mixtral, experts = (
        GQA | dict(num_local_experts=4, num_experts_per_tok=2),
        GQA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    )
    opt = {key: value for key, value in DECODER.items() if key != "intermediate_size"} | dict(ffn_dim=128)
    rows += [
        ("MixtralConfig", "MixtralForCausalLM", mixtral, dict(num_local_experts=3), {4: [3]}),
        (
            "MixtralConfig",
            "MixtralForCausalLM",
            mixtral,
            dict(intermediate_size=96, num_local_experts=2),
            FFN | {4: [2]},
        ),
        (
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            experts,
            dict(num_experts=3, moe_intermediate_size=24),
            {4: [3], 32: [24]},
        ),
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", experts, dict(shared_expert_intermediate_size=48), WIDTH),
        ("OPTConfig", "OPTForCausalLM", opt | dict(word_embed_proj_dim=64), dict(ffn_dim=96), FFN),
        (
            "OPTConfig",
            "OPTForCausalLM",
            opt,
            dict(hidden_size=48, word_embed_proj_dim=48, num_attention_heads=3),
            WIDTH | {4: [3]},
        ),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, dict(intermediate_size=96), FFN),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, dict(hidden_size=48), WIDTH | {16: [12]}),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, dict(hidden_size=48, num_attention_heads=3), WIDTH | {4: [3]}),
        ("GPT2Config", "GPT2LMHeadModel", GPT2, dict(n_inner=192), {256: [192]}),
        ("GPT2Config", "GPT2LMHeadModel", GPT2, dict(n_embd=48, n_inner=256), WIDTH),
        ("GPT2Config", "GPT2LMHeadModel", GPT2, dict(n_embd=48, n_head=3, n_inner=192), WIDTH | {4: [3], 256: [192]}),
        ("BloomConfig", "BloomForCausalLM", BLOOM, dict(hidden_size=48, n_head=3), WIDTH | {4: [3]}),
        ("T5Config", "T5ForConditionalGeneration", T5, dict(d_ff=96), FFN),
        ("T5Config", "T5ForConditionalGeneration", T5, dict(num_heads=3), {4: [3]}),
        (
            "T5Config",
            "T5ForConditionalGeneration",
            T5,
            dict(num_heads=3, d_kv=12, d_model=48, d_ff=96),
            FFN | WIDTH | {4: [3], 16: [12]},
        ),
        ("BertConfig", "BertForMaskedLM", DECODER, dict(intermediate_size=96), FFN),
        ("BertConfig", "BertForMaskedLM", DECODER, dict(hidden_size=48, num_attention_heads=3), WIDTH | {4: [3]}),
        ("ViTConfig", "ViTModel", VIT, dict(intermediate_size=96), FFN),
        ("ViTConfig", "ViTModel", VIT, dict(hidden_size=48), WIDTH),
    ]
    return [pytest.param(*row, id=f"{row[0][:-6]}-{'-'.join(row[3])}") for row in rows]


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def in_double(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    model = cls(config).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def sharp(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose attention is far from uniform, so that misaligned heads are seen."""
    torch.manual_seed(0)
    model = in_double(cls, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs(model: PreTrainedModel) -> torch.Tensor:
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).double().view(1, 3, 32, 32))[0]
    ids = torch.arange(10, 21).view(1, 11)
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))[0]


def computes_like(expected: PreTrainedModel) -> Callable[[PreTrainedConfig], bool]:
    """What the pruner does with a candidate: load the weights, run, compare."""

    @torch.no_grad()
    def accept(config: PreTrainedConfig) -> bool:
        model = in_double(type(expected), config)
        model.load_state_dict(expected.state_dict())
        return torch.allclose(outputs(model), outputs(expected), rtol=1e-9, atol=1e-9)

    return accept


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("config", "model", "base", "changes", "hints"), cases())
def test_fit(config: str, model: str, base: dict, changes: dict, hints: dict, tmp_path: Path) -> None:
    config_cls, cls = getattr(hf, config), getattr(hf, model)
    original = build_meta(cls, config_cls(**base))
    expected = sharp(cls, config_cls(**base | changes))
    found = fit(original, shapes(expected), hints, computes_like(expected))
    found.save_pretrained(tmp_path)
    assert shapes(build_meta(cls, AutoConfig.from_pretrained(tmp_path))) == shapes(expected)


def llava(**text: Any) -> hf.LlavaConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GQA | text), vision_config=hf.CLIPVisionConfig(**CLIP), image_token_index=127
    )


def test_fit_nested() -> None:
    original = build_meta(hf.LlavaForConditionalGeneration, llava())
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    expected = sharp(hf.LlavaForConditionalGeneration, llava(intermediate_size=96, **heads))
    found = fit(original, shapes(expected), FFN | HEADS, computes_like(expected))
    assert found.text_config.to_dict() == expected.config.text_config.to_dict()
    assert found.vision_config.to_dict() == original.config.vision_config.to_dict()


def test_fit_lists_and_fractions() -> None:
    resnet = dict(hidden_sizes=[16, 32, 32, 64], depths=[2, 2, 2, 2], embedding_size=16)
    original = build_meta(hf.ResNetModel, hf.ResNetConfig(**resnet))
    expected = build_meta(hf.ResNetModel, hf.ResNetConfig(**resnet | dict(hidden_sizes=[16, 24, 32, 48])))
    assert fit(original, shapes(expected), {32: [24], 64: [48]}).hidden_sizes == [16, 24, 32, 48]
    swin = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2)
    expected = build_meta(hf.SwinModel, hf.SwinConfig(**swin, mlp_ratio=3.0))
    assert fit(build_meta(hf.SwinModel, hf.SwinConfig(**swin)), shapes(expected), {}).mlp_ratio == 3.0


def test_candidates_come_cheapest_first() -> None:
    original = build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA))
    changed = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    target = shapes(build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA | changed)))

    def heads(hints: dict[int, list[int]]) -> list[tuple[int, int, int]]:
        found = candidates(original, target, hints)
        return [(c.num_attention_heads, c.num_key_value_heads, c.head_dim) for c in found]

    assert heads({4: [2], 2: [1]})[0] == (2, 1, 16)
    assert heads({16: [8]})[0] == (4, 2, 8)
    assert set(heads({})) == {(2, 1, 16), (4, 2, 8)}


def test_what_is_left_out_is_free_and_runtime_choices_stay() -> None:
    original = build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA, attn_implementation="eager", dtype="bfloat16"))
    found = fit(original, {"model.layers.0.mlp.up_proj.weight": (96, 64)}, {})
    assert (found.intermediate_size, found._attn_implementation, found.dtype) == (96, "eager", torch.bfloat16)
    assert fit(original, shapes(original), {}).to_dict() == original.config.to_dict()


def pruned(model: PreTrainedModel, sizes: dict[tuple[str, int], int]) -> dict[str, tuple[int, ...]]:
    """The model's shapes, with each (part of a name, dimension) resized."""
    found = shapes(model)
    for (part, dim), size in sizes.items():
        for name in [name for name in found if part in name and len(found[name]) > dim]:
            found[name] = (*found[name][:dim], size, *found[name][dim + 1 :])
    return found


BERT_HEADS = {(f"self.{name}.{kind}", 0): 48 for name in ("query", "key", "value") for kind in ("weight", "bias")}
GPT2_HEADS = {("attn.c_attn.weight", 1): 144, ("attn.c_attn.bias", 0): 144, ("attn.c_proj.weight", 0): 48}


@pytest.mark.parametrize(
    ("config", "model", "base", "sizes", "hints", "message"),
    [
        pytest.param(
            "BertConfig",
            "BertModel",
            DECODER,
            BERT_HEADS | {("attention.output.dense.weight", 1): 48},
            {4: [3]},
            """no BertConfig has these sizes: this size has no field of its own
  at   encoder.layer.0.attention.self.query.weight[0] (64 → 48)
  why  hidden_size can only move it along with embeddings.word_embeddings.weight[1] (stays 64): 48 or 64?
  fix  keep this size whole, or save with per-layer sizes""",
            id="BERT heads",
        ),
        pytest.param(
            "GPT2Config",
            "GPT2LMHeadModel",
            GPT2,
            GPT2_HEADS,
            {4: [3]},
            """no GPT2Config has these sizes: this size has no field of its own
  at   transformer.h.0.attn.c_attn.weight[1] (192 → 144)
  why  n_embd can only move it along with transformer.wte.weight[1] (stays 64): 48 or 64?
  fix  keep this size whole, or save with per-layer sizes""",
            id="GPT-2 heads",
        ),
        pytest.param(
            "LlamaConfig",
            "LlamaForCausalLM",
            GQA,
            {("gate_proj", 0): 100, ("up_proj", 0): 100, ("down_proj", 1): 100, ("layers.1.mlp.up_proj", 0): 96},
            {128: [96, 100]},
            """no LlamaConfig has these sizes: the layers differ
  at   model.layers.0.mlp.gate_proj.weight[0] (128 → 100)
  why  intermediate_size can only move it along with model.layers.1.mlp.up_proj.weight[0] (128 → 96): 100 or 96?
  fix  let the layers shrink alike, or save with per-layer sizes""",
            id="layers differ",
        ),
        pytest.param(
            "LlamaConfig",
            "LlamaForCausalLM",
            GQA,
            {("q_proj", 0): 48, ("o_proj", 1): 48},
            {4: [3]},
            """no LlamaConfig has these sizes
  at   model.layers.0.self_attn.q_proj.weight[0] (64 → 48)
  why  the config refuses: ValueError: The hidden size (64) is not a multiple of the number of attention heads (3).
  fix  choose numbers that the config accepts, or save with per-layer sizes""",
            id="refused",
        ),
        pytest.param(
            "ConvNextConfig",
            "ConvNextModel",
            dict(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4),
            {("dwconv.weight", 2): 5},
            {},
            """no ConvNextConfig has these sizes
  at   encoder.stages.0.layers.0.dwconv.weight[2] (7 → 5)
  why  no field of the config moves it
  fix  keep this size whole, or save with per-layer sizes""",
            id="no field",
        ),
        pytest.param(
            "ViTConfig",
            "ViTModel",
            VIT,
            {("patch_embeddings.projection.weight", 2): 4},
            {},
            """no ViTConfig has these sizes: this size has no field of its own
  at   embeddings.patch_embeddings.projection.weight[2] (8 → 4)
  why  patch_size can only move it along with embeddings.patch_embeddings.projection.weight[3] (stays 8): 4 or 8?
  fix  keep this size whole, or save with per-layer sizes""",
            id="two dimensions of one field",
        ),
    ],
)
def test_no_config(config: str, model: str, base: dict, sizes: dict, hints: dict, message: str) -> None:
    original = build_meta(getattr(hf, model), getattr(hf, config)(**base))
    with pytest.raises(ModelLimit) as raised:
        fit(original, pruned(original, sizes), hints)
    assert str(raised.value) == message


def test_nothing_accepted() -> None:
    original = build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA))
    with pytest.raises(ModelLimit, match="none computes the same"):
        fit(original, shapes(original), {}, accept=lambda config: False)


def test_user_mistakes() -> None:
    original = build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA))
    with pytest.raises(UserMistake, match=r"did you mean lm_head.weight"):
        fit(original, {"lm_head.weigth": (128, 64)}, {})
    with pytest.raises(UserMistake, match="dimensions"):
        fit(original, {"lm_head.weight": (128,)}, {})
    with pytest.raises(UserMistake, match=r"did you mean model\.layers"):
        shrink_depth(original, {"layers": [0]})
    with pytest.raises(UserMistake, match="layers 0 to 3"):
        shrink_depth(original, {"model.layers": [0, 4]})


def test_a_model_that_its_config_does_not_describe() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA))
    model.lm_head = torch.nn.Linear(64, 100, bias=False)
    with pytest.raises(ModelLimit, match="does not describe the model"):
        probe(model)


@pytest.mark.parametrize(
    ("config", "model", "base", "keep", "check"),
    [
        (
            "LlamaConfig",
            "LlamaForCausalLM",
            GQA,
            {"model.layers": [0, 3]},
            dict(num_hidden_layers=2, num_attention_heads=4),
        ),
        (
            "Gemma2Config",
            "Gemma2ForCausalLM",
            GQA,
            {"model.layers": [0, 2, 3]},
            dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
        ),
        (
            "T5Config",
            "T5ForConditionalGeneration",
            T5,
            {"encoder.block": [0, 2], "decoder.block": [0, 1, 3]},
            dict(num_layers=2, num_decoder_layers=3),
        ),
        (
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            GQA | dict(mlp_only_layers=[2]),
            {"model.layers": [1, 2]},
            dict(mlp_only_layers=[1]),
        ),
        (
            "SwinConfig",
            "SwinModel",
            dict(depths=[2, 2], num_heads=[2, 2], embed_dim=16),
            {"encoder.layers.1.blocks": [1]},
            dict(depths=[2, 1]),
        ),
    ],
)
def test_shrink_depth(config: str, model: str, base: dict, keep: dict, check: dict, tmp_path: Path) -> None:
    original = build_meta(getattr(hf, model), getattr(hf, config)(**base))
    found = shrink_depth(original, keep)
    found.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in check} == check
    smaller = shapes(build_meta(type(original), loaded))
    for stack, layers in keep.items():
        for new, old in enumerate(layers):
            assert layer(smaller, f"{stack}.{new}.") == layer(shapes(original), f"{stack}.{old}.")
        assert not layer(smaller, f"{stack}.{len(layers)}.")


def layer(found: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}


def test_a_layer_that_no_config_drops() -> None:
    """Only T5's first block holds the position table: no T5 starts with its second."""
    original = build_meta(hf.T5ForConditionalGeneration, hf.T5Config(**T5))
    with pytest.raises(ModelLimit, match="no T5Config drops these layers"):
        shrink_depth(original, {"encoder.block": [1, 2]})


def test_shrunk_then_fit() -> None:
    original = build_meta(hf.Qwen2ForCausalLM, hf.Qwen2Config(**GQA))
    shallow = build_meta(hf.Qwen2ForCausalLM, shrink_depth(original, {"model.layers": [0, 2]}))
    found = fit(shallow, pruned(shallow, {("gate", 0): 96, ("up_proj", 0): 96, ("down", 1): 96}), FFN)
    assert (found.num_hidden_layers, found.intermediate_size) == (2, 96)


def test_probe_of_a_deep_model_is_quick_and_quiet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the whole depth as it is, and three times more at most; at two layers for every number."""
    smollm = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    model = build_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**smollm, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    level, depths, plain = hf.logging.get_verbosity(), list[int](), blueprint._built
    monkeypatch.setattr(blueprint, "_built", lambda cls, config: depths.append(config.num_hidden_layers) or plain(cls, config))
    found = probe(model)
    assert 1 <= sum(depth > 2 for depth in depths) <= 4 and depths.count(2) > 10
    made = len(depths)
    assert [str(field) for field in found.movers("model.layers.29.mlp.up_proj.weight", 0)] == ["intermediate_size"]
    assert probe(model) is found and len(depths) == made
    full = _survey(type(model), type(model.config), found.blueprint.text)
    assert {field.path: field.moves for field in found.fields} == {field.path: field.moves for field in full.fields}
    assert (hf.logging.get_verbosity(), capfd.readouterr()) == (level, ("", ""))


def test_layers_that_differ_are_not_guessed_from_two() -> None:
    settings = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    mixed = hf.Qwen2MoeConfig(
        **settings,
        num_hidden_layers=5,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=4,
        mlp_only_layers=[3],
    )
    assert _guess(hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig, as_text(mixed)) is None
    alike = hf.LlamaConfig(**settings, num_hidden_layers=5)
    assert _guess(hf.LlamaForCausalLM, hf.LlamaConfig, as_text(alike)) is not None


STEPS = [((field,), value) for field in "abcd" for value in (1, 2)]


@given(st.lists(st.lists(st.sampled_from(STEPS), unique=True), max_size=4), st.integers(0, 4))
def test_choices_that_meet_every_need_are_found_once_each(needs: list[Any], count: int) -> None:
    wanted = [
        set(chosen)
        for chosen in combinations(STEPS, count)
        if len(dict(chosen)) == count and all(set(chosen) & set(need) for need in needs)
    ]
    found = [set(chosen) for chosen in _hitting(STEPS, needs, count)]
    assert len(found) == len(wanted)
    assert all(chosen in wanted for chosen in found)


def test_a_need_that_nothing_meets_ends_the_search_at_once() -> None:
    steps = [((number,), 1) for number in range(64)]
    assert not any(True for count in range(65) for _ in _hitting(steps, [steps[:2], []], count))
