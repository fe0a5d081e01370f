"""How the tokens of a call are cut into segments of test-time training, each of which ends with a step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Stretch(NamedTuple):
    """start, stop: tokens of this call that are run at once. seen: for each row, tokens of its segment before them.
    full: rows whose segment is complete after them."""

    start: int
    stop: int
    seen: list[int]
    full: list[int]


def stretches(seen: list[int], length: int, segment: int) -> list[Stretch]:
    """The next `length` tokens, cut wherever any row completes a segment; seen: tokens of each row's segment so far, below `segment`."""
    found, start = [], 0
    while start < length:
        stop = min(length, start + segment - max(seen))
        after = [s + stop - start for s in seen]
        full = [row for row, s in enumerate(after) if s == segment]
        found.append(Stretch(start, stop, seen, full))
        start, seen = stop, [s % segment for s in after]
    return found


def seen_after(stretch: Stretch, segment: int) -> torch.Tensor:
    """[B] int64 on the CPU, where the host reads it without waiting for a device: tokens of each row's segment after the stretch."""
    return torch.tensor([(s + stretch.stop - stretch.start) % segment for s in stretch.seen])
