"""The module emitter finds the numbers that must change wherever a model keeps them, and says which line keeps them where it cannot."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import graphprune
from graphprune.errors import HiddenSize, ModelLimit
from graphprune.rewrite.guess import HeldNumber
from graphprune.rewrite.rehearse import Rehearsal, Shadow
from graphprune.verify import Reference
from tests.models import sharpened


@dataclass
class Sizes:
    heads: int = 4
    width: int = 6


class Attention(nn.Module):
    """Four heads of six; ``sizes`` says where a subclass keeps these numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)

    def sizes(self) -> tuple[int, int]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], *self.sizes()).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


class Configured(Attention):
    def __init__(self, config: Sizes | None = None) -> None:
        super().__init__()
        self.config = config or Sizes()

    def sizes(self) -> tuple[int, int]:
        return self.config.heads, self.config.width


class Worded(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"attention": {"heads": 4}, "width": 6}

    def sizes(self) -> tuple[int, int]:
        return self.options["attention"]["heads"], self.options["width"]


class Listed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.shape = [("heads", 4), ("width", 6)]

    def sizes(self) -> tuple[int, int]:
        return self.shape[0][1], self.shape[1][1]


class Divided(Attention):
    """The width of a head follows from two other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.inner = 4, 24

    def sizes(self) -> tuple[int, int]:
        return self.heads, self.inner // self.heads


class Unflattened(Attention):
    """A function with its arguments filled in."""

    def __init__(self) -> None:
        super().__init__()
        self.split = partial(Attention.pair, heads=4, width=6)

    def sizes(self) -> tuple[int, int]:
        return self.split()

    @staticmethod
    def pair(heads: int, width: int) -> tuple[int, int]:
        return heads, width


Attention.pair = Unflattened.pair  # type: ignore[attr-defined]


class Rearrange(nn.Module):
    """A layer that a copy or a pickle builds anew from what it was given, not from what it made of it."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.lengths, self.made = lengths, tuple(lengths.items())

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.made[0][1], -1))

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.lengths, self.made = state["lengths"], tuple(state["lengths"].items())


