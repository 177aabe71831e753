"""Axes in, Layers out: whole pieces that a model can do without, layers and residual branches, and everything that goes with each.

A piece has one way in and one way out of the same type. Without it, what enters is what leaves; whatever then feeds nothing goes
too: LLM-Pruner's second degree rule (arXiv 2305.11627, equation 2), from the way out, on the graph of operations. No module is
known by name: a *layer* is a numbered element of a stack through which the stack's stream passes, a *branch* is what an addition
adds to one of its own ancestors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from torch import Tensor, fx

from graphprune.axes import Factor, Keep, UnitAxis
from graphprune.calls import is_check
from graphprune.dependency import useless
from graphprune.errors import ModelLimit, UserMistake, nearest
from graphprune.groups import Frozen, Group, Groups, Member
from graphprune.meta import source_line
from graphprune.patterns import unnumbered
from graphprune.propagate import Axes
from graphprune.unify import Reason

ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")
COPIES = ("aten.to.", "aten._to_copy.", "aten.clone.", "aten.contiguous.", "aten.alias.", "aten.detach.")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the model that can be left out: ``exit`` then is ``entry``, and the ``tensors`` are not needed any more."""

    name: str
    entry: fx.Node
    exit: fx.Node
    gone: frozenset[fx.Node]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Layers(Groups):
    """Groups whose units are whole pieces: ``pieces`` by group, in execution order. Their tensors have a last axis, a ``Place``."""

    pieces: Mapping[str, tuple[Piece, ...]]

    def explain(self, name: str) -> str:
        """What goes with a piece, or with each of a group, and where the stream passes by. Raises UserMistake on another name."""
        own = {piece.name: (piece,) for pieces in self.pieces.values() for piece in pieces} | dict(self.pieces)
        if name not in own:
            raise UserMistake(f"no whole piece is called {name!r}", fix=nearest(name, own))
        return "\n".join(
            f"{piece.name} can go: {piece.exit} is then {piece.entry}  {source_line(piece.exit)}\n"
            f"  with it {len(piece.tensors)} tensors that feed nothing else: {', '.join(piece.tensors)}"
            for piece in own[name]
        )

    def removed(self, keep: Keep) -> list[Piece]:
        """The pieces that go, in execution order."""
        return [p for g in self for unit, p in enumerate(self.pieces[g.name]) if g.factor in keep and unit not in keep[g.factor]]


def pieces(axes: Axes, kind: str) -> Layers:
    """The whole pieces of a kind. Raises ModelLimit with the reasons when nothing can go."""
    found = WHOLE[kind](axes)
    if not len(found):
        why = "; ".join(f"{item.members[0].name}: {item.reason.what}" for item in found.frozen[:3]) or "it has no stack of layers"
        raise ModelLimit(f"no {kind} of this model can go", why=why, fix="prune widths: heads, FFN channels")
    return found


def layers(axes: Axes) -> Layers:
    """Find the stacks whose elements pass one stream on: one group a stack, one unit a layer; of nested stacks the outermost.

    The first element may be one that must stay: it brings the stream to its width, or computes what the others share.
    """
    flow = _flow(axes.trace.graph)
    found: dict[str, tuple[Piece, ...]] = {}
    single: dict[str, tuple[Piece, ...]] = {}
    frozen: dict[str, Reason] = {}
    for stack, own in sorted(_numbered(axes.trace.graph).items()):
        if any(_within(stack, outer) for outer in found):
            continue
        elements = _elements(axes, flow, stack, own)
        held = {name: why for name, why in elements.items() if isinstance(why, Reason)}
        pieces = tuple(piece for piece in elements.values() if isinstance(piece, Piece))
        if pieces and set(held) <= {next(iter(elements))}:
            (found if len(pieces) > 1 else single)[stack] = pieces
        frozen |= held
    apart = {one: own for one, own in single.items() if not any(_within(one, other) or _within(other, one) for other in found)}
    return _as_groups(axes, found | apart, "layer", frozen)


def _within(stack: str, outer: str) -> bool:
    return stack.startswith(f"{outer}.".lstrip("."))


