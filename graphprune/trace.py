"""Model and example inputs in, a Trace out: one flat fx graph of ATen operations with every tensor named. No weight is read."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from graphprune import quiet
from graphprune.composed import write_out_composed
from graphprune.device import CPU, beside, where
from graphprune.errors import ModelLimit, UserMistake, first_line
from graphprune.exportable import BATCHED, exportable
from graphprune.frames import is_own, short_stacks
from graphprune.inline import inline
from graphprune.known import Known, agrees, casts_that_do_nothing, without_checks
from graphprune.memory import lent
from graphprune.repeat import Repeats, unwritten, write_out
from graphprune.signature import Signature, Sizes, open_sizes, signature_of, taken_for_granted
from graphprune.slices import as_slices
from graphprune.withheld import Withheld

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TracedTensor:
    """A parameter, buffer or lifted constant of the model. Tied tensors are one, under every name they have."""

    name: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Trace:
    """What torch.export saw: ``graph`` with one placeholder a tensor, and what each placeholder stands for.

    ``lent`` are the placeholders that the graph writes to: whoever runs it lends it copies of these. ``sizes`` are those of
    each input, symbols where open, ``guards`` what was taken for granted of these, ``trainable`` the parameters that ask for a
    gradient.
    """

    name: str
    module: fx.GraphModule
    tensors: Mapping[str, TracedTensor]
    inputs: tuple[str, ...]
    example: tuple[Any, ...]
    constants: Mapping[str, Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    lent: frozenset[str]
    signature: Signature
    sizes: tuple[Sizes, ...]
    guards: tuple[sympy.Basic, ...]
    trainable: frozenset[str]

    @property
    def graph(self) -> fx.Graph:
        """The flat fx graph."""
        return self.module.graph

    @property
    def parameters(self) -> dict[str, TracedTensor]:
        """The distinct parameters by name, in the order the model first uses them."""
        return {tensor.name: tensor for tensor in self.tensors.values() if tensor.kind == "parameter"}

    def count(self, names: Collection[str] | None = None) -> int:
        """Number of parameters, of all of them or of those named."""
        return sum(prod(tensor.shape) for name, tensor in self.parameters.items() if names is None or name in names)

    def flatten(self, inputs: Inputs) -> tuple[Any, ...]:
        """Example-like inputs as the flat values of ``self.inputs``, by position or by name as they come; labels are left out.

        Raises UserMistake on an argument that the trace has not, or that is missing.
        """
        args, kwargs = as_call(inputs)
        positional, keywords = pytree.tree_unflatten(list(self.inputs), self.in_spec)
        flat = pytree.tree_leaves(self.signature.arranged(args, self.signature.taken(kwargs), len(positional), list(keywords)))
        device = next((value.device for value in self.example if isinstance(value, Tensor)), CPU)
        return tuple(beside(flat, device))


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as ``(args, kwargs)``: a tensor, a sequence of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def trace(
    model: nn.Module, example_inputs: Inputs, *, dynamic: bool = False, repeat: bool = True, experts: str | None = BATCHED
) -> Trace:
    """Trace ``model`` with torch.export on real, fake or meta tensors.

    ``dynamic`` leaves batch and sequence sizes open where the model allows it. ``repeat`` traces a block that has twins once
    and writes it out again for each twin: the same trace for less. ``experts`` is the way in which a mixture
    of experts runs, as ``exportable`` has it. Raises ModelLimit, naming the model's own source line, when it cannot be exported.
    """
    args, kwargs = beside(as_call(example_inputs), where(model))
    _check_tensors(model)
    trainable = frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    with exportable(model, experts), _without_gradients(model), _forgetting(), short_stacks():
        found = _repeated(model, args, kwargs) if repeat and not dynamic else None
        return replace(found or _plain(model, args, kwargs, dynamic), trainable=trainable)


@contextmanager
def _forgetting() -> Iterator[None]:
    """What torch remembers of the shapes it has seen, in case it sees them again, is as large as the graph."""
    try:
        yield
    finally:
        FakeTensorMode.cache_clear()


def _check_tensors(model: nn.Module) -> None:
    """Every tensor of a model has a shape, and may be used for what a trace and a training need."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise UserMistake(f"{name} has no shape yet", fix="call the model once, on inputs like the example")
        if tensor.is_inference():
            raise UserMistake(f"{name} was made in inference mode", fix="build the model outside torch.inference_mode()")


def _plain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Trace:
    """Every block traced."""
    try:
        program = _export(model, args, kwargs, dynamic)
    except ModelLimit as limit:
        program = _export_known(model, args, kwargs, limit)
    return _as_trace(model, program, inline(program.graph_module), _tensors(program, model), args, kwargs)


def _export_known(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: ModelLimit) -> ExportedProgram:
    """Once more for a model that asks its own constants for values, or loops over experts hit; else the ``first`` limit."""
    loops = False
    for spare in (0, 1):
        with Known(spare) as known, casts_that_do_nothing():
            try:
                program = _export(model, args, kwargs, dynamic=False)
            except ModelLimit:
                continue
        without_checks(program)
        if not known.everywhere or agrees(model, program, args, kwargs):
            return program
        loops = True
    if loops:
        raise ModelLimit(f"{type(model).__name__} cannot be exported", why="it loops over places that depend on data")
    raise first


