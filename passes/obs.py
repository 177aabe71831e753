"""Greedy optimal brain surgeon: remove what the rest can best make up for, update, look again.

LeCun et al., "Optimal Brain Damage"; Hassibi and Stork, "Optimal Brain Surgeon" (1992); structured and greedy as in ZipLM (Kurtic
et al., arXiv 2302.04089). For a weight W (rows, inputs) that reads the group, with C = mean x·xᵀ over positions, C⁻¹ damped, and B
the inputs that belong to one unit, removing B and refitting the others costs, and leaves::

    cost(B) = tr( W_:B · ([C⁻¹]_BB)⁻¹ · W_:Bᵀ )
    W ← W − W_:B ([C⁻¹]_BB)⁻¹ [C⁻¹]_B:          C⁻¹ ← C⁻¹ − [C⁻¹]_:B ([C⁻¹]_BB)⁻¹ [C⁻¹]_B:

The cheapest ``block`` (a share of the units that are left) goes, and the others are ranked anew. With ``gradients`` rows are first
multiplied by a root of G = mean g·gᵀ, g = ∂L/∂(Wx) (the Kronecker-factored Fisher, as in LLM Surgeon, arXiv 2312.17244): an error
then counts for what it does to the loss, and layers and kinds can be compared: ``scope="global"``.

A unit's score is the cost at the time it went, never less than that of an earlier one. Several readers add up. The updates are not
kept: ``least_squares`` refits once the plan is known, to the same weights. Groups that no ordinary product reads (stacked experts,
the state of a recurrence) get their first-order Taylor scores, which ``sensitivity`` makes comparable to the others.
``graphprune.compile(model, method="obs", scope="global", alike=False, calibration=c, passes=["least_squares"])``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from graphprune import Axes, Calibration, Group, Groups, Scores
from graphprune.abreast import Abreast
from graphprune.capture import fitted, reading
from graphprune.execute import tensors_of
from graphprune.gradients import see_output_gradients
from graphprune.matrices import Contracted, Product, products
from graphprune.pipeline import find_pass, run
from graphprune.precise import check_finite, precise

PRODUCTS = (
    nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""Modules whose output is their product: what the loss thinks of it is seen there. Other products go without ``gradients``."""


@dataclass
class Surgeon:
    """One reader of one group: ``weight`` (rows, inputs), ``inverse`` (inputs, inputs), the unit each input belongs to."""

    weight: Tensor
    inverse: Tensor
    unit: Tensor
    wide: bool

    def costs(self, count: int) -> Tensor:
        """What the removal of each of ``count`` units would cost; infinite for those that are gone. ``wide`` units have
        several inputs."""
        if not self.wide:
            single = self.weight.square().sum(0) / self.inverse.diagonal()
            return torch.full((count,), torch.inf, dtype=single.dtype, device=single.device).index_copy(0, self.unit, single)
        costs = torch.full((count,), torch.inf, dtype=self.weight.dtype, device=self.weight.device)
        for unit in sorted(set(self.unit.tolist())):
            costs[unit] = self._cost((self.unit == unit).nonzero().flatten())
        return costs

    def _cost(self, inputs: Tensor) -> Tensor:
        part = self.weight[:, inputs]
        refitted: Tensor = torch.linalg.solve(self.inverse[inputs][:, inputs], part.T).T
        return (part * refitted).sum()

    def remove(self, units: Tensor) -> None:
        """Let the other inputs make up for those of the given units."""
        gone = torch.isin(self.unit, units)
        rows = self.inverse[gone]
        share = torch.linalg.solve(rows[:, gone], rows)
        self.weight = (self.weight - self.weight[:, gone] @ share)[:, ~gone]
        self.inverse = (self.inverse - rows.T @ share)[~gone][:, ~gone]
        self.unit = self.unit[~gone]


