"""Text, token batches or instructions in, training examples and batches of them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphprune.data import Calibration, tokenize
from graphprune.errors import UserMistake

IGNORED = -100
"""The label of a token that is not to be learnt."""

Data = Calibration | Sequence[str] | Sequence[Mapping[str, Any]]
"""Token batches, documents, or instructions: mappings with ``prompt`` and ``response``, or Alpaca's three fields."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and labels, both (tokens,); a label of −100 is not learnt."""

    ids: Tensor
    labels: Tensor


def read_examples(data: Data, tokenizer: Any, length: int) -> list[Example]:
    """Token sequences of at most ``length``. Raises UserMistake where there is nothing to learn."""
    if isinstance(data, Calibration):
        found = [Example(row[:length], row[:length]) for batch in data.batches for row in batch]
    elif all(isinstance(item, str) for item in data):
        found = _windows([str(item) for item in data], _needed(tokenizer), length)
    elif all(isinstance(item, Mapping) and "input_ids" in item for item in data):
        found = [example for item in data for example in _given(item, length)]  # type: ignore[arg-type]
    else:
        found = [_instruction(item, _needed(tokenizer), length) for item in data]  # type: ignore[arg-type]
    kept = [example for example in found if bool((example.labels[1:] != IGNORED).any())]
    if not kept:
        raise UserMistake("there is nothing to learn from", why=f"no sequence of up to {length} tokens has a token to predict")
    return kept


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise UserMistake("text needs a tokenizer", fix="recover(…, tokenizer=source.tokenizer())")
    return tokenizer


def _given(inputs: Mapping[str, Tensor], length: int) -> Iterator[Example]:
    labels = inputs.get("labels", inputs["input_ids"])
    for ids, wanted in zip(inputs["input_ids"], labels, strict=True):
        yield Example(ids[:length], wanted[:length])


def _windows(texts: Iterable[str], tokenizer: Any, length: int) -> list[Example]:
    """Documents, each ended by the end-of-text token, in one row, cut; what is left over is dropped."""
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts = [part for text in texts for part in (tokenize(tokenizer, text), *end)]
    row = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    if 1 < len(row) < length:
        fix = "give more text, or a shorter length"
        raise UserMistake(f"the text has {len(row)} tokens", why=f"one sequence takes {length}", fix=fix)
    return [Example(ids, ids) for ids in torch.split(row, length) if len(ids) == length]


def _instruction(record: Mapping[str, str], tokenizer: Any, length: int) -> Example:
    """A prompt and its answer; only the answer and the end of text are learnt."""
    prompt, answer = _prompt(record)
    asked, said = tokenize(tokenizer, prompt), tokenize(tokenizer, answer)
    if tokenizer.eos_token_id is not None:
        said = torch.cat([said, torch.tensor([tokenizer.eos_token_id])])
    ids = torch.cat([asked, said])
    return Example(ids[:length], torch.cat([torch.full_like(asked, IGNORED), said])[:length])


def _prompt(record: Mapping[str, str]) -> tuple[str, str]:
    if "prompt" in record and "response" in record:
        return record["prompt"], record["response"]
    if "instruction" not in record or "output" not in record:
        raise UserMistake(f"no instruction: {sorted(record)}", fix="prompt and response, or instruction, input and output")
    given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    return f"### Instruction:\n{record['instruction']}\n\n{given}### Response:\n", record["output"]


def collate(examples: Sequence[Example], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs (rows, tokens), padded on the right, and labels."""
    longest = max(len(example.ids) for example in examples)
    short = [longest - len(example.ids) for example in examples]
    ids = torch.stack([pad(example.ids, (0, gap)) for example, gap in zip(examples, short, strict=True)])
    labels = torch.stack([pad(example.labels, (0, gap), value=IGNORED) for example, gap in zip(examples, short, strict=True)])
    inputs = {"input_ids": ids.to(device)}
    if any(short):
        inputs["attention_mask"] = (torch.arange(longest) < longest - torch.tensor(short)[:, None]).long().to(device)
    return inputs, labels.to(device)


def batches(pools: Sequence[Sequence[Example]], size: int, seed: int) -> Iterator[list[Example]]:
    """As many of each pool in every batch, each shuffled anew when it is through, for as long as anybody asks."""
    draws = [_shuffled(pool, seed + i) for i, pool in enumerate(pools)]
    for begin in count(step=size):
        yield [next(draws[place % len(draws)]) for place in range(begin, begin + size)]


def _shuffled(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from (examples[i] for i in torch.randperm(len(examples), generator=draw).tolist())
