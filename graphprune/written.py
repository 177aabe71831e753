"""A language model in, what it writes out: greedily or at random, from a prompt or of its own accord."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.device import where
from graphprune.errors import ModelLimit, UserMistake

SAMPLED_AT_ONCE = 64
PROBE = 8
"""Tokens on which it is tried whether a model is causal."""

PIECE = 128
"""Tokens of a self-written piece: what comes later costs more to write and says less that is new."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def decode(model: nn.Module, prompt: Tensor, choose: Callable[[Tensor], Tensor], tokens: int) -> Tensor:
    """``prompt`` (rows, n) with ``tokens`` more, each chosen from float32 logits (rows, vocabulary).

    Runs with a KV cache where the model has one.
    """
    cached = "past_key_values" in signature(model.forward).parameters
    ids = fed = prompt
    cache = None
    with inference(model):
        for _ in range(tokens):
            out = model(fed, past_key_values=cache, use_cache=True) if cached else model(fed)
            chosen = choose(logits_of(out)[:, -1].float())[:, None].to(ids.device)
            ids = torch.cat([ids, chosen], dim=1)
            cache = getattr(out, "past_key_values", None)
            fed = ids if cache is None else chosen
    return ids


def logits_of(output: Any) -> Tensor:
    """What a language model predicts, (rows, tokens, vocabulary): ``logits`` by name, the first of several, or the only output."""
    if isinstance(output, Mapping):
        if "last_hidden_state" in output and "logits" not in output:
            raise ModelLimit("not a language model: it gives hidden states and no logits")
        output = output.get("logits", next(iter(output.values()), None))
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise ModelLimit("not a language model: it gives no logits (rows, tokens, vocabulary)")
    return found


def check_causal(model: nn.Module, what: str = "the model") -> None:
    """Raise UserMistake unless a model predicts each token from those before it: a later one must not change what it says.

    Nothing is asked of what has no config."""
    config = getattr(model, "config", None)
    if config is None:
        return
    if not reads_tokens(model):
        raise UserMistake(f"{what} is no causal language model", why=f"a {type(model).__name__} reads no tokens")
    if getattr(config, "is_encoder_decoder", False):
        raise UserMistake(f"{what} reads one text and writes another: it continues none", fix="give a causal language model")
    ids = torch.arange(1, 1 + PROBE)[None] % (getattr(config, "vocab_size", None) or PROBE)
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    with inference(model):
        one, two = (logits_of(model(row.to(where(model))))[:, :-1].float() for row in (ids, other))
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        raise UserMistake(f"{what} is no causal language model", why="its predictions depend on the tokens after them")


def reads_tokens(model: nn.Module) -> bool:
    """Whether token ids are what a model takes first; a model that does not say is believed to."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def check_length(model: nn.Module, tokens: int, what: str = "the model") -> None:
    """Raise UserMistake where a text is longer than a model's config says that it can read."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and tokens > most > 0:
        raise UserMistake(f"a text of {tokens} tokens", why=f"{what} reads at most {most}", fix="give shorter ones")


def ordinary_ids(vocabulary: int, special: Iterable[int], shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Random token ids, none of them special where there are others."""
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[token for token in special if 0 <= token < vocabulary]] = False
    ordinary = (allowed if allowed.any() else ~allowed).nonzero().flatten()
    return ordinary[torch.randint(len(ordinary), shape, generator=draw)]


def written(model: nn.Module, config: Any, samples: int, length: int, seed: int = 0) -> Tensor:
    """Sequences (samples, length) that a language model itself writes at temperature 1, each packed from pieces of 128 tokens.

    The first, third, … piece begins with its beginning-of-sequence token, if it has one, the others with a token at random, as in
    LLM-QAT (arXiv 2305.17888): what a model says of its own accord is narrower than what it knows. Raises UserMistake when it
    cannot.
    """
    if getattr(config, "vocab_size", None) is None or not reads_tokens(model):
        raise UserMistake(f"{type(model).__name__} writes no text to calibrate on", fix="give batches of inputs, or random")
    device = where(model)
    if device.type == "meta" or getattr(config, "is_encoder_decoder", False):
        why = "its weights are not loaded" if device.type == "meta" else "it needs an input to answer"
        raise UserMistake("the model cannot write its own calibration text", why=why, fix="calibrate on a text, or on random ids")
    draw = torch.Generator().manual_seed(seed)
    tokens = min(PIECE, length)
    pieces = samples * -(-length // tokens)
    first = ordinary_ids(config.vocab_size, special_ids(config), (pieces, 1), draw)
    start = _named_start(config)
    if start is not None:
        first[::2] = start
    prompts = torch.split(first.to(device), SAMPLED_AT_ONCE)
    rows = torch.cat([decode(model, prompt, lambda logits: _sampled(logits, draw), tokens - 1).cpu() for prompt in prompts])
    return rows.reshape(samples, -1)[:, :length]


def _sampled(logits: Tensor, draw: torch.Generator) -> Tensor:
    """One token (rows,) by each row's probabilities: where their running sum passes a number drawn for it."""
    passed = logits.softmax(-1).cpu().cumsum(-1)
    if not passed[:, -1].isfinite().all():
        raise ModelLimit("the model writes no text: its logits are not finite", fix="load it in float32")
    drawn = torch.rand(len(passed), 1, generator=draw) * passed[:, -1:]
    return torch.searchsorted(passed, drawn, right=True)[:, 0].clamp_max(passed.shape[1] - 1)


def start_token(config: Any) -> int:
    """The token that a sequence begins with: the first that a config names of ``bos``, ``decoder_start`` and ``eos``.

    Raises UserMistake where it names none.
    """
    start = _named_start(config)
    if start is None:
        raise UserMistake("the model names no token to begin with", fix="calibrate on random ids")
    return start


def _named_start(config: Any) -> int | None:
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list | tuple) else token)
    return None


def special_ids(config: Any) -> list[int]:
    """Every token id that a config names, lists of them included: for padding, for images, for an end."""
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return [token for value in named for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
