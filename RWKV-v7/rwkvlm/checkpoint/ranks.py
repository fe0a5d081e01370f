"""The few collective operations that saving and loading need; each does the obvious thing in a single process."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from ..config import env


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """0 when there is no process group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Processes that take part in collective operations now: 1 before the process group exists."""
    return dist.get_world_size() if _grouped() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank, in every process. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value in every process. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def say(line: str) -> None:
    """One line for the user on stderr, from the first process only."""
    if env.first_process():
        print(line, file=sys.stderr, flush=True)
