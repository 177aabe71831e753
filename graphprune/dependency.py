"""Axes in, the dependency graph out: structures and joins as nodes, data flow as edges; and LLM-Pruner's two degree rules on it.

A *structure* is one dimension of one parameter or buffer; a *join* is an operation where several of them meet. Every edge
carries one factor. The rules are those of LLM-Pruner (arXiv 2305.11627, equations 1 and 2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from graphprune.axes import Axis, Factor
from graphprune.calls import operation
from graphprune.propagate import Axes, ResolvedUse

MULTIPLICATIVE = ("mul", "div", "matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "glu", "addcmul", "outer")
"""Joins whose output is zero, and so dead, as soon as one input is; any other join needs all its inputs gone."""


@dataclass(frozen=True, slots=True)
class Structure:
    """One dimension of one parameter or buffer."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True, slots=True)
class Join:
    """An operation where a factor arrives from several structures."""

    node: fx.Node
    multiplicative: bool

    def __str__(self) -> str:
        return f"{'×' if self.multiplicative else '+'} {self.node.name}"


Vertex = Structure | Join


@dataclass(frozen=True, slots=True)
class Roles:
    """What each structure does with each factor on it (produces, carries, consumes), and when it is first used."""

    roles: Mapping[tuple[Structure, Factor], str]
    order: Mapping[str, int]

    def of(self, structure: Structure, factor: Factor) -> str:
        """The role, ``carries`` when no contraction says otherwise."""
        return self.roles.get((structure, factor), "carries")


def dependency_graph(axes: Axes, factors: frozenset[Factor]) -> tuple[nx.MultiDiGraph, Roles]:
    """The dependency graph over the given factors: edges are keyed by the factor that flows."""
    walk = _Flow(axes, factors)
    for node in axes.trace.graph.nodes:
        walk.visit(node)
    return walk.graph, Roles(walk.roles, walk.order)


