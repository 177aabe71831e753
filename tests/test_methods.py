"""Every published criterion equals a plain computation of its formula with hooks, which knows nothing of axes or groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from graphprune.passes.fisher import fisher
from graphprune.passes.flap import flap
from graphprune.passes.llm_pruner import llm_pruner
from graphprune.passes.magnitude import magnitude
from graphprune.passes.minitron import minitron
from graphprune.passes.protect_ends import protect_ends
from graphprune.passes.sensitivity import sensitivity
from graphprune.passes.taylor import taylor
from graphprune.passes.wanda_sp import wanda_sp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from graphprune import Budget, Calibration, Groups, Scores, couple, propagate, select, trace
from graphprune.errors import ModelLimit, UserMistake

KV, REP, WIDTH, FFN, LAYERS = 2, 2, 6, 20, 2


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A small grouped-query Llama in double precision, sharpened so that attention is not uniform."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=KV * REP,
        num_key_value_heads=KV, head_dim=WIDTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        spread = 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = torch.randn_like(parameter) * spread if parameter.ndim > 1 else 1 + 0.3 * torch.randn_like(parameter)
    return model.double()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    draw = torch.Generator().manual_seed(1)
    return Calibration(tuple({"input_ids": torch.randint(0, 53, (2, 13), generator=draw)} for _ in range(3)), "drawn")


@pytest.fixture(scope="module")
def groups(llama: nn.Module, calibration: Calibration) -> Groups:
    found = couple(propagate(trace(llama, calibration.inputs[0])))
    return Groups(found.axes, tuple(g for g in found if g.kind in ("head", "ffn")), found.frozen, found.graph)


def ffn(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate_proj:ffn"


def heads(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj:head"


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every linear layer reads, by its name."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].detach())

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    yield seen
    for hook in hooks:
        hook.remove()


def read(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """Every linear layer's inputs, (batches, rows, tokens, width)."""
    with inputs_of(model) as seen, torch.no_grad():
        for inputs in calibration.inputs:
            model(**inputs)
    return {name: torch.stack(values) for name, values in seen.items()}


def gradients(model: nn.Module, calibration: Calibration) -> list[dict[str, Tensor]]:
    """The gradient of every sample's loss, by parameter."""
    found = []
    for row in torch.cat(calibration.batches):
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0]
        cross_entropy(logits[:-1], row[1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def members(layer: int) -> dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]]:
    """By hand: for each group of a layer, its tensors, each with the view that puts units first: (units, vectors, elements)."""
    at, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    row: Callable[[Tensor], Tensor] = lambda w: w.reshape(FFN, 1, -1)  # noqa: E731
    column: Callable[[Tensor], Tensor] = lambda w: w.T.reshape(FFN, 1, -1)  # noqa: E731
    query: Callable[[Tensor], Tensor] = lambda w: w.reshape(KV, REP * WIDTH, -1)  # noqa: E731
    key: Callable[[Tensor], Tensor] = lambda w: w.reshape(KV, WIDTH, -1)  # noqa: E731
    out: Callable[[Tensor], Tensor] = lambda w: w.T.reshape(KV, REP * WIDTH, -1)  # noqa: E731
    return {
        ffn(layer): [(f"{mlp}.gate_proj.weight", row), (f"{mlp}.up_proj.weight", row), (f"{mlp}.down_proj.weight", column)],
        heads(layer): [
            (f"{at}.q_proj.weight", query), (f"{at}.k_proj.weight", key),
            (f"{at}.v_proj.weight", key), (f"{at}.o_proj.weight", out),
        ],
    }  # fmt: skip


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=1e-9, atol=1e-12)


AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda rows: rows.sum(0),
    "max": lambda rows: rows.max(0).values,
    "mean": lambda rows: rows.mean(0),
    "product": lambda rows: rows.log().sum(0),
    "last-only": lambda rows: rows[-1],
    "first-only": lambda rows: rows[0],
}


@pytest.mark.parametrize("aggregate", AGGREGATE)
@pytest.mark.parametrize("order", ["vector", "first", "second", "mixed"])
def test_llm_pruner(llama: nn.Module, groups: Groups, calibration: Calibration, order: str, aggregate: str) -> None:
    grads = gradients(llama, calibration)
    found = llm_pruner(llama, groups, calibration, order=order, aggregate=aggregate)
    weights = dict(llama.named_parameters())
    for layer in range(LAYERS):
        for group, tensors in members(layer).items():
            rows = []
            for name, view in tensors:
                w, g = weights[name].detach(), torch.stack([grad[name] for grad in grads])
                fisher_part = w**2 * (g**2).mean(0)
                if order == "vector":
                    rows.append(view(w * g.mean(0)).sum(2).abs().sum(1))
                else:
                    first = w * g.mean(0)
                    whole = {"first": first.abs(), "second": fisher_part, "mixed": (first - fisher_part / 2).abs()}
                    rows.append(view(whole[order]).sum((1, 2)))
            close(found[group], AGGREGATE[aggregate](torch.stack(rows)))


