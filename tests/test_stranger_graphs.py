"""What a graph was not traced for it refuses; a number that is no size stays; both held to the plain computation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import UserMistake


def emitted(model: nn.Module, example: Any, **options: Any) -> tuple[Any, Any]:
    """The same cut as a graph and as a module."""
    graph, module = (
        graphprune.compile(model, example, keep=0.5, method="magnitude", emit=emit, **options).model for emit in ("graph", "module")
    )
    return graph, module.eval()


def refuses(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserMistake) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ── a graph is called like the original ──────────────────────────────────────────────────────────────────────────────


class Mean(nn.Module):
    """Sizes of the picture and an argument end in the numbers of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: float = 1.0, half: bool = False) -> Tensor:
        h = self.a(x).relu()
        h = self.o(h.flatten(2).sum(-1) / (h.shape[2] * h.shape[3])) * scale
        return h / 2 if half else h


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_graph_takes_what_it_was_traced_for_and_nothing_else() -> None:
    x = torch.randn(2, 3, 16, 16)
    graph, module = emitted(Mean().eval(), (x, 1.0))
    for rows in (1, 2, 7):
        more = torch.randn(rows, 3, 16, 16)
        for found in (graph(more, 1.0), graph(more), graph(scale=1.0, x=more), graph(more, half=False)):
            torch.testing.assert_close(found, module(more))
    refuses(lambda: graph(torch.randn(2, 3, 32, 32)), "x is a tensor (2, 3, 32, 32)", "(any, 3, 16, 16)", "fix")
    refuses(lambda: graph(x[0]), "x is a tensor (3, 16, 16)")
    refuses(lambda: graph(x, 3.0), "scale is 3.0", "traced on 1.0")
    refuses(lambda: graph(x, True), "scale is True")
    refuses(lambda: graph(x, None), "scale is None")
    refuses(lambda: graph(1.0), "x is 1.0", "a tensor")
    refuses(lambda: graph(x, half=True), "half")
    refuses(lambda: graph(x, scales=1.0), "scales", "did you mean scale?")
    refuses(lambda: graph(scale=1.0), "x is missing")
    refuses(lambda: graph(x, x=x), "x is given twice")
    refuses(lambda: graph([x]), "another way")
    refuses(lambda: graph(x.double()), "float64", "float32")
    torch.testing.assert_close(copy.deepcopy(graph).double()(x.double()), copy.deepcopy(module).double()(x.double()))
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(x), module(x))


def test_numbers_that_are_none_are_alike() -> None:
    class Filled(Mean):
        def forward(self, x: Tensor, scale: float = 1.0, half: bool = False) -> Tensor:
            return super().forward(x).nan_to_num(scale)

    nan = float("nan")
    graph, module = emitted(Filled().eval(), (x := torch.randn(2, 3, 8, 8), nan))
    torch.testing.assert_close(graph(x, nan), module(x, nan))
    refuses(lambda: graph(x, 1.0), "scale is 1.0")


