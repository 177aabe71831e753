"""What a model is fed: a calibration spec and a Source in, a Calibration (batches of inputs) out.

A spec is ``self`` (sampled from the model), ``random``, a text file, JSON lines, or a ``datasets`` name; ``a.jsonl+self`` is half
of each, batches in turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.errors import UserMistake, first_line, nearest
from graphprune.gradients import Loss, language_loss
from graphprune.written import ordinary_ids, special_ids, start_token, written

JSON_LINES = (".jsonl", ".ndjson", ".json")
SPLITS = ("train", "validation", "test")

SHORTEST_LINE = 64
"""Lines under this many characters say nothing about where a text comes from."""


class Feed(Protocol):
    """What calibration needs of a Source."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> Any: ...
    def tokenizer(self) -> Any: ...
    def example_inputs(self, *, rows: int | None = None, seed: int = 0) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """Keyword inputs of the model, a mapping a batch; where they come from; hashes of the lines of text used; which batches, by
    number, the model wrote itself; and the ``loss(model, inputs)`` that gradients are of."""

    inputs: tuple[Mapping[str, Tensor], ...]
    source: str
    seed: int = 0
    lines: frozenset[str] = frozenset()
    written: frozenset[int] = frozenset()
    loss: Loss = language_loss

    @property
    def given(self) -> tuple[Mapping[str, Tensor], ...]:
        """The inputs that the model did not write itself."""
        return tuple(row for i, row in enumerate(self.inputs) if i not in self.written)

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The token ids, a LongTensor (rows, length) a batch. Raises UserMistake where the inputs are not text."""
        if not all("input_ids" in inputs for inputs in self.inputs):
            raise UserMistake(f"the calibration inputs ({self.source}) hold no token ids", fix="use .inputs")
        return tuple(inputs["input_ids"] for inputs in self.inputs)

    @property
    def fingerprint(self) -> str:
        """A hash of every value in the batches: the same calibration, the same fingerprint."""
        content = hashlib.sha256()
        for inputs in self.inputs:
            for name, value in sorted(inputs.items()):
                content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16]


def calibrate(
    spec: str | Sequence[Mapping[str, Tensor]],
    source: Feed,
    *,
    samples: int = 32,
    length: int = 128,
    batch: int = 4,
    seed: int = 0,
) -> Calibration:
    """``samples`` sequences of ``length`` tokens, ``batch`` rows a batch, on the CPU; the same for the same seed."""
    if not isinstance(spec, str):
        return Calibration(batches_of(spec), "given inputs", seed)
    _check_sizes(source, samples=samples, length=length, batch=batch)
    if len(parts := _parts(spec)) > 1:
        sizes = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
        drawn = [calibrate(p, source, samples=n, length=length, batch=batch, seed=seed) for p, n in zip(parts, sizes, strict=True)]
        return mixed(*drawn)
    if spec == "random" and not hasattr(source.config, "vocab_size"):
        return _random_inputs(source, samples, batch, seed)
    rows, texts = _rows(spec, source, samples, length, seed)
    inputs = tuple(_as_inputs(source, ids) for ids in torch.split(rows, batch))
    own = frozenset(range(len(inputs))) if spec == "self" else frozenset()
    return Calibration(inputs, spec, seed, frozenset(_line_hashes(texts)), own)


def batches_of(given: Iterable[Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], ...]:
    """Batches as they are to be given: keyword inputs each. Raises UserMistake on anything else."""
    found = []
    for inputs in given:
        if not isinstance(inputs, Mapping):
            what = f"a calibration batch is a {type(inputs).__name__}"
            raise UserMistake(what, fix='give each as keyword inputs of the model: [{"x": tensor}, …]')
        found.append(dict(inputs))
    return tuple(found)


def read_texts(spec: str) -> list[str]:
    """The documents of a text file (one), of ``file.jsonl[:field]``, or of the dataset ``name[:config][:split]``."""
    path, colon, field = spec.rpartition(":")
    for file, column in ((Path(spec), "text"), (Path(path), field)):
        if file.is_file() and (colon or column == "text"):
            return _json_lines(file, column) if file.suffix in JSON_LINES else [_read(file)]
    if Path(spec).suffix in (*JSON_LINES, ".txt") or Path(spec).is_dir():
        raise UserMistake(f"no such text file: {spec}", fix="give a text file, JSON lines or a datasets name")
    return _dataset(spec)


def refuse_overlap(calibration: Calibration, texts: Iterable[str], tolerance: float = 0.01) -> None:
    """Raise UserMistake when more than ``tolerance`` of the lines to evaluate on were calibrated on."""
    lines = set(_line_hashes(texts))
    share = len(lines & calibration.lines) / max(1, len(lines))
    if share > tolerance:
        raise UserMistake(
            f"{share:.0%} of the evaluation text was calibrated on",
            why=f"the model was fitted to it ({calibration.source}), so the figure would flatter it",
            fix="calibrate on another split",
        )


def _check_sizes(source: Feed, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserMistake(f"{name} is {size}", fix="give a positive number")
    limit = getattr(source.config, "max_position_embeddings", None)
    if isinstance(limit, int) and sizes["length"] > limit:
        raise UserMistake(f"length is {sizes['length']}", why=f"the model reads at most {limit} tokens", fix=f"length ≤ {limit}")


def mixed(*parts: Calibration) -> Calibration:
    """Their batches in turn."""
    marked = ([(batch, i in part.written) for i, batch in enumerate(part.inputs)] for part in parts)
    turns = [batch for turn in zip_longest(*marked) for batch in turn if batch is not None]
    own = frozenset(i for i, (_, own) in enumerate(turns) if own)
    lines = frozenset().union(*(part.lines for part in parts))
    source = "+".join(part.source for part in parts)
    return Calibration(tuple(batch for batch, _ in turns), source, parts[0].seed, lines, own, parts[0].loss)


def _parts(spec: str) -> list[str]:
    """The specs that a mixture names; a file may have a plus in its name."""
    return [spec] if Path(spec).exists() else [part for part in spec.split("+") if part]


def _rows(spec: str, source: Feed, samples: int, length: int, seed: int) -> tuple[Tensor, list[str]]:
    """Token ids (samples, length), and the texts they were cut from."""
    if spec == "self":
        return written(source.model, source.config, samples, length, seed), []
    if spec == "random":
        draw = torch.Generator().manual_seed(seed)
        config = source.config
        return ordinary_ids(config.vocab_size, special_ids(config), (samples, length), draw), []
    return _crops(read_texts(spec), source.tokenizer(), samples, length, seed)


def _crops(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int) -> tuple[Tensor, list[str]]:
    """Random crops of long documents in random order; where every document is short, of all of them joined."""
    dice = Random(seed)
    shuffled = dice.sample(texts, len(texts))
    pairs = ((text, tokenize(tokenizer, text)) for text in shuffled)
    long = [pair for pair, _ in zip((pair for pair in pairs if len(pair[1]) >= length), range(samples), strict=False)]
    if not long:
        joined = tokenize(tokenizer, " ".join(shuffled))
        if len(joined) < length:
            raise UserMistake(
                f"the calibration text has {len(joined)} tokens", why=f"one sample takes {length}", fix="give more text"
            )
        long = [("\n".join(shuffled), joined)]
    chosen = [long[i % len(long)][1] for i in range(samples)]
    starts = [dice.randint(0, len(ids) - length) for ids in chosen]
    rows = torch.stack([ids[start : start + length] for ids, start in zip(chosen, starts, strict=True)])
    return rows, [text for text, _ in long]


def tokenize(tokenizer: Any, text: str, special: bool = False) -> Tensor:
    """A text as token ids (n,), without special tokens unless asked."""
    ids = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _as_inputs(source: Feed, ids: Tensor) -> dict[str, Tensor]:
    """Token ids as keyword inputs; a decoder is fed the same text, one token late."""
    if not getattr(source.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    start = torch.full_like(ids[:, :1], start_token(source.config))
    return {"input_ids": ids, "decoder_input_ids": torch.cat([start, ids[:, :-1]], dim=1)}


def _random_inputs(source: Feed, samples: int, batch: int, seed: int) -> Calibration:
    """Random inputs for a model that reads no text."""
    sizes = [min(batch, samples - done) for done in range(0, samples, batch)]
    inputs = tuple(source.example_inputs(rows=rows, seed=seed + i) for i, rows in enumerate(sizes))
    return Calibration(inputs, "random", seed)


def _line_hashes(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            words = " ".join(line.split())
            if len(words) >= SHORTEST_LINE:
                yield hashlib.sha256(words.encode()).hexdigest()[:16]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserMistake(f"not a UTF-8 text: {file}", why=str(error)) from error


def _json_lines(file: Path, field: str) -> list[str]:
    lines = [line for line in _read(file).splitlines() if line.strip()]
    return [_field(line, field, f"{file}:{number}") for number, line in enumerate(lines, 1)]


def _field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserMistake("not a line of JSON", at=where, why=str(error)) from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        raise UserMistake(f"no text under {field!r}", at=where, fix=f"{nearest(field, known)} (as FILE:FIELD)")
    return str(row[field])


def _dataset(spec: str) -> list[str]:
    """The texts of a dataset: its column ``text``, or the only column of strings."""
    name, *rest = re.split(r":(?![^\[]*\])", spec)  # a split may be a slice: test[:9]
    split = rest.pop() if len(rest) > 1 or (rest and rest[-1].partition("[")[0] in SPLITS) else "train"
    try:
        data = import_module("datasets").load_dataset(name, *rest, split=split)
    except ImportError:
        raise UserMistake(f"no such file: {spec}", why="and datasets is not installed", fix="pip install datasets") from None
    except Exception as error:
        raise UserMistake(f"cannot read {spec!r} as text", why=first_line(error), fix=_known_specs()) from error
    strings = [column for column, kind in data.features.items() if getattr(kind, "dtype", "") == "string"]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None:
        raise UserMistake(
            f"which column of {name} is the text?",
            why=f"it has {', '.join(data.features)}",
            fix="save it as JSON lines",
        )
    return [text for text in data[column] if text]


def _known_specs() -> str:
    return "give self, random, a text file, JSON lines (file.jsonl[:field]) or a datasets name (name[:config][:split])"
