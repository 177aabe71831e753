"""A graph with regions of its own in, one flat graph of the same operations out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphprune.calls import takes_part, writes

INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "wrap")
"""Higher-order regions that run their body once, unchanged: their bodies become part of the flat graph."""

CASTS = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.type_as)


def inline(module: fx.GraphModule) -> fx.GraphModule:
    """The same computation with every run-once region spliced into one flat graph."""
    flat = fx.Graph()
    places = {node: _placed(flat, node) for node in module.graph.nodes if node.op == "placeholder"}
    bodies: dict[str, Any] = {}
    flat.output(_splice(module, flat, places, bodies))
    flat.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    return fx.GraphModule(bodies, flat)


def _placed(flat: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder's copy; its name may differ (``input`` is taken), what the program called it stays known."""
    copy = flat.node_copy(node)
    copy.meta = {**node.meta, "called": node.name}
    return copy


def _splice(module: fx.GraphModule, flat: fx.Graph, values: dict[fx.Node, Any], bodies: dict[str, Any], casts: bool = False) -> Any:
    """Copy the nodes of ``module`` into ``flat``, given its placeholders' values; returns what ``module`` returns.

    ``casts`` where operations cast their operands as autocast has it; ``bodies`` are the parts that operations run by themselves,
    each under a name of its own.
    """
    for node in module.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if _is_region(node):
            values[node] = _splice_region(module, node, flat, values, bodies, casts)
        elif takes_part(node) and isinstance(values[node.args[0]], tuple | list):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "get_attr":
            name = f"body_{len(bodies)}"
            bodies[name] = module.get_submodule(str(node.target))
            values[node] = flat.get_attr(name)
        elif node.op != "placeholder":
            values[node] = flat.node_copy(node, values.__getitem__)
            if casts:
                _cast_operands(values[node])
    raise AssertionError("a graph without an output node")


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in INLINED


def _splice_region(
    module: fx.GraphModule, node: fx.Node, flat: fx.Graph, values: dict[fx.Node, Any], bodies: dict[str, Any], casts: bool
) -> Any:
    place = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    body = module.get_submodule(str(node.args[place].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    operands = [fx.map_arg(operand, values.__getitem__) for operand in node.args[place + 1 :]]
    holders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    if "autocast" in str(node.target):
        casts = bool(node.args[2])
    return _splice(body, flat, dict(zip(holders, operands, strict=True)), bodies, casts)


def _cast_operands(node: fx.Node) -> None:
    """The casts of an operation under autocast, written out: its operands take the precision of its result."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or target.overloadpacket in CASTS or not isinstance(value, Tensor):
        return
    if writes(target) or not value.is_floating_point():
        return
    for operand in node.all_input_nodes:
        given = operand.meta.get("val")
        if isinstance(given, Tensor) and given.is_floating_point() and given.dtype not in (value.dtype, torch.float64):
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten.to.dtype, (operand, value.dtype))
            cast.meta = {**node.meta, "val": given.to(value.dtype)}
            node.replace_input_with(operand, cast)