class Counted(nn.Module):
    """The number of rows ends in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x).relu()) / len(x)


class Carried(nn.Module):
    """States of as many rows as the example has: with more, torch writes past their end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.o = nn.Linear(6, 12), nn.LSTM(12, 24, 2, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(2, len(x), 24)
        return self.o(self.cell(self.a(x), (start, start))[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(("build", "shape"), [(Counted, (3, 6)), (Carried, (3, 4, 6))])
def test_rows_that_the_code_counts_are_fixed_in_the_graph_and_in_its_file(
    build: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    x, more = torch.randn(shape), torch.randn(17, *shape[1:])
    result = graphprune.compile(build().eval(), x, keep=0.5, emit="graph")
    graphprune.save(result, tmp_path / "out")
    loaded: Any = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(loaded(x), result.model(x))
    refuses(lambda: result.model(more), f"x is a tensor ({', '.join(map(str, more.shape))})")
    with pytest.raises(Exception, match="3"):
        loaded(more)


class Paired(nn.Module):
    """Rows in pairs, two inputs of one size, a branch for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, u: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        h = self.o(self.a(u).relu()) + 3 * v
        h = h * 2 if h.shape[1] > 20 else h
        h = h.view(h.shape[0] // 2, 2, h.shape[1], 8)
        return h if bias is None else h + bias


def test_open_sizes_keep_the_conditions_of_the_trace(tmp_path: Path) -> None:
    u, v = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    result = graphprune.compile(model := Paired().eval(), (u, v), keep=0.5, emit="graph", method="magnitude")
    module = graphprune.compile(model, (u, v), keep=0.5, method="magnitude").model
    graphprune.save(result, tmp_path / "out")
    loaded: Any = torch.export.load(tmp_path / "out" / "model.pt2").module()
    others = torch.randn(8, 9, 8), torch.randn(8, 9, 8)
    for graph in (result.model, loaded):
        torch.testing.assert_close(graph(*others), module(*others))
    for wrong, words in [
        ((u, v[:4]), ("u.shape[0] = 6, ", "v.shape[0] = 4", "v.shape[0] == u.shape[0]")),
        ((u[:3], v[:3]), ("u.shape[0] = 3",)),
        ((torch.randn(6, 21, 8), torch.randn(6, 21, 8)), (".shape[1] <= 20",)),
    ]:
        refuses(lambda given=wrong: result.model(*given), "the graph is not for these sizes", *words)
        with pytest.raises((AssertionError, RuntimeError)):
            loaded(*wrong)


def test_keywords_go_by_name_whatever_their_order() -> None:
    u, v = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    graph, module = emitted(Paired().eval(), {"v": v, "u": u})
    wanted = module(u, v)
    for found in (graph(u, v), graph(u, v=v), graph(u=u, v=v), graph(v=v, u=u), graph(u, v, bias=None)):
        torch.testing.assert_close(found, wanted)
    refuses(lambda: graph(u, v, bias=u), "bias")
    flat = graph.trace.flatten({"u": u, "v": v})
    assert [id(value) for value in flat] == [id(v), id(u)]


class Several(nn.Module):
    """As many inputs as there come."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.o(self.a(torch.stack(xs).sum(0)).relu())


def test_several_inputs_of_one_name_keep_their_rows_open() -> None:
    graph, module = emitted(Several().eval(), (torch.randn(3, 8), torch.randn(3, 8)))
    others = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(graph(*others), module(*others))
    refuses(lambda: graph(*others, others[0]), "no argument 2")
    refuses(lambda: graph(others[0]), "1 is missing")


def test_a_graph_compiles_and_keeps_its_checks() -> None:
    u, v = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    graph, module = emitted(Paired().eval(), (u, v))
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    for rows in (6, 8, 10):
        others = torch.randn(rows, 9, 8), torch.randn(rows, 9, 8)
        torch.testing.assert_close(compiled(*others), module(*others))
    in_parts = torch.compile(graph, backend="eager")
    refuses(lambda: in_parts(torch.randn(6, 21, 8), torch.randn(6, 21, 8)), "not for these sizes")
    refuses(lambda: in_parts(u, v, bias=u), "bias")


# ── a graph is a module ──────────────────────────────────────────────────────────────────────────────────────────────


class Turning(nn.Module):
    """A frozen layer, a complex parameter, and what training would change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.o = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)
        self.turn = nn.Parameter(torch.polar(torch.ones(5), torch.arange(5.0)))
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.o(nn.functional.dropout(self.norm(self.a(x)).relu(), training=self.training)) * self.turn).real


def test_a_graph_has_no_training_mode() -> None:
    graph, _ = emitted(Turning(), x := torch.randn(4, 6))
    assert not any(module.training for module in graph.modules())
    refuses(lambda: graph.train(), "no training mode", "fix")
    refuses(lambda: nn.Sequential(graph).train(), "no training mode")
    assert torch.equal(graph.eval()(x), graph.train(False)(x))


def test_parameters_of_a_graph_train_as_the_originals_do() -> None:
    model = Turning().eval()
    before = copy.deepcopy(model.state_dict())
    graph, module = emitted(model, x := torch.randn(4, 6))
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    body = {name.removeprefix("body."): parameter for name, parameter in graph.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in body.items()} == wanted
    assert not wanted["a.weight"] and wanted["turn"]
    graph(x).sum().backward()
    assert body["turn"].grad is not None and body["a.weight"].grad is None
    torch.optim.SGD(graph.parameters(), lr=0.1).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ── numbers that are no sizes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_padding_index_that_equals_a_width_stays() -> None:
    model = nn.Sequential(nn.Embedding(100, 16, padding_idx=16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    smaller: Any = graphprune.compile(model, torch.randint(0, 100, (2, 7)), keep=0.5).model
    table = smaller[0]
    assert table.padding_idx == 16 and table.embedding_dim == table.weight.shape[1] < 16
    assert f"Embedding(100, {table.embedding_dim}, padding_idx=16)" in repr(smaller)


def test_what_torchs_layers_keep_beside_their_sizes_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=8, dilation=8), nn.ReLU(), nn.Conv2d(8, 8, 8, stride=8, padding=8, groups=8), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 16, 16)
    smaller: Any = graphprune.compile(model, x, keep=0.5).model
    assert (smaller[0].padding, smaller[0].dilation) == ((8, 8), (8, 8))
    assert (smaller[2].kernel_size, smaller[2].stride, smaller[2].padding) == ((8, 8), (8, 8), (8, 8))
    width = len(smaller[0].weight)
    assert smaller[2].groups == smaller[2].in_channels == smaller[2].out_channels == smaller[3].in_channels == width < 8


class Windowed(nn.Module):
    """As many heads as a token sees neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.window, self.width = 8, 8, 32
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (part(x).view(rows, tokens, self.heads, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        place = torch.arange(tokens)
        near = (place[:, None] - place[None]).abs() < self.window
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Truncating(nn.Module):
    """As many tokens at the most as a projection is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.max_len, self.a = 16, nn.Linear(6, 16)
        self.down = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, : self.max_len]).relu() @ self.down


def test_a_window_that_equals_the_number_of_heads_stays() -> None:
    model = Windowed().eval()
    smaller: Any = graphprune.compile(model, torch.randn(2, 4, 32), keep=0.5, kinds=["head"]).model
    assert smaller.heads < 8 and smaller.window == 8
    x = torch.randn(2, 12, 32)
    zeroed = copy.deepcopy(model)
    gone = [not any(torch.equal(column, other) for other in smaller.o.weight.T) for column in model.o.weight.T]
    zeroed.o.weight.data[:, gone] = 0
    torch.testing.assert_close(smaller(x), zeroed(x))


def test_a_length_that_equals_a_width_stays() -> None:
    model = Truncating().eval()
    smaller: Any = graphprune.compile(model, torch.randn(2, 5, 6), keep=0.5).model
    assert smaller.max_len == 16 and len(smaller.down) < 16
    x = torch.randn(2, 14, 6)
    zeroed = copy.deepcopy(model)
    gone = [not any(torch.equal(row, other) for other in smaller.down) for row in model.down]
    zeroed.down.data[gone] = 0
    torch.testing.assert_close(smaller(x), zeroed(x))


# ── where numbers are kept, and what is loaded back ──────────────────────────────────────────────────────────────────


class Slotted:
    """Sizes in slots, of a class and of the one it is made of."""

    __slots__ = ("heads",)

    def __init__(self, heads: int) -> None:
        self.heads = heads


class More(Slotted):
    __slots__ = ("width",)

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(heads)
        self.width = width


class Headed(nn.Module):
    """Four heads of six; ``sizes`` are kept in many ways."""

    def __init__(self, sizes: Any, read: Callable[[Any], tuple[int, int]]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.sizes, self.read = sizes, read

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], *self.read(self.sizes)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], tuple[int, int]]]] = {
    "slashes": (lambda: {"a/h": 4, "a~1w": {"~0/": 6}}, lambda s: (s["a/h"], s["a~1w"]["~0/"])),
    "slots": (lambda: More(4, 6), lambda s: (s.heads, s.width)),
    "numpy": (lambda: [np.int64(4), np.int32(6)], lambda s: (s[0], s[1])),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["head", "value_width"])
def test_numbers_are_found_wherever_they_are_kept_and_come_back_from_files(way: str, kind: str, tmp_path: Path) -> None:
    build, read = WAYS[way]
    x = torch.randn(2, 5, 12)
    kinds = [kind] if kind == "head" else ["qk_width", "value_width"]
    model = Headed(build(), read).eval()
    result = graphprune.compile(model, x, keep=0.5, kinds=kinds, method="magnitude")
    graph = graphprune.replay(model, result.plan, x, emit="graph").model
    torch.testing.assert_close(result.model(x), graph(x))
    assert read(model.sizes) == (4, 6) != read(result.model.sizes)  # type: ignore[arg-type, union-attr]
    graphprune.save(result, tmp_path / "out")
    loaded = graphprune.load(tmp_path / "out", Headed(build(), read))
    torch.testing.assert_close(loaded(x), result.model(x))


def test_another_model_is_refused(tmp_path: Path) -> None:
    build, read = WAYS["slashes"]
    x = torch.randn(2, 5, 12)
    graphprune.save(graphprune.compile(Headed(build(), read), x, keep=0.5, kinds=["head"]), tmp_path / "out")
    wider = Headed(build(), read)
    wider.o = nn.Linear(24, 13)
    for other in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), Headed({"h": 4}, read), wider):
        refuses(lambda other=other: graphprune.load(tmp_path / "out", other), "holds another model", "fix")
