"""Batches read ahead of the training, so that nobody waits for them.

In threads, not in worker processes: reading is a copy out of a memory map, during which Python runs on, while handing a
batch from process to process costs many times that (bench/dataset.py measures both). What a reader raises is raised
where the batch is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .dataset import RankBatches, Samples

BATCHES = 8  # read ahead: for a disk that answers late


class Ahead:
    """Iterates over (x, y) int64 [micro_bsz, ctx_len], or whatever `samples` gives for a batch of sample numbers, in order.

    The disk is asked for all the tokens of the next batches at once, and one thread copies them; with pin_memory into
    memory from which a GPU fetches them while it computes.
    """

    def __init__(self, samples: Samples, batches: RankBatches, pin_memory: bool = False) -> None:
        self.samples, self.batches, self.pin_memory = samples, batches, pin_memory

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        asker, reader = ThreadPoolExecutor(1, "asker"), ThreadPoolExecutor(1, "reader")
        ready: deque[Future[tuple[torch.Tensor, ...]]] = deque()
        try:
            for ii in self.batches:
                asker.submit(self.samples.ask_for, ii)
                ready.append(reader.submit(self._read, ii))
                if len(ready) > BATCHES:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            for threads in (asker, reader):
                threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, ii: np.ndarray) -> tuple[torch.Tensor, ...]:
        batch = self.samples[ii]
        return tuple(tensor.pin_memory() for tensor in batch) if self.pin_memory else batch
