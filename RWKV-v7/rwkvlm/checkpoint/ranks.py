"""The few collective operations that saving and loading need; each does the obvious thing in a single process.

group: a process group of all ranks; None is the default one, which only the training thread may use. A thread beside it needs its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ..config import UserError, env

T = TypeVar("T")
LETTING_GO = 0.2  # seconds


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """0 when there is no process group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Processes that take part in collective operations now: 1 before the process group exists."""
    return dist.get_world_size() if _grouped() else 1


def leave() -> None:
    """Ends the process group before the interpreter goes.

    gloo's threads may still hold tensors of the last operation, and to let go of them they need the interpreter: one that is gone
    aborts the process, after all work was done. Such aborts were seen in 2 of 11 runs of a test, and once on
    a busy machine; the reason is that of pytorch's pull request 179291, not proven here.
    """
    if _grouped():
        dist.destroy_process_group()
        time.sleep(LETTING_GO)


def new_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A group of all ranks between CPUs for a thread of its own; None in a single process. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world_size() > 1 else None


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process's value, by rank, in every process. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
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
        with contextlib.suppress(OSError):  # a closed terminal must not end what is being reported
            print(line, file=sys.stderr, flush=True)


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs action in every process and returns all results by rank; if it fails in any, raises UserError in all. Collective.

    So a full disk on one node ends a run everywhere with its reason, instead of leaving the others waiting.
    """
    cause: Exception | None = None
    try:
        outcome = (action(), "")
    except (OSError, UserError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        cause, outcome = error, (None, describe(error))
    outcomes = gather(outcome, group)
    for failed, (_, problem) in enumerate(outcomes):
        if problem:
            raise UserError(problem if world_size() == 1 else f"{problem} (rank {failed})") from cause
    return [result for result, _ in outcomes]


def describe(error: BaseException) -> str:
    """One line about an error. torch hides what the disk said behind an error of its own."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
