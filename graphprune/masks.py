"""A model, calibration and a mask method in, a copy of the model with zeros in its weights out: shapes stay as they are.

The traced graph is walked once, every batch abreast: where a product with a weight is reached, what flows into it is measured,
the method makes the weight sparse, and the walk goes on with the sparse weight. So each weight is fitted to what the sparse
layers before it really send, for one forward pass in all, whatever the architecture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from graphprune.data import Calibration
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import tensors_of
from graphprune.inputs import guess_inputs
from graphprune.matrices import Product, ends, products
from graphprune.pipeline import Pass, Progress, find_pass
from graphprune.propagate import propagate, source_line
from graphprune.trace import Inputs, Trace, exportable, trace

Batches = Calibration | Sequence[Mapping[str, Tensor]]
MASKS = {"magnitude": "magnitude_mask"}
"""Mask methods whose plain name belongs to a structured method."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """How many weights become zero: the share ``zeros`` of them, within every ``of`` consecutive inputs where that is given."""

    zeros: float
    of: int | None = None

    def __str__(self) -> str:
        return f"{self.zeros:.0%}" if self.of is None else f"{self.of - self.removed(self.of)}:{self.of}"

    def removed(self, count: int) -> int:
        """How many of ``count`` weights become zero."""
        return int(self.zeros * count + 1e-9)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as its product sees it: ``values`` (rows, inputs), float32."""

    name: str
    values: Tensor


@dataclass(frozen=True, slots=True)
class Norms:
    """‖X_j‖₂ of every input over all calibration positions: ``values`` (inputs,), float32."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """The mean of x·xᵀ over all calibration positions: ``values`` (inputs, inputs), float64."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """A matrix with zeros: ``values`` (rows, inputs)."""

    values: Tensor


def pattern_of(sparsity: float | None, pattern: str | None) -> Pattern:
    """A share of zeros, or ``n:m``: n of every m consecutive inputs stay. Raises UserMistake on anything else."""
    if pattern is not None:
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if sparsity is not None or found is None or not 0 < int(found[1]) < int(found[2]):
            raise UserMistake(f"no pattern: {pattern!r}", fix="2:4 keeps 2 of every 4, 4:8 is half as strict; or sparsity=0.5")
        return Pattern(1 - int(found[1]) / int(found[2]), int(found[2]))
    share = 0.5 if sparsity is None else sparsity
    if not 0 <= share < 1:
        raise UserMistake(f"sparsity is the share of zeros, below 1, not {share}")
    return Pattern(share)


def lowest(saliency: Tensor, pattern: Pattern) -> Tensor:
    """Which weights go: in each row, or in each ``pattern.of`` of a row, those of lowest saliency. (rows, inputs) → bool."""
    rows = saliency if pattern.of is None else saliency.reshape(*saliency.shape[:-1], -1, pattern.of)
    count = pattern.removed(rows.shape[-1])
    order = rows.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True).reshape(saliency.shape)


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
    batches = _batches(model, calibration, example_inputs, needed=bool(_statistics(step)))
    sparse = deepcopy(model)
    with _sorted_experts(sparse), exportable(sparse):
        axes = propagate(trace(sparse, batches[0]))
        chosen, spared = _choose(products(axes, routed=True), axes.trace, ends(axes), skip, shape)
        if not chosen:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(spared.items())[:3])
            raise UserMistake("no weight can be made sparse", why=why or "no product with a weight was found")
        for name, reason in spared.items():
            _say(progress, f"{name} stays dense: {reason}")
        _Walk(axes.trace, tensors_of(sparse, axes.trace), chosen, step, shape, sequential, progress).run(batches)
    return semi_structured_copy(sparse) if semi_structured else sparse


@contextmanager
def _sorted_experts(model: nn.Module) -> Iterator[None]:
    """A mixture of experts as products of sorted rows with stacked matrices: each expert's inputs can be told apart."""
    choose: Any = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    try:
        choose("grouped_mm")
    except (TypeError, ValueError):  # no such method, or no experts
        yield
        return
    try:
        yield
    finally:
        choose(before)


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


def _statistics(step: Pass) -> set[type]:
    return set(step.needs.values()) & {Norms, Moments}


def _say(progress: Progress | None, line: str) -> None:
    if progress is not None:
        progress(line)


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
        if any(fnmatchcase(name, p) or name.startswith(f"{p}.") for name in names[product.weight] for p in skip):
            dense[product.weight] = "skipped"
        elif pattern.of is not None and width % pattern.of:
            dense[product.weight] = f"{width} inputs are no multiple of {pattern.of}"
        if product.weight not in dense:
            chosen.append(product)
    return chosen, dense


