"""--doc_reset: the same samples in the same order, cut at the ends of documents, for a model that begins anew with each."""

from __future__ import annotations

import numpy as np
import torch

from .dataset import Samples


class ResetSamples(Samples):
    """Samples packed into one row, document by document: what layers/packed.py reads.

    dataset[array of B numbers]     idx int64 [1, T], targets int64 [B ctx_len], bounds int32 [documents + 1], tokens int64 [B ctx_len]

    A sample begins anew too, as without this: it may be the middle of a document, whose beginning another sample has. The target of a
    document's last token stays the first token of the next one, as the data have it.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples, self.name = samples, samples.name
        samples.starts(np.array([1]))  # UserError, before a run has begun, for data that do not say where documents begin

    def __len__(self) -> int:
        return len(self.samples)

    def ask_for(self, ii: np.ndarray) -> None:
        self.samples.ask_for(ii)

    def where(self, ii: int) -> str:
        return self.samples.where(ii)

    def __getitem__(self, ii: int | np.ndarray) -> tuple[torch.Tensor, ...]:
        ii = np.atleast_1d(ii)
        windows, first = self.samples.windows(ii), self.samples.starts(ii)
        first[:, 0] = True
        begins = np.flatnonzero(first)
        tokens = np.arange(first.size) + np.cumsum(first.reshape(-1)) - 1  # one place of padding after every document before
        idx = np.zeros((1, first.size + len(begins)), dtype=np.int64)
        idx[0, tokens] = windows[:, :-1].reshape(-1)
        bounds = np.append(tokens[begins], idx.shape[1]).astype(np.int32)
        return (
            torch.from_numpy(idx),
            torch.from_numpy(windows[:, 1:].reshape(-1).astype(np.int64)),
            torch.from_numpy(bounds),
            torch.from_numpy(tokens),
        )
