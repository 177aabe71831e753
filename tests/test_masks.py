"""Masks against plain scripts that know nothing of graphs: hooks on named modules, textbook loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from graphprune.passes.sparsegpt import inverse_factor, sparsegpt
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM

from graphprune import Calibration, Moments, Pattern, Sparse, propagate, sparsify, trace
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import execute, tensors_of
from graphprune.masks import zeros
from graphprune.matrices import products
from graphprune.sparse import Matrix, lowest, pattern_of

Rule = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return sharpened(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 101, (rows, 16), generator=draw)} for rows in (4, 4, 2)]


def sharpened(model: Any) -> Any:
    """Weights large enough for attention to choose."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
    return model.eval()


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer but the head, in the order a decoder runs them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name:
            yield name, module


def plainly(model: nn.Module, batches: list[dict[str, Tensor]], rule: Rule, *, sequential: bool = True) -> nn.Module:
    """One layer after the other: run everything, look at the layer's inputs with a hook, replace its weight."""
    sparse = deepcopy(model)
    made = {}
    for name, module in linears(sparse):
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                sparse(**batch)
        hook.remove()
        made[name] = rule(module.weight.detach().clone(), torch.cat(seen))
        if sequential:
            module.weight.data = made[name]
    for name, module in linears(sparse):
        module.weight.data = made[name]
    return sparse


def plain_wanda(weight: Tensor, x: Tensor) -> Tensor:
    score = weight.abs() * x.norm(dim=0)
    for row in range(len(weight)):
        weight[row, score[row].sort()[1][: weight.shape[1] // 2]] = 0
    return weight


def plain_wanda_2_4(weight: Tensor, x: Tensor) -> Tensor:
    score = weight.abs() * x.norm(dim=0)
    for start in range(0, weight.shape[1], 4):
        gone = torch.topk(score[:, start : start + 4], 2, dim=1, largest=False)[1]
        weight.scatter_(1, start + gone, 0)
    return weight


def plain_sparsegpt(weight: Tensor, x: Tensor, *, block: int = 16, nm: bool = False) -> Tensor:
    """The published loop in double precision: inverse, then its Cholesky factor, then column after column."""
    W = weight.double()
    H = 2 * x.double().T @ x.double() / len(x)
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for start in range(0, W.shape[1], block):
        stop = min(start + block, W.shape[1])
        score = W[:, start:stop] ** 2 / U.diagonal()[start:stop] ** 2
        order = score.flatten().argsort()[: score.numel() // 2]
        mask = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, order, True).reshape(score.shape)
        errors = torch.zeros_like(W[:, start:stop])
        for j in range(start, stop):
            if nm and j % 4 == 0:
                now = W[:, j : j + 4] ** 2 / U.diagonal()[j : j + 4] ** 2
                mask[:, j - start : j - start + 4] = False
                mask[:, j - start : j - start + 4].scatter_(1, now.topk(2, dim=1, largest=False)[1], True)
            error = torch.where(mask[:, j - start], W[:, j], 0) / U[j, j]
            for k in range(j, stop):
                W[:, k] -= error * U[j, k]
            W[mask[:, j - start], j] = 0
            errors[:, j - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W.float()


# ── against the plain scripts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "rule", "sequential"),
    [({"sparsity": 0.5}, plain_wanda, True), ({"sparsity": 0.5}, plain_wanda, False), ({"pattern": "2:4"}, plain_wanda_2_4, True)],
)
def test_wanda_is_what_a_plain_script_gives(
    llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], setting: dict[str, Any], rule: Rule, sequential: bool
) -> None:
    mine = sparsify(llama, batches, method="wanda", sequential=sequential, **setting)
    theirs = plainly(llama, batches, rule, sequential=sequential)
    for (name, one), (_, other) in zip(linears(mine), linears(theirs), strict=True):
        assert torch.equal(one.weight, other.weight), name


@pytest.mark.parametrize("nm", [False, True])
def test_sparsegpt_is_what_a_plain_script_gives(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], nm: bool) -> None:
    setting: dict[str, Any] = {"pattern": "2:4"} if nm else {"sparsity": 0.5}
    mine = sparsify(llama, batches, method="sparsegpt", options={"block": 16}, **setting)
    theirs = plainly(llama, batches, lambda weight, x: plain_sparsegpt(weight, x, nm=nm))
    for (name, one), (_, other) in zip(linears(mine), linears(theirs), strict=True):
        assert torch.equal(one.weight == 0, other.weight == 0), name
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)