def obs(
    model: nn.Module,
    groups: Groups,
    calibration: Calibration,
    *,
    gradients: bool = True,
    damping: float = 0.01,
    block: float = 0.05,
    gradient_samples: int = 8,
) -> Scores:
    """Score units by what their removal costs after the others made up for it: (units,) each, float64.

    One forward over all of the calibration, the batches side by side so that only the squares of what is being read are held; one
    backward over its first ``gradient_samples`` rows.
    """
    read_by, others = _read_by(groups)
    roots = _roots(model, calibration, read_by, gradient_samples) if gradients else {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    grams: dict[Product, Tensor] = {}
    for product, gram in _grams(model, groups, calibration, {product for reads in read_by.values() for product, _ in reads}):
        grams[product] = gram
        for name, reads in read_by.items():
            if name not in found and all(p in grams for p, _ in reads):
                surgeons = [s for p, u in reads for s in _surgeons(p, u, weights[p.weight], grams[p], roots.get(p.weight), damping)]
                found[name] = _greedy(surgeons, groups[name], block)
        awaited = {p for name, reads in read_by.items() if name not in found for p, _ in reads}
        grams = {p: kept for p, kept in grams.items() if p in awaited}
    if others:
        left = {nn.Module: model, Groups: replace(groups, groups=others), Calibration: calibration}
        found |= run([find_pass("taylor")], left)[Scores].units
    return Scores(found, f"obs{' with gradients' if gradients else ''}{', taylor where nothing can make up' if others else ''}")


def _greedy(surgeons: list[Surgeon], group: Group, block: float) -> Tensor:
    """The cost at which each unit goes."""
    scores = torch.zeros(group.size, dtype=torch.float64)
    worst, left = 0.0, group.size
    while left:
        costs = torch.stack([surgeon.costs(group.size) for surgeon in surgeons]).sum(0)
        going = costs.argsort()[: max(1, int(block * left))]
        for unit, cost in zip(going.tolist(), costs[going].tolist(), strict=True):
            worst = max(worst, cost)
            scores[unit] = worst
        for surgeon in surgeons:
            surgeon.remove(going)
        left -= len(going)
    return scores


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_by(groups: Groups) -> tuple[dict[str, list[tuple[Product, Tensor]]], tuple[Group, ...]]:
    """For each group the products that read it, with the unit that each of their inputs belongs to, (matrices, inputs); and the
    groups whose units no product reads, or only among other inputs."""
    every = products(groups.axes)
    found: dict[str, list[tuple[Product, Tensor]]] = {}
    consuming = reading(groups)
    for group in groups:
        reads = {(consumer.weight, consumer.dim) for consumer in consuming[group.name]}
        mine = [(p, _units(p, group, groups.axes)) for p in every if (p.weight, p.layout.inputs) in reads]
        if reads and {p.weight for p, _ in mine} == {weight for weight, _ in reads} and all((u >= 0).all() for _, u in mine):
            found[group.name] = mine
    return found, tuple(group for group in groups if group.name not in found)


def _units(product: Product, group: Group, axes: Axes) -> Tensor:
    """Of a convolution each input channel stands for a whole kernel; all matrices of a batch read the same units."""
    channels = torch.tensor(axes.tensors[product.weight][product.layout.inputs].units(group.factor)).amax(0)
    traced = axes.trace.parameters[product.weight]
    count, _, width = product.layout.matrix(torch.empty(traced.shape, device="meta")).shape
    kernel = 1 if isinstance(product.layout, Contracted) else prod(traced.shape[2:])
    return channels.repeat_interleave(kernel).reshape(-1, width).expand(count, width)


def _grams(model: nn.Module, groups: Groups, calibration: Calibration, wanted: set[Product]) -> Iterator[tuple[Product, Tensor]]:
    """Mean x·xᵀ of what each product reads, (matrices, inputs, inputs), float64, one product after another as all batches reach
    it."""
    spots: Mapping[tuple[fx.Node, fx.Node], Product] = {(p.node, p.operand): p for p in wanted}
    grams: dict[Product, Tensor] = {}
    count: dict[Product, int] = defaultdict(int)

    def look(node: fx.Node, operand: fx.Node, value: Tensor) -> Tensor:
        product = spots.get((node, operand))
        if product is not None:
            x = precise(product.layout.vectors(value))
            gram = (x.mT @ x).double()
            grams[product] = grams[product].add_(gram) if product in grams else gram
            count[product] += x.shape[1]
        return value

    trace, readers = groups.axes.trace, {product.node for product in wanted}
    nodes = list(trace.graph.nodes)
    ends = [place + 1 for place, node in enumerate(nodes) if node in readers]
    batches = list(fitted(trace, calibration.inputs))
    walk = Abreast(trace, tensors_of(model, trace), batches, nodes[: max(ends, default=0)], look)
    for begin, end in pairwise([0, *ends]):
        for stretch in walk.stretches(nodes[begin:end]):
            walk.run(stretch)
        yield from ((product, grams.pop(product) / count[product]) for product in list(grams))


def _roots(
    model: nn.Module, calibration: Calibration, read_by: Mapping[str, list[tuple[Product, Tensor]]], samples: int
) -> dict[str, Tensor]:
    """For each weight a root R of mean g·gᵀ over positions, Rᵀ·R = G (rows, rows), float64; g = ∂(summed loss)/∂output."""
    found = {product.weight: product for products_ in read_by.values() for product, _ in products_}
    places = {name.rpartition(".")[0]: name for name in found}
    owner = {place: name for place, name in places.items() if isinstance(model.get_submodule(place), PRODUCTS)}
    sums: dict[str, Tensor] = {}
    count: dict[str, int] = defaultdict(int)

    def see(module: str, gradient: Tensor) -> None:
        layout = found[owner[module]].layout
        dim = -1 if isinstance(layout, Contracted) else -1 - len(layout.kernel)
        g = gradient.movedim(dim, -1).flatten(0, -2)
        g = g.double() * len(g)
        sums[module] = sums[module] + g.T @ g if module in sums else g.T @ g
        count[module] += len(g)

    rows, batches = 0, []
    for inputs in calibration.inputs:
        if rows < samples:
            batches.append(inputs)
            rows += len(next(iter(inputs.values())))
    see_output_gradients(model, batches, see, modules=list(owner), loss=calibration.loss)
    roots = {}
    for module, total in sums.items():
        check_finite(total.diagonal(), module)
        values, vectors = torch.linalg.eigh(total / count[module])
        roots[owner[module]] = (vectors * values.clamp_min(0).sqrt()).T
    return roots


def _surgeons(
    product: Product, units: Tensor, weight: Tensor, grams: Tensor, root: Tensor | None, damping: float
) -> Iterator[Surgeon]:
    """One for each matrix of a product, which has its own inputs and writes its own rows."""
    matrices = product.layout.matrix(weight.detach())
    parts: Sequence[Tensor | None] = [None] * len(matrices) if root is None else torch.split(root, matrices.shape[1], 1)
    for matrix, unit, gram, part in zip(matrices, units, grams, parts, strict=True):
        check_finite(gram.diagonal(), product.weight)
        scale = gram.diagonal().where(gram.diagonal() > 0, 1)
        inverse = torch.linalg.inv(gram + torch.diag(damping * scale))
        rows = matrix.double() if part is None else part @ matrix.double()
        yield Surgeon(rows, inverse, unit.to(weight.device), len(unit.unique()) < len(unit))
