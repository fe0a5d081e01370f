"""What is in a binidx pair: counts, lengths, token range, whose tokens they probably are. Any size, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .binidx import BinIdx
from .tokenizer import END_OF_DOCUMENT, Tokenizer
from .tokens import SCAN_LIMIT

DOCUMENTS = 1 << 20  # looked at together
TOKENS = 1 << 22
PROBES = 20  # documents that are encoded again
PROBE_TOKENS = 2000
LONGEST_TOKEN = 128  # bytes of the World vocabulary's longest: so far a cut changes what comes before it

Say = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class Survey:
    """lengths: number of documents by bits of their size in tokens: lengths[k] have 2^(k-1) to 2^k - 1, lengths[0] none.

    whole: every token was looked at, otherwise evenly spread documents; `documents` and `tokens` count what was looked at.
    ended: documents whose last token is 0. inside: tokens 0 elsewhere.
    """

    whole: bool
    documents: int
    tokens: int
    smallest: int
    largest: int
    ended: int
    inside: int
    lengths: tuple[int, ...]
    shortest: int
    longest: int


def bounds(data: BinIdx, first: int, last: int) -> np.ndarray:
    """Position of the first token of each of the documents first to last - 1, then the end of the last, int64 [last - first + 1]."""
    index = data.index
    items = np.arange(first, last + 1) if len(index.doc_idx) == 1 else index.doc_idx[first : last + 1]
    n = len(index.pointers)
    return np.where(items == n, index.n_bytes, index.pointers[np.minimum(items, n - 1)]) // data.dtype.itemsize


def runs(data: BinIdx) -> Iterator[tuple[int, np.ndarray]]:
    """All documents in order, as runs of about TOKENS tokens: (first document, their bounds)."""
    for first in range(0, data.n_docs, DOCUMENTS):
        ends = bounds(data, first, min(first + DOCUMENTS, data.n_docs))
        at = 0
        while at < len(ends) - 1:
            to = max(at + 1, int(np.searchsorted(ends, ends[at] + TOKENS, side="right")) - 1)
            yield first + at, ends[at : to + 1]
            at = to


def _spread(data: BinIdx, limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """Some of the runs, evenly spread, about `limit` bytes in all; of a document that is longer than a run, its end."""
    n = max(1, limit // (TOKENS * data.dtype.itemsize))
    mean = max(1, data.n_tokens // data.n_docs)
    for k in range(n):
        first = k * data.n_docs // n
        last = min(data.n_docs, (k + 1) * data.n_docs // n, first + max(1, TOKENS // mean))
        if last > first:
            ends = bounds(data, first, last)
            ends = ends[: max(2, int(np.searchsorted(ends, ends[0] + TOKENS, side="right")))]
            ends[0] = max(ends[0], ends[1] - TOKENS)
            yield first, ends


def survey(data: BinIdx, limit: int | None = SCAN_LIMIT, progress: Say = lambda done, total: None) -> Survey:
    """Looks at all tokens up to `limit` bytes (None: at any number), else at evenly spread documents; sizes are always all counted."""
    whole = limit is None or data.tokens.nbytes <= limit
    documents = tokens = ended = zeros = largest = 0
    smallest = int(np.iinfo(data.dtype).max)
    for _, ends in runs(data) if whole else _spread(data, limit):
        block = data.tokens[ends[0] : ends[-1]]
        documents += len(ends) - 1
        tokens += len(block)
        if len(block):
            smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
            zeros += len(block) - int(np.count_nonzero(block))
            filled = ends[1:] > ends[:-1]
            ended += int((block[ends[1:][filled] - 1 - ends[0]] == END_OF_DOCUMENT).sum())
        progress(tokens, data.n_tokens)
    lengths, shortest, longest = np.zeros(64, dtype=np.int64), data.n_tokens, 0
    for first in range(0, data.n_docs, DOCUMENTS):
        sizes = np.diff(bounds(data, first, min(first + DOCUMENTS, data.n_docs)))
        lengths += np.bincount(np.frexp(sizes.astype(np.float64))[1], minlength=64)  # the exponent is the number of bits, exact up to 2^53
        shortest, longest = min(shortest, int(sizes.min())), max(longest, int(sizes.max()))
    used = tuple(lengths[: int(np.flatnonzero(lengths)[-1]) + 1].tolist())
    return Survey(whole, documents, tokens, smallest, largest, ended, zeros - ended, used, shortest, longest)


def same_again(data: BinIdx, tokenizer: Tokenizer) -> tuple[int, int]:
    """Of evenly spread documents, how many the tokenizer encodes again to the very tokens that stand there; and how many were tried.

    With greedy longest match, as the World tokenizer does it, text and tokens determine each other, so that all of its own documents
    come back; of another tokenizer's only those where no two neighbours could have been one token.
    """
    equal = tried = 0
    probes = min(PROBES, data.n_docs)
    for k in range(probes):
        document = data.doc(k * data.n_docs // probes)
        tokens = document[:PROBE_TOKENS].tolist()
        cut = len(tokens) < len(document)
        if not cut and tokens and tokens[-1] == END_OF_DOCUMENT:
            tokens = tokens[:-1]
        if tokens:
            sure = max(0, len(tokens) - LONGEST_TOKEN) if cut else None
            equal += tokenizer.encode(tokenizer.decode_bytes(tokens))[:sure] == tokens[:sure]
            tried += 1
    return equal, tried


def guess_tokenizer(data: BinIdx, seen: Survey, world: Tokenizer) -> str:
    """Whose tokens these are, and why, in a few words."""
    equal, tried = same_again(data, world)
    evidence = f"{equal} of {tried} documents come back from it unchanged"
    if tried and equal >= 0.9 * tried:
        return f"World (rwkv_vocab_v20230424): {evidence}"
    if seen.largest < 256:
        return f"bytes or characters: no id above {seen.largest}"
    fits = "; the ids would fit GPT-NeoX 20B (--vocab_size 50304)" if seen.largest < 50277 else ""
    return f"not World: {evidence}{fits}"
