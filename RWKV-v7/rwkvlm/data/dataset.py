"""Samples for training and validation, addressed by their global number ii = 1, 2, 3, ... and by nothing else.

A dataset holds no state and no randomness, and the numbers that a process asks for are a pure function of (rank, world
size, batch, start): a run can be resumed from the count of samples consumed, on any number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset, Sampler

from ..config import UserError
from .binidx import BinIdx
from .sampler import check_magic_prime, chunks_of
from .tokens import Tokens

Pair = tuple[torch.Tensor, torch.Tensor]


class Samples(Dataset):
    """Samples by number; a subclass says which tokens a number means.

    dataset[ii]      x, y int64 [ctx_len]: y is x moved by one token
    dataset[array]   x, y int64 [len(array), ctx_len], gathered together
    """

    name: str  # of the data, for people

    def windows(self, ii: np.ndarray) -> np.ndarray:
        """The ctx_len + 1 tokens of each sample, [*ii.shape, ctx_len + 1]."""
        raise NotImplementedError

    def ask_for(self, ii: np.ndarray) -> None:
        """Samples that will be read soon: the disk is told, nothing is waited for."""
        raise NotImplementedError

    def starts(self, ii: np.ndarray) -> np.ndarray:
        """Which of a sample's tokens, its last one left out, are the first of a document: bool [*ii.shape, ctx_len]."""
        raise NotImplementedError

    def where(self, ii: int) -> str:
        """Where a person finds a sample, for messages."""
        raise NotImplementedError

    def __getitem__(self, ii: int | np.ndarray) -> Pair:
        windows = self.windows(np.asarray(ii))
        return torch.from_numpy(windows[..., :-1].astype(np.int64)), torch.from_numpy(windows[..., 1:].astype(np.int64))


class _Chunks(Samples):
    """Chunks of ctx_len tokens of one file; a subclass says which chunk a sample number means.

    With vocab_size > 0 a sample that holds another token is a UserError (files too large for a whole check_token_range).
    """

    def __init__(self, data: Tokens | str | Path, ctx_len: int, vocab_size: int = 0) -> None:
        self.data = data if isinstance(data, Tokens) else BinIdx(data)
        self.data.refuse_if_cut()
        self.name = self.data.prefix
        self.ctx_len = ctx_len
        self.vocab_size = vocab_size

    def _chunks_of(self, ii: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def windows(self, ii: np.ndarray) -> np.ndarray:
        self.data.refuse_if_cut()
        starts = self._chunks_of(ii) * self.ctx_len
        windows = sliding_window_view(self.data.tokens, self.ctx_len + 1)[starts]
        if self.vocab_size and not 0 <= int(windows.min()) <= int(windows.max()) < self.vocab_size:
            row, at = np.argwhere(((windows < 0) | (windows >= self.vocab_size)).reshape(-1, self.ctx_len + 1))[0]
            raise self.data.outside(int(starts.reshape(-1)[row] + at), self.vocab_size)
        return windows

    def ask_for(self, ii: np.ndarray) -> None:
        self.data.ask_for(self._chunks_of(ii) * self.ctx_len, self.ctx_len + 1)

    def starts(self, ii: np.ndarray) -> np.ndarray:
        begins = self._chunks_of(ii) * self.ctx_len
        found = np.zeros((*begins.shape, self.ctx_len), dtype=bool)
        for at, begin in np.ndenumerate(begins):
            found[at][[start - begin for start in self.data.document_starts(int(begin), int(begin) + self.ctx_len)]] = True
        return found

    def where(self, ii: int) -> str:
        chunk = int(self._chunks_of(np.asarray(ii)))
        return f"chunk {chunk}, tokens {chunk * self.ctx_len:,} to {(chunk + 1) * self.ctx_len:,} of {self.data.file}"


class TrainingSamples(_Chunks):
    """The training data in the official order (sampler.py); len() is the number of samples in one pass over the data.

    UserError if `magic_prime` does not fit the data and ctx_len.
    """

    def __init__(self, data: Tokens | str | Path, ctx_len: int, magic_prime: int, vocab_size: int = 0) -> None:
        super().__init__(data, ctx_len, vocab_size)
        check_magic_prime(magic_prime, self.data.n_tokens, ctx_len)
        self.prime = magic_prime

    def __len__(self) -> int:
        return self.prime

    def _chunks_of(self, ii: np.ndarray) -> np.ndarray:
        return chunks_of(ii, self.prime)


class HeldOutSamples(_Chunks):
    """Validation data from front to back: sample ii is chunk ii - 1, starting over after the last of len() chunks."""

    def __init__(self, data: Tokens | str | Path, ctx_len: int, vocab_size: int = 0) -> None:
        super().__init__(data, ctx_len, vocab_size)
        self.n_chunks = (self.data.n_tokens - 1) // ctx_len
        if not self.n_chunks:
            raise UserError(
                f"validation data {self.data.prefix} have {self.data.n_tokens} tokens; --ctx_len {ctx_len} needs at least {ctx_len + 1}: "
                "hold out more (make_data.py --val_split), give a smaller --ctx_len, or move the held-out files away to do without"
            )

    def __len__(self) -> int:
        return self.n_chunks

    def _chunks_of(self, ii: np.ndarray) -> np.ndarray:
        return (ii - 1) % self.n_chunks


class RankBatches(Sampler):
    """The sample numbers of one rank, a batch [micro_bsz] at a time.

    The idx-th sample of this rank is ii = 1 + start + idx * world + rank, as officially: after any number of steps all
    ranks together have consumed the samples start + 1 to start + steps * world * micro_bsz, whatever their number.
    """

    def __init__(self, rank: int, world: int, micro_bsz: int, n_batches: int, start: int = 0) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.rank, self.world, self.micro_bsz, self.n_batches, self.start = rank, world, micro_bsz, n_batches, start

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[np.ndarray]:
        idx = np.arange(self.micro_bsz)
        for batch in range(self.n_batches):
            yield 1 + self.start + (batch * self.micro_bsz + idx) * self.world + self.rank
