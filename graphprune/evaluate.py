"""A language model, its tokenizer and texts in; its perplexity, or its continuation of a prompt, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphprune.data import Calibration, refuse_overlap, tokenize
from graphprune.device import where
from graphprune.errors import UserMistake, nearest
from graphprune.written import check_causal, check_length, decode, inference, logits_of


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a perplexity is measured; figures compare only where this is equal.

    Documents are joined by ``join`` and tokenised once (``special``: with the tokenizer's own special tokens), then cut
    into consecutive windows of ``length`` tokens, ``stride`` apart (None: no overlap); what is left over is dropped.
    ``bos`` begins each window with the beginning-of-sequence token. ``limit`` is the largest number of windows.
    """

    length: int = 512
    stride: int | None = None
    join: str = " "
    bos: bool = False
    special: bool = False
    limit: int | None = None

    @property
    def text(self) -> int:
        """Tokens of text in a window."""
        return self.length - self.bos

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.stride or self.text


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss over ``tokens`` predicted tokens in ``windows`` windows."""

    value: float
    tokens: int
    windows: int
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.tokens} tokens in windows of {self.protocol.length})"


def published(name: str, model: nn.Module | None = None) -> Protocol:
    """The protocol of a paper: ``llm-pruner`` (chunks of 128) or ``wanda`` (2048, or what the model reads at most).

    As their code does, documents are joined by two line breaks and tokenised with the tokenizer's own special tokens.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2048
    lengths = {"llm-pruner": 128, "wanda": min(2048, most)}
    if name not in lengths:
        raise UserMistake(f"no protocol {name!r}", fix=nearest(name, lengths))
    return Protocol(length=lengths[name], join="\n\n", special=True)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int = 512,
    stride: int | None = None,
    join: str = " ",
    bos: bool = False,
    limit: int | None = None,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
) -> Perplexity:
    """The perplexity of a causal language model. A ``protocol`` replaces the settings before it.

    Raises UserMistake when the texts are too short, or when ``calibration`` was drawn from them.
    """
    how = protocol or Protocol(length, stride, join, bos, limit=limit)
    check_causal(model)
    check_length(model, how.length)
    if calibration is not None:
        refuse_overlap(calibration, texts)
    windows = _windows(tokenize(tokenizer, how.join.join(texts), how.special), how)
    start = _bos(tokenizer) if how.bos else None
    losses = [_loss(model, window, start, how.step if i else how.text) for i, window in enumerate(windows)]
    total, tokens = math.fsum(loss for loss, _ in losses), sum(count for _, count in losses)
    return Perplexity(_exp(total / tokens), tokens, len(losses), how)


def continuation(model: nn.Module, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """What the model writes after ``prompt``: greedy, with a KV cache, up to ``tokens`` tokens or its end of text."""
    ids = tokenize(tokenizer, prompt)
    if len(ids) == 0:
        raise UserMistake("nothing to continue: the prompt is empty")
    written = decode(model, ids[None].to(where(model)), lambda logits: logits.argmax(-1), tokens)[0, len(ids) :].tolist()
    ends = [i for i, token in enumerate(written) if token == tokenizer.eos_token_id]
    return str(tokenizer.decode(written[: ends[0]] if ends else written, skip_special_tokens=True))


def _windows(ids: Tensor, how: Protocol) -> list[Tensor]:
    """Whole windows only, as the published code does."""
    if how.length < 2 or not 1 <= how.step <= how.text or (how.limit is not None and how.limit < 1):
        raise UserMistake(f"no windows: {how}", fix="length ≥ 2, 1 ≤ stride ≤ length, limit ≥ 1")
    starts = range(0, len(ids) - how.text + 1, how.step)[: how.limit]
    if not starts:
        raise UserMistake(f"the text has {len(ids)} tokens", why=f"one window takes {how.text}", fix="give more text")
    return [ids[start : start + how.text] for start in starts]


def _loss(model: nn.Module, window: Tensor, start: int | None, counted: int) -> tuple[float, int]:
    """Summed loss over the last ``counted`` tokens of a window, less the first of all; and how many that were."""
    ids = window if start is None else torch.cat([torch.tensor([start]), window])
    ids = ids.to(where(model))
    with inference(model):
        logits = logits_of(model(ids[None]))[0, :-1][-counted:]
    return float(cross_entropy(logits.float(), ids[1:][-counted:], reduction="sum")), len(logits)


def _bos(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise UserMistake("the tokenizer has no beginning-of-sequence token", fix="bos=False")
    return int(tokenizer.bos_token_id)


def _exp(loss: float) -> float:
    """A loss past what a float can hold is infinite, not an error: a ruined model is a result."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
