"""Hand-written nets, one awkward structure each: ``NETS`` maps a name to a class, ``example(name)`` gives model and inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.architectures import positive_statistics
from tests.models import sharpened

NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {}


def takes(*shape: int):  # type: ignore[no-untyped-def]
    """Register a net by its name, with the shape of its input."""

    def register(net: type[nn.Module]) -> type[nn.Module]:
        NETS[net.__name__] = (net, shape)
        return net

    return register


def example(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The net with sharp weights, in evaluation mode, and its inputs."""
    torch.manual_seed(0)
    net, shape = NETS[name]
    return positive_statistics(sharpened(net())), (torch.randn(shape),)


def conv(before: int, after: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


class Classifier(nn.Module):
    """Features, pooled, then a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


# ── convolutions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@takes(2, 3, 8, 8)
class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv(3, 6), conv(6, 4), conv(10, 5)
        self.norm, self.last = nn.BatchNorm2d(15), Classifier(15)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat((x, self.one(x).relu()), 1)
        x = torch.cat((x, self.two(x).relu()), 1)
        return self.last(self.norm(x))


@takes(2, 3, 8, 8)
class Shuffled(nn.Module):
    """ShuffleNet's unit: grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.last = (
            conv(3, 12, 1),
            conv(12, 18, 1, groups=3),
            conv(18, 12, 1, groups=3),
            Classifier(12),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.one(x)
        b, c, h, w = y.shape
        y = y.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.last(x + self.two(y))


@takes(2, 3, 8, 8)
class Split(nn.Module):
    """ShuffleNet v2: half of the channels pass by, then both halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.last = conv(3, 12), conv(6, 7, 1), conv(7, 6, 1), Classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        return self.last(F.channel_shuffle(torch.cat((left, self.two(self.one(right).relu())), 1), 2))


@takes(2, 3, 8, 8)
class Depthwise(nn.Module):
    """An inverted residual: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth, self.project = conv(3, 6), conv(6, 20, 1), conv(20, 20, groups=20), conv(20, 6, 1)
        self.norm, self.last = nn.BatchNorm2d(20), Classifier(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + self.project(self.norm(self.depth(F.relu6(self.expand(x))))))


@takes(2, 3, 8, 8)
class Inception(nn.Module):
    """Branches of different kernels, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.five, self.pooled = conv(3, 4, 1), conv(3, 5), conv(3, 6, 5), conv(3, 7, 1)
        self.merge, self.last = conv(22, 8, 1), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.one(x), self.three(x), self.five(x), self.pooled(F.max_pool2d(x, 3, 1, 1)))
        return self.last(self.merge(torch.cat(branches, 1)).relu())


@takes(2, 3, 8, 8)
class Upsampled(nn.Module):
    """A U-Net of one level: transposed convolution and interpolation back up, skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = conv(3, 6), conv(6, 10, stride=2), nn.ConvTranspose2d(10, 7, 2, stride=2)
        self.side, self.out = conv(10, 4, 1), conv(17, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        deep = self.middle(skip).relu()
        wide = F.interpolate(self.side(deep), scale_factor=2.0, mode="nearest")
        return self.out(torch.cat((skip, self.up(deep), wide), 1))


@takes(2, 3, 8, 8)
class Transposed(nn.Module):
    """A decoder of transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.norm, self.out = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(self.stem(x).relu())).relu())


@takes(2, 3, 8, 8)
class Excited(nn.Module):
    """Squeeze and excite: channels scaled by a bottleneck of their own means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite, self.last = conv(3, 12), nn.Linear(12, 4), nn.Linear(4, 12), Classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        scale = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.last(x.mul_(scale[:, :, None, None]))


@takes(2, 3, 8, 8)
class GroupNormed(nn.Module):
    """Statistics over groups of channels: a whole group can go exactly, a channel of every group cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.next, self.last = conv(3, 12), nn.GroupNorm(3, 12), conv(12, 8), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.next(self.norm(self.stem(x)).relu()))


@takes(2, 3, 8, 8)
class Conflict(nn.Module):
    """GroupNorm over 4 groups of 6, then a convolution in 3 groups of 8: no layout fits both, so only that width is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.next, self.last = conv(3, 24), nn.GroupNorm(4, 24), conv(24, 9, groups=3), Classifier(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.next(self.norm(self.stem(x))).relu())


@takes(2, 3, 8, 8)
class WeightNormed(nn.Module):
    """A weight made of a direction and a length."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = weight_norm(conv(3, 6)), weight_norm(conv(6, 8)), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu()).relu())


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


@takes(2, 5, 12)
class Attention(nn.Module):
    """torch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention, self.after = (
            nn.Linear(12, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(self.attention(x, x, x, need_weights=False)[0])


@takes(2, 5, 16)
class Encoder(nn.Module):
    """torch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 22, batch_first=True)
        self.before, self.encoder, self.after = nn.Linear(16, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.encoder(self.before(x)))


@takes(2, 5, 12)
class EinsumAttention(nn.Module):
    """Raw three-dimensional parameters, einsum throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12, 3, 4)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(3, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
        weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 2).softmax(-1)
        return torch.einsum("bhqd,hdc->bqc", torch.einsum("bhqk,bhkd->bhqd", weights, v), self.o)


class Fused(nn.Module):
    """Attention over one projection for queries, keys and values; subclasses say how it is laid out."""

    heads, width = 3, 4

    def __init__(self) -> None:
        super().__init__()
        size = self.heads * self.width
        self.qkv, self.out = nn.Linear(12, 3 * size), nn.Linear(size, 12)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@takes(2, 5, 12)
class FusedSegments(Fused):
    """``h·d + h·d + h·e``: three segments, as in GPT-2."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (self.heads, self.width)).transpose(1, 2) for part in x.split(12, dim=-1))


@takes(2, 5, 12)
class FusedStacked(Fused):
    """``3·h·d`` taken apart with unbind, as in timm's ViT."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.view(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)


@takes(2, 5, 12)
class FusedHeads(Fused):
    """``h·(d + d + e)``: chunked within each head, as in GPT-NeoX."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.view(*x.shape[:2], self.heads, 3 * self.width).transpose(1, 2).chunk(3, dim=-1)


@takes(2, 5, 12)
class FusedGroups(nn.Module):
    """``kv·((rep + 1 + 1)·d)``: every KV group with its queries, key and value, as in InternLM 2 and Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 2 * 5 * 4), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.qkv(x).view(2, 5, 2, 5, 4)
        q = groups[:, :, :, :3].reshape(2, 5, 6, 4).transpose(1, 2)
        k, v = (groups[:, :, :, place].transpose(1, 2).repeat_interleave(3, dim=1) for place in (-2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24))


@takes(2, 5, 12)
class Interleaved(nn.Module):
    """Rotary embedding of neighbouring pairs, the way of GPT-J."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.register_buffer("frequency", torch.rand(4) + 0.1)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(5.0), self.frequency).repeat_interleave(2, dim=-1)
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * angle.cos() + swapped * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (self.turned(q) @ self.turned(k).transpose(-1, -2) / 3).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(2, 5, 24))


# ── everything else ──────────────────────────────────────────────────────────────────────────────────────────────────


@takes(5, 2, 6)
class Recurrent(nn.Module):
    """An LSTM, then a GRU, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTM(6, 10, num_layers=2), nn.GRU(10, 7, bidirectional=True), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(self.lstm(x)[0])[0])


@takes(2, 6)
class Raw(nn.Module):
    """Parameters without modules, used transposed and in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = (
            nn.Parameter(torch.randn(6, 10)),
            nn.Parameter(torch.randn(10)),
            nn.Parameter(torch.randn(10, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, :4], (x @ self.up) * self.scale, self.down)


@takes(2, 6)
class Tied(nn.Module):
    """One matrix used both ways, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).relu(), self.decode.weight.t())


