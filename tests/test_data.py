"""Calibration: what each spec gives, that a seed decides it, and what a bad spec says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
)

from graphprune.data import Calibration, calibrate, read_texts, refuse_overlap
from graphprune.errors import ModelLimit, UserMistake
from graphprune.source import Source
from graphprune.written import decode, inference

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
SHARED = Path(__file__).parents[2] / "shared" / "data"


def word_tokenizer() -> Any:
    core = Tokenizer(models.WordLevel(VOCABULARY, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Texts(Source):
    """A Source whose tokenizer is the words above."""

    def tokenizer(self) -> Any:
        return word_tokenizer()


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    return Texts(LlamaForCausalLM(config).train(False), config)


def document(length: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({field: text}) for text in texts))
    return path


@pytest.mark.parametrize("spec", ["self", "random", "text"])
def test_a_spec_gives_batches_that_its_seed_decides(spec: str, source: Source, tmp_path: Path) -> None:
    if spec == "text":
        spec = str(lines(tmp_path / "t.jsonl", [document(40, start) for start in range(9)]))
    first, again, other = (calibrate(spec, source, samples=7, length=12, batch=3, seed=seed) for seed in (0, 0, 1))
    assert [tuple(batch.shape) for batch in first.batches] == [(3, 12), (3, 12), (1, 12)]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.source, first.seed) == (spec, 0)
    with torch.no_grad():
        source.model(**first.inputs[0])


def test_sampling_begins_at_the_beginning_and_follows_the_model(source: Source) -> None:
    every = torch.cat(calibrate("self", source, samples=800, length=2, batch=400).batches)
    rows, strangers = every[::2], every[1::2, 0]
    assert set(rows[:, 0].tolist()) == {1}
    assert len(set(strangers.tolist())) > len(VOCABULARY) / 2
    with torch.no_grad():
        expected = source.model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    found = torch.bincount(rows[:, 1], minlength=len(VOCABULARY)) / 400
    assert (found - expected).abs().max() < 0.08


def test_a_mixture_takes_its_batches_in_turn(source: Source, tmp_path: Path) -> None:
    text = str(lines(tmp_path / "t.jsonl", [document(40, start) for start in range(9)]))
    sizes = {"samples": 4, "length": 12, "batch": 2, "seed": 5}
    (one,), (other,) = (calibrate(spec, source, **sizes | {"samples": 2}).batches for spec in (text, "self"))
    mixed = calibrate(f"{text}+self", source, **sizes)
    assert torch.equal(torch.cat(mixed.batches), torch.cat([one, other]))
    assert mixed.lines == calibrate(text, source, **sizes | {"samples": 2}).lines


def test_the_cache_changes_nothing(source: Source) -> None:
    prompt = torch.tensor([[1, 5, 9], [1, 6, 7]])
    written = decode(source.model, prompt, lambda logits: logits.argmax(-1), 6)
    with torch.no_grad():
        expected = source.model(written[:, :-1]).logits.argmax(-1)
    assert torch.equal(written[:, 3:], expected[:, 2:])


def test_crops_are_runs_of_a_document(source: Source, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [document(5), document(30), document(50, 7)])
    rows = torch.cat(calibrate(str(file), source, samples=6, length=20).batches) - 3
    assert torch.equal((rows[:, 1:] - rows[:, :-1]) % len(WORDS), torch.ones(6, 19, dtype=torch.long))


def test_short_documents_are_joined(source: Source, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [document(5, start) for start in range(9)])
    assert calibrate(str(file), source, samples=2, length=20).batches[0].shape == (2, 20)
    with pytest.raises(UserMistake, match="45 tokens"):
        calibrate(str(file), source, length=46)


def test_texts_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a\n\nb")
    other = lines(tmp_path / "many.jsonl", ["a", "b"], field="body")
    assert read_texts(str(tmp_path / "one.txt")) == ["a\n\nb"]
    assert read_texts(f"{other}:body") == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "spec", "says"),
    [
        ('{"txt": "a"}', "t.jsonl", "did you mean txt"),
        ('{"text": "a"}\n{"te', "t.jsonl", "t.jsonl:2"),
        ('{"text": "a"}', "other.jsonl", "no such text file"),
        ("[1]", "t.jsonl", "no text under"),
    ],
)
def test_a_bad_text_is_a_mistake(tmp_path: Path, content: str, spec: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserMistake, match=says):
        read_texts(str(tmp_path / spec))


@pytest.mark.parametrize(("columns", "found"), [({"text": ["a", "b"]}, ["a", "b"]), ({"sentence": ["c"]}, ["c"])])
def test_a_dataset_gives_its_text(monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[str]], found: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [read_texts(spec) for spec in ("d", "d:test", "d:c", "d:c:test[:9]")] == [found] * 4
    assert asked == [("d", "train"), ("d", "test"), ("d", "c", "train"), ("d", "c", "test[:9]")]


def test_a_dataset_without_one_text_column_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: both)
    with pytest.raises(UserMistake, match="question, answer"):
        read_texts("d")


def test_evaluation_text_cannot_be_calibrated_on(source: Source, tmp_path: Path) -> None:
    seen, unseen = [document(40, start) for start in range(3)], [document(40, start) for start in range(20, 40)]
    calibration = calibrate(str(lines(tmp_path / "t.jsonl", seen)), source, samples=3, length=12)
    refuse_overlap(calibration, unseen)
    with pytest.raises(UserMistake, match="another split"):
        refuse_overlap(calibration, [*unseen, seen[0].replace(" ", "  ")])


def test_inputs_may_be_given_and_need_not_be_text(source: Source) -> None:
    given = calibrate([{"pixel_values": torch.ones(1, 3, 8, 8)}], source)
    assert given.source == "given inputs"
    assert given.fingerprint != Calibration(({"pixel_values": torch.zeros(1, 3, 8, 8)},), "given inputs").fingerprint
    with pytest.raises(UserMistake, match="no token ids"):
        _ = given.batches


def test_random_serves_models_that_read_no_text() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    found = calibrate("random", Source(ResNetModel(config).train(False), config), samples=3, batch=2)
    assert [inputs["pixel_values"].shape[0] for inputs in found.inputs] == [2, 1]


def test_a_decoder_is_fed_one_token_late() -> None:
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=1)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).train(False)
    (inputs,) = calibrate("random", Source(model, config), samples=2, length=7).inputs
    assert torch.equal(inputs["decoder_input_ids"][:, 1:], inputs["input_ids"][:, :-1])
    with pytest.raises(UserMistake, match="it needs an input"):
        calibrate("self", Source(model, config))


def test_sizes_out_of_range_are_mistakes(source: Source) -> None:
    with pytest.raises(UserMistake, match="at most 64"):
        calibrate("random", source, length=65)
    with pytest.raises(UserMistake, match="samples is 0"):
        calibrate("random", source, samples=0)


def test_a_model_that_writes_nan_is_stopped(source: Source) -> None:
    config = source.config
    assert isinstance(config, LlamaConfig)
    broken = LlamaForCausalLM(config)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ModelLimit, match="not finite"):
        calibrate("self", Source(broken, config), samples=1, length=3)


def test_inference_gives_each_module_its_mode_back() -> None:
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with inference(net):
        assert not net[0].training
        assert not torch.is_grad_enabled()
    assert [module.training for module in net] == [True, False]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared C4 sample is not here")
def test_the_development_text_is_not_in_the_calibration_text(source: Source) -> None:
    calibration = calibrate(str(SHARED / "c4_calibration.jsonl"), source, samples=200, length=32)
    refuse_overlap(calibration, read_texts(str(SHARED / "c4_development.jsonl")), tolerance=0.0)