@pytest.mark.parametrize("aggregate", AGGREGATE)
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude(llama: nn.Module, groups: Groups, p: int, aggregate: str) -> None:
    found = magnitude(llama, groups, p=p, aggregate=aggregate)
    for layer in range(LAYERS):
        for group, tensors in members(layer).items():
            rows = [view(llama.get_parameter(name).detach().abs() ** p).sum((1, 2)) for name, view in tensors]
            close(found[group], AGGREGATE[aggregate](torch.stack(rows)))


def test_llm_pruner_whole_units(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    grads = gradients(llama, calibration)
    found = llm_pruner(llama, groups, calibration, order="vector", vectors="unit")
    for group, tensors in members(1).items():
        mean = {name: sum(grad[name] for grad in grads) / len(grads) for name, _ in tensors}
        close(found[group], sum(view(llama.get_parameter(n).detach() * mean[n]).sum((1, 2)).abs() for n, view in tensors))


def test_taylor_sums_batches(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    grads = gradients(llama, calibration)
    found = taylor(llama, groups, calibration)
    for group, tensors in members(0).items():
        batches = [{n: (grads[i][n] + grads[i + 1][n]) / 2 for n, _ in tensors} for i in range(0, len(grads), 2)]
        expected = sum(view((llama.get_parameter(n).detach() * g[n]).abs()).sum((1, 2)) for g in batches for n, view in tensors)
        close(found[group], expected)


def test_fisher_is_the_squared_gradient_of_a_mask(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    found = fisher(llama, groups, calibration)
    for layer in range(LAYERS):
        for group, module, span in (
            (ffn(layer), llama.model.layers[layer].mlp.down_proj, 1),
            (heads(layer), llama.model.layers[layer].self_attn.o_proj, REP * WIDTH),
        ):
            total = torch.zeros(found[group].shape, dtype=torch.float64)
            for row in torch.cat(calibration.batches):
                mask = torch.ones(len(total), dtype=torch.float64, requires_grad=True)
                hook = module.register_forward_pre_hook(lambda _, args, m=mask, s=span: args[0] * m.repeat_interleave(s))
                cross_entropy(llama(input_ids=row[None]).logits[0, :-1], row[1:]).backward()
                hook.remove()
                assert mask.grad is not None
                total += mask.grad**2 / 2
            close(found[group], total)
    llama.zero_grad(set_to_none=True)


def test_wanda_sp(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    found, seen = wanda_sp(llama, groups, calibration), read(llama, calibration)
    for layer, (down, out) in enumerate(last_two(llama)):
        for name, group, span in ((down, ffn(layer), 1), (out, heads(layer), REP * WIDTH)):
            weight, norms = llama.get_submodule(name).weight.detach(), seen[name].flatten(0, 2).square().mean(0).sqrt()
            close(found[group], (weight.abs().mean(0) * norms).reshape(-1, span).sum(1))


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
def test_flap(llama: nn.Module, groups: Groups, calibration: Calibration, metric: str) -> None:
    found, seen = flap(llama, groups, calibration, metric=metric), read(llama, calibration)
    for layer, (down, out) in enumerate(last_two(llama)):
        for name, group, span in ((down, ffn(layer), 1), (out, heads(layer), REP * WIDTH)):
            weight, x = llama.get_submodule(name).weight.detach(), seen[name].flatten(0, 2)
            whole = {
                "wifv": x.var(0, unbiased=False) * weight.norm(dim=0) ** 2,
                "ifv": x.var(0, unbiased=False),
                "wifn": weight.abs().mean(0) * (x**2).mean(0).sqrt(),
            }[metric]
            close(found[group], ((whole - whole.mean()) / whole.std()).reshape(-1, span).mean(1))


def test_minitron(llama: nn.Module, calibration: Calibration) -> None:
    every = couple(propagate(trace(llama, calibration.inputs[0])))
    groups = Groups(every.axes, tuple(g for g in every if g.kind in ("head", "ffn", "hidden")), every.frozen, every.graph)
    found, seen = minitron(llama, groups, calibration), read(llama, calibration)

    def importance(x: Tensor, span: int) -> Tensor:
        per_token = x.unflatten(-1, (-1, span)).norm(dim=-1)
        return (per_token.flatten(1, 2).mean(1) ** 2).sum(0).sqrt()

    for layer, (down, out) in enumerate(last_two(llama)):
        close(found[ffn(layer)], importance(seen[down], 1))
        close(found[heads(layer)], importance(seen[out], REP * WIDTH))
    norms = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.gate_proj")] + ["lm_head"]
    hidden = next(group.name for group in groups if group.kind == "hidden")
    close(found[hidden], sum(importance(seen[name], 1) for name in norms))


def last_two(model: nn.Module) -> list[tuple[str, str]]:
    return [(f"model.layers.{i}.mlp.down_proj", f"model.layers.{i}.self_attn.o_proj") for i in range(LAYERS)]


class Convolutional(nn.Module):
    """Two convolutions with a normalisation between, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Conv2d(10, 7, 3, bias=True)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.norm(self.one(x)).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def conv() -> nn.Module:
    torch.manual_seed(2)
    model = Convolutional().double().eval()
    model.norm.running_mean.normal_()
    return model


@pytest.fixture(scope="module")
def images() -> Calibration:
    draw = torch.Generator().manual_seed(3)
    return Calibration(tuple({"x": torch.randn(4, 3, 9, 9, generator=draw, dtype=torch.float64)} for _ in range(2)), "drawn")


def test_activation_criteria_on_convolutions(conv: Any, images: Calibration) -> None:
    groups = couple(propagate(trace(conv, images.inputs[0])))
    x = torch.cat([conv.norm(conv.one(inputs["x"])).relu() for inputs in images.inputs]).detach()
    name = next(group.name for group in groups if group.size == 10)
    pixels, kernel = x.movedim(1, -1).flatten(0, -2), conv.two.weight.detach().movedim(1, 0).flatten(1)
    close(wanda_sp(conv, groups, images)[name], kernel.abs().mean(1) * pixels.square().mean(0).sqrt())
    close(flap(conv, groups, images, standardise=False)[name], pixels.var(0, unbiased=False) * kernel.square().sum(1))
    per_batch = x.reshape(2, 4, 10, 7, 7).abs().mean((1, 3, 4))
    close(minitron(conv, groups, images)[name], per_batch.square().sum(0).sqrt())


def test_what_no_weight_reads_is_a_limit(llama: nn.Module, calibration: Calibration) -> None:
    every = couple(propagate(trace(llama, calibration.inputs[0])))
    with pytest.raises(ModelLimit, match="read by no weight"):
        wanda_sp(llama, every, calibration)


def test_rows_are_dealt_into_the_traced_shape(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    rows = torch.cat(calibration.batches)
    ragged = Calibration(tuple({"input_ids": part} for part in rows.split(4)), "ragged")
    close(wanda_sp(llama, groups, ragged)[ffn(0)], wanda_sp(llama, groups, calibration)[ffn(0)])
    with pytest.raises(UserMistake, match="do not look like"):
        wanda_sp(llama, groups, Calibration(({"input_ids": rows[:, :5]},), "short"))


def test_ends_are_found_by_name(llama: nn.Module, groups: Groups) -> None:
    assert set(protect_ends(groups, Budget(), first=1, last=0).protect) == {ffn(0), heads(0)}
    assert set(protect_ends(groups, Budget(protect=("x",)), first=0, last=1).protect) == {"x", ffn(1), heads(1)}
    with pytest.raises(ModelLimit, match="cannot be spared"):
        protect_ends(groups, Budget(), first=1, last=1)


@pytest.mark.parametrize("options", [{"order": "third"}, {"vectors": "none"}])
def test_unknown_options_are_mistakes(llama: nn.Module, groups: Groups, calibration: Calibration, options: dict[str, str]) -> None:
    with pytest.raises(UserMistake, match="knows no"):
        llm_pruner(llama, groups, calibration, **options)  # type: ignore[arg-type]


def test_sensitivity_measures_what_masking_does(llama: nn.Module, groups: Groups, calibration: Calibration) -> None:
    """The lowest quarter's scores add up to the divergence that masking them by hand gives; proportions within a group stay."""
    plain = wanda_sp(llama, groups, calibration)
    found = sensitivity(llama, groups, calibration, plain, share=0.25, samples=100)

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            return torch.cat([llama(**inputs).logits.log_softmax(-1).flatten(0, 1) for inputs in calibration.inputs])

    whole = log_probabilities()
    for layer, (down, _) in enumerate(last_two(llama)):
        lowest = plain[ffn(layer)].argsort()[: FFN // 4]
        mask = torch.ones(FFN, dtype=torch.float64)
        mask[lowest] = 0
        hook = llama.get_submodule(down).register_forward_pre_hook(lambda _, args, m=mask: args[0] * m)
        apart = kl_div(log_probabilities(), whole, log_target=True, reduction="batchmean")
        hook.remove()
        torch.testing.assert_close(found[ffn(layer)][lowest].sum(), apart, rtol=1e-4, atol=1e-9, check_dtype=False)
        ratio = found[ffn(layer)] / plain[ffn(layer)]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    few = sensitivity(llama, groups, calibration, plain, share=0.25, samples=1)
    assert all((few[group.name] > 0).any() for group in groups)
    with pytest.raises(UserMistake, match="between 0 and 1"):
        sensitivity(llama, groups, calibration, plain, share=1.0)


def test_rank_cuts_the_lowest_scores_wherever_they_are(groups: Groups) -> None:
    scores = Scores({g.name: torch.arange(g.size, dtype=torch.float64) - 5 * i for i, g in enumerate(groups)}, "given")
    inner = Groups(groups.axes, tuple(g for g in groups if g.kind == "ffn"), groups.frozen, groups.graph)
    plan = select(inner, scores, Budget(0.7, scope="rank"))
    kept = {cut.group: cut.kept for cut in plan.cuts}
    removed = [float(scores[g.name][u]) for g in inner for u in range(g.size) if g.name in kept and u not in kept[g.name]]
    stay = [float(scores[g.name][u]) for g in inner for u in range(g.size) if g.name not in kept or u in kept[g.name]]
    assert len(removed) in (12, 13) and max(removed) <= min(stay)
