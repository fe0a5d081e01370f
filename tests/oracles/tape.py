"""A stand-in for CUDA graphs on the CPU: operators recorded with the memory that they read and write, run again without Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Listener(TorchDispatchMode):
    """Every operator below autograd: itself, its arguments, and those results that lie in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[tuple[int, torch.Tensor]]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors_in((args, kwargs))}
        fresh = [(i, x.detach()) for i, x in enumerate(tensors_in(result)) if storage(x) not in given]
        self.calls.append((function, args, kwargs or {}, fresh))
        return result


class Tape:
    """In the place of rwkvlm.train.graphs.Recorder, for a model of so many blocks. `ran`: which recordings, in order.

    As graphs do, a run writes over what the run before has left; no Python of what was recorded runs again, and no version
    counter moves. All recordings have their memory in common, as those of a pool: a run spoils everything that later ones
    write, and what earlier ones have not returned, once it may have been freed: what a forward pass keeps is there until its
    backward pass has run. Numbers become NaN; whole ones 1, which is a token and a place too, so that whoever reads it does so
    in memory that there is, and has other bits than without.
    """

    def __init__(self, blocks: int, recompute: bool = False) -> None:
        self.blocks, self.recompute = blocks, recompute
        self.lists: list[list] = []
        self.returned: list[set[int]] = []
        self.ran: list[int] = []
        self.tried = 0

    def try_out(self, work: Callable[[], object]) -> None:
        self.tried += 1
        work()

    def record(self, work):
        with _Listener() as listener:
            results = work()
        number = len(self.lists)
        self.lists.append(listener.calls)
        self.returned.append({storage(x) for x in tensors_in(results)})
        return lambda: self._run(number), results

    @torch.no_grad()
    def _run(self, number: int) -> None:
        with _disable_current_modes():
            for other, calls in enumerate(self.lists):
                if other >= number or self._freed(other, number):
                    self._spoil(calls, set() if other >= number else self.returned[other])
            for function, args, kwargs, fresh in self.lists[number]:
                results = tensors_in(function(*args, **kwargs))
                for i, place in fresh:
                    place.data.copy_(results[i])
        self.ran.append(number)

    def _freed(self, earlier: int, now: int) -> bool:
        """Forward passes are recorded from the first block to the last, then backward passes from the last to the first."""
        return earlier >= self.blocks or self.recompute or earlier > 2 * self.blocks - 1 - now

    @staticmethod
    def _spoil(calls: list, kept: set[int]) -> None:
        for x in (x for *_, fresh in calls for _, x in fresh):
            if storage(x) not in kept:
                x.data.fill_(torch.nan if x.is_floating_point() else 1)
