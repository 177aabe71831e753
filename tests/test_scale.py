"""A repeated block is traced once, and the trace is the same; the work grows with the layers, not with their square."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphprune
from graphprune.errors import UserMistake
from graphprune.execute import execute, tensors_of
from graphprune.meta import source_line
from graphprune.repeat import Repeats
from graphprune.trace import Trace, trace
from tests.models import VOCABULARY, sharpened, tokens

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def text(cls: Any, config: Any, **settings: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (cls(config(**SMALL, **settings)).eval(), {"input_ids": tokens()})


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "llama": text(transformers.LlamaForCausalLM, transformers.LlamaConfig, intermediate_size=88, num_key_value_heads=2),
    "bert": text(transformers.BertForMaskedLM, transformers.BertConfig, intermediate_size=88),
    "gemma2": text(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        intermediate_size=88,
        num_key_value_heads=2,
        head_dim=12,
        pad_token_id=0,
    ),
    "neox": text(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, intermediate_size=88),
    "albert": text(transformers.AlbertForMaskedLM, transformers.AlbertConfig, intermediate_size=88),
    "resnet": lambda: (
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12, 24], depths=[3, 4], num_labels=5)
        ).eval(),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
}


def difference(one: Trace, other: Trace) -> str | None:
    """The first node in which two traces are not the same up to names."""
    pairs = dict(zip(one.graph.nodes, other.graph.nodes, strict=True))
    for node, twin in pairs.items():
        given = fx.map_arg((node.args, node.kwargs), lambda operand: pairs[operand].name)
        same_call = given == fx.map_arg((twin.args, twin.kwargs), lambda operand: operand.name)
        same_target = node.op != "call_function" or node.target is twin.target
        same_tensor = one.tensors.get(node.name) == other.tensors.get(twin.name)
        if not (node.op == twin.op and same_call and same_target and same_tensor and _seen(node) == _seen(twin)):
            return f"{node.format_node()} | {twin.format_node()}"
    return None


def _seen(node: fx.Node) -> Any:
    value, stack = node.meta.get("val"), node.meta.get("nn_module_stack") or {}
    shape = (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else None
    return shape, list(stack.values()), source_line(node) if node.op == "call_function" and node.meta.get("stack_trace") else ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_traced_once_gives_the_same_trace(family: str) -> None:
    model, inputs = FAMILIES[family]()
    assert Repeats(model, marked=True).families or family == "albert"
    assert difference(graphprune.trace(model, inputs, repeat=False), graphprune.trace(model, inputs)) is None


class Peeking(nn.Module):
    """Reads a tensor of a block that it also runs: as it is, or if it is there."""

    def __init__(self, ask: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3))
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        weight = self.ask(self.blocks[2][2])
        return x if weight is None else x * weight.sum()


@pytest.mark.parametrize("ask", [lambda m: m.weight, lambda m: getattr(m, "weight", None), lambda m: next(m.parameters())])
def test_a_block_whose_tensors_are_read_from_outside_is_traced_with_them(ask: Callable[[nn.Module], Any]) -> None:
    model, x = Peeking(ask), torch.randn(2, 6)
    names = [name for name, _ in model.named_parameters()]
    assert difference(graphprune.trace(model, x, repeat=False), graphprune.trace(model, x)) is None
    assert [name for name, _ in model.named_parameters()] == names


class Twin(nn.Module):
    """A block that computes with its own number, keeps count of its calls, or finds what the first one left for the others."""

    def __init__(self, number: int, kind: str, left: SimpleNamespace) -> None:
        super().__init__()
        self.number, self.kind, self.seen, self.left = number, kind, 0, left
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x))
        if self.kind == "number":
            return x * self.number
        if self.kind == "count":
            self.seen += 1
            return x + self.seen
        if self.kind == "left" and self.left.there is None:
            self.left.there = x
        if self.kind == "left":
            return x * self.left.there
        return x + (torch.ones(8) if self.kind == "constant" else 1)


class Stack(nn.Sequential):
    """Starts with nothing left by anyone."""

    def forward(self, x: Tensor) -> Tensor:
        self[0].left.there = None
        return super().forward(x)


@pytest.mark.parametrize("kind", ["number", "count", "constant", "left", "none"])
def test_twins_that_compute_differently_are_told_apart(kind: str) -> None:
    left = SimpleNamespace(there=None)
    model = Stack(*(Twin(number // 2, kind, left) for number in range(6)))
    plain = graphprune.trace(model, torch.randn(3, 8), repeat=False)
    for module in model:
        module.seen = 0
    assert difference(plain, graphprune.trace(model, torch.randn(3, 8))) is None
    assert [module.number for module in model] == [0, 0, 1, 1, 2, 2]


def test_flags_and_forwards_are_left_as_they_were() -> None:
    model, inputs = FAMILIES["llama"]()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)  # type: ignore[union-attr,operator,index]
    before = [p.requires_grad for p in model.parameters()], type(model.model.layers[0]).__dict__["forward"]  # type: ignore[index,union-attr]
    graphprune.trace(model, inputs)
    assert before == ([p.requires_grad for p in model.parameters()], type(model.model.layers[0]).__dict__["forward"])  # type: ignore[index,union-attr]


def test_layers_in_evaluation_mode_stay_so_inside_a_model_in_training() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval()), nn.Linear(4, 2))
    graphprune.trace(model, torch.randn(3, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def test_tensors_that_cannot_be_traced_are_named() -> None:
    with pytest.raises(UserMistake, match="weight has no shape yet"):
        graphprune.trace(nn.Sequential(nn.LazyLinear(4)), torch.randn(3, 4))
    with torch.inference_mode():
        model = nn.Linear(4, 2)
    with pytest.raises(UserMistake, match="weight was made in inference mode"):
        graphprune.trace(model, torch.randn(3, 4))


def test_a_chain_of_five_hundred_sums_is_solved() -> None:
    """A residual width is merged once a layer: neither the stack nor the time may grow with the square."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(250))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    groups = graphprune.couple(graphprune.propagate(graphprune.trace(Deep(), torch.randn(2, 6))))
    assert len(groups.groups) == 0


class Wide(nn.Module):
    """A table that is the head too, products with and without a bias, a convolution of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1500, 400)
        self.up, self.down = nn.Linear(400, 1001), nn.Linear(1001, 400, bias=False)
        self.mix = nn.Conv1d(400, 900, 1)
        self.back = nn.Linear(900, 400)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down(self.up(self.table(ids)).relu())
        x = self.back(self.mix(x.mT).relu().mT)
        return nn.functional.linear(x, self.table.weight), self.mix(x[0].mT)


class Doubles(TorchDispatchMode):
    """Remembers how many elements the largest memory of doubles had."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float64:
            self.largest = max(self.largest, made.untyped_storage().nbytes() // 8)
        return made


def test_no_large_weight_is_held_whole_in_double_precision() -> None:
    model, ids = sharpened(Wide()), torch.randint(0, 1500, (2, 5))
    found = trace(model, ids)
    tensors = tensors_of(model, found)
    with Doubles() as seen:
        made = execute(found, tensors, [ids], dtype=torch.float64)
    assert seen.largest < min(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    for mine, theirs in zip(made, copy.deepcopy(model).double()(ids), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)
