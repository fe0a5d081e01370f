"""Documents to binidx: tokenise once, in the order of the input, into a file on disk; then write shuffled copies of the documents.

Blocks of text are parsed and tokenised by threads and taken back in order. Neither text nor tokens stay in memory, and nothing that
grows with the number of documents or the size of a .txt. The result depends on the inputs and the seed alone, not on threads,
interruptions or memory.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import UserError
from ..config.cgroups import cpus
from .binidx import INDEX_BYTES, MOST_TOKENS, BinIdxWriter, bin_path, check_prefix, check_room, idx_path
from .documents import STDIN, BadInput, Block, kind, parse, read_blocks, where
from .shuffle import Documents, Long, draw, keys, shuffled
from .tokenizer import END_OF_DOCUMENT, Texts, Tokenizer
from .unfinished import LISTED, Progress, Unfinished

ROUND_TRIPS = 200  # every so many-th document, or part of one, is decoded again and compared
FIRST = 40  # and before that so many documents
IN_WORK = 64 << 20  # bytes of blocks that are in work at a time, or one larger block
HELD_OUT = 0x76616C  # "val": the seed of the held-out documents, apart from every copy's


@dataclass(frozen=True)
class Packed:
    """What `pack` made; tokens count every copy, text_bytes counts the text once."""

    documents: int
    tokens: int
    val_documents: int
    val_tokens: int
    text_bytes: int
    bytes_per_token: float  # the end-of-document tokens are not counted
    lengths: tuple[tuple[int, int, int], ...]  # (fewest tokens, most tokens, documents of the input between them), by powers of two
    largest: int  # token id
    distinct: int  # token ids that occur
    dtype: str
    skipped: int  # bad inputs passed over
    first_skipped: tuple[str, ...]  # a line for each of the first of them
    order_hash: str  # SHA-256 of the numbers (int64) of the input's documents in the order of {prefix}.bin


@dataclass(frozen=True)
class Stage:
    """How far it is, for a line on the screen; `part` of the input's bytes, or of all copies' documents, from 0 to 1."""

    name: str  # "reading" or "writing"
    part: float
    documents: int
    text_bytes: int  # read by this process
    resumed: bool


def pack(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    epochs: int = 1,
    text_key: str = "text",
    val_split: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 0,
    progress: Callable[[Stage], None] = lambda stage: None,
) -> Packed:
    """Write {prefix}.bin/.idx: `epochs` copies of the documents of `files`, each copy shuffled anew, each document ended by token 0.

    val_split: below 1 the fraction of the tokens, from 1 on the number of documents, that is held out, whole documents drawn by the
    seed, in {prefix}.val.bin/.idx (once, in the order of the input). workers: threads; 0, one for each core. Raises UserError naming
    file, line and cause of the first bad input (with skip_bad: of none), or if a document does not come back from its tokens; then
    no output is made. A run that was killed, interrupted or stopped by bad input is taken up by the next call with the same inputs.
    """
    check_prefix(prefix)
    prefix = Path(prefix)
    val_prefix = prefix.with_name(prefix.name + ".val")
    _check_arguments(epochs, val_split, val_prefix)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    job = {"files": [_identity(path) for path in files], "text_key": text_key, "tokenizer": tokenizer.identity}
    if STDIN in files:
        job["process"] = os.getpid()  # what was read is gone: never taken up
    try:
        with Unfinished(prefix, job, dtype, tokenizer.vocab_size, STDIN not in files) as work, ExitStack() as stack:
            _tokenise(files, tokenizer, text_key, skip_bad, work, workers or cpus(), progress)
            total = work.progress.documents
            limit, held_out = draw(work.pile.sizes, val_split, seed ^ HELD_OUT << 32) if val_split else (0, 0)
            if held_out >= total:
                cure = (
                    "hold out fewer or give more data"
                    if total > 1
                    else "leave it out, or divide the text into several files or lines of .jsonl: a .txt is one document"
                )
                raise UserError(f"--val_split {val_split:g} would hold out all {total} document{'s' * (total != 1)}; {cure}")

            def kept(numbers: np.ndarray) -> np.ndarray:
                return keys(numbers, seed ^ HELD_OUT << 32) > np.uint64(limit) if held_out else np.ones(len(numbers), dtype=bool)

            # held-out documents included: an estimate, and one that sees COPIES and CTX_LEN in the wrong order
            check_room(prefix, epochs * (work.progress.tokens * dtype.itemsize + total * INDEX_BYTES))
            out = stack.enter_context(BinIdxWriter(prefix, dtype))
            val = stack.enter_context(BinIdxWriter(val_prefix, dtype)) if held_out else None
            if val:
                for documents in work.pile.blocks():
                    _write(val, documents, ~kept(documents.numbers))
            order = hashlib.sha256()
            for epoch in range(epochs):
                for documents in shuffled(work.pile, (seed, epoch), kept, work.folder):
                    _write(out, documents)
                    order.update(documents.numbers.astype("<i8"))
                    progress(Stage("writing", out.n_docs / (epochs * (total - held_out)), out.n_docs, 0, False))
            for writer in filter(None, (out, val)):
                writer.seal()  # a full disk shows here, before either pair is renamed
            lengths = _lengths(work)
    except OSError as error:
        goes_on = "free some space and the same command goes on, or " if prefix.with_name(prefix.name + ".unfinished").exists() else ""
        raise UserError(f"cannot write {prefix}.bin: {error.strerror or error}; {goes_on}choose another place with --out") from None
    done = work.progress
    return Packed(
        documents=out.n_docs,
        tokens=out.n_tokens,
        val_documents=val.n_docs if val else 0,
        val_tokens=val.n_tokens if val else 0,
        text_bytes=done.text_bytes,
        bytes_per_token=round(done.text_bytes / max(1, done.tokens - done.documents), 4),
        lengths=lengths,
        largest=int(np.flatnonzero(work.seen)[-1]),
        distinct=int(work.seen.sum()),
        dtype=dtype.name,
        skipped=done.skipped,
        first_skipped=tuple(done.first_skipped),
        order_hash=order.hexdigest(),
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


def _identity(path: Path) -> list:
    if path == STDIN:
        return ["-"]
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from None
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def _tokenise(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    text_key: str,
    skip_bad: bool,
    work: Unfinished,
    workers: int,
    progress: Callable[[Stage], None],
) -> None:
    """All documents of the files into work.pile, from where work.progress stands."""
    done = work.progress

    def refusal(bad: str) -> UserError:
        other = "iconv -t UTF-8 -f ENCODING converts other encodings; " if ": invalid UTF-8 at byte " in bad else ""
        return UserError(
            f"{bad} ({other}--skip_bad passes over such input{', and goes on where this one stopped' if work.saved() else ''})"
        )

    if done.skipped and not skip_bad:  # by the run that is taken up
        raise refusal(done.first_skipped[0])
    started, resumed = done.text_bytes + done.open_bytes, done.at > 0 or done.file > 0
    sizes = [0 if path == STDIN else path.stat().st_size for path in files]
    for number in range(done.file, len(files) if not done.complete else 0):
        blocks = read_blocks(files[number], text_key, done.at, done.line, tokenizer.largest_text)
        for found in _encoded(blocks, tokenizer, text_key, workers, bytes.fromhex(done.rest)):
            wrong = _bad(found, done)
            for bad in wrong:
                if not skip_bad:
                    raise refusal(str(bad))
                done.skipped += 1
                if done.skipped <= LISTED:
                    done.first_skipped.append(str(bad))
            if wrong and (done.open_parts or found.block.goes_on):
                work.drop_document()
                break  # a .txt is one document
            _check_round_trips(found, tokenizer, done.documents, done.open_parts)
            _add(work, found)
            done.at, done.line = found.block.after, found.block.next_line
            work.save()
            text_bytes = done.text_bytes + done.open_bytes - started
            progress(
                Stage("reading", (sum(sizes[:number]) + found.block.consumed) / max(1, sum(sizes)), done.documents, text_bytes, resumed)
            )
        if _identity(files[number]) != work.job["files"][number]:
            raise UserError(
                f"input {files[number]} has been written to while it was read: "
                "what is in it now may be missing; start again when it is complete"
            )
        done.file, done.at, done.line = number + 1, 0, 1
    if not done.documents:
        raise UserError(
            f"no document in {', '.join(where(path, 0) for path in files)}"
            + (f" ({done.skipped} bad ones skipped)" if done.skipped else "")
        )
    done.complete = True
    work.save()


@dataclass(frozen=True)
class _Encoded:
    """What is in a block.

    ids: of its documents, each with its end in `ends`; occurs: which ids there are, bool [vocab_size]; rest: bytes left to
    the next block; blank: whether it is of a .txt and has no text.
    """

    block: Block
    texts: Texts
    lines: Sequence[int]
    bad: list[BadInput]
    ids: np.ndarray
    ends: np.ndarray
    occurs: np.ndarray
    rest: bytes
    blank: bool


def _encoded(blocks: Iterator[Block], tokenizer: Tokenizer, text_key: str, workers: int, rest: bytes) -> Iterator[_Encoded]:
    """The blocks in their order; a few are in work at a time. rest: what the block before the first has left."""

    def encode(block: Block, before: Future[_Encoded] | None) -> _Encoded:
        parsed = parse(block, text_key)
        texts = parsed.texts
        # No deadlock: the pool begins in order, so that what is waited for has begun.
        if len(texts) and (left := before.result().rest if before else rest):
            texts = Texts.join([left + texts.data.tobytes()])
        ids, ends = tokenizer.encode_batch(texts)
        left = b""
        if block.goes_on and len(texts):
            n, n_bytes = tokenizer.settled(ids[:-1], len(texts.data))
            left = texts.data[n_bytes:].tobytes()
            ids, ends, texts = ids[:n], np.array([n]), Texts(texts.data[:n_bytes], np.array([n_bytes]))
        blank = kind(block.file) == ".txt" and not any(text.strip() for text in parsed.texts)
        return _Encoded(replace(block, data=b""), texts, parsed.lines, parsed.bad, ids, ends, tokenizer.occurring(ids), left, blank)

    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[int, Future[_Encoded]]] = deque()
        before, held = None, 0
        for block in blocks:
            size = block.size
            while pending and (len(pending) > 2 * workers or held + size > IN_WORK):
                held -= pending[0][0]
                yield pending.popleft()[1].result()
            pending.append((size, pool.submit(encode, block, before)))
            before, held = pending[-1][1] if block.goes_on else None, held + size
            del block
        while pending:
            yield pending.popleft()[1].result()


def _bad(found: _Encoded, done: Progress) -> list[BadInput]:
    """What is bad in a block, or in the document that it is a part of."""
    block = found.block
    if found.bad or not (block.goes_on or done.open_parts):
        return found.bad
    if done.open_tokens + len(found.ids) > MOST_TOKENS:
        return [
            BadInput(
                block.file,
                0,
                f"a .txt is one document, and this one has more than {MOST_TOKENS} tokens, the most that an index can count; split it",
            )
        ]
    if not block.goes_on and done.open_blank and found.blank:
        return [BadInput(block.file, 0, "the file is empty")]
    return []


def _check_round_trips(found: _Encoded, tokenizer: Tokenizer, documents: int, parts: int) -> None:
    """Documents, or parts of one, chosen by their number, and all that seem to end before their end, must come back from their tokens."""
    zeros = np.flatnonzero(found.ids == END_OF_DOCUMENT)
    inside = (
        set()
        if len(zeros) <= len(found.ends)
        else set(np.searchsorted(found.ends, np.setdiff1d(zeros, found.ends - 1), side="right").tolist())
    )
    for k in range(len(found.ends)):
        number = parts or documents + k
        if number % ROUND_TRIPS and (parts or number >= FIRST) and k not in inside:
            continue
        place = where(found.block.file, int(found.lines[k]))
        if k in inside and not tokenizer.zero_is_kept:
            raise UserError(
                f"{place}: the tokenizer makes token {END_OF_DOCUMENT}, which ends a document, of a part of the text; "
                "use one that keeps it for that (--tokenizer world)"
            )
        ids = found.ids[found.ends[k - 1] if k else 0 : found.ends[k] - (not found.block.goes_on)]
        if not tokenizer.comes_back(found.texts[k], ids):
            raise UserError(
                f"{place}: the text does not come back from its tokens; use a tokenizer that keeps all text (--tokenizer world)"
            )


def _add(work: Unfinished, found: _Encoded) -> None:
    """What has been found in a block, to the rest."""
    done, block = work.progress, found.block
    if not block.goes_on and not done.open_parts:
        work.add(found.ids, np.diff(found.ends, prepend=0), found.occurs)
        done.text_bytes += len(found.texts.data)
        return
    work.add_part(found.ids, found.occurs, len(found.texts.data), found.blank, found.rest)
    if not block.goes_on:
        work.end_document()


def _write(writer: BinIdxWriter, documents: Documents | Long, chosen: np.ndarray | None = None) -> None:
    """All of them, or the chosen ones [n] bool."""
    if isinstance(documents, Long):
        if chosen is None or chosen[0]:
            writer.add_long(documents.parts())
    else:
        documents = documents if chosen is None else documents.take(np.flatnonzero(chosen))
        writer.add_many(documents.tokens, documents.sizes)


def _lengths(work: Unfinished) -> tuple[tuple[int, int, int], ...]:
    counts = np.zeros(32, dtype=np.int64)
    for sizes, _ in work.pile.sizes():
        counts += np.bincount(np.frexp(sizes.astype(np.float64))[1] - 1, minlength=32)
    return tuple((1 << k, (2 << k) - 1, int(n)) for k, n in enumerate(counts) if n)
