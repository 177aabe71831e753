"""A flat graph in; operations that have no rule, but that torch makes of others that have, are written out as those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from graphprune.calls import takes_part, writes
from graphprune.rules import find_rule

Recipe = Callable[..., Any]


def write_out_composed(graph: fx.Graph) -> None:
    """Replace what can be; what is made of something without a rule, draws at random or writes to its operands, stays as it is."""
    recipes = {target: _recipe(target) for target in {node.target for node in graph.nodes if node.op == "call_function"}}
    for node in list(graph.nodes):
        recipe = recipes[node.target] if node.op == "call_function" else None
        body = _traced(node, recipe) if recipe is not None else None
        if body is not None:
            _replace(node, body)


def _recipe(target: Any) -> Recipe | None:
    """How torch makes an operation without a rule of others."""
    if not isinstance(target, torch._ops.OpOverload) or find_rule(target) is not None:
        return None
    if writes(target) or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return target.decompose if target._can_decompose() else decomposition_table.get(target)


def _traced(node: fx.Node, recipe: Recipe) -> fx.Graph | None:
    """The recipe as a graph over the operands of a call, where these are tensors and all its operations have rules."""
    places = {operand: i for i, operand in enumerate(node.all_input_nodes)}
    leaves, form = pytree.tree_flatten((node.args, node.kwargs))

    def call(values: list[Tensor]) -> Any:
        given = [values[places[leaf]] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, form)
        return recipe(*args, **kwargs)

    values = [operand.meta.get("val") for operand in places]
    mode = detect_fake_mode(values)
    if mode is None or _shapes(values) is None:
        return None
    try:
        with mode:
            found = make_fx(call)(values).graph
    except Exception:  # noqa: BLE001  then it stays one operation, unknown
        return None
    results = _results(found)
    if not _is_understood(found) or not all(isinstance(result, fx.Node) for result in results):
        return None
    made = _shapes([result.meta["val"] for result in results])
    return found if made is not None and made == _shapes(node.meta.get("val")) else None


def _is_understood(graph: fx.Graph) -> bool:
    """Whether every operation has a rule, and no number in it is an open size."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    literals = pytree.tree_leaves([(node.args, node.kwargs) for node in calls])
    known = all(node.op == "call_function" and (takes_part(node) or find_rule(node.target)) for node in calls)
    return known and not any(isinstance(literal, torch.SymInt) for literal in literals)


def _replace(node: fx.Node, body: fx.Graph) -> None:
    holders = [inner for inner in body.nodes if inner.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = dict(zip(holders, node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta = {**node.meta, "val": inner.meta["val"]}
    made = [copies[result] for result in _results(body)]
    if isinstance(node.meta["val"], Tensor):
        node.replace_all_uses_with(made[0])
    for user in list(node.users):
        user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _results(graph: fx.Graph) -> list[Any]:
    """The nodes a graph returns."""
    return pytree.tree_leaves(next(node.args[0] for node in graph.nodes if node.op == "output"))


def _shapes(values: Any) -> list[tuple[Any, ...]] | None:
    """The shapes of tensors, None where there is anything else."""
    leaves = pytree.tree_leaves(values)
    return [tuple(leaf.shape) for leaf in leaves] if all(isinstance(leaf, Tensor) for leaf in leaves) else None
