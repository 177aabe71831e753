"""Hard families, a small net each: which kinds are prunable, how many groups, and that a cut is what zeroing parameters by hand gives.

The oracle knows no masks: it zeroes the removed units in the parameters of a plain copy that consume them (in all of them where
queries meet keys) and runs that eagerly in double precision, on inputs that the analysis never saw.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Linear, Parameter

from graphprune.axes import Keep
from graphprune.difference import difference, tensors_in
from graphprune.execute import tensors_of
from graphprune.groups import Groups, couple
from graphprune.propagate import propagate
from graphprune.rewrite.graph import PrunedGraph, smaller
from graphprune.trace import trace
from tests.models import sharpened

HARD: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, int]]] = {}

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")


def family(*shape: int, **kinds: int):  # type: ignore[no-untyped-def]
    """Register a net with the shape of its input and the number of groups of each kind."""

    def register(net: type[nn.Module]) -> type[nn.Module]:
        HARD[net.__name__] = (net, shape, kinds)
        return net

    return register


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


# ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@family(2, 6, 12, expert=1, ffn=1)
class StackedExperts(nn.Module):
    """Gate and up fused in one three-dimensional parameter; the two best experts, written back by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up, self.down = Linear(12, 4), Parameter(torch.randn(4, 12, 20)), Parameter(torch.randn(4, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        gate, up = torch.einsum("btc,ecf->btef", x, self.up).chunk(2, -1)
        best = torch.zeros_like(scores).scatter(-1, scores.topk(2, -1).indices, 1.0)
        return torch.einsum("btef,efc,bte->btc", F.silu(gate) * up, self.down, scores * best)


@family(2, 6, 12, ffn=5)
class SharedExpert(nn.Module):
    """A list of experts, weighted, and one that everybody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = Linear(12, 4), nn.Sequential(Linear(12, 9), nn.GELU(), Linear(9, 12))
        self.experts = nn.ModuleList(nn.Sequential(Linear(12, 10), nn.GELU(), Linear(10, 12)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.router(x).softmax(-1)
        return self.shared(x) + sum(weight[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


@family(2, 5, 12, ffn=1)
class InterleavedGate(nn.Module):
    """Gate and up in turns: every unit is two neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(12, 20), Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(F.silu(x[..., ::2]) * x[..., 1::2])


@family(2, 5, 12, head=1, qk_width=1, value_width=1)
class OneKey(nn.Module):
    """Multi-query attention by broadcasting: one key and value, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = Linear(12, 24), Linear(12, 12), Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.kv(x).unsqueeze(1).chunk(2, -1)
        weights = (heads(self.q(x), 4) @ key.transpose(-1, -2) * 0.4).softmax(-1)
        return self.o((weights @ value).transpose(1, 2).flatten(2))


@family(2, 5, 12, head=1, query=1, qk_width=1, value_width=1)
class GroupedFlag(nn.Module):
    """Grouped queries inside torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = Linear(12, 24), Linear(12, 12), Linear(12, 12), Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))


@family(2, 5, 12, ffn=2, head=1, qk_width=2, value_width=1)
class Latent(nn.Module):
    """Multi-head latent attention: low ranks for queries and for keys with values, one rotary-like part that heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.low, self.high = Linear(12, 10), Linear(10, 32), Linear(12, 11), Linear(9, 44)
        self.o = Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.up(self.down(x)), 4)
        low, shared = self.low(x).split([9, 2], -1)
        k, v = heads(self.high(low), 4).split([6, 5], -1)
        k = torch.cat((k, shared.unsqueeze(1).expand(-1, 4, -1, -1)), -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@family(2, 5, 12, head=2, ffn=1, qk_width=1, value_width=1)
class Talking(nn.Module):
    """Heads mixed before and after the softmax: heads of queries and keys, heads of values, and what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(12, 24) for _ in range(4))
        self.o, self.pre, self.post = Linear(24, 12), Parameter(torch.randn(4, 4)), Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part(x), 4) for part in (self.q, self.k, self.v))
        weights = torch.einsum("bhij,hg->bgij", q @ k.transpose(-1, -2), self.pre).softmax(-1)
        return self.o((self.post(weights) @ v).transpose(1, 2).flatten(2))


@family(2, 6, 12, head=1, hidden=1, qk_width=1)
class ShiftedWindow(nn.Module):
    """Windows of three, shifted by one, with a table of relative positions; one layout for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv, self.out, self.last = (
            Linear(12, 16), nn.LayerNorm(16), Linear(16, 48), Linear(16, 16), Linear(16, 3),
        )  # fmt: skip
        self.table = Parameter(torch.randn(5, 4))
        self.register_buffer("place", torch.arange(3)[:, None] - torch.arange(3)[None] + 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        window = torch.roll(self.norm(x), -1, 1).view(-1, 3, 16)
        q, k, v = self.qkv(window).view(-1, 3, 3, 4, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.place.view(-1)].view(3, 3, -1).permute(2, 0, 1)
        mixed = (q @ k.transpose(-1, -2) / 2 + bias).softmax(-1) @ v
        return self.last(x + torch.roll(self.out(mixed.transpose(1, 2).flatten(2)).view(-1, 6, 16), 1, 1))


@family(2, 5, 12, head=1, qk_width=1, value_width=1)
class Slopes(nn.Module):
    """ALiBi: each head has a slope in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = Linear(12, 72), Linear(24, 12)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.qkv(x), 4).chunk(3, -1)
        place = torch.arange(x.shape[1])
        bias = self.slopes[:, None, None] * (place[None] - place[:, None])
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