class _Flow:
    """Follows each factor through the fx graph, remembering the last vertex it passed."""

    def __init__(self, axes: Axes, factors: frozenset[Factor]) -> None:
        self.axes = axes
        self.factors = factors
        self.graph: nx.MultiDiGraph = nx.MultiDiGraph()
        self.roles: dict[tuple[Structure, Factor], str] = {}
        self.order: dict[str, int] = {}
        self.last: dict[fx.Node, dict[Factor, Vertex]] = {}
        self.weights: dict[fx.Node, str] = {}
        self.uses: dict[fx.Node, list[ResolvedUse]] = defaultdict(list)
        for use in axes.uses:
            self.uses[use.node].append(use)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node.name in self.axes.trace.tensors:
            self._place(node)
        elif node.op == "call_function":
            self._take_part(node)

    def _place(self, node: fx.Node) -> None:
        name = self.axes.trace.tensors[node.name].name
        self.weights[node] = name
        self.last[node] = {f: Structure(name, dim) for dim, axis in self._dims(node) for f in axis.factors & self.factors}

    def _take_part(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        for operand in operands:
            if operand in self.weights:
                self.order.setdefault(self.weights[operand], len(self.order))
        if node not in self.axes.activations and len(own := self._weights(node)) == 1:
            self.weights[node] = own[0]
        produced = self._contract(node)
        outgoing = {factor for _, axis in self._dims(node) for factor in axis.factors & self.factors}
        self.last[node] = {f: self._flow(node, operands, f, produced.get(f)) for f in outgoing if self._arrives(operands, f)}

    def _weights(self, node: fx.Node) -> list[str]:
        """The weights that ``node`` rearranges; of several, those it leaves in shape, as a weight norm does."""
        own = [operand for operand in node.all_input_nodes if operand in self.weights]
        same = [operand for operand in own if self.axes.nodes[operand] == self.axes.nodes.get(node)]
        return [self.weights[operand] for operand in (own if len(own) == 1 else same)]

    def _arrives(self, operands: Iterable[fx.Node], factor: Factor) -> bool:
        return any(factor in self.last.get(operand, {}) for operand in operands)

    def _contract(self, node: fx.Node) -> dict[Factor, Structure]:
        """Record what this contraction consumes and produces; returns, for each produced factor, its structure."""
        produced: dict[Factor, Structure] = {}
        for use in self.uses[node]:
            name = self.weights.get(use.operand)
            for factor in use.axis.factors & self.factors:
                if name is not None:
                    structure = self._structure(name, use, factor)
                    self._note(structure, factor, use.role)
                    if use.role == "free":
                        produced[factor] = structure
                elif use.role == "contracted":
                    self._consumed(node, use, factor)
        return produced

    def _structure(self, name: str, use: ResolvedUse, factor: Factor) -> Structure:
        """The dimension of the parameter behind an operand, which may have been transposed or regrouped on the way."""
        own = self.axes.tensors[name]
        if use.operand.op == "placeholder":
            return Structure(name, use.dim)
        same = [dim for dim, axis in enumerate(own) if axis == use.axis]
        having = [dim for dim, axis in enumerate(own) if factor in axis.factors]
        return Structure(name, (same or having or [0])[0])

    def _note(self, structure: Structure, factor: Factor, role: str) -> None:
        word = {"free": "produces", "contracted": "consumes"}.get(role)
        if word is not None:
            self.roles[structure, factor] = word
            self.graph.add_node(structure)

    def _consumed(self, node: fx.Node, use: ResolvedUse, factor: Factor) -> None:
        """An activation's factor ends here: in the weight that contracts it, in a join of activations, or in a sum over it."""
        source = self.last.get(use.operand, {}).get(factor)
        partners = [other for other in self.uses[node] if other.operand in self.weights and factor in other.axis.factors]
        for partner in partners:
            self._edge(source, self._structure(self.weights[partner.operand], partner, factor), factor)
        if not partners:
            self._edge(source, Join(node, multiplicative=use.joint), factor)

    def _flow(self, node: fx.Node, operands: Iterable[fx.Node], factor: Factor, producer: Structure | None) -> Vertex:
        """The vertex a factor leaves ``node`` from: a producer's or carrier's structure, a join, or wherever it came from."""
        arriving = {operand: self.last[operand][factor] for operand in operands if factor in self.last.get(operand, {})}
        flows = list(dict.fromkeys(vertex for operand, vertex in arriving.items() if operand not in self.weights))
        carriers = list(dict.fromkeys(vertex for operand, vertex in arriving.items() if operand in self.weights))
        if producer is not None:
            flows, carriers = [producer], [v for v in carriers if isinstance(v, Structure) and v.name != producer.name]
        if not flows:
            flows, carriers = carriers[:1], carriers[1:]
        head = flows[0] if len(flows) == 1 else self._join(node, flows, factor)
        for carrier in carriers:
            self._edge(head, carrier, factor)
            head = carrier
        return head

    def _join(self, node: fx.Node, flows: Iterable[Vertex], factor: Factor) -> Join:
        join = Join(node, operation(node) in MULTIPLICATIVE)
        for source in flows:
            self._edge(source, join, factor)
        return join

    def _edge(self, source: Vertex | None, target: Vertex, factor: Factor) -> None:
        if source is not None and source != target and not self.graph.has_edge(source, target, factor):
            self.graph.add_edge(source, target, key=factor)

    def _dims(self, node: fx.Node) -> Iterator[tuple[int, Axis]]:
        return _axes_of(self.axes.nodes.get(node))


def _axes_of(value: Any) -> Iterator[tuple[int, Axis]]:
    for place, part in enumerate(value or ()):
        if isinstance(part, Axis):
            yield place, part
        else:
            yield from _axes_of(part)


# ── the degree rules ─────────────────────────────────────────────────────────────────────────────────────────────────


def loses_its_input(graph: nx.MultiDiGraph, vertex: Vertex, gone: set[Vertex]) -> bool:
    """Rule 1: N_j ∈ Out(N_i) ∧ Deg⁻(N_j) = 1 ⇒ N_j depends on N_i. What feeds it is gone, so it is gone.

    A multiplicative join dies with any of its inputs, any other vertex of in-degree above one only with all of them.
    """
    sources = set(graph.predecessors(vertex))
    if isinstance(vertex, Join) and vertex.multiplicative:
        return bool(sources & gone)
    return bool(sources) and sources <= gone


def loses_its_purpose(graph: nx.DiGraph, vertex: Vertex | fx.Node, gone: set[Any]) -> bool:
    """Rule 2: N_i ∈ In(N_j) ∧ Deg⁺(N_i) = 1 ⇒ N_i depends on N_j. All it feeds is gone, so it is useless."""
    targets = set(graph.successors(vertex))
    return bool(targets) and targets <= gone


def closure(flow: nx.MultiDiGraph, trigger: Vertex) -> frozenset[Vertex]:
    """Everything that goes with ``trigger`` by the two rules, to a fixpoint, in the flow of one factor."""
    gone: set[Vertex] = {trigger}
    frontier = [trigger] if trigger in flow else []
    while frontier:
        near = frontier.pop()
        for vertex in {*flow.successors(near), *flow.predecessors(near)} - gone:
            if loses_its_input(flow, vertex, gone) or loses_its_purpose(flow, vertex, gone):
                gone.add(vertex)
                frontier.append(vertex)
    return frozenset(gone)


def useless(flow: nx.DiGraph, trigger: Vertex | fx.Node, keep: Vertex | fx.Node) -> frozenset[Any]:
    """Everything that feeds nothing once ``trigger`` is gone: the second rule alone, to a fixpoint, never past ``keep``."""
    gone: set[Any] = {trigger}
    frontier = [trigger]
    while frontier:
        for vertex in set(flow.predecessors(frontier.pop())) - gone - {keep}:
            if loses_its_purpose(flow, vertex, gone):
                gone.add(vertex)
                frontier.append(vertex)
    return frozenset(gone)


def flows(graph: nx.MultiDiGraph) -> dict[Factor, nx.MultiDiGraph]:
    """For each factor, the part of the dependency graph that it flows through."""
    edges: dict[Factor, list[tuple[Vertex, Vertex, Factor]]] = defaultdict(list)
    for edge in graph.edges(keys=True):
        edges[edge[2]].append(edge)
    return {factor: graph.edge_subgraph(own) for factor, own in edges.items()}
