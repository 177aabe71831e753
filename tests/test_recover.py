"""Recovery on small models: what is learnt, what is not, and that a plain model comes back."""

from __future__ import annotations

import sys
import time
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune import Calibration
from graphprune.divergence import divergence
from graphprune.errors import ModelLimit, UserMistake
from graphprune.examples import IGNORED, Example, batches, read_examples
from graphprune.recover import Recipe, linear_names, recipe_of, recover
from graphprune.written import written
from tests.models import tokens


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 40 for letter in text]}


TEXT = ["the quick brown fox jumps over the lazy dog and comes back " * 4, "a second document, somewhat shorter " * 3]
QUICK: dict[str, Any] = {"length": 16, "batch": 4, "micro": 2, "warmup": 1, "lr": 1e-2, "epochs": 1}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=41, hidden_size=16, intermediate_size=24, **settings, **changes)).eval()


def loss_on(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def rows() -> Tensor:
    return torch.stack([example.ids for example in read_examples(TEXT, Letters(), 16)])


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_products_in_bfloat16_leave_the_weights_as_precise_as_they_were() -> None:
    once = {**QUICK, "method": "full", "teacher": llama(), "distill": 0.3, "tokenizer": Letters()}
    fast, slow = (recover(llama(), TEXT, **once, bf16=bf16) for bf16 in (True, False))
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float32}
    change = [p - q for p, q in zip(slow.parameters(), llama().parameters(), strict=True)]
    apart = [p - q for p, q in zip(slow.parameters(), fast.parameters(), strict=True)]
    far, gap = (float(torch.cat([one.detach().flatten() for one in parts]).norm()) for parts in (change, apart))
    assert 0 < gap < 0.3 * far


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plain_model_comes_back_and_has_learnt(method: str, tmp_path: Any) -> None:
    model = llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = recover(model, TEXT, tokenizer=Letters(), method=method, **{**QUICK, "epochs": 12})
    assert type(made) is LlamaForCausalLM and not made.training and not model.training
    assert made.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in made.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    linear = {f"{name}.weight" for name in linear_names(model)}
    norms = {name for name in before if "norm" in name}
    assert changed == linear if method == "lora" else changed == linear | norms
    assert loss_on(made, rows()) < 0.98 * loss_on(model, rows())
    made.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(rows()).logits, made(rows()).logits)


def test_transposed_layers_take_adapters() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=41, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    made = recover(model, TEXT, tokenizer=Letters(), **{**QUICK, "epochs": 4})
    assert type(made) is GPT2LMHeadModel and loss_on(made, rows()) < loss_on(model, rows())
    assert not torch.equal(made.get_parameter("transformer.h.0.attn.c_attn.weight"), model.transformer.h[0].attn.c_attn.weight)