class Rearranged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.split = Rearrange(heads=4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


class Stacked(nn.Module):
    """Two layers that share one configuration."""

    def __init__(self) -> None:
        super().__init__()
        config = Sizes()
        self.layers = nn.Sequential(Configured(config), Configured(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


HOLDERS = (Configured, Worded, Listed, Divided, Unflattened, Rearranged, Stacked)


@pytest.mark.parametrize("holder", HOLDERS)
def test_numbers_are_found_wherever_they_are_kept(holder: type[nn.Module], tmp_path: Path) -> None:
    """The smaller model is a model of its class, also copied, also loaded, also for another batch and length."""
    model, x = sharpened(holder()), torch.randn(2, 5, 12)
    result = graphprune.compile(model, x, keep=0.6, kinds=["head"], method="random")
    graphprune.save(result, tmp_path / "smaller")
    loaded = graphprune.load(tmp_path / "smaller", sharpened(holder()))
    wanted = graphprune.compile(model, x, keep=0.6, kinds=["head"], method="random", emit="graph").model
    longer = torch.randn(3, 7, 12)
    torch.testing.assert_close(result.model(x), wanted(x), rtol=1e-4, atol=1e-4)
    for other in (loaded.eval(), copy.deepcopy(result.model)):
        torch.testing.assert_close(other(longer), result.model(longer))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert model(longer).shape == longer.shape


class Written(Attention):
    """Numbers in the code itself."""

    def sizes(self) -> tuple[int, int]:
        return 4, 6


class Scaled(nn.Module):
    """A value that follows from a size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        return self.down(x) / math.sqrt(x.shape[-1])


class Unlike(nn.Module):
    """One number for two lengths, of which one shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.one, self.two = 6, nn.Linear(6, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.one(x).relu().split([self.width, self.width], -1)
        return self.two(left) + right.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("net", "shape", "kind", "words"),
    [
        (Written, (2, 5, 12), "head", ("view(*x.shape[:2], *self.sizes())", "4 must become ", "there, and no attribute holds it")),
        (Scaled, (2, 6), "ffn", ("it runs, but its code computes a value from a size",)),
        (Unlike, (2, 6), "ffn", ("split([self.width, self.width], -1)",)),
    ],
)
def test_what_cannot_be_found_is_said_with_the_line_and_the_graph_does_it(
    net: type[nn.Module], shape: tuple[int, ...], kind: str, words: tuple[str, ...]
) -> None:
    model, x = sharpened(net()), torch.randn(shape)
    with pytest.raises(ModelLimit) as caught:
        graphprune.compile(model, x, keep=0.7, kinds=[kind], method="random")
    assert all(word in str(caught.value) for word in words) and 'emit="graph"' in str(caught.value)
    smaller = graphprune.compile(model, x, keep=0.7, kinds=[kind], method="random", emit="graph").model
    assert smaller(x).shape == model(x).shape


class Recurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gru, self.cell = nn.Linear(6, 9), nn.GRU(9, 10, batch_first=True), nn.LSTMCell(10, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.gru(self.up(x).relu())[1][-1]
        return self.out(self.cell(state)[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_recurrent_layers_know_their_new_sizes() -> None:
    model, x = sharpened(Recurring()), torch.randn(2, 5, 6)
    smaller: Any = graphprune.compile(model, x, keep=0.5, kinds=["all"], method="random").model
    assert smaller.gru.input_size == smaller.up.out_features < 9
    assert smaller.gru.hidden_size == smaller.cell.input_size < 10
    assert smaller.cell.hidden_size == smaller.out.in_features < 7


class Drawing(nn.Module):
    """A variational autoencoder that draws also when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mean, self.spread, self.down, self.out = (
            nn.Linear(6, 20), nn.Linear(20, 4), nn.Linear(20, 4), nn.Linear(4, 20), nn.Linear(20, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        mean = self.mean(x)
        return self.out(self.down(mean + self.spread(x).exp() * torch.randn_like(mean)).relu())


def test_a_model_that_draws_at_random_is_checked_all_the_same() -> None:
    """Draws of all sizes are one number in the check of the cut, and the same draws in the check of the module."""
    model, x = sharpened(Drawing()), torch.randn(2, 6)
    smaller: Any = graphprune.compile(model, x, keep=0.8, kinds=["ffn"], protect=["mean"], method="random").model
    assert smaller.down.out_features == smaller.out.in_features < 20
    assert graphprune.compile(model, x, keep=0.6, kinds=["all"], method="random", emit="graph").model(x).shape == (2, 3)


class FourHeads(nn.Module):
    """Attention whose code divides the width by its heads, beside a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, count, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, count, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, count, width))
        return x + self.down(self.up(x).relu())


def test_a_kind_that_the_code_hides_is_left_alone_unless_it_is_asked_for() -> None:
    model, x = FourHeads().eval(), torch.randn(2, 5, 32)
    result = graphprune.compile(model, x, keep=0.7)
    assert {cut.kind for cut in result.plan.cuts} == {"ffn"}
    assert any("1 head groups" in note and "left alone" in note for note in result.notes)
    with pytest.raises(graphprune.errors.HiddenSize, match="hides a size"):
        graphprune.compile(model, x, keep=0.7, kinds=["head"])


class Adapted(nn.Module):
    """Two linear layers with low-rank adapters, whose strength the code divides by their rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 40), nn.Linear(40, 12), nn.Linear(12, 3)
        self.a, self.b = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(40, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b) * (8 / self.a.shape[0])
        return self.out(x + self.down(inner.relu()))


def test_of_one_kind_only_the_groups_that_the_code_hides_are_left_alone() -> None:
    result = graphprune.compile(sharpened(Adapted()), torch.randn(2, 12), keep=0.7)
    assert [cut.size for cut in result.plan.cuts] == [40]
    smaller: Any = result.model
    assert smaller.up.out_features == smaller.b.shape[0] < 40
    assert smaller.a.shape == (4, 12)


@dataclass
class HeadSizes:
    heads: int
    head_size: int


class Sharing(nn.Module):
    """Attention that looks its sizes up in an object that all layers share."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv, self.out = nn.Linear(24, 3 * 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.sizes.heads, self.sizes.head_size)
        size = self.sizes.heads * self.sizes.head_size
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split((size, size, size), dim=-1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], size))


def test_layers_that_share_an_attribute_shrink_alike() -> None:
    model = sharpened(nn.Sequential(*(Sharing(sizes) for sizes in [HeadSizes(4, 6)] for _ in range(2)), nn.Linear(24, 3)))
    result = graphprune.compile(model, torch.randn(2, 5, 24), keep=0.9, scope="global", method="random")
    assert {cut.kind for cut in result.plan.cuts} == {"head"}
    assert len({len(cut.kept) for cut in result.plan.cuts}) == 1
    assert len(result.plan.cuts) == 2
    assert any("shrink alike" in note for note in result.notes)


class Counting(nn.Module):
    """A layer that reads its sizes off its input, inside a model that keeps a number that happens to equal one of them."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.qkv, self.out = 6, nn.Linear(24, 3 * 24), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.view(*x.shape[:2], -1, self.size).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            shape = (x.shape[0] * q.shape[1], x.shape[1], self.size)
            x = nn.functional.scaled_dot_product_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape))
            return self.out(x.view(q.shape).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.patience, self.heads, self.last = 8, Counting.Heads(), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.heads(x))


def test_a_number_that_only_happens_to_be_equal_stays() -> None:
    """Two rows of four heads make eight."""
    result = graphprune.compile(sharpened(Counting()), torch.randn(2, 5, 24), keep=0.5, kinds=["head"])
    smaller: Any = result.model
    assert smaller.heads.out.in_features < 24
    assert smaller.patience == 8


class Recomputed(nn.Module):
    """A scale that the code takes from a size, of little weight beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).relu()
        return x + 1e-4 * self.down(inner * inner.shape[-1] ** 0.5)


def test_a_small_difference_that_is_no_rounding_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Recomputed(), torch.randn(4, 5, 8)
    with pytest.raises(graphprune.errors.HiddenSize, match="hides a size"):
        graphprune.compile(model, x, keep=0.5)
    assert graphprune.compile(model, x, keep=0.5, emit="graph").plan.cuts


@pytest.mark.parametrize(
    ("rounding", "gap", "same"), [(3e-6, 1e-5, True), (3e-6, 1e-4, False), (1e-8, 1e-5, False), (0.0, 1e-6, True)]
)
def test_rounding_is_measured_on_the_model(rounding: float, gap: float, same: bool) -> None:
    """Ten times what single precision loses on the model itself may pass, and what any order of operations loses."""
    wanted = Reference(lambda: [torch.ones(3)], lambda: [torch.full((3,), 1 + rounding, dtype=torch.float64)])
    assert wanted.agrees([torch.full((3,), 1 + gap)]) is same


@pytest.mark.parametrize(("gap", "asked", "same"), [(1e-6, False, True), (1e-5, True, True), (1e-3, True, False)])
def test_a_known_exact_result_does_where_it_is_met(gap: float, asked: bool, same: bool) -> None:
    """The reference's own outputs are computed only where the exact ones, which were at hand, leave a doubt."""
    runs = []

    def own() -> list[torch.Tensor]:
        runs.append(1)
        return [torch.full((3,), 1 + 1e-5)]

    wanted = Reference(own, lambda: [torch.ones(3, dtype=torch.float64)], known=True)
    assert wanted.agrees([torch.full((3,), 1 + gap)]) is same
    assert bool(runs) is asked


class Squared(nn.Module):
    """As many heads as each is wide: which of the two shrinks, no shape tells."""

    def __init__(self, answer: Any = lambda y: y) -> None:
        super().__init__()
        self.heads, self.head_dim, self.answer = 8, 8, answer
        self.qkv, self.proj, self.out = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, -1)
        return self.answer(self.out(x + self.proj(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ["single", "half", "whole numbers", "a branch that is zero", "one token"])
def test_what_no_number_tells_the_program_does(case: str) -> None:
    torch.manual_seed(0)
    model, x = Squared((lambda y: y.argmax(-1)) if case == "whole numbers" else lambda y: y), torch.randn(2, 6, 64)
    if case == "a branch that is zero":
        nn.init.zeros_(model.proj.weight)
    if case == "half":
        model, x = model.bfloat16(), x.bfloat16()
    smaller = graphprune.compile(model.eval(), x[:, :1] if case == "one token" else x, keep=0.5, kinds=["head"]).model
    assert (smaller.heads, smaller.head_dim) == (4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_with_as_many_heads_as_each_is_wide_loses_heads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, head_dim=8
    )
    found = graphprune.compile(transformers.LlamaForCausalLM(config).to(dtype).eval(), keep=0.6, kinds=["head"]).model.config
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 4, 8)


class Averaging(nn.Module):
    """Divides by a number that its code takes from a size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x).relu()
        return self.down(x) / x.shape[-1] ** 0.5  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_comes_of_a_size_is_seen_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(HiddenSize, match="hides a size"):
        graphprune.compile(Averaging().to(dtype), torch.randn(5, 16).to(dtype), keep=0.95)


class Standardised(nn.Conv2d):
    """A weight that is reshaped on its way to the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = (flat - flat.mean(-1, keepdim=True)).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_a_reshape_like_another_tensor_is_the_same_program() -> None:
    model = sharpened(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), Standardised(12, 10, 1), nn.ReLU(), nn.Conv2d(10, 4, 1)))
    result = graphprune.compile(model.bfloat16(), torch.randn(2, 3, 5, 5).bfloat16(), keep=0.6, kinds=["channel"])
    assert len(result.plan.cuts) == 2


