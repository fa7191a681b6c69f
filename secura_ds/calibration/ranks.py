"""Sharing calibration's work among the ranks of a run; one rank, or no process group, does all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from secura_ds.errors import UserError


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def turns(count: int) -> list[tuple[int, bool]]:
    """This rank's share of `count` pieces of work: (index, whether it counts), equally many on every rank.

    A rank without a piece of its own in the last turn repeats the last one, because under ZeRO-3 every rank
    must run every forward; piece i is computed by rank i % world.
    """
    rank, world = rank_and_world()
    indices = range(rank, -(-count // world) * world, world)
    return [(min(index, count - 1), index < count) for index in indices]


def broadcast(tensor: Tensor, source: int) -> None:
    """Overwrite `tensor` on every rank with that of rank `source`."""
    if rank_and_world()[1] > 1:
        dist.broadcast(tensor, source)


def sum_to(tensor: Tensor, destination: int) -> None:
    """Add up `tensor` over all ranks, on rank `destination`; elsewhere it is undefined afterwards."""
    if rank_and_world()[1] > 1:
        dist.reduce(tensor, destination)


def raise_together(problems: Sequence[str]) -> None:
    """Raise a UserError on every rank if any rank has a problem, so that none waits for one that has left."""
    everywhere = [list(problems)]
    if rank_and_world()[1] > 1:
        everywhere = [[] for _ in range(rank_and_world()[1])]
        dist.all_gather_object(everywhere, list(problems))
    found = sorted(problem for some in everywhere for problem in some)
    if found:
        more = f" (and {len(found) - 1} more layers)" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more}")
