"""A long row of tokens in a file: what training reads, whatever the format."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import UserError

BLOCK = 1 << 20  # tokens looked at together, so that checks of any file run in bounded memory
SCAN_LIMIT = 4 << 30  # bytes of tokens that check_token_range reads
PROBES, PROBE = 512, 2048  # blocks, and tokens of each, by which fingerprint knows a file


@dataclass(frozen=True)
class TokenRange:
    """What check_token_range saw; as a string, one line for the log."""

    smallest: int
    largest: int
    checked: int  # tokens read
    total: int

    def __str__(self) -> str:
        how = "all" if self.checked == self.total else f"{self.checked} of {self.total}, evenly spread,"
        return f"token ids {self.smallest} to {self.largest} ({how} checked)"


def refuse_if_cut(file: Path, then: os.stat_result) -> None:
    """UserError where a mapped file has another size than it had then.

    A process that reads a mapped file behind its end is killed (SIGBUS). A file that was replaced by another one, as
    make_data.py does it, is no problem: the old one stays whole as long as it is mapped.
    """
    with suppress(OSError):
        now = os.stat(file)
        if (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino) and now.st_size != then.st_size:
            raise UserError(
                f"{file} has {now.st_size} bytes, and had {then.st_size} when this began; put the whole file back, then start again"
            )


def forget(mapping: mmap.mmap) -> None:
    """Lets go of the pages that were read: a gigabyte of them would be taken for the memory that the program needs (train/planner.py)."""
    with suppress(OSError):  # a process that keeps all of its memory (mlockall) keeps them
        mapping.madvise(mmap.MADV_DONTNEED)


class Tokens:
    """A long row of tokens in a file. The constructor takes the prefix.

    prefix: what the user calls it; file: where the tokens are; tokens: [n_tokens] of any integer dtype, read-only.
    vocab_size: 0 where the file does not define its vocabulary itself; n_docs: 0 where it does not divide its tokens
    into documents.
    """

    prefix: str
    file: Path
    tokens: np.ndarray
    vocab_size = 0
    n_docs = 0

    @cached_property
    def _mapping(self) -> tuple[mmap.mmap, int] | None:
        """The memory map in which the tokens lie and the byte where they begin; None for tokens that are in memory."""
        base = self.tokens
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, mmap.mmap):
            return None
        return base, self.tokens.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data

    def ask_for(self, starts: np.ndarray, n: int) -> None:
        """Tokens starts to starts + n - 1, for each of `starts`, will be read soon: the disk is told of all of them at once.

        Left to itself it would learn of each when the one before has come, and read 128 KiB around it.
        """
        if self._mapping is not None:
            mapping, begin = self._mapping
            for start in starts.reshape(-1).tolist():
                first = begin + start * self.tokens.itemsize
                page = first - first % mmap.PAGESIZE
                mapping.madvise(mmap.MADV_WILLNEED, page, first + n * self.tokens.itemsize - page)

    @cached_property
    def _mapped(self) -> os.stat_result:
        return os.stat(self.file)

    def refuse_if_cut(self) -> None:
        """UserError where the file has another size than when this was first called."""
        then = self._mapped
        if self._mapping is not None:
            refuse_if_cut(self.file, then)

    def like(self, prefix: str) -> Tokens:
        """Another file of the same format and vocabulary."""
        return type(self)(prefix)

    def document_starts(self, first: int, stop: int) -> list[int]:
        """Where documents begin, of the tokens from `first` to `stop` - 1. UserError for a format that does not know."""
        raise UserError(f"--doc_reset 1: {self.file} does not say where documents begin; use --data_type binidx")

    def tokenizer_json(self) -> str:
        """The vocabulary that the file defines as a tokenizer.json of Hugging Face's `tokenizers`; "" for none."""
        return ""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def blocks(self, limit: int = 1 << 62) -> Iterator[tuple[int, np.ndarray]]:
        """(position, tokens) over the file: all of it up to `limit` bytes, else evenly spread blocks, both ends included."""
        n, most = self.n_tokens, max(2, limit // (BLOCK * self.tokens.itemsize))
        if -(-n // BLOCK) <= most:
            starts: Sequence[int] = range(0, n, BLOCK)
        else:
            starts = [k * (n - BLOCK) // (most - 1) for k in range(most)]
        for start in starts:
            yield start, self.tokens[start : start + BLOCK]

    def fingerprint(self, n: int) -> str:
        """A name of the first n tokens, the same in whatever file, dtype or format they lie: a hash of blocks of them.

        The blocks are evenly spread, both ends included, and have about a million tokens (of a small file all), so that
        the largest file takes a moment only. Other tokens, or the same in another order, have another name; a change
        that lies between two blocks of a large file is not noticed.
        """
        size = min(PROBE, n)
        starts = sorted({k * (n - size) // (PROBES - 1) for k in range(PROBES)})
        self.ask_for(np.array(starts), size)
        digest = hashlib.blake2b(digest_size=16)
        for start in starts:
            digest.update(self.tokens[start : start + size].astype("<i8").tobytes())
        return digest.hexdigest()

    def check_token_range(self, vocab_size: int, limit: int = SCAN_LIMIT) -> TokenRange:
        """Every token lies in [0, vocab_size): UserError naming file and position of the first that does not.

        Reads at most `limit` bytes: a larger file is sampled evenly, and the result says so.
        """
        smallest, largest, checked = vocab_size, 0, 0
        for start, tokens in self.blocks(limit):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                raise self.outside(start + int(np.argmax((tokens < 0) | (tokens >= vocab_size))), vocab_size)
            smallest, largest, checked = min(smallest, low), max(largest, high), checked + len(tokens)
        if self._mapping is not None:
            forget(self._mapping[0])
        return TokenRange(smallest, largest, checked, self.n_tokens)

    def outside(self, at: int, vocab_size: int) -> UserError:
        """What is said of a token that does not lie in [0, vocab_size)."""
        return UserError(
            f"{self.file} holds token {self.tokens[at]} at position {at}, outside the vocabulary (--vocab_size {vocab_size}); "
            "set the vocab_size of the tokenizer that made the file"
        )
