"""Repairs after the cut, and the surgeon's scores, equal a plain computation with hooks and torch.linalg.lstsq."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from graphprune.passes.least_squares import DAMPINGS, carried, solve
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphprune
from graphprune import Calibration, Result
from graphprune.data import mixed
from graphprune.errors import ModelLimit, UserMistake
from graphprune.gradients import language_loss
from graphprune.normal import add_square, packed

LAYERS, FFN, KV, SPAN = 3, 18, 2, 12
DAMPING = 0.03


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV, head_dim=6, tie_word_embeddings=False,
    )  # fmt: skip
    return sharpened(hf.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=53, hidden_size=24, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.0
    )
    return sharpened(hf.BertForMaskedLM(config))


def sharpened(model: Any) -> Any:
    for p in model.parameters():
        p.data = torch.randn_like(p) * 1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 1 + 0.3 * torch.randn_like(p)
    return model.double().eval()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    draw = torch.Generator().manual_seed(1)
    return Calibration(tuple({"input_ids": torch.randint(0, 53, (2, 21), generator=draw)} for _ in range(3)), "drawn")


def pruned(model: Any, calibration: Calibration, *passes: str, **options: Any) -> Result:
    options = {"keep": 0.6, "kinds": ["ffn"], "method": "random", "alike": False, "verify": False} | options
    return graphprune.compile(model, calibration=calibration, passes=passes, **options)


def seen(model: Any, calibration: Calibration, *modules: str) -> list[Tensor]:
    """What modules read, all positions below each other."""
    found: list[list[Tensor]] = [[] for _ in modules]

    def keep(rows: list[Tensor]) -> Any:
        return lambda _, args: rows.append(args[0].detach().flatten(0, -2))

    hooks = [model.get_submodule(m).register_forward_pre_hook(keep(f)) for m, f in zip(modules, found, strict=True)]
    with torch.no_grad():
        for inputs in calibration.inputs:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in found]


def fitted(x: Tensor, missing: Tensor, damping: float = DAMPING) -> Tensor:
    """The change of a weight that makes up for ``missing``, with damping in proportion to each input's power."""
    pull = torch.diag((damping * x.square().sum(0)).sqrt())
    zeros = x.new_zeros(len(pull), missing.shape[1])
    return torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([missing, zeros])).solution.T


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def kept(result: Result, name: str) -> list[int]:
    return next((list(cut.kept) for cut in result.plan.cuts if any(m.startswith(name) for m in cut.members)), [])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-7, atol=1e-9)


def test_least_squares_on_the_originals_inputs(llama: Any, calibration: Calibration) -> None:
    result = pruned(llama, calibration, f"least_squares:given=then:drift=0:even=false:damping={DAMPING}")
    for layer in range(LAYERS):
        (x,), stay = seen(llama, calibration, down(layer)), kept(result, down(layer))
        whole = llama.get_submodule(down(layer)).weight.detach()
        expected = whole[:, stay] + fitted(x[:, stay], x @ whole.T - x[:, stay] @ whole[:, stay].T)
        same(result.model.get_submodule(down(layer)).weight, expected)