class Scaled(nn.Module):
    """Two branches; one keeps its width and takes from it a scale that outputs hardly show."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 32
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.plain = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).view(*x.shape[:-1], self.width).relu()
        return x + self.plain(x) + 1e-12 * self.down(inner * inner.shape[-1] ** 0.5)


def test_what_outputs_do_not_show_is_left_alone_and_the_rest_is_cut() -> None:
    torch.manual_seed(0)
    result = graphprune.compile(Scaled(), torch.randn(4, 5, 8), keep=0.5)
    smaller: Any = result.model
    assert smaller.width == smaller.up.out_features == 32
    assert smaller.plain[0].out_features == 12
    assert any("left alone" in note for note in result.notes)


class Asking(nn.Module):
    """Asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_only_models_that_ask_for_no_value_are_rehearsed() -> None:
    x = torch.randn(2, 8)
    assert Rehearsal(nn.Linear(8, 4), x).tells
    assert not Rehearsal(Asking(), x).tells


def test_a_rehearsal_fails_where_a_run_would_and_forgets_what_it_left() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.kept = 8, None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x.view(2, self.size) if self.kept is None else self.kept
            return self.kept

    model = Keeping()
    shadow = Shadow(model, Rehearsal(model, torch.randn(2, 8)))
    place = HeldNumber("", ("size",), 0)
    assert shadow.attempted({}) is None
    failure = shadow.attempted({place: 6})
    assert failure is not None
    assert isinstance(failure.error, RuntimeError)
    assert (model.size, model.kept) == (8, None)
