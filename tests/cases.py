"""One row for each way an op rule can be used: the function, its whole axis type, its operands. `test_law.py` derives the law.

The type reads like einops: ``a b c, d c, d -> a b d`` gives every dimension of every operand and output. A letter is a factor, the
same letter is the same factor; ``b*c`` is nested, ``b+c`` concatenated, ``b~`` renormalised; a number is frozen at that size.
"""


# fmt: off

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operand:
    """A random tensor: normal, positive, whole numbers ``below`` a bound, or truth values; a parameter or an input."""

    shape: tuple[int, ...]
    kind: str = "normal"
    below: int = 0
    parameter: bool = False

    def draw(self) -> Tensor:
        """A value in double precision (64-bit integers, booleans)."""
        if self.kind == "integer":
            return torch.randint(0, self.below, self.shape)
        if self.kind == "truth":
            return torch.rand(self.shape) < 0.6
        value = torch.randn(self.shape, dtype=torch.float64)
        return value.abs() + 0.2 if self.kind == "positive" else value


def X(*shape: int) -> Operand:
    """An input."""
    return Operand(shape)


def P(*shape: int) -> Operand:
    """A parameter."""
    return Operand(shape, parameter=True)


def U(*shape: int) -> Operand:
    """An input that is positive."""
    return Operand(shape, "positive")


def I(*shape: int, below: int) -> Operand:  # noqa: E743
    """An input of whole numbers."""
    return Operand(shape, "integer", below)


def B(*shape: int) -> Operand:
    """An input of truth values."""
    return Operand(shape, "truth")


@dataclass(frozen=True, slots=True)
class Case:
    """One row. ``values`` is False where the function is random and only shapes can be compared.

    ``roles`` says what the operands' dimensions do in contractions: contracted, free, batch, ranked, ``.`` nothing; in capital
    letters for a product of activations.
    """

    name: str
    function: Callable[..., Any]
    type: str
    operands: tuple[Operand, ...]
    values: bool = True
    roles: str = ""


CASES: list[Case] = []


def row(name: str, function: Callable[..., Any], type_: str, *operands: Operand, values: bool = True, roles: str = "") -> None:
    """Add a row."""
    CASES.append(Case(name, function, type_, operands, values, roles))


# ── elementwise ──────────────────────────────────────────────────────────────────────────────────────────────────────

row("add", torch.add, "a b, a b -> a b", X(3, 4), X(3, 4))
row("mul broadcast rank", torch.mul, "a b c, b c -> a b c", X(2, 3, 4), P(3, 4))
row("sub broadcast one", torch.sub, "a 1 b, a c 1 -> a c b", X(3, 1, 4), X(3, 5, 1))
row("div both ranks", torch.div, "a 1, b -> a b", X(3, 1), U(4))
row("add scalar", lambda x: 2 * x + 1, "a b -> a b", X(3, 4))
row("where", torch.where, "a b, a 1, b -> a b", B(3, 4), X(3, 1), X(4))
row("where scalar", lambda m, x: torch.where(m, x, -1.0), "a b, b -> a b", B(3, 4), X(4))
row("masked_fill", lambda x, m: x.masked_fill(m, -2.0), "a b, b -> a b", X(3, 4), B(4))
row("lerp", torch.lerp, "a b, a b, b -> a b", X(3, 4), X(3, 4), P(4))
row("addcmul", torch.addcmul, "a b, a b, b -> a b", X(3, 4), X(3, 4), P(4))
row("addcdiv", torch.addcdiv, "a b, a b, b -> a b", X(3, 4), X(3, 4), U(4))
row("compare", lambda x, y: x > y, "a b, b -> a b", X(3, 4), X(4))
row("logical", lambda x, y: (x & ~y) | (y ^ x), "a b, b -> a b", B(3, 4), B(4))
row("bitwise", lambda x, y: x.__and__(y).__or__(y).__xor__(x), "a b, b -> a b", I(3, 4, below=8), I(4, below=8))
row("whole numbers", lambda x, y: (x + 3) * y, "a b, b -> a b", I(3, 4, below=9), I(4, below=9))
row("relu_", lambda x: torch.relu_(x + 1), "a b -> a b", X(3, 4))
row("relu6_", lambda x: F.relu6(x + 1, inplace=True), "a b -> a b", X(3, 4))
row("add_", lambda x, y: (x * 2).add_(y), "a b, b -> a b", X(3, 4), X(4))
row("in-place through a view", lambda x, y: _scaled_view(x * 1, y), "a b*c, c -> a b*c", X(2, 6), X(3))
row("copy_", lambda x, y: torch.zeros_like(x).copy_(y), "a b, b -> a b", X(3, 4), X(4))
row("fill_", lambda x: torch.empty_like(x).fill_(3.0), "a b -> a b", X(3, 4))
row("likes", lambda x: torch.zeros_like(x) + torch.ones_like(x) * torch.full_like(x, 3.0), "a b -> a b", X(3, 4))
row("random likes", lambda x: torch.rand_like(x) + torch.randn_like(x), "a b -> a b", X(3, 4), values=False)
row("bernoulli", lambda x: torch.bernoulli(x.sigmoid()), "a b -> a b", X(3, 4), values=False)
row("dropout", lambda x: F.dropout(F.alpha_dropout(x, 0.5, False), 0.3, False), "a b -> a b", X(3, 4))
row("feature dropout", lambda x: F.dropout2d(x, 0.3, True), "a b c d -> a b c d", X(2, 3, 4, 5), values=False)
row("native_dropout", lambda x: aten.native_dropout(x, 0.3, False), "a b -> a b, a b", X(3, 4))
row("clone and cast", lambda x: x.clone().contiguous().to(torch.float64).detach(), "a b -> a b", X(3, 4))
row("type_as", lambda x, y: x.type_as(y), "a b, c -> a b", I(3, 4, below=5), X(5))
row("to other", lambda x, y: x.to(y), "a b, c -> a b", I(3, 4, below=5), X(5))
row("clamp", lambda x: x.clamp(-0.5, 0.5), "a b -> a b", X(3, 4))
row("clamp tensors", torch.clamp, "a b, b, a 1 -> a b", X(3, 4), X(4), X(3, 1))
row("clip one tensor", lambda x, y: torch.clip(x, max=y), "1 a, b a -> b a", X(1, 4), X(3, 4))
row("abs positive", lambda x: torch.positive(x.abs()), "a b -> a b", X(3, 4))
row("complex", lambda x, y: torch.view_as_real(torch.complex(x, y)), "a b, a b -> a b 2", X(3, 4), X(3, 4))
row("polar", lambda x, y: torch.view_as_real(torch.polar(x, y)), "a b, a b -> a b 2", U(3, 4), X(3, 4))
row("prelu", F.prelu, "a b c, b -> a b c", X(2, 3, 4), P(3))
row("prelu of a matrix", F.prelu, "a b, b -> a b", X(2, 3), P(3))
row("prelu one slope", F.prelu, "a b c, 1 -> a b c", X(2, 3, 4), P(1))
row("prelu vector", F.prelu, "a, 1 -> a", X(4), P(1))
row("fake_quantize", lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255), "a b -> a b", X(3, 4))
row(
    "fake_quantize channels", lambda x, s: torch.fake_quantize_per_channel_affine(x, s.float(), s.new_zeros(4, dtype=torch.int), 1, 0, 9),
    "a b c, b -> a b c", X(3, 4, 2), U(4),
)  # fmt: skip
row(
    "fake_quantize learnt", lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s.float(), z, 1, -8, 7),
    "a b, b, b -> a b", X(3, 4), U(4), P(4),
)  # fmt: skip
row(
    "fake_quantize learnt step", lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, -8, 7),
    "a b, 1, 1 -> a b", X(3, 4), U(1), P(1),
)  # fmt: skip
row("bucketize", lambda x, y: torch.bucketize(x, y), "a b, 4 -> a b", X(3, 5), P(4))
row("glu", F.glu, "a b+b -> a b", X(3, 8))
row("glu inner", lambda x: F.glu(x, 1), "a b+b c -> a b c", X(3, 8, 5))
row("glu of a product", lambda x, y: F.glu((x * y).flatten(1)), "a b+b c, c -> a b*c", X(2, 6, 4), P(4))
row("softplus", F.softplus, "a b -> a b", X(3, 4))
row("hardswish", F.hardswish, "a b -> a b", X(3, 4))
row("log_sigmoid", F.logsigmoid, "a b -> a b", X(3, 4))
row("floor_divide", lambda x, y: x // y, "a b, b -> a b", X(3, 4), U(4))
row("softsign", F.softsign, "a b -> a b", X(3, 4))


def _as_it_is(x: Tensor) -> Tensor:
    return (x + 1).view_as(x)


def _first(x: Tensor, count: Any) -> Tensor:
    torch._check(count >= 0)
    torch._check(count <= x.shape[0])
    return x[:count]


def _scaled_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(2, 2, 3).mul_(y)
    return x


# ── contractions ─────────────────────────────────────────────────────────────────────────────────────────────────────

row("linear", F.linear, "a b c, d c, d -> a b d", X(2, 3, 4), P(5, 4), P(5), roles="ffc, fc, .")
row("linear no bias", F.linear, "a, b a -> b", X(4), P(5, 4), roles="c, fc")
row("linear two weights", lambda x, u, v: F.linear(F.linear(x, u).relu(), v), "a b, c b, d c -> a d", X(2, 3), P(4, 3), P(5, 4), roles="fc, fc, fc")
row("mm", torch.mm, "a b, b c -> a c", X(2, 3), P(3, 4), roles="fc, cf")
row("bmm", torch.bmm, "a b c, a c d -> a b d", X(2, 3, 4), X(2, 4, 5), roles="BFC, BCF")
row("mv", torch.mv, "a b, b -> a", P(3, 4), X(4), roles="fc, c")
row("dot", torch.dot, "a, a -> ()", X(4), P(4), roles="c, c")
row("vdot", torch.vdot, "a, a -> ()", X(4), P(4), roles="c, c")
row("outer", torch.outer, "a, b -> a b", X(3), P(4))
row("ger", torch.ger, "a, b -> a b", X(3), P(4))
row("addmm", torch.addmm, "a, b c, c a -> b a", P(4), X(2, 3), P(3, 4), roles="., fc, cf")
row("addmm matrix", torch.addmm, "a b, a c, c b -> a b", X(2, 4), X(2, 3), P(3, 4), roles=".., fc, cf")
row("addmm column", torch.addmm, "a 1, a b, b c -> a c", X(2, 1), X(2, 3), P(3, 4), roles=".., fc, cf")
row("addmv", torch.addmv, "a, a b, b -> a", X(3), P(3, 4), X(4), roles="., fc, c")
row("addr", torch.addr, "a b, a, b -> a b", X(3, 4), X(3), P(4))
row("baddbmm", torch.baddbmm, "a b c, a b d, a d c -> a b c", X(2, 3, 4), X(2, 3, 5), X(2, 5, 4), roles="..., BFC, BCF")
row("baddbmm stretched", torch.baddbmm, "1 a b, c a d, c d b -> c a b", X(1, 3, 4), X(2, 3, 5), X(2, 5, 4), roles="..., BFC, BCF")
row("addbmm", torch.addbmm, "a b, c a d, c d b -> a b", X(3, 4), X(2, 3, 5), X(2, 5, 4), roles=".., CFC, CCF")
row("bilinear", F.bilinear, "a b, a c, d b c, d -> a d", X(2, 3), X(2, 4), P(5, 3, 4), P(5), roles="bc, bc, fcc, .")
row("matmul vectors", torch.matmul, "a, a -> ()", X(4), X(4), roles="C, C")
row("matmul vector matrix", torch.matmul, "a, a b -> b", X(3), P(3, 4), roles="c, cf")
row("matmul matrix vector", torch.matmul, "a b c, c -> a b", X(2, 3, 4), P(4), roles="ffc, c")
row("matmul broadcast", torch.matmul, "1 a b c, d a c e -> d a b e", X(1, 2, 3, 4), X(5, 2, 4, 6), roles="BBFC, BBCF")
row("matmul of linalg", torch.linalg.matmul, "a b, b c -> a c", X(2, 3), P(3, 4), roles="fc, cf")
row("matmul ranks", torch.matmul, "a b c d, b d e -> a b c e", X(2, 3, 4, 5), P(3, 5, 6), roles="fbfc, bcf")
row("tensordot", lambda x, w: torch.tensordot(x, w, dims=2), "a b c, b c d -> a d", X(2, 3, 4), P(3, 4, 5), roles="fcc, ccf")
row("tensordot of any dimensions", lambda x, w: torch.tensordot(x, w, dims=([1], [2])), "a b c, d e b -> a c d e", X(2, 3, 4), P(5, 6, 3), roles="fcf, ffc")
row("tensordot of none", lambda x, w: torch.tensordot(x, w, dims=0), "a, b -> a b", X(2), P(3))
row("kron", torch.kron, "a b, c d -> a*c b*d", P(2, 3), P(4, 5))
row("kron of a vector", torch.kron, "a b, c -> a b*c", P(2, 3), P(5))
row("cdist", torch.cdist, "a b c, d c -> a b d", X(2, 3, 4), P(5, 4), roles="ffc, fc")
row("einsum", lambda x, w: torch.einsum("bti,oi->bto", x, w), "a b c, d c -> a b d", X(2, 3, 4), P(5, 4), roles="ffc, fc")
row("einsum spaces", lambda x, w: torch.einsum("b t i, o i -> b o t", x, w), "a b c, d c -> a d b", X(2, 3, 4), P(5, 4), roles="ffc, fc")
row("einsum transposed", lambda x: torch.einsum("abc->cab", x), "a b c -> c a b", X(2, 3, 4))
row("einsum implicit", lambda x, w: torch.einsum("ti,io", x, w), "a b, b c -> c a", X(2, 3), P(3, 4), roles="fc, cf")
row("einsum implicit dots", lambda x, w: torch.einsum("...i,io", x, w), "a b c, c d -> a b d", X(2, 3, 4), P(4, 5), roles="ffc, cf")
row("einsum dots", lambda x, w: torch.einsum("...ij,...jk->...ik", x, w), "a b c d, b d e -> a b c e", X(2, 3, 4, 5), P(3, 5, 6), roles="fbfc, bcf")
row("einsum dots stretched", lambda x, w: torch.einsum("...i,...i->...", x, w), "1 a, b a -> b", X(1, 4), X(3, 4), roles="BC, BC")
row("einsum diagonal", lambda x: torch.einsum("bii->bi", x), "a b b -> a b", X(2, 4, 4))
row("einsum trace", lambda x: torch.einsum("ii->", x), "a a -> ()", X(4, 4), roles="cc")
row("einsum summed", lambda x: torch.einsum("ij->j", x), "a b -> b", X(3, 4), roles="cf")
row("einsum three", lambda x, u, v: torch.einsum("bi,ri,or->bo", x, u, v), "a b, c b, d c -> a d", X(2, 3), P(4, 3), P(5, 4), roles="fc, cc, fc")
row("einsum outer", lambda x, y: torch.einsum("bi,bj->bij", x, y), "a b, a c -> a b c", X(2, 3), X(2, 4))
row("einsum attention", lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k), "a b c d, a e c d -> a c b e", X(2, 3, 4, 5), X(2, 6, 4, 5), roles="BFBC, BFBC")
row("einsum stretched", lambda x, y: torch.einsum("bi,bi->b", x, y), "a b, a 1 -> a", X(3, 4), X(3, 1), roles="BC, BC")

