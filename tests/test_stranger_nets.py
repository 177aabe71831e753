"""Networks that strangers brought: each was refused, crashed or needlessly frozen once, each is held to a plain computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan, while_loop
from transformers.modeling_outputs import ImageClassifierOutput

import graphprune
from graphprune import Scores, couple, propagate, trace
from graphprune.matrices import products
from tests.models import sharpened


def drawn(*shape: int, count: int = 2) -> list[dict[str, Tensor]]:
    """Calibration batches of images, vectors, whatever has that shape."""
    return [{"x": torch.randn(shape)} for _ in range(count)]


# ── transposed convolutions ──────────────────────────────────────────────────────────────────────────────────────────


class Decoder(nn.Module):
    """A transposed convolution whose kernel places overlap."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)
        self.b = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.a(x).relu()).relu())


def units(result: Any, name: str, dim: int) -> list[int]:
    """What stays along a dimension of a tensor of the original."""
    kept: list[int] = result.groups.axes.tensors[name][dim].kept(result.plan.keep(result.groups))
    return kept


@pytest.mark.parametrize(("bias", "step"), [(True, "mean_bias"), (False, "mean_bias:add=true")])
def test_the_bias_of_a_transposed_convolution_holds_the_mean_of_what_went(bias: bool, step: str) -> None:
    model, batches = sharpened(Decoder(bias=bias)), drawn(2, 3, 5, 4)
    result = graphprune.compile(model, keep=0.6, method="flap", calibration=batches, passes=[step])
    inputs, rows = units(result, "b.weight", 0), units(result, "b.weight", 1)
    assert len(inputs) < 16
    with torch.no_grad():
        gone = model.a(torch.cat([batch["x"] for batch in batches])).relu()
        gone[:, inputs] = 0
        lost = F.conv_transpose2d(gone, model.b.weight, None, 2, 1, 1).mean((0, 2, 3))
    before = model.b.bias.detach() if bias else torch.zeros(8)
    torch.testing.assert_close(result.model.b.bias.detach(), (before + lost)[rows])
    assert result.model(batches[0]["x"]).shape == (2, 4, 10, 8)