def branches(axes: Axes) -> Layers:
    """Find the residual branches: one group for those in the same place of every layer, one unit a branch."""
    flow = _flow(axes.trace.graph)
    order = {node: place for place, node in enumerate(axes.trace.graph.nodes)}
    found: dict[str, list[Piece]] = defaultdict(list)
    for node in axes.trace.graph.nodes:
        if str(node.target) in ADDITIONS and (ends := _skip_and_branch(axes, node, order)) is not None:
            gone = useless(flow, node, keep=ends[0])
            name = _branch_name(node, ends[1])
            if tensors := _tensors(axes, gone):
                found[unnumbered(name)].append(Piece(name, ends[0], node, gone, tensors))
    return _as_groups(axes, {name: tuple(pieces) for name, pieces in found.items()}, "branch", {})


def bypassed(axes: Axes, pieces: Iterable[Piece]) -> fx.Graph:
    """A copy of the traced graph without these pieces, nor anything that fed only them."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    instead = {piece.exit: piece.entry for piece in pieces}
    for node in axes.trace.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = copies[instead[node]] if node in instead else graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in axes.trace.tensors and not node.users:
            graph.erase_node(node)
    return graph


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _flow(graph: fx.Graph) -> nx.DiGraph:
    """Which operation's result goes into which; assertions left out."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes if not is_check(node) for source in node.all_input_nodes)
    return flow


def _numbered(graph: fx.Graph) -> dict[str, dict[int, set[fx.Node]]]:
    """For every module with numbered elements, what ran inside each of them."""
    found: dict[str, dict[int, set[fx.Node]]] = defaultdict(lambda: defaultdict(set))
    for node in graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values() if node.op == "call_function" else ():
            stack, _, element = path.rpartition(".")
            if element.isdigit():
                found[stack][int(element)].add(node)
    return {stack: own for stack, own in found.items() if len(own) > 1 and set(own) == set(range(len(own)))}


def _elements(axes: Axes, flow: nx.DiGraph, stack: str, own: Mapping[int, set[fx.Node]]) -> dict[str, Piece | Reason]:
    """Each element of a stack as a piece, or why it must stay."""
    found: dict[str, Piece | Reason] = {}
    before: fx.Node | None = None
    for place in range(len(own)):
        name = f"{stack}.{place}".lstrip(".")
        exits = [node for node in own[place] if _gives_tensors(node) and not own[place].issuperset(flow.successors(node))]
        if len(exits) == 1:
            found[name] = _element(axes, flow, name, own[place], before, exits[0])
        else:
            found[name] = Reason(f"{name} gives {len(exits)} results, not one", next(iter(exits or own[place])))
        before = exits[0] if len(exits) == 1 else None
    return found


def _element(
    axes: Axes, flow: nx.DiGraph, name: str, inside: set[fx.Node], before: fx.Node | None, way_out: fx.Node
) -> Piece | Reason:
    """An element with one way out as a piece: its one way in is the way out of the element before, or leads on from there."""
    outer = {source for node in inside for source in flow.predecessors(node) if source not in inside}
    ways = [source for source in outer if source in axes.activations and axes.nodes.get(source) == axes.nodes.get(way_out)]
    ways = [before] if before in ways else ways if before is None else [way for way in ways if _leads(flow, before, way)]
    if len(ways) != 1:
        return Reason(f"what enters {name} is not of the type that leaves it", way_out)
    gone = useless(flow, way_out, keep=ways[0])
    tensors = _tensors(axes, gone)
    if not tensors:
        return Reason(f"{name} owns no tensor", way_out)
    if shared := min((t for t in _owned(axes, name, inside) if t not in tensors), default=None):
        return Reason(f"{name} owns {shared}, which others need", way_out)
    return Piece(name, ways[0], way_out, gone, tensors)


def _owned(axes: Axes, module: str, inside: Iterable[fx.Node]) -> Iterator[str]:
    """The module's own tensors among those that these operations read."""
    for operand in dict.fromkeys(operand for node in inside for operand in node.all_input_nodes):
        traced = axes.trace.tensors.get(operand.name) if operand.op == "placeholder" else None
        if traced is not None and any(name.startswith(f"{module}.") for name in traced.names):
            yield traced.name


