"""Documents out of files: .jsonl and .txt, either also .gz or .zst, .parquet, and JSON lines from standard input.

Reading has two halves. `read_blocks` cuts a file into blocks of about a mebibyte, in order, cheaply; `parse` finds the texts of a block,
and threads may do that for several blocks at once. What is bad is returned too, with file, line and cause. A .txt comes in parts and may
have any size; a line of JSON and a row of a table are held whole, and so are limited (LONGEST).
"""

from __future__ import annotations

import ctypes
import glob
import gzip
import importlib.util
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from .. import native
from ..config import UserError
from ..config.errors import pip_install
from .parquet import Damage, read_rows
from .tokenizer import Texts, utf8

STDIN = Path("-")
KINDS = (".jsonl", ".txt", ".parquet")
PACKED = {".gz": None, ".zst": "zstandard"}  # the package that it needs
NOT_READ = {
    ".xz": "unpack it first: unxz",
    ".bz2": "unpack it first: bunzip2",
    ".zip": "unpack it first: unzip",
    ".json": "make a .jsonl of it first, one object a line; of a list: jq -c '.[]'",
}
BLOCK = 1 << 20  # bytes
LONGEST = 64 << 20  # bytes of a line of JSON or a text in a row: the slow parser holds it about ten times over
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
    """A part of a file: whole JSON lines, whole characters of a .txt, rows of a .parquet, or what is wrong with the file here."""

    file: Path
    line: int  # number of its first line, or row, from 1
    data: bytes | list[bytes | None] | BadInput
    after: int  # where the next block starts: bytes of the unpacked file, or rows
    next_line: int = 1  # the number of its first line
    consumed: int = 0  # bytes of the file on disk, roughly
    goes_on: bool = False  # its document does, in the next block

    @property
    def size(self) -> int:
        """Bytes of its data, roughly."""
        if isinstance(self.data, list):
            return sum(len(value or b"") for value in self.data)
        return 0 if isinstance(self.data, BadInput) else len(self.data)


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
        if not path.is_file():
            raise UserError(f"input {path} is not a file but a pipe or a device; give JSON lines from a pipe as standard input (-)")
        if path.suffix in NOT_READ:
            raise UserError(f"input {path}: {path.suffix} is not read; {NOT_READ[path.suffix]}")
        if kind(path) not in KINDS or (kind(path) == ".parquet" and path.suffix in PACKED):
            raise UserError(f"input {path}: its kind is not known; use .jsonl or .txt, also with .gz or .zst behind it, or .parquet")
        needs = PACKED.get(path.suffix) or ("pyarrow" if path.suffix == ".parquet" else None)
        if needs and importlib.util.find_spec(needs) is None:
            raise UserError(f"input {path} needs the package {needs}; run: {pip_install(needs)}")
    named = set()
    for path in files:
        if (file := path.resolve()) in named:
            raise UserError(
                f"input {path} is named twice; "
                "name it once (COPIES repeats all documents, `python -m rwkvlm data merge a:2 b` those of some files)"
            )
        named.add(file)
    return files


def kind(path: Path) -> str:
    """The suffix that says what is inside, without .gz or .zst."""
    if path == STDIN:
        return ".jsonl"
    return path.with_suffix("").suffix if path.suffix in PACKED else path.suffix


def read_blocks(path: Path, text_key: str = "text", start: int = 0, line: int = 1, whole: int = 0) -> Iterator[Block]:
    """The blocks of a file in order, from the one that begins at `start` with line `line`.

    whole: a .txt comes in one block, and is bad if it has more bytes than that; 0: in parts, of any size.
    """
    try:
        if kind(path) == ".parquet":
            yield from _rows(path, text_key, start)
            return
        with open(path if path != STDIN else sys.stdin.fileno(), "rb", buffering=BLOCK, closefd=path != STDIN) as raw:
            stream = _unpacked(path, raw)
            if start:
                _skip(stream, raw, start)
            if kind(path) == ".txt":
                yield from _parts(path, stream, raw, start, line, whole)
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


def _count_lines(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))  # bytes.count takes ten times as long


def _line_blocks(path: Path, stream: IO[bytes], raw: IO[bytes], at: int, line: int) -> Iterator[Block]:
    kept: list[bytes] = []  # the beginning of a line
    size = 0  # of that beginning, kept or not
    empty = at == 0

    def block(data: bytes) -> Block:
        nonlocal at, line, empty
        first, at, line = line, at + len(data), line + _count_lines(data)
        empty = empty and (data.isspace() or data == BOM)
        return Block(path, first, data, at, line, 0 if path == STDIN else raw.tell())

    def too_long() -> Block:
        nonlocal at, line, empty
        bad = BadInput(
            path,
            line,
            f"the line is {size} bytes long, more than {LONGEST >> 20} MiB; "
            "put its text into a .txt file of its own, which may have any size",
        )
        at, line, empty = at + size, line + 1, False
        return Block(path, line - 1, bad, at, line, 0 if path == STDIN else raw.tell())

    try:
        while chunk := stream.read(BLOCK):
            cut = chunk.find(b"\n") + 1
            if size + (cut or len(chunk)) > LONGEST:
                kept, size = [], size + (cut or len(chunk))
                if not cut:
                    continue
                yield too_long()
                chunk, size = chunk[cut:], 0
            cut = chunk.rfind(b"\n") + 1
            if cut:
                data, kept, size = b"".join([*kept, memoryview(chunk)[:cut]]), [], 0
                yield block(data)
                data = b""  # not held while the next is read
            kept.append(chunk[cut:])
            size += len(chunk) - cut
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Block(path, line, BadInput(path, line, f"the {path.suffix} file is damaged here: {error}"), at)
        return
    if size > LONGEST:
        yield too_long()
    elif size:
        yield block(b"".join(kept))
    if empty:
        yield Block(path, 0, BadInput(path, 0, "the file is empty" if path != STDIN else "there is nothing in it"), at)