def test_every_projection_is_found_and_the_head_is_not() -> None:
    names = {name.rpartition(".")[2] for name in linear_names(llama())}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_same_seed_gives_the_same_model_and_leaves_the_generator_alone() -> None:
    model = llama()
    state = torch.get_rng_state()
    one, two, other = (recover(model, TEXT, tokenizer=Letters(), **QUICK, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same) and not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_micro_batches_add_up_to_the_batch() -> None:
    records = [{"prompt": "say", "response": "x" * n} for n in (3, 9, 5, 12)]
    whole, parts = (
        recover(llama(), records, tokenizer=Letters(), **{**QUICK, "micro": micro}, method="full", steps=2) for micro in (4, 1)
    )
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_time_ends_the_training() -> None:
    lines: list[str] = []
    begun = time.monotonic()
    recover(llama(), TEXT, tokenizer=Letters(), progress=lines.append, **{**QUICK, "epochs": None}, minutes=0.05)
    assert time.monotonic() - begun < 15 and lines and "tokens" in lines[-1]


# ── what is learnt ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_not_learnt() -> None:
    records = [{"prompt": "ask", "response": "tell"}, {"instruction": "do", "input": "it", "output": "ok"}]
    one, two = read_examples(records, Letters(), 200)
    assert one.labels.tolist() == [IGNORED] * 3 + Letters()("tell")["input_ids"] + [0]
    assert two.labels.tolist()[-3:] == [*Letters()("ok")["input_ids"], 0] and set(two.labels.tolist()[:-3]) == {IGNORED}
    with pytest.raises(UserMistake, match="nothing to learn"):
        read_examples(records[:1], Letters(), 3)


def test_only_answers_move_the_model() -> None:
    """With padding and prompts in the batch, one step equals a step on a plain sum over answer tokens."""
    records = [{"prompt": "ask", "response": "tell"}, {"prompt": "a", "response": "b"}]
    made = recover(llama(), records, tokenizer=Letters(), method="full", steps=1, batch=2, micro=2, length=32, lr=1e-3, clip=1e9)
    model = llama()
    inner = [parameter for name, parameter in model.named_parameters() if ".layers." in name or ".norm." in name]
    optimizer = torch.optim.AdamW(inner, lr=1e-3, weight_decay=0.0)
    total, wanted = torch.zeros(()), 0
    for example in read_examples(records, Letters(), 32):
        logits = model(input_ids=example.ids[None]).logits[0]
        for place in range(1, len(example.ids)):
            if example.labels[place] != IGNORED:
                total = total - logits[place - 1].log_softmax(-1)[example.labels[place]]
                wanted += 1
    (total / wanted).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for one, other in zip(made.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_batches_hold_as_much_of_each_pool_and_all_of_it_in_turn() -> None:
    pools = [[Example(torch.tensor([kind, i]), torch.tensor([kind, i])) for i in range(size)] for kind, size in ((0, 6), (1, 3))]
    drawn = [[tuple(e.ids.tolist()) for e in batch] for batch in islice(batches(pools, 4, 0), 6)]
    assert all(sum(kind for kind, _ in batch) == 2 for batch in drawn)
    small = [i for batch in drawn for kind, i in batch if kind == 1]
    assert [sorted(small[start : start + 3]) for start in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_the_teacher_writes_half_of_what_is_learnt() -> None:
    teacher, model = llama(), llama(initializer_range=0.1)
    settings: dict[str, Any] = {**QUICK, "method": "full", "teacher": teacher, "epochs": 12}
    plain, both = (recover(model, TEXT, tokenizer=Letters(), written=n, **settings) for n in (0, 8))
    own = written(teacher, teacher.config, 16, 16, seed=7)

    def apart(student: nn.Module) -> float:
        with torch.no_grad():
            return float(divergence(student(own).logits.flatten(0, 1), teacher(own).logits.flatten(0, 1)))

    assert apart(both) < apart(plain)


def test_divergence_is_kl_and_top_of_it_bounds_it_from_below() -> None:
    ours, theirs = torch.randn(7, 30), 3 * torch.randn(7, 30)
    plain = nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum")
    assert float(divergence(ours, theirs)) == pytest.approx(float(plain), rel=1e-5)
    assert float(divergence(ours, theirs, 30)) == pytest.approx(float(plain), rel=1e-5)
    few = [float(divergence(ours, theirs, top)) for top in (1, 5, 29)]
    assert few == sorted(few) and few[-1] <= float(plain) * (1 + 1e-5)
    assert float(divergence(theirs, theirs, 5)) == pytest.approx(0, abs=1e-5)


def test_only_learnt_tokens_count_and_give_the_gradient_of_kl() -> None:
    ours, theirs = torch.randn(2, 700, 9000, requires_grad=True), 3 * torch.randn(2, 700, 9000)
    learnt = torch.rand(2, 700) < 0.6
    expected = nn.functional.kl_div(ours[learnt].log_softmax(-1), theirs[learnt].softmax(-1), reduction="sum")
    gradients = [torch.autograd.grad(3 * kl, ours)[0] for kl in (divergence(ours, theirs, learnt=learnt), expected)]
    torch.testing.assert_close(*gradients)
    assert float((divergence(ours, theirs, learnt=learnt) / expected).detach()) == pytest.approx(1, abs=1e-5)


def test_a_pruned_model_learns_from_its_teacher() -> None:
    teacher = recover(llama(), TEXT, tokenizer=Letters(), method="full", **{**QUICK, "epochs": 8})
    ids = {"input_ids": rows()}
    pruned = graphprune.compile(teacher, ids, keep=0.6, calibration=[ids], method="taylor").model
    made = recover(pruned, Calibration((ids,), "test"), teacher=teacher, method="full", top=8, **{**QUICK, "epochs": 4, "lr": 3e-3})

    def gap(model: nn.Module) -> float:
        with torch.no_grad():
            return float(divergence(model(**ids).logits, teacher(**ids).logits))

    assert gap(made) < 0.7 * gap(pruned)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mistakes_name_the_nearest_choice() -> None:
    with pytest.raises(UserMistake, match="did you mean dropout"):
        recipe_of("llm-pruner", {"dropuot": 1})
    with pytest.raises(UserMistake, match="ten-minutes"):
        recipe_of("ten-minuts", {})
    for wrong in ({"method": "lorra"}, {"epochs": None}, {"batch": 0}, {"distill": 2}):
        with pytest.raises(UserMistake):
            Recipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserMistake, match="needs a tokenizer"):
        recover(llama(), TEXT)
    with pytest.raises(UserMistake, match="no instruction"):
        recover(llama(), [{"question": "x"}], tokenizer=Letters())
    with pytest.raises(UserMistake, match="no linear layer"):
        recover(nn.Sequential(nn.Conv1d(2, 2, 1)), [{"input_ids": rows()}])


def test_half_precision_is_trained_in_single_and_comes_back_as_it_was() -> None:
    text = Calibration(({"input_ids": tokens() % 41},), "given")
    trained = graphprune.recover(llama().half(), text, preset="ten-minutes", minutes=None, steps=3, written=0)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float16}
    assert all(parameter.isfinite().all() for parameter in trained.parameters())


def test_zeros_stay_zeros() -> None:
    text = Calibration(({"input_ids": tokens() % 41},), "given")
    sparse = graphprune.sparsify(llama(), text, method="magnitude", sparsity=0.5)
    trained = graphprune.recover(sparse, text, preset="ten-minutes", minutes=None, steps=3, written=0)
    moved = 0
    for (name, before), (_, after) in zip(sparse.named_parameters(), trained.named_parameters(), strict=True):
        if before.ndim > 1 and (before == 0).float().mean() > 0.4:
            assert torch.equal(before == 0, after == 0), name
            moved += int(not torch.equal(before, after))
    assert moved == 7
    with pytest.raises(UserMistake, match="fill the zeros"):
        graphprune.recover(sparse, text, steps=1)


def test_minutes_end_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(sys.modules["graphprune.recover"], "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    said: list[str] = []
    rows = Calibration(tuple({"input_ids": tokens(seed) % 41} for seed in range(30)), "given")
    graphprune.recover(llama(), rows, preset="ten-minutes", minutes=3, batch=8, micro=1, written=0, progress=said.append)
    assert len(said) == 1


def test_a_training_that_diverges_gives_nothing() -> None:
    text = Calibration(({"input_ids": tokens() % 41},), "given")
    with pytest.raises(ModelLimit, match="diverged"):
        graphprune.recover(llama(), text, preset="ten-minutes", minutes=None, steps=4, written=0, lr=1e30)