def test_least_squares_fits_a_transposed_convolution_with_its_bias() -> None:
    model, batches = sharpened(Decoder(bias=True)), drawn(4, 3, 9, 8)
    step = "least_squares:damping=0:drift=0:even=false:where=readers"
    result = graphprune.compile(model, keep=0.6, method="magnitude", calibration=batches, passes=[step])
    inputs, rows = units(result, "b.weight", 0), units(result, "b.weight", 1)
    assert len(inputs) < 16
    with torch.no_grad():
        x = model.a(torch.cat([batch["x"] for batch in batches])).relu()
        wanted = model.b(x)[:, rows]
    (result.model.b(x[:, inputs]) - wanted).square().mean().backward()
    assert result.model.b.weight.grad.abs().max() < 1e-5 and result.model.b.bias.grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(6, 9, 3, stride=2, groups=3, dilation=2, output_padding=1), (2, 6, 5)),
        (nn.ConvTranspose2d(4, 6, (3, 1), stride=(3, 2), padding=(1, 0), groups=2), (2, 4, 5, 3)),
        (nn.ConvTranspose3d(2, 3, 2, padding=2), (2, 2, 4, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 3, padding=1), (4, 5, 3)),
    ],
)
def test_a_transposed_convolution_is_rows_times_vectors(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    (product,) = products(propagate(trace(nn.Sequential(layer), x)))
    matrix = product.layout.matrix(layer.weight)
    assert torch.equal(product.layout.restored(matrix, layer.weight), layer.weight)
    wanted = layer(x).movedim(-layer.weight.ndim + 1, 0).unflatten(0, (layer.groups, -1)).flatten(2).mT
    bias = layer.bias.unflatten(0, (layer.groups, 1, -1))
    torch.testing.assert_close(product.layout.vectors(x) @ matrix.mT + bias, wanted)


def test_a_transposed_convolution_is_sparse_along_what_meets_in_a_point() -> None:
    model, batches = sharpened(Decoder(bias=True)), drawn(2, 3, 5, 4)
    sparse = graphprune.sparsify(model, batches, method="wanda", sparsity=0.5)
    gone = sparse.b.weight.transpose(0, 1).flatten(1) == 0
    assert gone.sum(1).eq(16 * 9 // 2).all()
    with torch.no_grad():
        x = sparse.a(torch.cat([batch["x"] for batch in batches])).relu().square()
    places = torch.eye(9).view(9, 1, 3, 3).transpose(0, 1)
    landed = torch.stack([F.conv_transpose2d(channel[:, None], places, None, 2, 1, 1).sum((0, 2, 3)) for channel in x.unbind(1)])
    saliency = model.b.weight.detach().transpose(0, 1).flatten(1).abs() * landed.sqrt().flatten()
    assert saliency[gone].view(8, -1).amax(1).le(saliency[~gone].view(8, -1).amin(1)).all()


# ── grouped convolutions ─────────────────────────────────────────────────────────────────────────────────────────────

GROUPS, INNER, OUTER = 4, 3, 5


class Grouped(nn.Module):
    """ResNeXt's middle: each group of the convolution reads its own channels."""

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.a, self.o = nn.Conv2d(3, GROUPS * INNER, 1), nn.Conv2d(GROUPS * OUTER, 4, 1)
        self.b = kind(GROUPS * INNER, GROUPS * OUTER, 3, padding=1, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.a(x).relu()).relu())

    @torch.no_grad()
    def read(self, batch: dict[str, Tensor]) -> Tensor:
        """What the convolution reads: (n, group, channel, h, w)."""
        return self.a(batch["x"]).relu().unflatten(1, (GROUPS, INNER)).double()

    @property
    def kernel(self) -> Tensor:
        """(group, channel out, channel in, kernel places)."""
        weight = self.b.weight.detach().double().flatten(2)
        if isinstance(self.b, nn.ConvTranspose2d):
            return weight.unflatten(0, (GROUPS, INNER)).transpose(1, 2)
        return weight.unflatten(0, (GROUPS, OUTER))


def by_channel(model: Grouped, batches: list[dict[str, Tensor]], method: str) -> Tensor:
    """What a criterion says of each channel, (group, channel), by its formula."""
    x = torch.cat([model.read(batch) for batch in batches])
    if method == "wanda_sp":
        return model.kernel.abs().mean((1, 3)) * x.square().mean((0, 3, 4)).sqrt()
    metric = x.var((0, 3, 4), correction=0) * model.kernel.square().sum((1, 3))
    return (metric - metric.mean()) / metric.std()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["wanda_sp", "flap", "minitron"])
def test_each_group_of_a_convolution_is_scored_on_its_own_inputs(method: str, transposed: bool) -> None:
    model, batches = sharpened(Grouped(transposed=transposed)), drawn(2, 3, 6, 5)
    scores = graphprune.compile(model, keep=0.5, method=method, calibration=batches).facts[Scores]
    if method == "minitron":
        means = [model.read(batch).square().sum(1).sqrt().mean((0, 2, 3)) for batch in batches]
        wanted = torch.stack(means).square().sum(0).sqrt()
    else:
        found = by_channel(model, batches, method)
        wanted = found.mean(0) if method == "flap" else found.sum(0)
    torch.testing.assert_close(scores[reading(model, batches)], wanted)


def reading(model: Grouped, batches: list[dict[str, Tensor]]) -> str:
    """The group of the channels within a group, by name."""
    groups = couple(propagate(trace(model, batches[0])))
    return next(group.name for group in groups if group.size == INNER)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_surgeon_refits_each_group_of_a_convolution(transposed: bool, gradients: bool) -> None:
    model = sharpened(WithLoss(transposed=transposed)).double()
    batches = [{"x": batch["x"].double()} for batch in drawn(2, 3, 6, 5)]
    options = {"gradients": gradients, "damping": 0.01, "block": 1e-6}
    scores = graphprune.compile(model, keep=0.5, method="obs", calibration=batches, options=options).facts[Scores]
    x = torch.cat([model.read(batch) for batch in batches])
    patches = torch.stack([F.unfold(part, 3, padding=1).mT.flatten(0, 1) for part in x.unbind(1)])
    power = patches.mT @ patches / patches.shape[1]
    power += 0.01 * power.diagonal(dim1=1, dim2=2).diag_embed()
    kernel = (model.kernel.flip(-1) if transposed else model.kernel).flatten(2)
    slope = slopes(model, batches) if gradients else torch.eye(OUTER).double().expand(GROUPS, -1, -1)
    torch.testing.assert_close(scores[reading(model, batches)], by_brute_force(kernel, power, slope))