@pytest.mark.parametrize(("even", "share"), [(False, 1.0), (True, 1.0), (True, 0.5)])
def test_least_squares_makes_up_for_the_stream(llama: Any, calibration: Calibration, even: bool, share: float) -> None:
    """Sequential, towards the original's stream: every writer in turn, each fitted to what the repaired model sends by then."""
    result = pruned(llama, calibration, f"least_squares:drift={share}:even={even}:damping={DAMPING}")
    plain = pruned(llama, calibration).model
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for writer, stream in ((f"{block}.self_attn.o_proj", block), (down(layer), f"{block}.post_attention_layernorm")):
            if layer == 0 and writer.endswith("o_proj"):
                continue
            then, stream_then = seen(llama, calibration, writer, stream)
            now, stream_now = seen(plain, calibration, writer, stream)
            weight, whole = plain.get_submodule(writer).weight.detach(), llama.get_submodule(writer).weight.detach()
            missing = then @ whole.T - now @ weight.T + share * (stream_then - stream_now)
            size = stream_then.square().mean(1, keepdim=True).sqrt() if even else torch.ones(len(now), 1)
            plain.get_submodule(writer).weight.data = weight + fitted(now / size, missing / size)
    for (name, found), expected in zip(result.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_more_of_it_brings_the_model_nearer(llama: Any, calibration: Calibration) -> None:
    def error(*passes: str) -> float:
        result = pruned(llama, calibration, *passes)
        with torch.no_grad():
            return sum(float((result.model(**i)[0] - llama(**i)[0]).square().mean()) for i in calibration.inputs)

    errors = [error(), error("least_squares:given=then:drift=0"), error("least_squares"), error("least_squares:where=all")]
    assert errors == sorted(errors, reverse=True)


def test_the_original_and_the_stock_config_stay(llama: Any, calibration: Calibration) -> None:
    before = deepcopy(llama.state_dict())
    result = pruned(llama, calibration, "least_squares:where=all", alike=True)
    assert result.pruned.config is not None
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    graph = pruned(llama, calibration, "least_squares:where=all", alike=True, emit="graph")
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    inputs = calibration.inputs[0]
    torch.testing.assert_close(graph.model(**inputs)[0], result.model(**inputs)[0])


def test_least_squares_fits_biases_along(bert: Any, calibration: Calibration) -> None:
    name = "bert.encoder.layer.0.output.dense"
    result = pruned(bert, calibration, f"least_squares:given=then:drift=0:even=false:damping={DAMPING}")
    (x,), stay, layer = seen(bert, calibration, name), kept(result, name), bert.get_submodule(name)
    missing = x @ layer.weight.T - x[:, stay] @ layer.weight[:, stay].T
    change = fitted(torch.cat([x[:, stay], torch.ones(len(x), 1)], 1), missing.detach())
    same(result.model.get_submodule(name).weight, layer.weight[:, stay] + change[:, :-1])
    same(result.model.get_submodule(name).bias, layer.bias + change[:, -1])


def test_mean_bias(bert: Any, calibration: Calibration) -> None:
    name = "bert.encoder.layer.1.output.dense"
    result = pruned(bert, calibration, "mean_bias")
    (x,), layer = seen(bert, calibration, name), bert.get_submodule(name)
    gone = [unit for unit in range(FFN) if unit not in kept(result, name)]
    same(result.model.get_submodule(name).bias, layer.bias + layer.weight[:, gone] @ x[:, gone].mean(0))
    same(result.model.get_submodule(name).weight, layer.weight[:, kept(result, name)])


def test_mean_bias_needs_a_place(llama: Any, calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ModelLimit, match="no bias"):
        pruned(llama, calibration, "mean_bias")
    result = pruned(llama, calibration, "mean_bias:add=true", alike=True)
    assert result.pruned.config is None and "biases" in (result.pruned.obstacle or "")
    assert result.model.get_submodule(down(0)).bias.shape == (24,)
    loaded = graphprune.load(graphprune.save(result, tmp_path / "biased")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.model.state_dict().items())


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 7, 3, padding=1, stride=2), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def test_least_squares_on_convolutions() -> None:
    torch.manual_seed(4)
    model = Convolutional().double().eval()
    images = Calibration(tuple({"x": torch.randn(5, 3, 9, 9, dtype=torch.float64)} for _ in range(4)), "drawn")
    result = pruned(model, images, f"least_squares:given=then:drift=0:damping={DAMPING}", kinds=None, protect=["two:*"])
    stay = kept(result, "one")
    x = torch.cat([model.one(inputs["x"]).relu() for inputs in images.inputs]).detach()
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).movedim(1, -1).flatten(0, 1).unflatten(1, (10, 9))
    kernel = model.two.weight.detach()
    part = patches[:, stay].flatten(1)
    missing = patches.flatten(1) @ kernel.flatten(1).T - part @ kernel[:, stay].flatten(1).T
    change = fitted(torch.cat([part, torch.ones(len(part), 1)], 1), missing)
    same(result.model.two.weight, kernel[:, stay] + change[:, :-1].reshape(7, len(stay), 3, 3))