def test_magnitude_has_one_threshold_a_matrix(llama: LlamaForCausalLM) -> None:
    mine = sparsify(llama, method="magnitude", sparsity=0.3)
    for (_, one), (_, dense) in zip(linears(mine), linears(llama), strict=True):
        gone = one.weight == 0
        assert int(gone.sum()) == int(0.3 * gone.numel())
        assert dense.weight[gone].abs().max() <= dense.weight[~gone].abs().min()
        assert torch.equal(one.weight[~gone], dense.weight[~gone])


def test_cumulative_wanda_meets_the_target_with_one_share_for_all_rows(
    llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]
) -> None:
    mine = sparsify(llama, batches, method="wanda", sparsity=0.5, options={"cumulative": True})
    rows = mine.get_submodule("model.layers.0.mlp.down_proj").weight.eq(0).float().mean(1)  # type: ignore[union-attr, operator]
    assert rows.mean() == pytest.approx(0.5, abs=0.01)
    assert rows.min() < rows.max()


class Chain(nn.Sequential):
    """Layers one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


# ── any layout ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Zoo(nn.Module):
    """Products of every layout."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.two = nn.Conv2d(2, 6, (3, 2), padding="same", dilation=2)
        self.grouped = nn.Conv2d(6, 9, 3, stride=(1, 2), groups=3)
        self.three = nn.Conv3d(3, 4, 2)
        self.experts = nn.Parameter(torch.randn(3, 5, 7))
        self.right = nn.Parameter(torch.randn(5, 11))
        self.left = nn.Parameter(torch.randn(5, 13))

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (
            self.one(a),
            self.grouped(self.two(b)),
            self.three(c),
            torch.bmm(d, self.experts),
            d @ self.right,
            torch.einsum("btk,kj->jbt", d, self.left),
        )


def test_rows_times_vectors_is_what_the_node_computes() -> None:
    torch.manual_seed(0)
    model = Zoo().double().eval()
    inputs = torch.randn(2, 6, 11), torch.randn(2, 2, 9, 8), torch.randn(2, 3, 4, 5, 3), torch.randn(3, 4, 5)
    doubles = tuple(value.double() for value in inputs)
    axes = propagate(trace(model, doubles))
    values: dict[Any, Tensor] = dict(zip(axes.trace.inputs, doubles, strict=True))
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model, axes.trace).items()}
    execute(axes.trace, tensors, doubles, see=lambda node, value: values.__setitem__(node.name, value))
    found = {product.weight: product for product in products(axes)}
    assert set(found) == {"one.weight", "two.weight", "grouped.weight", "three.weight", "experts", "right", "left"}
    for name, product in found.items():
        matrix = product.layout.matrix(tensors[name])
        assert torch.equal(product.layout.restored(matrix, tensors[name]), tensors[name])
        made = (product.layout.vectors(values[product.operand.name]) @ matrix.mT).detach()
        out = values[product.node.name].detach()
        bias = tensors.get(name.replace("weight", "bias")) if name.endswith("weight") else None
        out = out - bias.reshape(-1, *[1] * (out.ndim - 2)) if bias is not None else out
        assert made.sum() == pytest.approx(float(out.sum()))
        torch.testing.assert_close(made.flatten().sort()[0], out.flatten().sort()[0])


