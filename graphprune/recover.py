"""A pruned language model and text or instructions in, the same model trained back towards what it was out: LoRA or everything.

The loss is next-token cross-entropy, the divergence from the unpruned teacher's predictions, or a mixture. What comes back is a
plain model again: adapters are merged, nothing of the training stays.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.pytorch_utils import Conv1D

from graphprune.copying import duplicate
from graphprune.device import drawing, where
from graphprune.divergence import divergence
from graphprune.errors import ModelLimit, UserMistake, nearest
from graphprune.examples import IGNORED, Data, Example, batches, collate, read_examples
from graphprune.pipeline import Progress
from graphprune.ranks import add_gradients, dealt, place, told
from graphprune.sparse import SPARSE
from graphprune.written import check_causal, inference, logits_of, written


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Training ends after ``epochs``, ``steps`` or ``minutes``, whichever comes first (None: no such limit).

    ``method`` is ``lora``, or ``full``: everything but embedding tables and the output head. ``distill`` is the weight of the
    teacher against the text, 1 being the teacher alone; ``top`` compares only its most likely tokens and the rest as one.
    ``written`` sequences that the teacher writes make up half of every batch. The rate rises over ``warmup`` steps, a tenth of all
    at most, and falls to zero linearly. ``bf16`` multiplies in bfloat16, by torch's autocast; None: where the hardware does.
    """

    method: str = "lora"
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    lr: float = 1e-4
    epochs: float | None = 2
    steps: int | None = None
    minutes: float | None = None
    batch: int = 64
    micro: int = 4
    length: int = 256
    warmup: int = 100
    decay: float = 0.0
    clip: float = 1.0
    beta2: float = 0.999
    distill: float = 1.0
    top: int | None = None
    written: int = 0
    bf16: bool | None = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise UserMistake(f"method cannot be {self.method!r}", fix=nearest(self.method, ("lora", "full")))
        if self.epochs is None and self.steps is None and self.minutes is None:
            raise UserMistake("the training would never end", fix="give epochs, steps or minutes")
        for name in ("epochs", "steps", "minutes", "batch", "micro"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserMistake(f"{name} is {value}", fix=f"{name} above 0")
        if self.length < 2:
            raise UserMistake(f"length is {self.length}", fix="at least 2 tokens: one is to be predicted")
        if not 0 <= self.distill <= 1:
            raise UserMistake(f"distill is {self.distill}", fix="a share of the loss: 0 ≤ distill ≤ 1")


PRESETS: Mapping[str, Recipe] = {
    "llm-pruner": Recipe(),
    "ten-minutes": Recipe(
        method="full", lr=2e-4, epochs=None, minutes=10, batch=4, micro=4, warmup=10, beta2=0.95, distill=0.3, written=64,
        bf16=None,
    ),
}  # fmt: skip
"""LLM-Pruner's published recipe, and what suits ten minutes on two CPU cores (``docs/quality.md``)."""


def recover(
    model: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    preset: str = "llm-pruner",
    progress: Progress | None = None,
    **settings: Any,
) -> nn.Module:
    """A trained copy of ``model``. ``settings`` change the preset's ``Recipe``; ``teacher`` is the unpruned model.

    ``data`` is text (documents, joined and cut into ``length`` tokens), a Calibration, or instructions, of which only the answers
    are learnt. The same seed gives the same model, unless ``minutes`` ends the training. Ranks share each batch.
    Raises UserMistake on settings or data that cannot work.
    """
    begun = time.monotonic()
    recipe = recipe_of(preset, settings)
    zeros = _zeros(model, recipe)
    for part, what in ((model, "the model"), (teacher, "the teacher")):
        if part is not None:
            check_causal(part, what)
    pools = [read_examples(data, tokenizer, recipe.length)]
    if teacher is not None and recipe.written:
        own = written(teacher, getattr(teacher, "config", None), recipe.written, recipe.length, recipe.seed)
        pools.append([Example(row, row) for row in own])
    with drawing(recipe.seed, where(model)):
        student, parameters = _trainable(duplicate(model), recipe)
        _train(student, parameters, teacher, pools, recipe, begun, progress, zeros)
    trained = _plain(student, model)
    if not all(bool(parameter.isfinite().all()) for parameter in trained.parameters()):
        raise ModelLimit("the training diverged: weights are not finite", fix="a lower lr, or load the model in float32")
    return trained


def _zeros(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Where the weights of a sparse model are zero, which they stay; those that hardly are have none."""
    sparse = {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim > 1}
    found = {name: gone for name, gone in sparse.items() if float(gone.float().mean()) >= SPARSE}
    if found and recipe.method == "lora":
        raise UserMistake("LoRA would fill the zeros of a sparse model", fix='preset="ten-minutes", or method="full"')
    return found


def recipe_of(preset: str, settings: Mapping[str, Any]) -> Recipe:
    """A preset with some settings changed. Raises UserMistake naming the nearest setting."""
    if preset not in PRESETS:
        raise UserMistake(f"no recipe is called {preset!r}", fix=nearest(preset, PRESETS))
    known = [field.name for field in fields(Recipe)]
    for name in settings:
        if name not in known:
            raise UserMistake(f"recover has no setting {name!r}", fix=nearest(name, known))
    return replace(PRESETS[preset], **settings)


# ── what trains ──────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the output head: all projections of attention and feed-forward, whatever they are called."""
    head = _head(model)
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _head(model: nn.Module) -> nn.Module | None:
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def _trainable(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, list[nn.Parameter]]:
    if recipe.method == "lora":
        names = linear_names(model)
        if not names:
            raise UserMistake("LoRA finds no linear layer in this model", fix='method="full"')
        transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
        peft = import_module("peft")
        config = peft.LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=names,
            bias="none",
            fan_in_fan_out=transposed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under an old name
            model = peft.get_peft_model(model, config)
    else:
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        if any(p.dtype == torch.float16 for p in model.parameters()):
            model = model.float()  # half precision holds no step of AdamW
        fixed = {id(p) for m in (*tables, _head(model)) if m is not None for p in m.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in fixed)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _plain(student: nn.Module, like: nn.Module) -> nn.Module:
    """Adapters merged; modes and flags as they were."""
    merge: Any = getattr(student, "merge_and_unload", None)
    plain: nn.Module = student if merge is None else merge()
    asked = dict(like.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(asked[name].dtype)
        parameter.requires_grad_(asked[name].requires_grad)
        parameter.grad = None
    return plain.train(like.training)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _train(
    student: nn.Module,
    parameters: list[nn.Parameter],
    teacher: nn.Module | None,
    pools: Sequence[Sequence[Example]],
    recipe: Recipe,
    begun: float,
    progress: Progress | None,
    zeros: Mapping[str, Tensor],
) -> None:
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.decay)
    total, tokens = _steps(len(pools) * len(pools[0]), recipe), 0
    gone = [(parameter, zeros[name]) for name, parameter in student.named_parameters() if name in zeros]

    def elapsed() -> float:
        """The share of its time that rank 0 has used: all ranks ask at the same places."""
        return told(time.monotonic() - begun) / 60 / recipe.minutes if recipe.minutes else 0.0

    student.train()
    for step, chosen in enumerate(batches(pools, recipe.batch, recipe.seed)):
        spent = max(step / total, elapsed())
        if spent >= 1:
            return
        rate = recipe.lr * _rise(step, total, recipe) * (1 - spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        wanted = sum(int((example.labels[1:] != IGNORED).sum()) for example in chosen)
        loss = 0.0
        mine, longest = dealt(chosen), -(-len(chosen) // place()[1])
        for start in range(0, longest, recipe.micro):
            if step and elapsed() > 1:
                return
            if start >= len(mine):  # another rank has more, and asks for the time once more
                continue
            inputs, labels = collate(mine[start : start + recipe.micro], device)
            part = _loss(student, teacher, inputs, labels, recipe) / wanted
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
            tokens += labels.numel()
        add_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        for parameter, places in gone:
            parameter.data.masked_fill_(places, 0)
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(f"step {step + 1}  loss {loss:.4f}  rate {rate:.1e}  {tokens} tokens  {time.monotonic() - begun:.0f} s")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 by itself, faster than single precision."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


def _steps(examples: int, recipe: Recipe) -> float:
    """Optimizer steps until the first of the limits that count steps."""
    per_epoch = -(-examples // recipe.batch)
    limits = [recipe.steps, None if recipe.epochs is None else max(1, round(recipe.epochs * per_epoch))]
    return min((float(limit) for limit in limits if limit is not None), default=float("inf"))


def _rise(step: int, total: float, recipe: Recipe) -> float:
    warmup = min(recipe.warmup, total / 10)
    return min(1.0, (step + 1) / warmup) if warmup >= 1 else 1.0


def _loss(student: nn.Module, teacher: nn.Module | None, inputs: dict[str, Tensor], labels: Tensor, recipe: Recipe) -> Tensor:
    """Summed over the tokens that are to be learnt."""
    following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    fast = multiplies_bf16(labels.device) if recipe.bf16 is None else recipe.bf16
    cast = torch.autocast(labels.device.type, torch.bfloat16, enabled=fast)
    with cast:
        logits = logits_of(student(**inputs))

    def of_text() -> Tensor:
        return cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum", ignore_index=IGNORED)

    if teacher is None:
        return of_text()
    with inference(teacher), cast:
        wanted = logits_of(teacher(**inputs))
    distance = divergence(logits, wanted, recipe.top, following != IGNORED)
    return distance if recipe.distill == 1 else recipe.distill * distance + (1 - recipe.distill) * of_text()
