"""Shuffling more documents than memory holds, and drawing some of them.

Every document has a random key, a function of the seed and its number in the input; sorting by key shuffles. What is too large to be
sorted in memory is first dealt out to 64 files by the leading bits of the key, and each of them is sorted in turn. A document that is
itself too large stays where it is, and an empty one is sorted in its place. So the order depends on nothing but the seed and the number of
documents, and memory is bounded for any number of them, of any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FAN_BITS = 6  # 64 files
LEAF = 192 << 20  # bytes of tokens that are sorted in memory
BLOCK = 32 << 20  # bytes of tokens read and dealt out at once; a document that has more is a Long
PORTION = 4 << 20  # bytes of sorted tokens, or tokens of a file, given out at once


def keys(numbers: np.ndarray, *seeds: int) -> np.ndarray:
    """Distinct random keys [n] uint64 of the documents with these numbers: SplitMix64 (Steele, Lea, Flood 2014), started by the seeds."""

    def mix(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            x = x + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return x ^ (x >> np.uint64(31))

    start = np.zeros(1, dtype=np.uint64)
    for seed in seeds:
        start = mix(start ^ np.uint64(seed))
    return mix(np.asarray(numbers).astype(np.uint64) ^ start)


@dataclass(frozen=True)
class Documents:
    """Tokens one document after the other, their sizes [n] int32, and their numbers in the input [n] int64."""

    tokens: np.ndarray
    sizes: np.ndarray
    numbers: np.ndarray

    def take(self, which: np.ndarray) -> Documents:
        """The documents with these indices, in this order."""
        return self._scattered.take(which)

    @cached_property
    def _scattered(self) -> Scattered:
        return Scattered([self.tokens], self.sizes, self.numbers)


@dataclass(frozen=True)
class Scattered:
    """Documents whose tokens lie in several arrays, none in two of them: to join these would be to write everything once more."""

    tokens: list[np.ndarray]
    sizes: np.ndarray
    numbers: np.ndarray

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """In which array each document lies, and where it starts there, in bytes."""
        itemsize = self.tokens[0].dtype.itemsize
        begins = np.cumsum([0, *(part.nbytes for part in self.tokens)])
        starts = (np.cumsum(self.sizes, dtype=np.int64) - self.sizes) * itemsize
        lies_in = np.minimum(np.searchsorted(begins, starts, side="right") - 1, len(self.tokens) - 1)  # an empty one lies anywhere
        return lies_in, starts - begins[lies_in]

    def take(self, which: np.ndarray) -> Documents:
        """The documents with these indices, in this order."""
        lies_in, starts = (column[which] for column in self._spans)
        ends = starts + self.sizes[which].astype(np.int64) * self.tokens[0].dtype.itemsize
        raw = [memoryview(part).cast("B") for part in self.tokens]
        data = b"".join([raw[k][a:b] for k, a, b in zip(lies_in.tolist(), starts.tolist(), ends.tolist())])
        return Documents(np.frombuffer(data, self.tokens[0].dtype), self.sizes[which], self.numbers[which])


@dataclass(frozen=True)
class Long:
    """A document too large to be held: `size` tokens from token `first` of a file."""

    file: Path
    dtype: np.dtype
    first: int
    size: int
    number: int

    @property
    def numbers(self) -> np.ndarray:
        return np.array([self.number])

    def parts(self) -> Iterator[np.ndarray]:
        """Its tokens, some at a time."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.first * self.dtype.itemsize)
            for at in range(0, self.size, PORTION):
                yield np.fromfile(file, self.dtype, min(PORTION, self.size - at))


