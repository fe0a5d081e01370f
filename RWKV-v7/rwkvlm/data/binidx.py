"""Token files in Megatron's memory-mapped "binidx" format, as all RWKV tools exchange them.

    {prefix}.bin   the tokens, little-endian, nothing else
    {prefix}.idx   magic (9 bytes), version u64 = 1, dtype code u8, number of items u64, number of doc_idx entries u64,
                   then sizes (i32, in tokens), pointers (i64, in bytes), doc_idx (i64: first item of each document, then
                   the number of items). The header is 34 bytes long, so the arrays are unaligned.

RWKV's own tools make every item one document, ended by token 0; Megatron's may put several items into a document.
Source: RWKV-LM, RWKV-v7/train_temp/src/binidx.py, and Megatron-LM's indexed_dataset.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..config import UserError
from ..config.locks import try_lock
from ..config.volume import volume
from .tokens import Tokens, forget, refuse_if_cut

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are float64 officially: not tokens
INDEX_BYTES = 20  # of the .idx for a document
MOST_TOKENS = (1 << 31) - 1  # of an item: its size has 31 bits
CODES = {np.dtype(name): code for code, name in DTYPES.items()}

BLOCK = 1 << 20  # entries looked at together, so that checks of any file run in bounded memory


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def check_prefix(out: str | Path) -> None:
    """UserError for an --out that is no prefix of a new pair."""
    if Path(out).name in ("", "..") or str(out).endswith("/"):
        raise UserError(f"--out {out} is a folder; add a name, for example {Path(out) / 'demo'}")
    if (suffix := Path(out).suffix) in (".bin", ".idx"):
        raise UserError(f"--out {out} is to be without {suffix}: .bin and .idx are put behind it")


def check_room(out: str | Path, n_bytes: int) -> None:
    """UserError if the disk that `out` is to lie on has less free than so many bytes."""
    folder = Path(out).parent
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise UserError(f"{out} needs {volume(n_bytes)} and {folder} has {volume(free)} free; free some space or choose another place")


class Index:
    """An .idx file, memory-mapped and checked. Raises UserError naming the file and the byte that is wrong.

    sizes    [n_items] int32, in tokens;  pointers [n_items] int64, in bytes
    doc_idx  [n_docs + 1] int64: document i is the items doc_idx[i] to doc_idx[i + 1] - 1; or only [0], as in files merged by
             older Megatron tools: then every item is a document
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = path.stat()
        n_bytes = self.status.st_size
        if n_bytes < HEADER.size:
            raise UserError(f"{path} is {n_bytes} bytes long, shorter than its {HEADER.size}-byte header; copy or make it again")
        with open(path, "rb") as file:
            magic, version, code, n_items, n_entries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise UserError(f"{path} is not a binidx index: at byte 0 stands {magic!r}, not {MAGIC!r}; copy or make it again")
        if version != 1:
            raise UserError(f"{path} has version {version} at byte 9; only version 1 is known; make it again")
        if code not in DTYPES:
            raise UserError(f"{path} has dtype code {code} at byte 17; tokens are integers: one of {sorted(DTYPES)}")
        expected = HEADER.size + 12 * n_items + 8 * n_entries
        if n_bytes != expected:
            raise UserError(
                f"{path} is {n_bytes} bytes long, but its header ({n_items} items, {n_entries} doc_idx entries) "
                f"means {expected}; copy or make it again"
            )
        if n_items == 0 or n_entries == 0:
            raise UserError(f"{path} lists {n_items} items and {n_entries} doc_idx entries; there is no document in it")
        self.dtype = np.dtype(DTYPES[code])
        raw = np.memmap(path, mode="r", dtype=np.uint8)
        self._at_pointers = HEADER.size + 4 * n_items
        self._at_doc_idx = HEADER.size + 12 * n_items
        self.sizes = np.frombuffer(raw, "<i4", n_items, HEADER.size)
        self.pointers = np.frombuffer(raw, "<i8", n_items, self._at_pointers)
        self.doc_idx = np.frombuffer(raw, "<i8", n_entries, self._at_doc_idx)
        self._check_items()
        self._check_documents()
        forget(raw.base)

    def _check_items(self) -> None:
        """Every item starts where the one before ends, the first at 0."""
        end = 0
        for first in range(0, len(self.sizes), BLOCK):
            sizes = self.sizes[first : first + BLOCK].astype(np.int64)
            if (sizes < 0).any():
                i = first + int(np.argmax(sizes < 0))
                raise UserError(f"{self.path} gives item {i} (byte {HEADER.size + 4 * i}) the size {self.sizes[i]}; make it again")
            ends = end + np.cumsum(sizes) * self.dtype.itemsize
            starts = ends - sizes * self.dtype.itemsize
            wrong = self.pointers[first : first + BLOCK] != starts
            if wrong.any():
                i = first + int(np.argmax(wrong))
                raise UserError(
                    f"{self.path} places item {i} at {self.pointers[i]} (byte {self._at_pointers + 8 * i}), "
                    f"but the item before it ends at {starts[i - first]}; make it again"
                )
            end = int(ends[-1])

    def _check_documents(self) -> None:
        """doc_idx rises from 0 to the number of items, or is [0] alone."""
        before = 0
        for first in range(0, len(self.doc_idx), BLOCK):
            entries = self.doc_idx[first : first + BLOCK]
            wrong = entries < np.concatenate(([before], entries[:-1]))
            if first == 0:
                wrong[0] = entries[0] != 0
            if wrong.any():
                i = first + int(np.argmax(wrong))
                at = self._at_doc_idx + 8 * i
                raise UserError(
                    f"{self.path} has doc_idx[{i}] = {self.doc_idx[i]} (byte {at}); it must start at 0 and never fall; make it again"
                )
            before = int(entries[-1])
        if len(self.doc_idx) > 1 and before != len(self.sizes):
            raise UserError(f"{self.path} ends its doc_idx with {before}, but lists {len(self.sizes)} items; make it again")

    @property
    def n_bytes(self) -> int:
        """Size of the .bin that belongs to it."""
        return int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize

    @property
    def n_docs(self) -> int:
        return len(self.doc_idx) - 1 or len(self.sizes)

    def span(self, i: int) -> tuple[int, int]:
        """First token of document i and the token after its last."""
        items = (i, i + 1) if len(self.doc_idx) == 1 else (int(self.doc_idx[i]), int(self.doc_idx[i + 1]))
        first, last = (int(self.pointers[k]) if k < len(self.pointers) else self.n_bytes for k in items)
        return first // self.dtype.itemsize, last // self.dtype.itemsize