@family(2, 3, 6, 4, head=1, qk_width=1, value_width=1)
class ChannelAttention(nn.Module):
    """Channels attend to channels, after a depthwise convolution of all three at once."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.depth, self.out = Conv2d(3, 36, 1), Conv2d(36, 36, 3, padding=1, groups=36), Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (3, 4)).flatten(3) for part in self.depth(self.qkv(x)).chunk(3, 1))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).flatten(1, 2).unflatten(2, (6, 4)))


# ── sequences ────────────────────────────────────────────────────────────────────────────────────────────────────────


@family(2, 6, 12, ffn=1, value_width=1, qk_width=1)
class StateSpace(nn.Module):
    """A selective state space: the state is contracted by a product of activations, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.project, self.step, self.down = Linear(12, 40), Linear(20, 14), Linear(4, 20), Linear(20, 12)
        self.conv, self.decay = nn.Conv1d(20, 20, 3, padding=2, groups=20), Parameter(torch.rand(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.up(x).chunk(2, -1)
        inner = F.silu(self.conv(inner.transpose(1, 2))[..., :6].transpose(1, 2))
        step, read, write = self.project(inner).split([4, 5, 5], -1)
        step = F.softplus(self.step(step))
        keep, add = torch.exp(-step[..., None] * self.decay.exp()), (step * inner)[..., None] * write[:, :, None]
        state, seen = inner.new_zeros(2, 20, 5), []
        for place in range(6):
            state = keep[:, place] * state + add[:, place]
            seen.append((state @ read[:, place, :, None]).squeeze(-1))
        return self.down(torch.stack(seen, 1) * F.silu(gate))


@family(2, 5, 6, ffn=2)
class Cells(nn.Module):
    """Recurrent cells, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.out = nn.LSTMCell(6, 10), nn.GRUCell(10, 7), Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g = x.new_zeros(2, 10), x.new_zeros(2, 10), x.new_zeros(2, 7)
        for place in range(5):
            h, c = self.long(x[:, place], (h, c))
            g = self.gated(h, g)
        return self.out(g)


@family(2, 8, 12, ffn=1)
class SpatialGate(nn.Module):
    """gMLP: half of the channels gate the other half, mixed over positions by a convolution of points."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = Linear(12, 32), nn.Conv1d(8, 8, 1), Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.gelu(self.up(x)).chunk(2, -1)
        return self.down(value * self.mix(gate))


@family(2, 8, 12, ffn=1)
class WrittenRows(nn.Module):
    """Rows overwritten by a parameter and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.down = Linear(12, 20), Parameter(torch.randn(20)), Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).clone()
        x[:, 0] = self.first
        x[:, torch.tensor([1, 3])] = 0.0
        return self.down(x)


@family(2, 12, ffn=2)
class Rolled(nn.Module):
    """Hidden units rolled round: those that wrap and those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(12, 20), Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.roll(self.up(x), 3, -1).relu())


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@family(2, 8, 12, hidden=1, ffn=1)
class PatchMerging(nn.Module):
    """Neighbouring patches side by side, normalised together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.merge, self.last = Linear(12, 10), nn.LayerNorm(20), Linear(20, 14, bias=False), Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.last(self.merge(self.norm(torch.cat((x[:, 0::2], x[:, 1::2]), -1))).relu())


@family(2, 3, 8, 8, channel=2)
class PixelDecoder(nn.Module):
    """A pixel shuffle turns every four channels into one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = Conv2d(3, 6, 3, padding=1), Conv2d(6, 20, 3, padding=1), Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pixel_shuffle(self.two(self.one(x).relu()), 2).relu())