class Pile:
    """Documents on disk: {path}.tokens, {path}.sizes and, unless their numbers are 0, 1, 2, ..., {path}.numbers.

    The last of them, up to `memory` bytes of tokens, may still be in memory, so that small data need no files.
    """

    def __init__(self, path: Path, dtype: np.dtype, numbered: bool = True, memory: int = 0) -> None:
        self.dtype, self._memory = np.dtype(dtype), memory
        self._recent: list[Documents] = []
        self._recent_bytes = 0
        self.paths = [path.with_name(path.name + suffix) for suffix in (".tokens", ".sizes", ".numbers")[: 2 + numbered]]

    def append(self, documents: Documents) -> None:
        self._recent.append(documents)
        self._recent_bytes += documents.tokens.nbytes
        if self._recent_bytes > self._memory:
            self.flush()

    def flush(self) -> None:
        """Everything onto the disk."""
        columns = ([getattr(d, name) for d in self._recent] for name in ("tokens", "sizes", "numbers"))
        for path, dtype, column in zip(self.paths, (self.dtype, "<i4", "<i8"), columns):
            with open(path, "ab", buffering=0) as file:
                for data in column:
                    view = memoryview(data.astype(dtype, copy=False)).cast("B")
                    while view:  # one call writes 2 GiB at most
                        view = view[file.write(view) :]
        self._recent, self._recent_bytes = [], 0

    def truncate(self, documents: int, tokens: int) -> None:
        """Forget what lies on the disk behind so many documents."""
        for path, size in zip(self.paths, (tokens * self.dtype.itemsize, documents * 4, documents * 8)):
            with open(path, "ab") as file:
                file.truncate(size)

    def remove(self) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)

    def n_bytes(self) -> int:
        """Of the tokens."""
        return self._recent_bytes + (self.paths[0].stat().st_size if self.paths[0].exists() else 0)

    def is_empty(self) -> bool:
        return not self._recent and not self.paths[1].exists()

    def sizes(self, block: int = 1 << 20) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(sizes, numbers) of up to `block` documents at a time."""
        first = 0
        if self.paths[1].exists():
            with ExitStack() as stack:
                files = [stack.enter_context(open(path, "rb")) for path in self.paths[1:]]
                while len(sizes := np.fromfile(files[0], "<i4", block)):
                    numbers = np.fromfile(files[1], "<i8", len(sizes)) if len(files) > 1 else np.arange(first, first + len(sizes))
                    first += len(sizes)
                    yield sizes, numbers
        for documents in self._recent:
            yield documents.sizes, documents.numbers

    def load(self) -> Scattered:
        """All of them at once."""
        sizes, numbers = (np.concatenate(column) for column in zip(*self.sizes()))
        tokens = [documents.tokens for documents in self._recent]
        complete = [int(documents.sizes.sum()) for documents in self._recent]
        if self.paths[0].exists():
            tokens.insert(0, np.fromfile(self.paths[0], self.dtype))
            complete.insert(0, int(sizes.sum(dtype=np.int64)) - sum(complete))
        parts, held, too_many = [], [], 0
        for some, n in zip(tokens, complete):  # a document that was appended in parts lies in several
            held.append(some)
            too_many += len(some) - n
            if not too_many:
                parts.append(held[0] if len(held) == 1 else np.concatenate(held))
                held = []
        return Scattered(parts, sizes, numbers)

    def blocks(self) -> Iterator[Documents | Long]:
        """All documents in order, up to BLOCK bytes of tokens at a time, or one larger document."""
        self.flush()
        limit, begin = BLOCK // self.dtype.itemsize, 0
        with open(self.paths[0], "rb", buffering=0) as file:
            for sizes, numbers in self.sizes():
                ends = np.cumsum(sizes, dtype=np.int64)
                first = done = 0
                while first < len(sizes):
                    last = max(first + 1, int(np.searchsorted(ends, done + limit, side="right")))
                    if (n := int(ends[last - 1]) - done) > limit:
                        yield Long(self.paths[0], self.dtype, begin, n, int(numbers[first]))
                        file.seek(n * self.dtype.itemsize, os.SEEK_CUR)
                    else:
                        yield Documents(np.fromfile(file, self.dtype, n), sizes[first:last], numbers[first:last])
                    first, done, begin = last, int(ends[last - 1]), begin + n


def shuffled(pile: Pile, seeds: tuple[int, int], keep: Callable[[np.ndarray], np.ndarray], scratch: Path) -> Iterator[Documents | Long]:
    """The documents of a pile whose numbers `keep` gives True for, in the order of their keys; files in the folder `scratch` come and go.

    No document is empty.
    """
    yield from _dealt(pile, seeds, keep, scratch, 0, {})


def _dealt(
    pile: Pile, seeds: tuple[int, int], keep: Callable[[np.ndarray], np.ndarray], scratch: Path, depth: int, longs: dict[int, Long]
) -> Iterator[Documents | Long]:
    """longs: the documents that lie elsewhere and have an empty one in their place here, by number."""
    if pile.n_bytes() <= LEAF or FAN_BITS * (depth + 1) > 64:
        yield from _sorted(pile, seeds, keep, longs)
        return
    piles = [Pile(scratch / f"pile-{depth}-{k}", pile.dtype) for k in range(1 << FAN_BITS)]
    for part in piles:
        part.remove()
    for documents in pile.blocks():
        if isinstance(documents, Long):
            longs[documents.number] = documents
            documents = Documents(np.zeros(0, pile.dtype), np.zeros(1, np.int32), documents.numbers)
        leading = keys(documents.numbers, *seeds) << np.uint64(FAN_BITS * depth) >> np.uint64(64 - FAN_BITS)
        leading[~keep(documents.numbers)] = len(piles)
        for k in range(len(piles)):
            if len(chosen := np.flatnonzero(leading == k)):
                piles[k].append(documents.take(chosen))
    for part in piles:
        if not part.is_empty():
            yield from _dealt(part, seeds, lambda numbers: np.ones(len(numbers), dtype=bool), scratch, depth + 1, longs)
            part.remove()


def _sorted(
    pile: Pile, seeds: tuple[int, int], keep: Callable[[np.ndarray], np.ndarray], longs: dict[int, Long]
) -> Iterator[Documents | Long]:
    everything = pile.load()
    order = np.argsort(keys(everything.numbers, *seeds), kind="stable")
    order = order[keep(everything.numbers[order])]
    portions = np.cumsum(everything.sizes[order], dtype=np.int64) * pile.dtype.itemsize // PORTION
    for chosen in np.split(order, np.flatnonzero(np.diff(portions)) + 1):
        first = 0
        for at in np.flatnonzero(everything.sizes[chosen] == 0):  # where a Long has its place
            if first < at:
                yield everything.take(chosen[first:at])
            yield longs[int(everything.numbers[chosen[at]])]
            first = at + 1
        if first < len(chosen):
            yield everything.take(chosen[first:])


def draw(blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], share: float, seed: int) -> tuple[int, int]:
    """(largest key of the documents drawn, how many they are): those with the smallest keys, until they are enough.

    share: below 1 the part of all tokens that they have at least, from 1 on their number. blocks: gives (sizes,
    numbers) of all documents, some at a time, as Pile.sizes does. Memory does not depend on the number of documents:
    the first pass counts them by the leading 16 bits of their keys, which says in which of these cells the last one
    drawn lies, and the second one sorts the keys of this cell alone.
    """
    weighed = share < 1
    histogram, total = np.zeros(1 << 16), 0
    for sizes, numbers in blocks():
        leading = (keys(numbers, seed) >> np.uint64(48)).astype(np.int64)
        histogram += np.bincount(leading, sizes if weighed else None, 1 << 16)
        total += int(sizes.sum()) if weighed else len(sizes)
    target = share * total if weighed else min(share, total)
    cell = int(np.searchsorted(np.cumsum(histogram), target))
    found, drawn = [], 0
    for sizes, numbers in blocks():
        all_keys = keys(numbers, seed)
        leading = (all_keys >> np.uint64(48)).astype(np.int64)
        drawn += int((leading < cell).sum())
        found.append((all_keys[leading == cell], sizes[leading == cell] if weighed else np.ones((leading == cell).sum())))
    cell_keys, weights = (np.concatenate(column) for column in zip(*found))
    order = np.argsort(cell_keys)
    last = min(int(np.searchsorted(histogram[:cell].sum() + np.cumsum(weights[order]), target)), len(order) - 1)
    return int(cell_keys[order[last]]), drawn + last + 1
