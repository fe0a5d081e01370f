"""Documents out of files: .jsonl and .txt, either also .gz or .zst, .parquet, and JSON lines from standard input.

Reading has two halves. `read_blocks` cuts a file into blocks of about a mebibyte, in order, cheaply; `parse` finds the texts of a block,
and threads may do that for several blocks at once. What is bad is returned too, with file, line and cause.
"""

from __future__ import annotations

import ctypes
import glob
import gzip
import importlib.util
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from .. import native
from ..config import UserError
from .tokenizer import Texts, utf8

STDIN = Path("-")
PACKED = {".gz": None, ".zst": "zstandard"}  # the package that it needs
NOT_READ = {".xz": "unpack it first: unxz", ".bz2": "unpack it first: bunzip2", ".zip": "unpack it first: unzip"}
BLOCK = 1 << 20  # bytes
ROWS = 1024  # of a .parquet, in a block
LARGEST = (1 << 31) - 2  # bytes of a document: the index counts its tokens in 31 bits
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadInput:
    file: Path
    line: int  # 0: the file as a whole
    cause: str

    def __str__(self) -> str:
        return f"{where(self.file, self.line)}: {self.cause}"


@dataclass(frozen=True)
class Block:
    """A part of a file: whole JSON lines, a whole .txt, rows of a .parquet, or what is wrong with the file from here on."""

    file: Path
    line: int  # number of its first line, or row, from 1
    data: bytes | list[Any] | BadInput
    after: int  # where the next block starts: bytes of the unpacked file, or rows
    next_line: int = 1  # the number of its first line
    consumed: int = 0  # bytes of the file on disk, roughly


@dataclass(frozen=True)
class Parsed:
    """The texts of a block with the number of each one's line, and what is bad in it, both in the order of the file."""

    texts: Texts
    lines: Sequence[int]
    bad: list[BadInput] = field(default_factory=list)


def where(file: Path, line: int) -> str:
    name = "standard input" if file == STDIN else str(file)
    if not line:
        return name
    return f"{name}, {'row' if kind(file) == '.parquet' else 'line'} {line}"


def expand(inputs: Sequence[str]) -> list[Path]:
    """The files that names and glob patterns mean, in the order given, each pattern sorted. UserError for one that means none."""
    files: list[Path] = []
    for name in inputs:
        if name == str(STDIN) or Path(name).exists():
            found = [Path(name)]
        elif not (found := [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]):
            raise UserError(f"input {name} does not exist")
        files += found
    for path in files:
        if path == STDIN:
            continue
        if path.is_dir():
            raise UserError(f"input {path} is a folder; name files, for example '{path}/*.jsonl'")
        if path.suffix in NOT_READ:
            raise UserError(f"input {path}: {path.suffix} is not read; {NOT_READ[path.suffix]}")
        if kind(path) not in (".jsonl", ".txt", ".parquet") or (kind(path) == ".parquet" and path.suffix in PACKED):
            raise UserError(f"input {path}: its kind is not known; use .jsonl or .txt, also with .gz or .zst behind it, or .parquet")
        needs = PACKED.get(path.suffix) or ("pyarrow" if path.suffix == ".parquet" else None)
        if needs and importlib.util.find_spec(needs) is None:
            raise UserError(f"input {path} needs the package {needs}; run: pip install {needs}")
    if files.count(STDIN) > 1:
        raise UserError("standard input (-) can be read once only")
    return files


def kind(path: Path) -> str:
    """The suffix that says what is inside, without .gz or .zst."""
    if path == STDIN:
        return ".jsonl"
    return path.with_suffix("").suffix if path.suffix in PACKED else path.suffix


def read_blocks(path: Path, text_key: str = "text", start: int = 0, line: int = 1) -> Iterator[Block]:
    """The blocks of a file in order, from the one that begins at `start` with line `line`."""
    try:
        if kind(path) == ".parquet":
            yield from _rows(path, text_key, start)
            return
        with open(path if path != STDIN else sys.stdin.fileno(), "rb", buffering=BLOCK, closefd=path != STDIN) as raw:
            stream = _unpacked(path, raw)
            if start:
                _skip(stream, raw, start)
            if kind(path) == ".txt":
                yield from _whole(path, stream)
            else:
                yield from _line_blocks(path, stream, raw, start, line)
    except OSError as error:
        raise UserError(f"input {where(path, 0)} cannot be read: {error.strerror or error}") from None


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return _Zst(raw) if path.suffix == ".zst" else raw


class _Zst:
    """The unpacked bytes of a .zst; EOFError where it is cut or damaged (the package's own reader takes a cut file for a whole one)."""

    CHUNK = 1 << 15

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._unread, self._ready, self._begun = self._new(), b"", b"", False

    def read(self, size: int) -> bytes:
        parts, n = [self._ready], len(self._ready)
        while n < size:
            packed = self._unread or self._raw.read(self.CHUNK)
            if not packed:
                if self._begun:
                    raise EOFError("it ends too early")
                break
            try:
                parts.append(self._frame.decompress(packed))
            except self._error as error:
                raise EOFError(str(error)) from None
            n += len(parts[-1])
            self._begun = not self._frame.eof
            self._unread = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._new()
        data = b"".join(parts)
        self._ready = data[size:]
        return data[:size]


def _skip(stream: IO[bytes], raw: IO[bytes], size: int) -> None:
    if stream is raw:
        raw.seek(size)
        return
    while size and (skipped := len(stream.read(min(size, BLOCK)))):
        size -= skipped


