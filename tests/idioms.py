"""Idioms of published models, each in a net of its own: registered in ``NETS`` beside the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import takes


@takes(2, 5, 8)
class ViewedAttention(nn.Module):
    """A view of what attention returns: its memory layout is another once keys and values differ in width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 5, 24))


@takes(2, 5, 8)
class LinearBias(nn.Module):
    """ALiBi: a slope for each head, computed in the forward from numbered positions; a head that stays keeps its slope."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 18), nn.Linear(8, 18), nn.Linear(8, 18), nn.Linear(18, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 6, 3).transpose(1, 2) for part in (self.q, self.k, self.v))
        slopes = 2.0 ** -torch.arange(1, 9)
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:6]
        bias = slopes.view(1, 6, 1, 1) * torch.arange(-4, 1).view(1, 1, 1, 5)
        return self.o(((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 18))


@takes(2, 5, 8)
class MultiQuery(nn.Module):
    """Falcon: one projection for all queries and the only key and value, taken apart by lists of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).view(2, 5, 6, 4)
        q, k, v = (part.transpose(1, 2) for part in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16))


@takes(2, 5, 8)
class NormedMLP(nn.Module):
    """BitNet: gate and up meet in a product that is normalised before down reads it; an inner width all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.norm, self.down = nn.Linear(8, 14), nn.Linear(8, 14), nn.RMSNorm(14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.gate(x).relu() * self.up(x)))


@takes(2, 3, 8)
class Stepped(nn.Module):
    """Messages into a recurrent cell that is as wide as they are: the state is one width, read by both of the cell's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.out = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.cell, self.layer = nn.GRUCell(10, 10), nn.LSTM(10, 10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = self.cell(self.message(x).mean(1), x[:, 0])
        return self.out(self.layer(x)[0] + state[:, None])


@takes(4, 8)
class Prototypes(nn.Module):
    """Distances and angles to learnt rows: zeroing one side of a difference does not remove the other."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.like = nn.Linear(8, 9), nn.Linear(8, 7)
        self.rows, self.directions = nn.Parameter(torch.randn(5, 9)), nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.near(x), self.rows) + F.cosine_similarity(self.like(x)[:, None], self.directions, dim=-1)


@takes(2, 3, 8, 8)
class FourierLayer(nn.Module):
    """A Fourier neural operator: complex weights on the lowest frequencies, the others nought."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.past, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)
        self.low, self.high = (nn.Parameter(torch.randn(6, 5, 2, 2, dtype=torch.complex64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        found = torch.fft.rfft2(x)
        spectrum = torch.zeros(x.shape[0], 5, 8, 5, dtype=torch.complex64)
        spectrum[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, :2, :2], self.low)
        spectrum[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, -2:, :2], self.high)
        return self.last(F.gelu(torch.fft.irfft2(spectrum, s=(8, 8)) + self.past(x)))


@takes(2, 5, 8)
class HalfPrecision(nn.Module):
    """Part of the forward in half precision, and a norm within it in single precision again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 14), nn.Linear(8, 14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.up(x) * self.gate(x).sigmoid()
            with torch.autocast("cpu", enabled=False):
                x = F.normalize(x.float(), dim=-1)
            x = self.down(x)
        return x.float()
