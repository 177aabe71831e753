"""Block influence: a layer that hardly turns the stream it passes on is hardly needed.

Men et al., "ShortGPT" (arXiv 2403.03853, equation 1), with h_l what enters layer l, over all positions of the calibration data::

    BI_l = 1 − E[ cos(h_l, h_{l+1}) ]

``block=n`` is the angular distance of Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887,
equation 4), of the last position between layer l and layer l + n; a layer's score is the least distance over the blocks of n
layers it belongs to, so that the n lowest are one contiguous block::

    d(l, l + n) = arccos( cos(h_l, h_{l+n}) ) / π

``graphprune.compile(model, kinds=["layer"], method="short_gpt", calibration=c)``
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from graphprune import Calibration, Layers, Scores
from graphprune.capture import fitted
from graphprune.errors import UserMistake
from graphprune.execute import execute, tensors_of


def short_gpt(model: nn.Module, layers: Layers, calibration: Calibration, *, block: int = 0) -> Scores:
    """Score layers (or residual branches) by how far they turn the stream: (units,) each, float64, from 0 to 2, or to 1."""
    longest = min(len(pieces) for pieces in layers.pieces.values())
    if block and any(group.kind != "layer" for group in layers):
        raise UserMistake("only layers stand in contiguous blocks", fix="leave block out")
    if not 0 <= block <= longest:
        raise UserMistake(f"block cannot be {block}", fix=f"a stack here has {longest} layers that can go")
    ends = {name: [(piece.entry, piece.exit) for piece in pieces] for name, pieces in layers.pieces.items()}
    if block:
        ends = {name: [(run[0][0], run[-1][1]) for run in _runs(pairs, block)] for name, pairs in ends.items()}
    pairs = {pair for found in ends.values() for pair in found}
    turned = {pair: torch.cat(seen).mean() for pair, seen in _turns(model, layers, calibration, pairs, last=block > 0).items()}
    units = {name: torch.stack([turned[pair] for pair in found]) for name, found in ends.items()}
    return Scores({n: _least(u, block) if block else u for n, u in units.items()}, "angular" if block else "short_gpt")


Pair = tuple[fx.Node, fx.Node]


def _runs(pairs: list[Pair], count: int) -> Iterator[list[Pair]]:
    return (pairs[start : start + count] for start in range(len(pairs) - count + 1))


def _least(blocks: Tensor, count: int) -> Tensor:
    """Each layer's least value over the blocks of ``count`` it is in."""
    layers = len(blocks) + count - 1
    return torch.stack([blocks[max(0, layer - count + 1) : layer + 1].min() for layer in range(layers)])


def _turns(model: nn.Module, layers: Layers, calibration: Calibration, pairs: set[Pair], last: bool) -> dict[Pair, list[Tensor]]:
    """1 − cos, or the angle over π of the last positions, between two points of the stream, a position each."""
    trace = layers.axes.trace
    starts = {start for start, _ in pairs}
    found: dict[Pair, list[Tensor]] = {pair: [] for pair in pairs}
    for flat in fitted(trace, calibration.inputs):
        held: dict[fx.Node, Tensor] = {}

        def see(node: fx.Node, value: Tensor, held: dict[fx.Node, Tensor] = held) -> None:
            if node in starts or any(node is end for _, end in pairs):
                held[node] = (value[:, -1] if last else value).double()
            for pair in pairs:
                if pair[1] is node:
                    cosine = torch.cosine_similarity(held[pair[0]], held[node], dim=-1).flatten()
                    found[pair].append(cosine.clamp(-1, 1).arccos() / torch.pi if last else 1 - cosine)

        execute(trace, tensors_of(model, trace), flat, see=see)
    return found
