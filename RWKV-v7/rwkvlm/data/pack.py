"""Documents to binidx: tokenise once into a scratch file, then write shuffled copies of the documents from there.

What stays in memory is a few bytes per document; the text never does. The result depends on the inputs and the seed alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import UserError
from .binidx import BinIdxWriter, bin_path, idx_path
from .documents import Document, read_documents
from .tokenizer import END_OF_DOCUMENT, Tokenizer

ROUND_TRIPS = 200  # the first so many documents are decoded again and compared, and later every so many-th


@dataclass(frozen=True)
class Packed:
    """What `pack` made; tokens count every copy, text_bytes counts the text once."""

    documents: int
    tokens: int
    val_documents: int
    val_tokens: int
    text_bytes: int
    largest: int  # token id
    distinct: int  # token ids that occur
    dtype: np.dtype
    skipped: tuple[str, ...]  # the bad inputs passed over, one line each


def pack(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    epochs: int = 1,
    text_key: str = "text",
    val_split: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] = lambda documents, text_bytes: None,
) -> Packed:
    """Write {prefix}.bin/.idx: `epochs` copies of the documents of `files`, each copy shuffled anew, each document ended by token 0.

    val_split: below 1 the fraction of the tokens, from 1 on the number of documents, that is held out, whole documents drawn by the
    seed, in {prefix}.val.bin/.idx (once, in the order of the input). Raises UserError naming file, line and cause of the first
    bad input (with skip_bad: of none), or if a document does not come back from its tokens; then no output is made.
    """
    prefix = Path(prefix)
    if not prefix.name:
        raise UserError(f"--out {prefix} is a folder; add a name, for example {prefix / 'demo'}")
    val_prefix = prefix.with_name(prefix.name + ".val")
    _check_arguments(epochs, val_split, val_prefix)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    try:
        with ExitStack() as stack:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            scratch = _Scratch(prefix.with_name(prefix.name + ".tokens.partial"), dtype, tokenizer.vocab_size)
            stack.callback(scratch.close)
            skipped, text_bytes = _tokenise(files, tokenizer, text_key, skip_bad, scratch, progress)
            tokens, ends = scratch.map()
            starts = np.concatenate(([0], ends[:-1]))
            held_out = _held_out(ends - starts, val_split, seed)
            kept = np.setdiff1d(np.arange(len(ends)), held_out, assume_unique=True)
            out = stack.enter_context(BinIdxWriter(prefix, dtype))
            val = stack.enter_context(BinIdxWriter(val_prefix, dtype)) if len(held_out) else None
            for i in held_out:
                val.add(tokens[starts[i] : ends[i]])
            for epoch in range(epochs):
                for i in kept[np.random.RandomState([seed, epoch]).permutation(len(kept))]:
                    out.add(tokens[starts[i] : ends[i]])
            for writer in filter(None, (out, val)):
                writer.seal()  # a full disk shows here, before either pair is renamed
    except OSError as error:
        raise UserError(f"cannot write {prefix}.bin: {error.strerror or error}; choose another place with --out") from None
    return Packed(
        documents=out.n_docs,
        tokens=out.n_tokens,
        val_documents=val.n_docs if val else 0,
        val_tokens=val.n_tokens if val else 0,
        text_bytes=text_bytes,
        largest=int(np.flatnonzero(scratch.seen)[-1]),
        distinct=int(scratch.seen.sum()),
        dtype=dtype,
        skipped=tuple(skipped),
    )


def _check_arguments(epochs: int, val_split: float, val_prefix: Path) -> None:
    if epochs < 1:
        raise UserError(f"number of copies {epochs} must be at least 1")
    if not 0 <= val_split < math.inf or (val_split >= 1 and val_split != int(val_split)):
        raise UserError(f"--val_split {val_split} must be a fraction of the tokens below 1, or a whole number of documents")
    if not val_split:
        for path in (idx_path(val_prefix), bin_path(val_prefix)):
            if path.exists():
                # training would take it for held-out data of this corpus, and its documents would be in both
                raise UserError(f"{path} is left from an earlier run; remove it, or hold out documents again with --val_split")


class _Scratch:
    """Tokens of all documents in the order of the input, in a file that goes away."""

    def __init__(self, path: Path, dtype: np.dtype, vocab_size: int) -> None:
        self._path, self._dtype = path, dtype
        self._file = open(path, "wb", buffering=1 << 20)
        self._ends = array("q")
        self._n = 0
        self.seen = np.zeros(vocab_size, dtype=bool)

    def add(self, ids: list[int]) -> None:
        tokens = np.array([*ids, END_OF_DOCUMENT], dtype=self._dtype)
        self.seen[tokens] = True
        self._file.write(tokens)
        self._n += len(tokens)
        self._ends.append(self._n)

    def __len__(self) -> int:
        return len(self._ends)

    def map(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n], memory-mapped, and where each document ends in them [documents]."""
        self._file.flush()
        return np.memmap(self._path, mode="r", dtype=self._dtype).view(np.ndarray), np.frombuffer(self._ends, dtype=np.int64)

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _tokenise(
    files: Sequence[Path], tokenizer: Tokenizer, text_key: str, skip_bad: bool, scratch: _Scratch, progress: Callable[[int, int], None]
) -> tuple[list[str], int]:
    skipped, text_bytes = [], 0
    for document in _good_documents(files, text_key, skip_bad, skipped):
        try:
            ids = tokenizer.encode(document.text)
        except UserError as error:
            _bad(f"{document.where()}: {error}", skip_bad, skipped)
            continue
        if (len(scratch) < ROUND_TRIPS or len(scratch) % ROUND_TRIPS == 0) and tokenizer.decode(ids) != document.text:
            raise UserError(f"{document.where()}: the text does not come back from its tokens; use a tokenizer that keeps all text (--tokenizer world)")
        scratch.add(ids)
        text_bytes += len(document.text.encode("utf-8"))
        progress(len(scratch), text_bytes)
    if not len(scratch):
        raise UserError(f"no document in {', '.join(map(str, files))}" + (f" ({len(skipped)} bad ones skipped)" if skipped else ""))
    return skipped, text_bytes


def _good_documents(files: Sequence[Path], text_key: str, skip_bad: bool, skipped: list[str]) -> Iterator[Document]:
    for path in files:
        for document in read_documents(path, text_key):
            if isinstance(document, Document):
                yield document
            else:
                _bad(str(document), skip_bad, skipped)


def _bad(line: str, skip_bad: bool, skipped: list[str]) -> None:
    if not skip_bad:
        raise UserError(f"{line} (--skip_bad passes over such input)")
    skipped.append(line)


def _held_out(sizes: np.ndarray, val_split: float, seed: int) -> np.ndarray:
    """The documents to hold out, in increasing order; UserError if none would be left for training."""
    if not val_split:
        return np.zeros(0, dtype=np.int64)
    drawn = np.random.RandomState([seed, 0x76616C]).permutation(len(sizes))  # "val": apart from every epoch's seed
    n = int(val_split) if val_split >= 1 else int(np.searchsorted(np.cumsum(sizes[drawn]), val_split * sizes.sum())) + 1
    if n >= len(sizes):
        raise UserError(f"--val_split {val_split:g} would hold out all {len(sizes)} documents; hold out fewer or give more data")
    return np.sort(drawn[:n])