class WithLoss(Grouped):
    """The same, saying its loss."""

    def forward(self, x: Tensor) -> ImageClassifierOutput:
        out = super().forward(x)
        return ImageClassifierOutput(loss=out.square().mean(), logits=out)


def slopes(model: Grouped, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean g·gᵀ of each group's outputs, (group, channel, channel); g the gradient of a batch's mean loss times its positions."""
    found: list[Tensor] = []
    hook = model.b.register_forward_hook(lambda _, __, out: out.register_hook(found.append) and None)
    for batch in batches:
        model(**batch).loss.backward()
    hook.remove()
    g = torch.cat([one * one[:, 0].numel() for one in found]).unflatten(1, (GROUPS, OUTER))
    return torch.einsum("ngahw,ngbhw->gab", g, g) / g[:, 0, 0].numel()


def by_brute_force(kernel: Tensor, power: Tensor, slope: Tensor) -> Tensor:
    """Remove the channel, of every group, whose removal raises the refitted error least, one at a time."""

    def error(gone: list[int]) -> float:
        stay = [i for i in range(INNER * 9) if i // 9 not in gone]
        out = [i for i in range(INNER * 9) if i // 9 in gone]
        within, beside = power[:, out][:, :, out], power[:, stay][:, :, out]
        left = within - beside.mT @ torch.linalg.solve(power[:, stay][:, :, stay], beside) if stay else within
        return float(torch.einsum("gab,gbi,gij,gaj->", slope, kernel[:, :, out], left, kernel[:, :, out]))

    gone: list[int] = []
    scores, worst = torch.zeros(INNER, dtype=torch.float64), 0.0
    while len(gone) < INNER:
        costs = {unit: error([*gone, unit]) - error(gone) for unit in range(INNER) if unit not in gone}
        unit = min(costs, key=costs.__getitem__)
        worst = max(worst, costs[unit])
        scores[unit] = worst
        gone.append(unit)
    return scores


# ── complex weights ──────────────────────────────────────────────────────────────────────────────────────────────────

MODES = 4


class Spectral(nn.Module):
    """A Fourier neural operator of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.o = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 8, 1), nn.Conv1d(6, 1, 1)
        self.v = nn.Parameter(torch.randn(8, 8, MODES, dtype=torch.cfloat))
        self.w = nn.Parameter(torch.randn(8, 6, MODES, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> ImageClassifierOutput:
        x = self.a(x)
        x = F.gelu(self.mixed(x, self.v) + self.c(x))
        out = self.o(F.gelu(self.mixed(x, self.w)))
        return ImageClassifierOutput(loss=out.square().mean(), logits=out)

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        waves = torch.fft.rfft(x)
        out = waves.new_zeros(len(x), weight.shape[1], waves.shape[2])
        out[..., :MODES] = torch.einsum("bim,iom->bom", waves[..., :MODES], weight)
        return torch.fft.irfft(out, n=x.shape[-1])

    @torch.no_grad()
    def middle(self, x: Tensor) -> Tensor:
        """What ``w`` reads, (n, channel, mode)."""
        x = self.a(x)
        return torch.fft.rfft(F.gelu(self.mixed(x, self.v) + self.c(x)))[..., :MODES]


def by_middle_channel(model: Spectral, x: Tensor, method: str) -> Tensor:
    """What a criterion says of each channel that ``v`` and ``c`` write and ``w`` reads, by its formula."""
    if method in ("flap", "wanda_sp"):
        waves, weight = model.middle(x).transpose(0, 1).flatten(1), model.w.detach().flatten(1)
        if method == "wanda_sp":
            return weight.abs().mean(1) * waves.abs().square().mean(1).sqrt()
        metric = (waves - waves.mean(1, keepdim=True)).abs().square().mean(1) * weight.abs().square().sum(1)
        return (metric - metric.mean()) / metric.std()
    members = [model.w, model.c.weight, model.c.bias, model.v]
    if method.startswith("magnitude"):
        return sum(by_row(part.detach().abs(), part is model.v).pow(int(method[-1])).sum(1) for part in members)
    slopes = torch.autograd.grad(model(x).loss, members)
    lost = [by_row((p * s.conj()).real.detach(), p is model.v) for p, s in zip(members, slopes, strict=True)]
    return lost[0].sum(1).square() / 2 if method == "fisher" else sum(part.abs().sum(1) for part in lost)


def by_row(tensor: Tensor, second: bool) -> Tensor:
    """A row for each index of the first (or the second) dimension."""
    return (tensor.transpose(0, 1) if second else tensor).reshape(8, -1)


@pytest.mark.parametrize("method", ["magnitude:p=2", "magnitude:p=1", "taylor", "snip", "fisher", "flap", "wanda_sp"])
def test_a_complex_weight_counts_by_its_magnitude(method: str) -> None:
    model, (batch,) = sharpened(Spectral()), drawn(1, 2, 12, count=1)
    result = graphprune.compile(model, keep=0.5, method=method, calibration=[batch])
    name = next(group.name for group in result.groups if {"v", "w"} <= {member.name for member in group.members})
    wanted = by_middle_channel(model, batch["x"], method).double()
    torch.testing.assert_close(result.facts[Scores][name], wanted, rtol=1e-4, atol=1e-6)
    assert result.model.w.is_complex() and len(result.model.w) < 8


@pytest.mark.parametrize("method", ["llm_pruner:order=vector", "llm_pruner:order=mixed", "minitron", "obs", "synflow:rounds=2"])
def test_every_method_serves_complex_weights(method: str) -> None:
    result = graphprune.compile(sharpened(Spectral()), keep=0.5, method=method, calibration=drawn(1, 2, 12))
    assert result.plan.cuts and all(units.isfinite().all() for units in result.facts[Scores].units.values())


def test_repairs_and_masks_leave_complex_weights_alone() -> None:
    model, batches = sharpened(Spectral()), drawn(1, 2, 12)
    result = graphprune.compile(model, keep=0.5, method="magnitude", calibration=batches, passes=["least_squares"])
    kept = units(result, "w", 0), units(result, "w", 1)
    assert torch.equal(result.model.w.detach(), model.w.detach()[kept[0]][:, kept[1]])
    assert torch.equal(graphprune.sparsify(model, batches, method="magnitude", sparsity=0.5).w, model.w)


# ── what a forward leaves in a module ────────────────────────────────────────────────────────────────────────────────


class Remembering(nn.Module):
    """Weights that a forward computes and keeps, as torch's older weight norm does, and states beside them."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.a, self.o = nn.utils.weight_norm(nn.Linear(12, 32)), nn.Linear(32, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x).relu())


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_what_the_last_forward_computed_stands_in_no_copys_way() -> None:
    model, x = sharpened(Remembering()), torch.randn(4, 12)
    out = model(x)
    model.seen.append(out)
    out.sum().backward()
    result = graphprune.compile(model, x, keep=0.5, method="magnitude")
    kept = units(result, "a.weight_v", 0)
    assert len(kept) == 16 and model.seen[0] is out
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), F.linear(model.a(x).relu()[:, kept], model.o.weight[:, kept], model.o.bias))


# ── chance in evaluation ─────────────────────────────────────────────────────────────────────────────────────────────


def places_of(h: Tensor) -> Tensor:
    """Rows in the order of other rows drawn by their size."""
    return h[torch.multinomial(h.detach().abs().sum(1) + 1, 5, replacement=True)]


CHANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.3, training=True),
    "in place": lambda h: F.dropout(h * 1, 0.3, training=True, inplace=True),
    "feature": lambda h: F.dropout1d(h[..., None], 0.3, training=True)[..., 0],
    "alpha": lambda h: F.alpha_dropout(h, 0.3, training=True),
    "native": lambda h: torch.native_dropout(h, 0.3, True)[0],
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=0.3)[0],
    "slope": lambda h: F.rrelu(h, training=True),
    "shuffled": lambda h: h + h[torch.randperm(len(h))],
    "chosen": lambda h: h + places_of(h),
    "counted": lambda h: h / torch.randint(2, 7, (len(h), 1)),
    "gumbel": lambda h: h + F.gumbel_softmax(h[:, :1]),
    "poisson": lambda h: h + torch.poisson(h.abs().sum(1, keepdim=True)),
}


class Chancy(nn.Module):
    """Draws between two layers, unless told that chance is ``out``."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o, self.draw, self.out = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 3), draw, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.o(self.b(h if self.out else self.draw(h)).relu())


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("kind", CHANCE)
def test_a_model_that_draws_is_checked_with_the_draws_held(kind: str, emit: str) -> None:
    model, x = sharpened(Chancy(CHANCE[kind])), torch.randn(5, 4)
    result = graphprune.compile(model, x, keep=0.5, method="magnitude", emit=emit)
    assert any(group.size == 10 for group in result.groups) and result.plan.cuts
    assert result.model(x).shape == (5, 3)
    if emit == "module":
        model.out = result.model.out = True
        inner, outer = units(result, "b.weight", 1), units(result, "b.weight", 0)
        h = F.linear(model.a(x).relu()[:, inner], model.b.weight[outer][:, inner], model.b.bias[outer]).relu()
        torch.testing.assert_close(result.model(x), F.linear(h, model.o.weight[:, outer], model.o.bias))


# ── control flow ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Branching(nn.Module):
    """Part of the forward is an operator that runs functions of its own; before and after it are ordinary layers."""

    def __init__(self, flow: Callable[[Branching, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 16), nn.Linear(16, 3)
        self.left, self.right, self.flow = nn.Linear(10, 10), nn.Linear(10, 10), flow

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.c(self.flow(self, self.b(self.a(x).relu()))).relu())


def branches(net: Branching, h: Tensor) -> Tensor:
    return torch.cond(
        h.sum() > 0, lambda t: net.left(t).float(), lambda t: net.right(t) - torch.ones(10, dtype=torch.float32), (h,)
    )


def loops(_: Branching, h: Tensor) -> Tensor:
    return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 1.5), (torch.tensor(0), h))[1]


def scans(_: Branching, h: Tensor) -> Tensor:
    return scan(lambda c, t: (c / 2 + t, c + t.sin()), torch.zeros(10), h)[1]


def without_gradients(net: Branching, h: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: t - 1, (h,))
    return branches(net, h)


def draws(_: Branching, h: Tensor) -> Tensor:
    def inner(t: Tensor) -> Tensor:
        return torch.cond(t.sum() > 3, lambda u: F.dropout(u, 0.5, training=True), lambda u: u + torch.rand_like(u), (t,))

    return torch.cond(h.sum() > 0, inner, lambda t: F.dropout(t, 0.5, training=True), (h,))


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_draws_within_control_flow_are_held_too(emit: str) -> None:
    model, x = sharpened(Branching(draws)), torch.randn(5, 4)
    for sign in (1, -1):
        assert graphprune.compile(model, sign * x, keep=0.5, method="magnitude", emit=emit).plan.cuts


@torch.no_grad()
@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("flow", [branches, loops, scans, without_gradients])
def test_what_flows_through_control_flow_stays_whole_and_the_rest_shrinks(flow: Any, emit: str, tmp_path: Path) -> None:
    model, x = sharpened(Branching(flow)), torch.randn(5, 4)
    result = graphprune.compile(model, x, keep=0.5, method="magnitude", emit=emit)
    assert sorted(group.size for group in result.groups) == [12, 16]
    assert "control flow" in result.groups.explain("b.weight")
    before, after = units(result, "a.weight", 0), units(result, "c.weight", 0)
    for batch in (x, -x):
        h = flow(model, F.linear(model.a(batch).relu()[:, before], model.b.weight[:, before], model.b.bias))
        wanted = F.linear(model.c(h).relu()[:, after], model.o.weight[:, after], model.o.bias)
        torch.testing.assert_close(result.model(batch), wanted)
    graphprune.save(result, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("method", ["flap", "obs", "taylor"])
def test_methods_that_look_at_data_look_around_control_flow(method: str) -> None:
    model = sharpened(Valued(branches))
    result = graphprune.compile(model, keep=0.5, method=method, calibration=drawn(5, 4), passes=["least_squares"])
    assert result.plan.cuts


class Valued(Branching):
    """The same, saying its loss."""

    def forward(self, x: Tensor) -> ImageClassifierOutput:
        out = super().forward(x)
        return ImageClassifierOutput(loss=out.square().mean(), logits=out)


class Step(nn.Module):
    """A residual block that branches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t - 1, (self.down(self.up(x).relu()),))


def test_blocks_that_branch_are_written_out_from_one_another() -> None:
    model, x = sharpened(nn.Sequential(Step(), Step(), Step(), nn.Linear(6, 3))), torch.randn(5, 6)
    assert [str(node) for node in trace(model, x).graph.nodes if "cond" in str(node.target)] == ["cond", "cond_1", "cond_2"]
    result = graphprune.compile(model, x, keep=0.5, method="magnitude", emit="graph")
    assert len(result.groups) == 3 and result.model(x).shape == (5, 3)


# ── quantisation in training ─────────────────────────────────────────────────────────────────────────────────────────


class Quantised(nn.Module):
    """Weights and activations rounded to the steps of their channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)
        for name in ("weight", "activation"):
            self.register_buffer(f"{name}_scale", torch.rand(12) / 20 + 0.01)
            self.register_buffer(f"{name}_zero", torch.randint(-3, 3, (12,), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(self.a.weight, self.weight_scale, self.weight_zero, 0, -128, 127)
        h = F.conv2d(x, weight, self.a.bias).relu()
        return self.o(torch.fake_quantize_per_channel_affine(h, self.activation_scale, self.activation_zero, 1, -128, 127))


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_scales_and_zero_points_go_with_their_channels(emit: str, tmp_path: Path) -> None:
    model, x = sharpened(Quantised()), torch.randn(2, 3, 6, 6)
    result = graphprune.compile(model, x, keep=0.5, method="magnitude", emit=emit)
    kept = units(result, "a.weight", 0)
    assert len(kept) == 6 and units(result, "activation_zero", 0) == units(result, "weight_scale", 0) == kept
    for conv in (model.a, model.o):
        conv.weight.requires_grad_(False)
    model.o.weight[:, [channel for channel in range(12) if channel not in kept]] = 0
    torch.testing.assert_close(result.model(x), model(x))
    graphprune.save(result, tmp_path)
    saved = tmp_path / "model.pt2"
    loaded = torch.export.load(saved).module() if emit == "graph" else graphprune.load(tmp_path, sharpened(Quantised()))
    torch.testing.assert_close(loaded(x), model(x))


# ── constant positions ───────────────────────────────────────────────────────────────────────────────────────────────


class Picking(nn.Module):
    """Units in other places, and some of them, by a constant that the model keeps, by data, or by slices."""

    def __init__(self, pick: Callable[[Picking, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.o, self.pick = nn.Linear(4, 12), nn.LazyLinear(3), pick
        self.register_buffer("order", torch.randperm(12))
        self.register_buffer("mask", torch.arange(12) % 3 > 0)
        self(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.pick(self, self.a(x).relu()))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("pick", "words"),
    [
        (lambda net, h: h[..., net.order], "positions that a constant lists; slices or a transpose"),
        (lambda net, h: h.index_select(-1, net.order), "positions that a constant lists; slices or a transpose"),
        (lambda net, h: h[..., net.mask], "a mask that is a constant; slices"),
        (lambda net, h: h[..., h[0].long().clamp(0, 11)], "indexed by data"),
        (lambda net, h: h[..., h[0] > 0], "indexed by a mask "),
    ],
)
def test_units_picked_by_a_constant_stay_with_words_on_what_could_be_followed(pick: Any, words: str) -> None:
    net, x = Picking(pick), torch.randn(2, 4)
    groups = couple(propagate(trace(net, x)))
    assert not any(member.name == "a.weight" for group in groups for member in group.members)
    assert words in groups.explain("a.weight")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_the_words_advise_can_be_followed() -> None:
    model = sharpened(Picking(lambda _, h: torch.cat([h.unflatten(-1, (3, 4)).mT.flatten(-2), h[..., :4]], -1)))
    assert graphprune.compile(model, torch.randn(2, 4), keep=0.5, method="magnitude", emit="graph").plan.cuts