def _repeated(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
    """Twins traced once; None when there are none, or when anything stands against it."""
    repeats = Repeats(model, marked=True)
    if not repeats.families:
        return None
    withheld = Withheld(model, repeats.families.values())
    with unwritten():
        found = _written_out(model, args, kwargs, repeats, withheld)
        if withheld.asked:
            found = _written_out(model, args, kwargs, Repeats(model, marked=True), Withheld(model, ()))
        return found


def _written_out(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: Repeats, withheld: Withheld
) -> Trace | None:
    """Every first call traced, what follows written out from it; None where something stands against it."""
    try:
        with repeats.watching(), withheld.away():
            program = _export(model, args, kwargs, dynamic=False)
    except ModelLimit:
        return None
    module, (tensors, constants) = inline(program.graph_module), _tensors(program, model)
    holders = {node.meta["called"]: node for node in module.graph.nodes if node.op == "placeholder"}
    seen = {spec.target: holders[spec.arg.name] for spec in program.graph_signature.input_specs if spec.target is not None}
    if withheld.asked or not seen.keys() >= set(withheld.twins.values()):
        return None
    for name, node in withheld.placed(module.graph, seen).items():
        twin = tensors[seen[withheld.twins[name]].meta["called"]]
        tensors[node.name] = replace(twin, name=name, names=(name,))
    names = {holder: tensor.name for holder, tensor in tensors.items() if tensor.kind != "constant"}
    flat = write_out(module, names, repeats)
    return None if flat is None else _as_trace(model, program, flat, (tensors, constants), args, kwargs)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that a stand-in for a block's output cannot be told from the output."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _as_trace(
    model: nn.Module,
    program: ExportedProgram,
    flat: fx.GraphModule,
    found: tuple[Mapping[str, TracedTensor], Mapping[str, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Trace:
    held, constants = found
    write_out_composed(flat.graph)
    called = {node.meta["called"]: node.name for node in flat.graph.nodes if node.op == "placeholder"}
    tensors = {name: held[holder] for holder, name in called.items() if holder in held}
    values = {node: constants.get(tensors[node.name].name) for node in flat.graph.nodes if node.name in tensors}
    as_slices(flat.graph, {node: value for node, value in values.items() if value is not None})
    users = [called[spec.arg.name] for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise ModelLimit("torch.export returned a program without call specification")
    example = tuple(pytree.tree_leaves((args, kwargs)))
    given = {node.name: node.meta.get("val") for node in flat.graph.nodes if node.op == "placeholder"}
    sizes, guards = taken_for_granted([given[name] for name in users])
    return Trace(
        name=type(model).__name__,
        module=flat,
        tensors=tensors,
        inputs=tuple(users),
        example=example,
        constants=constants,
        in_spec=in_spec,
        out_spec=out_spec,
        lent=lent(flat.graph),
        signature=signature_of(model),
        sizes=sizes,
        guards=guards,
        trainable=frozenset(),
    )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> ExportedProgram:
    if dynamic:
        try:
            return export(model, args, kwargs, dynamic_shapes=open_sizes(model, args, kwargs), strict=False)
        except Exception:  # noqa: BLE001  whatever stands against open sizes, fixed ones are the answer
            return _export(model, args, kwargs, False)
    try:
        with quiet.tracing():
            return export(model, args, kwargs, strict=False)
    except Exception as error:
        raise _export_failure(model, error) from error


def _export_failure(model: nn.Module, error: Exception) -> ModelLimit:
    """What, where in the model's own source, why."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_own(f.filename) and f.filename != __file__]
    where = f"{frames[-1].filename}:{frames[-1].lineno}   {frames[-1].line}" if frames else None
    return ModelLimit(f"{type(model).__name__} cannot be exported", at=where, why=f"{type(error).__name__}: {first_line(error)}")


# ── naming tensors ───────────────────────────────────────────────────────────────────────────────────────────────────


def _tensors(program: ExportedProgram, model: nn.Module) -> tuple[dict[str, TracedTensor], dict[str, Tensor]]:
    """What each tensor placeholder stands for, and the values of constants that no module owns."""
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
    aliases = _aliases(model)
    named: dict[str, TracedTensor] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in kinds or spec.target is None:
            continue
        kind, names = kinds[spec.kind], aliases.get(spec.target, (spec.target,))
        value = program.constants[spec.target] if spec.target in program.constants else program.state_dict[spec.target]
        if kind == "constant" or names[0] not in aliases:
            constants[names[0]] = value
            kind = "constant"
        named[spec.arg.name] = TracedTensor(names[0], names, kind, tuple(value.shape), value.dtype)
    return named, constants


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of a parameter or buffer, with all the names that the same tensor object has."""
    names: dict[int, list[str]] = {}
    for own in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in own:
            names.setdefault(id(tensor), []).append(name)
    return {name: tuple(shared) for shared in names.values() for name in shared}