# ── the walk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Walk:
    """All batches abreast, node by node; a weight is made sparse when the last product with it is reached."""

    def __init__(
        self,
        traced: Trace,
        tensors: Mapping[str, Tensor],
        chosen: Sequence[Product],
        step: Pass,
        pattern: Pattern,
        sequential: bool,
        progress: Progress | None,
    ) -> None:
        self.trace, self.tensors, self.step, self.pattern = traced, tensors, step, pattern
        self.sequential, self.progress = sequential, progress
        self.wanted = _statistics(step)
        self.at: dict[fx.Node, list[Product]] = defaultdict(list)
        for product in chosen:
            self.at[product.node].append(product)
        self.waiting = Counter(product.weight for product in chosen)
        self.sums: dict[str, dict[type, Tensor]] = defaultdict(dict)
        self.counts: Counter[str] = Counter()
        self.shared: tuple[tuple[fx.Node, Any], dict[type, Tensor], int] | None = None

    @torch.no_grad()
    def run(self, batches: Sequence[Any]) -> None:
        flat = [self.trace.flatten(batch) for batch in batches] if self.wanted else []
        envs: list[dict[str, Any]] = [dict(zip(self.trace.inputs, values, strict=True)) for values in flat]
        late: list[Product] = []
        dying = _last_uses(self.trace.graph)
        for node in self.trace.graph.nodes:
            for product in self.at.get(node, ()):
                self._measure(product, envs)
                if not self.waiting[product.weight]:
                    if self.sequential:
                        self._apply(product)
                    else:
                        late.append(product)
            if not self.waiting.total():
                break
            for env in envs:
                self._execute(node, env)
                for dead in dying[node]:
                    env.pop(dead.name, None)
        for product in late:
            self._apply(product)

    def _execute(self, node: fx.Node, env: dict[str, Any]) -> None:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: self._fetch(operand, env))
            env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _fetch(self, node: fx.Node, env: dict[str, Any]) -> Any:
        return env[node.name] if node.name in env else self.tensors[self.trace.tensors[node.name].name]

    def _measure(self, product: Product, envs: Sequence[dict[str, Any]]) -> None:
        """Add what flows into a product to its weight's sums. Products that read one value share the work."""
        self.waiting[product.weight] -= 1
        if not self.wanted:
            return
        key = product.operand, product.layout
        if self.shared is None or self.shared[0] != key:
            self.shared = key, *self._sums(product, envs)
        _, sums, count = self.shared
        for kind, total in sums.items():
            before = self.sums[product.weight].get(kind)
            self.sums[product.weight][kind] = total if before is None else before + total
        self.counts[product.weight] += count

    def _sums(self, product: Product, envs: Sequence[dict[str, Any]]) -> tuple[dict[type, Tensor], int]:
        sums: dict[type, Any] = defaultdict(int)
        count = 0
        for env in envs:
            value = self._fetch(product.operand, env)
            if not bool(value.isfinite().all()):
                raise ModelLimit("a value in the model is not finite", at=source_line(product.node), fix="load it in float32")
            stops = None if product.stops is None else self._fetch(product.stops, env).tolist()
            parts = _parts(product, value, stops)
            count += sum(part.shape[0] for part in parts)
            if Norms in self.wanted:
                sums[Norms] = sums[Norms] + torch.stack([part.square().sum(0, dtype=torch.float64) for part in parts])
            if Moments in self.wanted:
                sums[Moments] = sums[Moments] + torch.stack([(part.mT @ part).double() for part in parts])
        return dict(sums), count

    def _apply(self, product: Product) -> None:
        weight = self.tensors[product.weight]
        stack = product.layout.matrix(weight).float()
        made = torch.stack([self._sparse(product.weight, place, stack[place]) for place in range(len(stack))])
        weight.copy_(product.layout.restored(made, weight))
        self.sums.pop(product.weight, None)
        _say(self.progress, f"{product.weight}  {float((made == 0).double().mean()):.1%} zeros")

    def _sparse(self, name: str, place: int, values: Tensor) -> Tensor:
        facts: dict[type, Any] = {Matrix: Matrix(name, values), Pattern: self.pattern}
        sums = self.sums.get(name, {})
        if Norms in sums:
            facts[Norms] = Norms(_or_plain(sums[Norms][place].sqrt()).float())
        if Moments in sums:
            facts[Moments] = Moments(_or_plain(sums[Moments][place] / self.counts[name]))
        made: Sparse = self.step(facts)
        return made.values


def _parts(product: Product, value: Tensor, stops: Sequence[int] | None) -> list[Tensor]:
    """The input vectors (positions, inputs) of each matrix in the batch, float32."""
    if stops is None:
        return list(product.layout.vectors(value).float())
    return [value[start:stop].float() for start, stop in zip((0, *stops), stops, strict=False)]


def _or_plain(statistic: Tensor) -> Tensor:
    """A matrix that nothing reached (an expert never chosen) is judged by its weights alone."""
    if bool(statistic.any()):
        return statistic
    return torch.ones_like(statistic) if statistic.ndim == 1 else torch.eye(len(statistic)).to(statistic)


def _last_uses(graph: fx.Graph) -> Mapping[fx.Node, list[fx.Node]]:
    last = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for operand, node in last.items():
        dying[node].append(operand)
    return dying


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def semi_structured_copy(model: nn.Module) -> nn.Module:
    """``model`` with 2:4 linear weights as torch's semi-structured sparse tensors.

    Raises UserMistake when no weight is 2:4, and off CUDA or in float32, where there are no kernels.
    """
    smaller = deepcopy(model)
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
