"""Batches and totals in, this rank's share of the batches and everybody's totals out. In a single process nothing happens.

Ranks are processes that torchrun started. Where each holds the whole model they look at different batches; where the model is
sharded (``fully_shard``) they look at different rows of the same batch, since its engine averages their gradients.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started, where it did and nobody joined them yet."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return place()[0] == 0


def wait() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def told(value: T) -> T:
    """What rank 0 says."""
    box: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only a part of each parameter."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def dealt(batches: Iterable[Any], model: nn.Module | None = None) -> Sequence[Any]:
    """The part of the batches that this rank looks at.

    Given a sharded ``model``, its rows of every batch; a batch whose rows cannot be dealt evenly goes to every rank.
    """
    rank, world = place()
    if model is None or not is_sharded(model):
        return list(batches)[rank::world]
    return [_rows(batch, rank, world) for batch in batches]


def numbered(mine: Iterable[T]) -> Iterator[tuple[int, T]]:
    """What this rank was dealt, with the numbers that it had among all."""
    yield from zip(count(*place()), mine, strict=False)


def _rows(batch: Mapping[str, Any], rank: int, world: int) -> Mapping[str, Any]:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if any(len(value) % world for value in tensors.values()):
        return batch
    return {**batch, **{name: value.chunk(world)[rank] for name, value in tensors.items()}}


def summed(totals: Mapping[Key, Tensor], model: nn.Module | None = None) -> dict[Key, Tensor]:
    """Totals over the batches that each rank looked at, summed over all ranks. What a rank lacks counts as zero.

    Given a sharded ``model``, they are complete already.
    """
    if not dist.is_initialized() or (model is not None and is_sharded(model)):
        return dict(totals)
    found: dict[Key, Tensor] = {}
    for key, (shape, dtype, device) in _everybodys(totals).items():
        found[key] = totals[key].contiguous().clone() if key in totals else torch.zeros(shape, dtype=dtype, device=device)
        dist.all_reduce(found[key])
    return found


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let every parameter have the sum of the ranks' gradients."""
    if dist.is_initialized():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)


def _everybodys(totals: Mapping[Key, Tensor]) -> dict[Key, tuple[torch.Size, torch.dtype, str]]:
    """Shape, dtype and kind of device of every total that some rank has, in the same order on each."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, [(key, (total.shape, total.dtype, total.device.type)) for key, total in totals.items()])
    return {key: what for row in lists for key, what in row}


# ── tensors that are spread over ranks ───────────────────────────────────────────────────────────────────────────────


def whole(tensor: Tensor) -> Tensor:
    """An ordinary tensor with all of the values: a sharded one is gathered, one that lives in a file is read."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def completed(profile: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Sums of this rank's part of ``tensor`` over all dimensions but ``dim``, made those of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return profile
    meanings = [_meaning(placement, dim) for placement in tensor.placements]
    shape = torch.Size([tensor.shape[dim] if dim >= 0 else 1])
    spread = DTensor.from_local(profile, tensor.device_mesh, meanings, run_check=False, shape=shape, stride=(1,))
    return spread.full_tensor()


def _meaning(placement: Any, dim: int) -> Any:
    if isinstance(placement, Replicate):
        return placement
    return Shard(0) if placement.is_shard(dim) else Partial()
