"""Binidx pairs out of binidx pairs: merged, divided. Streaming, and in place only when complete.

Which documents are drawn is a function of the seed and their number alone, so it is the same on every machine, and a document's fate
does not change when others are appended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ..config import UserError
from .binidx import INDEX_BYTES, MOST_TOKENS, BinIdx, BinIdxWriter, check_prefix, check_room
from .shuffle import draw, keys
from .survey import DOCUMENTS, TOKENS, Say, runs

ALL = 1 << 64  # keys lie below
COMPARED = 1 << 20  # about so many documents at most are kept in mind to find copies
LOOKED_AT = 16  # tokens of each


def merge(inputs: Sequence[tuple[str, float]], out: str, seed: int = 0, progress: Say = lambda done, total: None) -> BinIdx:
    """{out}.bin/.idx from the documents of the inputs (prefix, copies), one input after the other, in their order.

    copies: 2 writes all documents twice, 0.5 about half of them, drawn by the seed, 1.5 all and then half of them. Tokens are written as
    uint16 where all fit, so that int32 files shrink. UserError for a bad input, and when the disk is too small.
    """
    check_prefix(out)
    data = [(BinIdx(prefix), copies) for prefix, copies in inputs]
    for one, copies in data:
        if not 0 < copies < 1e6:
            raise UserError(f"{one.prefix} is to be written {copies:g} times; give a number above 0 and below a million")
        _not_itself(one, out)
    dtype = np.uint16 if all(_fits_16_bits(one) for one, _ in data) else np.int32
    expected = sum(int(one.n_tokens * copies) for one, copies in data)
    check_room(out, expected * np.dtype(dtype).itemsize + sum(int(one.n_docs * copies) for one, copies in data) * INDEX_BYTES)
    with _disk(out), BinIdxWriter(out, dtype) as writer:
        for k, (one, copies) in enumerate(data):
            for copy in range(int(np.ceil(copies))):
                share = min(1.0, copies - copy)
                for first, ends in runs(one):
                    _write(writer, one, ends, _keys(first, ends, seed, k) < int(share * ALL) if share < 1 else None)
                    progress(writer.n_tokens, expected)
        if not writer.n_tokens:
            raise UserError(f"no document was drawn for {out}; give more copies")
    return BinIdx(out)


def split(
    prefix: str,
    out: str,
    val: float,
    seed: int = 0,
    progress: Say = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[BinIdx, BinIdx]:
    """{out}.bin/.idx and {out}.val.bin/.idx: every document of the pair `prefix` goes to one of them, in order.

    val: below 1 the share of the documents that is held out, about; from 1 on their number, exactly. UserError if one part were empty.
    warn: told when many documents lie in both, since the pair holds copies.
    """
    check_prefix(out)
    data = BinIdx(prefix)
    if not 0 <= val < math.inf or (val >= 1 and val != int(val)):
        raise UserError(f"--val {val:g} must be a share of the documents, between 0 and 1, or a whole number of them")
    _not_itself(data, out)
    _not_itself(data, f"{out}.val")
    limit = int(val * ALL) if 0 < val < 1 else _limit(data.n_docs, int(val), seed)
    check_room(out, data.tokens.nbytes + data.n_docs * INDEX_BYTES)
    seen: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    with _disk(out), ExitStack() as stack:
        writers = [stack.enter_context(BinIdxWriter(name, data.dtype)) for name in (out, f"{out}.val")]
        for first, ends in runs(data):
            held_out = _keys(first, ends, seed) < limit
            _write(writers[0], data, ends, ~held_out)
            _write(writers[1], data, ends, held_out)
            prints = _prints(data, ends)
            some = prints % np.uint64(-(-data.n_docs // COMPARED)) == 0  # a document and its copies, or none of them
            for part, chosen in zip(seen, (~held_out, held_out)):
                part.append(prints[some & chosen])
            progress(int(ends[-1]), data.n_tokens)
        for writer, what in zip(writers, ("leaves nothing to train on", "holds nothing out")):
            if not writer.n_tokens:
                raise UserError(f"--val {val:g} {what} of the {data.n_docs} documents of {prefix}; choose another value")
        for writer in writers:
            writer.seal()  # a full disk shows here, before either pair is renamed
    trained, held = (np.concatenate(part) for part in seen)
    if (share := np.isin(held, trained).mean() if len(held) else 0.0) > 0.1:  # fewer are the repetitions of any text
        warn(
            f"{100 * share:.0f}% of the documents held out are in {out} too, as copies: "
            "the validation loss will be that of training data; hold out before copying, with make_data.py --val_split"
        )
    return BinIdx(out), BinIdx(f"{out}.val")


@contextmanager
def _disk(out: str) -> Iterator[None]:
    """A full disk is an error of one line, also where only the last block finds no room."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}.bin: {error.strerror or error}; free some space or choose another place") from None