def how_to_make(text: Path) -> tuple[str, Path]:
    """The command that makes a pair of a file of text, and the prefix of that pair."""
    prefix = text.with_name(text.name.partition(".")[0])
    return shlex.join(["python", "make_data.py", str(text), "1", "512", "--out", str(prefix)]), prefix


def _cure(given: Path) -> str:
    """What to give instead of a path that is no prefix of a pair."""
    if given.suffix in (".bin", ".idx") and os.path.isfile(idx_path(given.with_suffix(""))):
        return f"give {given.with_suffix('')}, without {given.suffix}"
    for there, missing in ((bin_path(given), idx_path(given)), (idx_path(given), bin_path(given))):
        if os.path.isfile(there):
            return f"{there} is there: copy {missing.name} from where that is from, or make both again"
    if os.path.isfile(given):
        command, prefix = how_to_make(given)
        return f"{given} is no such pair; {command} makes one of a .jsonl, .txt or .parquet: then give {prefix}"
    return "give the path without .bin/.idx of a pair made by make_data.py"


class BinIdx(Tokens):
    """A pair of files, memory-mapped and read-only; `prefix` is their path without .bin / .idx.

    Opening checks the index completely and the size of the .bin, in time proportional to the number of documents;
    token values are checked by `check_token_range`.
    Raises UserError naming the file and the position. `tokens` [n_tokens] of `dtype` is the flat .bin.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path = idx_path(prefix)
        self.bin_path = self.file = bin_path(prefix)
        for path in (self.idx_path, self.bin_path):
            if not os.path.isfile(path):  # nor is a name that is too long for one
                raise UserError(f"data file {path} does not exist; {_cure(Path(prefix))}")
        try:
            self.index = Index(self.idx_path)
            self.tokens = self._map()
        except OSError as error:
            raise UserError(f"data file {error.filename or self.prefix} cannot be read: {error.strerror or error}") from None

    def _map(self) -> np.ndarray:
        size, expected = self.bin_path.stat().st_size, self.index.n_bytes
        if size < expected:
            raise UserError(
                f"{self.bin_path} is truncated: {size} bytes, but {self.idx_path} points up to byte {expected}; copy or make it again"
            )
        if size > expected:
            raise UserError(
                f"{self.bin_path} is {size} bytes long, but {self.idx_path} ends at byte {expected}: "
                "the two files do not belong together; copy or make both again"
            )
        if size == 0:
            raise UserError(f"{self.bin_path} is empty; make it again from text")
        return np.memmap(self.bin_path, mode="r", dtype=self.dtype).view(np.ndarray)

    @property
    def dtype(self) -> np.dtype:
        return self.index.dtype

    @property
    def n_docs(self) -> int:
        return self.index.n_docs

    def document_starts(self, first: int, stop: int) -> list[int]:
        refuse_if_cut(self.idx_path, self.index.status)
        found, i = set(), bisect_left(range(self.n_docs), first, key=lambda i: self.index.span(i)[0])
        while i < self.n_docs and (start := self.index.span(i)[0]) < stop:
            found.add(start)  # once, where documents are empty
            i += 1
        return sorted(found)

    def doc(self, i: int) -> np.ndarray:
        """Tokens of document i (negative: from the end), a read-only view [size], its final 0 included."""
        if not -self.n_docs <= i < self.n_docs:
            raise IndexError(f"document {i} of {self.n_docs}")
        first, last = self.index.span(i % self.n_docs)
        return self.tokens[first:last]


class BinIdxWriter:
    """Writes {prefix}.bin and {prefix}.idx, one item per document, as a context manager.

    Everything goes to *.partial files; leaving the block without an exception renames both into place, with one removes
    them. An older .idx is removed before the new .bin appears, so at no moment can a reader see a mixed pair. UserError while
    another process writes the same pair.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type | str = np.uint16) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(f"binidx cannot hold dtype {dtype}")
        self.idx_path, self.bin_path = idx_path(prefix), bin_path(prefix)
        self._partial = [path.with_name(path.name + ".partial") for path in (self.bin_path, self.idx_path)]
        self.n_tokens = self.n_docs = 0
        self._files: list[BinaryIO] = []
        self._sealed = False
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._partial:
                path.touch()
                self._files.append(open(path, "r+b", buffering=1 << 20))
                # one that was put into its place before the lock was had is not there any more
                if not try_lock(self._files[-1]) or not path.exists() or not os.path.samefile(self._files[-1].fileno(), path):
                    raise UserError(f"another process is writing {self.bin_path}; wait for it, or choose another --out")
                self._files[-1].truncate()
            self._bin, self._idx = self._files
            self._idx.write(bytes(HEADER.size))
        except OSError as error:
            self._discard()
            raise UserError(f"cannot write {self.bin_path}: {error.strerror or error}; choose another place") from None

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document. ValueError if a token does not fit into the dtype."""
        given = np.asarray(tokens)
        data = given.astype(self.dtype, copy=False)
        if data is not given and not np.array_equal(given, data):
            raise ValueError(f"a token outside {self.dtype} (largest: {given.max()}, smallest: {given.min()})")
        self.add_long([data])

    def add_many(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents that stand one after the other in `tokens`, of the writer's dtype; sizes [documents] in tokens."""
        if tokens.dtype != self.dtype or len(tokens) != sizes.sum():
            raise ValueError(f"{len(tokens)} tokens of {tokens.dtype} for documents of {sizes.sum()} tokens in a file of {self.dtype}")
        self._bin.write(np.ascontiguousarray(tokens))
        self._idx.write(sizes.astype("<i4"))
        self.n_tokens += len(tokens)
        self.n_docs += len(sizes)

    def add_long(self, parts: Iterable[np.ndarray]) -> None:
        """Append one document that is not held in memory: its tokens in parts, of the writer's dtype."""
        size = 0
        for part in parts:
            if part.dtype != self.dtype:
                raise ValueError(f"tokens of {part.dtype} in a file of {self.dtype}")
            self._bin.write(np.ascontiguousarray(part))
            size += len(part)
        self._idx.write(size.to_bytes(4, "little", signed=True))
        self.n_tokens += size
        self.n_docs += 1

    def __enter__(self) -> BinIdxWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.seal()
                self.idx_path.unlink(missing_ok=True)
                for path in (self.bin_path, self.idx_path):
                    os.replace(self._partial[0], path)
                    del self._partial[0]
        finally:
            self._discard()

    def _discard(self) -> None:
        """Removes what is not in its place, and closes the files, which lets go of their locks."""
        for path in self._partial:
            with suppress(OSError):
                path.unlink()
        for file in self._files:
            with suppress(OSError):  # a full disk takes the last block no better now, and what was not sealed is to go
                file.close()

    def seal(self) -> None:
        """Complete both files on disk, so that only renaming is left; to be called before leaving several writers together."""
        if self._sealed:
            return
        idx, n, end = self._idx, self.n_docs, 0
        for first in range(0, n, BLOCK):
            idx.seek(HEADER.size + 4 * first)
            sizes = np.frombuffer(idx.read(4 * min(BLOCK, n - first)), "<i4").astype("<i8") * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            idx.seek(HEADER.size + 4 * n + 8 * first)
            idx.write((ends - sizes).astype("<i8"))
            end = int(ends[-1])
        idx.seek(HEADER.size + 12 * n)
        for first in range(0, n + 1, BLOCK):
            idx.write(np.arange(first, min(first + BLOCK, n + 1), dtype="<i8"))
        idx.seek(0)
        idx.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], n, n + 1))
        for file in (idx, self._bin):
            file.flush()
            os.fsync(file.fileno())
        self._sealed = True