def halves(signal: float) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Two halves of a small regression, x and what is missing, with their moments."""
    draw = torch.Generator().manual_seed(3)
    truth = signal * torch.randn(5, 12, generator=draw, dtype=torch.float64)
    found = []
    for _ in range(2):
        x = torch.randn(40, 12, generator=draw, dtype=torch.float64)
        missing = x @ truth.T + torch.randn(40, 5, generator=draw, dtype=torch.float64)
        found.append((x, missing, x.T @ x, missing.T @ x))
    return found


def small(x: Tensor) -> Tensor:
    """xᵀ·x, packed."""
    total = packed(x, x.shape[1])
    add_square(total, x)
    return total


@pytest.mark.parametrize("signal", [0.1, 0.3, 3.0])
def test_the_damping_that_carries_over(signal: float) -> None:
    """It is the one that cross-validation on the data themselves picks."""
    (x, e, *one), (y, f, *other) = halves(signal)

    def solved(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
        return torch.linalg.solve(gram + damping * torch.diag(gram.diagonal()), cross, left=False)

    left = {
        damping: (f - y @ solved(*one, damping).T).square().sum() + (e - x @ solved(*other, damping).T).square().sum()
        for damping in DAMPINGS
    }
    expected = solved(one[0] + other[0], one[1] + other[1], min(left, key=left.__getitem__))
    torch.testing.assert_close(carried(tuple(one), (small(y), other[1])), expected)


def test_noise_changes_nothing() -> None:
    (_, _, *one), (y, _, _, _) = halves(0.0)
    assert carried((one[0], one[1]), (small(y), -one[1])).abs().max() == 0


def test_damping_never_fails() -> None:
    x = torch.randn(4, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    x[:, 5] = 0
    change = solve(x.T @ x, torch.randn(2, 9, dtype=torch.float64), 0.0)
    assert change.isfinite().all() and solve(x.T @ x, torch.zeros(2, 9, dtype=torch.float64), 0.0).abs().max() == 0


REFUSED = [
    "least_squares:given=never",
    "least_squares:drift=2",
    "least_squares:where=nowhere",
    "newton:steps=0",
    "newton:damping=-1",
]


@pytest.mark.parametrize("setting", REFUSED)
def test_unknown_choices_are_mistakes(llama: Any, calibration: Calibration, setting: str) -> None:
    with pytest.raises(UserMistake, match="cannot be"):
        pruned(llama, calibration, setting)


# ── the newton step ──────────────────────────────────────────────────────────────────────────────────────────────────


def periodic(count: int, seed: int = 0) -> Calibration:
    """Text that something can be learnt from: every sequence repeats four tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 53, (count, 4), generator=draw).repeat(1, 4)
    return Calibration(tuple({"input_ids": pair} for pair in rows.split(2)), "drawn")


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 1}


def losses(model: nn.Module, rows: Tensor) -> list[Tensor]:
    return [cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in rows]


def stepped(model: nn.Module, rows: Tensor, damping: float, tried: Tensor) -> nn.Module:
    """The model after one step, from the formulae as they are written."""
    named, predictions = vectors(model), rows.shape[1] - 1
    each = [torch.autograd.grad(loss, list(named.values())) for loss in losses(model.train(False), rows)]
    gradients = [torch.stack(rows) for rows in zip(*each, strict=True)]
    fisher = [predictions * g.var(0) for g in gradients]
    direction = [-g.mean(0) / (f + damping * f.mean()) for g, f in zip(gradients, fisher, strict=True)]
    along = sum(g @ d for g, d in zip(gradients, direction, strict=True))
    size = -along.mean() / (predictions * along.var())

    def at(length: float) -> nn.Module:
        moved = deepcopy(model)
        for parameter, d in zip(vectors(moved).values(), direction, strict=True):
            parameter.data += length * size * d
        return moved

    def loss(length: float) -> float:
        return float(sum(losses(at(length), tried)).detach())  # type: ignore[union-attr]

    lengths, longest = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0], 0
    while longest < 5 and loss(lengths[longest + 1]) < loss(lengths[longest]):
        longest += 1
    return at(lengths[longest] or next((short for short in (0.5, 0.25, 0.125) if loss(short) < loss(0.0)), 0.0))


def test_a_newton_step(llama: Any) -> None:
    text, cut = periodic(20), {"method": "magnitude", "seed": 1}
    plain, made = (pruned(llama, text, *passes, **cut).model for passes in ((), ("newton:damping=0.2",)))
    rows = torch.cat([inputs["input_ids"] for inputs in text.inputs])
    assert sum(losses(made, rows[:4])) < sum(losses(plain, rows[:4]))
    expected = stepped(plain, rows[4:], 0.2, rows[:4])
    for parameter, other in zip(made.parameters(), expected.parameters(), strict=True):
        same(parameter, other)


def test_newton_steps_share_the_text_and_leave_self_written_alone(llama: Any) -> None:
    text, more = periodic(32), periodic(8, seed=1)
    both = mixed(text, replace(more, written=frozenset(range(4))))
    assert both.given == text.inputs and len(both.inputs) == 20 and replace(more, written=frozenset(range(4))).given == ()
    made, plain = (pruned(llama, both, *passes, method="magnitude").model for passes in (("newton:steps=2",), ()))
    rows = torch.cat([inputs["input_ids"] for inputs in text.inputs])
    expected = stepped(stepped(plain, rows[4::2], 0.1, rows[:4]), rows[5::2], 0.1, rows[:4])
    for parameter, other in zip(made.parameters(), expected.parameters(), strict=True):
        same(parameter, other)


