"""A graph, batches and a mask method in, weights with zeros out: each fitted to what the sparse ones before it send."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.abreast import Abreast
from graphprune.errors import ModelLimit, UserMistake
from graphprune.execute import Walk
from graphprune.matrices import Product
from graphprune.meta import source_line
from graphprune.pipeline import Pass, Progress
from graphprune.precise import check_finite
from graphprune.sparse import Matrix, Moments, Norms, Pattern, Sparse
from graphprune.trace import Trace


def statistics_of(step: Pass) -> set[type]:
    """What a mask method asks to know of a product's inputs."""
    return set(step.needs.values()) & {Norms, Moments}


class Masking:
    """All batches abreast, node by node; a weight is made sparse when the last product with it is reached."""

    def __init__(
        self,
        traced: Trace,
        tensors: Mapping[str, Tensor],
        chosen: Sequence[Product],
        step: Pass,
        pattern: Pattern,
        sequential: bool,
        say: Progress,
    ) -> None:
        self.trace, self.tensors, self.step, self.pattern = traced, tensors, step, pattern
        self.sequential, self.say = sequential, say
        self.wanted = statistics_of(step)
        self.at: dict[fx.Node, list[Product]] = defaultdict(list)
        for product in chosen:
            self.at[product.node].append(product)
        self.waiting = Counter(product.weight for product in chosen)
        self.sums: dict[str, dict[type, Tensor]] = defaultdict(dict)
        self.counts: Counter[str] = Counter()
        self.shared: tuple[tuple[fx.Node, Any], dict[type, Tensor], int] | None = None

    @torch.no_grad()
    def run(self, batches: Sequence[Any]) -> None:
        """Make every chosen weight sparse."""
        flat = [self.trace.flatten(batch) for batch in batches] if self.wanted else []
        nodes = list(self.trace.graph.nodes)
        abreast = Abreast(self.trace, self.tensors, flat, nodes)
        late: list[Product] = []
        for node in nodes:
            for product in self.at.get(node, ()):
                self._measure(product, abreast.walks)
                if not self.waiting[product.weight]:
                    if self.sequential:
                        self._apply(product)
                    else:
                        late.append(product)
            if not self.waiting.total():
                break
            abreast.run([node])
        for product in late:
            self._apply(product)

    def _measure(self, product: Product, walks: Sequence[Walk]) -> None:
        """Add what flows into a product to its weight's sums. Products that read one value share the work."""
        self.waiting[product.weight] -= 1
        if not self.wanted:
            return
        key = product.operand, product.layout
        if self.shared is None or self.shared[0] != key:
            self.shared = key, *self._sums(product, walks)
        _, sums, count = self.shared
        for kind, total in sums.items():
            before = self.sums[product.weight].get(kind)
            self.sums[product.weight][kind] = total if before is None else before + total
        self.counts[product.weight] += count

    def _sums(self, product: Product, walks: Sequence[Walk]) -> tuple[dict[type, Tensor], int]:
        sums: dict[type, Any] = defaultdict(int)
        count = 0
        for walk in walks:
            value = walk.fetch(product.operand)
            check_finite(value, source_line(product.node))
            stops = None if product.stops is None else walk.fetch(product.stops).tolist()
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
        self.say(f"{product.weight}  {float((made == 0).double().mean()):.1%} zeros")

    def _sparse(self, name: str, place: int, values: Tensor) -> Tensor:
        facts: dict[type, Any] = {Matrix: Matrix(name, values), Pattern: self.pattern}
        sums = self.sums.get(name, {})
        if Norms in sums:
            facts[Norms] = Norms(_or_plain(sums[Norms][place].sqrt()).float())
        if Moments in sums:
            facts[Moments] = Moments(_or_plain(sums[Moments][place] / self.counts[name]))
        made: Sparse = self.step(facts)
        if not isinstance(made, Sparse) or made.values.shape != values.shape:
            found = tuple(made.values.shape) if isinstance(made, Sparse) else type(made).__name__
            raise UserMistake(f"{self.step.name}() gave {found} for {name}", fix=f"Sparse(values) of shape {tuple(values.shape)}")
        self._check(name, made.values)
        return made.values

    def _check(self, name: str, values: Tensor) -> None:
        """Raise ModelLimit where what was made is not finite, UserMistake where it has fewer zeros than the pattern asks for."""
        if not values.isfinite().all():
            raise ModelLimit(f"{self.step.name}() gave {name} values that are not finite", fix="look whether the weights are")
        rows = values.reshape(-1, self.pattern.of) if self.pattern.of else values.flatten()[None]
        short = int(((rows == 0).sum(1) < self.pattern.removed(rows.shape[1])).sum())
        if short and self.pattern.of:
            raise UserMistake(
                f"{self.step.name}() left {name} short of the pattern {self.pattern}", why=f"in {short} of {len(rows)}"
            )


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