def test_transposed_weights_are_sparse_along_their_inputs(batches: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = sharpened(GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)))
    sparse = sparsify(model, batches, pattern="2:4", method="wanda")
    weight = sparse.get_parameter("transformer.h.0.mlp.c_proj.weight")
    assert (weight.reshape(-1, 4, 32) == 0).sum(1).eq(2).all()
    assert zeros(sparse)["transformer.wte.weight"] == 0


def test_a_grouped_convolution_is_sparse_group_by_group() -> None:
    torch.manual_seed(0)
    net = Chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    images = torch.randn(6, 3, 6, 6)
    sparse = sparsify(net.eval(), [{"x": images}], method="wanda", sparsity=0.5)
    assert zeros(sparse) == {"0.weight": pytest.approx(0.48, abs=0.02), "2.weight": 0.5, "5.weight": 0}
    with torch.no_grad():
        patches = nn.functional.unfold(sparse[:2](images), 3)  # type: ignore[index]
    for group in range(2):
        norm = patches[:, group * 36 : (group + 1) * 36].permute(1, 0, 2).flatten(1).norm(dim=1)
        weight = net[2].weight.detach()[group * 6 : (group + 1) * 6].flatten(1)  # type: ignore[union-attr, index]
        gone = lowest(weight.abs() * norm, Pattern(0.5))
        assert torch.equal(sparse[2].weight[group * 6 : (group + 1) * 6].flatten(1) == 0, gone)  # type: ignore[union-attr, index]


def test_each_expert_is_judged_by_the_tokens_it_gets(batches: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = sharpened(MixtralForCausalLM(config))
    before = model.config._experts_implementation
    sparse = sparsify(model, batches, method="wanda", sequential=False)
    assert model.config._experts_implementation == sparse.config._experts_implementation == before  # type: ignore[union-attr]
    assert zeros(sparse)["model.layers.0.mlp.gate.weight"] == 0
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1].detach())))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x, choice = torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])
    made = sparse.get_submodule("model.layers.0.mlp.experts")
    for expert in range(4):
        mine = x[(choice == expert).any(1)]
        weight = experts.gate_up_proj.detach()[expert]
        gone = lowest(weight.abs() * mine.norm(dim=0), Pattern(0.5))
        assert torch.equal(made.gate_up_proj[expert] == 0, gone)  # type: ignore[index]
        gate, up = (mine @ weight.T).chunk(2, dim=-1)
        inner = (nn.functional.silu(gate) * up).norm(dim=0)
        down = experts.down_proj.detach()[expert]
        assert torch.equal(made.down_proj[expert] == 0, lowest(down.abs() * inner, Pattern(0.5)))  # type: ignore[index]


