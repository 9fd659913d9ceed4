"""Several processes on one task, as torchrun starts them: statistics are added up, layers are shared out.

Without a process group everything here does what one process does. Batches are dealt to the ranks in turn; sums over
ranks are taken in the order of the ranks, so that every rank holds the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import DataError
from ..core.moments import Moments
from .gram import Gram

__all__ = ["add_up", "agree", "dealt", "first", "joined", "rank_of", "wait", "world"]

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started together; one that was started alone stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def first() -> bool:
    """Whether this process writes files."""
    return world()[0] == 0


def rank_of(number: int) -> int:
    """Which rank solves the layer of this number within its block."""
    return number % world()[1]


def wait() -> None:
    """None; all ranks have come this far."""
    if world()[1] > 1:
        dist.barrier()


def dealt(batches: Sequence[T]) -> list[T]:
    """Of the batches, which are the same on every rank, those of this one.

    Raises:
        DataError: there are fewer batches than ranks.
    """
    rank, size = world()
    if len(batches) < size:
        raise DataError(f"{len(batches)} batches cannot be dealt to {size} processes: give smaller batches.")
    return list(batches[rank::size])


def add_up(gram: Gram, shape: tuple[int, int]) -> None:
    """None; the gram holds the observations of all ranks.

    Args:
        gram: of this rank, perhaps of no observation.
        shape: groups and columns of the layer's matrix, which a rank without observation cannot know.
    """
    if world()[1] == 1:
        return
    total = shape[0] * shape[1]
    known = gram.moments or Moments(0, torch.zeros(total).double(), torch.zeros(total).double())
    mine = torch.stack([known.mean, known.deviation, torch.full_like(known.mean, known.count)])
    every = [torch.empty_like(mine) for _ in range(world()[1])]
    dist.all_gather(every, mine)
    merged = Moments(0, torch.zeros_like(known.mean), torch.zeros_like(known.mean))
    for mean, deviation, count in every:
        merged = merged.merge(Moments(int(count[0]), mean, deviation))
    hessian = gram.hessian * known.count if gram.full and known.count else None
    if gram.full:
        hessian = torch.zeros(shape[0], shape[1], shape[1]).to(mine) if hessian is None else hessian
        dist.all_reduce(hessian)
        hessian /= max(merged.count, 1)
    gram.replace(merged, hessian, shape)


def agree(tensors: Sequence[Tensor], source: int) -> None:
    """None; each tensor holds what it holds on rank `source`."""
    if world()[1] == 1:
        return
    for tensor in tensors:
        sent: Any = tensor.contiguous()
        dist.broadcast(sent, source)
        tensor.copy_(sent)