def _line_blocks(path: Path, stream: IO[bytes], raw: IO[bytes], at: int, line: int) -> Iterator[Block]:
    kept: list[bytes] = []  # the beginning of a line
    empty, size = at == 0, 0

    def block(data: bytes) -> Block:
        nonlocal at, line, empty
        first, at, line = line, at + len(data), line + int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))  # bytes.count takes ten times as long
        empty = empty and (data.isspace() or data == BOM)
        return Block(path, first, data, at, line, 0 if path == STDIN else raw.tell())

    try:
        while chunk := stream.read(BLOCK):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                yield block(b"".join([*kept, chunk[:cut]]))
                kept, size = [], 0
            kept.append(chunk[cut:])
            size += len(chunk) - cut
            if size > LARGEST:
                yield Block(path, line, BadInput(path, line, "the line is longer than 2 GiB, and so is the rest of the file not read"), at)
                return
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Block(path, line, BadInput(path, line, f"the {path.suffix} file is damaged here: {error}"), at)
        return
    if size:
        yield block(b"".join(kept))
    if empty:
        yield Block(path, 0, BadInput(path, 0, "the file is empty" if path != STDIN else "there is nothing in it"), at)


def _whole(path: Path, stream: IO[bytes]) -> Iterator[Block]:
    parts, size = [], 0
    try:
        while size <= LARGEST and (chunk := stream.read(BLOCK)):
            parts.append(chunk)
            size += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Block(path, 1, BadInput(path, 0, f"the {path.suffix} file is damaged: {error}"), size)
        return
    if size > LARGEST:
        yield Block(path, 1, BadInput(path, 0, "a .txt is one document, and this one is larger than 2 GiB; split it"), size)
    else:
        yield Block(path, 1, b"".join(parts), size, consumed=size)


def _rows(path: Path, text_key: str, start: int) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names, n_rows = file.schema_arrow.names, file.metadata.num_rows
            if text_key not in names:
                cause = f"no column {text_key!r} (columns: {', '.join(names[:5]) or 'none'}); see --text_key"
                yield Block(path, 1, BadInput(path, 0, cause), 0)
                return
            row = 0
            for batch in file.iter_batches(ROWS, columns=[text_key]):
                first, row = row, row + len(batch)
                if first >= start:
                    yield Block(path, first + 1, batch.column(0).to_pylist(), row, row + 1, path.stat().st_size * row // n_rows)
            if row == 0:
                yield Block(path, 1, BadInput(path, 0, "the file is empty"), 0)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Block(path, 1, BadInput(path, 0, f"not a .parquet file that can be read: {' '.join(str(error).split())[:200]}"), 0)


def parse(block: Block, text_key: str = "text") -> Parsed:
    """The texts of a block: of JSON lines and rows the values of `text_key`, blank lines passed over."""
    data = block.data
    if isinstance(data, BadInput):
        return Parsed(Texts.join([]), [], [data])
    if isinstance(data, list):
        return _collect(block, ((block.line + k, value) for k, value in enumerate(data)), lambda value: _utf8_of(value, text_key))
    if block.line == 1:
        data = data.removeprefix(BOM)
    if kind(block.file) == ".txt":
        return _parse_whole(block.file, data)
    if (found := _parse_natively(data, text_key, block.next_line - block.line + 1)) is not None:
        texts, lines = found
        return Parsed(texts, block.line + lines)
    numbered = ((block.line + k, line.strip()) for k, line in enumerate(data.split(b"\n")))
    return _collect(block, ((number, line) for number, line in numbered if line), lambda line: _text_of(line, text_key))


def _collect(block: Block, values: Iterator[tuple[int, Any]], text_of: Any) -> Parsed:
    texts, lines, bad = [], [], []
    for number, value in values:
        try:
            texts.append(text_of(value))
            lines.append(number)
        except UserError as error:
            bad.append(BadInput(block.file, number, str(error)))
    return Parsed(Texts.join(texts), lines, bad)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = native.library("tokenizer")
    except native.NativeBuildError:
        return None  # the tokenizer has said so
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.rwkvlm_jsonl_texts.restype = count
    library.rwkvlm_jsonl_texts.argtypes = [pointer, count, pointer, count, pointer, pointer, pointer]
    return library


def _parse_natively(data: bytes, text_key: str, n_lines: int) -> tuple[Texts, np.ndarray] | None:
    """(texts, number of each one's line from 0) if every line is in perfect order, else None: the slow parser says what is wrong."""
    library, key = _library(), text_key.encode("utf-8", "surrogatepass")
    if library is None:
        return None
    text = np.empty(len(data), dtype=np.uint8)
    ends, lines = np.empty((2, n_lines), dtype=np.int64)
    n = library.rwkvlm_jsonl_texts(data, len(data), key, len(key), text.ctypes.data, ends.ctypes.data, lines.ctypes.data)
    if n < 0:
        return None
    return Texts(text[: ends[n - 1] if n else 0], ends[:n]), lines[:n]


def _text_of(line: bytes, text_key: str) -> bytes:
    """The text in a line of JSON, in UTF-8; UserError with the cause where there is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's json decides: it accepts NaN and infinities, as the official tool does, and says better what is wrong
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"invalid UTF-8 at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
            raise UserError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise UserError(f"no key {text_key!r} (keys: {', '.join(list(record)[:5]) or 'none'}); see --text_key")
    return _utf8_of(record[text_key], text_key)


def _utf8_of(value: Any, text_key: str) -> bytes:
    if not isinstance(value, str):
        raise UserError(f"the value of {text_key!r} is {type(value).__name__}, not text")
    return utf8(value)


def _parse_whole(path: Path, data: bytes) -> Parsed:
    bad = None
    if not data.strip():
        bad = BadInput(path, 0, "the file is empty")
    else:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = BadInput(path, data.count(b"\n", 0, error.start) + 1, f"invalid UTF-8 at byte {error.start} of the file")
    return Parsed(Texts.join([]), [], [bad]) if bad else Parsed(Texts.join([data]), [1])
