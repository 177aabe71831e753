"""Perplexity against a direct computation; what models cost to run; how results are shown."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from graphprune.bench import Speed, disk_bytes, figures, kv_cache_bytes_per_token, parameters, race, speed, throughput
from graphprune.data import calibrate, read_texts
from graphprune.errors import ModelLimit, UserMistake
from graphprune.evaluate import Protocol, continuation, perplexity, published
from graphprune.picture import picture
from graphprune.removed import Removal
from graphprune.report import Amount, Value, before_after, side_by_side, strips
from graphprune.source import Source, find_smollm2, open_source
from tests.models import llama
from tests.test_data import SHARED, document, lines, source, word_tokenizer

__all__ = ["source"]


class Fixed(nn.Module):
    """Logits that depend on the last token alone: ``table[token]``."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def language_model(given: Source) -> LlamaForCausalLM:
    assert isinstance(given.model, LlamaForCausalLM)
    return given.model


def test_perplexity_is_the_mean_loss_of_windows(source: Source) -> None:
    model, texts = language_model(source), [document(30), document(25, 11)]
    ids = torch.tensor(word_tokenizer()(" ".join(texts))["input_ids"])
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in ids[:48].reshape(4, 12)]
    found = perplexity(model, word_tokenizer(), texts, length=12)
    assert (found.tokens, found.windows) == (4 * 11, 4)
    assert found.value == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_a_stride_counts_each_token_once(source: Source) -> None:
    found = perplexity(language_model(source), word_tokenizer(), [document(30)], length=12, stride=6)
    assert (found.tokens, found.windows) == (11 + 3 * 6, 4)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    model = Fixed(torch.zeros(63, 63))
    assert perplexity(model, word_tokenizer(), [document(40)], length=8).value == pytest.approx(63, rel=1e-5)
    assert perplexity(model, word_tokenizer(), [document(40)], length=8, bos=True).tokens == 5 * 7
    assert perplexity(model, word_tokenizer(), [document(40)], length=8, limit=2).windows == 2


def test_a_ruined_model_has_infinite_perplexity() -> None:
    table = torch.zeros(63, 63)
    table[:, 0] = 1e4
    assert perplexity(Fixed(table), word_tokenizer(), [document(40)], length=8).value == math.inf


def test_published_protocols(source: Source) -> None:
    assert published("llm-pruner") == Protocol(length=128, join="\n\n", special=True)
    assert published("wanda", source.model).length == 64
    with pytest.raises(UserMistake, match="did you mean wanda"):
        published("wnada")


@pytest.mark.parametrize("wrong", [{"length": 50}, {"length": 1}, {"stride": 13}, {"limit": 0}])
def test_windows_that_do_not_fit_are_mistakes(source: Source, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserMistake):
        perplexity(source.model, word_tokenizer(), [document(40)], **{"length": 12, **wrong})


def test_perplexity_refuses_the_calibration_text(source: Source, tmp_path: Path) -> None:
    texts = [document(40, start) for start in range(3)]
    calibration = calibrate(str(lines(tmp_path / "t.jsonl", texts)), source, samples=3, length=12)
    with pytest.raises(UserMistake, match="calibrated on"):
        perplexity(source.model, word_tokenizer(), texts, length=12, calibration=calibration)


def test_what_gives_no_logits_is_no_language_model() -> None:
    with pytest.raises(ModelLimit, match="not a language model"):
        perplexity(_Flat(), word_tokenizer(), [document(40)], length=8)


