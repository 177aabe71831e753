"""A traced model and its smaller self in, walked side by side over all batches: what a repair of the smaller one's weights sees.

Both graphs have the same nodes in the same order, so each product of the smaller model meets its own original: what it reads, what
the original read, and how far the sum that its output is added to has already drifted. The walk pauses there; a weight that is
replaced before it goes on is the one it goes on with. Values of all batches are alive at once, those of a few layers at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.abreast import Abreast
from graphprune.axes import Axis, Keep
from graphprune.calls import PASSING, given_arguments, operation
from graphprune.disk import put
from graphprune.matrices import Contracted, Product, products
from graphprune.precise import precise
from graphprune.propagate import Axes
from graphprune.rewrite.cut import cut
from graphprune.rewrite.graph import resized_graph


@dataclass(frozen=True, slots=True)
class Reading:
    """One batch at one product, all in float32 or better.

    Its inputs ``now`` and, in the original, ``then`` (positions, inputs); the original's outputs ``wanted`` without bias; where
    the output is added to a ``stream`` of the original, that stream and how far the smaller model's lags behind it: its
    ``drift`` (positions, rows each).
    """

    now: Tensor
    then: Tensor
    wanted: Tensor
    stream: Tensor | None
    drift: Tensor | None


@dataclass(frozen=True, slots=True)
class Site:
    """A product whose weight may be replaced.

    ``whole`` is the original's matrix with its surviving rows and all its inputs, of which ``kept`` survive; ``differs`` says
    whether what it reads is no longer what the original read, ``drifts`` whether the stream that its output is added to is no
    longer the original's; ``bias`` names what its own operation adds.
    """

    product: Product
    whole: Tensor
    kept: Tensor
    bias: str | None
    differs: bool
    drifts: bool

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return self.product.weight

    @property
    def shrunk(self) -> bool:
        """Whether it lost inputs."""
        return len(self.kept) < self.whole.shape[1]


Visit = tuple[Site, Iterable[Reading]]


def side_by_side(
    axes: Axes,
    keep: Keep,
    original: Mapping[str, Tensor],
    smaller: MutableMapping[str, Tensor],
    batches: Sequence[Sequence[Any]],
    wanted: Collection[str] | None = None,
) -> Iterator[Visit]:
    """Yield every product of a (wanted) weight with its readings, then go on with whatever ``smaller`` holds for it by then.

    ``batches`` are flat inputs of the traced shapes. Weights used more than once, and products in groups, pass by unvisited.
    """
    found = {product.node: product for product in _visited(axes, wanted)}
    if not found:
        return
    pair = _Pair(axes, keep, original, smaller, batches, list(found))
    for node, product in found.items():
        pair.walk_to(node)
        site = pair.site(product)
        yield site, pair.readings(site)


class Emitted(MutableMapping[str, Tensor]):
    """The tensors of an emitted model, module or graph, under the names the trace gives them. Nothing is copied.

    A tensor that is set becomes the parameter's value at once, in memory or in its file; the storage of the original model is
    never written to.
    """

    def __init__(self, model: nn.Module, axes: Axes, keep: Keep) -> None:
        owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        owned |= {name.removeprefix("body."): tensor for name, tensor in owned.items()}
        lifted = {name: cut(constant, axes.tensors[name], keep) for name, constant in axes.trace.constants.items()}
        self.tensors = {t.name: lifted[t.name] if t.kind == "constant" else owned[t.name] for t in axes.trace.tensors.values()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        put(self.tensors[name], value)

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _visited(axes: Axes, wanted: Collection[str] | None) -> Iterator[Product]:
    every = products(axes)
    uses = Counter(product.weight for product in every)
    placed = Counter(t.name for node in axes.trace.graph.nodes if (t := axes.trace.tensors.get(node.name)) for _ in node.users)
    for product in every:
        single = not product.layout.batch if isinstance(product.layout, Contracted) else product.layout.groups == 1
        if single and uses[product.weight] == placed[product.weight] == 1 and (wanted is None or product.weight in wanted):
            yield product


class _Pair:
    """The two walks, every batch abreast."""

    def __init__(
        self,
        axes: Axes,
        keep: Keep,
        original: Mapping[str, Tensor],
        smaller: Mapping[str, Tensor],
        batches: Sequence[Sequence[Any]],
        sites: Sequence[fx.Node],
    ) -> None:
        self.axes, self.keep = axes, keep
        every, theirs = list(axes.trace.graph.nodes), list(resized_graph(axes, keep).nodes)
        self.twin = dict(zip(every, theirs, strict=True))
        self.place = {node: i for i, node in enumerate(every)}
        sums = [found[0] for site in sites if (found := self._sum(site))]
        nodes = every[: max(self.place[node] for node in [*sites, *sums]) + 1]
        self.then = Abreast(axes.trace, original, batches, nodes)
        self.now = Abreast(axes.trace, smaller, batches, theirs[: len(nodes)])
        self.ahead = iter(nodes)
        self.waiting: fx.Node | None = next(self.ahead)
        self.differs: set[fx.Node] = set()

    def walk_to(self, place: fx.Node) -> None:
        """Compute all that comes before a node, in both graphs."""
        while self.waiting is not None and self.waiting is not place:
            self._step(self.waiting)
            self.waiting = next(self.ahead, None)

    def _step(self, node: fx.Node) -> None:
        if any(operand in self.differs or self._changed(operand) for operand in node.all_input_nodes):
            self.differs.add(node)
        self.then.run([node])
        self.now.run([self.twin[node]])

    def _changed(self, node: fx.Node) -> bool:
        """Whether a weight is another than in the original."""
        return any(not torch.equal(self.now.tensors[name], self.then.tensors[name]) for name in self.then.named(node))

    def site(self, product: Product) -> Site:
        """What the smaller model keeps of a product's inputs."""
        weight = self.then.tensors[product.weight]
        axis = self.axes.tensors[product.weight][product.layout.inputs]
        span = 1 if isinstance(product.layout, Contracted) else weight[0, 0].numel()
        kept = torch.tensor(axis.kept(self.keep), device=weight.device)
        kept = (kept[:, None] * span + torch.arange(span, device=weight.device)).flatten()
        drifts = self._partner(product.node) in self.differs
        return Site(product, self._rows(product), kept, self._bias(product), product.operand in self.differs, drifts)

    @torch.no_grad()
    def readings(self, site: Site) -> Iterator[Reading]:
        """Every batch at a product, computed as it is asked for."""
        product, partner = site.product, self._partner(site.product.node)
        layout = product.layout
        for then, now in zip(self.then.walks, self.now.walks, strict=True):
            before = precise(layout.vectors(then.fetch(product.operand))[0])
            after = precise(layout.vectors(now.fetch(self.twin[product.operand]))[0])
            drift = stream = None
            if partner is not None:
                stream = _outputs(then.fetch(partner), product)
                drift = stream - _outputs(now.fetch(self.twin[partner]), product) if partner in self.differs else None
            yield Reading(after, before, before @ site.whole.T, stream, drift)

    def _rows(self, product: Product) -> Tensor:
        """The original's matrix with all its inputs and only the rows that survive, in float32 or better."""
        layout, weight = product.layout, self.then.tensors[product.weight]
        whole = Axis(())
        axes = tuple(whole if dim == layout.inputs else axis for dim, axis in enumerate(self.axes.tensors[product.weight]))
        return precise(layout.matrix(cut(weight, axes, self.keep))[0].detach())

    def _bias(self, product: Product) -> str | None:
        """The name of the bias that is added inside the product's own operation."""
        given = given_arguments(product.node)
        found = given.get("bias", given.get("self") if "mat1" in given else None)
        traced = self.axes.trace.tensors.get(found.name) if isinstance(found, fx.Node) else None
        return traced.name if traced is not None and isinstance(found, fx.Node) and len(found.users) == 1 else None

    def _partner(self, node: fx.Node) -> fx.Node | None:
        """The other, earlier and whole summand of the sum that the output of ``node`` goes into next."""
        found = self._sum(node)
        return None if found is None else found[1]

    def _sum(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """That sum and its other summand."""
        here = node
        while len(here.users) == 1:
            user = next(iter(here.users))
            others = [operand for operand in user.all_input_nodes if operand is not here]
            if operation(user) == "add" and others and all(self._is_weight(operand) for operand in others):
                here = user
                continue
            if operation(user) == "add" and len(others) == 1 and self.place[others[0]] < self.place[node]:
                return (user, others[0]) if self._comparable(others[0], node) else None
            if operation(user) not in PASSING:
                return None
            here = user
        return None

    def _is_weight(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node.name in self.axes.trace.tensors

    def _comparable(self, other: fx.Node, node: fx.Node) -> bool:
        values = self.axes.nodes[other], self.axes.nodes[node]
        factors = {factor for axis in values[0] if isinstance(axis, Axis) for factor in axis.factors}
        return factors.isdisjoint(self.keep) and len(values[0]) == len(values[1])


def _outputs(value: Tensor, product: Product) -> Tensor:
    """An output-shaped value as (positions, rows), in float32 or better."""
    dim = -1 if isinstance(product.layout, Contracted) else -1 - len(product.layout.kernel)
    return precise(value.movedim(dim, -1).flatten(0, -2))