@takes(2, 6)
class InPlace(nn.Module):
    """Activations overwritten, partly through views."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.shift, self.two = nn.Linear(6, 12), nn.Parameter(torch.randn(3, 4)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu_()
        x.view(2, 3, 4).add_(self.shift)
        x[:, :4].mul_(2.0)
        return self.two(x.clamp_(max=3.0))


@takes(4, 6)
class Experts(nn.Module):
    """A router over stacked experts: two of four, chosen by topk and looked up by index."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up, self.down = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        inner = torch.einsum("bi,bkio->bko", x, self.up[chosen]).relu()
        return (torch.einsum("bko,bkoi->bki", inner, self.down[chosen]) * score[..., None]).sum(1)


# ── LLM-Pruner's three figures ───────────────────────────────────────────────────────────────────────────────────────


@takes(2, 5, 8)
class GatedMLP(nn.Module):
    """Figure 2, left: gate and up meet in a product that down reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 14), nn.Linear(8, 14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@takes(2, 5, 8)
class Heads(nn.Module):
    """Figure 2, middle: queries, keys and values of a head meet in attention, which the output projection reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))


@takes(2, 5, 6)
class Channels(nn.Module):
    """Figure 2, right: everything that writes to or reads from the residual stream shares its width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down, self.head = (
            nn.Linear(6, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 14),
            nn.Linear(14, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))