def _gives_tensors(node: fx.Node) -> bool:
    """Whether a value is more than a size."""
    value = node.meta.get("val")
    return any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple | list) else (value,)))


def _leads(flow: nx.DiGraph, source: fx.Node, target: fx.Node, steps: int = 16) -> bool:
    """Whether one result becomes the other within a few operations: what some models do between two layers."""
    near = {target}
    for _ in range(steps):
        if source in near:
            return True
        near = {before for node in near for before in flow.predecessors(node)}
    return False


def _tensors(axes: Axes, gone: Iterable[fx.Node]) -> tuple[str, ...]:
    known = axes.trace.tensors
    return tuple(sorted(known[node.name].name for node in gone if node.op == "placeholder" and node.name in known))


# ── branches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _skip_and_branch(axes: Axes, node: fx.Node, order: Mapping[fx.Node, int]) -> tuple[fx.Node, fx.Node] | None:
    """The operand of an addition from which the other one is computed, and the other; None where there is no such pair."""
    operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node) and operand in axes.activations]
    if len(operands) != 2 or any(axes.nodes.get(operand) != axes.nodes.get(node) for operand in operands):
        return None
    pairs = (operands, operands[::-1])
    return next(((skip, branch) for skip, branch in pairs if _comes_from(branch, _uncast(skip), order)), None)


def _uncast(node: fx.Node) -> fx.Node:
    """The value before it was copied or changed its precision."""
    while str(node.target).startswith(COPIES) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _comes_from(node: fx.Node, source: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether ``source`` is an ancestor; looks no further back than ``source`` stands."""
    seen, frontier = {node}, [node]
    while frontier and order[node] > order[source]:
        for operand in frontier.pop().all_input_nodes:
            if operand is source:
                return True
            if operand not in seen and order[operand] > order[source]:
                seen.add(operand)
                frontier.append(operand)
    return False


def _branch_name(join: fx.Node, branch: fx.Node) -> str:
    """The module that computed the branch, seen from the one that adds it."""
    outer, inner = (list((node.meta.get("nn_module_stack") or {}).values()) for node in (join, branch))
    deeper = [path for path, _ in inner[len(outer) :]] or [path for path, _ in inner[-1:]]
    return deeper[0] if deeper else branch.name


# ── as groups ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_groups(axes: Axes, found: Mapping[str, tuple[Piece, ...]], kind: str, frozen: Mapping[str, Reason]) -> Layers:
    first = 1 + max((factor.id for factor in axes.factors()), default=0)
    factors = {name: Factor(first + i, len(pieces)) for i, (name, pieces) in enumerate(found.items())}
    places = {t: UnitAxis((), factors[n], unit) for n, pieces in found.items() for unit, p in enumerate(pieces) for t in p.tensors}
    tensors = {name: (*dims, places[name]) if name in places else dims for name, dims in axes.tensors.items()}
    order = {name: place for place, name in enumerate(axes.trace.parameters)}
    groups = tuple(
        Group(f"{name}:{kind}".lstrip(":"), kind, factors[name], tuple(_members(pieces, order)), exact=kind == "branch")
        for name, pieces in found.items()
    )
    held = tuple(Frozen(Factor(0, 1), (Member(name, -1, "whole", 0),), why) for name, why in frozen.items())
    by_group = {group.name: pieces for group, pieces in zip(groups, found.values(), strict=True)}
    return Layers(replace(axes, tensors=tensors), groups, held, nx.MultiDiGraph(), by_group)


def _members(pieces: Sequence[Piece], order: Mapping[str, int]) -> Iterator[Member]:
    last = len(order)
    yield from (Member(name, -1, "whole", order.get(name, last)) for piece in pieces for name in piece.tensors)


WHOLE: Mapping[str, Callable[[Axes], Layers]] = {"layer": layers, "branch": branches}
"""Kinds of pieces, and what finds them."""
