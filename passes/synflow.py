"""SynFlow: keep the synapses that carry flow, without any data.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow" (arXiv 2006.05467)::

    R = 1ᵀ · f(1; |W|),   S = w · ∂R/∂w,   score(unit) = aggregate over members of  Σ S

where f is the network with its activations left out, fed with ones, its weights replaced by their magnitudes. Scored in rounds:
after round k of n the lowest units are zeroed so that keepᵏᐟⁿ of the parameters is left, which is what avoids cutting a layer
through. A unit's final score says in which round it fell.

Beyond the paper, so that it holds for transformers: a normalisation divides by a constant (its gradient does not pass), token ids
stay what they are, attention weights stay what they are.
``result = graphprune.compile(net, images, method="synflow", keep=0.5)``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune import Budget, Groups, Plan, Scores, score, select
from graphprune.device import where

ACTIVATIONS = ["relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "sigmoid", "tanh", "elu", "leaky_relu", "mish"]
PASSING = {name + ending for name in ACTIVATIONS for ending in ("", "_")}


def synflow(model: nn.Module, groups: Groups, budget: Budget, *, rounds: int = 100, aggregate: str = "sum") -> Scores:
    """Score units by the flow through them, in rounds: (units,) each, in float64; those that fall first are lowest."""
    weights = {name: p.detach().abs().double() for name, p in model.named_parameters(remove_duplicate=False)}
    weights = {name: weights[name] for name in groups.axes.trace.parameters}
    buffers = dict(model.named_buffers(remove_duplicate=False)) | dict(groups.axes.trace.constants)
    fallen = {group.name: torch.zeros(group.size, dtype=torch.float64, device=where(model)) for group in groups}
    scores = Scores(fallen, "")
    for k in range(1, rounds + 1):
        saliency = _flow(groups, weights, buffers)
        scores = score(groups, groups.axes.tensors, saliency.get, method=f"synflow {rounds} {aggregate}", how=aggregate)
        if k < rounds:
            target = {name: share ** (k / rounds) for name, share in budget.target.items()}
            plan = select(groups, scores, replace(budget, keep=budget.keep ** (k / rounds), target=target))
            _zero(groups, weights, plan, fallen, float(k - rounds))
    return Scores({name: fallen[name].where(fallen[name] < 0, units) for name, units in scores.units.items()}, scores.method)


def _zero(groups: Groups, weights: Mapping[str, Tensor], plan: Plan, fallen: Mapping[str, Tensor], when: float) -> None:
    """Zero what the plan removes, and note when it fell."""
    keep = plan.keep(groups)
    for group in groups:
        if group.factor not in keep:
            continue
        gone = torch.ones_like(fallen[group.name], dtype=torch.bool)
        gone[list(keep[group.factor])] = False
        fallen[group.name][gone & (fallen[group.name] == 0)] = when
        for member in group.members:
            for column in groups.axes.tensors[member.name][member.dim].units(group.factor) if member.name in weights else ():
                index = torch.tensor(column, device=gone.device)
                weights[member.name].movedim(member.dim, 0)[(index >= 0) & gone[index]] = 0


def _flow(groups: Groups, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """w · ∂R/∂w of every weight."""
    trace = groups.axes.trace
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    held = {**buffers, **leaves}
    example = iter(trace.example)
    values = []
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            traced = trace.tensors.get(node.name)
            values.append(_ones(next(example)) if traced is None else _as_complex(held[traced.name], traced.dtype))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad():
            outputs = _Linear(trace.module).run(*pytree.tree_map(_double, values))
            sums = [t.sum() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        gradients = torch.autograd.grad(torch.stack(sums).sum(), list(leaves.values()), allow_unused=True)
    finally:
        torch.set_default_dtype(default)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: (weight * gradient).abs().detach() for (name, weight), gradient in pairs if gradient is not None}


def _ones(value: Any) -> Any:
    return torch.ones_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _as_complex(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitude of a weight that was complex is a complex number to what reads it."""
    return value.to(torch.promote_types(value.dtype, dtype)) if dtype.is_complex else value


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Linear(fx.Interpreter):
    """The network without its activations, in double precision; normalisations divide by constants."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target._schema.name.rpartition("::")[2] if hasattr(target, "_schema") else ""
        args, kwargs = pytree.tree_map(_double, (args, kwargs))
        if name.startswith("_assert"):
            return None
        if name in PASSING:
            return args[0]
        if name in _NORMS:
            return _NORMS[name](*args)
        result = super().call_function(target, args, kwargs)
        return result.detach() if name in ("rsqrt", "reciprocal") else result


def _over_last(x: Tensor, shape: list[int], weight: Tensor | None = None, *_: Any) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    return x / _size(x, dims) * (1 if weight is None else weight)


def _over_groups(x: Tensor, groups: int, weight: Tensor | None = None, *_: Any) -> Tensor:
    parts = x.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]
    x = (parts / _size(parts, tuple(range(2, parts.ndim)))).flatten(1, 2)
    return x if weight is None else x * weight.reshape(-1, *[1] * (x.ndim - 2))


def _over_batch(x: Tensor, weight: Tensor | None, bias: Any, mean: Any, variance: Tensor, *_: Any) -> Tensor:
    scale = (variance + 1e-5).rsqrt() * (1 if weight is None else weight)
    return x * scale.reshape(-1, *[1] * (x.ndim - 2))


def _size(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.detach().square().mean(dims, keepdim=True).sqrt().clamp_min(1e-30)


_NORMS: Mapping[str, Callable[..., Tensor]] = {
    "layer_norm": _over_last,
    "rms_norm": _over_last,
    "group_norm": _over_groups,
    "batch_norm": _over_batch,
}