attend = F.scaled_dot_product_attention
row("sdpa", attend, "a b c d, a b e~ d, a b e~ f -> a b c f", X(2, 3, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 6), roles="BB.C, BB.C, ..CF")
row("sdpa scale", lambda q, k, v: attend(q, k, v, scale=0.3), "a b c d, a b e~ d, a b e~ f -> a b c f", X(2, 3, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 6), roles="BB.C, BB.C, ..CF")
row("sdpa causal", lambda q, k, v: attend(q, k, v, is_causal=True), "a b 4 c, a b 5 c, a b 5 d -> a b 4 d", X(2, 3, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 6), roles="BB.C, BB.C, ..CF")
row("sdpa rank three", attend, "a b c, a d~ c, a d~ e -> a b e", X(2, 4, 8), X(2, 5, 8), X(2, 5, 6), roles="B.C, B.C, .CF")
row("sdpa ALiBi", lambda q, k, v, m: attend(q, k, v, m), "a b c d, a b e~ d, a b e~ f, b c e~ -> a b c f", X(2, 3, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 6), P(3, 4, 5), roles="BB.C, BB.C, ..CF, ...")
row("sdpa mask", lambda q, k, v, m: attend(q, k, v, m), "a b c d, a b e~ d, a b e~ f, a 1 1 e~ -> a b c f", X(2, 3, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 6), X(2, 1, 1, 5), roles="BB.C, BB.C, ..CF, ....")
row("sdpa grouped", lambda q, k, v: attend(q, k, v, enable_gqa=True), "a b*c d e, a b f~ e, a b f~ g -> a b*c d g", X(2, 6, 4, 8), X(2, 3, 5, 8), X(2, 3, 5, 7), roles="BB.C, BB.C, ..CF")
row("sdpa one key head", attend, "a b c d, a 1 e~ d, a 1 e~ f -> a b c f", X(2, 3, 4, 8), X(2, 1, 5, 8), X(2, 1, 5, 6), roles="BB.C, BB.C, ..CF")

# ── convolutions and space ───────────────────────────────────────────────────────────────────────────────────────────