def test_a_weight_used_twice_is_fitted_to_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.shared(torch.relu(self.shared(torch.relu(self.first(x))))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Twice().eval()
    seen: list[Matrix] = []

    def spy(matrix: Matrix, moments: Moments, pattern: Pattern) -> Sparse:
        seen.append(Matrix(matrix.name, moments.values))
        return Sparse(matrix.values)

    x = torch.randn(7, 6)
    sparsify(model, [{"x": x}], method=spy)
    with torch.no_grad():
        one = torch.relu(model.first(x))
        two = torch.relu(model.shared(one))
    both = torch.cat([one, two]).double()
    assert [matrix.name for matrix in seen] == ["first.weight", "shared.weight"]
    torch.testing.assert_close(seen[1].values, both.T @ both / 14, rtol=1e-5, atol=1e-6)


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "pattern"), [("magnitude", "2:4"), ("wanda", "4:8"), ("sparsegpt", "1:4")])
def test_every_m_inputs_keep_n(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], method: str, pattern: str) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    n, m = map(int, pattern.split(":"))
    sparse = sparsify(llama, Calibration(tuple(batches[:1]), "test"), method=method, pattern=pattern)
    for _, module in linears(sparse):
        assert (module.weight.reshape(len(module.weight), -1, m) != 0).sum(-1).eq(n).all()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(sparse.state_dict()[name], before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_a_model_without_head_is_sparse_throughout(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> None:
    body = llama.model
    assert isinstance(body, LlamaModel)
    assert {name for name, share in zeros(sparsify(body, batches)).items() if share == 0} == {"embed_tokens.weight"}


def test_sparsegpt_leaves_less_error_than_the_same_mask_without_update() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 40) @ torch.randn(40, 40)
    weight, gram = torch.randn(30, 40), Moments((x.T @ x).double() / 200)
    made = sparsegpt(Matrix("w", weight), gram, Pattern(0.5), block=8).values
    masked = weight * (made != 0)
    assert (x @ (made - weight).T).norm() < 0.8 * (x @ (masked - weight).T).norm()
    best = sparsegpt(Matrix("w", weight), gram, Pattern(0.0)).values
    torch.testing.assert_close(best, weight)


def test_no_hessian_is_too_singular() -> None:
    for gram in (torch.zeros(6, 6), torch.ones(6, 6), -torch.eye(6), torch.diag(torch.tensor([1e12, 1, 0, 0, 1e-12, 1]))):
        assert inverse_factor(gram.double() + torch.diag((gram.diagonal() == 0).double()), 0.0).isfinite().all()
    dead = torch.diag(torch.tensor([1.0, 0, 2, 3]))
    made = sparsegpt(Matrix("w", torch.ones(2, 4)), Moments(dead.double()), Pattern(0.25)).values
    assert made[:, 1].eq(0).all() and made.isfinite().all()


def test_skipped_names_and_odd_widths_stay_dense(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> None:
    lines: list[str] = []
    sparse = sparsify(llama, batches, pattern="16:32", skip=["model.layers.0", "*.k_proj.*"], progress=lines.append)
    dense = {name for name, share in zeros(sparse).items() if share == 0}
    assert "model.layers.0.self_attn.q_proj.weight" in dense and "model.layers.1.self_attn.k_proj.weight" in dense
    assert "model.layers.1.mlp.down_proj.weight" in dense and "model.layers.1.self_attn.q_proj.weight" not in dense
    assert "model.layers.1.mlp.down_proj.weight stays dense: 48 inputs are no multiple of 32" in lines


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


BAD = [(1.0, None), (-0.1, None), (None, "4:2"), (None, "0:4"), (None, "x"), (0.5, "2:4")]


@pytest.mark.parametrize(("sparsity", "pattern"), BAD)
def test_a_pattern_says_what_stays(sparsity: float | None, pattern: str | None) -> None:
    with pytest.raises(UserMistake):
        pattern_of(sparsity, pattern)


def test_what_cannot_be_done_says_why(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> None:
    with pytest.raises(UserMistake, match="needs calibration"):
        sparsify(llama, method="wanda")
    with pytest.raises(UserMistake, match="makes no masks"):
        sparsify(llama, batches, method="taylor")
    with pytest.raises(UserMistake, match="CUDA"):
        sparsify(llama, batches, method="magnitude", pattern="2:4", semi_structured=True)
    with pytest.raises(UserMistake, match="no linear layer is 2:4"):
        sparsify(llama, batches, method="magnitude", sparsity=0.1, semi_structured=True)
    with pytest.raises(UserMistake, match="no weight can be made sparse"):
        sparsify(Chain(nn.Linear(4, 4)), [{"x": torch.randn(2, 4)}])
    with pytest.raises(ModelLimit, match="not finite"):
        sparsify(Chain(nn.Linear(4, 4), nn.Linear(4, 3)), [{"x": torch.full((2, 4), torch.inf)}])


def test_patterns_read_as_people_write_them() -> None:
    assert [str(pattern_of(None, text)) for text in ("2:4", "4:8", "1:4")] == ["2:4", "4:8", "1:4"]
    assert str(pattern_of(0.5, None)) == str(pattern_of(None, None)) == "50%"