def _write(writer: BinIdxWriter, data: BinIdx, ends: np.ndarray, chosen: np.ndarray | None) -> None:
    """The documents between `ends`: all, or the chosen ones."""
    sizes = np.diff(ends)
    if len(sizes) == 1 and sizes[0] > TOKENS:
        if chosen is None or chosen[0]:
            if sizes[0] > MOST_TOKENS:  # of several items, which become one
                raise UserError(
                    f"{data.prefix} has a document of {sizes[0]} tokens, and an index counts {MOST_TOKENS} of one at most; "
                    "make the pair again from shorter documents"
                )
            writer.add_long(_narrow(data, writer, data.tokens[at : min(at + TOKENS, ends[1])]) for at in range(ends[0], ends[1], TOKENS))
        return
    tokens = data.tokens[ends[0] : ends[-1]]
    if chosen is not None:
        tokens, sizes = tokens[np.repeat(chosen, sizes)], sizes[chosen]
    writer.add_many(_narrow(data, writer, tokens), sizes)


def _narrow(data: BinIdx, writer: BinIdxWriter, tokens: np.ndarray) -> np.ndarray:
    narrow = tokens.astype(writer.dtype, copy=False)
    if not np.can_cast(tokens.dtype, writer.dtype) and not np.array_equal(narrow, tokens):
        raise UserError(f"{data.bin_path} holds tokens that do not fit into {writer.dtype}: {tokens.min()} to {tokens.max()}")
    return narrow


def _keys(first: int, ends: np.ndarray, *seeds: int) -> np.ndarray:
    """Of the documents between `ends`, whose first has the number `first`."""
    return keys(np.arange(first, first + len(ends) - 1), *seeds)


def _prints(data: BinIdx, ends: np.ndarray) -> np.ndarray:
    """A number for each document, the same for copies: of its size and some of its tokens, evenly spread."""
    sizes = np.diff(ends)
    made = keys(sizes, 0)
    last = np.maximum(sizes - 1, 0)
    for k in range(LOOKED_AT):
        made = keys(
            made
            ^ np.where(sizes > 0, data.tokens[np.minimum(ends[:-1] + last * k // (LOOKED_AT - 1), data.n_tokens - 1)], 0).astype(np.uint64),
            k,
        )
    return made


def _limit(n_docs: int, n: int, seed: int) -> int:
    """So that exactly n of n_docs documents have a smaller key."""
    if not 1 <= n < n_docs:
        raise UserError(
            f"--val {n} of {n_docs} documents cannot be held out; give a share between 0 and 1, or a number from 1 to {n_docs - 1}"
        )

    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, n_docs, DOCUMENTS):
            numbers = np.arange(first, min(first + DOCUMENTS, n_docs))
            yield numbers, numbers  # sizes do not count

    return draw(documents, n, seed)[0] + 1


def _fits_16_bits(data: BinIdx) -> bool:
    if data.dtype.itemsize == 1 or data.dtype == np.uint16:
        return True
    return all(0 <= int(block.min()) and int(block.max()) < 1 << 16 for _, block in data.blocks())


def _not_itself(data: BinIdx, out: str) -> None:
    if Path(f"{out}.bin").resolve() == data.bin_path.resolve():
        raise UserError(f"--out {out} is one of the inputs; choose another name")