@pytest.mark.parametrize("seed", range(4))
def test_a_newton_step_does_no_harm_where_it_looks(llama: Any, seed: int) -> None:
    """The first sequences are what the pruned model says itself: whatever the others teach makes it worse there."""
    plain = pruned(llama, periodic(2), method="magnitude").model
    own = torch.randint(0, 53, (4, 1), generator=torch.Generator().manual_seed(seed))
    for _ in range(15):
        own = torch.cat([own, plain(own).logits[:, -1:].argmax(-1)], 1)
    text = Calibration(({"input_ids": own}, *periodic(32, seed).inputs), "drawn")
    made = pruned(llama, text, "newton", method="magnitude").model
    assert sum(losses(made, own)) <= sum(losses(plain, own))


class Pairs(nn.Module):
    """A language model whose code takes its batch apart, so that a graph of it has that size."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(53, 12), nn.LayerNorm(12), nn.Linear(12, 53)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = torch.stack(self.tokens(input_ids).unbind(0))
        return {"logits": self.head(self.norm(x + self.down(self.up(x).relu())))}


def test_a_graph_of_fixed_size_takes_its_newton_step_in_batches() -> None:
    torch.manual_seed(0)
    model, text = Pairs().eval(), periodic(40)
    results = [
        graphprune.compile(model, calibration=text, passes=p, keep=0.5, method="magnitude", emit="graph") for p in ([], ["newton"])
    ]
    plain, made = (result.model for result in results)
    assert not results[1].notes
    before, after = (sum(float(language_loss(m, inputs).detach()) for inputs in text.inputs) for m in (plain, made))
    assert after < before


def test_too_little_text_for_a_newton_step_is_said(llama: Any, calibration: Calibration) -> None:
    result, plain = pruned(llama, calibration, "newton"), pruned(llama, calibration)
    assert any("6 sequences of given text are too few" in note for note in result.notes)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), plain.model.parameters(), strict=True))


# ── the surgeon ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("kind", "span"), [("ffn", 1), ("head", SPAN)])
def test_obs_is_greedy_over_refitted_errors(llama: Any, calibration: Calibration, kind: str, span: int, gradients: bool) -> None:
    options = {"gradients": gradients, "damping": DAMPING, "block": 1e-6, "gradient_samples": 4}
    result = pruned(llama, calibration, method="obs", options=options, kinds=[kind], keep=0.9 if kind == "ffn" else 0.5)
    scores = result.facts[graphprune.Scores]
    for layer, group in enumerate(group for group in result.groups if group.kind == kind):
        reader = down(layer) if kind == "ffn" else f"model.layers.{layer}.self_attn.o_proj"
        (x,) = seen(llama, calibration, reader)
        weight = llama.get_submodule(reader).weight.detach()
        power = x.T @ x / len(x)
        power += torch.diag(DAMPING * power.diagonal())
        slope = slopes(llama, calibration, reader) if gradients else torch.eye(24, dtype=torch.float64)
        torch.testing.assert_close(scores[group.name], by_brute_force(weight, power, slope, span), rtol=1e-9, atol=1e-12)


def slopes(model: Any, calibration: Calibration, name: str) -> Tensor:
    """Mean g·gᵀ over the first two batches, g the gradient of a batch's mean loss times its positions."""
    found = []
    for inputs in calibration.inputs[:2]:
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, out: out.register_hook(found.append) and None)
        logits = model(**inputs).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
        hook.remove()
    model.zero_grad(set_to_none=True)
    g = torch.cat([one.flatten(0, 1) * one[..., 0].numel() for one in found])
    return g.T @ g / len(g)


def by_brute_force(weight: Tensor, power: Tensor, slope: Tensor, span: int) -> Tensor:
    """Remove the unit whose removal raises the refitted error least, one at a time."""

    def error(gone: list[int]) -> float:
        out = torch.tensor([unit * span + i for unit in gone for i in range(span)], dtype=torch.long)
        stay = torch.tensor([i for i in range(len(power)) if i not in set(out.tolist())], dtype=torch.long)
        inner = power[out][:, out]
        if len(stay):
            inner = inner - power[out][:, stay] @ torch.linalg.solve(power[stay][:, stay], power[stay][:, out])
        return float((slope @ weight[:, out] @ inner @ weight[:, out].T).trace())

    gone: list[int] = []
    scores, worst = torch.zeros(len(power) // span, dtype=torch.float64), 0.0
    while len(gone) < len(scores):
        costs = {unit: error([*gone, unit]) - error(gone) for unit in range(len(scores)) if unit not in gone}
        unit = min(costs, key=costs.__getitem__)
        worst = max(worst, costs[unit])
        scores[unit] = worst
        gone.append(unit)
    return scores