row("conv1d", F.conv1d, "a b 9, c b 3, c -> a c 7", X(2, 4, 9), P(6, 4, 3), P(6), roles=".c., fc., .")
row("conv1d unbatched", F.conv1d, "a 9, b a 3 -> b 7", X(4, 9), P(6, 4, 3), roles="c., fc.")
row("conv1d of points", F.conv1d, "a b c, d b 1, d -> a d c", X(2, 4, 5), P(6, 4, 1), P(6), roles=".c., fc., .")
row("conv1d of points, with strides", lambda x, w: F.conv1d(x, w, stride=2), "a b 9, c b 1 -> a c 5", X(2, 4, 9), P(6, 4, 1), roles=".c., fc.")
row("conv1d of points, padded", lambda x, w: F.conv1d(x, w, padding=1), "a b 5, c b 1 -> a c 7", X(2, 4, 5), P(6, 4, 1), roles=".c., fc.")
row("conv1d same", lambda x, w: F.conv1d(x, w, padding="same"), "a b 9, c b 3 -> a c 9", X(2, 4, 9), P(6, 4, 3), roles=".c., fc.")
row("conv1d grouped", lambda x, w: F.conv1d(x, w, groups=2), "a b*c 9, b*d c 3 -> a b*d 7", X(2, 8, 9), P(6, 4, 3), roles=".c., fc.")
row("conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), "a b 7 7, c b 3 3, c -> a c 4 4", X(2, 4, 7, 7), P(6, 4, 3, 3), P(6), roles=".c.., fc.., .")
row("conv2d of rows", lambda x, w: F.conv2d(x, w, padding=(0, 1)), "a b c 7, d b 1 3 -> a d c 7", X(2, 4, 5, 7), P(6, 4, 1, 3), roles=".c.., fc..")
row("conv2d grouped", lambda x, w, b: F.conv2d(x, w, b, groups=2), "a b*c 5 5, b*d c 3 3, b*d -> a b*d 3 3", X(2, 8, 5, 5), P(6, 4, 3, 3), P(6), roles=".c.., fc.., .")
row("conv2d depthwise", lambda x, w, b: F.conv2d(x, w, b, groups=4), "a b 5 5, b 1 3 3, b -> a b 3 3", X(2, 4, 5, 5), P(4, 1, 3, 3), P(4), roles=".c.., fc.., .")
row("conv2d depth multiplier", lambda x, w: F.conv2d(x, w, groups=4), "a b 5 5, b*c 1 3 3 -> a b*c 3 3", X(2, 4, 5, 5), P(12, 1, 3, 3), roles=".c.., fc..")
row("conv3d", F.conv3d, "a b 4 4 4, c b 2 2 2 -> a c 3 3 3", X(2, 3, 4, 4, 4), P(5, 3, 2, 2, 2), roles=".c..., fc...")
row("conv_transpose1d", F.conv_transpose1d, "a b 5, b c 3, c -> a c 7", X(2, 4, 5), P(4, 6, 3), P(6), roles=".c., cf., .")
row("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), "a b 3 3, b c 2 2, c -> a c 6 6", X(2, 4, 3, 3), P(4, 6, 2, 2), P(6), roles=".c.., cf.., .")
row("conv_transpose2d grouped", lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2), "a b*c 3 3, b*c d 2 2, b*d -> a b*d 4 4", X(2, 8, 3, 3), P(8, 3, 2, 2), P(6), roles=".c.., cf.., .")
row("conv_transpose3d", F.conv_transpose3d, "a b 3 3 3, b c 2 2 2 -> a c 4 4 4", X(2, 3, 3, 3, 3), P(3, 5, 2, 2, 2), roles=".c..., cf...")
row("convolution", lambda x, w: aten.convolution(x, w, None, [1], [0], [1], False, [0], 2), "a b*c 9, b*d c 3 -> a b*d 7", X(2, 8, 9), P(6, 4, 3), roles=".c., fc.")
row("convolution transposed", lambda x, w: aten.convolution(x, w, None, [1], [0], [1], True, [0], 2), "a b*c 9, b*c d 3 -> a b*d 11", X(2, 8, 9), P(8, 3, 3), roles=".c., cf.")
row("avg_pool1d", lambda x: F.avg_pool1d(x, 2), "a b 6 -> a b 3", X(2, 4, 6))
row("max_pool1d", lambda x: F.max_pool1d(x, 2), "a b 6 -> a b 3", X(2, 4, 6))
row("max_pool1d indices", lambda x: F.max_pool1d(x, 2, return_indices=True), "a b 6 -> a b 3, a b 3", X(2, 4, 6))
row("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), "a b 7 -> a b 3", X(2, 4, 7))
row("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3), "a b 7 -> a b 3", X(2, 4, 7))
row("avg_pool2d", lambda x: F.avg_pool2d(x, 2), "a b 6 6 -> a b 3 3", X(2, 4, 6, 6))
row("avg_pool2d unbatched", lambda x: F.avg_pool2d(x, 2), "a 6 6 -> a 3 3", X(4, 6, 6))
row("max_pool2d", lambda x: F.max_pool2d(x, 2), "a b 6 6 -> a b 3 3", X(2, 4, 6, 6))
row("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), "a b 5 5 -> a b 1 1", X(2, 4, 5, 5))
row("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), "a b 6 6 -> a b 6 6", X(2, 4, 6, 6))
row("max_unpool2d of two", lambda x, i: F.max_unpool2d(x, i + torch.arange(9).view(3, 3), 2), "a b 3 3, a b 3 3 -> a b 6 6", X(2, 4, 3, 3), I(2, 4, 3, 3, below=1))
row("avg_pool3d", lambda x: F.avg_pool3d(x, 2), "a b 4 4 4 -> a b 2 2 2", X(2, 3, 4, 4, 4))
row("max_pool3d", lambda x: F.max_pool3d(x, 2), "a b 4 4 4 -> a b 2 2 2", X(2, 3, 4, 4, 4))
row("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), "a b 4 4 4 -> a b 2 2 2", X(2, 3, 4, 4, 4))
row("max_unpool3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), "a b 4 4 4 -> a b 4 4 4", X(2, 3, 4, 4, 4))
row("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), "a b 4 4 4 -> a b 2 2 2", X(2, 3, 4, 4, 4))
row("interpolate linear", lambda x: F.interpolate(x, 7, mode="linear"), "a b 4 -> a b 7", X(2, 3, 4))
row("interpolate nearest", lambda x: F.interpolate(x, scale_factor=2), "a b 4 4 -> a b 8 8", X(2, 3, 4, 4))
row("interpolate bilinear", lambda x: F.interpolate(x, (6, 5), mode="bilinear"), "a b 4 4 -> a b 6 5", X(2, 3, 4, 4))
row("interpolate bicubic", lambda x: F.interpolate(x, (6, 5), mode="bicubic", antialias=True), "a b 4 4 -> a b 6 5", X(2, 3, 4, 4))
row("interpolate trilinear", lambda x: F.interpolate(x, 5, mode="trilinear"), "a b 4 4 4 -> a b 5 5 5", X(2, 3, 4, 4, 4))
row("interpolate nearest-exact 3d", lambda x: F.interpolate(x, 5, mode="nearest-exact"), "a b 4 4 4 -> a b 5 5 5", X(2, 3, 4, 4, 4))
row("interpolate nearest-exact", lambda x: F.interpolate(x, 7, mode="nearest-exact"), "a b 4 -> a b 7", X(2, 3, 4))
row("reflection_pad2d", lambda x: aten.reflection_pad2d(x, [1, 1, 2, 0]), "a b 4 4 -> a b 6 6", X(2, 3, 4, 4))
row("replication_pad1d", lambda x: aten.replication_pad1d(x, [1, 1]), "a b 4 -> a b 6", X(2, 3, 4))
row("grid_sample", lambda x, g: F.grid_sample(x, g, align_corners=False), "a b 4 4, a 3 5 2 -> a b 3 5", X(2, 3, 4, 4), X(2, 3, 5, 2))
row("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), "a b*4 3 3 -> a b 6 6", X(2, 12, 3, 3))
row("pixel_shuffle by three", lambda x: F.pixel_shuffle(x, 3), "a b*9 2 2 -> a b 6 6", X(2, 18, 2, 2))
row("pixel_unshuffle by three", lambda x: F.pixel_unshuffle(x, 3), "a b 6 6 -> a b*9 2 2", X(2, 2, 6, 6))
row("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), "a b 6 6 -> a b*4 3 3", X(2, 3, 6, 6))
row("channel_shuffle", lambda x: F.channel_shuffle(x, 3), "a b*c d e -> a c*b d e", X(2, 12, 5, 7))
row("unfold windows", lambda x: F.unfold(x, 2), "a b 4 4 -> a b*4 9", X(2, 3, 4, 4))
row("fold", lambda x: F.fold(x, (4, 4), 2), "a b*4 9 -> a b 4 4", X(2, 12, 9))
row("fold unbatched", lambda x: F.fold(x, (4, 4), 2), "a*4 9 -> a 4 4", X(12, 9))
row("pad channels", lambda x: F.pad(x, (0, 0, 1, 2)), "a b c -> a 1+b+2 c", X(2, 4, 5))
row("pad both", lambda x: F.pad(x, (1, 0, 0, 2), value=3.0), "a b c -> a b+2 1+c", X(2, 4, 5))
row("pad negative", lambda x: F.pad(x, (-1, 2)), "a 5 -> a 6", X(2, 5))
row("pad negative behind", lambda x: F.pad(x, (2, -1)), "a 5 -> a 6", X(2, 5))
row("pad one dimension of three", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), "a b c -> 1+a+2 b c", X(3, 4, 5))
row("pad reflect", lambda x: F.pad(x, (1, 2), mode="reflect"), "a b 5 -> a b 8", X(2, 3, 5))
row("pad reflect 2d", lambda x: F.pad(x, (1, 2, 0, 0), mode="reflect"), "a b c 5 -> a b c 8", X(2, 3, 4, 5))
row("pad circular", lambda x: F.pad(x, (1, 2), mode="circular"), "a b 5 -> a b 8", X(2, 3, 5))
row("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [2, 0], 1.0), "a b -> a 2+b", X(2, 5))

# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────────

row("view splits", lambda x: x.view(2, 3, 4), "a b*c -> a b c", X(2, 12))
row("view inferred", lambda x: x.reshape(2, -1, 4), "a b*c -> a b c", X(2, 12))
row("view joins", lambda x: x.view(2, 12), "a b c -> a b*c", X(2, 3, 4))
row("view regroups", lambda x: x.view(6, 5, 4), "a b c*d -> a*b c d", X(2, 3, 20))
row("view splits and joins", lambda x: x.view(2, 6, 5), "a b c*d -> a b*c d", X(2, 3, 10))
row("view of ones", lambda x: x.view(1, 6, 1, 1), "a b -> 1 a*b 1 1", X(2, 3))
row("view conflict", lambda x: x.view(6, 4), "4 3*2 -> a b", X(4, 6))
row("view conflict of one of two", lambda x: (x.view(2, 3, 4), x.view(2, 4, 3)), "a 3*4 -> a 3 4, a b c", X(2, 12))
row("view conflict written to", lambda x: (x * 2).view(6, 4).add_(1), "4 3*2 -> 6 2*2", X(4, 6))
row("view conflict of a parameter", lambda p: p.view(6, 4), "4 3*2 -> 6 2*2", P(4, 6))
row("view then back", lambda x: x.view(2, 3, 4).transpose(1, 2).reshape(2, 12), "a b*c -> a c*b", X(2, 12))
row("view of half", lambda x: x.view(2, 2, 3, 4).sum(1), "a b*c*d -> a c d", X(2, 24))
row("reshape interleaved", lambda x: x.reshape(2, 6, 2).sum(2), "a b*c -> a b", X(2, 12))
row("unsafe_view", lambda x: aten._unsafe_view(x, [2, 3, 4]), "a b*c -> a b c", X(2, 12))
row("reshape_copy", lambda x: aten._reshape_copy(x, [2, 3, 4]), "a b*c -> a b c", X(2, 12))
row("flatten", lambda x: torch.flatten(x, 1, 2), "a b c d -> a b*c d", X(2, 3, 4, 5))
row("flatten all", torch.flatten, "a b -> a*b", X(2, 3))
row("ravel", torch.ravel, "a b -> a*b", X(2, 3))
row("view_as", lambda x, y: x.view_as(y), "a b*c, d e f -> a b c", X(2, 12), X(2, 3, 4))
row("reshape_as", lambda x, y: x.reshape_as(y), "a*b c, d e -> a b*c", X(6, 4), X(2, 12))
row("view_as what data chose", lambda x, m: _as_it_is(x[m]).sum(0), "4 a, 4 -> a", X(4, 3), B(4))
row("unflatten", lambda x: x.unflatten(1, (3, 4)), "a b*c -> a b c", X(2, 12))
row("unflatten negative", lambda x: x.unflatten(-2, (3, -1)), "a b*c d -> a b c d", X(2, 12, 5))
row("permute", lambda x: x.permute(2, 0, -2), "a b c -> c a b", X(2, 3, 4))
row("transpose", lambda x: x.transpose(0, -1), "a b c -> c b a", X(2, 3, 4))
row("swapaxes", lambda x: x.swapaxes(0, 1), "a b c -> b a c", X(2, 3, 4))
row("swapdims", lambda x: x.swapdims(2, 1), "a b c -> a c b", X(2, 3, 4))
row("t", lambda x: x.t(), "a b -> b a", X(2, 3))
row("t of a vector", lambda x: x.t(), "a -> a", X(3))
row("numpy_T", lambda x: aten.numpy_T(x), "a b c -> c b a", X(2, 3, 4))
row("mT", lambda x: x.mT, "a b c -> a c b", X(2, 3, 4))
row("adjoint", lambda x: x.adjoint(), "a b c -> a c b", X(2, 3, 4))
row("movedim", lambda x: x.movedim(0, 2), "a b c d -> b c a d", X(2, 3, 4, 5))
row("movedim several", lambda x: x.movedim((0, -1), (-2, 0)), "a b c d -> d b a c", X(2, 3, 4, 5))
row("unsqueeze", lambda x: x.unsqueeze(1), "a b -> a 1 b", X(2, 3))
row("unsqueeze in place", lambda x: (x * 2).unsqueeze_(0), "a b -> 1 a b", X(2, 3))
row("transpose in place", lambda x: (x * 2).transpose_(0, 1), "a b -> b a", X(3, 3))
row("unsqueeze last", lambda x: x.unsqueeze(-1), "a b -> a b 1", X(2, 3))
row("squeeze", lambda x: x.squeeze(), "a 1 b 1 -> a b", X(2, 1, 3, 1))
row("squeeze one", lambda x: x.squeeze(1), "a 1 b 1 -> a b 1", X(2, 1, 3, 1))
row("squeeze some", lambda x: x.squeeze((1, -1)), "a 1 b 1 -> a b", X(2, 1, 3, 1))
row("squeeze a long one", lambda x: x.squeeze(0), "a b -> a b", X(2, 3))
row("expand", lambda x: x.expand(2, 3, 4), "1 a -> b c a", X(1, 4))
row("expand kept", lambda x: x.expand(-1, 3, -1), "a 1 b -> a c b", X(2, 1, 4))
row("expand then joined", lambda x: x[:, :, None].expand(2, 3, 4, 5).reshape(2, 12, 5), "a b c -> a b*d c", X(2, 3, 5))
row("broadcast_to", lambda x: torch.broadcast_to(x, (3, 4)), "a -> b a", X(4))
row("expand_as", lambda x, y: x.expand_as(y), "a 1, b a c -> b a c", X(3, 1), X(2, 3, 4))
row("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), "a 1, b -> a b, a b", X(3, 1), X(4))
row("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), "a, b -> a b, a b", X(3), X(4))
row("meshgrid xy", lambda x, y: torch.meshgrid(x, y, indexing="xy"), "a, b -> b a, b a", X(3), X(4))
row("meshgrid xy of three", lambda x, y, z: torch.meshgrid(x, y, z, indexing="xy"), "a, b, c -> b a c, b a c, b a c", X(3), X(4), X(5))
row("repeat", lambda x: x.repeat(2, 3), "a b -> c*a d*b", X(2, 4))
row("repeat ranks", lambda x: x.repeat(2, 1, 3), "a b -> c a d*b", X(2, 4))
row("tile", lambda x: x.tile(3), "a b -> a c*b", X(2, 4))
row("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1), "a b -> a b*c", X(2, 4))
row("repeat_interleave size", lambda x: x.repeat_interleave(3, dim=-1, output_size=12), "a b -> a b*c", X(2, 4))
row("repeat_interleave flat", lambda x: x.repeat_interleave(3), "2 4 -> 24", X(2, 4))
row("repeat_interleave data", lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 0, 1]), dim=1, output_size=4), "2 4 -> 2 4", X(2, 4))
row("flip", lambda x: x.flip(1), "a 4 b -> a 4 b", X(2, 4, 3))
row("roll", lambda x: x.roll(2, 2), "a b c+d -> a b d+c", X(2, 4, 5))
row("roll back", lambda x: x.roll((-2, 1), (1, 2)), "a b+c d+1 -> a c+b 1+d", X(2, 7, 4))
row("roll around", lambda x: x.roll(4, 1), "a 3 -> a 3", X(2, 3))
row("rot90", lambda x: x.rot90(1, (1, 2)), "a 4 3 b -> a 3 4 b", X(2, 4, 3, 5))
row("roll flat", lambda x: x.roll(1), "2 4 -> 2 4", X(2, 4))
row("tril", lambda x: x.tril(), "a 4 3 -> a 4 3", X(2, 4, 3))
row("triu", lambda x: x.triu(1), "a 4 3 -> a 4 3", X(2, 4, 3))
row("diff", lambda x: x.diff(dim=1), "a 4 b -> a 3 b", X(2, 4, 3))
row("diff prepended", lambda x, y: x.diff(dim=1, prepend=y), "2 4, 2 1 -> 2 4", X(2, 4), X(2, 1))
row("cumprod", lambda x: x.cumprod(1), "a 4 b -> a 4 b", X(2, 4, 3))
row("fft", lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1)), "a 4 b -> a 3 b 2", X(2, 4, 3))
row("fft of planes", lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(4, 6)), "a b 4 6 -> a b 4 6", X(2, 3, 4, 6))
row("fft shifted", lambda x: torch.fft.fftshift(x, dim=1), "a 4 b -> a 4 b", X(2, 4, 3))
row("unfold", lambda x: x.unfold(1, 3, 1), "a 6 b -> a 4 b 3", X(2, 6, 5))
row("as_strided windows", lambda x: (x * 2).as_strided((2, 3, 4, 3), (24, 6, 3, 1)), "a 8 b -> a 3 4 b", X(2, 8, 3))
row("as_strided over two", lambda x: (x * 2).as_strided((2, 3, 4, 3), (24, 6, 3, 1)), "a 2 4 b -> a 3 4 b", X(2, 2, 4, 3))
row("as_strided of a transposed", lambda x: (x * 2).transpose(0, 1).as_strided((2, 3, 4, 3), (3, 12, 6, 1)), "8 a b -> a 3 4 b",
    X(8, 2, 3))
row("as_strided from elsewhere", lambda x: (x * 2).as_strided((2, 2), (4, 1), 1), "3 4 -> 2 2", X(3, 4))
row("diagonal", lambda x: x.diagonal(0, 1, 2), "a b b c -> a c b", X(2, 3, 3, 4))
row("diagonal beside", lambda x: x.diagonal(1), "3 3 -> 2", X(3, 3))
row("diag_embed", lambda x: torch.diag_embed(x, 0, 0, 2), "a b -> b a b", X(2, 3))
row("diag_embed beside", lambda x: torch.diag_embed(x, 1), "a 3 -> a 4 4", X(2, 3))
row("view_as_complex", lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j), "a b 2 -> a b 2", X(3, 4, 2))

# ── concatenation ────────────────────────────────────────────────────────────────────────────────────────────────────

row("cat", lambda x, y: torch.cat((x, y), 1), "a b, a c -> a b+c", X(2, 3), X(2, 4))
row("cat negative", lambda x, y: torch.cat((x, y), -2), "a b c, a d c -> a b+d c", X(2, 3, 5), X(2, 4, 5))
row("cat same", lambda x: torch.cat((x, x), -1), "a b -> a b+b", X(2, 3))
row("cat keyword axis", lambda x, y: torch.concatenate((x, y), axis=0), "a b, c b -> a+c b", X(2, 3), X(4, 3))
row("cat single", lambda x: torch.cat((x,), 0), "a b -> a b", X(2, 3))
row("cat a one", lambda x, y: torch.cat((x, y), 1), "a 1, a b -> a 1+b", X(2, 1), X(2, 3))
row("cat nothing", lambda x, y: torch.cat((torch.zeros(0), x, y), 1), "a b, a c -> a b+c", X(2, 3), X(2, 4))
row("cat frozen", lambda x, y: torch.cat((x.flip(0), y.flip(0)), 0), "2 a, 3 a -> 5 a", X(2, 4), X(3, 4))
row("cat contracted", lambda x, y, w: F.linear(torch.cat((x, y), 1), w), "a b, a c, d b+c -> a d", X(2, 3), X(2, 4), P(5, 7), roles=".., .., fc")
row("cat of products", lambda x, y: torch.cat((x.flatten(1), y), 1).view(2, 5, 3), "a b c, a d*c -> a b+d c", X(2, 2, 3), X(2, 9))
row("stack", lambda x, y: torch.stack((x, y), 1), "a b, a b -> a 2 b", X(3, 4), X(3, 4))
row("stack last", lambda x, y: torch.stack((x, y), -1), "a b, a b -> a b 2", X(3, 4), X(3, 4))
row("hstack", lambda x, y: torch.hstack((x, y)), "a b, a c -> a b+c", X(2, 3), X(2, 4))
row("hstack of three dimensions", lambda x, y: torch.hstack((x, y)), "a b c, a d c -> a b+d c", X(2, 3, 5), X(2, 4, 5))
row("hstack vectors", lambda x, y: torch.hstack((x, y)), "a, b -> a+b", X(3), X(4))
row("vstack", lambda x, y: torch.vstack((x, y)), "a, b a -> 1+b a", X(3), X(4, 3))
row("split", lambda x: x.split(3, 1), "a b+c+d e -> a b e, a c e, a d e", X(2, 8, 4))
row("split even", lambda x: torch.split(x, 4, -1), "a b+c -> a b, a c", X(2, 8))
row("split_with_sizes", lambda x: x.split([2, 5], -1), "a b+c -> a b, a c", X(3, 7))
row("chunk", lambda x: x.chunk(2, 1), "a b+c -> a b, a c", X(2, 8))
row("chunk uneven", lambda x: x.chunk(3, -1), "a b+c+d -> a b, a c, a d", X(2, 8))
row("chunk few", lambda x: x.chunk(4, 1), "a b+c+d -> a b, a c, a d", X(2, 6))
row("tensor_split", lambda x: x.tensor_split(3, 1), "a b+c+d -> a b, a c, a d", X(2, 8))
row("tensor_split at", lambda x: x.tensor_split((2, 5), 1), "a b+c+d -> a b, a c, a d", X(2, 8))
row("split a product", lambda x: x.flatten(1).split(8, 1), "a b+c+1 d -> a b*d, a c*d, a d", X(2, 5, 4))
row("split inside a product", lambda x: x.flatten(1).split((6, 14), 1), "a 1+1+b c+d -> a c+d+c, a d+b*(c+d)", X(2, 5, 4))
row("split frozen", lambda x: x.flip(1).split(4, 1), "a 8 -> a 4, a 4", X(2, 8))
row("unsafe_chunk", lambda x: x.unsafe_chunk(2, 1), "a b+c -> a b, a c", X(2, 8))
row("slice", lambda x: x[:, 2:6], "a b+c+d -> a c", X(2, 9))
row("slice start", lambda x: x[:, 3:], "a b+c -> a c", X(2, 7))
row("slice end", lambda x: x[:, :3], "a b+c -> a b", X(2, 7))
row("slice negative", lambda x: x[:, -5:-2], "a b+c+d -> a c", X(2, 9))
row("slice all but one", lambda x: x[:, :-1], "a b+1 -> a b", X(2, 9))
row("slice everything", lambda x: x[:, 0:9], "a b -> a b", X(2, 9))
row("slice everything negative", lambda x: x[:, -9:], "a b -> a b", X(2, 9))
row("slice twice", lambda x: (x[:, :4], x[:, 4:]), "a b+c -> a b, a c", X(2, 9))
row("slice overlapping", lambda x: x[:, :6] + x[:, 2:8], "a b+b+b+b -> a b+b+b", X(2, 8))
row("slice steps", lambda x: x[:, ::2], "a b*2 -> a b", X(2, 8))
row("slice steps odd", lambda x: x[:, 1::2], "a b*2 -> a b", X(2, 8))
row("slice steps short", lambda x: x[:, 0:7:2], "a b*2 -> a b", X(2, 8))
row("slice steps negative", lambda x: x[:, -7::2], "a b*2 -> a b", X(2, 8))
row("slice steps uneven", lambda x: x[:, ::2], "a 7 -> a 4", X(2, 7))
row("slice steps of a part", lambda x: x[:, 1:8:3], "a b*3+c -> a b", X(2, 11))
row("slice steps late", lambda x: x[:, 2::2], "a 8 -> a 3", X(2, 8))
row("slice where data says", lambda x, n: _first(x, n.item()).sum(0), "4 a, () -> a", X(4, 3), I(below=4))
row("slice frozen", lambda x: x.flip(1)[:, 2:6], "a 9 -> a 4", X(2, 9))
row("narrow", lambda x: x.narrow(1, 2, 4), "a b+c+d -> a c", X(2, 9))
row("narrow everything", lambda x: x.narrow(1, 0, 9), "a b -> a b", X(2, 9))
row("narrow negative", lambda x: x.narrow(-1, -6, 4), "a b+c+d -> a c", X(2, 9))
row("rotate halves", lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1) + x, "a b+b -> a b+b", X(2, 8))
row("rotate pairs", lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) + x, "a b*2 -> a b*2", X(2, 8))
row("select", lambda x: x[:, 1], "a 1+1+b c -> a c", X(2, 4, 3))
row("select first", lambda x: x[:, 0], "a 1+b c -> a c", X(2, 4, 3))
row("select last", lambda x: x[..., -1], "a b c+1 -> a b", X(2, 4, 3))
row("select negative", lambda x: x.select(-1, -3), "a b c+1+d -> a b", X(2, 4, 7))
row("select of a product", lambda x: x.view(2, 5, 3)[:, 2], "a b*c+c+d*c -> a c", X(2, 15))
row("select frozen", lambda x: x.flip(1)[:, 2], "a 4 b -> a b", X(2, 4, 3))
row("unbind", lambda x: x.unbind(1), "a 3 b -> a b, a b, a b", X(2, 3, 4))
row("fused qkv", lambda x: x.view(2, 3, 4, 5).unbind(1), "a 3*b*c -> a b c, a b c, a b c", X(2, 60))

# ── normalisation and reductions ─────────────────────────────────────────────────────────────────────────────────────

row("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), "a b c~, c~, c~ -> a b c~", X(2, 3, 4), P(4), P(4))
row("layer_norm two", lambda x, w: F.layer_norm(x, (3, 4), w), "a b~ c~, b~ c~ -> a b~ c~", X(2, 3, 4), P(3, 4))
row("layer_norm bare", lambda x: F.layer_norm(x, (4,)), "a b c~ -> a b c~", X(2, 3, 4))
row("native_layer_norm", lambda x, w, b: aten.native_layer_norm(x, [4], w, b, 1e-5), "a b~, b~, b~ -> a b~, a 1, a 1", X(2, 4), P(4), P(4))
row("rms_norm", lambda x, w: F.rms_norm(x, (4,), w), "a b c~, c~ -> a b c~", X(2, 3, 4), P(4))
row("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), "a b*c~ d~ e~, b*c~, b*c~ -> a b*c~ d~ e~", X(2, 6, 4, 5), P(6), P(6))
row("group_norm single", lambda x, w: F.group_norm(x, 6, w), "a b c~, b -> a b c~", X(2, 6, 4), P(6))
row("group_norm one", lambda x: F.group_norm(x, 1), "a b~ c~ -> a b~ c~", X(2, 6, 4))
row("native_group_norm", lambda x, w, b: aten.native_group_norm(x, w, b, 2, 6, 4, 2, 1e-5)[0], "a 2*3 b~, 2*3, 2*3 -> a 2*3 b~", X(2, 6, 4), P(6), P(6))
row("batch_norm", lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), "a b c, b, b, b, b -> a b c", X(2, 3, 4), X(3), U(3), P(3), P(3))
row("batch_norm training", lambda x, w: F.batch_norm(x, None, None, w, training=True), "a~ b c~, b -> a~ b c~", X(2, 3, 4), P(3))
row("instance_norm by running statistics", lambda x, m, v: F.instance_norm(x, m, v, use_input_stats=False), "a b c, b, b -> a b c", X(2, 3, 4), X(3), U(3))
row("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), "a b c~, b, b -> a b c~", X(2, 3, 4), P(3), P(3))
row("softmax", lambda x: x.softmax(-1), "a b~ -> a b~", X(3, 4))
row("log_softmax", lambda x: x.log_softmax(0), "a~ b -> a~ b", X(3, 4))
row("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), "a b~ c~, a 1 1 -> a b~ c~", P(3, 4, 5), P(3, 1, 1))
row("weight_norm last", lambda v, g: torch._weight_norm(v, g, 1), "a~ b, 1 b -> a~ b", P(3, 4), P(1, 4))
row("weight_norm all", lambda v, g: torch._weight_norm(v, g, -1), "a~ b~, () -> a~ b~", P(3, 4), P())
row("weight_norm interface", lambda v, g: aten._weight_norm_interface(v, g, 0), "a b~, a 1 -> a b~, a 1", P(3, 4), P(3, 1))
row("sum", lambda x: x.sum(1), "a b c -> a c", X(2, 3, 4), roles=".c.")
row("sum kept", lambda x: x.sum((0, -1), keepdim=True), "a b c -> 1 b 1", X(2, 3, 4), roles="c.c")
row("sum all", lambda x: x.sum(), "a b -> ()", X(2, 3), roles="cc")
row("norm", lambda x: x.norm(dim=1), "a b c -> a c", X(2, 3, 4), roles=".c.")
row("linalg norm", lambda x: torch.linalg.norm(x, dim=-1), "a b c -> a b", X(2, 3, 4), roles="..c")
row("norm three", lambda x: torch.linalg.vector_norm(x, 3, dim=-1, keepdim=True), "a b c -> a b 1", X(2, 3, 4), roles="..c")
row("norm one", lambda x: torch.linalg.vector_norm(x, 1, dim=-1), "a b c -> a b", X(2, 3, 4), roles="..c")
row("norm of a half", lambda x: x.norm(0.5, dim=-1), "a b c -> a b", X(2, 3, 4), roles="..c")
row("norm counting", lambda x: torch.linalg.vector_norm(x, 0, dim=-1), "a b c -> a b", X(2, 3, 4), roles="..c")
row("norm below zero", lambda x: torch.linalg.vector_norm(x, -0.5, dim=-1), "a b c~ -> a b", X(2, 3, 4), roles="..c")
row("norm largest", lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1), "a b c -> a b", X(2, 3, 4), roles="..c")
row("norm smallest", lambda x: torch.linalg.vector_norm(x, -float("inf"), dim=-1), "a b c~ -> a b", X(2, 3, 4), roles="..c")
row("normalize", lambda x: F.normalize(x, dim=-1), "a b c -> a b c", X(2, 3, 4), roles="..c")
row("mean", lambda x: x.mean(-1), "a b c~ -> a b", X(2, 3, 4), roles="..c")
row("mean kept", lambda x: x.mean((1, 2), keepdim=True), "a b~ c~ -> a 1 1", X(2, 3, 4), roles=".cc")
row("mean all", lambda x: x.mean(), "a~ b~ -> ()", X(2, 3), roles="cc")
row("var", lambda x: x.var(1, unbiased=False), "a b~ c -> a c", X(2, 3, 4), roles=".c.")
row("std", lambda x: x.std(1, unbiased=False), "a b~ c -> a c", X(2, 3, 4), roles=".c.")
row("var_mean", lambda x: torch.var_mean(x, 1, correction=0), "a b~ c -> a c, a c", X(2, 3, 4), roles=".c.")
row("amax", lambda x: x.amax(-1, keepdim=True), "a b~ -> a 1", X(3, 4), roles=".c")
row("amin", lambda x: x.amin(0), "a~ b -> b", X(3, 4), roles="c.")
row("nanmean", lambda x: x.nanmean(1), "a b~ -> a", X(3, 4), roles=".c")
row("aminmax", lambda x: torch.aminmax(x, dim=1), "a b~ -> a, a", X(3, 4), roles=".c")
row("nothing regrouped", lambda x: x.sum(0) + x[:0].reshape(2, 0).sum(), "a 4 -> 4", X(3, 4), roles="c.")
row("nothing repeated", lambda x: torch.cat((x, x[:0].repeat(2, 1))), "a 4 -> a 4", X(3, 4))
row("prod", lambda x: x.prod(1), "a b~ -> a", X(3, 4), roles=".c")
row("logsumexp", lambda x: x.logsumexp(1), "a b~ -> a", X(3, 4), roles=".c")
row("any", lambda x: x.any(1), "a b~ -> a", B(3, 4), roles=".c")
row("all", lambda x: x.all(1, keepdim=True), "a b~ -> a 1", B(3, 4), roles=".c")
row("mode", lambda x: x.mode(1), "a b~ -> a, a", X(3, 5), roles=".c")
row("median", lambda x: x.median(1), "a b~ -> a, a", X(3, 5), roles=".c")
row("max", lambda x: x.max(1), "a b~ -> a, a", X(3, 4))
row("max all", lambda x: x.max(), "a~ b~ -> ()", X(3, 4))
row("max of two", torch.max, "a b, b -> a b", X(3, 4), X(4))
row("argmax", lambda x: x.argmax(1), "a b~ -> a", X(3, 4))
row("argmin kept", lambda x: x.argmin(-1, keepdim=True), "a b~ -> a 1", X(3, 4))
row("argmax all", lambda x: x.argmax(), "3 4 -> ()", X(3, 4))
row("std_mean", lambda x: torch.std_mean(x, 1, keepdim=True), "a b~ c -> a 1 c, a 1 c", X(2, 3, 4), roles=".c.")
row("cummax", lambda x: x.cummax(1), "a b~ c -> a b~ c, a b~ c", X(2, 3, 4))
row("mse_loss", F.mse_loss, "a~ b~, a~ b~ -> ()", X(3, 4), P(3, 4))
row("l1_loss summed", lambda x, y: F.l1_loss(x, y, reduction="sum"), "a b, a b -> ()", X(3, 4), X(3, 4))
row("huber_loss of each", lambda x, y: F.huber_loss(x, y, reduction="none"), "a b, a b -> a b", X(3, 4), X(3, 4))
row("cumsum", lambda x: x.cumsum(1), "a b c -> a b c", X(2, 4, 3), roles=".c.")
row("logcumsumexp", lambda x: x.logcumsumexp(-1), "a b~ -> a b~", X(2, 4), roles=".c")
row("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), "a b c, a b c -> a b", X(2, 3, 4), X(2, 3, 4), roles="..c, ..c")
row("cosine_similarity stretched", lambda x, y: F.cosine_similarity(x, y, dim=1), "a b c, 1 b 1 -> a c", X(2, 3, 4), X(1, 3, 1), roles=".c., .c.")
row("cosine_similarity ranks", lambda x, y: F.cosine_similarity(x, y, dim=-1), "a b, b -> a", X(2, 3), X(3), roles=".c, c")

# ── tensors from nothing ─────────────────────────────────────────────────────────────────────────────────────────────

row("zeros and ones", lambda x: x + torch.zeros(3, 4) - torch.ones(4), "a b -> a b", X(3, 4))
row("full", lambda x: x * torch.full((3, 1), 2.0), "a b -> a b", X(3, 4))
row("new", lambda x: x + x.new_zeros(4) + x.new_ones(3, 4) + x.new_full((4,), 2.0), "a b -> a b", X(3, 4))
row("filled then contracted", lambda x: x @ torch.ones(4, 5), "a b -> a c", X(3, 4), roles="fc")
row("scalar_tensor", lambda x: x * torch.scalar_tensor(2.0), "a b -> a b", X(3, 4))
row("empty", lambda x: x + torch.empty(4) + x.new_empty(3, 4), "a b -> a b", X(3, 4), values=False)
row("rand", lambda x: x + torch.rand(4) * torch.randn(3, 4), "a b -> a b", X(3, 4), values=False)
row("arange", lambda x: x * torch.arange(4), "a b -> a b", X(3, 4))
row("arange computed with", lambda x: x + 2 ** -torch.arange(8.0)[1::2].view(2, 2).tril(), "a b -> a b", X(2, 2))
row("arange used and computed with", lambda x, y: ((n := torch.arange(4.0)) * x, torch.outer(n + 1, n.flip(0)) @ y), "a, b -> a, c", X(4), X(4), roles="., c")
row("arange of constants", lambda x: x * (torch.ones(4) + torch.arange(4) * torch.tensor([3, 1, 4, 1])), "a b -> a b", X(3, 4))
row("arange written to", lambda x: torch.arange(4.0).add_(x), "4 -> 4", X(4))
row("linspace", lambda x: x * torch.linspace(0, 1, 4), "a b -> a b", X(3, 4))
row("eye", lambda x: x @ torch.eye(4, dtype=torch.float64), "a b -> a c", X(3, 4), roles="fc")

# ── indexing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

row("embedding", lambda i, w: F.embedding(i, w), "a b, 9 c -> a b c", I(2, 3, below=9), P(9, 4), roles=".., .f")
row("embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="sum"), "2 3, 9 a -> 2 a", I(2, 3, below=9), P(9, 4), roles=".., .f")
row("index_select", lambda x, i: x.index_select(1, i), "a 4 b, c -> a c b", X(2, 4, 3), I(5, below=4))
row("index_select scalar", lambda x, i: x.index_select(1, i), "a 4, () -> a 1", X(2, 4), I(below=4))
row("gather", lambda x, i: x.gather(1, i), "a 4, a b -> a b", X(2, 4), I(2, 3, below=4))
row("gather in part", lambda x, i: x.gather(1, i), "5 4, 3 a -> 3 a", X(5, 4), I(3, 6, below=4))
row("take_along_dim", lambda x, i: torch.take_along_dim(x, i, 1), "a 4 b, a c b -> a c b", X(2, 4, 3), I(2, 5, 3, below=4))
row("take_along_dim stretched", lambda x, i: torch.take_along_dim(x, i, 1), "a 4 1, 1 b c -> a b c", X(2, 4, 1), I(1, 5, 3, below=4))
row("scatter", lambda x, i, y: x.scatter(1, i, y), "a 4, a 3, a 3 -> a 4", X(2, 4), I(2, 3, below=4), X(2, 3))
row("scatter value", lambda x, i: x.scatter(1, i, 2.0), "a 4, a 3 -> a 4", X(2, 4), I(2, 3, below=4))
row("scatter in part", lambda x, i, y: x.scatter(1, i, y), "5 4, 3 2, 3 6 -> 5 4", X(5, 4), I(3, 2, below=4), X(3, 6))
row("scatter_add", lambda x, i, y: x.scatter_add(1, i, y), "a 4 b, a c b, a c b -> a 4 b", X(2, 4, 3), I(2, 5, 3, below=4), X(2, 5, 3), roles="..., ..., .c.")
row("scatter_reduce", lambda x, i, y: x.scatter_reduce(1, i, y, "amax"), "a 4, a 3, a 3 -> a 4", X(2, 4), I(2, 3, below=4), X(2, 3))
row("index_add", lambda x, i, y: x.index_add(1, i, y), "a 4 b, c, a c b -> a 4 b", X(2, 4, 3), I(5, below=4), X(2, 5, 3), roles="..., ., .c.")
row("index_copy", lambda x, y: x.index_copy(0, torch.tensor([2, 0]), y), "4 a, 2 a -> 4 a", X(4, 3), X(2, 3))
row("index_fill", lambda x, i: x.index_fill(1, i, 2.0), "a 4, 2 -> a 4", X(3, 4), I(2, below=4))
row("index", lambda x, i: x[:, i], "a 4 b, c d -> a c d b", X(2, 4, 3), I(5, 6, below=4))
row("index adjacent", lambda x, i, j: x[:, i, j], "a 4 3 b, c 1, d -> a c d b", X(2, 4, 3, 5), I(6, 1, below=4), I(7, below=3))
row("index apart", lambda x, i, j: x[i, :, j], "4 a 3 b, c, c -> c a b", X(4, 2, 3, 5), I(6, below=4), I(6, below=3))
row("index scalar", lambda x, i: aten.index(x, [None, i]), "a 4 b, () -> a b", X(2, 4, 3), I(below=4))
row("index by a mask", lambda x, m: x[m].sum(0), "4 a, 4 -> a", X(4, 3), B(4))
row("index by a mask behind", lambda x, m: x[:, m].sum(1), "a 4 b, 4 -> a b", X(2, 4, 3), B(4))
row("index by a square mask", lambda x, m: x[m].sum(0), "4 5 a, 4 5 -> a", X(4, 5, 3), B(4, 5))
row("index by masks", lambda x, m, i: x[m, i].sum(), "4 5, 4, 1 -> ()", X(4, 5), B(4), I(1, below=5))
row("nonzero", lambda x: torch.where(x)[0].sum(), "4 -> ()", B(4))
row("index table", lambda i, w: w[i.view(-1)].view(3, 3, 5), "a b, 9 c -> a b c", I(3, 3, below=9), P(9, 5))
row("unsafe_index", lambda x, i: aten._unsafe_index(x, [None, i]), "a 4, b -> a b", X(2, 4), I(5, below=4))
row("index by a list", lambda x: x[:, [-2, 1, 2]], "a 1+b+c+1+1 -> a 1+b", X(2, 7))
row("index by a long list", lambda x: x[:, [4, 2, 0, 1, 3, 1]], "a 7 -> a b", X(2, 7))
row("index_put", lambda x, i, y: x.clone().index_put((i,), y), "4 a, 2, 2 a -> 4 a", X(4, 3), I(2, below=4), X(2, 3))
row("index_put behind", lambda x, i, y: _written(x.clone(), (slice(None), i), y), "a 4 b, 2, 2 b -> a 4 b", X(3, 4, 5), I(2, below=4), X(2, 5))
row("index_put apart", lambda x, i, j, y: _written(x.clone(), (i, slice(None), j), y), "4 a 5 b, 2, 2, 2 a b -> 4 a 5 b", X(4, 3, 5, 6), I(2, below=4), I(2, below=5), X(2, 3, 6))
row("index_put a mask", lambda x, m, y: _written(x.clone(), (m,), y), "4 5 a, 4 5, a -> 4 5 a", X(4, 5, 3), B(4, 5), X(3))
row("index_put a number", lambda x, i: _written(x.clone(), (i,), 2.0), "4 a, 2 -> 4 a", X(4, 3), I(2, below=4))
row("index_put masks", lambda x, m, i, y: _written(x.clone(), (m, i), y), "4 5, 4, 1, () -> 4 5", X(4, 5), B(4), I(1, below=5), X())
row("masked_scatter of rows", lambda x, m, y: x.masked_scatter(m.unsqueeze(-1).expand_as(x).to(m), y), "3 4 a, 3 4, 12 a -> 3 4 a",
    X(3, 4, 5), B(3, 4), X(12, 5))
row("masked_scatter by a column", lambda x, m, y: x.masked_scatter(m, y), "3 4 a, 3 4 1, 2 6 a -> 3 4 a",
    X(3, 4, 5), B(3, 4, 1), X(2, 6, 5))
row("masked_scatter of all", lambda x, m, y: x.masked_scatter(m, y), "a b, (), a b -> a b", X(3, 4), B(), X(3, 4))
row("masked_scatter", lambda x, m, y: x.masked_scatter(m, y), "3 4, 3 4, 12 -> 3 4", X(3, 4), B(3, 4), X(12))
row("slice_scatter", lambda x, y: x.slice_scatter(y, 1, 2, 4), "a 6 b, a 2 b -> a 6 b", X(2, 6, 3), X(2, 2, 3))
row("select_scatter", lambda x, y: x.select_scatter(y, 1, 2), "a 6 b, a b -> a 6 b", X(2, 6, 3), X(2, 3))
row("assign a slice", lambda x, y: _assigned(x.clone(), y), "a b+c, a c -> a b+c", X(2, 7), X(2, 4))
row("one_hot", lambda i: F.one_hot(i, 5), "a -> a 5", I(3, below=5))
row("topk", lambda x: x.topk(1, 1), "a b~ -> a 1, a 1", X(3, 5), roles=".r")
row("topk values", lambda x: x.topk(2, 1, sorted=False).values.sum(1), "a b~ -> a", X(3, 5), values=False, roles=".r")
row("sort", lambda x: x.sort(0), "5 a -> 5 a, 5 a", X(5, 3), roles="r.")
row("argsort", lambda x: x.argsort(), "a 5 -> a 5", X(3, 5), roles=".r")
row("kthvalue", lambda x: x.kthvalue(1, 1), "a 5 -> a, a", X(3, 5), roles=".r")


def _written(x: Tensor, places: Any, y: Any) -> Tensor:
    x[places] = y
    return x


def _assigned(x: Tensor, y: Tensor) -> Tensor:
    x[:, 3:] = y
    return x


# ── indices that range over an axis of units ─────────────────────────────────────────────────────────────────────────

row("route", lambda x, w: w[x.argmax(-1)], "a b~, b~ c -> a c", X(3, 5), P(5, 4))
row("route by topk", lambda x, w: w[x.topk(2, -1).indices], "a b~, b~ c d -> a 2 c d", X(3, 5), P(5, 4, 3), roles=".r, ...")
row("route by a view", lambda x, w: F.embedding(x.topk(2, -1)[1].reshape(-1).to(torch.int64).view(3, 2), w), "a b~, b~ c -> a 2 c", X(3, 5), P(5, 4), roles=".r, .f")
row("route by max", lambda x, w: w.index_select(0, x.max(1).indices), "a b~, b~ c -> a c", X(3, 5), P(5, 4))
row("route by the median", lambda x, w: w[x.median(1).indices], "a b~, b~ c -> a c", X(3, 5), P(5, 4), roles=".c, ..")
row("route by the only row", lambda x, w: w.index_select(0, x.argmax().reshape(1)), "1 a~, a~ b -> 1 b", X(1, 5), P(5, 4))
row("route and gather", lambda x, y: y.gather(1, x.topk(2, 1).indices), "a b~, a b~ -> a 2", X(3, 5), X(3, 5), roles=".r, ..")
row("route and take", lambda x, y: torch.take_along_dim(y, x.topk(2, 1).indices, 1), "a b~, a b~ -> a 2", X(3, 5), X(3, 5), roles=".r, ..")
row("route and scatter", lambda x: torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, 1.0), "a b~ -> a b~", X(3, 5), roles=".r")
row("route and scatter_add", lambda x, y: torch.zeros_like(x).scatter_add_(1, x.topk(2, 1).indices, y), "a b~, a 2 -> a b~", X(3, 5), X(3, 2), roles=".r, .c")
row("route to one_hot", lambda x: F.one_hot(x.argmax(-1), 5) * 2.0, "a b~ -> a b~", X(3, 5))
row("route to a longer one_hot", lambda x: F.one_hot(x.argmax(-1), 7), "a 5 -> a 7", X(3, 5))
row("route within bounds", lambda x, w: w[x.argmax(-1).clamp(0, 4)], "a b~, b~ c -> a c", X(3, 5), P(5, 4))
row("route within one bound", lambda x, w: w[torch.clamp_max(x.argmax(-1), 9)], "a b~, b~ c -> a c", X(3, 5), P(5, 4))
row("route cut short", lambda x, w: w[x.argmax(-1).clamp(0, 3)], "a 5, 5 b -> a b", X(3, 5), P(5, 4))
row("route cut low", lambda x, w: w[x.argmax(-1).clamp(min=1)], "a 5, 5 b -> a b", X(3, 5), P(5, 4))
row("route counted on", lambda x, w: w[(x.argmax(-1) + 1) % 5], "a 5, 5 b -> a b", X(3, 5), P(5, 4))
row("route compared", lambda x: x.argmax(-1) == 2, "a 5 -> a", X(3, 5))
row("route as a number", lambda x: x.argmax(0).item() + x.sum(0), "5 -> ()", X(5), roles="c")
row("route with no rule", lambda x: torch.bincount(x.argmax(-1), minlength=5).sum(), "3 5 -> ()", X(3, 5))
row("topk of a product", lambda x: x.flatten(1).topk(3, 1)[0].sum(1), "a b~ c~ -> a", X(3, 2, 4))
row("topk of too small a product", lambda x: x.flatten(1).topk(5, 1)[0].sum(1), "a 2 4 -> a", X(3, 2, 4))
row("take_along_dim flat", lambda x, i: torch.take_along_dim(x, i), "3 4, 2 -> 2", X(3, 4), I(2, below=12))

# ── recurrent layers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _lstm(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor, layers: int = 1, both: bool = False, first: bool = False) -> Any:
    return torch.lstm(x, (h, c), weights, len(weights) % 4 == 0 or len(weights) == 5, layers, 0.0, False, both, first)


def _gru(x: Tensor, h: Tensor, *weights: Tensor, layers: int = 1, biases: bool = True) -> Any:
    return torch.gru(x, h, weights, biases, layers, 0.0, False, False, False)


row("lstm", _lstm, "3 a b, 1 a c, 1 a c, c+c+c+c b, c+c+c+c c, c+c+c+c, c+c+c+c -> 3 a c, 1 a c, 1 a c",
    X(3, 2, 5), X(1, 2, 4), X(1, 2, 4), P(16, 5), P(16, 4), P(16), P(16), roles="..c, ..., ..., fc, fc, ., .")
row("lstm of two layers", lambda *t: _lstm(*t, layers=2, first=True),
    "a 3 b, 2 a c, 2 a c, c+c+c+c b, c+c+c+c c, c+c+c+c, c+c+c+c, c+c+c+c c, c+c+c+c c, c+c+c+c, c+c+c+c -> a 3 c, 2 a c, 2 a c",
    X(2, 3, 5), X(2, 2, 4), X(2, 2, 4), P(16, 5), P(16, 4), P(16), P(16), P(16, 4), P(16, 4), P(16), P(16), roles="..c, ..., ..., fc, fc, ., ., fc, fc, ., .")
row("gru", _gru, "3 a b, 1 a c, c+c+c b, c+c+c c, c+c+c, c+c+c -> 3 a c, 1 a c",
    X(3, 2, 5), X(1, 2, 4), P(12, 5), P(12, 4), P(12), P(12), roles="..c, ..., fc, fc, ., .")
row("gru without biases", lambda *t: _gru(*t, layers=2, biases=False), "3 a b, 2 a c, c+c+c b, c+c+c c, c+c+c c, c+c+c c -> 3 a c, 2 a c",
    X(3, 2, 5), X(2, 2, 4), P(12, 5), P(12, 4), P(12, 4), P(12, 4), roles="..c, ..., fc, fc, fc, fc")
row("rnn_tanh", lambda x, h, *w: torch.rnn_tanh(x, h, w, True, 1, 0.0, False, False, False), "3 a b, 1 a c, c b, c c, c, c -> 3 a c, 1 a c",
    X(3, 2, 5), X(1, 2, 4), P(4, 5), P(4, 4), P(4), P(4), roles="..c, ..., fc, fc, ., .")
row("lstm both ways", lambda *t: _lstm(*t, layers=1, both=True), "3 a b, 2 a c, 2 a c, c+c+c+c b, c+c+c+c c, c+c+c+c, c+c+c+c, c+c+c+c b, c+c+c+c c, c+c+c+c, c+c+c+c -> 3 a c+c, 2 a c, 2 a c",
    X(3, 2, 5), X(2, 2, 4), X(2, 2, 4), P(16, 5), P(16, 4), P(16), P(16), P(16, 5), P(16, 4), P(16), P(16), roles="..c, ..., ..., fc, fc, ., ., fc, fc, ., .")
row("lstm projected", _lstm, "3 2 5, 1 2 3, 1 2 4, 16 5, 16 3, 16, 16, 3 4 -> 3 2 3, 1 2 3, 1 2 4",
    X(3, 2, 5), X(1, 2, 3), X(1, 2, 4), P(16, 5), P(16, 3), P(16), P(16), P(3, 4))
row("lstm_cell", lambda x, h, c, *w: torch.lstm_cell(x, (h, c), *w), "a b, a c, a c, c+c+c+c b, c+c+c+c c, c+c+c+c, c+c+c+c -> a c, a c",
    X(2, 5), X(2, 4), X(2, 4), P(16, 5), P(16, 4), P(16), P(16), roles=".c, .., .., fc, fc, ., .")
row("gru_cell", torch.gru_cell, "a b, a c, c+c+c b, c+c+c c, c+c+c, c+c+c -> a c",
    X(2, 5), X(2, 4), P(12, 5), P(12, 4), P(12), P(12), roles=".c, .., fc, fc, ., .")
row("rnn_tanh_cell without biases", torch.rnn_tanh_cell, "a b, a c, c b, c c -> a c", X(2, 5), X(2, 4), P(4, 5), P(4, 4), roles=".c, .., fc, fc")
row("item", lambda x: x.sum().item() + x, "a -> a", X(4), roles="c")
row("check", lambda x, w: _checked(x.argmax(-1), w), "a b~, b~ c -> a c", X(3, 5), P(5, 4))


def _checked(index: Tensor, w: Tensor) -> Tensor:
    aten._assert_tensor_metadata(index, dtype=torch.int64)
    return w[index]

# ── what torch makes of other operations, and has no rule of its own ─────────────────────────────────────────────────

row("hsplit", lambda x: torch.hsplit(x, 2), "a b+c -> a b, a c", X(3, 8))
row("dsplit", lambda x: torch.dsplit(x, [3]), "a b c+d -> a b c, a b d", X(2, 3, 8))
row("column_stack", lambda x, y: torch.column_stack((x, y)), "a b, a c -> a b+c", X(3, 4), X(3, 5))
row("inner", torch.inner, "a b, c b -> a c", X(3, 4), P(5, 4))
row("vecdot", lambda x, y: torch.linalg.vecdot(x, y), "a b, a b -> a", X(3, 4), X(3, 4))
row("chain_matmul", torch.chain_matmul, "a b, b c, c d -> a d", X(3, 4), P(4, 5), P(5, 2), roles="fc, fc, cf")
row("pairwise_distance", F.pairwise_distance, "a b, a b -> a", X(3, 4), X(3, 4))
row("renorm", lambda x: torch.renorm(x, 2, 0, 1.0), "a b -> a b", X(3, 4), roles=".c")
row("quantile", lambda x: torch.quantile(x, 0.3, dim=1), "a 5 -> a", X(3, 5), roles=".r")
row("trapezoid", lambda x: torch.trapezoid(x, dim=0), "1+1+1 a -> a", X(3, 5), roles="c.")
row("isin", lambda x: torch.isin(x, torch.tensor([1, 3])), "a b -> a b", I(3, 5, below=6))
