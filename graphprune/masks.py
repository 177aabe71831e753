"""A model, calibration and a mask method in, a copy of the model with zeros in its weights out: shapes stay as they are.

The traced graph is walked once, every batch abreast: where a product with a weight is reached, what flows into it is measured,
the method makes the weight sparse, and the walk goes on with the sparse weight. So each weight is fitted to what the sparse
layers before it really send, for one forward pass in all, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphprune.copying import duplicate
from graphprune.data import Calibration
from graphprune.errors import UserMistake, nearest
from graphprune.execute import tensors_of
from graphprune.exportable import GROUPED
from graphprune.groups import matches
from graphprune.inputs import guess_inputs
from graphprune.masking import Masking, statistics_of
from graphprune.matrices import Product, ends, products
from graphprune.pipeline import Pass, Progress, find_pass
from graphprune.propagate import propagate
from graphprune.sparse import Pattern, Sparse, pattern_of
from graphprune.trace import Inputs, Trace, trace

Batches = Calibration | Sequence[Mapping[str, Tensor]]
MASKS = {"magnitude": "magnitude_mask"}
"""Mask methods whose plain name belongs to a structured method."""


def sparsify(
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    method: str | Callable[..., Any] | Pass = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    sequential: bool = True,
    skip: Sequence[str] = (),
    example_inputs: Inputs | None = None,
    options: Mapping[str, Any] | None = None,
    semi_structured: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of ``model`` whose weights have a share ``sparsity`` of zeros (default 0.5), or the ``pattern`` "2:4", "4:8", ….

    ``method`` is ``magnitude``, ``wanda``, ``sparsegpt`` or any pass that makes ``Sparse`` from a ``Matrix``; asking for
    ``Norms`` or ``Moments`` makes it need calibration. Heads, routers, embeddings and names matching ``skip`` stay dense.
    ``sequential`` feeds every layer what the sparse layers before it give, else what the dense ones give.
    ``semi_structured`` converts the result for torch's 2:4 kernels (CUDA). Raises UserMistake when nothing can be made sparse.
    """
    shape = pattern_of(sparsity, pattern)
    step = find_mask(method, **(options or {}))
    batches = _batches(model, calibration, example_inputs, needed=bool(statistics_of(step)))
    sparse, say = duplicate(model), progress or _silent
    axes = propagate(trace(sparse, batches[0], experts=GROUPED))
    names = [name for tensor in axes.trace.tensors.values() for name in tensor.names]
    if idle := [skipped for skipped in skip if not any(matches(name, skipped) for name in names)]:
        raise UserMistake(f"nothing is called {idle[0]!r}, which is to be skipped", fix=nearest(idle[0], names))
    chosen, spared = _choose(products(axes, routed=True), axes.trace, ends(axes), skip, shape)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(spared.items())[:3])
        raise UserMistake("no weight can be made sparse", why=why or "no product with a weight was found")
    for name, reason in spared.items():
        say(f"{name} stays dense: {reason}")
    Masking(axes.trace, tensors_of(sparse, axes.trace), chosen, step, shape, sequential, say).run(batches)
    return semi_structured_copy(sparse) if semi_structured else sparse


def zeros(model: nn.Module) -> dict[str, float]:
    """The share of zeros in every parameter with two or more dimensions."""
    return {name: float((p == 0).double().mean()) for name, p in model.named_parameters() if p.ndim > 1}


def find_mask(method: str | Callable[..., Any] | Pass, **options: Any) -> Pass:
    """The mask method of a name, path or function. Raises UserMistake when it makes no masks."""
    name = MASKS.get(method, method) if isinstance(method, str) else method
    found = find_pass(name, **options)
    if found.makes is not Sparse:
        raise UserMistake(f"{found.name} makes no masks", fix="magnitude, wanda or sparsegpt do; to shrink shapes, compile()")
    return found


def _silent(line: str) -> None:
    """Nobody is told."""


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _batches(model: nn.Module, calibration: Batches | None, example: Inputs | None, *, needed: bool) -> list[Any]:
    if calibration is None and needed:
        raise UserMistake("this method needs calibration data", fix="sparsify(model, calibrate(…)), or method='magnitude'")
    if calibration is not None:
        return _even(calibration.inputs if isinstance(calibration, Calibration) else calibration)
    if example is not None:
        return [example]
    if isinstance(model, PreTrainedModel):
        return [guess_inputs(model, model.config)]
    raise UserMistake(f"{type(model).__name__} needs example inputs", fix="example_inputs=…")


def _even(batches: Iterable[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Batches of one shape: rows are regrouped where the last batch is short."""
    found = list(batches)
    if not found:
        raise UserMistake("the calibration holds no batch")
    shapes = [{name: tuple(value.shape) for name, value in batch.items()} for batch in found]
    if all(shape == shapes[0] for shape in shapes):
        return found
    if len({tuple((name, size[1:]) for name, size in shape.items()) for shape in shapes}) > 1:
        raise UserMistake("calibration batches differ in more than their number of rows", fix="cut them to one length")
    rows = gcd(*(next(iter(shape.values()))[0] for shape in shapes))
    return [{name: value[i : i + rows] for name, value in b.items()} for b in found for i in range(0, len(_first(b)), rows)]


def _first(batch: Mapping[str, Tensor]) -> Tensor:
    return next(iter(batch.values()))


def _choose(
    found: Iterable[Product], traced: Trace, spared: Mapping[str, str], skip: Sequence[str], pattern: Pattern
) -> tuple[list[Product], dict[str, str]]:
    """The products whose weights are made sparse, and the weights that stay dense with the reason."""
    chosen, dense = [], dict(spared)
    names = {tensor.name: tensor.names for tensor in traced.tensors.values()}
    shapes = {tensor.name: tensor.shape for tensor in traced.tensors.values()}
    for product in found:
        width = product.layout.matrix(torch.empty(shapes[product.weight], device="meta")).shape[-1]
        if any(matches(name, pattern) for name in names[product.weight] for pattern in skip):
            dense[product.weight] = "skipped"
        elif pattern.of is not None and width % pattern.of:
            dense[product.weight] = f"{width} inputs are no multiple of {pattern.of}"
        if product.weight not in dense:
            chosen.append(product)
    return chosen, dense


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def semi_structured_copy(model: nn.Module) -> nn.Module:
    """``model`` with 2:4 linear weights as torch's semi-structured sparse tensors.

    Raises UserMistake when no weight is 2:4, and off CUDA or in float32, where there are no kernels.
    """
    smaller = duplicate(model)
    linears = [module for module in smaller.modules() if isinstance(module, nn.Linear) and _is_two_of_four(module.weight)]
    if not linears:
        raise UserMistake("no linear layer is 2:4 sparse", fix='sparsify(…, pattern="2:4")')
    for module in linears:
        if not module.weight.is_cuda or module.weight.dtype not in (torch.float16, torch.bfloat16):
            raise UserMistake(
                "torch's semi-structured kernels need CUDA and half precision",
                why=f"the weights are {module.weight.dtype} on {module.weight.device}",
                fix="model.to('cuda', torch.bfloat16) first",
            )
        made: Tensor = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
        module.weight = nn.Parameter(made, requires_grad=False)
    return smaller


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())
