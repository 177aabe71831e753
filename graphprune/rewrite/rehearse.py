"""A model and its inputs in, runs of candidates without numbers out: whether sizes fit is seen on shapes alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.copying import duplicate, held_tensors
from graphprune.exportable import exportable
from graphprune.memory import untouched
from graphprune.rewrite.guess import Choice, written
from graphprune.rewrite.search import Outcome, attempted
from graphprune.trace import Inputs, as_call

META = torch.device("meta")


class Rehearsal:
    """Runs on the ``meta`` device, for models that get through one themselves."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.call = pytree.tree_map_only(Tensor, lambda value: value.to(META), as_call(inputs))

    @cached_property
    def tells(self) -> bool:
        """Whether the model itself gets through: one that asks for a value does not."""
        try:
            return self.runs(weightless(self.model))
        except Exception:  # noqa: BLE001  what a model asks of a value may fail in any way
            return False

    @torch.no_grad()
    def runs(self, candidate: nn.Module) -> bool:
        """True once a model without numbers has run; what it raises is raised."""
        args, kwargs = self.call
        with exportable(candidate, experts=None), META:
            candidate(*args, **kwargs)
        return True


def weightless(model: nn.Module) -> nn.Module:
    """A copy that has shapes only."""
    return duplicate(model, {id(tensor): _empty(tensor) for tensor in held_tensors(model)})


def _empty(tensor: Tensor) -> Tensor:
    blank: Any = tensor.detach().to(META)
    return nn.Parameter(blank, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


class Shadow:
    """A copy of a module without numbers, in which choices are tried."""

    def __init__(self, module: nn.Module, rehearsal: Rehearsal) -> None:
        self.module, self.rehearsal = module, rehearsal

    @cached_property
    def copy(self) -> nn.Module:
        return weightless(self.module)

    def attempted(self, choice: Choice) -> Outcome | None:
        """How far a run with these values gets, where that can be rehearsed and fails."""
        if not self.rehearsal.tells:
            return None
        with untouched(self.copy), written(self.copy, choice):
            return attempted(self.copy, self.rehearsal.runs)