def _whole_characters(data: bytes) -> int:
    """How many bytes there are before a character that is cut at the end; all of them where none is."""
    for k in range(1, min(4, len(data) + 1)):
        if data[-k] >= 0xC0:  # begins a character of 2 bytes, or of 3 or 4
            return len(data) - k if k < 2 + (data[-k] >= 0xE0) + (data[-k] >= 0xF0) else len(data)
        if data[-k] < 0x80:
            break
    return len(data)


def _parts(path: Path, stream: IO[bytes], raw: IO[bytes], at: int, line: int, whole: int) -> Iterator[Block]:
    parts: list[bytes] = []  # read and not given out: one, unless the file is to be whole
    size = 0  # of them

    def block(data: bytes, goes_on: bool) -> Block:
        nonlocal at, line
        first, at, line = line, at + len(data), line + _count_lines(data)
        return Block(path, first, data, at, line, raw.tell(), goes_on)

    try:
        while chunk := stream.read(BLOCK):
            if parts and not whole:
                data = parts.pop()
                cut = _whole_characters(data)
                chunk, size = data[cut:] + chunk, 0
                yield block(data[:cut], True)
            parts.append(chunk)
            size += len(chunk)
            if whole and size > whole:
                cause = (
                    f"a .txt is one document, and this one is larger than {whole >> 20} MiB, "
                    "the most that this tokenizer takes at once; split it, or use --tokenizer world"
                )
                yield Block(path, 1, BadInput(path, 0, cause), at + size)
                return
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Block(path, 1, BadInput(path, 0, f"the {path.suffix} file is damaged: {error}"), at + size)
        return
    if parts or at == 0:  # behind the end nothing is left: a part that goes on is never the last
        yield block(b"".join(parts), False)


def _rows(path: Path, text_key: str, start: int) -> Iterator[Block]:
    for found in read_rows(path, text_key, start, BLOCK):
        if isinstance(found, Damage):
            yield Block(path, found.row + 1, BadInput(path, found.row + 1, found.cause), max(0, found.row), found.row + 1)
        else:
            end = found.first + len(found.texts)
            yield Block(path, found.first + 1, found.texts, end, end + 1, int(path.stat().st_size * found.part))


def parse(block: Block, text_key: str = "text") -> Parsed:
    """The texts of a block: of JSON lines and rows the values of `text_key`, blank lines passed over."""
    data = block.data
    if isinstance(data, BadInput):
        return Parsed(Texts.join([]), [], [data])
    if isinstance(data, list):
        return _collect(block, ((block.line + k, value) for k, value in enumerate(data)), lambda value: _text_of_cell(value, text_key))
    if kind(block.file) == ".txt":
        return _parse_part(block, data)
    if block.line == 1:
        data = data.removeprefix(BOM)
    if (found := _parse_natively(data, text_key, block.next_line - block.line + 1)) is not None:
        texts, lines = found
        return Parsed(texts, block.line + lines)
    numbered = ((block.line + k, line.strip()) for k, line in enumerate(data.split(b"\n")))
    return _collect(block, ((number, line) for number, line in numbered if line), lambda line: _text_of(line, text_key))


def _collect(block: Block, values: Iterator[tuple[int, Any]], text_of: Callable[[Any], bytes]) -> Parsed:
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
            raise UserError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
            raise UserError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise UserError(f"no key {text_key!r} (keys: {', '.join(list(record)[:5]) or 'none'}); see --text_key")
    value = record[text_key]
    if not isinstance(value, str):
        raise UserError(f"the value of {text_key!r} is {type(value).__name__}, not text")
    return utf8(value)


def _text_of_cell(value: bytes | None, text_key: str) -> bytes:
    """The text in a row of a table: UTF-8, unless the file was written by a tool that does not care."""
    if value is None:
        raise UserError(f"there is nothing (null) in the column {text_key!r}")
    if len(value) > LONGEST:
        raise UserError(
            f"the text is {len(value)} bytes long, more than {LONGEST >> 20} MiB; "
            "put it into a .txt file of its own, which may have any size"
        )
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"invalid UTF-8 at byte {error.start} of the text") from None
    return value


def _parse_part(block: Block, data: bytes) -> Parsed:
    """A part of a .txt, or all of it, as one text."""
    begin = block.after - len(data)
    text = data.removeprefix(BOM) if begin == 0 else data
    bad = None
    if begin == 0 and not block.goes_on and not text.strip():
        bad = BadInput(block.file, 0, "the file is empty")
    else:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = BadInput(
                block.file, block.line + data.count(b"\n", 0, error.start), f"invalid UTF-8 at byte {begin + error.start} of the file"
            )
    return Parsed(Texts.join([]), [], [bad]) if bad else Parsed(Texts.join([text]), [1])