@family(2, 3, 8, 8, channel=4)
class TransposedDecoder(nn.Module):
    """A U-Net whose transposed convolution pads its output, with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Conv2d(3, 6, 3, padding=1), Conv2d(6, 8, 3, 2, 1)
        self.up, self.side, self.out = nn.ConvTranspose2d(8, 7, 3, 2, 1, output_padding=1), Conv2d(13, 6, 1), Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.one(x).relu()
        return self.out(self.side(torch.cat((self.up(self.two(high).relu()), high), 1)).relu())


@family(2, 3, 8, 8, channel=3)
class Detection(nn.Module):
    """A pyramid of two levels and heads whose outputs are flattened into boxes and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.low, self.high = (
            Conv2d(3, 8, 3, padding=1),
            Conv2d(8, 12, 3, 2, 1),
            Conv2d(8, 10, 1),
            Conv2d(12, 10, 1),
        )
        self.box, self.score = Conv2d(10, 12, 1), Conv2d(10, 15, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.one(x).relu()
        high = self.high(self.two(low).relu())
        levels = (self.low(low) + F.interpolate(high, scale_factor=2.0), high)
        boxes = [torch.cat((self.box(f).unflatten(1, (3, 4)), self.score(f).unflatten(1, (3, 5))), 2).flatten(3) for f in levels]
        return torch.cat(boxes, -1)


@family(2, 3, 8, 8, channel=4)
class SplitAttention(nn.Module):
    """ResNeSt: two grouped halves, weighted against each other channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = Conv2d(3, 8, 3, padding=1), Conv2d(8, 24, 3, padding=1, groups=2)
        self.squeeze, self.excite, self.last = Conv2d(12, 6, 1), Conv2d(6, 24, 1), Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv(self.stem(x).relu()).relu().unflatten(1, (2, 12))
        weight = self.excite(self.squeeze(parts.sum(1).mean((2, 3), keepdim=True)).relu()).unflatten(1, (2, 12)).softmax(1)
        return self.last((parts * weight).sum(1))


@family(2, 3, 8, 8, channel=2)
class PaddedShortcut(nn.Module):
    """A shortcut padded with channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.last = (
            Conv2d(3, 6, 1),
            Conv2d(6, 9, 3, 2, 1),
            Conv2d(9, 10, 3, padding=1),
            Conv2d(10, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last((self.two(self.one(x).relu()) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu())


@family(2, 3, 8, 8, channel=1, ffn=1)
class Spectrum(nn.Module):
    """A convolution as a product of spectra."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filter, self.out = Conv2d(3, 6, 1), Parameter(torch.randn(6, 7, 8, 5)), Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(self.stem(x)), self.filter.to(torch.complex128))
        return self.out(torch.fft.irfft2(spectrum, s=(8, 8)).to(x.dtype))


@family(2, 12, ffn=2)
class WrittenTo(nn.Module):
    """Results that go into tensors made before: ``out=``, and an operation on lists that gives nothing, which no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.one, self.two, self.out = (
            Linear(12, 20), Linear(20, 9), Linear(9, 14), Linear(9, 14), Linear(14, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        up, down = x.new_empty(len(x), 20), x.new_empty(len(x), 9)
        torch.mm(x, self.up.weight.T, out=up)
        torch.addmm(self.down.bias, up.relu(), self.down.weight.T, out=down)
        one, two = self.one(down.relu()).relu(), self.two(down.relu()).relu()
        torch._foreach_add_([one], [two])
        return self.out(one)


# ── tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def analysed(name: str) -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    net, shape, _ = HARD[name]
    model = sharpened(net()).double()
    return model, couple(propagate(trace(model, (torch.randn(shape, dtype=torch.float64),))))


@pytest.mark.parametrize("name", HARD)
def test_the_kinds_are_those_of_the_family(name: str) -> None:
    assert dict(analysed(name)[1].kinds) == HARD[name][2]


def silenced(model: nn.Module, groups: Groups, keep: Keep) -> nn.Module:
    """The original with the removed units zeroed by hand."""
    model = copy.deepcopy(model)
    owned = dict(model.named_parameters()) | dict(model.named_buffers())
    for group in groups:
        consumed = group.kind != "qk_width" and any(member.role == "consumes" for member in group.members)
        for member in group.members if group.factor in keep else ():
            if member.name in owned and (member.role == "consumes" or not consumed) and owned[member.name].is_floating_point():
                kept = set(groups.axes.tensors[member.name][member.dim].kept({group.factor: keep[group.factor]}))
                gone = [place for place in range(owned[member.name].shape[member.dim]) if place not in kept]
                owned[member.name].data.index_fill_(member.dim, torch.tensor(gone), 0.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", HARD)
def test_a_cut_is_what_zeroing_by_hand_gives(name: str) -> None:
    model, groups = analysed(name)
    axes, x, dice = groups.axes, torch.randn(HARD[name][1], dtype=torch.float64), random.Random(1)
    for kind in groups.kinds:
        chosen = [group for group in groups if group.kind == kind and group.exact]
        keep = {g.factor: sorted(dice.sample(range(g.size), max(g.least, g.size // 2))) for g in chosen}
        cut = smaller(axes, tensors_of(model, axes.trace), keep)
        found = tensors_in(PrunedGraph(axes.trace, cut.graph, cut.tensors)(x))
        assert difference(found, tensors_in(silenced(model, groups, keep)(x))) < 1e-9, kind
        assert not chosen or difference(found, tensors_in(model(x))) > 1e-6, kind