class _Flat(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()


def test_a_continuation_is_greedy_and_ends_at_the_end() -> None:
    follow = torch.roll(torch.eye(63), 1, dims=1)  # each token calls for the next
    follow[10] = torch.eye(63)[2]
    tokenizer = word_tokenizer()
    assert continuation(Fixed(follow), tokenizer, "w0", tokens=3) == "w1 w2 w3"
    assert continuation(Fixed(follow), tokenizer, "w4", tokens=9) == "w5 w6 w7"


@pytest.mark.long
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared C4 sample is not here")
def test_smollm2_scores_as_it_should() -> None:
    try:
        opened = open_source(find_smollm2())
    except UserMistake as absent:
        pytest.skip(str(absent))
    texts = read_texts(str(SHARED / "c4_development.jsonl"))
    assert perplexity(opened.model, opened.tokenizer(), texts, limit=4).value == pytest.approx(42.17, abs=0.1)


def test_costs_of_a_model(source: Source, tmp_path: Path) -> None:
    model = language_model(source)
    assert kv_cache_bytes_per_token(model) == 2 * 2 * 2 * 4 * 4  # layers, keys and values, groups, width, float32
    assert kv_cache_bytes_per_token(nn.Linear(2, 2)) == 0
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert parameters(tied) == 9
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12345")
    assert disk_bytes(tmp_path) == disk_bytes(tmp_path / "deep" / "a") == 5


def test_a_race_takes_turns_and_drops_the_first_round() -> None:
    order: list[str] = []

    def turn(name: str) -> tuple[float]:
        order.append(name)
        return (float(len(order)),)

    assert race({"a": partial(turn, "a"), "b": partial(turn, "b")}, 2) == {"a": [(3.0,), (5.0,)], "b": [(4.0,), (6.0,)]}
    assert order == ["a", "b"] * 3


def test_speed_is_summed_up_by_median_spread_and_paired_ratio() -> None:
    found = Speed(rates=(10.0, 30.0, 20.0, 40.0, 50.0), ratios=(1.0, 3.0, 2.0, 2.0, 9.0))
    assert (found.median, found.spread, found.ratio) == (30.0, 10.0, 2.0)


def test_speeds_of_models(source: Source) -> None:
    found = speed({"a": source.model, "b": source.model}, prompt=5, new_tokens=3, repeats=2)
    assert set(found["a"].decode.ratios) == {1.0}
    assert all(rate > 0 for name in "ab" for rate in (*found[name].prefill.rates, *found[name].decode.rates))
    assert len(throughput({"a": nn.Linear(2, 3)}, {"input": torch.ones(4, 2)}, repeats=3)["a"].rates) == 3
    with pytest.raises(ModelLimit, match="token ids"):
        speed({"a": nn.Linear(2, 3)})


def test_figures_beside_the_ideal() -> None:
    whole, half = llama(), narrow()
    found = figures({"dense": whole, "half": half}, prompt=7, new_tokens=2, repeats=2)
    dense, small = found["dense"], found["half"]
    assert dense.ideal == dense.reached == (1.0, 1.0)
    ffn = 3 * 48 * (88 - 44) * len(half.model.layers)
    assert small.parameters == dense.parameters - ffn
    assert small.weights == dense.weights - 4 * ffn
    assert small.peak - small.weights > 7 * 101 * 4, "the logits at least"
    assert 1 < small.ideal[1] == pytest.approx(_read(whole) / _read(half))
    assert small.ideal[0] > 1
    text = "\n".join(shown(side_by_side(found)))
    assert all(piece in text for piece in ("KV cache a token", "prefill, ideal", "decode, times the first", "reached"))


def narrow() -> Any:
    config = llama().config
    config.intermediate_size = 44
    return LlamaForCausalLM(config)


def _read(model: Any) -> int:
    return 4 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n) + 7 * kv_cache_bytes_per_token(model)


def test_figures_of_a_net_that_writes_nothing() -> None:
    nets = {"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 16)}
    found = figures(nets, {"input": torch.ones(4, 64)}, repeats=2)
    assert found["narrow"].ideal[0] == pytest.approx(4.0)
    assert found["narrow"].peak == 4 * (64 * 16 + 16) + 4 * 16 * 4
    assert found["narrow"].decode is None
    assert "decode" not in "\n".join(shown(side_by_side(found)))


REMOVALS = [
    Removal("model.layers.0", "FFN channel", 12, 16),
    Removal("model.layers.1", "FFN channel", 0, 16),
    Removal("model.layers.2", "FFN channel", 16, 16),
    Removal("model.layers.0", "KV group", 1, 2),
    Removal("model.layers.0", "KV group", 0, 2),
    Removal("model.layers.2", "KV group", 2, 2),
]


def shown(renderable: object, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_strip_has_a_cell_a_layer() -> None:
    found = shown(strips(REMOVALS))
    assert found[0].split() == ["FFN", "channel", "▂█·", "−42%", "28", "of", "48"]
    assert found[1].startswith("KV group     ▆ ·")
    assert found[2].split() == ["0", "2"]


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    for count in (1, 60):
        many = [Removal(f"layers.{i}.conv", "channel", i, 60) for i in range(count)]
        assert picture([*REMOVALS, *many], tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserMistake, match="nothing to draw"):
        picture([], tmp_path / "p.png")


def test_a_table_says_what_changed() -> None:
    rows: dict[str, tuple[Value, Value]] = {
        "parameters": (134_515_008, 107_612_006),
        "cache": (Amount(46_080, "B"), Amount(46_080, "B")),
        "decode": (Amount(20.31, "tok/s", 0.42), Amount(24.0, "tok/s", 0.3)),
        "class": ("Llama", "Llama"),
    }
    text = "\n".join(shown(before_after(rows)))
    for piece in ("134.5 M", "107.6 M   −20.0%", "46.08 kB", "same", "20.3 ± 0.4 tok/s", "+18.2%"):
        assert piece in text
