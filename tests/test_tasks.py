"""The lm-eval extra: scores of a task of one's own, and what is said where the harness is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from graphprune import cli
from graphprune.errors import UserMistake
from graphprune.source import find_smollm2, open_source

INSTALLED = importlib.util.find_spec("lm_eval") is not None
QUESTIONS = [("The sky is", ["blue", "carrot"]), ("Fire is", ["hot", "cold ice"]), ("One plus one is", ["two", "seven"])]


def described(folder: Path) -> Path:
    rows = (json.dumps({"q": question, "choices": choices, "a": 0}) for question, choices in QUESTIONS)
    (folder / "toy.jsonl").write_text("\n".join(rows))
    (folder / "toy.yaml").write_text(
        f"""task: toy_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "toy.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is an extra: pip install 'graphprune[tasks]'")
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_knows_better_than_chance(tmp_path: Path) -> None:
    tasks: Any = importlib.import_module("graphprune.tasks")
    source = open_source(find_smollm2())
    found = tasks.evaluate_tasks(source.model, source.tokenizer(), ["toy_choices"], include=described(tmp_path))
    assert tasks.headline(found["toy_choices"]) == ("acc", 1.0)
    with pytest.raises(UserMistake, match="no task"):
        tasks.evaluate_tasks(source.model, source.tokenizer(), ["toy_choice"], include=tmp_path)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_harness_the_extra_is_named_before_a_model_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "no-such-model", "--tasks", "hellaswag"])
    assert "graphprune[tasks]" in capsys.readouterr().err
